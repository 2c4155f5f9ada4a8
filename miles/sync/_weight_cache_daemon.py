"""A client of SGLang's weight-cache daemon, whose wire is pickle, without what is unsafe about it.

An answer is a dict of plain values; in it, for each tensor, base64 of what torch pickles to share
CUDA memory. Both are read by an unpickler that first looks at every opcode and knows no global but
the few that such a pickle names, all of which stand for inert values here: nothing that the other
side chose is ever called, whoever it is. It has to be a process of this user all the same.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import pickletools
import select
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from miles.errors import SyncError
from miles.sync._session import _check_peer, peer_pid

__all__ = ["Daemon", "SharedTensor", "open_tensor", "read_handle", "read_message"]

_LENGTH = struct.Struct("!I")
_LONGEST = 256 << 20
"""SGLang's own limit."""
_PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "EMPTY_DICT", "SETITEM",
    "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1",
    "BININT2", "LONG1", "NEWTRUE", "NEWFALSE", "NONE",
}  # fmt: skip
_HANDLE = _PLAIN | {"STACK_GLOBAL", "REDUCE"}
_DTYPES = (
    "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
    "bool", "uint8", "int8", "int16", "int32", "int64",
)  # fmt: skip


def _arguments(*arguments: Any) -> tuple[Any, ...]:
    """What stands for `rebuild_cuda_tensor`: its arguments."""
    return arguments


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"): _arguments,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): "Tensor",
    ("torch.storage", "TypedStorage"): "TypedStorage",
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}
_ARGUMENTS: tuple[type, ...] = (
    str, tuple, tuple, int, str, torch.dtype, int, bytes, int, int, bool, bytes, int, bytes, bool,
)  # fmt: skip
"""The types of `rebuild_cuda_tensor`'s arguments, tensor class to event."""


