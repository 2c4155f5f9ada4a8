"""What SGLang's weight endpoints take, made without SGLang.

A bucket is one uint8 tensor and a list of where each weight lies in it. SGLang's wire is pickle: it
is written here, of types that its unpickler allows, and never read.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from miles.errors import SyncError
from miles.sync._buckets import whole

__all__ = ["FlatBucket", "by_handle", "by_value", "check_exportable", "flat_buckets"]

ALIGNMENT = 256
_DEVICE_ARGUMENT = 6
"""Of `rebuild_cuda_tensor`: where SGLang expects the GPU's UUID."""


@dataclass
class FlatBucket:
    """Weights end to end."""

    flat: Tensor
    """uint8, what is used of it."""
    metadata: list[SimpleNamespace] = field(default_factory=list)
    """`name`, `shape`, `dtype`, `start_idx`, `end_idx`, `numel` (bytes) of each."""

    @property
    def names(self) -> str:
        """First and last of the weights, for errors."""
        first, last = self.metadata[0].name, self.metadata[-1].name
        return first if first == last else f"{first} to {last}"


def flat_buckets(
    weights: Iterable[tuple[str, Tensor]],
    *,
    bucket_bytes: int,
    device: Literal["cpu", "cuda"],
    tight: bool = False,
) -> Iterator[FlatBucket]:
    """Copy weights into buckets of fresh memory, each weight whole in one of them.

    Args:
        weights: (name, tensor) pairs, as a checkpoint names them; sharded ones are gathered.
        bucket_bytes: most bytes of a bucket, save where one weight has more.
        device: where buckets lie. On `"cuda"`, on the GPU of the weights, which have to be there.
        tight: without gaps, as SGLang lays a bucket out by itself; then a bucket ends where the
            next weight would not be aligned.
    """
    seen: set[str] = set()
    bucket, used = None, 0
    for name, shard in weights:
        tensor = whole(shard.detach())
        if name in seen:
            raise SyncError(f"{name} came twice; expected each weight once")
        if device == "cuda" and tensor.device.type != "cuda":
            raise SyncError(
                f"{name} is on {tensor.device}; expected a CUDA tensor on the server's GPU: move "
                'it there, or use via="value"'
            )
        seen.add(name)
        start = used if tight else -(-used // ALIGNMENT) * ALIGNMENT
        full = bucket is not None and start + tensor.nbytes > bucket_bytes
        if bucket is not None and (full or start % tensor.itemsize):
            yield _finished(bucket, used)
            bucket = None
        if bucket is None:
            place = tensor.device if device == "cuda" else torch.device("cpu")
            size = max(bucket_bytes, tensor.nbytes)
            bucket, start = FlatBucket(torch.empty(size, dtype=torch.uint8, device=place)), 0
        used = start + tensor.nbytes
        out = bucket.flat[start:used]
        out.copy_(tensor.contiguous().reshape(-1).view(torch.uint8), non_blocking=device == "cuda")
        bucket.metadata.append(
            SimpleNamespace(
                name=name, shape=tuple(tensor.shape), dtype=tensor.dtype,
                start_idx=start, end_idx=used, numel=tensor.nbytes,
            )
        )  # fmt: skip
    if bucket is not None:
        yield _finished(bucket, used)


def by_value(bucket: FlatBucket) -> str:
    """The bytes themselves, for a server anywhere."""
    return _encode(bucket.flat.cpu().clone(), bucket)


def by_handle(bucket: FlatBucket) -> str:
    """A handle of GPU memory, for one server process, which opens it once.

    Raises:
        SyncError: the memory cannot be shared.
    """
    return _encode(_Handle(bucket.flat), bucket)


class _Handle:
    """Pickled as torch shares a CUDA tensor, with the GPU's UUID in place of its index."""

    def __init__(self, tensor: Tensor) -> None:
        try:
            function, arguments = reductions.reduce_tensor(tensor)
        except RuntimeError as error:
            raise _not_shared(error) from error
        uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
        head, tail = arguments[:_DEVICE_ARGUMENT], arguments[_DEVICE_ARGUMENT + 1 :]
        self._reduced = function, (*head, uuid, *tail)

    def __reduce__(self) -> Any:
        return self._reduced


def _encode(tensor: Tensor | _Handle, bucket: FlatBucket) -> str:
    content = {"flattened_tensor": tensor, "metadata": bucket.metadata}
    return base64.b64encode(pickle.dumps(content, protocol=4)).decode()


def _finished(bucket: FlatBucket, used: int) -> FlatBucket:
    bucket.flat = bucket.flat[:used]
    if bucket.flat.is_cuda:
        torch.cuda.current_stream(bucket.flat.device).synchronize()
    return bucket


def check_exportable(tensor: Tensor) -> None:
    """Raise for GPU memory that no other process can open, as far as torch can tell."""
    pointer = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        inside = segment["address"] <= pointer < segment["address"] + segment["total_size"]
        if inside and segment.get("is_expandable"):
            raise _not_shared("it lies in an expandable segment")


def _not_shared(reason: Any) -> SyncError:
    return SyncError(
        f"GPU memory cannot be shared with the server ({reason}); expected memory of a plain "
        "cudaMalloc: start this process without expandable_segments in PYTORCH_CUDA_ALLOC_CONF, "
        'push outside of a memory saver\'s region, or use via="value" or via="distributed"'
    )
