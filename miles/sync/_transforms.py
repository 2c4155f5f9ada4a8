"""How tensors of one naming become those of another, and back, bit for bit.

A transform takes the tensors of one rule in the rule's order. It keeps views where it can; what it
is given it neither keeps nor changes. Shapes: E experts, H hidden size, I size inside an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError

__all__ = [
    "Concat",
    "Copy",
    "Grouped",
    "Interleaved",
    "PadRows",
    "QueryGroups",
    "Stack",
    "Then",
    "Transform",
    "Transpose",
    "Unstack",
]


class Transform(Protocol):
    """Tensors to tensors, and back."""

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """From the source's tensors to the target's."""
        ...

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """From the target's tensors to the source's."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensors under other names."""

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensors themselves."""
        return list(parts)

    backward = forward


@dataclass(frozen=True)
class Concat:
    """Tensors one under the other: gate and up, or q, k and v of SGLang."""

    sizes: tuple[int, ...] | None = None
    """Rows of each; None for any number of parts of one size, two by default."""
    num_parts: int = 2

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One tensor of all rows."""
        same_dtype(parts)
        rest = parts[0].shape[1:]
        for i, part in enumerate(parts):
            rows = self.sizes[i] if self.sizes else len(parts[0])
            expect(part, (rows, *rest))
        return [torch.cat(list(parts))]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Views of the rows of each."""
        (whole,) = parts
        if self.sizes is None:
            if len(whole) % self.num_parts:
                raise ShapeError(
                    f"got shape {tuple(whole.shape)}; expected rows for {self.num_parts} equal "
                    "parts; compare the config with the model's"
                )
            return list(whole.chunk(self.num_parts))
        expect(whole, (sum(self.sizes), *whole.shape[1:]))
        return list(whole.split(self.sizes))


@dataclass(frozen=True)
class QueryGroups:
    """q, k and v as megatron-core fuses them: group by group, its query heads, its key, its value.

    Example:
        >>> q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
        >>> QueryGroups(num_heads=4, num_groups=2, head_dim=1).forward([q, k, v])[0].tolist()
        [0, 1, 10, 20, 2, 3, 11, 21]
    """

    num_heads: int
    num_groups: int
    """Key-value heads."""
    head_dim: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_groups:
            raise SettingError(
                f"got {self.num_heads} attention heads and {self.num_groups} key-value heads; "
                "expected a multiple"
            )

    @property
    def _rows(self) -> list[int]:
        """Rows of a group."""
        return [self.num_heads // self.num_groups * self.head_dim, self.head_dim, self.head_dim]

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One tensor of `(num_heads + 2 * num_groups) * head_dim` rows, weight or bias."""
        same_dtype(parts)
        rest = parts[0].shape[1:]
        for part, rows in zip(parts, self._rows, strict=True):
            expect(part, (rows * self.num_groups, *rest))
        groups = [part.reshape(self.num_groups, -1, *rest) for part in parts]
        return [torch.cat(groups, 1).flatten(0, 1)]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v."""
        (whole,) = parts
        rest = whole.shape[1:]
        expect(whole, (sum(self._rows) * self.num_groups, *rest))
        groups = whole.reshape(self.num_groups, -1, *rest)
        return [part.flatten(0, 1) for part in groups.split(self._rows, 1)]


@dataclass(frozen=True)
class PadRows:
    """An embedding whose vocabulary is padded with zero rows; what they hold does not come back."""

    rows: int
    padded: int

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """With the padding."""
        (table,) = parts
        expect(table, (self.rows, *table.shape[1:]))
        if self.padded == self.rows:
            return [table]
        padding = table.new_zeros(self.padded - self.rows, *table.shape[1:])
        return [torch.cat([table, padding])]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """A view without it."""
        (table,) = parts
        expect(table, (self.padded, *table.shape[1:]))
        return [table[: self.rows]]


@dataclass(frozen=True)
class Stack:
    """Experts under a new first axis, each made of its own parts by another transform."""

    each: Transform
    num_experts: int

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`[E, ...]` of the parts of expert 0, then of expert 1, and so on."""
        same_dtype(parts)
        width = len(parts) // self.num_experts
        experts = [self.each.forward(parts[i : i + width])[0] for i in range(0, len(parts), width)]
        for expert in experts:
            expect(expert, experts[0].shape)
        return [torch.stack(experts)]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts of every expert."""
        (whole,) = parts
        expect(whole, (self.num_experts, *whole.shape[1:]))
        return [part for expert in whole.unbind() for part in self.each.backward([expert])]


@dataclass(frozen=True)
class Unstack:
    """One tensor of all experts, taken apart into those of one rank."""

    each: Transform
    num_experts: int
    chosen: range
    """The experts of this rank; back come only these, in a tensor of so many."""

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each expert; a tensor of the chosen ones alone will do."""
        (whole,) = parts
        if len(whole) == len(self.chosen):
            mine = whole
        else:
            expect(whole, (self.num_experts, *whole.shape[1:]))
            mine = whole[self.chosen.start : self.chosen.stop]
        return [self.each.forward([expert])[0] for expert in mine]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`[E, ...]` of the chosen experts."""
        same_dtype(parts)
        experts = [self.each.backward([part])[0] for part in parts]
        for expert in experts:
            expect(expert, experts[0].shape)
        return [torch.stack(experts)]


@dataclass(frozen=True)
class Transpose:
    """A matrix the other way round."""

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """A view."""
        return [part.t() for part in parts]

    backward = forward


@dataclass(frozen=True)
class Interleaved:
    """gpt-oss's gate and up, in turns along the last axis, to all of gate above all of up.

    Example:
        >>> Interleaved().forward([torch.tensor([0, 10, 1, 11, 2, 12])])[0].tolist()
        [0, 1, 2, 10, 11, 12]
    """

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`[H, 2 I]` to `[2 I, H]`, and a bias `[2 I]` to `[2 I]`."""
        (turns,) = parts
        if turns.shape[-1] % 2:
            raise ShapeError(
                f"got shape {tuple(turns.shape)}; expected gate and up in turns, an even last "
                "dimension; compare the config with the model's"
            )
        rows = turns.t()
        return [torch.cat([rows[0::2], rows[1::2]])]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """And back."""
        gate, up = Concat().backward(parts)
        return [torch.stack([gate, up], 1).flatten(0, 1).t()]


