"""A stream of tensors, cut into buckets of bounded size.

The stream is flat: tensors lie one after the other in the order they come, of any dtypes, each at a
multiple of 256 bytes. Bucket k is bytes kB to (k + 1)B of it. So a tensor may lie in several
buckets, none of which is larger than B, and whoever receives them into one buffer finds every
tensor there in one piece, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.errors import SettingError
from miles.sync._checksum import checksums
from miles.sync._plan import ALIGNMENT, pair

__all__ = ["Bucket", "Piece", "Specs", "aligned", "check_bucket_bytes", "cut", "gathered", "whole"]

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's bytes in a bucket."""

    name: str
    start: int
    """First byte, counted in the tensor."""
    offset: int
    """Where it lies in the bucket."""
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    """Bytes that travel together."""

    index: int
    data: Tensor
    """uint8, what is used of the buffer; gaps are zero."""
    pieces: list[Piece]
    sums: Tensor
    """int64 `[pieces]`: what each adds to the checksum of its tensor."""


def aligned(nbytes: int) -> int:
    """Up to the next multiple of 256."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def check_bucket_bytes(bucket_bytes: int) -> int:
    """A size that buckets may have."""
    if bucket_bytes < ALIGNMENT or bucket_bytes % ALIGNMENT:
        raise SettingError(
            f"bucket_bytes is {bucket_bytes}; expected a positive multiple of {ALIGNMENT}"
        )
    return bucket_bytes


def gathered(weights: Iterable[tuple[str, Tensor]], specs: Specs) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `specs`, whole, one at a time; raises as `pair` does.

    Every rank that shares sharded tensors has to take all of them.
    """
    for name, tensor in pair(weights, specs):
        yield name, whole(tensor, specs[name][1])


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A `DTensor` gathered on every rank that shares it, another tensor as it is.

    Args:
        tensor: any.
        dtype: what a sharded tensor is cast to before it is gathered, to move fewer bytes.
    """
    shards: Any = tensor
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if dtype is not None and not any(p.is_partial() for p in shards.placements):
        shards = shards.to(dtype)
    full: Tensor = shards.full_tensor()
    return full


def cut(
    tensors: Iterable[tuple[str, Tensor]],
    specs: Specs,
    *,
    bucket_bytes: int,
    buffer: Callable[[int], Tensor],
) -> Iterator[Bucket]:
    """Fill buckets with tensors, cast to the dtypes of `specs`.

    Args:
        tensors: (name, tensor) pairs; their names are in `specs`.
        specs: shapes and dtypes that they are to have.
        bucket_bytes: most bytes in a bucket, a multiple of 256.
        buffer: uint8 memory of that size for the bucket of an index; asked for when the first byte
            is written, so that it may wait for an earlier bucket to leave the same memory.
    """
    index = used = 0
    pieces: list[Piece] = []
    data: Tensor | None = None
    for name, tensor in tensors:
        dtype = specs[name][1]
        flat_N = tensor.reshape(-1)
        nbytes, start = flat_N.numel() * dtype.itemsize, 0
        while True:
            if data is None:
                data = buffer(index)
            take = min(nbytes - start, bucket_bytes - used)
            pieces.append(Piece(name, start, used, take))
            _write(data[used : used + aligned(take)], flat_N, dtype, start, take)
            used, start = used + aligned(take), start + take
            if used == bucket_bytes:
                yield Bucket(index, data, pieces, checksums(data, pieces))
                index, used, pieces, data = index + 1, 0, [], None
            if start == nbytes:
                break
    if data is not None:
        yield Bucket(index, data[:used], pieces, checksums(data[:used], pieces))


def _write(out: Tensor, flat_N: Tensor, dtype: torch.dtype, start: int, take: int) -> None:
    part = flat_N[start // dtype.itemsize : (start + take) // dtype.itemsize]
    if part.dtype == dtype:  # as bytes: some dtypes cannot be copied as themselves
        out[:take].copy_(part.contiguous().view(torch.uint8))
    elif take:
        out[:take].view(dtype).copy_(part)
    out[take:].zero_()
