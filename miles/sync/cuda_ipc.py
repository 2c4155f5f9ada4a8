"""Weights for an engine in another process, from GPU memory to GPU memory.

Trainer and engine share one GPU, or sit on two of one host that reach each other. What crosses the
process boundary is a header of JSON for each bucket; the bytes stay on the device. See
`_bucket_sender` for the protocol, which is the same on a CPU.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.protocols import WeightTarget
from miles.sync import _cuda_driver
from miles.sync._bucket_receiver import BucketReceiver
from miles.sync._bucket_sender import BucketSender
from miles.sync._memory import Region

__all__ = ["CudaIpcReceiver", "CudaIpcSyncer"]

_PROCESS = secrets.token_hex(8)


class CudaIpcSyncer(BucketSender):
    """The trainer's side; connects when it first pushes, and again after the engine was restarted.

    Tensors are cast to the engine's dtypes while they are copied, on the current stream, small ones
    together where `weights` is a collection (`state_dict().items()`, say), one by one where it is a
    generator, whose tensors may be gone when the next is asked for. Sharded ones are gathered one
    at a time; every rank that shares them pushes at the same time, to an engine of its own.

    Args:
        address: path of the receiver's socket, in a directory of yours (mode 0700).
        bucket_bytes: most bytes of a bucket, a multiple of 4096. With a receiver that is not
            `direct`, two of them are allocated.
        timeout: seconds to wait for an answer.
        progress: a bar (of tqdm) when a push takes longer than a second.

    Raises:
        SyncError: there is no CUDA device.
    """

    receiver = "CudaIpcReceiver"

    def __init__(
        self,
        address: str | Path,
        *,
        bucket_bytes: int = 1 << 28,
        timeout: float = 120.0,
        progress: bool = False,
    ) -> None:
        super().__init__(
            address,
            memory=CudaMemory(_current_device(), own_stream=False),
            bucket_bytes=bucket_bytes,
            timeout=timeout,
            progress=progress,
        )


class CudaIpcReceiver(BucketReceiver):
    """The engine's side: a thread that listens at `address` and commits to `target`.

    A version arrives in memory of its own beside what is served. It takes one more copy of the
    weights on the engine's GPU, by the CUDA driver, so torch does not count it.

    Args:
        target: the engine; all its tensors are on one GPU.
        address: path of the socket to make; an old one is replaced.
        direct: let the trainer write into that memory itself, so that a version is copied once.
            Without, the trainer can write its own slab only, from which this process copies, and
            a version is copied twice.
        alias: serve that memory once it is complete: nothing is copied while the engine stands
            still, two such memories take turns, and the tensors that the engine came with are let
            go of. Without, it is copied into the engine's tensors, which stay where they are (as
            memory savers and captured graphs like it).

    Raises:
        SyncError: a tensor of the engine is on the CPU or on a second GPU.

    Example:
        >>> receiver = CudaIpcReceiver(engine, "/run/user/1000/weights")  # doctest: +SKIP
        >>> syncer = CudaIpcSyncer("/run/user/1000/weights")  # elsewhere  # doctest: +SKIP
        >>> print(syncer.push(model.state_dict().items(), version=1).summary())  # doctest: +SKIP
    """

    def __init__(
        self,
        target: WeightTarget,
        address: str | Path,
        *,
        direct: bool = True,
        alias: bool = True,
    ) -> None:
        devices = [t.device for t in target.weight_tensors().values() if t.is_cuda]
        memory = CudaMemory(devices[0] if devices else _current_device(), own_stream=True)
        for name, tensor in target.weight_tensors().items():
            if tensor.device != memory.device:
                raise SyncError(
                    f"{name} of the engine is on {tensor.device}; expected all tensors on one GPU, "
                    f"as on {memory.device}: move the engine there, or use SharedMemoryReceiver"
                )
        super().__init__(target, address, memory=memory, direct=direct, alias=alias)


class CudaMemory:
    """GPU memory that two processes share; see `miles.sync._memory.Memory`.

    Args:
        device: where this process allocates.
        own_stream: whether its work goes on a stream of its own, beside an engine's.
    """

    carrier = "CUDA IPC"

    def __init__(self, device: torch.device, *, own_stream: bool) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if own_stream else None
        self._places = {device}
        self._checked: set[torch.device] = set()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """This device, and the stream."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def serving(self) -> contextlib.AbstractContextManager[Any]:
        """The default stream, on which engines work."""
        return torch.cuda.stream(torch.cuda.default_stream(self.device))

    def allocate(self, nbytes: int) -> Region:
        """See `Memory.allocate`."""
        memory = _cuda_driver.allocate(self.device.index, max(nbytes, 1))
        shared = {
            "gpu": _uuid(self.device.index),
            "handle": _cuda_driver.export(memory.get_device(), memory.data_ptr()).hex(),
            "nbytes": memory.numel(),
            "process": _PROCESS,
        }
        return Region(memory, shared)

    def attach(self, shared: dict[str, Any], fds: list[int]) -> Tensor:
        """See `Memory.attach`."""
        if shared["process"] == _PROCESS:
            raise SyncError(
                "sender and receiver are one process, which cannot attach its own memory; expected "
                "two; use InProcessSyncer"
            )
        visible = [_uuid(index) for index in range(torch.cuda.device_count())]
        if shared["gpu"] not in visible:
            raise SyncError(
                f"the other process's memory is on GPU {shared['gpu']}, which is not visible here; "
                f"got {visible}; add it to CUDA_VISIBLE_DEVICES of this process, or use "
                "CollectiveSyncer"
            )
        index = visible.index(shared["gpu"])
        try:
            memory = _cuda_driver.attach(index, bytes.fromhex(shared["handle"]), shared["nbytes"])
        except SyncError as error:
            raise SyncError(
                f"memory of the other process on cuda:{index} cannot be attached ({error}); "
                "containers have to share their IPC namespace (--ipc=host) and see the same GPU"
            ) from error
        self._places.add(memory.device)
        self._checked.clear()
        return memory

    def check(self, name: str, tensor: Tensor) -> None:
        """See `Memory.check`."""
        if tensor.device in self._checked:
            return
        if tensor.device.type != "cuda":
            raise SyncError(
                f"{name} is on {tensor.device}; expected a CUDA tensor: move it there, or use "
                "SharedMemorySyncer"
            )
        for place in self._places - {tensor.device}:
            if not torch.cuda.can_device_access_peer(tensor.device.index, place.index):
                raise SyncError(
                    f"{name} is on {tensor.device}, from where {place} cannot be reached; expected "
                    "one GPU or two with peer access (nvidia-smi topo -p2p r); use CollectiveSyncer"
                )
        self._checked.add(tensor.device)

    def fence(self) -> Callable[[], None]:
        """See `Memory.fence`."""
        events = []
        for place in self._places:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(place))
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def settle(self) -> None:
        """See `Memory.settle`."""
        torch.cuda.synchronize(self.device)


def _current_device() -> torch.device:
    if not torch.cuda.is_available():
        raise SyncError(
            "there is no CUDA device; expected one that trainer and engine share; use "
            "SharedMemorySyncer and SharedMemoryReceiver on the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
