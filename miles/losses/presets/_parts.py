"""What presets share.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from miles.losses.aggregation import Mode, aggregate
from miles.losses.metrics import Metrics, mean_over
from miles.losses.policy import ratio_metrics
from miles.losses.ratios import Level, log_ratio
from miles.losses.surrogates import Surrogate, ppo_clip, reinforce
from miles.packed import Denominators, Packed

__all__ = ["clipped", "reduced", "reinforced"]


def clipped(
    level: Level,
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    ratio_min: float,
    ratio_max: float,
    corrected: dict[str, Any],
    averaged_over: int,
) -> tuple[Tensor, Metrics]:
    """`ppo_clip` of the ratio at `level`, each sequence's mean, averaged over sequences."""
    packed.check(advantages_T=advantages_T)
    ratio_T = log_ratio(logprobs_T, old_logprobs_T, packed, level=level)
    surrogate = ppo_clip(ratio_T, advantages_T, ratio_min=ratio_min, ratio_max=ratio_max)
    return reduced(
        surrogate, ratio_T, packed, denominators, "seq_mean_token_mean", corrected, averaged_over
    )


def reduced(
    surrogate: Surrogate,
    ratio_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    mode: Mode,
    corrected: dict[str, Any],
    averaged_over: int,
) -> tuple[Tensor, Metrics]:
    """A surrogate aggregated, with the readings of its ratio."""
    loss = aggregate(
        surrogate.loss_T, packed, denominators, mode=mode, averaged_over=averaged_over,
        **corrected,
    )  # fmt: skip
    return loss, ratio_metrics(ratio_T, surrogate, packed.mask_T)


def reinforced(
    logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    mode: Mode,
    corrected: dict[str, Any],
    averaged_over: int,
) -> tuple[Tensor, Metrics]:
    """REINFORCE, aggregated."""
    loss_T = reinforce(logprobs_T, advantages_T, packed).loss_T
    loss = aggregate(
        loss_T, packed, denominators, mode=mode, averaged_over=averaged_over, **corrected
    )
    return loss, {"logprob/mean": mean_over(logprobs_T, packed.mask_T)}
