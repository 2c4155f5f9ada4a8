"""Where tensors lie in a version, and which of their bytes travel in which bucket.

Both sides know the engine's tensors by their numbers, in the engine's order. In the layout each
begins with a block of 4096 bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._checksum import BLOCK
from miles.sync._copies import Pieces
from miles.sync._session import Specs

__all__ = ["Layout", "Piece", "Share", "pack", "runs", "shares", "unpack"]

Piece = tuple[int, int, int]
"""A tensor's number, the first of its bytes, and how many."""


class Layout:
    """A version in one buffer.

    Args:
        specs: the engine's shapes and dtypes, in its order.
    """

    def __init__(self, specs: Specs) -> None:
        self.specs, self.names = specs, list(specs)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.sizes = [d.itemsize * torch.Size(s).numel() for s, d in specs.values()]
        ends = [0, *itertools.accumulate(_whole(size) for size in self.sizes)]
        self.offsets, self.nbytes = ends[:-1], ends[-1]
        self.dtypes = [dtype for _, dtype in specs.values()]

    def views(self, data: Tensor) -> dict[str, Tensor]:
        """All tensors, in this buffer."""
        places = zip(self.specs.items(), self.offsets, self.sizes, strict=True)
        return {
            name: data[first : first + size].view(dtype).view(shape)
            for (name, (shape, dtype)), first, size in places
        }


@dataclass(frozen=True)
class Share:
    """What of a collection of tensors travels in one bucket."""

    first: int
    """Of its pieces, which tensor of the collection the first is of; the others follow."""
    pieces: list[Piece]
    packed: list[list[int]]
    in_place: Pieces
    """Where they go in the layout."""
    in_slab: Pieces
    """Where they go one after the other."""
    dtypes: list[torch.dtype]


def shares(order: Sequence[int], where: Layout, bucket_bytes: int) -> list[Share]:
    """Buckets of at most so many bytes.

    Args:
        order: numbers of the tensors, as they come.
        where: the layout.
        bucket_bytes: a multiple of 4096.
    """
    found: list[Share] = []
    pieces: list[Piece] = []
    first = used = 0
    for at, number in enumerate(order):
        size, start = where.sizes[number], 0
        while True:
            if used == bucket_bytes:
                found.append(_share(first, pieces, where))
                pieces, first, used = [], at, 0
            count = min(size - start, bucket_bytes - used)
            pieces.append((number, start, count))
            used += _whole(count)
            start += count
            if start >= size:
                break
    return [*found, _share(first, pieces, where)] if pieces else found


def _share(first: int, pieces: list[Piece], where: Layout) -> Share:
    number_N, start_N, nbytes_N = np.array(pieces, dtype=np.int64).T
    in_place_N = (np.array(where.offsets, dtype=np.int64)[number_N] + start_N) // BLOCK
    ends_N = np.cumsum(-(-nbytes_N // BLOCK))
    return Share(
        first=first,
        pieces=pieces,
        packed=pack(pieces, where.sizes),
        in_place=Pieces(start_N, nbytes_N, in_place_N),
        in_slab=Pieces(start_N, nbytes_N, np.concatenate([[0], ends_N[:-1]])),
        dtypes=[where.dtypes[number] for number, _, _ in pieces],
    )


def pack(pieces: Iterable[Piece], sizes: Sequence[int]) -> list[list[int]]:
    """Runs of tensors that follow each other: number and start of the first, how many, last end."""
    packed: list[list[int]] = []
    for number, start, count in pieces:
        if packed:
            first, _, num, end = packed[-1]
            if number == first + num and start == 0 and end == sizes[number - 1]:
                packed[-1][2:] = [num + 1, start + count]
                continue
        packed.append([number, start, 1, start + count])
    return packed


def unpack(packed: Iterable[Sequence[int]], where: Layout) -> Iterator[Piece]:
    """The pieces, or a SyncError."""
    for first, start, num, end in packed:
        if not 0 <= first < first + num <= len(where.names):
            raise SyncError(
                f"tensors {first} to {first + num - 1} are announced; the engine has no such "
                f"tensor: it has {len(where.names)}"
            )
        for number in range(first, first + num):
            begin = start if number == first else 0
            yield number, begin, (end if number == first + num - 1 else where.sizes[number]) - begin


def runs(pieces: Iterable[Piece], where: Layout) -> Iterator[tuple[int, int]]:
    """Where pieces lie in the layout, in whole blocks; neighbours together."""
    first = end = -1
    for number, start, count in pieces:
        at = where.offsets[number] + start
        if at != end:
            if end > first:
                yield first, end
            first = at
        end = at + _whole(count)
    if end > first:
        yield first, end


def _whole(nbytes: int) -> int:
    """Up to the next multiple of 4096."""
    return -(-nbytes // BLOCK) * BLOCK
