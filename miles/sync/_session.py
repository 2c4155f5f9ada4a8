"""How a sender and a receiver of one machine talk: a Unix socket, JSON, and who may connect.

A message is a length, a JSON object, and file descriptors where some go along. Nothing on this wire
is pickled. Only processes of this user are talked to, on both sides.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport, WeightTarget
from miles.sync._plan import as_version
from miles.sync._trainers import is_of_the_wire, lost

__all__ = [
    "Listener",
    "Sender",
    "Session",
    "Specs",
    "answer",
    "describe",
    "hang_up",
    "peer_pid",
    "receive",
    "send",
    "specs_of",
]

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")
_LONGEST = 1 << 28
_MAX_FDS = 4
_PAUSE = 0.1
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Session(Protocol):
    """One connection, from the sender's side."""

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int, start: float) -> SyncReport:
        """See `WeightSyncer.push`; `start` is when it was called."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Sender(ABC):
    """The trainer's side: connects when it first pushes, and again after the engine was restarted.

    Args:
        address: path of the receiver's socket, in a directory of yours (mode 0700).
        timeout: seconds to wait for an answer.
    """

    receiver = "receiver"

    def __init__(self, address: str | Path, *, timeout: float = 120.0) -> None:
        self._address, self._timeout = str(address), timeout
        self._session: Session | None = None
        self._connection: socket.socket | None = None

    @abstractmethod
    def _open(self, connection: socket.socket, hello: dict[str, Any], fds: list[int]) -> Session:
        """The session that follows the receiver's first message."""

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`.

        Raises:
            SettingError: `version` is no integer.
            SyncError: names what went wrong, at which tensor; the engine serves what it served
                before, or is gone, and the same push can be made again. (If only the answer was
                late, the engine may already serve the new version; pushing again settles it.)
        """
        start = time.perf_counter()
        version = as_version(version)
        try:
            if self._connection is not None and _hung_up(self._connection):
                self.close()  # what it served says nothing of what is served there now
            if self._session is None:
                self._session = self._connect()
            return self._session.push(weights, version, start)
        except BaseException as error:
            reached = self._session is not None
            self.close()  # both sides forget what was half sent, and an answer that may yet come
            if isinstance(error, OSError):
                what = "the receiver went away" if reached else "no receiver answers"
                raise SyncError(
                    f"{what} at {self._address}, so version {version} was not pushed"
                    f"{', or only its answer was lost' if reached else ''} "
                    f"({type(error).__name__}: {error}); expected a {self.receiver} there; start "
                    "the engine (again) and push again"
                ) from error
            if is_of_the_wire(error):
                raise lost(error) from error
            raise

    def close(self) -> None:
        """Let go of the connection and the buffers."""
        if self._session is not None:
            self._session.close()
        self._session = self._connection = None

    def _connect(self) -> Session:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout)
        try:
            connection.connect(self._address)
            _check_peer(connection, f"the receiver at {self._address}")
            hello, fds = receive(connection)
            if hello is None:
                raise ConnectionResetError("the connection was closed")
            if "error" in hello:
                raise SyncError(hello["error"])
            session = self._open(connection, hello, fds)
            self._connection = connection
            return session
        except BaseException:
            connection.close()
            raise


class Listener(ABC):
    """The engine's side: a thread that takes one sender at a time and serves it until it hangs up.

    Args:
        target: the engine.
        address: path of the socket to make; an old one is replaced.

    Raises:
        SettingError: a path at which no socket can be, or something else is.
    """

    def __init__(self, target: WeightTarget, address: str | Path) -> None:
        self._target = target
        self._address = Path(address)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if self._address.is_socket():
                self._address.unlink(missing_ok=True)
            self._listener.bind(str(address))
        except OSError as error:
            self._listener.close()
            raise SettingError(
                f"cannot listen at {address!s} ({error}); expected a path of a folder that exists, "
                "at which there is nothing or a socket, of at most about 100 characters, as Unix "
                "sockets demand"
            ) from error
        self._made = self._there()
        os.chmod(address, 0o600)
        self._listener.listen(8)
        self._current: tuple[socket.socket, int, threading.Thread] | None = None
        self._closed = False
        threading.Thread(target=self._accept, name="weight-receiver", daemon=True).start()

    def close(self) -> None:
        """Listen no more, and hang up; what was committed stays, and a commit under way ends."""
        if self._closed:
            return
        self._closed = True
        if self._there() == self._made:  # and not the socket of a successor
            self._address.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # ends the accept under way
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._hang_up()

    def _there(self) -> tuple[int, int] | None:
        """What is at the address; one that listens keeps its number from being given again."""
        with contextlib.suppress(OSError):
            found = self._address.lstat()
            return found.st_dev, found.st_ino
        return None

    @abstractmethod
    def _serve_one(self, connection: socket.socket) -> None:
        """One sender, until it hangs up."""

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_PAUSE)  # for want of descriptors, say; the sender waits in the queue
                continue
            try:
                _check_peer(connection, "a weight sender")
            except SyncError as error:
                warnings.warn(f"{error}; it was turned away", stacklevel=1)
                connection.close()
                continue
            if self._current is not None:
                served, pid, thread = self._current
                if thread.is_alive() and not _hung_up(served):
                    self._refuse(connection, pid)
                    continue
                thread.join()  # it notices at its next message; a commit under way ends first
            worker = threading.Thread(
                target=self._serve, args=(connection,), name="weight-session", daemon=True
            )
            self._current = connection, peer_pid(connection), worker
            if self._closed:  # while this one came
                self._hang_up()
            worker.start()

    def _hang_up(self) -> None:
        if self._current is not None:
            with contextlib.suppress(OSError):  # the sender did already
                self._current[0].shutdown(socket.SHUT_RDWR)

    def _refuse(self, connection: socket.socket, pid: int) -> None:
        text = (
            f"another sender (process {pid}) is connected to {self._address}; expected one trainer "
            "for an engine; close() the other one, or give each engine an address of its own"
        )
        with connection, contextlib.suppress(OSError):
            send(connection, {"error": text})

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._serve_one(connection)
            except OSError:  # the sender went away
                return
            except Exception as error:  # the next sender has to be served all the same
                warnings.warn(
                    f"a weight sender was dropped: its messages make no sense "
                    f"({type(error).__name__}: {error})",
                    stacklevel=1,
                )


def describe(target: WeightTarget) -> dict[str, Any]:
    """What a receiver says first: the version it serves and the tensors it expects."""
    tensors = {n: [list(t.shape), str(t.dtype)] for n, t in target.weight_tensors().items()}
    return {"version": target.weight_version, "tensors": tensors}


def specs_of(hello: dict[str, Any]) -> Specs:
    """Shapes and dtypes, out of `describe`."""
    return {
        name: (tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in hello["tensors"].items()
    }


def send(connection: socket.socket, message: dict[str, Any], fds: Iterable[int] = ()) -> None:
    """One message; the descriptors stay open here."""
    body = json.dumps(message).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(body))], list(fds))
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors; None when the other side has hung up."""
    header, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, _MAX_FDS)
    if not header:
        return None, []
    header += _read(connection, _LENGTH.size - len(header))
    (length,) = _LENGTH.unpack(header)
    if length > _LONGEST:
        raise SyncError(f"a message of {length} bytes was announced; expected {_LONGEST} at most")
    message = json.loads(_read(connection, length))
    if not isinstance(message, dict):
        raise SyncError(f"a message is a {type(message).__name__}; expected an object")
    return message, fds


def answer(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """As `receive`, where the other side owes an answer."""
    message, fds = receive(connection)
    if message is None:
        raise ConnectionResetError("the connection was closed")
    return message, fds


def hang_up(connection: socket.socket) -> None:
    """Close it, and for those too who hold a copy, such as a process forked meanwhile."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end, 0 where the system does not tell."""
    return _peer(connection)[0]


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    if not hasattr(socket, "SO_PEERCRED"):  # not Linux: the mode of the socket has to do
        return 0, os.getuid()
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def _check_peer(connection: socket.socket, who: str) -> None:
    pid, uid = _peer(connection)
    if uid != os.getuid():
        raise SyncError(
            f"{who} is process {pid} of user {uid}; expected one of this user, {os.getuid()}"
        )


def _hung_up(connection: socket.socket) -> bool:
    if connection.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(connection, 0)  # hang-ups are told whether asked for or not
    return bool(poll.poll(0))


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the connection was closed in the middle of a message")
        data += part
    return bytes(data)
