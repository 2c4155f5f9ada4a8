"""Block-FP8 GEMMs in Triton: any size, on every CUDA GPU of compute capability 8.0 or later.

Shapes: a `[R, D]` with a scale for each 1 x 128; b `[C, D]` with a scale for each 128 x 128, or for
each 1 x 128 (wgrad); the result `[R, C]`. D is what is summed over. E experts.

Each 128 of D, in ascending order, is one product of tiles, and `total += product * (sa * sb)` in
float32. No sum is split between programs and none depends on R or C, nor does the instruction that
multiplies: every tile has 64 rows or more, below which Hopper has another that rounds otherwise. So
a row of the result has the same bits alone and in any company, of an expert's rows too. Within 128,
FP8 tensor cores keep about 14 bits of a sum, as under DeepGEMM; where there are none, codes
are multiplied as float16, in which each is exact.

References:
    DeepSeek-V3, arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError
from miles.precision._launch import cdiv, on_device_of
from miles.precision.backends import has_fp8_cores

if TYPE_CHECKING:  # it imports this module
    from miles.precision._gemm import Operand

__all__ = ["dense", "grouped", "grouped_weight"]

BLOCK = 128


class Tile(NamedTuple):
    """What one program computes."""

    rows: int
    """At least 64, for the same bits in every tile."""
    columns: int
    """A divisor of 128: one scale of a square block for all of them."""
    warps: int
    stages: int


TILES = (Tile(128, 128, 8, 3), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4))
DECODING_TILES = (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3))
"""Without FP8 tensor cores; of a larger one, the numbers that codes stand for don't fit."""
BUSY = 128
"""Programs that keep a GPU busy: a tile that leaves fewer gives way to a smaller one."""
GROUP = 8
"""Rows of tiles whose programs run side by side, so that what they read stays in the L2 cache."""


def tile_of(rows: int, columns: int, tiles: tuple[Tile, ...] = TILES) -> Tile:
    """The first tile that isn't mostly empty and of which there are enough, or else the last."""
    for tile in tiles:
        if rows > tile.rows // 2 and _count(rows, columns, tile) >= BUSY:
            return tile
    return tiles[-1]


