"""Device memory by the CUDA driver, for memory that another process is to attach.

Torch's allocator hands out parts of larger blocks, under `expandable_segments` and memory savers in
a form that cannot be exported at all, and its own handles carry reference counts that a killed
process never gives back. Memory allocated here is one block, exported as 64 bytes, and freed when
no tensor views it any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError

__all__ = ["allocate", "allocation", "attach", "export"]

_LAZY_PEER_ACCESS = 1
_OUT_OF_MEMORY = 2


class _Handle(ctypes.Structure):
    """`CUipcMemHandle`."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


class _DriverError(SyncError):
    """A call that failed."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call} failed with {code}: {text}")
        self.code = code


class _Driver:
    """The functions used here, each in the context that torch uses too."""

    def __init__(self) -> None:
        try:
            self._lib: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise SyncError(
                f"the CUDA driver was not found ({error}); expected libcuda.so.1"
            ) from error
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self.call("cuInit", 0)

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the driver; raise what it returns."""
        code = getattr(self._lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            raise _DriverError(name, code, (text.value or b"unknown").decode())

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        """Make the primary context of a device this thread's for a while."""
        if index not in self._contexts:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self.call("cuDeviceGet", ctypes.byref(device), index)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[index] = context
        self.call("cuCtxPushCurrent_v2", self._contexts[index])
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _driver() -> _Driver:
    return _Driver()


class _Block:
    """Memory of the driver as torch takes it; freed, or detached, with the last view of it."""

    def __init__(self, device: int, pointer: int, nbytes: int, free: str) -> None:
        self._device, self._pointer, self._free = device, pointer, free
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 2,
        }

    def __del__(self) -> None:
        # The process may be ending, or the context be lost: then the driver frees it by itself.
        with contextlib.suppress(Exception), _driver().device(self._device):
            _driver().call(self._free, ctypes.c_uint64(self._pointer))

    def tensor(self) -> Tensor:
        device = torch.device("cuda", self._device)
        with torch.cuda.device(device):
            return torch.as_tensor(self, device=device)


def allocate(device: int, nbytes: int) -> Tensor:
    """uint8 `[nbytes]` on a device, outside torch's allocator."""
    pointer = ctypes.c_uint64()
    with _driver().device(device):
        for attempt in range(2):
            try:
                _driver().call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
                break
            except _DriverError as error:
                if error.code != _OUT_OF_MEMORY or attempt:
                    free, total = torch.cuda.mem_get_info(device)
                    raise SyncError(
                        f"cuda:{device} has no {nbytes / 1e9:.2f} GB left to receive weights into "
                        f"({free / 1e9:.2f} of {total / 1e9:.2f} GB are free; {error}); expected "
                        "room for one more copy of the engine's weights, or smaller buckets"
                    ) from error
                torch.cuda.empty_cache()
    return _Block(device, pointer.value, nbytes, "cuMemFree_v2").tensor()


def allocation(device: int, address: int) -> tuple[int, int]:
    """Address and bytes of the allocation that an address is in."""
    start, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    with _driver().device(device):
        _driver().call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(start),
            ctypes.byref(nbytes),
            ctypes.c_uint64(address),
        )
    return start.value, nbytes.value


def export(device: int, address: int) -> bytes:
    """The handle with which another process attaches an allocation.

    Raises:
        SyncError: memory that has none, as of `expandable_segments` or a memory saver.
    """
    handle = _Handle()
    with _driver().device(device):
        _driver().call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
    return bytes(handle)


def attach(device: int, handle: bytes, nbytes: int) -> Tensor:
    """The memory behind another process's handle, uint8 `[nbytes]`."""
    pointer = ctypes.c_uint64()
    with _driver().device(device):
        _driver().call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(pointer),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
    return _Block(device, pointer.value, nbytes, "cuIpcCloseMemHandle").tensor()
