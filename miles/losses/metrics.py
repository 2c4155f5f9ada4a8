"""Readings that reduce exactly over micro-batches and ranks.

A metric is a pair of sum and count, a maximum, or another kind whose parts can be put together;
only `reduce_metrics` turns it into a number, so micro-batches of different sizes never get the same
vote. Nothing here waits for the GPU, save the check that all ranks of a group hold the same
metrics.

Shapes: T tokens, S sequences, N micro-batches or ranks, P numbers in all metrics of one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, EmptyBatchError, SettingError, ShapeError
from miles.losses._metric_kinds import (
    ArgMax,
    Ess,
    ExpMean,
    LogMeanExp,
    Max,
    Mean,
    Metric,
    Metrics,
    argmax_over,
    ess_over,
    exp_mean_over,
    log_mean_exp_over,
    max_over,
    mean_over,
)
from miles.packed import Packed, tokens_per_sequence

__all__ = [
    "ArgMax",
    "Ess",
    "ExpMean",
    "LogMeanExp",
    "Max",
    "Mean",
    "Metric",
    "Metrics",
    "argmax_over",
    "ess_over",
    "exp_mean_over",
    "log_mean_exp_over",
    "max_over",
    "mean_over",
    "mismatch_metrics",
    "reduce_metrics",
]


def reduce_metrics(
    parts: Mapping[str, Metric] | Sequence[Mapping[str, Metric]],
    *,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Put the metrics of all micro-batches, and of all ranks of `group`, together.

    Every rank gets the same numbers, bit for bit. With a group this takes two collectives, however
    many metrics there are: a comparison of the keys and one gather.

    Args:
        parts: one dict a micro-batch, all with the same keys (on every rank).
        group: ranks to reduce over, data and context parallel ones alike.

    Returns:
        One 0-d float64 tensor a key, sorted by key. An `ArgMax` gives `key/sequence` and
        `key/position` as well.

    Raises:
        EmptyBatchError: no dict at all.
        SettingError: micro-batches or ranks whose keys, or kinds of metric, differ.

    Example:
        >>> a = {"loss/x": mean_over(torch.tensor([1.0]), torch.tensor([True]))}
        >>> b = {"loss/x": mean_over(torch.tensor([4.0, 4.0]), torch.tensor([True, True]))}
        >>> reduce_metrics([a, b])["loss/x"].item()
        3.0
    """
    dicts = [parts] if isinstance(parts, Mapping) else list(parts)
    if not dicts:
        raise EmptyBatchError("reduce_metrics got no metrics; expected one dict a micro-batch")
    kinds = {key: type(dicts[0][key]) for key in sorted(dicts[0])}
    for other in dicts[1:]:
        if {key: type(metric) for key, metric in other.items()} != kinds:
            changed = {key for key in kinds if type(other.get(key)) is not kinds[key]}
            raise SettingError(
                f"metrics differ between micro-batches by {sorted(changed | other.keys() - kinds)};"
                " expected the same keys in each"
            )
    if not kinds:
        return {}
    merged = _merge(kinds, _table(dicts, kinds))
    if group is not None:
        row_P = _table([merged], kinds)[0]
        _refuse_other_metrics(kinds, row_P, group)
        rows = [torch.empty_like(row_P) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row_P, group=group)
        merged = _merge(kinds, torch.stack(rows))
    named = [metric.named(key) for key, metric in merged.items()]
    return dict(sorted((name, value) for part in named for name, value in part.items()))


def _table(dicts: Sequence[Mapping[str, Metric]], keys: Mapping[str, type[Metric]]) -> Tensor:
    """float64 `[N, P]`, on the accelerator if any number is."""
    rows = [[x for key in keys for x in part[key].numbers()] for part in dicts]
    device = max((x.device for x in rows[0]), key=lambda device: device.type != "cpu")
    return torch.stack([torch.stack([x.to(device, torch.float64) for x in row]) for row in rows])


def _merge(kinds: Mapping[str, type[Metric]], table_NP: Tensor) -> Metrics:
    merged: Metrics = {}
    start = 0
    for key, kind in kinds.items():
        width = len(kind.__dataclass_fields__)
        merged[key] = kind.merge(table_NP[:, start : start + width])
        start += width
    return merged


def _refuse_other_metrics(
    kinds: Mapping[str, type[Metric]], row_P: Tensor, group: ProcessGroup
) -> None:
    """Gathering rows of different lengths would hang or mix metrics up."""
    names = "\n".join(f"{key}\t{kind.__name__}" for key, kind in kinds.items())
    digest = int.from_bytes(hashlib.sha256(names.encode()).digest()[:6], "big")  # below 2^53
    extremes = row_P.new_tensor([digest, -digest])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, negated = extremes.tolist()
    if largest != -negated:
        raise SettingError(
            f"metrics differ between ranks; this one has {list(kinds)}; expected the same keys and "
            "kinds on every rank, so that whatever decides on a metric must not depend on the data"
        )


