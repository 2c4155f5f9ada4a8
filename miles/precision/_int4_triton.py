"""INT4 in one read and one write: the bits of `_int4`, on CUDA.

Shapes: a weight is G groups of `group_size` elements each, laid end to end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miles.precision import _int4
from miles.precision._launch import cdiv, on_device_of
from miles.precision.recipes import Int4

__all__ = ["encode", "encode_packed", "fake_quantize"]

_ELEMENTS, _WARPS = 4096, 4
"""Elements of a program, and its warps."""


def fake_quantize(weight: Tensor, recipe: Int4) -> tuple[Tensor, Tensor]:
    """The decoded codes in the weight's dtype, contiguous, and scales `[..., K / group_size]`."""
    return _launch(weight, recipe, weight.shape, weight.dtype)


def encode(weight: Tensor, recipe: Int4) -> tuple[Tensor, Tensor]:
    """int8 codes of the weight's shape, and scales `[..., K / group_size]`."""
    return _launch(weight, recipe, weight.shape, torch.int8)


def encode_packed(weight: Tensor, recipe: Int4) -> tuple[Tensor, Tensor]:
    """int32 `[..., K / 8]`, as `_int4.pack` of the codes, and scales `[..., K / group_size]`."""
    return _launch(weight, recipe, (*weight.shape[:-1], weight.shape[-1] // 8), torch.int32)


def _launch(
    weight: Tensor, recipe: Int4, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _int4.check_groups(weight, recipe)
    size = recipe.group_size
    out = weight.new_empty(shape, dtype=dtype)
    scale_shape = (*weight.shape[:-1], weight.shape[-1] // size)
    scale = weight.new_empty(scale_shape, dtype=getattr(torch, recipe.scale_dtype))
    weight = weight.contiguous()
    width = triton.next_power_of_2(size)
    groups = max(1, _ELEMENTS // width)
    if scale.numel():
        with on_device_of(weight):
            _kernel[(cdiv(scale.numel(), groups),)](
                weight,
                out,
                scale,
                scale.numel(),
                DIVISOR=recipe.divisor,
                LOWEST=float(recipe.lowest),
                SIZE=size,
                WIDTH=width,
                GROUPS=groups,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return out, scale


@triton.jit
def _kernel(
    weight_ptr,
    out_ptr,
    scale_ptr,
    num_groups,
    DIVISOR: tl.constexpr,
    LOWEST: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    scale_dtype: tl.constexpr = scale_ptr.dtype.element_ty
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    element = tl.arange(0, WIDTH)
    exists = group < num_groups - first
    inside = exists[:, None] & (element < SIZE)[None, :]
    at = group[:, None] * SIZE + element[None, :]
    weight = tl.load(weight_ptr + first * SIZE + at, mask=inside, other=0.0).to(tl.float32)

    # The bits of NaN are the largest; a maximum of floats would drop it.
    amax = tl.max(tl.abs(weight).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, DIVISOR, tl.float32)).to(dtype)
    scale = scale.to(tl.float32).to(scale_dtype).to(tl.float32)
    scale = tl.where(scale == 0, 1.0, scale)
    finite = amax < float("inf")
    scale = tl.where(finite, scale, float("nan"))

    # The division is one of the weight's dtype: its quotient is rounded to it before the integer.
    divisor = scale.to(dtype).to(tl.float32)
    quotient = tl.div_rn(weight, tl.zeros_like(weight) + divisor[:, None])
    quotient = quotient.to(dtype).to(tl.float32)
    # To the nearest integer, ties to even, zeros positive: 1.5 * 2^23 leaves no bits below one.
    codes = (quotient + 12582912.0) - 12582912.0
    codes = tl.minimum(tl.maximum(codes, LOWEST), 7.0)
    tl.store(scale_ptr + first + group, scale.to(scale_dtype), mask=exists)
    integers = tl.where(finite[:, None], codes, 0.0).to(tl.int32)
    if out_dtype == dtype:
        tl.store(out_ptr + first * SIZE + at, (codes * divisor[:, None]).to(dtype), mask=inside)
    elif out_dtype == tl.int8:
        tl.store(out_ptr + first * SIZE + at, integers.to(tl.int8), mask=inside)
    else:
        nibbles = tl.reshape(integers + 8, (GROUPS, WIDTH // 8, 8))
        packed = tl.sum(nibbles << (tl.arange(0, 8) * 4)[None, None, :], 2)
        word = tl.arange(0, WIDTH // 8)
        at = group[:, None] * (SIZE // 8) + word[None, :]
        inside = exists[:, None] & (word < SIZE // 8)[None, :]
        tl.store(out_ptr + first * (SIZE // 8) + at, packed, mask=inside)
