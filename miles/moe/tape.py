"""Which experts each token went to.

Shapes: N tokens, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from miles.errors import EmptyBatchError, RoutingError

__all__ = ["RoutingTape", "routing_agreement"]

NOT_RECORDED = -1


class RoutingTape:
    """Expert ids of every token in every mixture-of-experts layer, in few bytes.

    One byte an index up to 256 experts, two above. Row t is the routing used to process token t.

    Args:
        expert_ids: integer `[N, M, K]`, in `0..num_experts-1`, or -1 in a whole row for a token
            whose routing was not recorded.
        num_experts: experts of one layer.

    Raises:
        RoutingError: another shape, ids out of range, or a row that is recorded in part.

    Example:
        >>> from miles.moe import RoutingTape
        >>> tape = RoutingTape(torch.tensor([[[3, 1]], [[-1, -1]]]), num_experts=8)
        >>> len(tape), tape.nbytes, tape[1:].expert_ids.tolist()
        (2, 6, [[[-1, -1]]])
    """

    def __init__(self, expert_ids: Tensor, *, num_experts: int) -> None:
        if expert_ids.ndim != 3 or expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
            raise RoutingError(
                f"expert_ids is {expert_ids.dtype} of shape {tuple(expert_ids.shape)}; expected "
                "integers [num_tokens, num_moe_layers, topk]"
            )
        if not 0 < num_experts <= 32768:
            raise RoutingError(f"num_experts is {num_experts}; expected 1 to 32768")
        expert_ids = expert_ids.detach().to("cpu")
        absent = expert_ids == NOT_RECORDED
        holes_N = (
            absent.flatten(1).all(1) if expert_ids[0:1].numel() else absent.new_zeros(len(absent))
        )
        valid = ((expert_ids >= 0) & (expert_ids < num_experts)) | holes_N[:, None, None]
        if not bool(valid.all()):
            token, layer = (~valid).nonzero()[0, :2].tolist()
            raise RoutingError(
                f"token {token}, layer {layer}: expert ids {expert_ids[token, layer].tolist()}; "
                f"expected 0..{num_experts - 1}, or -1 in the whole row of a token that was not "
                "recorded"
            )
        self.num_experts = num_experts
        self._ids = torch.where(holes_N[:, None, None], 0, expert_ids).to(_storage(num_experts))
        self._holes_N: Tensor | None = holes_N if bool(holes_N.any()) else None

    @classmethod
    def unrecorded(cls, num_tokens: int, *, num_layers: int, topk: int, num_experts: int) -> Self:
        """A tape of rows that say "not recorded", to stand for padding."""
        ids = torch.full((num_tokens, num_layers, topk), NOT_RECORDED, dtype=torch.int16)
        return cls(ids, num_experts=num_experts)

    @classmethod
    def _of(cls, ids: Tensor, holes_N: Tensor | None, num_experts: int) -> Self:
        """A tape of storage that is known to be right."""
        tape = object.__new__(cls)
        tape.num_experts, tape._ids, tape._holes_N = num_experts, ids, holes_N
        return tape

    def _fill(self, ids: Tensor) -> None:
        """Take what a router's own topk gave, which needs no checking."""
        self._ids, self._holes_N = ids.to("cpu", _storage(self.num_experts)), None

    @property
    def expert_ids(self) -> Tensor:
        """int16 `[N, M, K]`; -1 where a row was not recorded."""
        ids = self._ids.to(torch.int16)
        if self._holes_N is None:
            return ids
        return torch.where(self._holes_N[:, None, None], NOT_RECORDED, ids)

    @property
    def recorded_N(self) -> Tensor:
        """bool `[N]`: rows that hold a routing."""
        if self._holes_N is None:
            return torch.ones(len(self), dtype=torch.bool)
        return ~self._holes_N

    @property
    def num_layers(self) -> int:
        """Mixture-of-experts layers; dense ones have no place here."""
        return self._ids.shape[1]

    @property
    def topk(self) -> int:
        """Experts a token goes to."""
        return self._ids.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        holes = 0 if self._holes_N is None else self._holes_N.nbytes
        return self._ids.nbytes + holes

    def __len__(self) -> int:
        return self._ids.shape[0]

    def __getitem__(self, tokens: slice) -> RoutingTape:
        if not isinstance(tokens, slice):
            raise RoutingError(f"got {tokens!r}; expected a slice of tokens, such as tape[0:1]")
        holes_N = None if self._holes_N is None else self._holes_N[tokens]
        return self._of(self._ids[tokens], holes_N, self.num_experts)

    def to_bytes(self) -> bytes:
        """The ids in storage order, then one byte a row that says whether it is missing."""
        holes_N = ~self.recorded_N
        return b"".join(t.contiguous().numpy().tobytes() for t in (self._ids, holes_N))

    @classmethod
    def from_bytes(
        cls, data: bytes, *, num_layers: int, topk: int, num_experts: int
    ) -> RoutingTape:
        """The inverse of `to_bytes`.

        Raises:
            RoutingError: a length that no number of tokens explains, or ids out of range.
        """
        dtype = _storage(num_experts)
        row = num_layers * topk * dtype.itemsize + 1
        if len(data) % row:
            raise RoutingError(
                f"got {len(data)} bytes of routing; expected a multiple of {row} ({num_layers} "
                f"layers x {topk} experts x {dtype.itemsize} bytes, and 1)"
            )
        tokens = len(data) // row
        flat = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)
        ids = flat[: tokens * (row - 1)].view(dtype).view(tokens, num_layers, topk)
        holes_N = flat[tokens * (row - 1) : tokens * row].view(torch.bool)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
            raise RoutingError(
                f"routing holds expert ids up to {int(ids.max())}; expected 0..{num_experts - 1}"
            )
        return cls._of(ids, holes_N if bool(holes_N.any()) else None, num_experts)

    def rows(self, index: Tensor) -> RoutingTape:
        """The tokens of an int64 index, in its order."""
        holes_N = None if self._holes_N is None else self._holes_N[index]
        return self._of(self._ids[index], holes_N, self.num_experts)

    @classmethod
    def pad(cls, tapes: Sequence[RoutingTape], width: int) -> RoutingTape:
        """Tapes end to end, each with rows that say "not recorded" up to `width` tokens."""
        if not tapes:
            raise EmptyBatchError("RoutingTape.pad got no tape; expected at least one")
        first = _same_shape(tapes)
        if (longest := max(map(len, tapes))) > width:
            raise RoutingError(f"a tape has {longest} rows; expected at most width={width}")
        ids = first._ids.new_zeros((len(tapes), width, *first._ids.shape[1:]))
        holes = torch.ones((len(tapes), width), dtype=torch.bool)
        for row, tape in enumerate(tapes):
            ids[row, : len(tape)] = tape._ids
            holes[row, : len(tape)] = False if tape._holes_N is None else tape._holes_N
        holes_N = holes.flatten() if bool(holes.any()) else None
        return cls._of(ids.flatten(0, 1), holes_N, first.num_experts)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RoutingTape)
            and self.num_experts == other.num_experts
            and torch.equal(self.expert_ids, other.expert_ids)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        holes = 0 if self._holes_N is None else int(self._holes_N.sum())
        return (
            f"RoutingTape(tokens={len(self)}, layers={self.num_layers}, topk={self.topk}, "
            f"num_experts={self.num_experts}, not_recorded={holes})"
        )

    @classmethod
    def cat(cls, tapes: Sequence[RoutingTape]) -> RoutingTape:
        """Tapes end to end."""
        if not tapes:
            raise EmptyBatchError("RoutingTape.cat got no tape; expected at least one")
        first = _same_shape(tapes)
        holes_N = None
        if any(tape._holes_N is not None for tape in tapes):
            holes_N = torch.cat([~tape.recorded_N for tape in tapes])
        return cls._of(torch.cat([tape._ids for tape in tapes]), holes_N, first.num_experts)


