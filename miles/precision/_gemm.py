"""GEMMs of block-FP8 operands, one function a backend.

Shapes: a `[R, D]` with a scale for each 1 x 128; b `[C, D]` with a scale for each 128 x 128, or for
each 1 x 128 (wgrad); the result `[R, C]`. D is what is summed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.errors import ShapeError
from miles.precision import _blocks, backends
from miles.precision._launch import on_device_of
from miles.precision.quantize import _encode_pair, _round
from miles.precision.recipes import BlockFP8, Role

__all__ = [
    "Operand",
    "check_rhs_scale",
    "check_row_scale",
    "dense",
    "encode",
    "encode_transposed",
    "encode_weights",
    "product",
    "rhs_scale",
    "row_scale",
]

ROWS = 16
"""`scaled_mm` gets rows in multiples of this: fewer leave cuBLAS without an aligned scale."""
BLOCK = BlockFP8.block


class Operand(NamedTuple):
    """Codes and scales of one side of a GEMM."""

    codes: Tensor
    """float8_e4m3fn `[..., R, D]`, contiguous."""
    scale: Tensor
    """float32: `[..., R, D/128]`, or `[..., R/128, D/128]` for square blocks; rounded up."""
    square: bool
    """Whether a block is 128 x 128."""
    dtype: torch.dtype
    """What it is dequantised to for a GEMM without FP8: that of the activations."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for, rounded once to `dtype`."""
        blocks = (BLOCK, BLOCK) if self.square else (1, BLOCK)
        at = _blocks.spread(self.scale, self.codes.shape, blocks)
        return (self.codes.float() * at).to(dtype)


@functools.cache
def _recipe(scale: Any, profile: Any) -> BlockFP8:
    # Any: custom operators take plain strings, and the recipe looks at their values.
    return BlockFP8(scale=scale, profile=profile)


def encode(tensor: Tensor, scale: str, role: Role, profile: str = "te") -> Operand:
    """Round to blocks along the last dimension.

    Unlike `quantize` it doesn't look for NaN, which would make the host wait for the GPU: what is
    not finite comes out as NaN.
    """
    codes, scales, _ = _round(tensor, _recipe(scale, profile), role)
    return Operand(codes, scales, role == "weight", tensor.dtype)


def encode_weights(weight: Tensor, scale: str) -> tuple[Operand, Operand]:
    """Square blocks of a weight `[..., N, K]`, and the same transposed, in one read."""
    pair = _encode_pair(weight, _recipe(scale, "te"), "weight")
    one, other = (Operand(q.codes, q.scale, True, weight.dtype) for q in pair)
    return one, other


def encode_transposed(tensor: Tensor, scale: str, role: Role, profile: str = "te") -> Operand:
    """`[T, F]` to the operand `[F, T]`, rounded along T, which is padded with zeros to 128s."""
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[0] % BLOCK))
    if padded.is_cuda:  # a kernel that transposes as it rounds; it writes the other way too
        _, q = _encode_pair(padded, _recipe(scale, profile), role)
        return Operand(q.codes, q.scale, role == "weight", tensor.dtype)
    return encode(padded.t().contiguous(), scale, role, profile)


