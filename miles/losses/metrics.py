"""Readings that reduce exactly over micro-batches and ranks.

A metric is a pair of sum and count, or a maximum; only `reduce_metrics` turns it into a number, so
micro-batches of different sizes never get the same vote. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import EmptyBatchError, SettingError
from miles.packed import Packed

__all__ = ["Max", "Mean", "Metrics", "mean_over", "mismatch_metrics", "reduce_metrics"]


@dataclass(frozen=True)
class Mean:
    """A mean that is still a sum and a count."""

    total: Tensor
    """0-d float64: sum of the values."""
    count: Tensor
    """0-d float64: how many there were."""

    def value(self) -> Tensor:
        """0-d float64; NaN where nothing was counted."""
        return self.total / self.count

    def __float__(self) -> float:
        return float(self.value())


@dataclass(frozen=True)
class Max:
    """A maximum; `-inf` where there was nothing."""

    largest: Tensor
    """0-d float64."""

    def value(self) -> Tensor:
        """0-d float64."""
        return self.largest

    def __float__(self) -> float:
        return float(self.largest)


Metrics = dict[str, Mean | Max]


def mean_over(values_T: Tensor, mask_T: Tensor) -> Mean:
    """The mean of `values_T` where `mask_T`, detached.

    >>> float(mean_over(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])))
    2.0
    """
    values_T = values_T.detach().to(torch.float64)
    return Mean(torch.where(mask_T, values_T, 0).sum(), mask_T.sum().to(torch.float64))


def max_over(values_T: Tensor, mask_T: Tensor) -> Max:
    """The largest of `values_T` where `mask_T`, detached."""
    values_T = torch.where(mask_T, values_T.detach().to(torch.float64), -torch.inf)
    return Max(values_T.max() if values_T.numel() else values_T.new_full((), -torch.inf))


def reduce_metrics(
    parts: Mapping[str, Mean | Max] | Sequence[Mapping[str, Mean | Max]],
    *,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Put the metrics of all micro-batches, and of all ranks of `group`, together.

    Args:
        parts: one dict a micro-batch, all with the same keys (on every rank).
        group: ranks to reduce over.

    Returns:
        One 0-d float64 tensor a key.

    Example:
        >>> a = {"loss/x": mean_over(torch.tensor([1.0]), torch.tensor([True]))}
        >>> b = {"loss/x": mean_over(torch.tensor([4.0, 4.0]), torch.tensor([True, True]))}
        >>> reduce_metrics([a, b])["loss/x"].item()
        3.0
    """
    dicts = [parts] if isinstance(parts, Mapping) else list(parts)
    if not dicts:
        raise EmptyBatchError("reduce_metrics got no metrics; expected one dict a micro-batch")
    keys = sorted(dicts[0])
    for other in dicts[1:]:
        if set(other) != set(keys):
            raise SettingError(
                f"metrics differ between micro-batches by {sorted(set(other) ^ set(keys))}; "
                "expected the same keys in each"
            )
    sums: list[Tensor] = []
    maxima: list[Tensor] = []
    for key in keys:
        values = [part[key] for part in dicts]
        means = [v for v in values if isinstance(v, Mean)]
        if means:
            sums += [torch.stack([torch.stack([m.total, m.count]) for m in means]).sum(0)]
        else:
            maxima += [torch.stack([v.value() for v in values]).max()]
    if group is not None:
        sums = list(_all_reduce_sum(sums, group))
        maxima = list(_all_reduce_max(maxima, group))
    sums_left, maxima_left = iter(sums), iter(maxima)
    result: dict[str, Tensor] = {}
    for key in keys:
        if isinstance(dicts[0][key], Mean):
            total, number = next(sums_left)
            result[key] = total / number
        else:
            result[key] = next(maxima_left)
    return result


def _all_reduce_sum(values: list[Tensor], group: ProcessGroup) -> Tensor:
    if not values:
        return torch.empty(0)
    stacked = torch.stack(values)
    dist.all_reduce(stacked, group=group)
    return stacked


def _all_reduce_max(values: list[Tensor], group: ProcessGroup) -> Tensor:
    """MAX of a backend loses a NaN of some ranks, so NaNs travel beside the values."""
    if not values:
        return torch.empty(0)
    stacked = torch.stack(values)
    nans = stacked.isnan()
    pair = torch.stack([torch.where(nans, -torch.inf, stacked), nans.to(stacked.dtype)])
    dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=group)
    return torch.where(pair[1] > 0, torch.nan, pair[0])


def mismatch_metrics(
    train_logprobs_T: Tensor, rollout_logprobs_T: Tensor, packed: Packed
) -> Metrics:
    """How far the trainer's log-probs are from those that the engine sampled with.

    With d = train - rollout over trainable tokens, which the rollout policy sampled:
    `mismatch/abs` mean |d|; `mismatch/k1` mean -d and `mismatch/k3` mean exp(d) - 1 - d, both
    estimates of KL(rollout || train) in nats; `mismatch/ratio_max` the largest exp(d);
    `mismatch/abs_max` the largest |d|.

    Raises:
        SettingError: one tensor was given twice. Compared with itself a gap is always 0, which
            has hidden real ones.

    References:
        k1 and k3: http://joschu.net/blog/kl-approx.html

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> m = mismatch_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), packed)
        >>> round(float(m["mismatch/abs"]), 4), round(float(m["mismatch/ratio_max"]), 4)
        (0.25, 1.6487)
    """
    packed.check(train_logprobs_T=train_logprobs_T, rollout_logprobs_T=rollout_logprobs_T)
    if train_logprobs_T is rollout_logprobs_T or (
        train_logprobs_T.numel() and train_logprobs_T.data_ptr() == rollout_logprobs_T.data_ptr()
    ):
        raise SettingError(
            "train_logprobs_T and rollout_logprobs_T are one tensor; expected the trainer's own "
            "log-probs (a forward pass over the tokens) and the engine's"
        )
    mask_T = packed.mask_T
    zero_where_masked = [
        torch.where(mask_T, x.detach().to(torch.float64), 0)
        for x in (train_logprobs_T, rollout_logprobs_T)
    ]
    d_T = zero_where_masked[0] - zero_where_masked[1]
    return {
        "mismatch/abs": mean_over(d_T.abs(), mask_T),
        "mismatch/k1": mean_over(-d_T, mask_T),
        "mismatch/k3": mean_over(d_T.expm1() - d_T, mask_T),
        "mismatch/abs_max": max_over(d_T.abs(), mask_T),
        "mismatch/ratio_max": max_over(d_T.exp(), mask_T),
    }
