"""What the log-prob functions share: vocabulary shards, targets and temperatures.

Shapes: T tokens, V vocabulary entries of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, SettingError, ShapeError

__all__ = ["IGNORED", "VocabShard", "check_targets", "temperature_of_rows", "widen"]

IGNORED = -100
"""The target of a position that has none."""


class VocabShard(NamedTuple):
    """The contiguous part of the vocabulary that this rank holds; the whole one without a group."""

    start: int
    """The first id of this rank."""
    size: int
    """Ids of this rank."""
    total: int
    """Ids of all ranks."""
    group: ProcessGroup | None
    """The ranks that hold the vocabulary together, in order."""

    @classmethod
    def here(cls, size: int, group: ProcessGroup | None) -> VocabShard:
        """This rank's shard of `size` ids, the same on every rank of `group`."""
        if group is None:
            return cls(0, size, size, None)
        rank = dist.get_rank(group)
        if rank < 0:
            raise SettingError(
                f"vocab_group does not hold this process (rank {dist.get_rank()}); expected the "
                "group whose ranks hold the vocabulary together"
            )
        return cls(rank * size, size, dist.get_world_size(group) * size, group)

    def locate(
        self, targets_T: Tensor, start: int = 0, size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where targets lie in `size` ids from the shard's `start` on: index `[T]`, inside `[T]`.

        The index is a valid one everywhere; `inside` tells where it means something.
        """
        size = self.size - start if size is None else size
        index_T = targets_T - (self.start + start)
        return index_T.clamp(0, size - 1), (index_T >= 0) & (index_T < size)

    def max_(self, values: Tensor) -> Tensor:
        """The largest over the ranks, in place."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None and values.numel():
            dist.all_reduce(values, op=op, group=self.group)
        return values


def widen(values: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def check_targets(targets_T: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Refuse targets of the wrong shape or dtype or, on a CPU, out of range."""
    if targets_T.shape != (num_tokens,):
        raise ShapeError(
            f"targets_T has shape {tuple(targets_T.shape)}; expected [T] = ({num_tokens},)"
        )
    if targets_T.dtype != torch.int64:
        raise DtypeError(f"targets_T is {targets_T.dtype}; expected int64")
    if targets_T.device.type == "cpu" and targets_T.numel():
        outside = out_of_range(targets_T, vocab_size)
        if bool(outside.any()):
            bad = targets_T[outside][:8].tolist()
            raise SettingError(
                f"targets_T holds {bad}; expected 0..{vocab_size - 1}, or -100 to ignore"
            )


def out_of_range(targets_T: Tensor, vocab_size: int) -> Tensor:
    """bool `[T]`: neither an id of the vocabulary nor ignored."""
    return (targets_T != IGNORED) & ((targets_T < 0) | (targets_T >= vocab_size))


def temperature_of_rows(
    temperature: float | Tensor, targets_T: Tensor, dtype: torch.dtype
) -> Tensor:
    """The temperature of every row, `[T]`; 1 where the target is ignored.

    What is no finite number above 0 raises; in a tensor on a GPU it becomes NaN, to spare a stall.
    """
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, (int, float)) or not 0 < temperature < torch.inf:
            raise SettingError(
                f"temperature is {temperature!r}; expected a finite number above 0 (score greedy "
                "samples at 1.0)"
            )
        return torch.full_like(targets_T, temperature, dtype=dtype)
    if temperature.ndim and temperature.shape != targets_T.shape:
        raise ShapeError(
            f"temperature has shape {tuple(temperature.shape)}; expected a number or [T] = "
            f"{tuple(targets_T.shape)}"
        )
    if not temperature.is_floating_point():
        raise DtypeError(f"temperature is {temperature.dtype}; expected floating point")
    ignored_T = targets_T == IGNORED
    rows_T = temperature.detach().to(targets_T.device, dtype).expand(targets_T.shape)
    rows_T = torch.where(ignored_T, 1, rows_T)
    bad_T = ~((rows_T > 0) & (rows_T < torch.inf))
    if rows_T.device.type == "cpu" and bool(bad_T.any()):
        raise SettingError(
            f"temperature is {rows_T[bad_T][:8].tolist()} at tokens "
            f"{bad_T.nonzero().flatten()[:8].tolist()}; expected finite numbers above 0 (score "
            "greedy samples at 1.0)"
        )
    return torch.where(bad_T, torch.nan, rows_T)
