"""Weights for an engine in another process of this machine, through shared memory.

Two buffers take turns. The sender writes version N + 1 into the one that is not being served and
tells the receiver, which checks it while it comes, block by block, and then commits. The engine's
parameters become views of that buffer, so a version is written once and copied by nobody.

Control goes over a Unix socket that only this user can reach: a length, a JSON object, and, when
the two meet, the file descriptors of the buffers. The buffers have no name, so a killed process
leaves nothing behind.
"""

from __future__ import annotations

import bisect
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.protocols import SyncReport
from miles.sync._bucket_plan import Layout
from miles.sync._buckets import whole
from miles.sync._checksum import BLOCK, block_sums
from miles.sync._filler import Filler
from miles.sync._memory import anonymous_file, map_file
from miles.sync._plan import check_commit, check_version, committing, pair
from miles.sync._progress import bar
from miles.sync._session import (
    Listener,
    Sender,
    Session,
    answer,
    describe,
    hang_up,
    receive,
    specs_of,
)
from miles.sync._session import send as _send

__all__ = ["SharedMemoryReceiver", "SharedMemorySyncer"]

_TOLD = 1 << 25
"""Bytes after which the receiver may begin to check them."""


class SharedMemorySyncer(Sender):
    """The trainer's side; connects when it first pushes, and again after the engine was restarted.

    Sharded tensors are gathered one at a time; every rank that shares them pushes at the same time,
    to an engine of its own.

    Args:
        address: path of the receiver's socket, in a directory of yours (mode 0700).
        timeout: seconds to wait for an answer.
        progress: a bar (of tqdm) when a push takes longer than a second.
    """

    receiver = "SharedMemoryReceiver"

    def __init__(
        self, address: str | Path, *, timeout: float = 120.0, progress: bool = False
    ) -> None:
        super().__init__(address, timeout=timeout)
        self._progress = progress

    def _open(self, connection: socket.socket, hello: dict[str, Any], fds: list[int]) -> Session:
        return _Session(connection, hello, self._progress)


class SharedMemoryReceiver(Listener):
    """The engine's side: a thread that listens at `address` and commits to `target`.

    Args:
        target: the engine.
        address: path of the socket to make; an old one is replaced.

    Example:
        >>> import tempfile
        >>> from miles.sync import SharedMemoryReceiver, SharedMemorySyncer
        >>> class Target:
        ...     weight_version = 0
        ...     def __init__(self): self.w = torch.zeros(2)
        ...     def weight_tensors(self): return {"w": self.w}
        ...     def commit_weights(self, tensors, *, version, alias=False):
        ...         self.w, self.weight_version = tensors["w"], version
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Target()
        ...     receiver = SharedMemoryReceiver(target, f"{folder}/weights")
        ...     syncer = SharedMemorySyncer(f"{folder}/weights")
        ...     report = syncer.push([("w", torch.ones(2))], version=1)
        ...     target.w.tolist(), target.weight_version, report.copied_bytes
        ([1.0, 1.0], 1, 8)
    """

    def _serve_one(self, connection: socket.socket) -> None:
        """One sender, until it hangs up."""
        hello = describe(self._target)
        where = Layout(specs_of(hello))
        # A target on another device copies; one on the CPU serves the buffer itself.
        alias = all(t.device.type == "cpu" for t in self._target.weight_tensors().values())
        _send(connection, hello)
        _, fds = receive(connection)
        memory = [map_file(fd, _size(where)) for fd in fds]
        views = [where.views(bytes_) for bytes_ in memory]
        arriving, buffer = _Arriving(where, torch.empty(0, dtype=torch.uint8), -1), 0
        while (request := receive(connection)[0]) is not None:
            if "begin" in request:
                buffer = request["buffer"]
                arriving = _Arriving(where, memory[buffer], request["begin"])
                continue
            if "written" in request:
                arriving.check(request["written"])
                continue
            version, start = request["commit"], time.perf_counter()
            try:
                arriving.finish(version)
                loaded = time.perf_counter()
                with committing(self._target):
                    check_commit(version, self._target.weight_version)
                    self._target.commit_weights(views[buffer], version=version, alias=alias)
                commit = time.perf_counter() - loaded
                reply = {"version": version, "seconds": {"load": loaded - start, "commit": commit}}
            except Exception as error:  # whatever it was, the sender has to hear of it
                served = self._target.weight_version
                reply = {"error": f"{type(error).__name__}: {error}", "served": served}
            _send(connection, reply)


