"""Weights in buckets of bounded size through shared memory: the trainer's side.

Where the receiver offers its staging memory (direct), a bucket is written to its place there and
copied by nobody else. Elsewhere the sender has a slab of two halves: a bucket is written into one
while the receiver copies the other, and a half is used again once the receiver has acknowledged it.

No work is ever queued on a device behind another process's: a header goes out when its bucket has
been written, an acknowledgement when it has been read. A process that is killed leaves nobody
waiting on the device.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.protocols import SyncReport
from miles.sync import _copies
from miles.sync._bucket_plan import Layout, Piece, pack, runs
from miles.sync._buckets import check_bucket_bytes, whole
from miles.sync._checksum import BLOCK, block_sums
from miles.sync._memory import Memory
from miles.sync._plan import at_once, check_version, pair
from miles.sync._progress import bar
from miles.sync._session import Sender, Session, answer, hang_up, send, specs_of
from miles.sync._sources import Collection

__all__ = ["BucketSender", "slot_bytes"]

HALVES = 2
_QUEUED = 4
"""Buckets that may be under way before the first of them is waited for."""
Weights = Iterable[tuple[str, Tensor]]


def slot_bytes(bucket_bytes: int) -> int:
    """A bucket and the sums of its blocks."""
    return bucket_bytes + -(-bucket_bytes // BLOCK * 8 // BLOCK) * BLOCK


class BucketSender(Sender):
    """See `miles.sync.cuda_ipc.CudaIpcSyncer`, which is one on a GPU."""

    def __init__(
        self,
        address: Any,
        *,
        memory: Memory,
        bucket_bytes: int = 1 << 28,
        timeout: float = 120.0,
        progress: bool = False,
    ) -> None:
        check_bucket_bytes(bucket_bytes)
        super().__init__(address, timeout=timeout)
        self._memory, self._bucket_bytes, self._progress = memory, bucket_bytes, progress

    def push(self, weights: Weights, *, version: int) -> SyncReport:
        """See `Sender.push`."""
        with self._memory.scope(), torch.no_grad():
            return super().push(weights, version=version)

    def _open(self, connection: socket.socket, hello: dict[str, Any], fds: list[int]) -> Session:
        return _BucketSession(connection, hello, self._memory, self._bucket_bytes, self._progress)


class _BucketSession:
    """One connection, and the slab or the receiver's staging memory."""

    def __init__(
        self,
        connection: socket.socket,
        hello: dict[str, Any],
        memory: Memory,
        bucket_bytes: int,
        progress: bool,
    ) -> None:
        if hello.get("carrier") != memory.carrier:
            raise SyncError(
                f"the receiver's carrier is {hello.get('carrier', 'shared memory')}; expected "
                f"{memory.carrier}: use the syncer and the receiver of one carrier"
            )
        self._socket, self._memory, self._bucket_bytes = connection, memory, bucket_bytes
        self._progress = progress
        self._version: int = hello["version"]
        self._layout = Layout(specs_of(hello))
        self._num_bytes = sum(self._layout.sizes)
        self._staging: dict[int, Tensor] = {}
        self._slab: Tensor | None = None
        self._collection = Collection(self._layout, bucket_bytes, memory.check)
        setup: dict[str, Any] = {"bucket_bytes": bucket_bytes}
        if hello["direct"]:
            send(connection, setup)
        else:
            region = memory.allocate(HALVES * slot_bytes(bucket_bytes))
            self._slab = region.bytes
            send(connection, setup | {"slab": region.shared}, region.fds)
            region.close()

    def push(self, weights: Weights, version: int, start: float) -> SyncReport:
        if not check_version(version, self._version) or not self._begin(version):
            return SyncReport(
                version=version,
                num_tensors=0,
                num_bytes=0,
                copied_bytes=0,
                seconds=time.perf_counter() - start,
            )
        with bar(self._progress, self._num_bytes, version) as moved:
            buckets = _Buckets(self, version, moved)
            if at_once(weights):
                self._write_all(weights, buckets)
            else:
                self._write_one_by_one(weights, buckets)
            buckets.close()
        packed = time.perf_counter()
        send(self._socket, {"commit": version, "buckets": buckets.number})
        reply = self._reply(version)
        phases = {"gather": packed - start - buckets.waited, **reply["seconds"]}
        seconds = time.perf_counter() - start
        phases["send"] = seconds - sum(phases.values())
        phases["pause"] = phases["commit"]  # the engine stops for nothing else
        self._version = version
        return SyncReport(
            version=version,
            num_tensors=len(self._layout.names),
            num_bytes=self._num_bytes,
            copied_bytes=self._num_bytes * (1 if self._slab is None else 2),
            seconds=seconds,
            num_buckets=buckets.number,
            phases=phases,
        )

    def close(self) -> None:
        hang_up(self._socket)
        self._staging.clear()
        self._slab = None

    def destination(self, number: int) -> tuple[Tensor, Tensor]:
        """Where bucket `number` is written, and the sums of its blocks."""
        if self._slab is None:
            memory, nbytes = self._staging[self._buffer], self._layout.nbytes
            return memory[:nbytes], memory[nbytes:].view(torch.int64)
        size = slot_bytes(self._bucket_bytes)
        slot = self._slab[number % HALVES * size :][:size]
        return slot[: self._bucket_bytes], slot[self._bucket_bytes :].view(torch.int64)

    def _write_all(self, weights: Weights, buckets: _Buckets) -> None:
        """Tensors that are all there, bucket by bucket."""
        shares, sources = self._collection.cut(weights)
        for share in shares:
            out, sums = buckets.next()
            pieces = share.in_place if self._slab is None else share.in_slab
            taken = sources.of(share, out.device)
            _copies.copy(taken, share.dtypes, pieces, out, sums, version=buckets.version)
            buckets.written(share.packed)
            buckets.moved(sum(nbytes for _, _, nbytes in share.pieces))

    def _write_one_by_one(self, weights: Weights, buckets: _Buckets) -> None:
        """Tensors that may be gone when the next is asked for."""
        stream = _Stream(self, buckets)
        for name, shard in pair(weights, self._layout.specs):
            tensor = whole(shard, self._layout.specs[name][1])
            self._memory.check(name, tensor)
            stream.add(self._layout.number[name], tensor)
            buckets.moved(self._layout.sizes[self._layout.number[name]])
        stream.flush()

    def _begin(self, version: int) -> bool:
        """Whether the engine wants it."""
        send(self._socket, {"begin": version})
        reply, fds = answer(self._socket)
        if "error" in reply:
            raise SyncError(reply["error"])
        if "served" in reply:
            self._version = version
            return False
        self._buffer: int = reply["buffer"]
        if "staging" in reply:
            self._staging[self._buffer] = self._memory.attach(reply["staging"], fds)
        return True

    def _reply(self, version: int) -> dict[str, Any]:
        reply, _ = answer(self._socket)
        if "error" in reply:
            raise SyncError(
                f"version {version} was not taken, {reply['serves']} is still served: "
                f"{reply['error']}"
            )
        return reply


