"""Where buckets arrive: one buffer for a whole version, apart from what is being served."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._bucket_plan import Layout, unpack
from miles.sync._checksum import BLOCK, block_sums

__all__ = ["Inbox"]


class Inbox:
    """Takes the buckets of one version in order, and hands out its tensors when all are right.

    Bucket k comes to lie at byte k * `bucket_bytes`, so that a tensor that was cut is whole there.

    Args:
        where: the engine's tensors.
        buffer: uint8, of `where.nbytes`.
        bucket_bytes: the sender's.
        version: what is sent.
    """

    def __init__(self, where: Layout, buffer: Tensor, bucket_bytes: int, version: int) -> None:
        self._where, self._buffer = where, buffer
        self._bucket_bytes, self._version = bucket_bytes, version
        self._sums = torch.empty(where.nbytes // BLOCK, dtype=torch.int64, device=buffer.device)
        self._covered: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        self._placed: dict[int, list[int]] = {}
        self._views: dict[int, Tensor] = {}
        self._next = 0

    def place(self, index: int, nbytes: int, packed: Sequence[Sequence[int]]) -> Tensor:
        """The memory that this bucket is to be received into.

        Raises:
            SyncError: it is not the next one, or what it holds isn't.
        """
        if index != self._next:
            what = "was dropped" if index > self._next else "came again, or out of order"
            number = self._next if index > self._next else index
            raise SyncError(f"bucket {number} {what}: expected {self._next}, got {index}")
        try:
            pieces = list(unpack(packed, self._where))
        except SyncError as error:
            raise SyncError(f"bucket {index}: {error}") from error
        start = end = index * self._bucket_bytes
        for number, first, count in pieces:
            had, size = self._covered.get(number, 0), self._where.sizes[number]
            again = number in self._covered and had == size
            if again or first != had or count < 0 or had + count > size:
                raise SyncError(
                    f"bucket {index} holds bytes {first} to {first + count} of "
                    f"{self._where.names[number]}; expected byte {had} of {size} next"
                )
            if self._offsets.setdefault(number, end) != end - first:
                raise SyncError(
                    f"bucket {index} holds {self._where.names[number]} apart from its first bytes"
                )
            self._covered[number] = had + count
            end += -(-count // BLOCK) * BLOCK
        if end - start != nbytes or nbytes > self._bucket_bytes or end > self._buffer.numel():
            raise SyncError(f"bucket {index} has {nbytes} bytes; its tensors take {end - start}")
        self._next += 1
        self._placed[index] = [number for number, _, _ in pieces]
        return self._buffer[start:end]

    def arrived(self, index: int, data: Tensor) -> None:
        """Sum up a bucket that is in; on a GPU without waiting for it."""
        first = index * self._bucket_bytes // BLOCK
        sums = block_sums(data, version=self._version)
        self._sums[first : first + sums.numel()] = sums
        # Made now, while later buckets are under way: that of many small tensors takes a while.
        for number in self._placed.pop(index):
            if self._covered[number] == self._where.sizes[number]:
                self._views[number] = self._view(number)

    def check(self, expected: Tensor) -> dict[str, Tensor]:
        """All tensors, by name in the layout's order; waits for the device.

        Args:
            expected: the sender's sums of all blocks, int64, in the order in which they were sent.

        Raises:
            SyncError: a tensor is incomplete, or its bytes are others than were sent.
        """
        where = self._where
        missing = [n for i, n in enumerate(where.names) if self._covered.get(i) != where.sizes[i]]
        if missing or expected.numel() != self._sums.numel():
            raise SyncError(f"tensors {missing[:8]} did not arrive whole; push them again")
        wrong = torch.nonzero(expected != self._sums).flatten()
        if wrong.numel():
            at = int(wrong[0]) * BLOCK
            # Tensors without bytes lie where the next one does.
            places = sorted((o, i) for i, o in self._offsets.items() if where.sizes[i])
            offset, number = places[bisect.bisect_right(places, (at, len(where.names))) - 1]
            raise SyncError(
                f"{where.names[number]} arrived with another checksum, in bucket "
                f"{at // self._bucket_bytes} at byte {at - offset} of the tensor; {wrong.numel()} "
                f"blocks of {BLOCK} bytes differ; push again"
            )
        return {name: self._views[number] for number, name in enumerate(where.names)}

    def _view(self, number: int) -> Tensor:
        shape, dtype = self._where.specs[self._where.names[number]]
        first = self._offsets[number]
        data = self._buffer[first : first + self._where.sizes[number]]
        return data.view(dtype).view(shape)