@dataclass(frozen=True)
class SharedTensor:
    """A tensor in another process, as torch hands it over."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_param: bool
    """False for buffers, such as the tables of rotary embeddings."""
    arguments: tuple[Any, ...]
    """Of `rebuild_cuda_tensor`, with names in place of its two classes."""


class Daemon:
    """A running daemon: what it holds, and whether it is still there.

    Args:
        path: its socket.
        timeout: seconds to wait for an answer; it serves one client at a time.

    Raises:
        SyncError: nobody is there, it is another user's, or it answers something else.
    """

    def __init__(self, path: str | Path, *, timeout: float = 30.0) -> None:
        self._path, self._timeout = str(path), timeout
        self._pidfd = -1
        try:
            self.config = _mapping(self._ask({"type": "query_config"}), "config")
            # It hands tensors to whoever names its own fingerprint, which is for engines to check.
            answer = self._ask({"type": "fetch_state", "config": self.config})
            entries = _mapping(answer, "entries")
            self.tensors = {name: _shared(name, entry) for name, entry in entries.items()}
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Nothing, as long as it lives.

        Raises:
            SyncError: it ended, and its memory, which the trainer's parameters view, with it.
        """
        if self._pidfd < 0 or select.select([self._pidfd], [], [], 0)[0]:
            raise SyncError(
                f"the weight-cache daemon of {self._path} ended, and the memory of the weights "
                "with it; the server ends itself too: start the daemon, the server and this "
                "trainer again, from a checkpoint"
            )

    def close(self) -> None:
        """Stop watching it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One connection, one request, one answer, as the daemon wants it."""
        try:
            about = os.lstat(self._path)
            if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.getuid():
                raise SyncError(
                    f"{self._path} is not a socket of this user, {os.getuid()}; expected the "
                    "weight-cache daemon's: look at who made it, and remove it"
                )
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(self._path)
                _check_peer(connection, f"the daemon at {self._path}")
                self._watch(peer_pid(connection))
                body = pickle.dumps(request, protocol=4)
                connection.sendall(_LENGTH.pack(len(body)) + body)
                (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
                if length > _LONGEST:
                    raise self._nonsense(f"a message of {length} bytes")
                answer = read_message(_exactly(connection, length))
        except OSError as error:
            raise SyncError(
                f"no weight-cache daemon answers at {self._path} ({type(error).__name__}: "
                f"{error}); start one before the server: python -m "
                "sglang.srt.weight_cache.daemon --model-path ... --gpu-id 0"
            ) from error
        if not isinstance(answer, dict) or answer.get("status") != "ok":
            raise self._nonsense(f"{answer!r:.300}")
        return answer

    def _watch(self, pid: int) -> None:
        if self._pidfd >= 0:
            return
        if pid < 1:
            raise SyncError(
                f"the daemon at {self._path} is in a process namespace that this one does not see; "
                "expected both in one container, as CUDA IPC needs it too"
            )
        self._pidfd = os.pidfd_open(pid)

    def _nonsense(self, what: str) -> SyncError:
        return SyncError(
            f"the daemon at {self._path} answered {what}; expected what that of SGLang 0.5.17 does"
        )


def read_message(data: bytes) -> Any:
    """Plain values from a pickle.

    Raises:
        SyncError: it holds anything else.

    Example:
        >>> read_message(pickle.dumps({"status": "ok", "shape": [2, 3]}))
        {'status': 'ok', 'shape': [2, 3]}
    """
    return _Inert(data, _PLAIN).load()


def read_handle(text: str) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor` from base64 of a pickle of a CUDA tensor.

    Raises:
        SyncError: it is anything else.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise SyncError(f"a handle is not base64 ({error})") from error
    found = _Inert(data, _HANDLE).load()
    if (
        not isinstance(found, tuple)
        or len(found) != len(_ARGUMENTS)
        or not all(type(part) is kind for part, kind in zip(found, _ARGUMENTS, strict=True))
        or not all(type(number) is int for number in found[1] + found[2])
        or len(found[1]) != len(found[2])
    ):
        raise SyncError(f"a handle is {found!r:.300}; expected that of a CUDA tensor of torch's")
    return found


def open_tensor(shared: SharedTensor, device: int | None = None) -> Tensor:
    """The memory itself, by torch; unmapped when no view of it is left.

    Args:
        shared: what the daemon said.
        device: this process's number of the daemon's GPU; None: the daemon's own.

    Raises:
        SyncError: the driver refuses.
    """
    arguments = list(shared.arguments)
    arguments[0], arguments[4] = torch.Tensor, torch.storage.TypedStorage
    arguments[1] = torch.Size(shared.shape)
    arguments[6] = arguments[6] if device is None else device
    try:
        opened: Tensor = reductions.rebuild_cuda_tensor(*arguments)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise SyncError(
            f"{shared.name} of the daemon cannot be opened on cuda:{arguments[6]} "
            f"({str(error).splitlines()[0]}); expected the daemon's GPU, visible here (pass "
            "device= where its number differs), and one container or --ipc=host"
        ) from error
    return opened


class _Inert(pickle.Unpickler):
    """Builds values of the given opcodes."""

    def __init__(self, data: bytes, opcodes: set[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._data, self._opcodes = data, opcodes

    def load(self) -> Any:
        try:
            for opcode, _, place in pickletools.genops(self._data):
                if opcode.name not in self._opcodes:
                    raise SyncError(
                        f"the daemon sent a pickle with {opcode.name} at byte {place}; expected "
                        "plain values and CUDA handles: is it SGLang 0.5.17's?"
                    )
            return super().load()
        except SyncError:
            raise
        except Exception as error:  # a broken pickle may raise any
            raise SyncError(f"the daemon sent a broken pickle ({error!r:.200})") from error

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise SyncError(
                f"the daemon sent a pickle that names {module}.{name}; expected a CUDA tensor of "
                "torch's: is it SGLang 0.5.17's?"
            )
        return _GLOBALS[module, name]


def _shared(name: Any, entry: Any) -> SharedTensor:
    """An entry, whose handle must be what it says."""
    if not isinstance(entry, dict) or not isinstance(entry.get("handle"), str):
        raise SyncError(f"the daemon's entry of {name!r:.100} is {entry!r:.200}")
    arguments = read_handle(entry["handle"])
    shape, stride, offset, dtype = (arguments[i] for i in (1, 2, 3, 5))
    said = entry.get("shape"), f"torch.{entry.get('dtype')}"
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    fits = min((offset, *shape, *stride), default=0) >= 0
    fits = fits and (0 in shape or (offset + span) * dtype.itemsize <= arguments[8])
    if (list(shape), str(dtype)) != said or not fits:
        raise SyncError(
            f"the daemon's {name} is {said[1]} {said[0]}, and its handle {dtype} {shape} with "
            f"strides {stride} at {offset} of {arguments[8]} bytes; expected one tensor"
        )
    return SharedTensor(str(name), shape, dtype, bool(entry.get("is_param")), arguments)


def _mapping(answer: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = answer.get(key)
    if not isinstance(found, dict) or not found:
        raise SyncError(f"the daemon's answer has {key}={found!r:.200}; expected a dict")
    return found


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("the connection was closed in the middle of a message")
        data += part
    return bytes(data)
