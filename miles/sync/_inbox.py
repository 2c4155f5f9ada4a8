"""Where buckets arrive: one buffer for a whole version, apart from what is being served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._buckets import Piece, Specs, aligned
from miles.sync._checksum import checksums, wrap
from miles.sync._plan import layout

__all__ = ["Inbox"]


class Inbox:
    """Takes the buckets of one version in order, and hands out its tensors when all are right.

    Args:
        specs: what the target expects.
        buffer: uint8, of at least `Inbox.size(specs)` bytes.
        bucket_bytes: the sender's.
    """

    def __init__(self, specs: Specs, buffer: Tensor, bucket_bytes: int) -> None:
        self._specs, self._buffer, self._bucket_bytes = specs, buffer, bucket_bytes
        self._sizes = {n: dtype.itemsize * shape_numel(s) for n, (s, dtype) in specs.items()}
        self._offsets: dict[str, int] = {}
        self._arrived: dict[str, int] = {}
        self._sums: list[tuple[list[Piece], Tensor]] = []
        self._buckets: dict[str, list[int]] = {}
        self._next = 0

    @staticmethod
    def size(specs: Specs) -> int:
        """Bytes that a version takes."""
        return layout(specs)[1]

    def place(self, index: int, nbytes: int, pieces: Sequence[Piece]) -> Tensor:
        """The memory that this bucket is to be received into.

        Raises:
            SyncError: it is not the next one, or what it holds isn't.
        """
        here = f"bucket {index}"
        if index != self._next:
            what = "was dropped" if index > self._next else "came again, or out of order"
            number = self._next if index > self._next else index
            raise SyncError(f"bucket {number} {what}: expected {self._next}, got {index}")
        start, end = index * self._bucket_bytes, 0
        for piece in pieces:
            if piece.name not in self._sizes:
                raise SyncError(f"{here} holds {piece.name}, which the engine does not have")
            size, had = self._sizes[piece.name], self._arrived.get(piece.name, 0)
            place = start + piece.offset - piece.start
            again = piece.name in self._arrived and (
                had == size or self._offsets[piece.name] != place
            )
            if piece.offset != end or piece.start != had or had + piece.nbytes > size or again:
                raise SyncError(
                    f"{here} holds bytes {piece.start} to {piece.start + piece.nbytes} of "
                    f"{piece.name} at {piece.offset}; expected byte {had} of {size} next, at {end}"
                )
            end += aligned(piece.nbytes)
            self._offsets.setdefault(piece.name, place)
            self._arrived[piece.name] = had + piece.nbytes
            self._buckets.setdefault(piece.name, []).append(index)
        if end != nbytes or end > self._bucket_bytes or start + end > self._buffer.numel():
            raise SyncError(f"{here} has {nbytes} bytes; its tensors take {end}")
        self._next += 1
        return self._buffer[start : start + end]

    def arrived(self, data: Tensor, pieces: Sequence[Piece]) -> None:
        """Sum up a bucket that is in; on a GPU without waiting for it."""
        self._sums.append((list(pieces), checksums(data, pieces)))

    def check(self, expected: Mapping[str, int]) -> dict[str, Tensor]:
        """All tensors, in the target's order; waits for the device.

        Args:
            expected: the sender's checksums.

        Raises:
            SyncError: a tensor is incomplete, or its bytes are others than were sent.
        """
        missing = [n for n, size in self._sizes.items() if self._arrived.get(n, -1) != size]
        if missing or expected.keys() != self._sizes.keys():
            missing = missing or sorted(expected.keys() ^ self._sizes.keys())
            raise SyncError(f"tensors {missing[:8]} did not arrive whole; push them again")
        found = total(self._sums)
        wrong = [name for name in self._sizes if found[name] != expected[name]]
        if wrong:
            raise SyncError(
                f"{wrong[0]} (bucket {', '.join(map(str, self._buckets[wrong[0]]))}) arrived with "
                f"another checksum, as did {len(wrong) - 1} more tensors; push again"
            )
        return {name: self._view(name) for name in self._specs}

    def _view(self, name: str) -> Tensor:
        shape, dtype = self._specs[name]
        start = self._offsets[name]
        return self._buffer[start : start + self._sizes[name]].view(dtype).view(shape)


def total(sums: Sequence[tuple[Sequence[Piece], Tensor]]) -> dict[str, int]:
    """Checksums of tensors from those of their pieces; one copy from the device."""
    totals: dict[str, int] = {}
    names = [piece.name for pieces, _ in sums for piece in pieces]
    values = torch.cat([part for _, part in sums]).tolist() if sums else []
    for name, value in zip(names, values, strict=True):
        totals[name] = wrap(totals.get(name, 0) + value)
    return totals


def shape_numel(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of that shape."""
    return torch.Size(shape).numel()
