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
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport
from miles.sync._block_sums import BLOCK, block_sums
from miles.sync._buckets import whole
from miles.sync._memory import Memory
from miles.sync._plan import check_version, layout, pair
from miles.sync._session import Sender, Session, answer, send, specs_of

__all__ = ["BucketSender", "slot_bytes"]

HALVES = 2
SMALL = 1 << 20
"""Tensors of fewer bytes are copied together, where they may wait for each other."""
Piece = tuple[str, int, int]
"""A tensor's name, the first of its bytes, and how many."""


def slot_bytes(bucket_bytes: int) -> int:
    """A bucket and the sums of its blocks."""
    return bucket_bytes + -(-bucket_bytes // BLOCK * 8 // BLOCK) * BLOCK


class BucketSender(Sender):
    """See `miles.sync.cuda_ipc.CudaIpcSyncer`, which is one on a GPU."""

    def __init__(
        self, address: Any, *, memory: Memory, bucket_bytes: int = 1 << 28, timeout: float = 120.0
    ) -> None:
        if bucket_bytes < BLOCK or bucket_bytes % BLOCK:
            raise SettingError(f"bucket_bytes is {bucket_bytes}; expected a multiple of {BLOCK}")
        super().__init__(address, timeout=timeout)
        self._memory, self._bucket_bytes = memory, bucket_bytes

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `Sender.push`."""
        try:
            with self._memory.scope():
                return super().push(weights, version=version)
        except BaseException:
            self.close()  # what was half sent is forgotten on both sides
            raise

    def _open(self, connection: socket.socket, hello: dict[str, Any], fds: list[int]) -> Session:
        return _BucketSession(connection, hello, self._memory, self._bucket_bytes)


class _BucketSession:
    """One connection, and the slab or the receiver's staging memory."""

    def __init__(
        self, connection: socket.socket, hello: dict[str, Any], memory: Memory, bucket_bytes: int
    ) -> None:
        if hello.get("carrier") != memory.carrier:
            raise SyncError(
                f"the receiver's carrier is {hello.get('carrier', 'shared memory')}; expected "
                f"{memory.carrier}: use the syncer and the receiver of one carrier"
            )
        self._socket, self._memory, self._bucket_bytes = connection, memory, bucket_bytes
        self._version: int = hello["version"]
        self._specs = specs_of(hello)
        self._offsets, self._nbytes = layout(self._specs, alignment=BLOCK)
        self._sizes = {
            n: dtype.itemsize * torch.Size(s).numel() for n, (s, dtype) in self._specs.items()
        }
        self._staging: dict[int, Tensor] = {}
        # Making a view takes longer than copying a small tensor; most are wanted again.
        self._windows: dict[tuple[int | None, int, int, torch.dtype], Tensor] = {}
        self._slab: Tensor | None = None
        setup: dict[str, Any] = {"bucket_bytes": bucket_bytes}
        if hello["direct"]:
            send(connection, setup)
        else:
            region = memory.allocate(HALVES * slot_bytes(bucket_bytes))
            self._slab = region.bytes
            send(connection, setup | {"slab": region.shared}, region.fds)
            region.close()

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int, start: float) -> SyncReport:
        moved = copies = buckets = 0
        phases: dict[str, float] = {}
        if check_version(version, self._version) and self._begin(version):
            bucket, later = _Bucket(self, version), isinstance(weights, Collection)
            for name, shard in pair(weights, self._specs):
                tensor = whole(shard, self._specs[name][1])
                self._memory.check(name, tensor)
                bucket.add(name, tensor, later=later)
                moved += self._sizes[name]
            bucket.close()
            buckets = bucket.number
            copies = moved * (1 if self._slab is None else 2)
            packed = time.perf_counter()
            send(self._socket, {"commit": version, "buckets": buckets})
            reply = self._reply(version)
            phases = {"gather": packed - start - bucket.waited, **reply["seconds"]}
            total = time.perf_counter() - start
            phases["send"] = total - sum(phases.values())
            phases["pause"] = phases["commit"]  # the engine stops for nothing else
            self._version = version
        return SyncReport(
            version=version,
            num_tensors=len(self._specs) if phases else 0,
            num_bytes=moved,
            copied_bytes=copies,
            seconds=time.perf_counter() - start,
            num_buckets=buckets,
            phases=phases,
        )

    def window(self, buffer: int | None, at: int, count: int, dtype: torch.dtype) -> Tensor:
        """Bytes of the slab (None) or of a staging buffer as one dimension of `dtype`."""
        key = buffer, at, count, dtype
        found = self._windows.get(key)
        if found is None:
            memory = self._slab if buffer is None else self._staging[buffer]
            assert memory is not None
            found = self._windows[key] = memory[at : at + count].view(dtype)
        return found

    def close(self) -> None:
        self._socket.close()
        self._windows.clear()
        self._staging.clear()
        self._slab = None

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
                f"version {version} was not taken, {self._version} is still served: "
                f"{reply['error']}"
            )
        return reply