def dense(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """`a @ b.T` as `dtype`.

    Raises:
        ShapeError, DtypeError, SettingError: codes and scales that don't fit together.
    """
    _check(a, b, 2)
    rows, columns = a.codes.shape[0], b.codes.shape[0]
    out = a.codes.new_empty(rows, columns, dtype=dtype)
    if not out.numel():
        return out
    tile = tile_of(rows, columns, _tiles(a.codes.device))
    left, right = _readable(a.codes), _readable(b.codes)
    with on_device_of(out):
        _dense_kernel[(_count(rows, columns, tile),)](
            left,
            right,
            a.scale,
            b.scale,
            out,
            rows,
            columns,
            left.shape[-1],
            left.stride(0),
            right.stride(0),
            *a.scale.stride(),
            *b.scale.stride(),
            **_options(left, b.square, tile),
        )
    return out


def grouped(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's rows of `a` `[T, D]` with its own `b` `[E, C, D]`: `[T, C]`.

    Which rows are whose is read by the kernel: nothing waits for the GPU.

    Args:
        a: rows sorted by expert.
        b: square blocks.
        ends_E: int32, where each expert's rows end; the last is T.
        dtype: of the result.

    Raises:
        ShapeError, DtypeError, SettingError: as `dense`.
    """
    _check(a, b, 3)
    _check_ends(ends_E, b.codes.shape[0], a)
    rows, (experts, columns, _) = a.codes.shape[0], b.codes.shape
    out = a.codes.new_empty(rows, columns, dtype=dtype)
    if not out.numel():
        return out
    tile = tile_of(cdiv(rows, experts), columns * experts, _tiles(a.codes.device))
    # An upper bound: of an expert's tiles, one at most isn't full.
    row_tiles = cdiv(rows, tile.rows) + min(experts, rows) - 1
    left, right = _readable(a.codes), _readable(b.codes)
    with on_device_of(out):
        _grouped_kernel[(row_tiles * cdiv(columns, tile.columns),)](
            left,
            right,
            a.scale,
            b.scale,
            out,
            ends_E,
            experts,
            row_tiles,
            columns,
            left.shape[-1],
            left.stride(0),
            *right.stride()[:2],
            *a.scale.stride(),
            *b.scale.stride(),
            EXPERTS=triton.next_power_of_2(experts),
            **_options(left, b.square, tile),
        )
    return out


def grouped_weight(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's part of D of `a` `[R, D]` with the same of `b` `[C, D]`: `[E, R, C]`.

    Args:
        a: blocks of 1 x 128; D is a multiple of 128.
        b: blocks of 1 x 128.
        ends_E: int32, where each expert's part of D ends, multiples of 128. An expert without a
            part gets zeros.
        dtype: of the result.

    Raises:
        ShapeError, DtypeError, SettingError: as `dense`.
    """
    _check(a, b, 2)
    _check_ends(ends_E, len(ends_E), a)
    if b.square or a.codes.shape[-1] % BLOCK:
        raise ShapeError(
            f"a has codes {tuple(a.codes.shape)}, and b square={b.square}; expected a multiple of "
            "128 to sum over, in blocks of 1 x 128: pad each expert's part with zeros"
        )
    rows, columns, experts = a.codes.shape[0], b.codes.shape[0], len(ends_E)
    out = a.codes.new_empty(experts, rows, columns, dtype=dtype)
    if not out.numel():
        return out
    tile = tile_of(rows, columns * experts, _tiles(a.codes.device))
    left, right = _readable(a.codes), _readable(b.codes)
    with on_device_of(out):
        _weight_kernel[(_count(rows, columns, tile), experts)](
            left,
            right,
            a.scale,
            b.scale,
            out,
            ends_E,
            rows,
            columns,
            left.stride(0),
            right.stride(0),
            *a.scale.stride(),
            *b.scale.stride(),
            **_options(left, b.square, tile),
        )
    return out


def _count(rows: int, columns: int, tile: Tile) -> int:
    return int(cdiv(rows, tile.rows) * cdiv(columns, tile.columns))


def _options(codes: Tensor, square: bool, tile: Tile) -> dict[str, object]:
    return {
        "SQUARE": square,
        "DECODE": codes.dtype == torch.uint8,
        "EVEN": codes.shape[-1] % BLOCK == 0,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "GROUP": GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # The one fused operation is written out: which are must not depend on a tile's shape.
        "enable_fp_fusion": False,
    }


def _decodes(device: torch.device) -> bool:
    """Whether there are no FP8 tensor cores; the interpreter is as good as them."""
    return device.type == "cuda" and not has_fp8_cores(device)


def _tiles(device: torch.device) -> tuple[Tile, ...]:
    return DECODING_TILES if _decodes(device) else TILES


def _readable(codes: Tensor) -> Tensor:
    """Codes in rows that start at 16 bytes, which others are copied to; else each is read alone.

    Without FP8 tensor cores they are bytes: Triton has no name for their type there.
    """
    whole = codes.view(torch.uint8)
    if codes.data_ptr() % 16 or any(stride % 16 for stride in codes.stride()[:-1]):
        whole = F.pad(whole, (0, -codes.shape[-1] % 16)).contiguous()
        if whole.data_ptr() % 16:
            whole = whole.clone()
    return whole if _decodes(codes.device) else whole.view(codes.dtype)


def _check(a: Operand, b: Operand, ndim: int) -> None:
    """Raise unless a matrix and one of `ndim` dimensions can be multiplied."""
    _check_one("a", a, 2)
    _check_one("b", b, ndim)
    if a.square or (ndim == 3 and not b.square):
        raise ShapeError(
            f"a has square={a.square} and b square={b.square}; expected a scale for each 1 x 128 "
            "of a, and for each 128 x 128 of the weights of experts"
        )
    if a.codes.shape[-1] != b.codes.shape[-1]:
        raise ShapeError(
            f"a has codes {tuple(a.codes.shape)} and b {tuple(b.codes.shape)}; expected one last "
            "dimension, that both sum over: transpose one of them"
        )
    if a.codes.device != b.codes.device:
        raise SettingError(
            f"a is on {a.codes.device} and b on {b.codes.device}; expected one device"
        )


def _check_one(name: str, given: Operand, ndim: int) -> None:
    codes, scale = given.codes, given.scale
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise DtypeError(
            f"{name} has codes of {codes.dtype} and scales of {scale.dtype}; expected "
            "torch.float8_e4m3fn and torch.float32: round with `encode`"
        )
    if codes.ndim != ndim or codes.stride(-1) != 1:
        raise ShapeError(
            f"{name} has codes {tuple(codes.shape)} of strides {codes.stride()}; expected {ndim} "
            "dimensions, the last of stride 1: call `contiguous` on them"
        )
    *lead, rows, depth = codes.shape
    blocks = (*lead, -(-rows // BLOCK) if given.square else rows, -(-depth // BLOCK))
    if scale.shape != blocks or scale.device != codes.device:
        raise ShapeError(
            f"{name} has codes {tuple(codes.shape)} on {codes.device} with scales "
            f"{tuple(scale.shape)} on {scale.device}; expected scales {blocks} there, one for each "
            f"{BLOCK if given.square else 1} x {BLOCK}: is `square` right, and are they transposed?"
        )


def _check_ends(ends_E: Tensor, experts: int, a: Operand) -> None:
    fits = ends_E.shape == (experts,) and ends_E.dtype == torch.int32 and ends_E.is_contiguous()
    if not fits or ends_E.device != a.codes.device or not experts:
        raise ShapeError(
            f"ends is {ends_E.dtype} {tuple(ends_E.shape)} on {ends_E.device}; expected contiguous "
            f"torch.int32 ({max(experts, 1)},) on {a.codes.device}: `counts.cumsum(0).int()`"
        )


@triton.jit
def _order(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile: down the rows of a group, then a column on."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return first + inside % size, inside // size


@triton.jit
def _float16(codes):
    """What E4M3 bytes stand for, exactly: their bits are a float16 of 1/256 of it."""
    bits = codes.to(tl.int16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half).to(tl.float16)


@triton.jit
def _tile(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr,
    first_row, end_row, first_column, columns, depth,
    a_stride, b_stride, a_scale_stride, a_scale_next, b_scale_stride, b_scale_next,
    SQUARE: tl.constexpr, DECODE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows from the first to an end, in columns from the first on."""
    row, column, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 128)
    row_exists = row < end_row - first_row
    column_exists = column < columns - first_column
    # What is beyond an edge is the last row or column again, and not stored.
    a_row = tl.minimum(first_row + row, end_row - 1).to(tl.int64)
    b_row = tl.minimum(first_column + column, columns - 1).to(tl.int64)
    a_at = a_ptr + (a_row * a_stride)[:, None] + step[None, :]
    b_at = b_ptr + (b_row * b_stride)[None, :] + step[:, None]
    a_scale_at = a_scale_ptr + a_row * a_scale_stride
    if SQUARE:
        b_scale_at = b_scale_ptr + (first_column // 128) * b_scale_stride
    else:
        b_scale_at = b_scale_ptr + b_row * b_scale_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(0, tl.cdiv(depth, 128)):
        # A scale is waited for after the product.
        a_scale = tl.load(a_scale_at)
        b_scale = tl.load(b_scale_at)
        if EVEN:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            left = depth - block * 128
            zero = 0 if DECODE else 0.0
            a = tl.load(a_at, mask=(step < left)[None, :], other=zero)
            b = tl.load(b_at, mask=(step < left)[:, None], other=zero)
        if DECODE:
            a, b = _float16(a), _float16(b)
        product = tl.dot(a, b, out_dtype=tl.float32)
        scale = (a_scale * b_scale)[:, None] if SQUARE else a_scale[:, None] * b_scale[None, :]
        total = tl.fma(product, tl.broadcast_to(scale, [ROWS, COLUMNS]), total)
        a_at += 128
        b_at += 128
        a_scale_at += a_scale_next
        b_scale_at += b_scale_next
    at = (first_row + row).to(tl.int64)[:, None] * columns + (first_column + column)[None, :]
    inside = row_exists[:, None] & column_exists[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dense_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr, rows, columns, depth,
    a_stride, b_stride, a_scale_stride, a_scale_next, b_scale_stride, b_scale_next,
    SQUARE: tl.constexpr, DECODE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _order(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP
    )
    _tile(
        a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr,
        row_tile * ROWS, rows, column_tile * COLUMNS, columns, depth,
        a_stride, b_stride, a_scale_stride, a_scale_next, b_scale_stride, b_scale_next,
        SQUARE, DECODE, EVEN, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr, ends_ptr, experts, row_tiles, columns, depth,
    a_stride, b_stride_expert, b_stride, a_scale_stride, a_scale_next,
    b_scale_stride_expert, b_scale_stride, b_scale_next,
    SQUARE: tl.constexpr, DECODE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _order(tl.program_id(0), row_tiles, tl.cdiv(columns, COLUMNS), GROUP)
    # Tiles are those of expert 0, then of expert 1, ...; those after the last expert's do nothing.
    each = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + each, mask=each < experts, other=0)
    starts = tl.load(ends_ptr + each - 1, mask=(each > 0) & (each < experts), other=0)
    tiles = tl.cdiv(ends - starts, ROWS)
    tile_ends = tl.cumsum(tiles, 0)
    if row_tile >= tl.sum(tiles, 0):
        return
    expert = tl.sum((tile_ends <= row_tile).to(tl.int32), 0)
    mine = each == expert
    first_tile = tl.sum(tl.where(mine, tile_ends - tiles, 0), 0)
    start = tl.sum(tl.where(mine, starts, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    _tile(
        a_ptr, b_ptr + expert.to(tl.int64) * b_stride_expert,
        a_scale_ptr, b_scale_ptr + expert.to(tl.int64) * b_scale_stride_expert, out_ptr,
        start + (row_tile - first_tile) * ROWS, end, column_tile * COLUMNS, columns, depth,
        a_stride, b_stride, a_scale_stride, a_scale_next, b_scale_stride, b_scale_next,
        SQUARE, DECODE, EVEN, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _weight_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr, ends_ptr, rows, columns,
    a_stride, b_stride, a_scale_stride, a_scale_next, b_scale_stride, b_scale_next,
    SQUARE: tl.constexpr, DECODE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _order(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP
    )
    expert = tl.program_id(1)
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    start = tl.multiple_of(start, 128)
    block = (start // 128).to(tl.int64)
    _tile(
        a_ptr + start, b_ptr + start,
        a_scale_ptr + block * a_scale_next, b_scale_ptr + block * b_scale_next,
        out_ptr + expert.to(tl.int64) * rows * columns,
        row_tile * ROWS, rows, column_tile * COLUMNS, columns, end - start,
        a_stride, b_stride, a_scale_stride, a_scale_next, b_scale_stride, b_scale_next,
        SQUARE, DECODE, EVEN, ROWS, COLUMNS,
    )  # fmt: skip
