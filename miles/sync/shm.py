"""Weights for an engine in another process of this machine, through shared memory.

Two buffers take turns. The sender writes version N + 1 into the one that is not being served and
tells the receiver, which checks every tensor and only then commits. The engine's parameters become
views of that buffer, so a version is written once and copied by nobody.

Control goes over a Unix socket that only this user can reach: a length, a JSON object, and, when
the two meet, the file descriptors of the buffers. The buffers have no name, so a killed process
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport, WeightTarget
from miles.sync._plan import check_version, layout, pair

__all__ = ["SharedMemoryReceiver", "SharedMemorySyncer"]

_LENGTH = struct.Struct("<I")
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


class SharedMemorySyncer:
    """The trainer's side; connects when it first pushes, and again after the engine was restarted.

    Args:
        address: path of the receiver's socket, in a directory of yours (mode 0700).
        timeout: seconds to wait for an answer.
    """

    def __init__(self, address: str | Path, *, timeout: float = 120.0) -> None:
        self._address, self._timeout = str(address), timeout
        self._session: _Session | None = None

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`.

        Raises:
            SyncError: names what went wrong, at which tensor; the engine serves what it served
                before, or is gone, and the same push can be made again. (If only the answer was
                late, the engine may already serve the new version; pushing again settles it.)
        """
        start = time.perf_counter()
        try:
            if self._session is None:
                self._session = _Session(self._address, self._timeout)
            return self._session.push(weights, version, start)
        except OSError as error:
            reached = self._session is not None
            self.close()
            what = "the receiver went away" if reached else "no receiver answers"
            raise SyncError(
                f"{what} at {self._address}, so version {version} was not pushed "
                f"({type(error).__name__}: {error}); expected a SharedMemoryReceiver there; start "
                "the engine (again) and push again"
            ) from error

    def close(self) -> None:
        """Let go of the connection and the buffers."""
        if self._session is not None:
            self._session.close()
            self._session = None


class SharedMemoryReceiver:
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

    def __init__(self, target: WeightTarget, address: str | Path) -> None:
        self._target = target
        self._address = Path(address)
        self._address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(address))
        except OSError as error:
            raise SettingError(
                f"cannot listen at {address!s} ({error}); expected a path of a folder that exists, "
                "of at most about 100 characters, as Unix sockets demand"
            ) from error
        os.chmod(address, 0o600)
        self._listener.listen(1)
        threading.Thread(target=self._serve, name="weight-receiver", daemon=True).start()

    def close(self) -> None:
        """Listen no more; what was committed stays."""
        with contextlib.suppress(OSError):  # ends the accept under way
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._address.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    self._serve_one(connection)
                except OSError:  # the sender went away
                    continue
                except Exception as error:  # the next sender has to be served all the same
                    warnings.warn(
                        f"a weight sender was dropped: its messages make no sense "
                        f"({type(error).__name__}: {error})",
                        stacklevel=1,
                    )

    def _serve_one(self, connection: socket.socket) -> None:
        """One sender, until it hangs up."""
        live = self._target.weight_tensors()
        specs = {name: (tuple(t.shape), t.dtype) for name, t in live.items()}
        offsets, nbytes = layout(specs)
        # A target on another device copies; one on the CPU serves the buffer itself.
        alias = all(tensor.device.type == "cpu" for tensor in live.values())
        tensors = {name: [list(shape), str(dtype)] for name, (shape, dtype) in specs.items()}
        _send(connection, {"version": self._target.weight_version, "tensors": tensors})
        _, fds = _receive(connection, num_fds=2)
        buffers = [_views(_map(fd, nbytes), specs, offsets) for fd in fds]
        while (request := _receive(connection)[0]) is not None:
            version, views = request["version"], buffers[request["buffer"]]
            try:
                for name, checksum in request["checksums"].items():
                    if _checksum(views[name]) != checksum:
                        raise SyncError(f"{name} arrived with another checksum; push it again")
                self._target.commit_weights(views, version=version, alias=alias)
                answer = {"version": version}
            except Exception as error:  # whatever it was, the sender has to hear of it
                answer = {"error": f"{type(error).__name__}: {error}"}
            _send(connection, answer)


class _Session:
    """One connection and its two buffers."""

    def __init__(self, address: str, timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(address)
            hello = self._answer()
            self._version: int = hello["version"]
            self._specs: Specs = {
                name: (tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
                for name, (shape, dtype) in hello["tensors"].items()
            }
            offsets, nbytes = layout(self._specs)
            fds = [_anonymous_file(nbytes) for _ in range(2)]
            _send(self._socket, {}, fds)
            self._buffers = [_views(_map(fd, nbytes), self._specs, offsets) for fd in fds]
        except BaseException:
            self._socket.close()
            raise
        self._next = 0

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int, start: float) -> SyncReport:
        moved = 0
        changed = check_version(version, self._version)
        if changed:
            views = self._buffers[self._next]
            for name, tensor in pair(weights, self._specs):
                views[name].copy_(tensor)
                moved += views[name].nbytes
            checksums = {name: _checksum(view) for name, view in views.items()}
            _send(self._socket, {"version": version, "buffer": self._next, "checksums": checksums})
            answer = self._answer()
            if "error" in answer:
                raise SyncError(
                    f"version {version} was not taken, {self._version} is still served: "
                    f"{answer['error']}"
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

    def _answer(self) -> dict[str, Any]:
        answer, _ = _receive(self._socket)
        if answer is None:
            raise ConnectionResetError("the connection was closed")
        return answer


def _anonymous_file(nbytes: int) -> int:
    """A file descriptor without a name, in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("miles-weights")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, max(nbytes, 1))
    return fd


def _map(fd: int, nbytes: int) -> Tensor:
    """The file as uint8 `[nbytes]`; the mapping lives as long as a view of it."""
    memory = mmap.mmap(fd, max(nbytes, 1))
    os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _views(buffer: Tensor, specs: Specs, offsets: dict[str, int]) -> dict[str, Tensor]:
    views = {}
    for name, (shape, dtype) in specs.items():
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        views[name] = buffer[offsets[name] : offsets[name] + nbytes].view(dtype).view(shape)
    return views


def _checksum(tensor: Tensor) -> int:
    flat: Any = tensor.flatten().view(torch.uint8).numpy()
    return zlib.crc32(flat)


def _send(connection: socket.socket, message: dict[str, Any], fds: Iterable[int] = ()) -> None:
    body = json.dumps(message).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(body))], list(fds))
    connection.sendall(body)


def _receive(
    connection: socket.socket, *, num_fds: int = 0
) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors; None when the other side has hung up."""
    header, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, num_fds)
    if not header:
        return None, []
    header += _read(connection, _LENGTH.size - len(header))
    message: dict[str, Any] = json.loads(_read(connection, _LENGTH.unpack(header)[0]))
    return message, fds


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the connection was closed in the middle of a message")
        data += part
    return bytes(data)
