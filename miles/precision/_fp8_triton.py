"""Block FP8 in one read: the bits of `_fp8.encode`, on CUDA; of a tensor, or also of its transpose.

Shapes: a matrix has M rows of K elements each, in blocks of 128 along K; its transpose has K rows
of M elements, in blocks of 128 along M.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from miles.precision import _fp8
from miles.precision._launch import cdiv, on_device_of
from miles.precision.recipes import BlockFP8, Role

__all__ = ["encode", "encode_pair"]

_ROWS, _WARPS = 32, 4
"""Rows of a program when each row has its own scales, and its warps."""
_PAIR_WARPS = 4
"""Where the transpose is written too, of tiles of 128 x 128."""
_SQUARE_WARPS = 4
"""Where 128 rows share a scale."""
_PROFILES = {name: number for number, name in enumerate(_fp8.PROFILES)}
Encoded = tuple[Tensor, Tensor]


def encode(tensor: Tensor, recipe: BlockFP8, role: Role) -> Encoded:
    """E4M3 codes of the tensor's shape, and float32 scales, one a block.

    Scales of rows lie in memory column by column, each of a multiple of four elements, as the GEMMs
    of Hopper read them; in shape and values they are those of the reference.
    """
    if role == "weight":
        return _squares(tensor, recipe, turned=False)[0]
    if tensor.ndim == 2:
        return _of_rows(tensor, recipe, role, turned=False)[0]
    codes, scale = _of_rows(tensor.reshape(-1, tensor.shape[-1]), recipe, role, turned=False)[0]
    scale = scale.unflatten(0, tensor.shape[:-1]) if tensor.ndim > 1 else scale[0]
    return codes.view(tensor.shape), scale


def encode_pair(tensor: Tensor, recipe: BlockFP8, role: Role) -> tuple[Encoded, Encoded]:
    """Codes and scales of a matrix, and those of its transpose, each as `encode` has them.

    Activations and gradients are `[M, K]`, weights `[..., M, K]`. Device memory is read once, but
    for float32: its transposed codes come out wrong where Triton 3.6 stores them beside the others.
    """
    if tensor.dtype == torch.float32:
        first = encode(tensor, recipe, role)
        if role == "weight":
            return first, (first[0].mT.contiguous(), first[1].mT.contiguous())
        return first, encode(tensor.t().contiguous(), recipe, role)
    both = (
        _squares(tensor, recipe, turned=True)
        if role == "weight"
        else _of_rows(tensor, recipe, role, turned=True)
    )
    return both[0], both[1]


def _of_rows(x: Tensor, recipe: BlockFP8, role: Role, *, turned: bool) -> list[Encoded]:
    m, k = x.shape
    x = x.contiguous()
    out = []
    for rows, columns in [(m, k), (k, m)] if turned else [(m, k)]:
        codes = x.new_empty(rows, columns, dtype=_fp8.E4M3)
        blocks, padded = cdiv(columns, 128), 4 * cdiv(rows, 4)
        scale = x.new_empty(blocks, padded, dtype=torch.float32)
        out.append((codes, scale.as_strided((rows, blocks), (1, padded))))
    tile = 128 if turned else _ROWS
    if x.numel():
        with on_device_of(x):
            _row_kernel[(cdiv(m, tile), cdiv(k, 128))](
                x,
                *out[0],
                *out[-1],
                m,
                k,
                *out[0][1].stride(),
                *out[-1][1].stride(),
                PROFILE=_PROFILES[recipe.profile if role == "activation" else "te"],
                POWER_OF_TWO=recipe.scale == "ue8m0",
                TURNED=turned,
                ROWS=tile,
                num_warps=_PAIR_WARPS if turned else _WARPS,
                enable_fp_fusion=False,
            )
    return _stored(out, recipe)


def _stored(pairs: list[Encoded], recipe: BlockFP8) -> list[Encoded]:
    if recipe.store == "float32":
        return pairs
    return [(codes, scale.to(getattr(torch, recipe.store))) for codes, scale in pairs]


def _squares(tensor: Tensor, recipe: BlockFP8, *, turned: bool) -> list[Encoded]:
    *lead, m, k = tensor.shape
    tensor = tensor.contiguous()
    grid = (cdiv(m, 128), cdiv(k, 128), math.prod(lead))
    out = []
    for rows, columns in [(m, k), (k, m)] if turned else [(m, k)]:
        codes = tensor.new_empty(*lead, rows, columns, dtype=_fp8.E4M3)
        blocks = (*lead, cdiv(rows, 128), cdiv(columns, 128))
        out.append((codes, codes.new_empty(blocks, dtype=torch.float32)))
    if tensor.numel():
        with on_device_of(tensor):
            _square_kernel[grid](
                tensor,
                *out[0],
                *out[-1],
                m,
                k,
                PROFILE=_PROFILES["te"],
                POWER_OF_TWO=recipe.scale == "ue8m0",
                TURNED=turned,
                num_warps=_SQUARE_WARPS,
                enable_fp_fusion=False,
            )
    return _stored(out, recipe)


@triton.jit
def _ceil_power_of_two(x):
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _floor_power_of_two(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _scales(amax, PROFILE: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`miles.precision.PROFILES`, by number: multiplier (or divisor) and stored scale."""
    finite = amax < float("inf")
    top = tl.full(amax.shape, 448.0, tl.float32)
    one = tl.full(amax.shape, 1.0, tl.float32)
    largest = 3.4028234663852886e38
    if PROFILE == 0:  # te
        multiplier = tl.minimum(tl.div_rn(top, amax), largest)
        if POWER_OF_TWO:
            multiplier = _floor_power_of_two(multiplier)
        multiplier = tl.where(amax == 0, 1.0, multiplier)
        scale = tl.div_rn(one, multiplier)
    elif PROFILE == 4:  # hf
        if POWER_OF_TWO:
            scale = _ceil_power_of_two(tl.div_rn(amax, top))
            scale = tl.where(amax == 0, 1.0, scale)
            multiplier = tl.div_rn(one, scale)
        else:
            multiplier = tl.where(amax == 0, 1.0, tl.div_rn(one, amax) * 448.0)
            scale = tl.div_rn(one, multiplier)
    else:
        floored = tl.maximum(amax, 1e-4 if PROFILE == 1 else 1e-10)
        scale = tl.div_rn(floored, top)
        if POWER_OF_TWO:
            scale = _ceil_power_of_two(scale)
        multiplier = tl.div_rn(one, scale)
        if PROFILE == 2 and not POWER_OF_TWO:  # sglang
            multiplier = tl.div_rn(top, floored)
            scale = floored * 0.002232142857142857
        if PROFILE == 3:  # vllm
            multiplier = scale
    multiplier = tl.where(finite, tl.minimum(multiplier, largest), float("nan"))
    return multiplier, tl.where(finite, scale, float("nan"))


