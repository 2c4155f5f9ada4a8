"""Corrections for samples that another policy (the rollout engine) drew.

Weights are data: detached, computed once for the whole step over all micro-batches laid end to
end (`Packed.cat`), then split.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, MissingLogprobError, SettingError, ShapeError
from miles.losses._dtypes import as_logprobs
from miles.losses._rules import (
    MaxStaleness,
    OffPolicyNegative,
    Reject,
    Weight,
    aggregate_to,
    check_rules,
    exp_clamped,
    inside,
    kept_by,
    refuse_infinite_advantages,
    refuse_versions,
    rule_name,
    veto,
)
from miles.losses._selection import ranks_of_step, refused_together
from miles.losses.metrics import Metrics, ess_over, max_over, mean_over
from miles.packed import Packed, check_tensors, tokens_per_sequence

__all__ = [
    "Correction",
    "MaxStaleness",
    "OffPolicyNegative",
    "Reject",
    "Weight",
    "icepop",
    "importance_weights",
    "interpolate_proximal",
    "masked_is",
    "truncated_is",
    "veto",
]


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

    @classmethod
    def only(cls, keep_T: Tensor) -> Self:
        """Trains on these tokens with a weight of 1, and on no others.

        Args:
            keep_T: bool `[T]`, such as from `keep_untruncated` or `entropy_quantile_mask`.

        Raises:
            DtypeError: not bool.

        Example:
            >>> Correction.only(torch.tensor([True, False])).weights_T.tolist()
            [1.0, 0.0]
        """
        check_tensors(keep_T=keep_T)
        if keep_T.dtype != torch.bool:
            raise DtypeError(f"keep_T is {keep_T.dtype}; expected torch.bool")
        return cls(keep_T.to(torch.float32), keep_T, {})

    def to(self, device: torch.device | str) -> Self:
        """A copy whose `[T]` tensors are on `device`; the metrics stay where they are."""
        return replace(self, weights_T=self.weights_T.to(device), keep_T=self.keep_T.to(device))


@torch.no_grad()
def importance_weights(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    packed: Packed,
    *,
    weight: Weight | None,
    reject: Iterable[Reject | OffPolicyNegative | MaxStaleness] = (),
    normalize: Literal["mean"] | None = None,
    group: ProcessGroup | None = None,
    advantages_T: Tensor | None = None,
    versions_T: Tensor | None = None,
    current_version: int | None = None,
) -> Correction:
    """Weights `rho = exp(old - rollout)` and rejections, independent of each other.

    The metrics, over the tokens kept unless it says otherwise: `correction/weight_mean`,
    `correction/weight_max`, `correction/capped` (share with rho above `weight.high`),
    `correction/ess` (effective sample size of the weights, as a fraction of the tokens),
    `correction/ess_advantage` (of weight times |advantage|, what the gradient is made of; with
    `advantages_T`), `correction/kept` (share of the trainable tokens) and, for each rule on its
    own, the share of the trainable tokens that it keeps: `correction/kept/<level>_<statistic>` of a
    `Reject`, `correction/kept/off_policy_negative`, `correction/kept/max_staleness`, and
    `correction/kept/weight` of a weight with `mode="mask"`; a second rule of the same name ends in
    `_2`. When everything is rejected, `correction/kept` is 0 and means over kept tokens are NaN.

    Args:
        old_logprobs_T: float `[T]`, the trainer's at the start of the step.
        rollout_logprobs_T: float `[T]`, the engine's.
        packed: the whole step of this rank.
        weight: how rho becomes a weight; None for weights of 1.
        reject: each is applied; a token stays when all of them keep it.
        normalize: "mean" divides by the mean weight of the kept tokens (or sequences, for a
            sequence-level weight) of the whole step, then caps at `weight.high` again.
        group: data-parallel ranks, for the normalisation. What one rank refuses, all refuse.
        advantages_T: float `[T]`, for `OffPolicyNegative` and `correction/ess_advantage`.
        versions_T: int64 `[T]`, the weight version that sampled each token, for `MaxStaleness`;
            -1 means unknown, which no trainable token may be.
        current_version: the version of the trainer's weights at the start of the step.

    Returns:
        A `Correction`; nothing in it carries gradient.

    Raises:
        MissingLogprobError: NaN at a trainable token, in either input.
        NonFiniteError: an advantage that is no finite number at a trainable token.
        SettingError: a rule without what it needs, versions that no rule uses, or a trainable
            token whose version is unknown or above `current_version`.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, False]]))
        >>> old, rollout = torch.tensor([0.0, -1.0, 0.0]), torch.tensor([-2.0, -1.0, 0.0])
        >>> w = Weight(level="token", mode="truncate", high=2.0)
        >>> importance_weights(old, rollout, packed, weight=w).weights_T.tolist()
        [2.0, 1.0, 0.0]
        >>> versions = {"versions_T": torch.tensor([3, 5, -1]), "current_version": 5}
        >>> reject = [MaxStaleness(1)]
        >>> importance_weights(
        ...     old, rollout, packed, weight=w, reject=reject, **versions
        ... ).weights_T.tolist()
        [0.0, 1.0, 0.0]
    """
    packed.check(old_logprobs_T=old_logprobs_T, rollout_logprobs_T=rollout_logprobs_T)
    old_logprobs_T, rollout_logprobs_T = as_logprobs(
        old_logprobs_T=old_logprobs_T, rollout_logprobs_T=rollout_logprobs_T
    )
    _check_weight(weight, normalize)
    rules = check_rules(reject, advantages_T, versions_T, current_version)
    mask_T = packed.mask_T
    x_T = torch.where(mask_T, old_logprobs_T, 0) - torch.where(mask_T, rollout_logprobs_T, 0)
    with refused_together(ranks_of_step(packed, group), mask_T.device):
        evidence = {
            "advantages_T": _checked_advantages(advantages_T, packed),
            "versions_T": _checked_versions(versions_T, packed, current_version),
        }
        _refuse_nan(x_T, old_logprobs_T, packed)

    kept: dict[str, Tensor] = {}
    for rule in rules:
        kept_T = kept_by(rule, x_T, packed, current_version=current_version, **evidence)
        kept[_unused(rule_name(rule), kept)] = kept_T
    rho_T = torch.ones_like(x_T)
    if weight is not None:
        rho_T = exp_clamped(aggregate_to(x_T, packed, weight.level))
        if weight.mode == "mask":
            kept["weight"] = inside(rho_T, weight.low, weight.high)
    keep_T = mask_T.clone()
    for kept_T in kept.values():
        keep_T &= kept_T
    weights_T, capped_T = rho_T, torch.zeros_like(keep_T)
    if weight is not None and weight.high is not None:
        weights_T, capped_T = rho_T.clamp(weight.low, weight.high), rho_T > weight.high
    weights_T = torch.where(keep_T, weights_T, 0)
    if weight is not None and normalize == "mean":
        mean = _mean_weight(weights_T, keep_T, packed, weight.level, group)
        weights_T = (weights_T / mean).clamp(max=weight.high)

    metrics: Metrics = {
        "correction/weight_mean": mean_over(weights_T, keep_T),
        "correction/weight_max": max_over(weights_T, keep_T),
        "correction/capped": mean_over(capped_T, keep_T),
        "correction/ess": ess_over(weights_T, keep_T),
        "correction/kept": mean_over(keep_T, mask_T),
    }
    metrics |= {f"correction/kept/{k}": mean_over(kept_T, mask_T) for k, kept_T in kept.items()}
    if advantages_T is not None:
        metrics["correction/ess_advantage"] = ess_over(weights_T * advantages_T.abs(), keep_T)
    return Correction(weights_T, keep_T, metrics)


def truncated_is(
    old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, packed: Packed, *, high: float = 2.0
) -> Correction:
    """TIS: the token's own ratio, at most `high`.

    References:
        https://fengyao.notion.site/off-policy-rl (Truncated Importance Sampling, C = 2).

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> old, rollout = torch.tensor([0.0, -1.0]), torch.tensor([-2.0, -1.0])
        >>> truncated_is(old, rollout, packed).weights_T.tolist()
        [2.0, 1.0]
    """
    weight = Weight(level="token", mode="truncate", high=high)
    return importance_weights(old_logprobs_T, rollout_logprobs_T, packed, weight=weight)


def masked_is(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    packed: Packed,
    *,
    low: float = 0.5,
    high: float = 2.0,
    level: Literal["token", "sequence_sum", "sequence_mean"] = "sequence_mean",
) -> Correction:
    """MIS: the ratio at `level` where it lies in `[low, high]`; outside, the token is rejected.

    At a sequence level all tokens of a sequence share its ratio and stay or go together.

    References:
        https://richardli.xyz/rl-collapse (Masked Importance Sampling).

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, True]]))
        >>> old, rollout = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, -4.0, 0.0])
        >>> masked_is(old, rollout, packed).weights_T.tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    weight = Weight(level=level, mode="mask", low=low, high=high)
    return importance_weights(old_logprobs_T, rollout_logprobs_T, packed, weight=weight)


