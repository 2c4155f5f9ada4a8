"""Policy-gradient surrogates, unreduced: what each token would like to be minimised.

What takes log-probs computes and returns float32 for bf16 and fp16 and float64 for float64; a
gradient comes back in the dtype of its input.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from miles.errors import SettingError, ShapeError
from miles.losses._dtypes import widened
from miles.packed import Packed

__all__ = ["Surrogate", "cispo", "dppo", "dro", "ppo_clip", "reinforce", "sapo"]


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

    The side is chosen by comparing r with the bounds, as the flags say; a token on a bound is not
    clipped and has its whole gradient. 0 where A is 0; a ratio that is NaN gives NaN anyway.

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
    _check_same_shape(log_ratio_T, advantages_T)
    check_bounds(ratio_min, ratio_max, dual_clip)
    advantages_T = advantages_T.detach()
    ratio_T = exp_ratio(log_ratio_T)
    low_T = (advantages_T < 0) & (ratio_T < ratio_min)
    high_T = (advantages_T > 0) & (ratio_T > ratio_max)
    # Not torch.maximum: between two sides that round to the same number it halves the gradient.
    bounded_T = torch.where(low_T, ratio_min, torch.where(high_T, ratio_max, ratio_T))
    if dual_clip is not None:
        bounded_T = torch.where((advantages_T < 0) & (ratio_T > dual_clip), dual_clip, bounded_T)
    loss_T = torch.where(advantages_T == 0, 0, -bounded_T * advantages_T)
    return Surrogate(torch.where(ratio_T.isnan(), ratio_T, loss_T), low_T, high_T)


def cispo(
    logprobs_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    ratio_min: float = 0.0,
    ratio_max: float,
) -> Surrogate:
    """`-sg(clamp(r, ratio_min, ratio_max)) A logp`: the ratio is a weight, so no token is dropped.

    The weight is clamped whatever the sign of A; the flags keep the convention of `ppo_clip`.

    Args:
        logprobs_T: float `[T]`, carries the gradient.
        log_ratio_T: float `[T]`, from `log_ratio`; its gradient is not used.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens live.
        ratio_min: absolute lower bound of the ratio; 0 for none.
        ratio_max: absolute upper bound (5.0, not 4.0 for "1 + 4").

    Returns:
        A loss of 0 at masked positions.

    References:
        CISPO, in MiniMax-M1: arXiv 2506.13585.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> logprobs, ratio = torch.tensor([-1.0, -2.0]), torch.tensor([8.0, 0.5])
        >>> s = cispo(logprobs, ratio.log(), torch.tensor([1.0, 1.0]), packed, ratio_max=5.0)
        >>> s.loss_T.tolist(), s.clipped_high_T.tolist()
        ([5.0, 1.0], [True, False])
    """
    check_bounds(ratio_min, ratio_max)
    logprobs_T, log_ratio_T, advantages_T = trainable(
        packed, logprobs_T=logprobs_T, log_ratio_T=log_ratio_T, advantages_T=advantages_T.detach()
    )
    ratio_T = log_ratio_T.detach().exp()
    loss_T = -weighted(ratio_T.clamp(ratio_min, ratio_max), advantages_T) * logprobs_T
    return Surrogate(
        loss_T,
        (advantages_T < 0) & (ratio_T < ratio_min),
        (advantages_T > 0) & (ratio_T > ratio_max),
    )


def sapo(
    log_ratio_T: Tensor, advantages_T: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Surrogate:
    """`-A sigmoid(tau (r - 1)) 4 / tau`: a soft gate instead of a clip.

    The gradient by the log-ratio is -A at r = 1 and fades on both sides of it.

    Args:
        log_ratio_T: float `[T]`, from `log_ratio`; r is its exponential.
        advantages_T: float `[T]`, detached here.
        tau_pos: temperature where A > 0, above 0; larger closes the gate sooner.
        tau_neg: temperature elsewhere, above 0.

    Returns:
        Flags that are False everywhere: nothing is clipped.

    References:
        SAPO: arXiv 2511.20347.

    Example:
        >>> sapo(torch.zeros(2), torch.tensor([1.0, -1.0]), tau_neg=2.0).loss_T.tolist()
        [-2.0, 1.0]
    """
    _check_same_shape(log_ratio_T, advantages_T)
    if not (tau_pos > 0 and tau_neg > 0):
        raise SettingError(
            f"tau_pos is {tau_pos} and tau_neg {tau_neg}; expected numbers above 0, such as 1.0"
        )
    advantages_T = advantages_T.detach()
    tau_T = torch.where(
        advantages_T > 0, log_ratio_T.new_tensor(tau_pos), log_ratio_T.new_tensor(tau_neg)
    )
    gate_T = torch.sigmoid(tau_T * (exp_ratio(log_ratio_T) - 1)) * 4 / tau_T
    return unclipped(-gate_T * advantages_T)


def reinforce(logprobs_T: Tensor, advantages_T: Tensor, packed: Packed) -> Surrogate:
    """`-A logp`: the policy gradient itself, for samples of the policy that is trained.

    Args:
        logprobs_T: float `[T]`, carries the gradient.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens live.

    Returns:
        A loss of 0 at masked positions; flags that are False everywhere.

    References:
        Williams 1992, https://doi.org/10.1007/BF00992696.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, False]]))
        >>> logprobs = torch.tensor([-1.0, float("nan")])
        >>> reinforce(logprobs, torch.tensor([2.0, 2.0]), packed).loss_T.sum()
        tensor(2.)
    """
    logprobs_T, advantages_T = trainable(
        packed, logprobs_T=logprobs_T, advantages_T=advantages_T.detach()
    )
    return unclipped(-advantages_T * logprobs_T)


def dro(
    logprobs_T: Tensor, log_ratio_T: Tensor, advantages_T: Tensor, packed: Packed, *, beta: float
) -> Surrogate:
    """`-(A logp - beta / 2 lr^2)`: the log-ratio lr is pulled to 0 by a square, not clipped.

    Args:
        logprobs_T: float `[T]`, carries the gradient.
        log_ratio_T: float `[T]`, from `log_ratio`; carries the gradient too.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens live.
        beta: strength of the pull, 0 or more.

    Returns:
        A loss of 0 at masked positions; flags that are False everywhere.

    References:
        DRO: arXiv 2405.19107; in the form for tokens that tinker and verl use.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True]]))
        >>> dro(torch.tensor([-1.0]), torch.tensor([2.0]), torch.ones(1), packed, beta=0.5).loss_T
        tensor([2.])
    """
    if not beta >= 0:
        raise SettingError(f"beta is {beta}; expected 0 or more, such as 0.05")
    logprobs_T, log_ratio_T, advantages_T = trainable(
        packed, logprobs_T=logprobs_T, log_ratio_T=log_ratio_T, advantages_T=advantages_T.detach()
    )
    return unclipped(beta / 2 * log_ratio_T**2 - advantages_T * logprobs_T)


def dppo(
    logprobs_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    rollout_logprobs_T: Tensor,
    kind: Literal["tv", "kl"] = "tv",
    delta: float = 0.2,
    ratio_cap: float | None = None,
) -> Surrogate:
    """`-r A`, and 0 for a token that has already moved more than `delta` the way A pushes it.

    How far it moved is a divergence between the policy and the one that sampled it, over the two
    events "this token" and "any other", with p and q the token's probability under each:
    `tv` |p - q|, `kl` q log(q / p) + (1 - q) log((1 - q) / (1 - p)). A rare token may then grow by
    a large ratio, and a likely one may not fall by a small one, unlike under a clipped ratio.

    Args:
        logprobs_T: float `[T]`, log p; carries the gradient with `ratio_cap`.
        log_ratio_T: float `[T]`, from `log_ratio`; carries it without.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens live.
        rollout_logprobs_T: float `[T]`, log q, detached here.
        kind: `tv` or `kl`.
        delta: largest divergence, above 0 (a `kl` is smaller than a `tv`: 0.05 is usual there).
        ratio_cap: c of 1 or more; the loss is then `-sg(min(r, c)) A logp`.

    Returns:
        A loss of 0 at masked positions. A dropped token's flag is `clipped_high_T` where A > 0 and
        `clipped_low_T` where A < 0.

    References:
        DPPO: arXiv 2602.04879.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> p, q = torch.tensor([0.9, 0.02]).log(), torch.tensor([0.6, 0.01]).log()
        >>> s = dppo(p, p - q, torch.ones(2), packed, rollout_logprobs_T=q)
        >>> [round(x, 4) for x in s.loss_T.tolist()], s.clipped_high_T.tolist()
        ([0.0, -2.0], [True, False])
    """
    if kind not in ("tv", "kl"):
        raise SettingError(f"kind is {kind!r}; expected tv or kl")
    if not delta > 0:
        raise SettingError(f"delta is {delta}; expected a number above 0, such as 0.2")
    if ratio_cap is not None and not ratio_cap >= 1:
        raise SettingError(f"ratio_cap is {ratio_cap}; expected 1 or more, such as 20.0, or None")
    logprobs_T, log_ratio_T, advantages_T, rollout_T = trainable(
        packed,
        logprobs_T=logprobs_T,
        log_ratio_T=log_ratio_T,
        advantages_T=advantages_T.detach(),
        rollout_logprobs_T=rollout_logprobs_T.detach(),
    )
    divergence_T, rise_T = _binary_divergence(logprobs_T.detach(), rollout_T, kind)
    far_T = divergence_T > delta
    low_T = (advantages_T < 0) & (rise_T < 0) & far_T
    high_T = (advantages_T > 0) & (rise_T > 0) & far_T
    if ratio_cap is None:
        loss_T = -weighted(exp_ratio(log_ratio_T), advantages_T)
    else:
        capped_T = log_ratio_T.detach().exp().clamp(max=ratio_cap)
        loss_T = -weighted(capped_T, advantages_T) * logprobs_T
    loss_T = nan_where(divergence_T.isnan(), loss_T)
    return Surrogate(without(loss_T, low_T | high_T), low_T, high_T)


def _binary_divergence(log_p_T: Tensor, log_q_T: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The divergence and `p - q`."""
    log_p_T, log_q_T = log_p_T.clamp(max=0), log_q_T.clamp(max=0)  # rounding may leave it above
    q_T = log_q_T.exp()
    rise_T = log_p_T.exp() - q_T
    if kind == "tv":
        return rise_T.abs(), rise_T
    rest_q_T, rest_p_T = -torch.expm1(log_q_T), -torch.expm1(log_p_T)
    this_T = torch.where(q_T == 0, 0, q_T * (log_q_T - log_p_T))
    other_T = torch.where(rest_q_T == 0, 0, rest_q_T * (rest_q_T.log() - rest_p_T.log()))
    return this_T + other_T, rise_T