@torch.no_grad()
def mismatch_metrics(
    train_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    packed: Packed,
    *,
    versions_T: Tensor | None = None,
    position_buckets: Sequence[int] | None = None,
    current_version: int | None = None,
    age_buckets: Sequence[int] = (1, 2, 4),
    sample_ids_S: Tensor | None = None,
) -> Metrics:
    """How far the trainer's log-probs are from those that the engine sampled with.

    With d = train - rollout over trainable tokens, which the rollout policy sampled:
    `mismatch/abs` mean |d|; `mismatch/k1` mean -d and `mismatch/k3` mean exp(d) - 1 - d, both
    estimates of KL(rollout || train) in nats; `mismatch/ratio_max` the largest exp(d);
    `mismatch/abs_max` the largest |d|; `mismatch/ppl_train` and `mismatch/ppl_rollout` exp of the
    mean negative log-prob of a token, and `mismatch/ppl_ratio` the first over the second.

    `mismatch/log1p_chi2_token` is log mean exp(2 d), and `mismatch/log1p_chi2_sequence` the same
    over sequences, with the sum of d over the sequence. chi-square is E[rho^2] - 1, so these are
    log(1 + chi-square): they are close to it while it is small, and stay finite where rho^2 itself
    is more than a float64 holds.

    Nothing is clamped. A log-prob of -inf shows as inf in the means of |d|, k1 and k3 and in the
    perplexities, and NaN on either side makes every reading that covers the token NaN. Ranks of
    `packed.seq_group` must call this together.

    Args:
        train_logprobs_T: float `[T]`, the trainer's.
        rollout_logprobs_T: float `[T]`, the engine's.
        packed: where the tokens live.
        versions_T: int64 `[T]`, weight version that sampled each token, -1 where unknown; with
            `current_version`. Adds `mismatch/abs/age_<from>_<to>`, mean |d| by age, and
            `mismatch/share/age_<from>_<to>`, the share of the whole gap (the sum of |d|). Age is
            `current_version` minus the version: ages are the same keys on all micro-batches, ranks
            and steps, which versions are not. `mismatch/abs/age_unknown` is that of tokens without
            a version, or with one newer than `current_version`.
        position_buckets: where buckets of positions end, increasing: (64, 256) adds
            `mismatch/abs/position_0_64`, `.../position_64_256` and `.../position_256_up`, each from
            its first number up to and without its second, and `mismatch/share/position_...`, the
            share of the whole gap. Positions are `packed.positions_T`: they
            count from the start of the sequence, prompt included where it is packed.
        current_version: version of the trainer's weights.
        age_buckets: where buckets of ages end, increasing. A bucket without tokens is NaN.
        sample_ids_S: int64 `[S]`, your id of each sequence, the same however the step is split (an
            index in `Packed` is not). Adds the place of `mismatch/ratio_max` over all micro-batches
            and ranks: `mismatch/ratio_max/sequence` is that id, `mismatch/ratio_max/position` the
            token's index in the sequence. With a NaN it is the place of the NaN.

    Raises:
        SettingError: one tensor was given twice. Compared with itself a gap is always 0, which
            has hidden real ones. Also buckets, versions or ids without what they need.

    References:
        k1 and k3: http://joschu.net/blog/kl-approx.html

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> train, rollout = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
        >>> m = mismatch_metrics(train, rollout, packed, position_buckets=(1,))
        >>> round(float(m["mismatch/abs"]), 4), round(float(m["mismatch/ratio_max"]), 4)
        (0.25, 1.6487)
        >>> float(m["mismatch/abs/position_0_1"]), float(m["mismatch/abs/position_1_up"])
        (0.5, 0.0)
    """
    packed.check(train_logprobs_T=train_logprobs_T, rollout_logprobs_T=rollout_logprobs_T)
    _refuse_same_tensor(train_logprobs_T, rollout_logprobs_T)
    mask_T = packed.mask_T
    train_T, rollout_T = (
        torch.where(mask_T, x.to(torch.float64), 0) for x in (train_logprobs_T, rollout_logprobs_T)
    )
    d_T = train_T - rollout_T
    ppl_train_T, ppl_rollout_T = (
        torch.where(d_T.isnan(), torch.nan, -x_T) for x_T in (train_T, rollout_T)
    )
    k3_T = torch.where(d_T == torch.inf, torch.inf, d_T.expm1() - d_T)  # inf - inf would be NaN
    ranks = 1 if packed.seq_group is None else dist.get_world_size(packed.seq_group)
    log_square_S, trained_S = 2 * packed.sum_per_sequence(d_T), tokens_per_sequence(packed) > 0
    metrics: Metrics = {
        "mismatch/abs": mean_over(d_T.abs(), mask_T),
        "mismatch/k1": mean_over(-d_T, mask_T),
        "mismatch/k3": mean_over(k3_T, mask_T),
        "mismatch/abs_max": max_over(d_T.abs(), mask_T),
        "mismatch/ratio_max": _ratio_max(d_T.exp(), packed, sample_ids_S),
        "mismatch/log1p_chi2_token": log_mean_exp_over(2 * d_T, mask_T),
        "mismatch/log1p_chi2_sequence": log_mean_exp_over(log_square_S, trained_S, shared_by=ranks),
        "mismatch/ppl_train": exp_mean_over(ppl_train_T, mask_T),
        "mismatch/ppl_rollout": exp_mean_over(ppl_rollout_T, mask_T),
        "mismatch/ppl_ratio": exp_mean_over(-d_T, mask_T),
    }
    if position_buckets is not None:
        if packed.positions_T is None:
            raise SettingError("position_buckets need positions_T; build the Packed with it")
        within = _buckets("position", packed.positions_T, position_buckets)
        metrics |= _gap_within(within, d_T.abs(), mask_T)
    if (versions_T is None) != (current_version is None):
        raise SettingError(
            "got one of versions_T and current_version; expected both, for the gap by age, or none"
        )
    if versions_T is not None and current_version is not None:
        packed.check(versions_T=versions_T)
        if versions_T.dtype != torch.int64:
            raise DtypeError(f"versions_T is {versions_T.dtype}; expected torch.int64")
        known_T = (versions_T >= 0) & (versions_T <= current_version)
        within = _buckets("age", current_version - versions_T, age_buckets)
        within = {key: in_T & known_T for key, in_T in within.items()}
        within["age_unknown"] = ~known_T
        metrics |= _gap_within(within, d_T.abs(), mask_T)
    return metrics