class _Arriving:
    """A version that is being written, checked while it comes."""

    def __init__(self, where: Layout, memory: Tensor, version: int) -> None:
        self._where, self._version = where, version
        self._data, self._sums = _parts(memory, where)
        self._seen_B = torch.zeros(len(self._sums), dtype=torch.bool)
        self._wrong: str | None = None

    def check(self, written: Iterable[tuple[int, int]]) -> None:
        """Blocks, from and to, that are there to be read."""
        for first, end in written:
            self._seen_B[first:end] = True
            found = block_sums(self._data[first * BLOCK : end * BLOCK], version=self._version)
            wrong = torch.nonzero(found != self._sums[first:end]).flatten()
            if wrong.numel() and self._wrong is None:
                at = (first + int(wrong[0])) * BLOCK
                tensor = bisect.bisect_right(self._where.offsets, at) - 1
                self._wrong = self._where.names[tensor]

    def finish(self, version: int) -> None:
        """Raise where it is not all there, as it was sent."""
        if self._wrong is not None:
            raise SyncError(f"{self._wrong} arrived with another checksum; push it again")
        if version != self._version or not self._seen_B.all():
            raise SyncError(f"version {version} did not arrive whole; push it again")


class _Session:
    """One connection and its two buffers."""

    def __init__(
        self, connection: socket.socket, hello: dict[str, Any], progress: bool = False
    ) -> None:
        self._socket, self._progress = connection, progress
        self._version: int = hello["version"]
        self._where = Layout(specs_of(hello))
        fds = [anonymous_file(_size(self._where)) for _ in range(2)]
        _send(self._socket, {}, fds)
        self._memory = [map_file(fd, _size(self._where)) for fd in fds]
        self._buffers = [self._where.views(bytes_) for bytes_ in self._memory]
        self._next = 0

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int, start: float) -> SyncReport:
        moved, phases = 0, {}
        changed = check_version(version, self._version)
        if changed:
            moved = self._write(weights, version)
            written = time.perf_counter()
            _send(self._socket, {"commit": version})
            reply, _ = answer(self._socket)
            if "error" in reply:
                raise SyncError(
                    f"version {version} was not taken, {reply['served']} is still served: "
                    f"{reply['error']}"
                )
            self._version, self._next = version, 1 - self._next
            phases = {"gather": written - start, **reply["seconds"]}
            phases["send"] = time.perf_counter() - start - sum(phases.values())
            phases["pause"] = phases["commit"]  # the engine stops for nothing else
        return SyncReport(
            version=version,
            num_tensors=len(self._where.names) if changed else 0,
            num_bytes=moved,
            copied_bytes=moved,
            seconds=time.perf_counter() - start,
            phases=phases,
        )

    def close(self) -> None:
        hang_up(self._socket)

    def _write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Everything into the next buffer, told to the receiver bit by bit; bytes."""
        with bar(self._progress, sum(self._where.sizes), version) as shown:
            return self._write_to(weights, version, shown)

    def _write_to(
        self, weights: Iterable[tuple[str, Tensor]], version: int, shown: Callable[[int], object]
    ) -> int:
        _send(self._socket, {"begin": version, "buffer": self._next})
        views, where = self._buffers[self._next], self._where
        data, sums = _parts(self._memory[self._next], where)
        written: list[tuple[int, int]] = []
        moved = told = 0
        with Filler(data, sums, version=version) as filler:
            for name, tensor in pair(weights, where.specs):
                first = where.offsets[where.number[name]] // BLOCK
                filler.write(views[name], whole(tensor, views[name].dtype), first)
                moved += views[name].nbytes
                shown(views[name].nbytes)
                written.append((first, first + -(-views[name].nbytes // BLOCK)))
                if moved - told >= _TOLD:
                    _send(self._socket, {"written": _joined(written)})
                    written, told = [], moved
        _send(self._socket, {"written": _joined(written)})
        return moved


def _size(where: Layout) -> int:
    """Bytes of a version and of the sums of its blocks."""
    return where.nbytes + where.nbytes // BLOCK * 8


def _parts(memory: Tensor, where: Layout) -> tuple[Tensor, Tensor]:
    """The version, and the sums."""
    return memory[: where.nbytes], memory[where.nbytes : _size(where)].view(torch.int64)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, in order, neighbours together."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((first, end))
    return joined