@dataclass(frozen=True)
class Grouped:
    """Stacked experts to the one matrix of megatron-core's `GroupedMLP`, whose memory is `[E,..]`.

    `weight1 [H, E 2I]` holds `[E, H, 2I]`, `weight2 [E I, H]` holds `[E, I, H]`.
    """

    num_experts: int
    wide: bool
    """Whether it is `weight1`."""

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`[E, out, in]` to a matrix."""
        memory = parts[0].transpose(1, 2)
        width = memory.shape[2] * (self.num_experts if self.wide else 1)
        return [memory.reshape(-1, width)]

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """A matrix to `[E, out, in]`."""
        (matrix,) = parts
        if matrix.shape[1 if self.wide else 0] % self.num_experts:
            raise ShapeError(
                f"got shape {tuple(matrix.shape)}; expected {self.num_experts} experts of one "
                "size; compare the config, or `experts`, with the model's"
            )
        width = matrix.shape[1] // (self.num_experts if self.wide else 1)
        return [matrix.reshape(self.num_experts, -1, width).transpose(1, 2)]


@dataclass(frozen=True)
class Then:
    """One transform after another."""

    first: Transform
    second: Transform

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`second` of `first`."""
        return self.second.forward(self.first.forward(parts))

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `first` of that of `second`."""
        return self.first.backward(self.second.backward(parts))


def expect(tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise unless the tensor has the shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(
            f"got shape {tuple(tensor.shape)}; expected {tuple(shape)}; compare the config with "
            "the model's"
        )


def same_dtype(parts: Sequence[Tensor]) -> None:
    """Raise if one tensor is to be made of several dtypes, which would change values."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise DtypeError(
            f"got {sorted(map(str, dtypes))} for one tensor; expected one dtype; cast them first"
        )