class _Bucket:
    """The bucket that is being filled; of those before, at most one has still to be announced."""

    def __init__(self, session: _BucketSession, version: int) -> None:
        self._session, self._version = session, version
        self._pieces: list[Piece] = []
        self._later: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        self._used = 0
        self._written: tuple[dict[str, Any], Callable[[], None]] | None = None
        self._taken = 0
        self.number = 0
        self.waited = 0.0

    def add(self, name: str, tensor: Tensor, *, later: bool) -> None:
        """Copy a tensor, over as many buckets as it takes; small ones perhaps at the end."""
        session = self._session
        shape, dtype = session._specs[name]
        nbytes = session._sizes[name]
        if tensor.dtype == dtype and tensor.is_contiguous():
            flat = _words(tensor)
            dtype = flat.dtype  # moved and not cast, and cut anywhere
        else:
            flat = tensor
        for piece in self._cut(name, nbytes):
            _, start, count = piece
            window, source = self._window(piece, dtype), flat
            if count < nbytes:
                first = start // dtype.itemsize
                source = flat.reshape(-1)[first : first + count // dtype.itemsize]
            elif flat is tensor:
                window = window.view(shape)
            if later and count < SMALL:
                windows, sources = self._later.setdefault((dtype, source.dtype), ([], []))
                windows.append(window)
                sources.append(source)
            else:
                window.copy_(source, non_blocking=True)
            self._pieces.append(piece)
            self._used += -(-count // BLOCK) * BLOCK

    def close(self) -> None:
        """Announce what is left."""
        if self._pieces:
            self._flush()
        self._announce()
        if self._session._slab is not None:
            for number in range(self._taken, self.number):
                self._wait_for(number)

    def _cut(self, name: str, nbytes: int) -> Iterator[Piece]:
        limit = self._session._bucket_bytes
        start = 0
        while True:
            if self._used == limit:
                self._flush()
            count = min(nbytes - start, limit - self._used)
            yield name, start, count
            start += count
            if start >= nbytes:
                return

    def _window(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        session, (name, start, count) = self._session, piece
        if session._slab is None:
            return session.window(session._buffer, session._offsets[name] + start, count, dtype)
        if not self._pieces and self.number >= HALVES:
            self._wait_for(self.number - HALVES)
        return session.window(None, self._slot + self._used, count, dtype)

    @property
    def _slot(self) -> int:
        return self.number % HALVES * slot_bytes(self._session._bucket_bytes)

    def _flush(self) -> None:
        """End this bucket: its copies and sums are queued, then the one before is announced."""
        session = self._session
        for windows, sources in self._later.values():
            torch._foreach_copy_(windows, sources, non_blocking=True)
        self._later = {}
        if session._slab is None:
            memory, at = session._staging[session._buffer], session._nbytes
            sums = memory[at:].view(torch.int64)
            for first, end in runs(self._pieces, session._offsets):
                part = block_sums(memory[first:end], version=self._version)
                sums[first // BLOCK : end // BLOCK] = part
        else:
            slot = session._slab[self._slot :]
            part = block_sums(slot[: self._used], version=self._version)
            at = session._bucket_bytes
            slot[at : at + part.nbytes].view(torch.int64).copy_(part)
        header = {"bucket": self.number, "pieces": self._pieces}
        fence = session._memory.fence()
        self._announce()
        self._written = header, fence
        self._pieces, self._used = [], 0
        self.number += 1

    def _announce(self) -> None:
        if self._written is not None:
            header, fence = self._written
            fence()
            send(self._session._socket, header)
            self._written = None

    def _wait_for(self, number: int) -> None:
        start = time.perf_counter()
        reply, _ = answer(self._session._socket)
        if reply.get("taken") != number:
            raise SyncError(f"the receiver answered {reply}; expected bucket {number} to be taken")
        self._taken += 1
        self.waited += time.perf_counter() - start


def _words(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the widest words: some dtypes cannot be copied, or slowly."""
    whole_words = tensor.nbytes % 8 == 0 and tensor.data_ptr() % 8 == 0
    aligned = tensor.storage_offset() * tensor.itemsize % 8 == 0
    return tensor.view(-1).view(torch.int64 if whole_words and aligned else torch.uint8)


def runs(pieces: Iterable[Piece], offsets: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Where pieces lie in the layout, in whole blocks; neighbours together."""
    first = end = -1
    for name, start, count in pieces:
        at = offsets[name] + start
        after = at + -(-count // BLOCK) * BLOCK
        if at != end:
            if end > first:
                yield first, end
            first = at
        end = after
    if end > first:
        yield first, end
