"""The kinds of reading that can be put together exactly, whatever was read where.

Each is a few 0-d float64 tensors and knows how several of its kind become one.

Shapes: T tokens, N readings of one kind (micro-batches or ranks), K numbers in each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

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
]


@dataclass(frozen=True)
class Metric(ABC):
    """A reading that is not a number yet. Subclasses are dataclasses of 0-d tensors."""

    @classmethod
    @abstractmethod
    def merge(cls, rows_NK: Tensor) -> Self:
        """The reading of everything that N readings saw; a row is what `numbers` returns."""

    @abstractmethod
    def value(self) -> Tensor:
        """0-d float64."""

    def numbers(self) -> list[Tensor]:
        """The fields, in order."""
        return [getattr(self, field.name) for field in fields(self)]

    def named(self, key: str) -> dict[str, Tensor]:
        """What `reduce_metrics` reports under `key`."""
        return {key: self.value()}

    def __float__(self) -> float:
        return float(self.value())


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Mean(Metric):
    """A mean that is still a sum and a count."""

    total: Tensor
    """0-d float64: sum of the values."""
    count: Tensor
    """0-d float64: how many there were."""

    @classmethod
    def merge(cls, rows_NK: Tensor) -> Self:
        """Sums of both."""
        return cls(*rows_NK.sum(0).unbind())

    def value(self) -> Tensor:
        """0-d float64; NaN where nothing was counted."""
        return self.total / self.count


@dataclass(frozen=True)
class ExpMean(Mean):
    """exp of a mean: a perplexity when the values are negative log-probs."""

    def value(self) -> Tensor:
        """0-d float64; NaN where nothing was counted."""
        return super().value().exp()


@dataclass(frozen=True)
class Max(Metric):
    """A maximum; `-inf` where there was nothing."""

    largest: Tensor
    """0-d float64."""

    @classmethod
    def merge(cls, rows_NK: Tensor) -> Self:
        """The largest; NaN counts as larger than anything."""
        return cls(rows_NK[:, 0].max())

    def value(self) -> Tensor:
        """0-d float64."""
        return self.largest


@dataclass(frozen=True)
class ArgMax(Metric):
    """A maximum and where it is. Among equals, the first sequence and then the first position.

    `reduce_metrics` reports it as `key`, `key/sequence` and `key/position`.
    """

    largest: Tensor
    """0-d float64; `-inf` where there was nothing."""
    sequence: Tensor
    """0-d float64: the caller's id of the sequence; `inf` where there was nothing."""
    position: Tensor
    """0-d float64: index within the sequence; `inf` where there was nothing."""

    @classmethod
    def merge(cls, rows_NK: Tensor) -> Self:
        """The largest; NaN counts as larger than anything, so that its place is found."""
        values_N, sequences_N, positions_N = rows_NK.unbind(1)
        largest = values_N.max()
        tied_N = (values_N == largest) | (values_N.isnan() & largest.isnan())
        sequence = torch.where(tied_N, sequences_N, torch.inf).min()
        tied_N &= sequences_N == sequence
        return cls(largest, sequence, torch.where(tied_N, positions_N, torch.inf).min())

    def value(self) -> Tensor:
        """0-d float64: the maximum."""
        return self.largest

    def named(self, key: str) -> dict[str, Tensor]:
        """The maximum and its place; NaN for the place where there was nothing."""
        place = {"sequence": self.sequence, "position": self.position}
        found = {f"{key}/{name}": torch.where(x.isinf(), torch.nan, x) for name, x in place.items()}
        return {key: self.largest, **found}


@dataclass(frozen=True)
class Ess(Metric):
    """Effective sample size as a fraction, `(sum w)^2 / (n sum w^2)`: 1 for equal weights."""

    total: Tensor
    """0-d float64: sum of the weights."""
    squares: Tensor
    """0-d float64: sum of their squares."""
    count: Tensor
    """0-d float64: n."""

    @classmethod
    def merge(cls, rows_NK: Tensor) -> Self:
        """Sums of all three."""
        return cls(*rows_NK.sum(0).unbind())

    def value(self) -> Tensor:
        """0-d float64; NaN where nothing was counted or every weight is 0."""
        return self.total**2 / (self.count * self.squares)


