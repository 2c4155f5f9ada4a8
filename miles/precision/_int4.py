"""INT4 with a scale for each group along the last dimension, in plain PyTorch.

Shapes: weights `[..., K]` in K / group_size groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.errors import ShapeError
from miles.precision import _blocks
from miles.precision.recipes import Int4

__all__ = ["check_groups", "decode", "encode", "pack", "unpack"]

_PER_INT32 = 8


def check_groups(weight: Tensor, recipe: Int4) -> None:
    """Raise if the groups don't divide the last dimension."""
    size = recipe.group_size
    if weight.shape[-1] % size:
        raise ShapeError(
            f"the weight has shape {tuple(weight.shape)} and the groups {size} elements; expected "
            "a last dimension that they divide; choose another group_size or leave it unquantised"
        )


def encode(weight: Tensor, recipe: Int4) -> tuple[Tensor, Tensor]:
    """int8 codes of the weight's shape, and scales `[..., K / group_size]`.

    The scale of a group that holds NaN or infinity is not finite, so that no weight of it is.
    """
    check_groups(weight, recipe)
    groups = _blocks.rows(weight, recipe.group_size)
    amax = groups.abs().amax(-1)
    scale = torch.div(amax, torch.full_like(amax, recipe.divisor))
    scale = scale.to(getattr(torch, recipe.scale_dtype))
    scale = torch.where(scale == 0, 1, scale)
    # The dtype of the division is part of the contract: engines' tools divide in the weight's.
    codes = torch.div(groups, scale.to(weight.dtype)[..., None]).round()
    return codes.clamp(recipe.lowest, 7).to(torch.int8).flatten(-2), scale


def decode(codes: Tensor, scale: Tensor, recipe: Int4, dtype: torch.dtype) -> Tensor:
    """The numbers that codes and scales stand for; one rounding, to `dtype`."""
    groups = _blocks.rows(codes, recipe.group_size).to(dtype)
    return (groups * scale.to(dtype)[..., None]).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """int32 `[..., K / 8]` of int8 `[..., K]`: eight codes each, the first in the lowest bits."""
    nibbles = _blocks.rows(codes.to(torch.int32) + 8, _PER_INT32)
    shifts = torch.arange(_PER_INT32, device=codes.device, dtype=torch.int32) * 4
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(_PER_INT32, device=packed.device, dtype=torch.int32) * 4
    nibbles = (packed[..., None] >> shifts) & 0xF
    return (nibbles - 8).to(torch.int8).flatten(-2)
