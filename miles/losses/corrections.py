"""Corrections for samples that another policy (the rollout engine) drew.

Weights are data: detached, computed once for the whole step over all micro-batches laid end to
end (`Packed.cat`), then split.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import MissingLogprobError, SettingError, ShapeError
from miles.losses.metrics import Metrics, max_over, mean_over
from miles.packed import Packed, tokens_per_sequence

__all__ = ["Correction", "Reject", "Weight", "importance_weights", "truncated_is"]

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class Weight:
    """How a log-ratio becomes a weight."""

    level: Literal["token", "sequence_sum", "sequence_mean"]
    """Whose ratio: the token's, the sequence's product, or its geometric mean."""
    mode: Literal["truncate", "clip", "mask"]
    """`min(rho, high)`; `clamp(rho, low, high)`; or rho inside the bounds, rejected outside."""
    low: float | None = None
    """Lower bound of rho; not for `truncate`."""
    high: float | None = None
    """Upper bound of rho."""

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence_sum", "sequence_mean"):
            raise SettingError(
                f"level is {self.level!r}; expected token, sequence_sum or sequence_mean"
            )
        if self.mode not in ("truncate", "clip", "mask"):
            raise SettingError(f"mode is {self.mode!r}; expected truncate, clip or mask")
        if self.high is None or (self.low is None) != (self.mode == "truncate"):
            raise SettingError(
                f"mode={self.mode!r} got low={self.low} and high={self.high}; expected high alone "
                'for "truncate", both for "clip" and "mask"'
            )
        if not 0 <= (self.low or 0.0) <= self.high:
            raise SettingError(
                f"got low={self.low} and high={self.high}; expected 0 <= low <= high"
            )


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Leave out a token, or a whole sequence, whose statistic is outside `[low, high]`."""

    level: Literal["token", "sequence_mean", "sequence_sum", "sequence_max", "sequence_min"]
    """The token itself, or its sequence by this aggregate over trainable tokens."""
    statistic: Literal["ratio", "k1", "k2", "k3"]
    """rho; rollout - old; half its square; or rho - 1 - log rho."""
    low: float | None = None
    """Lower bound; None for none."""
    high: float | None = None
    """Upper bound; None for none."""

    def __post_init__(self) -> None:
        levels = ("token", "sequence_mean", "sequence_sum", "sequence_max", "sequence_min")
        if self.level not in levels:
            raise SettingError(f"level is {self.level!r}; expected one of {levels}")
        if self.statistic not in ("ratio", "k1", "k2", "k3"):
            raise SettingError(f"statistic is {self.statistic!r}; expected ratio, k1, k2 or k3")
        if self.low is None and self.high is None:
            raise SettingError("Reject has neither low nor high, so it rejects nothing; give one")


@dataclass(frozen=True)
class Correction:
    """The weight of each token and whether it is trained on at all."""

    weights_T: Tensor
    """`[T]`, no gradient; 0 wherever `keep_T` is False."""
    keep_T: Tensor
    """bool `[T]`: trainable and not rejected."""
    metrics: Metrics
    """Readings of the step, for `reduce_metrics`."""

    def split(self, lengths: Sequence[int]) -> list[Correction]:
        """One correction a micro-batch, of `lengths` positions each; the metrics stay here."""
        if sum(lengths) != self.weights_T.shape[0]:
            raise ShapeError(
                f"lengths sum to {sum(lengths)}; expected {self.weights_T.shape[0]}, the number of "
                "positions that this correction covers"
            )
        weights = torch.split(self.weights_T, list(lengths))
        keeps = torch.split(self.keep_T, list(lengths))
        return [Correction(w_T, k_T, {}) for w_T, k_T in zip(weights, keeps, strict=True)]


@torch.no_grad()
def importance_weights(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    packed: Packed,
    *,
    weight: Weight | None,
    reject: Sequence[Reject] = (),
    normalize: Literal["mean"] | None = None,
    group: ProcessGroup | None = None,
) -> Correction:
    """Weights `rho = exp(old - rollout)` and rejections, independent of each other.

    Args:
        old_logprobs_T: float `[T]`, the trainer's at the start of the step.
        rollout_logprobs_T: float `[T]`, the engine's.
        packed: the whole step of this rank.
        weight: how rho becomes a weight; None for weights of 1.
        reject: each is applied; a token stays when all of them keep it.
        normalize: "mean" divides by the mean weight of the kept tokens (or sequences, for a
            sequence-level weight) of the whole step, then caps at `weight.high` again.
        group: data-parallel ranks, for the normalisation.

    Returns:
        A `Correction`; nothing in it carries gradient.

    Raises:
        MissingLogprobError: NaN at a trainable token, in either input.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, False]]))
        >>> old, rollout = torch.tensor([0.0, -1.0, 0.0]), torch.tensor([-2.0, -1.0, 0.0])
        >>> w = Weight(level="token", mode="truncate", high=2.0)
        >>> importance_weights(old, rollout, packed, weight=w).weights_T.tolist()
        [2.0, 1.0, 0.0]
    """
    packed.check(old_logprobs_T=old_logprobs_T, rollout_logprobs_T=rollout_logprobs_T)
    if normalize not in (None, "mean"):
        raise SettingError(f"normalize is {normalize!r}; expected None or 'mean'")
    if normalize is not None and weight is None:
        raise SettingError("normalize has no effect without a weight; give one, or normalize=None")
    mask_T = packed.mask_T
    x_T = torch.where(mask_T, old_logprobs_T, 0) - torch.where(mask_T, rollout_logprobs_T, 0)
    _refuse_nan(x_T, old_logprobs_T, packed)

    keep_T = mask_T.clone()
    for rule in reject:
        keep_T &= _inside(_statistic(x_T, packed, rule), rule.low, rule.high)
    if weight is None:
        weights_T = torch.where(keep_T, torch.ones_like(x_T), 0)
        return Correction(weights_T, keep_T, _metrics(weights_T, keep_T, mask_T, None))

    rho_T = _exp(_aggregate(x_T, packed, weight.level))
    if weight.mode == "mask":
        keep_T &= _inside(rho_T, weight.low, weight.high)
    weights_T = torch.where(keep_T, rho_T.clamp(weight.low, weight.high), 0)
    if normalize == "mean":
        mean = _mean_weight(weights_T, keep_T, packed, weight.level, group)
        weights_T = (weights_T / mean).clamp(max=weight.high)
    return Correction(weights_T, keep_T, _metrics(weights_T, keep_T, mask_T, rho_T > weight.high))  # type: ignore[operator]


