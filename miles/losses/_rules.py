"""What a correction can be told to do, and which tokens each rule keeps.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import NonFiniteError, SettingError
from miles.packed import Packed, tokens_per_sequence

__all__ = ["MaxStaleness", "OffPolicyNegative", "Reject", "Rule", "Weight", "veto"]

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
        bounds = [x for x in (self.low, self.high) if x is not None]
        if bounds != sorted(bounds) or any(math.isnan(x) for x in bounds):
            raise SettingError(f"got low={self.low} and high={self.high}; expected low <= high")
        limit = math.exp(MAX_LOG_RATIO)
        never = (self.low is not None and self.low <= 1 / limit) or (self.high or 0.0) >= limit
        if self.statistic == "ratio" and never:
            raise SettingError(
                f"got low={self.low} and high={self.high} for a ratio, which is clamped to "
                f"{1 / limit:.3g} to {limit:.3g}; expected bounds within, others never reject"
            )
        if self.low is None and self.high is None:
            raise SettingError("Reject has neither low nor high, so it rejects nothing; give one")


@dataclass(frozen=True, kw_only=True)
class OffPolicyNegative:
    """Leave out a sequence with a negative advantage that the trainer has moved away from (OPSM).

    A sequence goes when its advantage is below 0 and the mean over its trainable tokens of
    `rollout - old` is above `delta`. Its advantage is the mean of `advantages_T` over its trainable
    tokens, so one number a sequence works as well as one a token.

    The paper compares the policy that sampled (the log-probs that the engine returned) with the one
    being updated. Here the first is `rollout_logprobs_T` and the second `old_logprobs_T`, the
    trainer's at the start of the step; pass the current log-probs there to follow every update.
    slime compares the trainer's old log-probs with its current ones instead, and so does not see
    the gap to the engine.

    References:
        DeepSeek-V3.2, arXiv 2512.02556 ("Off-Policy Sequence Masking").
    """

    delta: float = 1e-4
    """Nats per token, 0 or more."""

    def __post_init__(self) -> None:
        if not 0 <= self.delta < math.inf:
            raise SettingError(f"delta is {self.delta}; expected a finite number, 0 or more")


@dataclass(frozen=True)
class MaxStaleness:
    """Leave out a token whose weight version is below `current_version - limit`."""

    limit: int
    """Versions that a token may lag behind, 0 or more."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise SettingError(f"limit is {self.limit}; expected a number of versions, 0 or more")


Rule = Reject | OffPolicyNegative | MaxStaleness


def veto(threshold: float = 1e-4) -> Reject:
    """The rule that leaves out a sequence when the ratio of any of its tokens is below `threshold`.

    >>> veto()
    Reject(level='sequence_min', statistic='ratio', low=0.0001, high=None)
    """
    smallest = math.exp(-MAX_LOG_RATIO)
    if not smallest < threshold < 1:
        raise SettingError(
            f"threshold is {threshold}; expected a ratio below 1 and above {smallest:.1e}, the "
            "smallest that the clamp of log-ratios leaves"
        )
    return Reject(level="sequence_min", statistic="ratio", low=threshold)


def rule_name(rule: Rule) -> str:
    """What a rule is called in the keys of metrics."""
    if isinstance(rule, Reject):
        return f"{rule.level}_{rule.statistic}"
    return "off_policy_negative" if isinstance(rule, OffPolicyNegative) else "max_staleness"