@triton.jit
def _amax(x, axis: tl.constexpr):
    """Of the bits, of which those of NaN are the largest: a maximum of floats drops NaN."""
    narrow: tl.constexpr = x.dtype.primitive_bitwidth == 16
    integers: tl.constexpr = tl.int16 if narrow else tl.int32
    bits = x.to(integers, bitcast=True) & (0x7FFF if narrow else 0x7FFFFFFF)
    return tl.max(bits, axis).to(integers).to(x.dtype, bitcast=True).to(tl.float32)


@triton.jit
def _codes(x, multiplier, PROFILE: tl.constexpr):
    """E4M3 of blocks times their multipliers, or, for vllm, divided by them.

    Nothing is clamped: a few roundings past 448 round to 448, and only what is past 464 overflows.
    """
    x = x.to(tl.float32)
    scaled = tl.div_rn(x, tl.zeros_like(x) + multiplier) if PROFILE == 3 else x * multiplier
    return scaled.to(tl.float8e4nv)


@triton.jit
def _row_kernel(
    x_ptr, codes_ptr, scale_ptr, turned_codes_ptr, turned_scale_ptr, m, k,
    stride_m, stride_k, turned_stride_k, turned_stride_m,
    PROFILE: tl.constexpr, POWER_OF_TWO: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x 128: a scale for each row and, of the transpose, for each column."""
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, 128)
    # Only where a tile starts needs 64 bits; offsets of its elements are in many registers.
    first_row, first_column = row_block.to(tl.int64) * ROWS, column_block.to(tl.int64) * 128
    row_exists, column_exists = row < m - row_block * ROWS, column < k - column_block * 128
    inside = row_exists[:, None] & column_exists[None, :]
    start = first_row * k + first_column
    at = row[:, None] * k + column[None, :]
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    amax = _amax(x, 1)
    if TURNED:
        # Before the rows are done with, which would take more registers. It is gathered into the
        # layout of `column`: in its own, every thread divides for the 16 columns that it holds.
        turned_amax = tl.gather(_amax(x, 0), column, 0)
    multiplier, scale = _scales(amax, PROFILE, POWER_OF_TWO)
    codes = _codes(x, multiplier[:, None], PROFILE)
    tl.store(codes_ptr + start + at, codes, mask=inside)
    start = first_row * stride_m + column_block * stride_k
    tl.store(scale_ptr + start + row * stride_m, scale, mask=row_exists)
    if TURNED:
        multiplier, scale = _scales(turned_amax, PROFILE, POWER_OF_TWO)
        codes = tl.trans(_codes(x, multiplier[None, :], PROFILE))
        inside = column_exists[:, None] & row_exists[None, :]
        start = first_column * m + first_row
        at = column[:, None] * m + row[None, :]
        tl.store(turned_codes_ptr + start + at, codes, mask=inside)
        start = first_column * turned_stride_k + row_block * turned_stride_m
        tl.store(turned_scale_ptr + start + column * turned_stride_k, scale, mask=column_exists)


@triton.jit
def _square_kernel(
    x_ptr, codes_ptr, scale_ptr, turned_codes_ptr, turned_scale_ptr, m, k,
    PROFILE: tl.constexpr, POWER_OF_TWO: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    row_block, rows = tl.program_id(0), tl.num_programs(0)
    column_block, columns = tl.program_id(1), tl.num_programs(1)
    matrix = tl.program_id(2).to(tl.int64)
    element = tl.arange(0, 128)
    row = row_block * 128 + element
    column = column_block * 128 + element
    inside = (row < m)[:, None] & (column < k)[None, :]
    start = matrix * m * k + row_block.to(tl.int64) * 128 * k + column_block * 128
    at = start + (element[:, None] * k + element[None, :])
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    whole = tl.max(_amax(x, 1).to(tl.int32, bitcast=True), 0)
    amax = (tl.zeros([128], tl.int32) + whole).to(tl.float32, bitcast=True)
    multiplier, scale = _scales(amax, PROFILE, POWER_OF_TWO)
    codes = _codes(x, multiplier[:, None], PROFILE)
    tl.store(codes_ptr + at, codes, mask=inside)
    at_scale = matrix * rows * columns + element * 0
    first = element == 0
    tl.store(scale_ptr + at_scale + row_block * columns + column_block, scale, mask=first)
    if TURNED:
        inside = (column < k)[:, None] & (row < m)[None, :]
        start = matrix * m * k + column_block.to(tl.int64) * 128 * m + row_block * 128
        at = start + (element[:, None] * m + element[None, :])
        tl.store(turned_codes_ptr + at, tl.trans(codes), mask=inside)
        at_scale += column_block * rows + row_block
        tl.store(turned_scale_ptr + at_scale, scale, mask=first)
