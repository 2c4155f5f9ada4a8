"""Copies and checksums of a whole bucket in one launch, each byte read once.

`sums` is what `_checksum` needs. `copy` writes tensors to their blocks of 4096 bytes and sums up
what it writes; its plain torch reference is `_copies.reference`. Sums are of integers modulo 2^64,
so that the order of adding changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from miles.sync._checksum import BLOCK, weights
from miles.sync._copies import KINDS, Kind, Table

__all__ = ["copy", "sums"]

_SPAN = 16
"""Most blocks of a program."""
_ROWS: dict[Kind, int] = {"words": 4, "bfloat16": 2, "bytes": 1}
"""Blocks that a program holds at a time."""
_POINTERS = {torch.int64: tl.int64, torch.float32: tl.float32, torch.uint8: tl.uint8}


def sums(words_BK: Tensor, weights_K: Tensor, sums_B: Tensor) -> None:
    """The weighted sum of every row of words, into `sums_B`."""
    num, width = words_BK.shape
    rows = 2048 // width
    if num:
        with _on(words_BK):
            _sums_kernel[(-(-num // rows),)](
                words_BK, weights_K, sums_B, num, WIDTH=width, ROWS=rows, num_warps=4
            )


def copy(tables: dict[Kind, Table], out: Tensor, sums: Tensor, salt: int) -> None:
    """See `_copies.copy`; the salt is that of the version."""
    for kind, table in tables.items():
        how = KINDS[kind]
        rows, spans = _rows(table, how.unit, how.narrow, salt)
        rows_N4 = torch.from_numpy(rows)
        if out.is_cuda:  # pageable memory would be waited for
            rows_N4 = rows_N4.pin_memory().to(out.device, non_blocking=True)
        with _on(out):
            _copy_kernel[(spans,)](
                rows_N4,
                len(rows) - 1,
                1 << len(rows).bit_length(),
                out.view(how.dtype),
                sums,
                _weights(how.dtype.itemsize, out.device),
                SOURCE=_POINTERS[how.source],
                SOURCE_UNIT=how.unit * how.narrow,
                UNIT=how.unit // how.dtype.itemsize,
                WIDTH=BLOCK // how.dtype.itemsize,
                ROWS=_ROWS[kind],
                SPAN=_SPAN,
                num_warps=4,
            )


def _rows(table: Table, unit: int, narrow: int, salt: int) -> tuple[np.ndarray[Any, Any], int]:
    """int64 `[N + 1, 4]`, from where, to which block, how much, first program; and all programs.

    Addresses and amounts are counted in units, so that the compiler sees how they are aligned. The
    last row is the salt.
    """
    spans_N = -(-table.nbytes_N // (_SPAN * BLOCK))
    rows_N4 = np.zeros((len(spans_N) + 1, 4), dtype=np.int64)
    rows_N4[:-1, 0] = table.address_N // (unit * narrow)
    rows_N4[:-1, 1] = table.block_N
    rows_N4[:-1, 2] = table.nbytes_N // unit
    rows_N4[1:, 3] = np.cumsum(spans_N)
    rows_N4[-1, 0] = salt
    return rows_N4, int(rows_N4[-1, 3])


@functools.cache
def _weights(itemsize: int, device: torch.device) -> Tensor:
    """int64, of each element of a block: its word's, times 2 to the bits before it in the word."""
    words_W1 = weights(device)[:, None]
    return (words_W1 << torch.arange(0, 64, 8 * itemsize, device=device)).flatten()


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's GPU as the current one; there is none for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def _sums_kernel(
    words_ptr, weights_ptr, sums_ptr, num, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    exists = row < num - first
    at = row[:, None] * WIDTH + column[None, :]
    x = tl.load(words_ptr + first * WIDTH + at, mask=exists[:, None], other=0)
    weights = tl.load(weights_ptr + column)
    tl.store(sums_ptr + first + row, tl.sum(x * weights[None, :], 1), mask=exists)


@triton.jit(do_not_specialize=["num", "top"])
def _copy_kernel(
    rows_ptr, num, top, out_ptr, sums_ptr, weights_ptr,
    SOURCE: tl.constexpr, SOURCE_UNIT: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Elements past the end of a tensor are zeros, up to the end of its last block."""
    program = tl.program_id(0)
    piece, step = program * 0, top
    while step > 0:  # the last piece whose first program is this one or an earlier one
        probe = piece + step
        first_program = tl.load(rows_ptr + probe * 4 + 3, mask=probe < num, other=1 << 62)
        piece = tl.where(first_program <= program, probe, piece)
        step = step // 2
    row_ptr = rows_ptr + piece * 4
    span = program - tl.load(row_ptr + 3)  # of the piece
    block = tl.load(row_ptr + 1) + span * SPAN
    units: tl.constexpr = SPAN * WIDTH // UNIT
    left = tl.load(row_ptr + 2) - span * units
    count = tl.minimum(left, units).to(tl.int32) * UNIT
    source_ptr = (tl.load(row_ptr) * SOURCE_UNIT).to(tl.pointer_type(SOURCE)) + span * SPAN * WIDTH
    source_ptr = tl.multiple_of(source_ptr, SOURCE_UNIT)  # which the cast forgets
    salt = tl.load(rows_ptr + num * 4)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * WIDTH + column[None, :]
    weights = tl.load(weights_ptr + column)
    for first in range(0, count, ROWS * WIDTH):
        x = tl.load(source_ptr + first + at, mask=first + at < count, other=0)
        x = x.to(out_ptr.dtype.element_ty)
        exists = first + row * WIDTH < count
        tl.store(out_ptr + block * WIDTH + first + at, x, mask=exists[:, None])
        if out_ptr.dtype.element_ty == tl.bfloat16:
            x = x.to(tl.uint16, bitcast=True)
        total = tl.sum(x.to(tl.int64) * weights[None, :], 1) + salt
        tl.store(sums_ptr + block + first // WIDTH + row, total, mask=exists)