def _same_shape(tapes: Sequence[RoutingTape]) -> RoutingTape:
    first = tapes[0]
    expected = (first.num_layers, first.topk, first.num_experts)
    for index, tape in enumerate(tapes):
        got = (tape.num_layers, tape.topk, tape.num_experts)
        if got != expected:
            raise RoutingError(
                f"tape {index} has (layers, topk, experts) {got}; expected {expected}, as tape 0"
            )
    return first


def routing_agreement(a: RoutingTape, b: RoutingTape) -> float:
    """Share of (token, layer) pairs that went to the same set of experts, in any order.

    Rows that either tape did not record are left out.

    Raises:
        RoutingError: tapes of different shape, or without a row that both recorded.

    >>> from miles.moe import RoutingTape, routing_agreement
    >>> a = RoutingTape(torch.tensor([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> b = RoutingTape(torch.tensor([[[1, 0]], [[2, 1]]]), num_experts=4)
    >>> routing_agreement(a, b)
    0.5
    """
    if a.expert_ids.shape != b.expert_ids.shape:
        raise RoutingError(
            f"tapes have shapes {tuple(a.expert_ids.shape)} and {tuple(b.expert_ids.shape)}; "
            "expected the same tokens, layers and topk"
        )
    both_N = a.recorded_N & b.recorded_N
    if not bool(both_N.any()):
        raise RoutingError("no row is recorded in both tapes; expected at least one to compare")
    same = a.expert_ids[both_N].sort(-1).values == b.expert_ids[both_N].sort(-1).values
    return float(same.all(-1).to(torch.float64).mean())


def _storage(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int16