def dense(name: str, a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """`a @ b.T` as `dtype`, by the backend of this name."""
    return _DENSE[name](a, b, dtype)


def reference(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """float32 GEMM of the numbers that the codes stand for: what the others are held to."""
    return (a.dequantize(torch.float32) @ b.dequantize(torch.float32).mT).to(dtype)


def dequant_bf16(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """GEMM of the dequantised operands, in bf16, or whatever the dtype of the activations is."""
    return product(a.dequantize(a.dtype), b.dequantize(a.dtype).t(), dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b`; a float32 result of two low operands is never rounded to theirs."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.float(), b.float()).to(dtype)


def scaled_mm(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """`torch.nn.functional.scaled_mm`, which is cuBLASLt.

    Some versions of torch take scales of a wrong layout for right ones, and return noise: they are
    checked here.
    """
    from torch.nn.functional import ScalingType

    rows = a.codes.shape[0]
    if rows % ROWS:
        a = _pad_rows(a, -rows % ROWS)
    scale_a = row_scale(a.scale)
    scale_b = rhs_scale(b.scale) if b.square else row_scale(b.scale)
    check_row_scale(scale_a, a.codes.shape)
    (check_rhs_scale if b.square else check_row_scale)(scale_b, b.codes.shape)
    out = F.scaled_mm(
        a.codes,
        b.codes.t(),
        scale_a=scale_a,
        scale_recipe_a=ScalingType.BlockWise1x128,
        scale_b=scale_b,
        scale_recipe_b=ScalingType.BlockWise128x128 if b.square else ScalingType.BlockWise1x128,
        output_dtype=dtype,
        use_fast_accum=False,
    )
    return out[:rows].contiguous() if rows % ROWS else out


def deepgemm(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """DeepGEMM's `fp8_gemm_nt`: bf16 from square blocks, float32 from rows."""
    package = backends.deep_gemm()
    rows, columns = a.codes.shape[0], b.codes.shape[0]
    with on_device_of(a.codes):
        if b.square:
            out = a.codes.new_empty(rows, columns, dtype=torch.bfloat16)
            left, right = (a.codes, column_major(a.scale)), (b.codes, b.scale.contiguous())
            package.fp8_gemm_nt(left, right, out, compiled_dims="nk")
            return out.to(dtype)
        # This kernel adds to a float32 matrix and has no form that doesn't.
        out = a.codes.new_zeros(rows, columns, dtype=torch.float32)
        left, right = (a.codes, column_major(a.scale)), (b.codes, column_major(b.scale))
        # The depth is a number of tokens: compiled in, each number would be a kernel of its own.
        package.fp8_gemm_nt(left, right, out, c=out, recipe=(1, 1, BLOCK), compiled_dims="n")
    return out.to(dtype)


def triton(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """Kernels of this package, of any size: `_gemm_triton`."""
    from miles.precision import _gemm_triton  # imports triton

    return _gemm_triton.dense(a, b, dtype)


_DENSE: dict[str, Callable[[Operand, Operand, torch.dtype], Tensor]] = {
    "reference": reference,
    "dequant_bf16": dequant_bf16,
    "scaled_mm": scaled_mm,
    "deepgemm": deepgemm,
    "triton": triton,
}


def row_scale(scale: Tensor) -> Tensor:
    """Scales `[R, D/128]` column by column without gaps: strides (1, R)."""
    rows, columns = scale.shape
    if scale.stride() == (1, rows):
        return scale
    out = torch.empty_strided((rows, columns), (1, rows), dtype=scale.dtype, device=scale.device)
    return out.copy_(scale)


def column_major(scale: Tensor) -> Tensor:
    """Scales `[R, D/128]` column by column, each column of a multiple of four."""
    rows, columns = scale.shape
    padded = -(-rows // 4) * 4
    if scale.stride() == (1, padded):
        return scale
    out = torch.zeros(columns, padded, dtype=scale.dtype, device=scale.device).t()[:rows]
    return out.copy_(scale)


def rhs_scale(scale: Tensor) -> Tensor:
    """Scales `[C/128, D/128]` of square blocks as `[L, C/128]` of strides (1, L).

    L is D/128 rounded up to a multiple of four; the scales beyond are 1 and multiply nothing.
    """
    rows, columns = scale.shape
    if columns % 4 == 0 and scale.stride() == (columns, 1):
        return scale.t()
    out = torch.ones(rows, columns + -columns % 4, dtype=scale.dtype, device=scale.device)
    out[:, :columns] = scale
    return out.t()


def check_row_scale(scale: Tensor, codes_shape: torch.Size) -> None:
    """Raise unless these are scales of `[R, D]` codes in 1 x 128 as `scaled_mm` reads them.

    Raises:
        ShapeError: another shape, dtype or order in memory.
    """
    rows, depth = codes_shape
    _check_layout(scale, (rows, -(-depth // BLOCK)), rows, "1 x 128", "row_scale")


def check_rhs_scale(scale: Tensor, codes_shape: torch.Size) -> None:
    """Raise unless these are scales of `[C, D]` codes in 128 x 128 as `scaled_mm` reads them.

    Raises:
        ShapeError: another shape, dtype or order in memory.
    """
    columns, depth = codes_shape
    blocks = -(-depth // BLOCK)
    blocks += -blocks % 4
    _check_layout(scale, (blocks, -(-columns // BLOCK)), blocks, "128 x 128", "rhs_scale")


def _check_layout(
    scale: Tensor, shape: tuple[int, int], leading: int, blocks: str, fix: str
) -> None:
    strides = scale.stride()
    ordered = strides[:1] == (1,) and (strides[1:] == (leading,) or scale.shape[1:] == (1,))
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape or not ordered:
        raise ShapeError(
            f"scales of {blocks} blocks are {scale.dtype} {tuple(scale.shape)} of strides "
            f"{strides}; expected float32 {shape} of strides (1, {leading}); scaled_mm would "
            f"multiply by the wrong ones without a word; bring them there with `{fix}`"
        )


def _pad_rows(a: Operand, count: int) -> Operand:
    codes = F.pad(a.codes.view(torch.uint8), (0, 0, 0, count)).view(a.codes.dtype)
    return a._replace(codes=codes, scale=F.pad(a.scale, (0, 0, 0, count), value=1.0))