def truncated_is(
    old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, packed: Packed, *, high: float = 2.0
) -> Correction:
    """TIS: the token's own ratio, at most `high`.

    References:
        https://fengyao.notion.site/off-policy-rl (Truncated Importance Sampling, C = 2).
    """
    weight = Weight(level="token", mode="truncate", high=high)
    return importance_weights(old_logprobs_T, rollout_logprobs_T, packed, weight=weight)


def _refuse_nan(x_T: Tensor, old_logprobs_T: Tensor, packed: Packed) -> None:
    bad_T = x_T.isnan() & packed.mask_T
    if not bool(bad_T.any()):
        return
    token = int(bad_T.nonzero()[0])
    name = "old_logprobs_T" if bool(old_logprobs_T[token].isnan()) else "rollout_logprobs_T"
    raise MissingLogprobError(
        f"{int(bad_T.sum())} trainable tokens have no usable log-prob (NaN, or the same infinity "
        f"on both sides), the first at position {token} (sequence "
        f"{int(packed.seq_ids_T[token])}), in {name}; expected a number for every token that "
        "mask_T trains on; mask the token, or have the engine return log-probs"
    )


def _exp(log_T: Tensor) -> Tensor:
    return log_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _inside(values_T: Tensor, low: float | None, high: float | None) -> Tensor:
    inside_T = torch.ones_like(values_T, dtype=torch.bool)
    if low is not None:
        inside_T &= values_T >= low
    if high is not None:
        inside_T &= values_T <= high
    return inside_T


def _aggregate(values_T: Tensor, packed: Packed, level: str) -> Tensor:
    """Per token `[T]`: its own value, or its sequence's sum, mean, max or min."""
    if level == "token":
        return values_T
    if level in ("sequence_sum", "sequence_mean"):
        values_S = packed.sum_per_sequence(values_T)
        if level == "sequence_mean":
            values_S = values_S / tokens_per_sequence(packed).clamp(min=1)
        return packed.per_token(values_S)
    sign = 1.0 if level == "sequence_max" else -1.0
    signed_T = torch.where(packed.mask_T, sign * values_T, -torch.inf)
    largest_S = signed_T.new_full((packed.num_seqs,), -torch.inf)
    largest_S.scatter_reduce_(0, packed.seq_ids_T, signed_T, "amax")
    if packed.seq_group is not None:
        dist.all_reduce(largest_S, op=dist.ReduceOp.MAX, group=packed.seq_group)
    return sign * packed.per_token(largest_S)


def _statistic(x_T: Tensor, packed: Packed, rule: Reject) -> Tensor:
    if rule.statistic == "ratio":  # exp is monotonic, so it commutes with max and min
        return _exp(_aggregate(x_T, packed, rule.level))
    if rule.statistic == "k1":
        values_T = -x_T
    elif rule.statistic == "k2":
        values_T = x_T**2 / 2
    else:
        clamped_T = x_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values_T = clamped_T.expm1() - clamped_T
    return _aggregate(values_T, packed, rule.level)


def _mean_weight(
    weights_T: Tensor, keep_T: Tensor, packed: Packed, level: str, group: ProcessGroup | None
) -> Tensor:
    kept_S = tokens_per_sequence(packed, keep_T)
    sums_S = packed.sum_per_sequence(weights_T)
    if level != "token":
        sums_S, kept_S = sums_S / kept_S.clamp(min=1), (kept_S > 0).to(kept_S.dtype)
    total = torch.stack([sums_S.to(torch.float64).sum(), kept_S.to(torch.float64).sum()])
    if group is not None:
        dist.all_reduce(total, group=group)
    mean = total[0] / total[1].clamp(min=1)
    return torch.where(mean > 0, mean, 1.0).to(weights_T.dtype)


def _metrics(weights_T: Tensor, keep_T: Tensor, mask_T: Tensor, capped_T: Tensor | None) -> Metrics:
    if capped_T is None:
        capped_T = torch.zeros_like(keep_T)
    return {
        "correction/weight_mean": mean_over(weights_T, keep_T),
        "correction/weight_max": max_over(weights_T, keep_T),
        "correction/capped": mean_over(capped_T, keep_T),
        "correction/kept": mean_over(keep_T, mask_T),
    }