class _Buckets:
    """The buckets of a version: where each is written, and when the receiver hears of it."""

    def __init__(
        self, session: _BucketSession, version: int, moved: Callable[[int], object]
    ) -> None:
        self._session, self.version, self.moved = session, version, moved
        self._direct = session._slab is None
        self._queued: deque[tuple[dict[str, Any], Callable[[], None]]] = deque()
        self._taken = 0
        self.number = 0
        self.waited = 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        """Where to write the next one, and its sums; waits until that is free."""
        if not self._direct and self.number >= HALVES:
            self._wait_for(self.number - HALVES)
        return self._session.destination(self.number)

    def written(self, packed: list[list[int]]) -> None:
        """Its copies and sums are queued."""
        header = {"bucket": self.number, "pieces": packed}
        self._queued.append((header, self._session._memory.fence()))
        self.number += 1
        while len(self._queued) > (_QUEUED if self._direct else 1):
            self._announce()

    def close(self) -> None:
        """Announce what is left."""
        while self._queued:
            self._announce()
        for number in range(self._taken, self.number if not self._direct else 0):
            self._wait_for(number)

    def _announce(self) -> None:
        header, fence = self._queued.popleft()
        fence()
        send(self._session._socket, header)

    def _wait_for(self, number: int) -> None:
        start = time.perf_counter()
        reply, _ = answer(self._session._socket)
        if reply.get("taken") != number:
            raise SyncError(f"the receiver answered {reply}; expected bucket {number} to be taken")
        self._taken += 1
        self.waited += time.perf_counter() - start


class _Stream:
    """Fills buckets with tensors as they come."""

    def __init__(self, session: _BucketSession, buckets: _Buckets) -> None:
        self._layout, self._direct = session._layout, session._slab is None
        self._limit, self._buckets = session._bucket_bytes, buckets
        self._pieces: list[Piece] = []
        self._used = 0
        self._there: tuple[Tensor, Tensor] | None = None

    def add(self, number: int, tensor: Tensor) -> None:
        """Copy a tensor, over as many buckets as it takes."""
        shape, dtype = self._layout.specs[self._layout.names[number]]
        nbytes = self._layout.sizes[number]
        flat = tensor
        if tensor.dtype == dtype and tensor.is_contiguous():
            flat = _words(tensor)
            dtype = flat.dtype  # moved and not cast, and cut anywhere
        for start, count in self._cut(nbytes):
            if self._there is None:
                self._there = self._buckets.next()
            at = self._layout.offsets[number] + start if self._direct else self._used
            window, source = self._there[0][at : at + count].view(dtype), flat
            if count < nbytes:
                first = start // dtype.itemsize
                source = flat.reshape(-1)[first : first + count // dtype.itemsize]
            elif flat is tensor:
                window = window.view(shape)
            window.copy_(source, non_blocking=True)
            self._pieces.append((number, start, count))
            self._used += -(-count // BLOCK) * BLOCK

    def flush(self) -> None:
        """End this bucket."""
        if self._there is None:
            return
        out, sums = self._there
        placed = runs(self._pieces, self._layout) if self._direct else [(0, self._used)]
        for first, end in placed:
            if end > first:
                part = block_sums(out[first:end], version=self._buckets.version)
                sums[first // BLOCK : end // BLOCK] = part
        self._buckets.written(pack(self._pieces, self._layout.sizes))
        self._pieces, self._used, self._there = [], 0, None

    def _cut(self, nbytes: int) -> Iterator[tuple[int, int]]:
        start = 0
        while True:
            if self._used == self._limit:
                self.flush()
            count = min(nbytes - start, self._limit - self._used)
            yield start, count
            start += count
            if start >= nbytes:
                return


def _words(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the widest words: some dtypes cannot be copied, or slowly."""
    whole_words = tensor.nbytes % 8 == 0 and tensor.data_ptr() % 8 == 0
    aligned = tensor.storage_offset() * tensor.itemsize % 8 == 0
    return tensor.view(-1).view(torch.int64 if whole_words and aligned else torch.uint8)