def _gap_within(within: dict[str, Tensor], gap_T: Tensor, mask_T: Tensor) -> Metrics:
    """The mean gap of each bucket, and the share of the whole gap that lies in it."""
    whole = mean_over(gap_T, mask_T)
    metrics: Metrics = {}
    for name, in_T in within.items():
        part = mean_over(gap_T, mask_T & in_T)
        metrics[f"mismatch/abs/{name}"] = part
        metrics[f"mismatch/share/{name}"] = Mean(part.total, whole.total)
    return metrics


def _refuse_same_tensor(train_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> None:
    if train_logprobs_T is rollout_logprobs_T or (
        train_logprobs_T.numel() and train_logprobs_T.data_ptr() == rollout_logprobs_T.data_ptr()
    ):
        raise SettingError(
            "train_logprobs_T and rollout_logprobs_T are one tensor; expected the trainer's own "
            "log-probs (a forward pass over the tokens) and the engine's"
        )


def _ratio_max(ratio_T: Tensor, packed: Packed, sample_ids_S: Tensor | None) -> Max | ArgMax:
    if sample_ids_S is None:
        return max_over(ratio_T, packed.mask_T)
    if sample_ids_S.shape != (packed.num_seqs,):
        raise ShapeError(
            f"sample_ids_S has shape {tuple(sample_ids_S.shape)}; expected [{packed.num_seqs}], "
            "one id for each sequence"
        )
    if sample_ids_S.dtype != torch.int64:
        raise DtypeError(f"sample_ids_S is {sample_ids_S.dtype}; expected torch.int64")
    if packed.positions_T is None:
        raise SettingError("sample_ids_S needs positions_T; build the Packed with it")
    return argmax_over(
        ratio_T,
        packed.mask_T,
        sequences_T=packed.per_token(sample_ids_S),
        positions_T=packed.positions_T,
    )


def _buckets(name: str, values_T: Tensor, ends: Sequence[int]) -> dict[str, Tensor]:
    """`<name>_<from>_<to>` and where the values lie in it, the last without an end."""
    bounds = [0, *ends]
    if len(bounds) < 2 or any(low >= high for low, high in pairwise(bounds)):
        raise SettingError(
            f"{name}_buckets is {tuple(ends)}; expected increasing whole numbers above 0, where "
            "each bucket ends"
        )
    within = {
        f"{name}_{low}_{high}": (values_T >= low) & (values_T < high)
        for low, high in pairwise(bounds)
    }
    return within | {f"{name}_{bounds[-1]}_up": values_T >= bounds[-1]}