def check_rules(
    reject: Iterable[Rule],
    advantages_T: Tensor | None,
    versions_T: Tensor | None,
    current_version: int | None,
) -> tuple[Rule, ...]:
    """The rules, once it is sure that each has what it needs and that versions have a rule."""
    rules = tuple(reject) if isinstance(reject, Iterable) else (None,)
    if not all(isinstance(rule, Rule) for rule in rules):
        raise SettingError(
            f"reject is {reject!r}; expected a list of Reject, OffPolicyNegative and MaxStaleness"
        )
    if advantages_T is None and any(isinstance(rule, OffPolicyNegative) for rule in rules):
        raise SettingError("OffPolicyNegative needs advantages_T; got None; give those of the step")
    given = {"versions_T": versions_T is not None, "current_version": current_version is not None}
    used = any(isinstance(rule, MaxStaleness) for rule in rules)
    wrong = [name for name, is_given in given.items() if is_given != used]
    if wrong and used:
        raise SettingError(
            f"MaxStaleness needs versions_T and current_version; got no {' and no '.join(wrong)}"
        )
    if wrong:
        raise SettingError(
            f"{' and '.join(wrong)} without MaxStaleness in reject have no effect; add the rule "
            "or leave them out"
        )
    return rules


def kept_by(
    rule: Rule,
    x_T: Tensor,
    packed: Packed,
    *,
    advantages_T: Tensor | None,
    versions_T: Tensor | None,
    current_version: int | None,
) -> Tensor:
    """bool `[T]`, for `x = old - rollout`, 0 at masked positions, where the result is arbitrary."""
    if isinstance(rule, Reject):
        return inside(_statistic(x_T, packed, rule), rule.low, rule.high)
    if isinstance(rule, MaxStaleness):
        assert versions_T is not None and current_version is not None
        return versions_T >= current_version - rule.limit
    assert advantages_T is not None
    advantage_T = aggregate_to(advantages_T, packed, "sequence_mean")
    # Written so that a mean that is no number (inf - inf) does not count as close.
    return (advantage_T >= 0) | (aggregate_to(-x_T, packed, "sequence_mean") <= rule.delta)


def refuse_versions(versions_T: Tensor, packed: Packed, current_version: int) -> None:
    """Raise for a trainable token whose version is unknown (-1) or lies in the future."""
    bad_T = ((versions_T < 0) | (versions_T > current_version)) & packed.mask_T
    if not bool(bad_T.any()):
        return
    token = int(bad_T.nonzero()[0])
    raise SettingError(
        f"{int(bad_T.sum())} trainable tokens have no usable weight version, the first at position "
        f"{token} (sequence {int(packed.seq_ids_T[token])}) with {int(versions_T[token])}; expected"
        f" 0 to {current_version}, the current version (-1 means unknown); mask the token, or have "
        "the engine record the version that sampled it"
    )


def refuse_infinite_advantages(advantages_T: Tensor, packed: Packed) -> None:
    """Raise for a trainable token whose advantage is NaN or infinite."""
    bad_T = ~advantages_T.isfinite() & packed.mask_T
    if not bool(bad_T.any()):
        return
    token = int(bad_T.nonzero()[0])
    raise NonFiniteError(
        f"advantages_T is {float(advantages_T[token])} at position {token} (sequence "
        f"{int(packed.seq_ids_T[token])}), {int(bad_T.sum())} such trainable tokens in all; "
        "expected finite numbers wherever mask_T is True; give 0 to what was not scored"
    )


def exp_clamped(log_T: Tensor) -> Tensor:
    """A ratio from its logarithm, which is first clamped to +-20."""
    return log_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def inside(values_T: Tensor, low: float | None, high: float | None) -> Tensor:
    """bool `[T]`: within the bounds, which count as inside; NaN is outside of any bound."""
    inside_T = torch.ones_like(values_T, dtype=torch.bool)
    if low is not None:
        inside_T &= values_T >= low
    if high is not None:
        inside_T &= values_T <= high
    return inside_T


def aggregate_to(values_T: Tensor, packed: Packed, level: str) -> Tensor:
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
        return exp_clamped(aggregate_to(x_T, packed, rule.level))
    if rule.statistic == "k1":
        values_T = -x_T
    elif rule.statistic == "k2":
        values_T = x_T**2 / 2
    else:
        clamped_T = x_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values_T = clamped_T.expm1() - clamped_T
    return aggregate_to(values_T, packed, rule.level)
