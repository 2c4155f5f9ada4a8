"""Which experts each token went to.

Shapes: N tokens, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from miles.errors import EmptyBatchError, RoutingError
from miles.moe import _formats, _ids, _parts, _spans
from miles.moe._ids import MAX_EXPERTS, NOT_RECORDED, check_num_experts, in_range, storage
from miles.moe._parts import Part
from miles.moe._spans import RoutingSpan

__all__ = ["RoutingSpan", "RoutingTape"]


class RoutingTape:
    """Expert ids of every token in every mixture-of-experts layer, in few bytes.

    One byte an index up to 256 experts, two above. Row t is the routing used to process token t.
    A tape does not change, so slices (`tape[a:b]`) and layers share its memory, a tape of a file
    stays in the file, and `cat(..., copy=False)` is a tape of several parts: `nbytes` counts the
    rows that are seen, `storage_bytes` the memory that is held.

    Args:
        expert_ids: integer `[N, M, K]`, in `0..num_experts-1`, or -1 in a whole row for a token
            whose routing was not recorded.
        num_experts: experts of one layer.
        spans: (start, end, weight_version) of rows, in order, for those whose weights are known.

    Raises:
        RoutingError: another shape, ids out of range, a row that is recorded in part, or spans
            that overlap or lie outside.

    Example:
        >>> from miles.moe import RoutingTape
        >>> tape = RoutingTape(torch.tensor([[[3, 1]], [[-1, -1]]]), num_experts=8)
        >>> len(tape), tape.nbytes, tape[1:].expert_ids.tolist()
        (2, 6, [[[-1, -1]]])
    """

    num_experts: int
    """Experts of one layer."""
    num_experts_inferred: bool
    """True if nobody told: `num_experts` is then only a bound; see `with_num_experts`."""
    spans: tuple[RoutingSpan, ...]
    """Which weights computed which rows, as far as it is known."""

    def __init__(
        self, expert_ids: Tensor, *, num_experts: int, spans: Iterable[Sequence[int]] = ()
    ) -> None:
        if expert_ids.ndim != 3 or expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
            raise RoutingError(
                f"expert_ids is {expert_ids.dtype} of shape {tuple(expert_ids.shape)}; expected "
                "integers [num_tokens, num_moe_layers, topk]"
            )
        check_num_experts(num_experts)
        expert_ids = expert_ids.detach().to("cpu")
        self.num_experts, self.num_experts_inferred = num_experts, False
        self.spans = _spans.checked(spans, len(expert_ids))
        holes_N = None
        if not in_range(expert_ids, num_experts):
            holes_N = _ids.holes(expert_ids, num_experts)
            expert_ids = expert_ids.masked_fill(holes_N[:, None, None], 0)
        stored = expert_ids.to(
            storage(num_experts), copy=True, memory_format=torch.contiguous_format
        )
        self._parts: tuple[Part, ...] = ((stored, holes_N),)

    @classmethod
    def unrecorded(cls, num_tokens: int, *, num_layers: int, topk: int, num_experts: int) -> Self:
        """A tape of rows that say "not recorded", to stand for padding."""
        ids = torch.full((num_tokens, num_layers, topk), NOT_RECORDED, dtype=torch.int16)
        return cls(ids, num_experts=num_experts)

    @classmethod
    def from_sglang(
        cls,
        data: str | bytes | None,
        *,
        num_layers: int,
        topk: int,
        moe_layers: Sequence[int] | None = None,
        num_tokens: int | None = None,
        num_experts: int | None = None,
    ) -> RoutingTape:
        """The tape of one request that SGLang answered; `validate` then looks at its content.

        Args:
            data: `meta_info["routed_experts"]`: base64 of int32 `[num_tokens - 1, num_layers,
                topk]`, since the last token is sampled and not processed.
            num_layers: decoder layers of the model, dense ones too.
            topk: experts a token.
            moe_layers: which layers are mixtures of experts; the others, which SGLang fills with
                zeros, are dropped. None keeps all.
            num_tokens: prompt and answer, less `routed_experts_start_len`. When told, the row
                count is checked, and the row that a stop token sometimes leaves is dropped.
            num_experts: experts of one layer. Tell it if you can. None stores one byte an index if
                all ids are below 256 and two otherwise, and marks the tape
                `num_experts_inferred`; the largest id seen is not taken for the size, since
                tapes of one model would then differ.

        Raises:
            RoutingError: no payload, truncated base64, a length that no number of rows explains,
                another number of rows than `num_tokens` asks for, or ids out of range.

        Example:
            >>> import base64
            >>> from miles.moe import RoutingTape
            >>> ids = torch.tensor([[[0, 0], [5, 2]], [[0, 0], [1, 7]]], dtype=torch.int32)
            >>> data = base64.b64encode(ids.numpy().tobytes())
            >>> tape = RoutingTape.from_sglang(
            ...     data, num_layers=2, topk=2, moe_layers=[1], num_tokens=3, num_experts=8
            ... )
            >>> tape.expert_ids.tolist(), tape.nbytes
            ([[[5, 2]], [[1, 7]]], 4)
        """
        ids = _formats.decode_sglang(
            data, num_layers=num_layers, topk=topk, moe_layers=moe_layers, num_tokens=num_tokens
        )
        if num_experts is not None:
            return cls(ids, num_experts=num_experts)
        tape = cls(ids, num_experts=256 if in_range(ids, 256, low=-1) else MAX_EXPERTS)
        tape.num_experts_inferred = True
        return tape

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; an older file stays if this fails.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> from miles.moe import RoutingTape
            >>> tape = RoutingTape(torch.tensor([[[3, 1]]]), num_experts=8, spans=[(0, 1, 4)])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     tape.save(f"{folder}/tape.safetensors")
            ...     RoutingTape.load(f"{folder}/tape.safetensors") == tape
            True
        """
        metadata = {
            "num_experts": self.num_experts,
            "num_experts_inferred": self.num_experts_inferred,
            "spans": self.spans,
        }
        _formats.write_tape(Path(path), self._ids, self._holes_N, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTape:
        """The tape of a file, memory-mapped: the system may drop and reread its pages.

        Ids are read through once to check their range, except where one byte cannot be wrong.

        Raises:
            RoutingError: a file that is damaged, or that `save` did not write.
            FileNotFoundError: there is none.
        """
        ids, holes_N, metadata = _formats.read_tape(Path(path))
        num_experts, inferred = metadata["num_experts"], metadata["num_experts_inferred"]
        spans = _spans.checked(metadata["spans"], len(ids))
        return cls._of(ids, holes_N, num_experts, spans, inferred)

    def validate(self, *, num_tokens: int | None = None, request_id: str | None = None) -> None:
        """Raise if this cannot be what a router chose for every token that was processed.

        For one request when it is recorded: later it is one of thousands. What an engine that
        captured nothing sends is all zero, which no router with `topk` above 1 chooses, since the
        experts of a token differ. With `topk` 1, zeros are refused if all of at least 32 ids are.

        Args:
            num_tokens: tokens of the request; all but the last must have a row, and the last may.
                None: every row that there is must be recorded.
            request_id: named in the error.

        Raises:
            RoutingError: rows are missing or too many, all zero, or name an expert twice.

        Example:
            >>> from miles.moe import RoutingTape
            >>> tape = RoutingTape(torch.tensor([[[3, 1]], [[0, 2]]]), num_experts=4)
            >>> tape.validate(num_tokens=3, request_id="a")
            >>> tape.validate(num_tokens=9, request_id="a")
            Traceback (most recent call last):
            ...
            miles.errors.RoutingError: request 'a': the routing has 2 rows for 9 tokens; ...
        """
        who = "" if request_id is None else f"request {request_id!r}: "
        recorded_N = self.recorded_N
        _ids.check_recorded(recorded_N, num_tokens, who)
        _ids.check_choices(self._ids, recorded_N, self.num_experts, who)

    def with_spans(self, spans: Iterable[Sequence[int]]) -> RoutingTape:
        """The same rows, tagged with (start, end, weight_version); no copy.

        Raises:
            RoutingError: spans that overlap or lie outside the rows.

        Example:
            >>> from miles.moe import RoutingTape
            >>> tape = RoutingTape.unrecorded(3, num_layers=1, topk=1, num_experts=4)
            >>> tape.with_spans([(0, 2, 7)])[1:].spans
            (RoutingSpan(start=0, end=1, weight_version=7),)
        """
        return self._with_parts(self._parts, _spans.checked(spans, len(self)))

    def with_num_experts(self, num_experts: int) -> RoutingTape:
        """The same rows, of a model with so many experts; no copy unless the storage changes.

        Raises:
            RoutingError: an id that such a model does not have.

        Example:
            >>> from miles.moe import RoutingTape
            >>> tape = RoutingTape(torch.tensor([[[3, 1]]]), num_experts=300)
            >>> tape.nbytes, tape.with_num_experts(8).nbytes
            (4, 2)
        """
        check_num_experts(num_experts)
        if num_experts < self.num_experts and not in_range(self._ids, num_experts):
            raise RoutingError(
                f"the tape holds expert id {int(self._ids.max())}; expected 0..{num_experts - 1}; "
                "it was recorded from another model"
            )
        tape = self._with_parts(
            [(ids.to(storage(num_experts)), holes_N) for ids, holes_N in self._parts], self.spans
        )
        tape.num_experts, tape.num_experts_inferred = num_experts, False
        return tape

    def _widened(self, bound: int) -> RoutingTape:
        """The same rows with a larger bound on a number of experts that nobody told."""
        tape = self.with_num_experts(bound)
        tape.num_experts_inferred = True
        return tape

    @classmethod
    def _of(
        cls,
        ids: Tensor,
        holes_N: Tensor | None,
        num_experts: int,
        spans: tuple[RoutingSpan, ...] = (),
        inferred: bool = False,
    ) -> Self:
        """A tape of storage that is known to be right."""
        tape = object.__new__(cls)
        tape.num_experts, tape.num_experts_inferred, tape.spans = num_experts, inferred, spans
        tape._parts = ((ids, holes_N),)
        return tape

    def _with(
        self, ids: Tensor, holes_N: Tensor | None, spans: tuple[RoutingSpan, ...]
    ) -> RoutingTape:
        """Other rows or layers of the same model."""
        return self._of(ids, holes_N, self.num_experts, spans, self.num_experts_inferred)

    def _with_parts(self, parts: Sequence[Part], spans: tuple[RoutingSpan, ...]) -> RoutingTape:
        """Rows of the same model that stay where they are."""
        tape = self._with(*parts[0], spans)
        tape._parts = tuple(parts)
        return tape

    def _fill(self, ids: Tensor) -> None:
        """Take what a router's own topk gave, which needs no checking."""
        # Narrow on the device: a copy to the host that also converts moves the wider numbers.
        self._parts = ((ids.to(storage(self.num_experts)).to("cpu"), None),)

    @property
    def _ids(self) -> Tensor:
        """`[N, M, K]` as stored: a new tensor at every call if there are several parts."""
        return _parts.ids_of(self._parts)

    @property
    def _holes_N(self) -> Tensor | None:
        """bool `[N]`, rows that are missing; None if none is."""
        return _parts.holes_of(self._parts)

    @property
    def expert_ids(self) -> Tensor:
        """int16 `[N, M, K]`, a new tensor; -1 where a row was not recorded."""
        ids = self._ids.to(torch.int16, copy=True)
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
        return self._parts[0][0].shape[1]

    @property
    def topk(self) -> int:
        """Experts a token goes to."""
        return self._parts[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return sum(part.nbytes for parts in self._parts for part in parts if part is not None)

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self._parts)

    def __getitem__(self, tokens: slice) -> RoutingTape:
        if not isinstance(tokens, slice):
            raise RoutingError(f"got {tokens!r}; expected a slice of tokens, such as tape[0:1]")
        start, stop, step = tokens.indices(len(self))
        if step < 0:
            raise RoutingError(f"got {tokens!r}; expected a slice that goes forward")
        if step > 1:
            return self.rows(torch.arange(start, max(start, stop), step))
        parts = _parts.cut(self._parts, start, stop)
        return self._with_parts(parts, _spans.clipped(self.spans, start, stop))

    def to_bytes(self) -> bytes:
        """The ids in storage order, then one byte a row that says whether it is missing."""
        holes_N = ~self.recorded_N
        return b"".join(t.contiguous().numpy().tobytes() for t in (self._ids, holes_N))

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        *,
        num_layers: int,
        topk: int,
        num_experts: int,
        spans: Iterable[Sequence[int]] = (),
        num_experts_inferred: bool = False,
    ) -> RoutingTape:
        """The inverse of `to_bytes`; everything else travels beside the bytes.

        Raises:
            RoutingError: a length that no number of tokens explains, or ids out of range.
        """
        dtype = storage(num_experts)
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
        if not in_range(ids, num_experts):
            raise RoutingError(
                f"routing holds expert ids up to {int(ids.max())}; expected 0..{num_experts - 1}"
            )
        return cls._of(
            ids,
            holes_N if bool(holes_N.any()) else None,
            num_experts,
            _spans.checked(spans, tokens),
            num_experts_inferred,
        )

    def rows(self, index: Tensor) -> RoutingTape:
        """The tokens of an int64 index, in its order."""
        holes_N = None if self._holes_N is None else self._holes_N[index]
        spans = self.spans and _spans.taken(self.spans, index % len(self))
        return self._with(self._ids[index], holes_N, spans)

    def _take(self, index_N: Tensor) -> RoutingTape:
        """`rows`, where -1 stands for a row that was not recorded."""
        absent_N = index_N < 0
        if not bool(absent_N.any()):
            return self.rows(index_N)
        safe_N = index_N.clamp(min=0)
        if self._holes_N is not None:
            absent_N |= self._holes_N[safe_N]
        return self._with(self._ids[safe_N], absent_N, _spans.taken(self.spans, index_N))

    @classmethod
    def pad(cls, tapes: Sequence[RoutingTape], width: int) -> RoutingTape:
        """Tapes end to end, each with rows that say "not recorded" up to `width` tokens."""
        if not tapes:
            raise EmptyBatchError("RoutingTape.pad got no tape; expected at least one")
        tapes = _alike(tapes)
        first = tapes[0]
        if (longest := max(map(len, tapes))) > width:
            raise RoutingError(f"a tape has {longest} rows; expected at most width={width}")
        ids = first._ids.new_zeros((len(tapes), width, *first._ids.shape[1:]))
        holes = torch.ones((len(tapes), width), dtype=torch.bool)
        for row, tape in enumerate(tapes):
            ids[row, : len(tape)] = tape._ids
            holes[row, : len(tape)] = False if tape._holes_N is None else tape._holes_N
        holes_N = holes.flatten() if bool(holes.any()) else None
        spans = _spans.joined((tape.spans, row * width) for row, tape in enumerate(tapes))
        return first._with(ids.flatten(0, 1), holes_N, spans)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RoutingTape)
            and self.num_experts == other.num_experts
            and self.spans == other.spans
            and torch.equal(self.expert_ids, other.expert_ids)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        holes = 0 if self._holes_N is None else int(self._holes_N.sum())
        return (
            f"RoutingTape(tokens={len(self)}, layers={self.num_layers}, topk={self.topk}, "
            f"num_experts{'<=' if self.num_experts_inferred else '='}{self.num_experts}, "
            f"not_recorded={holes})"
        )

    @classmethod
    def cat(cls, tapes: Sequence[RoutingTape], *, copy: bool = True) -> RoutingTape:
        """Tapes end to end, in new memory unless there is but one.

        Args:
            tapes: at least one, of one model.
            copy: False leaves the rows where they are, so that tapes can have some in common
                (`share_prefix`); they are then put together whenever they are used.

        Raises:
            EmptyBatchError: no tape.
            RoutingError: tapes of different models.

        Example:
            >>> from miles.moe import RoutingTape
            >>> tape = RoutingTape(torch.tensor([[[3]], [[1]]]), num_experts=4)
            >>> RoutingTape.cat([tape[1:], tape[:1]]).expert_ids.tolist()
            [[[1]], [[3]]]
        """
        if not tapes:
            raise EmptyBatchError("RoutingTape.cat got no tape; expected at least one")
        tapes = _alike(tapes)
        if len(tapes) == 1:
            return tapes[0]
        offsets = [0, *itertools.accumulate(map(len, tapes))]
        spans = _spans.joined(zip((tape.spans for tape in tapes), offsets, strict=False))
        parts = [part for tape in tapes for part in tape._parts if len(part[0])]
        tape = tapes[0]._with_parts(parts or tapes[0]._parts[:1], spans)
        return tape.copy() if copy else tape

    def copy(self) -> RoutingTape:
        """The same rows in memory of their own, which nothing else keeps alive or is kept by."""
        ids, holes_N = self._ids, self._holes_N
        if len(self._parts) == 1:
            ids, holes_N = ids.clone(), None if holes_N is None else holes_N.clone()
        return self._with(ids, holes_N, self.spans)


def _alike(tapes: Sequence[RoutingTape]) -> list[RoutingTape]:
    """Tapes of one shape; a number of experts that was inferred gives way to one that was told."""
    told = [tape.num_experts for tape in tapes if not tape.num_experts_inferred]
    if not told:
        bound = max(tape.num_experts for tape in tapes)
        tapes = [tape if tape.num_experts == bound else tape._widened(bound) for tape in tapes]
    else:
        tapes = [
            tape.with_num_experts(told[0]) if tape.num_experts_inferred else tape for tape in tapes
        ]
    first = tapes[0]
    expected = (first.num_layers, first.topk, first.num_experts)
    for index, tape in enumerate(tapes):
        got = (tape.num_layers, tape.topk, tape.num_experts)
        if got != expected:
            raise RoutingError(
                f"tape {index} has (layers, topk, experts) {got}; expected {expected}, as tape 0"
            )
    return list(tapes)
