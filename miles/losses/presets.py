"""Published algorithms as a few lines over the parts. Each returns `(loss, metrics)`.

Shapes: T tokens.
"""

from __future__ import annotations

from torch import Tensor

from miles.errors import SettingError
from miles.losses.aggregation import aggregate
from miles.losses.corrections import Correction
from miles.losses.metrics import Metrics, max_over, mean_over
from miles.losses.ratios import log_ratio
from miles.losses.regularizers import kl_penalty
from miles.losses.surrogates import ppo_clip
from miles.packed import Denominators, Packed

__all__ = ["grpo"]


def grpo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    correction: Correction | None = None,
    ref_logprobs_T: Tensor | None = None,
    kl_coef: float = 0.0,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """GRPO: clipped ratio, each sequence's mean, averaged over sequences.

    Args:
        logprobs_T: float `[T]`, with gradient.
        old_logprobs_T: float `[T]`, the trainer's before this step's first update.
        advantages_T: float `[T]`, from `group_advantages` through `Packed.per_token`.
        packed: this micro-batch.
        denominators: of the whole step.
        ratio_min, ratio_max: absolute bounds of the ratio.
        correction: this micro-batch's part of a `Correction`, for the gap to the engine.
        ref_logprobs_T: float `[T]`, of the reference policy; with `kl_coef`.
        kl_coef: beta of the paper (0.04 there); k3 as in its equation 4.
        averaged_over: see `aggregate`.

    References:
        arXiv 2402.03300, equations 3 and 4.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> logprobs = torch.full((4,), -1.0, requires_grad=True)
        >>> advantages = packed.per_token(torch.tensor([1.0, -1.0]))
        >>> loss, metrics = grpo(logprobs, logprobs.detach(), advantages, packed, count(packed))
        >>> loss.backward()
        >>> loss.item(), logprobs.grad.tolist()
        (0.0, [-0.25, -0.25, 0.5, 0.0])
    """
    if (ref_logprobs_T is None) != (kl_coef == 0.0):
        raise SettingError(
            f"got kl_coef={kl_coef} and {'no' if ref_logprobs_T is None else 'a'} ref_logprobs_T; "
            "expected both or neither"
        )
    packed.check(advantages_T=advantages_T)
    ratio_T = log_ratio(logprobs_T, old_logprobs_T, packed)
    surrogate = ppo_clip(ratio_T, advantages_T, ratio_min=ratio_min, ratio_max=ratio_max)
    loss = aggregate(
        surrogate.loss_T,
        packed,
        denominators,
        mode="seq_mean_token_mean",
        weights_T=None if correction is None else correction.weights_T,
        keep_T=None if correction is None else correction.keep_T,
        averaged_over=averaged_over,
    )
    mask_T = packed.mask_T
    metrics: Metrics = {
        "ratio/mean": mean_over(ratio_T.exp(), mask_T),
        "ratio/max": max_over(ratio_T.exp(), mask_T),
        "clip/low": mean_over(surrogate.clipped_low_T, mask_T),
        "clip/high": mean_over(surrogate.clipped_high_T, mask_T),
    }
    if ref_logprobs_T is not None:
        kl_T = kl_penalty(logprobs_T, ref_logprobs_T, packed)
        loss = loss + kl_coef * aggregate(
            kl_T, packed, denominators, mode="seq_mean_token_mean", averaged_over=averaged_over
        )
        metrics["kl/ref"] = mean_over(kl_T, mask_T)
    return loss, metrics
