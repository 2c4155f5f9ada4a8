"""Penalties that keep a policy near another one.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from miles.errors import SettingError
from miles.packed import Packed

__all__ = ["kl_penalty"]


def kl_penalty(
    logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    packed: Packed,
    *,
    value: Literal["k1", "k2", "k3", "abs"] = "k3",
    grad: Literal["pathwise", "reverse_kl"] = "pathwise",
) -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy sampled.

    What is reported and what is differentiated are chosen apart, since the gradient of a good
    estimate of a value need not be a good estimate of the gradient: `k1` differentiated has zero
    expectation, `k3` follows the forward KL.

    Args:
        logprobs_T: float `[T]`, with gradient.
        ref_logprobs_T: float `[T]`, detached here.
        packed: where the tokens live.
        value: with d = logprob - ref: `k1` d, `k2` d^2 / 2, `k3` exp(-d) - 1 + d, `abs` |d|.
        grad: `pathwise` differentiates the value; `reverse_kl` gives each log-prob the gradient d,
            unbiased for the reverse KL on policy.

    Returns:
        `[T]`; 0 at masked positions.

    References:
        k1, k2, k3: http://joschu.net/blog/kl-approx.html. Gradients: arXiv 2510.01555.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> ref = torch.tensor([-1.5, -2.0])
        >>> kl = kl_penalty(logprobs, ref, packed, value="k1", grad="reverse_kl")
        >>> kl.sum().backward()
        >>> kl.tolist(), logprobs.grad.tolist()
        ([0.5, 0.0], [0.5, 0.0])
    """
    packed.check(logprobs_T=logprobs_T, ref_logprobs_T=ref_logprobs_T)
    new_T = torch.where(packed.mask_T, logprobs_T, 0)
    d_T = new_T - torch.where(packed.mask_T, ref_logprobs_T.detach(), 0)
    if value == "k1":
        value_T = d_T
    elif value == "k2":
        value_T = d_T**2 / 2
    elif value == "k3":
        value_T = torch.expm1(-d_T) + d_T
    elif value == "abs":
        value_T = d_T.abs()
    else:
        raise SettingError(f"value is {value!r}; expected k1, k2, k3 or abs")
    if grad == "pathwise":
        return value_T
    if grad == "reverse_kl":
        return value_T.detach() + d_T.detach() * (new_T - new_T.detach())
    raise SettingError(f"grad is {grad!r}; expected pathwise or reverse_kl")