def trainable(packed: Packed, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor, `[T]`, at least float32, 0 at masked positions and no gradient from there."""
    packed.check(**tensors)
    return tuple(torch.where(packed.mask_T, widened(x_T), 0) for x_T in tensors.values())


def weighted(ratio_T: Tensor, advantages_T: Tensor) -> Tensor:
    """`r A`, and 0 where A is 0 even at a ratio of infinity; a NaN stays one."""
    nothing_T = (advantages_T == 0) & ~ratio_T.isnan()
    return torch.where(nothing_T, 0, ratio_T * advantages_T)


def without(loss_T: Tensor, dropped_T: Tensor) -> Tensor:
    """The loss with 0 and no gradient at dropped tokens; a NaN stays one."""
    return torch.where(dropped_T & ~loss_T.isnan(), 0, loss_T)


def nan_where(unknown_T: Tensor, loss_T: Tensor) -> Tensor:
    """The loss with NaN, in the gradient too, where what decides about a token is NaN."""
    return loss_T * torch.where(unknown_T, torch.nan, 1.0).to(loss_T.dtype)


def unclipped(loss_T: Tensor) -> Surrogate:
    """A surrogate that clips nothing."""
    never_T = torch.zeros_like(loss_T, dtype=torch.bool)
    return Surrogate(loss_T, never_T, never_T)


def exp_ratio(log_ratio_T: Tensor) -> Tensor:
    """The ratio, whose gradient is 0 where none arrives."""
    out: Tensor = _Exp.apply(log_ratio_T)
    return out


def check_bounds(ratio_min: float, ratio_max: float, dual_clip: float | None = None) -> None:
    """Refuse bounds that look relative, such as 0.2 where 0.8 or 1.2 is meant."""
    if not 0 <= ratio_min <= 1 <= ratio_max:
        raise SettingError(
            f"ratio_min is {ratio_min} and ratio_max {ratio_max}; expected absolute ratios with "
            "0 <= ratio_min <= 1 <= ratio_max, such as 0.8 and 1.2"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise SettingError(f"dual_clip is {dual_clip}; expected a number above 1, such as 3.0")


def _check_same_shape(log_ratio_T: Tensor, advantages_T: Tensor) -> None:
    if log_ratio_T.shape != advantages_T.shape:
        raise ShapeError(
            f"log_ratio_T has shape {tuple(log_ratio_T.shape)} and advantages_T "
            f"{tuple(advantages_T.shape)}; expected [T] for both (Packed.per_token spreads "
            "advantages over tokens)"
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
