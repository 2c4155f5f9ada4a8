"""Buckets of a version, filled one by one: the sender's side of a broadcast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.sync import _copies
from miles.sync._bucket_plan import Layout, Piece, pack
from miles.sync._checksum import BLOCK
from miles.sync._copies import Pieces
from miles.sync._plan import at_once
from miles.sync._session import Specs
from miles.sync._sources import Collection, made

__all__ = ["Bucket", "Outbox"]


@dataclass
class Bucket:
    """Bytes that travel together; on a GPU they may still be on their way there."""

    index: int
    data: Tensor
    """uint8, what is used of the buffer; gaps are zero."""
    packed: list[list[int]]
    """Which bytes; see `_bucket_plan.pack`."""
    first: str
    """Its first tensor."""
    last: str


class Outbox:
    """Two buffers that take turns, and the sums of all blocks.

    Tensors lie one after the other, each at a multiple of 4096 bytes. All buckets but the last are
    full. The copy into a bucket sums up its blocks; on a GPU that is one launch for a bucket of a
    collection, and one for each tensor of a stream.

    Args:
        specs: what the receivers expect; their order is the one in which tensors are numbered.
        bucket_bytes: a multiple of 4096.
        device: of the buckets.
    """

    def __init__(self, specs: Specs, bucket_bytes: int, device: torch.device) -> None:
        self.specs = specs
        self._where = Layout(specs)
        self._collection = Collection(self._where, bucket_bytes)
        self._bucket_bytes = bucket_bytes
        size = min(bucket_bytes, self._where.nbytes)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.sums = torch.zeros(self._where.nbytes // BLOCK, dtype=torch.int64, device=device)
        """int64, of the blocks in the order in which they are sent."""
        self.nbytes, self.num_bytes = self._where.nbytes, sum(self._where.sizes)

    def fill(
        self, weights: Iterable[tuple[str, Tensor]], version: int, free: Callable[[], None]
    ) -> Iterator[Bucket]:
        """The buckets of a version.

        Args:
            weights: a collection, or a stream of whole tensors of the right names and shapes.
            version: decides the sums.
            free: waits until all buckets but the last one have left their buffers.
        """
        if at_once(weights):
            return self._of_collection(weights, version, free)
        return self._of_stream(weights, version, free)

    def _of_collection(
        self, weights: Iterable[tuple[str, Tensor]], version: int, free: Callable[[], None]
    ) -> Iterator[Bucket]:
        shares, sources = self._collection.cut(weights)
        for index, share in enumerate(shares):
            free()
            out, sums = self._destination(index)
            taken = sources.of(share, out.device)
            _copies.copy(taken, share.dtypes, share.in_slab, out, sums, version=version)
            yield self._bucket(index, share.pieces, share.packed)

    def _of_stream(
        self, weights: Iterable[tuple[str, Tensor]], version: int, free: Callable[[], None]
    ) -> Iterator[Bucket]:
        index = used = 0
        pieces: list[Piece] = []
        for name, tensor in weights:
            number, dtype = self._where.number[name], self.specs[name][1]
            source = made(tensor, dtype, self.sums.device)
            size, start = self._where.sizes[number], 0
            while True:
                if used == self._bucket_bytes:
                    yield self._bucket(index, pieces, pack(pieces, self._where.sizes))
                    index, used, pieces = index + 1, 0, []
                if not pieces:
                    free()
                    out, sums = self._destination(index)
                count = min(size - start, self._bucket_bytes - used)
                place = Pieces(np.array([start]), np.array([count]), np.array([used // BLOCK]))
                _copies.copy([source], [dtype], place, out, sums, version=version)
                pieces.append((number, start, count))
                used, start = used + -(-count // BLOCK) * BLOCK, start + count
                if start >= size:
                    break
        if pieces:
            yield self._bucket(index, pieces, pack(pieces, self._where.sizes))

    def _destination(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self._bucket_bytes // BLOCK
        return self.buffers[index % 2], self.sums[first : first + self._bucket_bytes // BLOCK]

    def _bucket(self, index: int, pieces: list[Piece], packed: list[list[int]]) -> Bucket:
        used = sum(-(-count // BLOCK) for _, _, count in pieces) * BLOCK
        names = self._where.names
        return Bucket(
            index=index,
            data=self.buffers[index % 2][:used],
            packed=packed,
            first=names[pieces[0][0]],
            last=names[pieces[-1][0]],
        )
