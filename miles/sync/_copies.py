"""Many tensors written to their blocks of a bucket at once, and summed up on the way.

A destination is memory in blocks of 4096 bytes, and a sum for each of them. A tensor begins with a
block; what is left of its last one becomes zero. N tensors (or runs of their bytes) are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from miles.sync import _kernels
from miles.sync._checksum import BLOCK, block_sums, salt

__all__ = ["KINDS", "Kind", "Pieces", "Table", "copy", "is_taken", "reference", "tables"]

Kind = Literal["words", "bfloat16", "bytes"]


@dataclass(frozen=True)
class How:
    """How a kernel writes tensors of a kind."""

    source: torch.dtype
    """What it reads."""
    dtype: torch.dtype
    """What it writes."""
    unit: int
    """Bytes written are a multiple of this."""
    narrow: int
    """Bytes read for each that is written; where it reads is a multiple of `unit * narrow`."""


KINDS: dict[Kind, How] = {
    "words": How(torch.int64, torch.int64, 16, 1),
    "bfloat16": How(torch.float32, torch.bfloat16, 8, 2),
    "bytes": How(torch.uint8, torch.uint8, 1, 1),
}


@dataclass(frozen=True)
class Pieces:
    """Where N runs of tensors' bytes go; int64 `[N]` of numpy."""

    start_N: Any
    """First byte, counted in the tensor as it is to be; a multiple of 4096."""
    nbytes_N: Any
    """How many."""
    block_N: Any
    """Of the destination."""


@dataclass(frozen=True)
class Table:
    """Those of one kind, and the addresses of their first bytes."""

    address_N: Any
    nbytes_N: Any
    block_N: Any


def is_taken(source: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `copy` can write this tensor as that dtype; any can be made so."""
    if source.device != device or not source.is_contiguous():
        return False
    if source.dtype is dtype:
        return True
    rounded = source.dtype is torch.float32 and dtype is torch.bfloat16
    return rounded and source.numel() % 4 == 0 and source.data_ptr() % 16 == 0


def copy(
    sources: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    pieces: Pieces,
    out: Tensor,
    sums: Tensor,
    *,
    version: int,
) -> None:
    """Write every piece to its blocks, and the sums of these to `sums`.

    On a GPU that is one launch for each kind, and one read of the sources.

    Args:
        sources: of each piece, its whole tensor, such that `is_taken`; they may be let go of at
            once.
        dtypes: what they are written as.
        pieces: what of them, and where.
        out: uint8, a multiple of 4096 long.
        sums: int64, one for each block of `out`; those of blocks that are not written stay.
        version: see `block_sums`.
    """
    kernels = _kernels.of(out.device)
    if kernels is None:
        reference(sources, dtypes, pieces, out, sums, version=version)
    else:
        kernels.copy(tables(sources, dtypes, pieces), out, sums, salt(version))


def reference(
    sources: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    pieces: Pieces,
    out: Tensor,
    sums: Tensor,
    *,
    version: int,
) -> None:
    """As `copy`, in plain torch."""
    places = zip(*(a.tolist() for a in vars(pieces).values()), strict=True)
    for source, dtype, (start, nbytes, block) in zip(sources, dtypes, places, strict=True):
        blocks = -(-nbytes // BLOCK)
        there = out[block * BLOCK : (block + blocks) * BLOCK]
        first = start // dtype.itemsize
        part = source.view(-1)[first : first + nbytes // dtype.itemsize]
        if source.dtype == dtype:  # as bytes: some dtypes cannot be copied as themselves
            there[:nbytes].copy_(part.view(torch.uint8))
        else:
            there[:nbytes].view(dtype).copy_(part)
        there[nbytes:].zero_()
        if blocks:
            sums[block : block + blocks] = block_sums(there, version=version)


def tables(
    sources: Sequence[Tensor], dtypes: Sequence[torch.dtype], pieces: Pieces
) -> dict[Kind, Table]:
    """The pieces by kind, without those that are empty."""
    address_N = np.array([source.data_ptr() for source in sources], dtype=np.int64)
    cast_N = np.array([s.dtype is not d for s, d in zip(sources, dtypes, strict=True)], dtype=bool)
    address_N += pieces.start_N * (1 + cast_N)
    words_N = ~cast_N & (address_N % 16 == 0) & (pieces.nbytes_N % 16 == 0)
    of_kind: dict[Kind, Any] = {
        "words": words_N,
        "bfloat16": cast_N,
        "bytes": ~cast_N & ~words_N,
    }
    found = {}
    for kind, mask_N in of_kind.items():
        mask_N = mask_N & (pieces.nbytes_N > 0)
        if mask_N.any():
            columns = (address_N, pieces.nbytes_N, pieces.block_N)
            found[kind] = Table(*(column[mask_N] for column in columns))
    return found