@dataclass(frozen=True)
class LogMeanExp(Metric):
    """log of the mean of exp(x), for x whose exponential a float64 cannot hold."""

    largest: Tensor
    """0-d float64: the largest x; `-inf` where there was nothing."""
    scaled: Tensor
    """0-d float64: sum of exp(x - largest), or of exp(x) where the largest is not finite."""
    count: Tensor
    """0-d float64: how many there were."""

    @classmethod
    def merge(cls, rows_NK: Tensor) -> Self:
        """Sums, scaled to the largest x of all."""
        largest_N, scaled_N, count_N = rows_NK.unbind(1)
        largest = largest_N.max()
        factor_N = (_shift(largest_N) - _shift(largest)).exp()
        # A reading without weight must stay so where its factor overflows.
        scaled = torch.where(scaled_N == 0, 0, scaled_N * factor_N).sum()
        return cls(largest, scaled, count_N.sum())

    def value(self) -> Tensor:
        """0-d float64; NaN where nothing was counted."""
        return _shift(self.largest) + (self.scaled / self.count).log()


def _shift(largest: Tensor) -> Tensor:
    return torch.where(largest.isfinite(), largest, 0)


def mean_over(values_T: Tensor, mask_T: Tensor) -> Mean:
    """The mean of `values_T` where `mask_T`, detached.

    >>> float(mean_over(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])))
    2.0
    """
    total = torch.where(mask_T, values_T.detach(), 0).sum(dtype=torch.float64)
    return Mean(total, mask_T.count_nonzero().to(torch.float64))


def exp_mean_over(values_T: Tensor, mask_T: Tensor) -> ExpMean:
    """exp of the mean of `values_T` where `mask_T`, detached.

    >>> nats = torch.tensor([4.0, 1.0]).log()
    >>> round(float(exp_mean_over(nats, torch.tensor([True, True]))), 4)
    2.0
    """
    return ExpMean(*mean_over(values_T, mask_T).numbers())


def max_over(values_T: Tensor, mask_T: Tensor) -> Max:
    """The largest of `values_T` where `mask_T`, detached.

    >>> float(max_over(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])))
    3.0
    """
    values_T = torch.where(mask_T, values_T.detach().to(torch.float64), -torch.inf)
    return Max(values_T.max() if values_T.numel() else values_T.new_full((), -torch.inf))


def argmax_over(
    values_T: Tensor, mask_T: Tensor, *, sequences_T: Tensor, positions_T: Tensor
) -> ArgMax:
    """The largest of `values_T` where `mask_T`, and its place, detached.

    Args:
        values_T: `[T]`.
        mask_T: bool `[T]`.
        sequences_T: int64 `[T]`, ids below 2^53, which a float64 holds exactly.
        positions_T: int64 `[T]`.

    Example:
        >>> place = {"sequences_T": torch.tensor([7, 7, 9]), "positions_T": torch.tensor([0, 1, 0])}
        >>> m = argmax_over(torch.tensor([1.0, 3.0, 2.0]), torch.ones(3).bool(), **place)
        >>> float(m), m.sequence.item(), m.position.item()
        (3.0, 7.0, 1.0)
    """
    # The last row stands for nothing; made by padding, since copying it to a GPU would wait.
    columns = [
        pad(torch.where(mask_T, column.detach().to(torch.float64), fill), (0, 1), value=fill)
        for column, fill in (
            (values_T, -torch.inf),
            (sequences_T, torch.inf),
            (positions_T, torch.inf),
        )
    ]
    return ArgMax.merge(torch.stack(columns, dim=1))


def ess_over(weights_T: Tensor, mask_T: Tensor) -> Ess:
    """The effective sample size of `weights_T` where `mask_T`, detached.

    >>> float(ess_over(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])))
    0.8
    """
    weights_T = torch.where(mask_T, weights_T.detach().to(torch.float64), 0)
    return Ess(weights_T.sum(), (weights_T**2).sum(), mask_T.sum().to(torch.float64))


def log_mean_exp_over(values_T: Tensor, mask_T: Tensor, *, shared_by: int = 1) -> LogMeanExp:
    """log of the mean of `exp(values_T)` where `mask_T`, detached.

    Args:
        values_T: `[T]`.
        mask_T: bool `[T]`.
        shared_by: ranks that hold these same values, so that each counts only its share.

    Example:
        >>> x = torch.tensor([1000.0, 1000.0, float("nan")])
        >>> float(log_mean_exp_over(x, torch.tensor([True, True, False])))
        1000.0
    """
    largest = max_over(values_T, mask_T).largest
    shifted_T = values_T.detach().to(torch.float64) - _shift(largest)
    scaled = torch.where(mask_T, shifted_T, -torch.inf).exp().sum()
    return LogMeanExp(largest, scaled / shared_by, mask_T.sum().to(torch.float64) / shared_by)
