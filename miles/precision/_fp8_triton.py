"""Block FP8 in one read and one write: the bits of `_fp8.encode`, on CUDA.

Shapes: a batch of B matrices, M rows of K elements each, in blocks of 128 along K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miles.precision import _fp8
from miles.precision.recipes import BlockFP8, Role

__all__ = ["encode"]

_ROWS, _WARPS = 32, 4
"""Rows of a program when each row has its own scales, and its warps."""
_SQUARE_WARPS = 4
"""Warps of a program of 128 rows that share a scale."""
_PROFILES = {name: number for number, name in enumerate(_fp8.PROFILES)}


def encode(tensor: Tensor, recipe: BlockFP8, role: Role) -> tuple[Tensor, Tensor]:
    """E4M3 codes of the tensor's shape, and float32 scales, one a block.

    Scales of rows lie in memory column by column, each of a multiple of four elements, as the GEMMs
    of Hopper read them; in shape and values they are those of the reference.
    """
    square = role == "weight"
    shape = (-1, *tensor.shape[-2:]) if square else (1, -1, tensor.shape[-1])
    matrices = tensor.reshape(shape).contiguous()
    batch, m, k = matrices.shape
    codes = torch.empty_like(matrices, dtype=_fp8.E4M3)
    columns = triton.cdiv(k, 128)
    rows = 128 if square else _ROWS
    if square:
        scale = codes.new_empty(batch, triton.cdiv(m, 128), columns, dtype=torch.float32)
    else:
        padded = triton.cdiv(m, 4) * 4
        scale = codes.new_empty(batch, columns, padded, dtype=torch.float32)
        scale = scale[..., :m].transpose(1, 2)
    profile = _PROFILES[recipe.profile if role == "activation" else "te"]
    if codes.numel():
        with torch.cuda.device(tensor.device):
            _kernel[(triton.cdiv(m, rows), columns, batch)](
                matrices,
                codes,
                scale,
                m,
                k,
                *scale.stride(),
                PROFILE=profile,
                POWER_OF_TWO=recipe.scale == "ue8m0",
                SQUARE=square,
                ROWS=rows,
                num_warps=_SQUARE_WARPS if square else _WARPS,
                enable_fp_fusion=False,
            )
    if square:
        scale = scale.view(*tensor.shape[:-2], *scale.shape[1:])
    else:
        scale = scale[0].unflatten(0, tensor.shape[:-1]) if tensor.ndim > 1 else scale[0, 0]
    return codes.view(tensor.shape), scale.to(getattr(torch, recipe.store))


@triton.jit
def _ceil_power_of_two(x):
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _floor_power_of_two(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _scales(amax, PROFILE: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`miles.precision.PROFILES`, by number: multiplier (or divisor) and stored scale."""
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
    return tl.minimum(multiplier, largest), scale


@triton.jit
def _kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    m,
    k,
    stride_b,
    stride_m,
    stride_k,
    PROFILE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * 128 + tl.arange(0, 128)
    inside = (row < m)[:, None] & (column < k)[None, :]
    at = matrix * m * k + row.to(tl.int64)[:, None] * k + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), 1)
    if SQUARE:
        whole = tl.max(amax, 0)
        amax = tl.zeros_like(amax) + whole
    multiplier, scale = _scales(amax, PROFILE, POWER_OF_TWO)
    if PROFILE == 3:
        scaled = tl.div_rn(x, tl.zeros_like(x) + multiplier[:, None])
    else:
        scaled = x * multiplier[:, None]
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    tl.store(codes_ptr + at, scaled.to(tl.float8e4nv), mask=inside)
    base = scale_ptr + matrix * stride_b + column_block * stride_k
    if SQUARE:
        first = tl.arange(0, ROWS) == 0
        tl.store(base + row_block * stride_m + tl.arange(0, ROWS) * 0, scale, mask=first)
    else:
        tl.store(base + row * stride_m, scale, mask=row < m)
