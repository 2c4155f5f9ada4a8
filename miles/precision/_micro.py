"""MXFP8 and NVFP4, in plain PyTorch.

Shapes: `[..., K]` in ceil(K / 32) or ceil(K / 16) blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.precision import _blocks
from miles.precision._fp8 import E4M3, MAX
from miles.precision.recipes import MXFP8, NVFP4

__all__ = [
    "E2M1",
    "decode_mxfp8",
    "decode_nvfp4",
    "encode_mxfp8",
    "encode_nvfp4",
    "pack_nvfp4",
    "unpack_nvfp4",
]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MAX = E2M1[-1]
_FLOAT32_MAX = torch.finfo(torch.float32).max


def encode_mxfp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of the tensor's shape, and E8M0 scales, one a block; all NaN where one is."""
    x = tensor.float()
    amax = _blocks.rows(x.abs(), MXFP8.block).amax(-1)
    ratio = torch.div(amax, torch.full_like(amax, MAX))
    # An E8M0 number is the exponent's bits of a float32, rounded up if anything is below them.
    bits = ratio.view(torch.int32)
    exponent = (bits + 0x7FFFFF) >> 23
    exponent = torch.where(bits <= 1 << 22, 0, exponent)  # 2^-127, the smallest of all, is below
    exponent = torch.where(amax.isfinite(), exponent, 255)
    scale = exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    at = _blocks.spread(scale.float(), x.shape, (MXFP8.block,))
    codes = torch.div(x, at).clamp(-MAX, MAX).to(E4M3)
    return codes, scale


def decode_mxfp8(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 numbers that codes and scales stand for."""
    return codes.float() * _blocks.spread(scale.float(), codes.shape, (MXFP8.block,))


def encode_nvfp4(tensor: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes 0..15 of the tensor's shape, E4M3 scales, one a block, and the global scale.

    `largest` is the largest magnitude under the global scale, where that is not of this tensor
    alone.
    """
    x = tensor.float()
    amax = _blocks.rows(x.abs(), NVFP4.block).amax(-1)
    if largest is None:
        whole = amax.amax() if amax.numel() else amax.new_zeros(())
    else:
        whole = largest.float()
    whole_scale = torch.div(whole, torch.full_like(whole, MAX * _E2M1_MAX))
    whole_scale = torch.where(whole_scale == 0, 1.0, whole_scale)
    wanted = torch.div(torch.div(amax, torch.full_like(amax, _E2M1_MAX)), whole_scale)
    scale = wanted.clamp(max=MAX).to(E4M3)
    # One multiplier for each block, as the engines have it.
    whole_multiplier = torch.div(torch.ones_like(whole_scale), whole_scale)
    multiplier = torch.div(whole_multiplier.clamp(max=_FLOAT32_MAX), scale.float())
    multiplier = torch.where(scale.float() == 0, 0.0, multiplier.clamp(max=_FLOAT32_MAX))
    scaled = x * _blocks.spread(multiplier, x.shape, (NVFP4.block,))
    return _to_e2m1(scaled), scale, whole_scale


def decode_nvfp4(codes: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """The float32 numbers that codes and scales stand for."""
    table = torch.tensor(E2M1, device=codes.device)
    values = table[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    at = _blocks.spread(scale.float() * global_scale, codes.shape, (NVFP4.block,))
    return values * at


def _to_e2m1(x: Tensor) -> Tensor:
    """Nearest of the eight magnitudes, ties to the even code; above the last, the last."""
    table = torch.tensor(E2M1, device=x.device)
    middles = (table[:-1] + table[1:]) / 2
    magnitude = x.abs()
    # A tie goes down from an even code (right=False counts middles strictly below) ...
    code = torch.bucketize(magnitude, middles)
    # ... and up from an odd one.
    tie = magnitude == middles[code.clamp(max=len(middles) - 1)]
    code = code + (tie & (code % 2 == 1))
    return (code + 8 * (x.signbit())).to(torch.uint8)


def pack_nvfp4(codes: Tensor) -> Tensor:
    """uint8 `[..., K / 2]`: two codes each, the first in the lower bits."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nvfp4(packed: Tensor) -> Tensor:
    """The inverse of `pack_nvfp4`."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)
