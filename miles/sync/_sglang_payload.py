"""What SGLang's weight endpoints take, made without SGLang.

A bucket is one uint8 tensor and a list of where each weight lies in it. SGLang's wire is pickle: it
is written here, of types that its unpickler allows, and never read.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from miles.errors import SyncError
from miles.sync._buckets import whole

__all__ = [
    "Block", "FlatBucket", "InPlace", "Shared", "by_handle", "by_place", "by_value", "described",
    "extent", "flat_buckets", "groups",
]  # fmt: skip

ALIGNMENT = 256
_NO_COUNTER = b"/miles_counts_no_references"


@dataclass(frozen=True)
class Block:
    """GPU memory that servers can open: all of one allocation."""

    address: int
    nbytes: int
    handle: bytes
    """Its `cudaIpcMemHandle_t`."""
    gpu: str
    """UUID."""


@dataclass(frozen=True)
class Shared:
    """A block of ours."""

    memory: Tensor
    """uint8, all of it."""
    block: Block


@dataclass
class FlatBucket:
    """Weights end to end."""

    flat: Tensor
    """uint8, what is used of it."""
    metadata: list[SimpleNamespace] = field(default_factory=list)
    """`name`, `shape`, `dtype`, `start_idx`, `end_idx`, `numel` (bytes) of each."""
    shared: Shared | None = None
    """What it lies in, if servers are to open that."""

    @property
    def names(self) -> str:
        """First and last of the weights, for errors."""
        return _first_and_last([weight.name for weight in self.metadata])


@dataclass(frozen=True)
class InPlace:
    """Weights that servers read where the trainer has them."""

    names: str
    """First and last of them, for errors."""
    nbytes: int
    payload: str


def _first_and_last(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def flat_buckets(
    weights: Iterable[tuple[str, Tensor]],
    *,
    bucket_bytes: int,
    device: Literal["cpu", "cuda"],
    tight: bool = False,
) -> Iterator[FlatBucket]:
    """Copy weights into buckets of fresh memory, each weight whole in one of them.

    For servers that do not read this memory themselves; see `_sglang_slabs` for those that do.

    Args:
        weights: (name, tensor) pairs, as a checkpoint names them; sharded ones are gathered.
        bucket_bytes: most bytes of a bucket, save where one weight has more.
        device: where buckets lie. On `"cuda"`, on the GPU of the first weight.
        tight: without gaps, as SGLang lays a bucket out by itself; then a bucket ends where the
            next weight would not be aligned.
    """
    bucket, used, align = None, 0, 1 if tight else ALIGNMENT
    for group in groups(weights):
        first = group[0][1]
        start, room = -(-used // align) * align, extent(group, align)
        if bucket is not None and (start + room > bucket_bytes or start % first.itemsize):
            yield _finished(bucket, used)
            bucket = None
        if bucket is None:
            place = first.device if first.is_cuda and device == "cuda" else torch.device(device)
            size, used = max(bucket_bytes, room), 0
            bucket = FlatBucket(torch.empty(size, dtype=torch.uint8, device=place))
        for name, tensor in group:
            start = -(-used // align) * align
            used = start + tensor.nbytes
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            # From pinned memory of the host it would go on while a generator fills that again.
            bucket.flat[start:used].copy_(data, non_blocking=data.is_cuda and bucket.flat.is_cuda)
            bucket.metadata.append(described(name, tensor, start))
    if bucket is not None:
        yield _finished(bucket, used)


def groups(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Whole weights, one by one, but two together that SGLang fuses if one call brings both.

    Its loaders of DeepSeek's latent attention drop a `q_a_proj` or a `kv_a_proj_with_mqa` without a
    word where the other is not in the same call. The first of them is held back, as a copy.

    Raises:
        SyncError: a name came twice.
    """
    seen: set[str] = set()
    waiting: dict[str, tuple[str, Tensor]] = {}
    for name, shard in weights:
        if name in seen:
            raise SyncError(f"{name} came twice; expected each weight once")
        seen.add(name)
        tensor = whole(shard.detach())
        pair = name.replace(".kv_a_proj_with_mqa.", ".q_a_proj.")
        if ".q_a_proj." not in pair:
            yield [(name, tensor)]
        elif pair in waiting:
            yield [waiting.pop(pair), (name, tensor)]
        else:
            waiting[pair] = name, tensor.clone()
    for left in waiting.values():
        yield [left]


