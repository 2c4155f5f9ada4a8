"""Weights for an engine in another process of this machine, through shared memory.

Two buffers take turns. The sender writes version N + 1 into the one that is not being served and
tells the receiver, which checks every tensor and only then commits. The engine's parameters become
views of that buffer, so a version is written once and copied by nobody.

Control goes over a Unix socket that only this user can reach: a length, a JSON object, and, when
the two meet, the file descriptors of the buffers. The buffers have no name, so a killed process
leaves nothing behind.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.protocols import SyncReport
from miles.sync._block_sums import BLOCK, block_sums
from miles.sync._memory import anonymous_file, map_file
from miles.sync._plan import check_version, layout, pair
from miles.sync._session import (
    Listener,
    Sender,
    Session,
    Specs,
    answer,
    describe,
    receive,
    specs_of,
)
from miles.sync._session import send as _send

__all__ = ["SharedMemoryReceiver", "SharedMemorySyncer"]


class SharedMemorySyncer(Sender):
    """The trainer's side; connects when it first pushes, and again after the engine was restarted.

    Args:
        address: path of the receiver's socket, in a directory of yours (mode 0700).
        timeout: seconds to wait for an answer.
    """

    receiver = "SharedMemoryReceiver"

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `Sender.push`."""
        try:
            return super().push(weights, version=version)
        except _RefusedError:
            self.close()  # new buffers next time: of this one the engine may have kept a part
            raise

    def _open(self, connection: socket.socket, hello: dict[str, Any], fds: list[int]) -> Session:
        return _Session(connection, hello)


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
        specs = specs_of(hello)
        offsets, nbytes = layout(specs, alignment=BLOCK)
        # A target on another device copies; one on the CPU serves the buffer itself.
        alias = all(t.device.type == "cpu" for t in self._target.weight_tensors().values())
        _send(connection, hello)
        _, fds = receive(connection)
        memory = [map_file(fd, nbytes) for fd in fds]
        buffers = [_views(bytes_, specs, offsets) for bytes_ in memory]
        while (request := receive(connection)[0]) is not None:
            version, views = request["version"], buffers[request["buffer"]]
            try:
                found = _checksums(memory[request["buffer"]], offsets, version)
                for name, checksum in request["checksums"].items():
                    if found[name] != checksum:
                        raise SyncError(f"{name} arrived with another checksum; push it again")
                self._target.commit_weights(views, version=version, alias=alias)
                reply = {"version": version}
            except Exception as error:  # whatever it was, the sender has to hear of it
                reply = {"error": f"{type(error).__name__}: {error}"}
            _send(connection, reply)


class _RefusedError(SyncError):
    """The receiver did not commit."""


class _Session:
    """One connection and its two buffers."""

    def __init__(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        self._socket = connection
        self._version: int = hello["version"]
        self._specs = specs_of(hello)
        self._offsets, nbytes = layout(self._specs, alignment=BLOCK)
        fds = [anonymous_file(nbytes) for _ in range(2)]
        _send(self._socket, {}, fds)
        self._memory = [map_file(fd, nbytes) for fd in fds]
        self._buffers = [_views(bytes_, self._specs, self._offsets) for bytes_ in self._memory]
        self._next = 0

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int, start: float) -> SyncReport:
        moved = 0
        changed = check_version(version, self._version)
        if changed:
            views = self._buffers[self._next]
            for name, tensor in pair(weights, self._specs):
                views[name].copy_(tensor)
                moved += views[name].nbytes
            checksums = _checksums(self._memory[self._next], self._offsets, version)
            _send(self._socket, {"version": version, "buffer": self._next, "checksums": checksums})
            reply, _ = answer(self._socket)
            if "error" in reply:
                raise _RefusedError(
                    f"version {version} was not taken, {self._version} is still served: "
                    f"{reply['error']}"
                )
            self._version, self._next = version, 1 - self._next
        return SyncReport(
            version=version,
            num_tensors=len(self._specs) if changed else 0,
            num_bytes=moved,
            copied_bytes=moved,
            seconds=time.perf_counter() - start,
        )

    def close(self) -> None:
        self._socket.close()


def _views(buffer: Tensor, specs: Specs, offsets: dict[str, int]) -> dict[str, Tensor]:
    views = {}
    for name, (shape, dtype) in specs.items():
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        views[name] = buffer[offsets[name] : offsets[name] + nbytes].view(dtype).view(shape)
    return views


def _checksums(memory: Tensor, offsets: dict[str, int], version: int) -> dict[str, int]:
    """Of each tensor, the sums of its blocks, weighted by their places and added up."""
    if memory.numel() < BLOCK:  # tensors without elements
        return dict.fromkeys(offsets, 0)
    sums = block_sums(memory, version=version)
    places = torch.arange(1, 2 * len(sums), 2)
    running = torch.cat([sums.new_zeros(1), (sums * places).cumsum(0)])
    firsts = [offset // BLOCK for offset in offsets.values()]
    ends = [*firsts[1:], len(sums)]
    return dict(zip(offsets, (running[ends] - running[firsts]).tolist(), strict=True))
