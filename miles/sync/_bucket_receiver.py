"""Weights in buckets of bounded size through shared memory: the engine's side."""

from __future__ import annotations

import bisect
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.protocols import WeightTarget
from miles.sync._bucket_plan import Layout, runs, unpack
from miles.sync._bucket_sender import HALVES, slot_bytes
from miles.sync._checksum import BLOCK, block_sums
from miles.sync._memory import Memory, Region
from miles.sync._plan import check_commit, check_version, committing
from miles.sync._session import Listener, describe, receive, send, specs_of

__all__ = ["BucketReceiver"]


class BucketReceiver(Listener):
    """See `miles.sync.cuda_ipc.CudaIpcReceiver`, which is one on a GPU."""

    def __init__(
        self,
        target: WeightTarget,
        address: str | Path,
        *,
        memory: Memory,
        direct: bool = True,
        alias: bool = True,
    ) -> None:
        self._memory, self._direct, self._alias = memory, direct, alias
        # Aliased, one is served while the other is written.
        self._staging: list[Region | None] = [None] * (2 if alias else 1)
        self._idle: int | None = None  # the one of which nothing is served, if that is certain
        self._views: dict[int, dict[str, Tensor]] = {}
        super().__init__(target, address)

    def close(self) -> None:
        """Listen no more; what was committed stays."""
        super().close()
        for region in self._staging:
            if region is not None:
                region.close()

    def _serve_one(self, connection: socket.socket) -> None:
        with self._memory.scope():
            self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        hello = describe(self._target)
        where = Layout(specs_of(hello))
        send(connection, hello | {"carrier": self._memory.carrier, "direct": self._direct})
        setup, fds = receive(connection)
        if setup is None:
            return
        size = int(setup["bucket_bytes"])
        try:
            slab = None if self._direct else self._memory.attach(setup["slab"], fds)
            if slab is not None and slab.numel() < HALVES * slot_bytes(size):
                raise SyncError(f"the slab has {slab.numel()} bytes; expected {HALVES} buckets")
        except SyncError as error:  # the sender hears of it when it asks to begin
            if receive(connection)[0] is not None:
                send(connection, {"error": f"the receiver says: {error}"})
            return
        offered: set[int] = set()
        arriving = _Arriving(where, 0, -1, torch.empty(0, dtype=torch.uint8), None, size, {})
        while (message := receive(connection)[0]) is not None:
            if "bucket" in message:
                arriving.take(message["bucket"], message["pieces"])
                if slab is not None:
                    self._memory.fence()()
                    send(connection, {"taken": message["bucket"]})
                continue
            region: Region | None = None
            try:
                if "begin" in message:
                    version = int(message["begin"])
                    if check_version(version, self._target.weight_version):
                        number, region = self._free(where.nbytes)
                        views = self._views.setdefault(number, {})
                        memory = region.bytes
                        arriving = _Arriving(where, version, number, memory, slab, size, views)
                        reply: dict[str, Any] = {"buffer": number}
                        if not self._direct or number in offered:
                            region = None
                        else:
                            reply["staging"] = region.shared
                            offered.add(number)
                    else:
                        reply = {"served": version}
                else:
                    reply = self._commit(arriving, message["commit"], message["buckets"])
            except Exception as error:  # whatever it was, the sender has to hear of it
                kind = "" if isinstance(error, SyncError) else f"{type(error).__name__}: "
                reply = {"error": f"{kind}{error}", "serves": self._target.weight_version}
            send(connection, reply, [] if region is None else region.fds)

    def _free(self, nbytes: int) -> tuple[int, Region]:
        """A staging buffer of which nothing is served."""
        if self._idle is not None and (known := self._staging[self._idle]) is not None:
            return self._idle, known
        live = [tensor.data_ptr() for tensor in self._target.weight_tensors().values()]
        for number, region in enumerate(self._staging):
            if region is None:
                region = self._memory.allocate(nbytes + nbytes // BLOCK * 8)
                self._staging[number] = region
                return number, region
            first = region.bytes.data_ptr()
            if not any(first <= pointer < first + region.bytes.numel() for pointer in live):
                return number, region
        raise SyncError("a commit failed halfway, so no memory is free to receive into; restart")

    def _commit(self, arriving: _Arriving, version: int, buckets: int) -> dict[str, Any]:
        start = time.perf_counter()
        if version != arriving.version:
            raise SyncError(f"version {version} ends here; expected {arriving.version}")
        views = arriving.checked(buckets)
        loaded = time.perf_counter()
        with committing(self._target), self._memory.serving():
            check_commit(version, self._target.weight_version)
            self._idle = None
            self._target.commit_weights(views, version=version, alias=self._alias)
        self._idle = 1 - arriving.buffer if self._alias else arriving.buffer
        arriving.version = -1  # a second commit of the same buckets is none
        self._memory.settle()  # what was served until now is written next
        committed = time.perf_counter() - loaded
        return {
            "version": version,
            "seconds": {"load": loaded - start, "commit": committed},
        }


class _Arriving:
    """A version that is coming in; what is wrong with it is kept until its end."""

    def __init__(
        self,
        where: Layout,
        version: int,
        buffer: int,
        memory: Tensor,
        slab: Tensor | None,
        bucket_bytes: int,
        views: dict[str, Tensor],
    ) -> None:
        self.version, self.buffer = version, buffer
        self._where, self._slab, self._bucket_bytes = where, slab, bucket_bytes
        self._data = memory[: where.nbytes]
        self._sums = memory[where.nbytes :].view(torch.int64)
        self._covered = [0] * len(where.names)
        self._views = views  # kept from version to version
        self._placed: list[tuple[int, int, int]] = []
        self._next = 0
        self._wrong: str | None = None

    def take(self, number: int, packed: Sequence[Sequence[int]]) -> None:
        """A bucket is there to be read."""
        if self._wrong is not None:
            return
        try:
            placed = self._places(number, packed)
        except SyncError as error:
            self._wrong = f"{error}; push again"
            return
        self._next += 1
        self._placed += [(first, end, number) for first, end in placed]
        if self._slab is None:
            return
        at = number % HALVES * slot_bytes(self._bucket_bytes)
        sums = self._slab[at + self._bucket_bytes : at + slot_bytes(self._bucket_bytes)]
        sums, block = sums.view(torch.int64), 0
        for first, end in placed:
            self._data[first:end].copy_(self._slab[at : at + end - first], non_blocking=True)
            count = (end - first) // BLOCK
            there = slice(first // BLOCK, end // BLOCK)
            self._sums[there].copy_(sums[block : block + count], non_blocking=True)
            at, block = at + end - first, block + count

    def checked(self, buckets: int) -> dict[str, Tensor]:
        """All tensors of this version; waits for the device.

        Raises:
            SyncError: names the first tensor, and the bucket, that is not as it was sent.
        """
        if self._wrong is not None:
            raise SyncError(self._wrong)
        where = self._where
        if buckets != self._next or self._covered != where.sizes:
            states = zip(where.names, self._covered, where.sizes, strict=True)
            missing = [name for name, had, size in states if had != size]
            raise SyncError(
                f"{self._next} of {buckets} buckets came, and {len(missing)} tensors are not "
                f"whole: {missing[:8]}; push again"
            )
        differ = block_sums(self._data, version=self.version) != self._sums
        wrong = torch.nonzero(differ).flatten()
        if wrong.numel():
            at = int(wrong[0]) * BLOCK
            tensor = bisect.bisect_right(where.offsets, at) - 1
            bucket = next(b for first, end, b in self._placed if first <= at < end)
            raise SyncError(
                f"{where.names[tensor]} arrived with another checksum, in bucket {bucket} at byte "
                f"{at - where.offsets[tensor]} of the tensor; {wrong.numel()} blocks of {BLOCK} "
                "bytes differ; push again"
            )
        if not self._views:
            self._views.update(where.views(self._data))
        return dict(self._views)

    def _places(self, number: int, packed: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Where a bucket's bytes belong; raises a SyncError for what cannot be."""
        if number != self._next:
            what = "was dropped" if number > self._next else "came twice, or too late"
            which = min(number, self._next) if number > self._next else number
            raise SyncError(f"bucket {which} {what}: expected {self._next}, got {number}")
        try:
            pieces = list(unpack(packed, self._where))
        except SyncError as error:
            raise SyncError(f"bucket {number}: {error}") from error
        used = 0
        for tensor, start, count in pieces:
            had, size = self._covered[tensor], self._where.sizes[tensor]
            if start != had or start % BLOCK or count < 0 or start + count > size:
                raise SyncError(
                    f"bucket {number} has bytes {start} to {start + count} of "
                    f"{self._where.names[tensor]}; expected byte {had} of {size} next"
                )
            self._covered[tensor] = start + count
            used += -(-count // BLOCK) * BLOCK
        if used > self._bucket_bytes:
            raise SyncError(
                f"bucket {number} has {used} bytes; expected {self._bucket_bytes} at most"
            )
        return list(runs(pieces, self._where))