def extent(group: Sequence[tuple[str, Tensor]], align: int) -> int:
    """Bytes of weights that begin at multiples of `align`."""
    *others, (_, last) = group
    return sum(-(-tensor.nbytes // align) * align for _, tensor in others) + last.nbytes


def by_value(bucket: FlatBucket) -> str:
    """The bytes themselves, for a server anywhere."""
    return _encode(bucket.flat.cpu().clone(), bucket)


def by_handle(bucket: FlatBucket) -> str:
    """A handle of GPU memory, for any number of server processes."""
    assert bucket.shared is not None
    return _encode(_Handle(bucket.shared.block, torch.uint8, bucket.flat.numel()), bucket)


def by_place(weights: Sequence[tuple[str, Tensor, Block]]) -> InPlace:
    """Views of the blocks that weights lie in, each of which a server opens once."""
    handles: dict[tuple[int, torch.dtype], _Handle] = {}
    named = []
    for name, tensor, block in weights:
        whole, size = (block.address, tensor.dtype), tensor.itemsize
        if whole not in handles:
            handles[whole] = _Handle(block, tensor.dtype, block.nbytes // size)
        at = (tensor.data_ptr() - block.address) // size
        named.append((name, _View(handles[whole], tuple(tensor.shape), tensor.stride(), at)))
    return InPlace(
        names=_first_and_last([name for name, _, _ in weights]),
        nbytes=sum(tensor.nbytes for _, tensor, _ in weights),
        payload=_pickled(named),
    )


def described(name: str, tensor: Tensor, start: int) -> SimpleNamespace:
    """A weight that begins with that byte of a bucket."""
    return SimpleNamespace(
        name=name, shape=tuple(tensor.shape), dtype=tensor.dtype,
        start_idx=start, end_idx=start + tensor.nbytes, numel=tensor.nbytes,
    )  # fmt: skip


class _Handle:
    """Pickled as torch shares a CUDA tensor, with the GPU's UUID in place of its index.

    The handle is bare, as that of an early torch, which later ones open; with the version that they
    put before it themselves, a trainer's torch 2.13 is refused by a server's 2.11. There is no
    event to wait for, since a bucket that is announced has been written, and no counter of
    references: torch gives a reference back when it has closed the memory, and does without where
    there is no counter, as after the end of a trainer. That a bucket has been read, the server's
    answer says.
    """

    def __init__(self, block: Block, dtype: torch.dtype, count: int) -> None:
        self._arguments = (
            Tensor, (count,), (1,), 0,
            torch.storage.TypedStorage, dtype, block.gpu, block.handle,
            block.nbytes, 0, False, _NO_COUNTER, 0, bytes(64), False,
        )  # fmt: skip

    def __reduce__(self) -> Any:
        return reductions.rebuild_cuda_tensor, self._arguments


class _View:
    """A part of what another object stands for, which is pickled once for all of its parts."""

    def __init__(
        self, whole: _Handle, shape: tuple[int, ...], stride: tuple[int, ...], at: int
    ) -> None:
        self._arguments = whole, shape, stride, at

    def __reduce__(self) -> Any:
        return torch.as_strided, self._arguments


def _encode(tensor: Tensor | _Handle, bucket: FlatBucket) -> str:
    return _pickled({"flattened_tensor": tensor, "metadata": bucket.metadata})


def _pickled(content: Any) -> str:
    return base64.b64encode(pickle.dumps(content, protocol=4)).decode()


def _finished(bucket: FlatBucket, used: int) -> FlatBucket:
    bucket.flat = bucket.flat[:used]
    if bucket.flat.is_cuda:
        torch.cuda.current_stream(bucket.flat.device).synchronize()
    return bucket
