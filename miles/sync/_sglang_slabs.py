"""GPU memory that SGLang servers read buckets from, and the buckets in it.

Three slabs take turns, over buckets and pushes: while servers load two buckets, the next is filled.
They come from the driver, not from torch's allocator, and are exported once: nothing of torch's
reference counts is involved (each export of a torch storage wraps it in a further counter and
event, which would add up on memory that stays), and `expandable_segments` and memory savers do no
harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync import _copies, _cuda_driver
from miles.sync._checksum import BLOCK
from miles.sync._copies import Pieces
from miles.sync._sglang_payload import Block, FlatBucket, Shared, described, extent, groups
from miles.sync._trainers import Trainers

__all__ = ["DEPTH", "CudaMemory", "Memory", "Slabs"]

DEPTH = 2
"""Buckets that may be with the servers at a time. 1 was slower (docs/sync.md)."""
PAGE = 1 << 21
"""A GPU's large page, in bytes. An allocation of no whole number of them has small ones, which
takes a server longer to open and close (`pytest -s tests/gpu/test_sglang_slabs.py`)."""


class Memory(Protocol):
    """Where slabs lie."""

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise for a tensor that cannot be copied there."""
        ...

    def allocate(self, device: torch.device, nbytes: int) -> Shared:
        """Memory on a device; freed when it is let go of."""
        ...

    def allocation(self, tensor: Tensor) -> tuple[int, int]:
        """Address and bytes of the allocation that a tensor lies in."""
        ...

    def block(self, device: torch.device, address: int, nbytes: int) -> Block | None:
        """An allocation, for servers to open; None if they can't."""
        ...


class CudaMemory:
    """The CUDA driver's."""

    def check(self, name: str, tensor: Tensor) -> None:
        """See `Memory.check`."""
        if tensor.device.type != "cuda":
            raise SyncError(
                f"{name} is on {tensor.device}; expected a CUDA tensor on the server's GPU: move "
                'it there, or use via="value"'
            )

    def allocate(self, device: torch.device, nbytes: int) -> Shared:
        """See `Memory.allocate`."""
        memory = _cuda_driver.allocate(device.index, -(-nbytes // PAGE) * PAGE)
        return Shared(memory, self._block(device, memory.data_ptr(), memory.numel()))

    def allocation(self, tensor: Tensor) -> tuple[int, int]:
        """See `Memory.allocation`."""
        return _cuda_driver.allocation(tensor.get_device(), tensor.data_ptr())

    def block(self, device: torch.device, address: int, nbytes: int) -> Block | None:
        """See `Memory.block`."""
        try:
            return self._block(device, address, nbytes)
        except SyncError:  # `expandable_segments`, or a memory saver
            return None

    def _block(self, device: torch.device, address: int, nbytes: int) -> Block:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return Block(address, nbytes, _cuda_driver.export(device.index, address), uuid)


class Slabs:
    """Fills buckets, each weight whole in one of them, at a multiple of 4096 bytes.

    Args:
        bucket_bytes: most bytes of a bucket, save where one weight has more: its slab grows.
        memory: where they lie.
        trainers: ranks that fill slabs at the same time.
    """

    def __init__(
        self, bucket_bytes: int, memory: Memory | None = None, trainers: Trainers | None = None
    ) -> None:
        self._bucket_bytes = bucket_bytes
        self._memory = memory or CudaMemory()
        self._trainers = trainers or Trainers(None)
        self._slabs: list[Shared | None] = [None] * (DEPTH + 1)
        self._turn = 0

    def clear(self) -> None:
        """Let go of the memory."""
        self._slabs = [None] * len(self._slabs)

    def buckets(
        self, weights: Iterable[tuple[str, Tensor]], *, together: bool
    ) -> Iterator[FlatBucket]:
        """Copy weights into one slab after the other.

        A bucket is overwritten when `DEPTH` + 1 further ones are asked for.

        Args:
            weights: (name, tensor) pairs; sharded ones are gathered.
            together: they stay as they are until the end, so that a bucket is copied by one launch.

        Raises:
            SyncError: a name came twice; a tensor is not on a GPU; no memory is left.
        """
        filling: _Filling | None = None
        for group in groups(weights):
            for name, tensor in group:
                self._memory.check(name, tensor)
            room = extent(group, BLOCK)
            if filling is not None and filling.used + room > self._bucket_bytes:
                yield filling.finished()
                filling = None
            if filling is None:
                filling = _Filling(self._next(group[0][1].device, room))
            for name, tensor in group:
                filling.add(name, tensor)
            if not together:
                filling.write()
        if filling is not None:
            yield filling.finished()

    def _next(self, device: torch.device, nbytes: int) -> Shared:
        """The slab whose turn it is, with so much room."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._slabs)
        size = -(-max(self._bucket_bytes, nbytes) // BLOCK) * BLOCK
        slab = self._slabs[turn]
        if slab is None or slab.memory.device != device or slab.memory.numel() < size:
            self._slabs[turn] = None  # freed before there is another
            del slab

            def make() -> None:
                self._slabs[turn] = self._memory.allocate(device, size)

            self._trainers.agree(make)  # before the others wait for this rank's next shard
            slab = self._slabs[turn]
            assert slab is not None
        return slab


class _Filling:
    """A bucket that is being filled."""

    def __init__(self, slab: Shared) -> None:
        self._slab = slab
        memory = slab.memory
        # The kernel sums up what it copies, which nobody asks for here.
        self._sums = torch.empty(memory.numel() // BLOCK, dtype=torch.int64, device=memory.device)
        self._sources: list[Tensor] = []
        self._blocks: list[int] = []
        self._bucket = FlatBucket(memory, shared=slab)
        self.used = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Give a weight its place."""
        self._bucket.metadata.append(described(name, tensor, self.used))
        self._sources.append(tensor.to(self._slab.memory.device).contiguous())
        self._blocks.append(self.used // BLOCK)
        self.used += -(-tensor.nbytes // BLOCK) * BLOCK

    def write(self) -> None:
        """Queue the copies of what has been added."""
        sources, memory = self._sources, self._slab.memory
        nbytes_N = np.array([source.nbytes for source in sources], dtype=np.int64)
        pieces = Pieces(np.zeros_like(nbytes_N), nbytes_N, np.array(self._blocks, dtype=np.int64))
        dtypes = [source.dtype for source in sources]
        _copies.copy(sources, dtypes, pieces, memory, self._sums, version=0)
        self._sources, self._blocks = [], []

    def finished(self) -> FlatBucket:
        """The bucket, written."""
        self.write()
        memory = self._slab.memory
        self._bucket.flat = memory[: self.used]
        if memory.is_cuda:
            torch.cuda.current_stream(memory.device).synchronize()
        return self._bucket
