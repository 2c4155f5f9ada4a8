"""Memory that two processes share, for `_bucket_sender` and `_bucket_receiver`.

`FileMemory` is the CPU's; `cuda_ipc` has the GPU's. The protocol on top is the same, so that what
can go wrong with it is tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from miles.errors import SyncError

__all__ = ["FileMemory", "Memory", "Region", "anonymous_file", "map_file"]


@dataclass(frozen=True)
class Region:
    """Bytes of this process that another may attach."""

    bytes: Tensor
    """uint8, one dimension."""
    shared: dict[str, Any]
    """What the other process needs to know, as JSON."""
    fds: list[int] = field(default_factory=list)
    """Descriptors that go along."""

    def close(self) -> None:
        """Close the descriptors; the bytes live as long as a view of them."""
        while self.fds:
            os.close(self.fds.pop())


class Memory(Protocol):
    """Where buckets lie."""

    carrier: str
    """Both sides must name the same."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread that uses this memory has to be in."""
        ...

    def serving(self) -> contextlib.AbstractContextManager[Any]:
        """What a commit has to be in, within the scope."""
        ...

    def allocate(self, nbytes: int) -> Region:
        """Fresh memory; the values are whatever was there."""
        ...

    def attach(self, shared: dict[str, Any], fds: list[int]) -> Tensor:
        """The memory of another process's `Region`, uint8; detached when no view is left."""
        ...

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise where this tensor cannot be copied to or from such memory."""
        ...

    def fence(self) -> Callable[[], None]:
        """What waits until all that this thread has queued so far is done."""
        ...

    def settle(self) -> None:
        """Wait until nothing that any thread of this process has queued is left to do."""
        ...


class FileMemory:
    """Files without a name, in memory, of processes on the CPU."""

    carrier = "file"

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing."""
        return contextlib.nullcontext()

    def serving(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing."""
        return contextlib.nullcontext()

    def allocate(self, nbytes: int) -> Region:
        """See `Memory.allocate`."""
        fd = anonymous_file(nbytes)
        return Region(map_file(os.dup(fd), nbytes), {"nbytes": nbytes}, [fd])

    def attach(self, shared: dict[str, Any], fds: list[int]) -> Tensor:
        """See `Memory.attach`."""
        if len(fds) != 1:
            raise SyncError(f"{len(fds)} file descriptors came along; expected 1")
        return map_file(fds[0], shared["nbytes"])

    def check(self, name: str, tensor: Tensor) -> None:
        """Every device's tensors can be copied."""

    def fence(self) -> Callable[[], None]:
        """Nothing is queued on a CPU."""
        return _nothing

    def settle(self) -> None:
        """Nothing is queued on a CPU."""


def anonymous_file(nbytes: int) -> int:
    """A file descriptor without a name, in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("miles-weights")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, max(nbytes, 1))
    return fd


def map_file(fd: int, nbytes: int) -> Tensor:
    """The file as uint8 `[nbytes]`; the mapping lives as long as a view of it."""
    try:
        memory = mmap.mmap(fd, max(nbytes, 1))
    finally:
        os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _nothing() -> None:
    """Wait for nothing."""