def icepop(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    packed: Packed,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> Correction:
    """IcePop: the token's own ratio where it lies in `[low, high]`; outside, it is rejected.

    References:
        arXiv 2510.18855 (Ring-1T).

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> old, rollout = torch.tensor([0.0, -1.0]), torch.tensor([-2.0, -1.0])
        >>> icepop(old, rollout, packed).weights_T.tolist()
        [0.0, 1.0]
    """
    return masked_is(old_logprobs_T, rollout_logprobs_T, packed, low=low, high=high, level="token")


@torch.no_grad()
def interpolate_proximal(
    behave_logprobs_T: Tensor,
    current_logprobs_T: Tensor,
    packed: Packed,
    *,
    versions_T: Tensor,
    proximal_version: int,
    current_version: int,
) -> Tensor:
    """Log-probs of decoupled PPO's proximal policy, without a forward pass of its own.

    Log-linear between the policy that sampled a token and the current one, by weight versions:
    `behave + a (current - behave)` with `a = (proximal - version) / (current_version - version)`,
    clamped to `[0, 1]`. A token that the current version sampled, or one at or above the proximal
    version, keeps its behaviour log-prob. Use the result as `old_logprobs_T`: of the ratio that is
    clipped (new over proximal), and of `importance_weights` (proximal over behaviour).

    Args:
        behave_logprobs_T: float `[T]`, of the policy that sampled: the engine's.
        current_logprobs_T: float `[T]`, of the policy in training.
        packed: where the tokens live.
        versions_T: int64 `[T]`, the weight version that sampled each token; -1 means unknown, which
            no trainable token may be.
        proximal_version: version of the proximal policy, often `current_version - 1`.
        current_version: version of the policy in training.

    Returns:
        `[T]` without gradient, float32 or float64; 0 at masked positions.

    Raises:
        SettingError: `proximal_version` above `current_version`, or a trainable token whose version
            is unknown or above `current_version`.

    References:
        Decoupled PPO: arXiv 2110.00641; AReaL: arXiv 2505.24298. The interpolation:
        https://github.com/inclusionAI/AReaL, docs/algorithms/prox_approx.md ("loglinear").

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, True]]))
        >>> behave, current = torch.tensor([-2.0, -2.0, -2.0]), torch.tensor([-1.0, -1.0, -1.0])
        >>> versions = {"proximal_version": 4, "current_version": 5}
        >>> interpolate_proximal(
        ...     behave, current, packed, versions_T=torch.tensor([3, 4, 5]), **versions
        ... ).tolist()
        [-1.5, -2.0, -2.0]
    """
    packed.check(behave_logprobs_T=behave_logprobs_T, current_logprobs_T=current_logprobs_T)
    behave_logprobs_T, current_logprobs_T = as_logprobs(
        behave_logprobs_T=behave_logprobs_T, current_logprobs_T=current_logprobs_T
    )
    if proximal_version > current_version:
        raise SettingError(
            f"proximal_version is {proximal_version}; expected current_version "
            f"({current_version}) or less"
        )
    _checked_versions(versions_T, packed, current_version)
    mask_T = packed.mask_T
    behave_T = torch.where(mask_T, behave_logprobs_T, 0)
    current_T = torch.where(mask_T, current_logprobs_T, 0)
    lag_T = (current_version - versions_T).clamp(min=1)  # at lag 0 the numerator is 0 or less
    a_T = ((proximal_version - versions_T) / lag_T).clamp(0, 1).to(behave_T.dtype)
    between_T = behave_T + a_T * (current_T - behave_T)
    # At both ends exact, and 0 x inf no NaN; a NaN on the other side still shows.
    between_T = torch.where((a_T == 0) & ~current_T.isnan(), behave_T, between_T)
    between_T = torch.where((a_T == 1) & ~behave_T.isnan(), current_T, between_T)
    return torch.where(mask_T, between_T, 0)


def for_policy_term(correction: Correction | None, count_rejected: bool) -> dict[str, Any]:
    """What `aggregate` takes of a correction where the ratio to the engine counts."""
    if correction is None:
        return {"count_rejected": count_rejected}
    weights = {"weights_T": correction.weights_T}
    return weights | {"keep_T": correction.keep_T, "count_rejected": count_rejected}


def for_other_terms(correction: Correction | None, count_rejected: bool) -> dict[str, Any]:
    """The same for KL and critic terms: unweighted, and rejected tokens stay while they count."""
    if count_rejected or correction is None:
        return {"count_rejected": count_rejected}
    return {"keep_T": correction.keep_T, "count_rejected": False}


def _check_weight(weight: Weight | None, normalize: str | None) -> None:
    if normalize not in (None, "mean"):
        raise SettingError(f"normalize is {normalize!r}; expected None or 'mean'")
    if normalize is not None and weight is None:
        raise SettingError("normalize has no effect without a weight; give one, or normalize=None")


def _checked_advantages(advantages_T: Tensor | None, packed: Packed) -> Tensor | None:
    if advantages_T is not None:
        packed.check(advantages_T=advantages_T)
        refuse_infinite_advantages(advantages_T, packed)
    return advantages_T


def _checked_versions(
    versions_T: Tensor | None, packed: Packed, current_version: int | None
) -> Tensor | None:
    if versions_T is not None and current_version is not None:
        packed.check(versions_T=versions_T)
        if versions_T.dtype != torch.int64:
            raise DtypeError(f"versions_T is {versions_T.dtype}; expected torch.int64")
        refuse_versions(versions_T, packed, current_version)
    return versions_T


def _unused(name: str, taken: dict[str, Tensor]) -> str:
    """`name`, or `name_2`, `name_3`, ..., whichever is free."""
    number = 1
    while (name if number == 1 else f"{name}_{number}") in taken:
        number += 1
    return name if number == 1 else f"{name}_{number}"


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
