"""Weights in buckets of bounded size through shared memory: the engine's side."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.protocols import WeightTarget
from miles.sync._block_sums import BLOCK, block_sums
from miles.sync._bucket_sender import HALVES, Piece, runs, slot_bytes
from miles.sync._memory import Memory, Region
from miles.sync._plan import check_version, layout
from miles.sync._session import Listener, Specs, describe, receive, send, specs_of

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
        specs = specs_of(hello)
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
        arriving = _Arriving(specs, 0, torch.empty(0), None, size, {})
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
                        number, region = self._free(layout(specs, alignment=BLOCK)[1])
                        views = self._views.setdefault(number, {})
                        arriving = _Arriving(specs, version, region.bytes, slab, size, views)
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
                reply = {"error": f"{kind}{error}"}
            send(connection, reply, [] if region is None else region.fds)

    def _free(self, nbytes: int) -> tuple[int, Region]:
        """A staging buffer of which nothing is served."""
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
        with self._memory.serving():
            self._target.commit_weights(views, version=version, alias=self._alias)
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
        specs: Specs,
        version: int,
        memory: Tensor,
        slab: Tensor | None,
        bucket_bytes: int,
        views: dict[str, Tensor],
    ) -> None:
        self.version = version
        self._specs, self._slab, self._bucket_bytes = specs, slab, bucket_bytes
        self._offsets, nbytes = layout(specs, alignment=BLOCK)
        self._sizes = {n: dtype.itemsize * torch.Size(s).numel() for n, (s, dtype) in specs.items()}
        self._data, self._sums = memory[:nbytes], memory[nbytes:].view(torch.int64)
        self._covered = dict.fromkeys(specs, 0)
        self._views = views  # kept from version to version
        self._placed: list[tuple[int, int, int]] = []
        self._next = 0
        self._wrong: str | None = None

    def take(self, number: int, pieces: Sequence[Piece]) -> None:
        """A bucket is there to be read."""
        if self._wrong is None:
            self._wrong = self._mistake(number, pieces)
        if self._wrong is not None:
            return
        self._next += 1
        placed = list(runs(pieces, self._offsets))
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
        missing = [name for name, size in self._sizes.items() if self._covered[name] != size]
        if buckets != self._next or missing:
            raise SyncError(
                f"{self._next} of {buckets} buckets came, and {len(missing)} tensors are not "
                f"whole: {missing[:8]}; push again"
            )
        differ = block_sums(self._data, version=self.version) != self._sums
        wrong = torch.nonzero(differ).flatten()
        if wrong.numel():
            at = int(wrong[0]) * BLOCK
            name = next(n for n, first in reversed(self._offsets.items()) if first <= at)
            bucket = next(b for first, end, b in self._placed if first <= at < end)
            raise SyncError(
                f"{name} arrived with another checksum, in bucket {bucket} at byte "
                f"{at - self._offsets[name]} of the tensor; {wrong.numel()} blocks of {BLOCK} "
                "bytes differ; push again"
            )
        if not self._views:
            self._views.update({name: self._view(name) for name in self._specs})
        return dict(self._views)

    def _mistake(self, number: int, pieces: Sequence[Piece]) -> str | None:
        if number != self._next:
            what = "was dropped" if number > self._next else "came twice, or too late"
            which = min(number, self._next) if number > self._next else number
            return f"bucket {which} {what}: expected {self._next}, got {number}; push again"
        used = 0
        for name, start, count in pieces:
            here = f"bucket {number} has bytes {start} to {start + count} of {name}"
            if name not in self._specs:
                return f"{here}; the engine has no such tensor"
            had, size = self._covered[name], self._sizes[name]
            if start != had or start % BLOCK or count < 0 or start + count > size:
                return f"{here}; expected byte {had} of {size} next"
            self._covered[name] = start + count
            used += -(-count // BLOCK) * BLOCK
        if used > self._bucket_bytes:
            return f"bucket {number} has {used} bytes; expected {self._bucket_bytes} at most"
        return None

    def _view(self, name: str) -> Tensor:
        shape, dtype = self._specs[name]
        first = self._offsets[name]
        return self._data[first : first + self._sizes[name]].view(dtype).view(shape)
