"""Policy-gradient surrogates, unreduced: what each token would like to be minimised.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles.errors import SettingError, ShapeError

__all__ = ["Surrogate", "ppo_clip"]


class Surrogate(NamedTuple):
    """A loss per token and where its clipped branch is the one in effect."""

    loss_T: Tensor
    """float `[T]`, to be aggregated and minimised."""
    clipped_low_T: Tensor
    """bool `[T]`: A < 0 and the ratio is below `ratio_min`."""
    clipped_high_T: Tensor
    """bool `[T]`: A > 0 and the ratio is above `ratio_max`."""


def ppo_clip(
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    *,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    dual_clip: float | None = None,
) -> Surrogate:
    """`max(-r A, -clamp(r, ratio_min, ratio_max) A)`.

    Args:
        log_ratio_T: float `[T]`, from `log_ratio`; r is its exponential.
        advantages_T: float `[T]`, detached here.
        ratio_min: absolute lower bound of the ratio (0.8, not 0.2).
        ratio_max: absolute upper bound (1.2; DAPO's clip-higher is 1.28).
        dual_clip: c > 1; where A < 0 the loss is at most `-c A`.

    References:
        PPO: arXiv 1707.06347, equation 7. Dual clip: arXiv 1912.09729, equation 5.

    Example:
        >>> s = ppo_clip(torch.tensor([2.0, 0.5, 2.0]).log(), torch.tensor([1.0, -1.0, -1.0]))
        >>> [round(x, 4) for x in s.loss_T.tolist()], s.clipped_high_T.tolist()
        ([-1.2, 0.8, 2.0], [True, False, False])
    """
    if log_ratio_T.shape != advantages_T.shape:
        raise ShapeError(
            f"log_ratio_T has shape {tuple(log_ratio_T.shape)} and advantages_T "
            f"{tuple(advantages_T.shape)}; expected [T] for both (Packed.per_token spreads "
            "advantages over tokens)"
        )
    if not 0 <= ratio_min <= 1 <= ratio_max:
        raise SettingError(
            f"ratio_min is {ratio_min} and ratio_max {ratio_max}; expected absolute ratios with "
            "0 <= ratio_min <= 1 <= ratio_max, such as 0.8 and 1.2"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise SettingError(f"dual_clip is {dual_clip}; expected a number above 1, such as 3.0")
    advantages_T = advantages_T.detach()
    ratio_T = _Exp.apply(log_ratio_T)  # type: ignore[no-untyped-call]
    unclipped_T = torch.where(advantages_T == 0, 0, -ratio_T * advantages_T)
    loss_T = torch.maximum(unclipped_T, -ratio_T.clamp(ratio_min, ratio_max) * advantages_T)
    negative_T = advantages_T < 0
    if dual_clip is not None:
        loss_T = torch.where(negative_T, torch.minimum(loss_T, -dual_clip * advantages_T), loss_T)
    return Surrogate(
        loss_T,
        negative_T & (ratio_T < ratio_min),
        (advantages_T > 0) & (ratio_T > ratio_max),
    )


class _Exp(torch.autograd.Function):
    """exp whose gradient is 0 where none arrives, even at a ratio of infinity.

    A clipped or rejected token sends back 0, and 0 x inf would make it NaN.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        out = values.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.where(grads[0] == 0, 0, grads[0] * out)
