"""Block FP8, in plain PyTorch: what every kernel is held to, bit for bit.

Shapes: a block's largest magnitude `amax` and its scales, one a block.

Every division is one of tensors: torch computes `448 / t` as `t.reciprocal() * 448`, which is
another number for a quarter of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miles.precision import _blocks
from miles.precision.recipes import BlockFP8, Role

__all__ = ["PROFILES", "block_shape", "decode", "encode"]

MAX = 448.0
E4M3 = torch.float8_e4m3fn
_FLOAT32_MAX = torch.finfo(torch.float32).max

# amax, power of two or not -> what an element is multiplied by, what a code is multiplied by.
Profile = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def _div(a: Tensor | float, b: Tensor | float) -> Tensor:
    """True division of float32, also by a number."""
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    tensors = [x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (a, b)]
    return torch.div(*tensors)


def _te(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    multiplier = _div(MAX, amax).clamp(max=_FLOAT32_MAX)  # 448 / 1e-45 is infinite
    if power_of_two:
        multiplier = _blocks.floor_power_of_two(multiplier)
    multiplier = torch.where(amax == 0, 1.0, multiplier)
    return multiplier, _div(1.0, multiplier)


def _deepgemm(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    scale = _div(amax.clamp(min=1e-4), MAX)
    if power_of_two:
        scale = _blocks.ceil_power_of_two(scale)
    return _div(1.0, scale), scale


def _sglang(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    amax = amax.clamp(min=1e-10)
    if power_of_two:
        scale = _blocks.ceil_power_of_two(_div(amax, MAX))
        return _div(1.0, scale), scale
    return _div(MAX, amax), amax * torch.full_like(amax, 1 / MAX)


def _vllm(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    scale = _div(amax.clamp(min=1e-10), MAX)
    if power_of_two:
        scale = _blocks.ceil_power_of_two(scale)
    return scale, scale


def _hf(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if power_of_two:
        # It takes a logarithm, whose result is the same for all but subnormal numbers.
        scale = _blocks.ceil_power_of_two(_div(amax, MAX))
        scale = torch.where(amax == 0, 1.0, scale)
        return _div(1.0, scale), scale
    multiplier = amax.reciprocal() * MAX
    multiplier = torch.where(amax == 0, 1.0, multiplier)
    return multiplier, _div(1.0, multiplier)


PROFILES: dict[str, Profile] = {
    "te": _te,
    "deepgemm": _deepgemm,
    "sglang": _sglang,
    "vllm": _vllm,
    "hf": _hf,
}
"""How each engine rounds activations on line: a block's `amax` to its multiplier and its scale.
With "vllm" an element is divided by the scale instead."""


def block_shape(recipe: BlockFP8, role: Role) -> tuple[int, int]:
    """Elements that share a scale, along the last two dimensions."""
    return (recipe.block, recipe.block) if role == "weight" else (1, recipe.block)


def encode(tensor: Tensor, recipe: BlockFP8, role: Role) -> tuple[Tensor, Tensor]:
    """E4M3 codes of the tensor's shape, and float32 scales, one a block.

    All of a block that holds NaN or infinity is NaN: its codes and its scale.
    """
    x = tensor.float()
    blocks = block_shape(recipe, role)
    amax = (_blocks.tiles if blocks[0] > 1 else _blocks.rows)(x.abs(), recipe.block).amax(-1)
    profile = recipe.profile if role == "activation" else "te"
    multiplier, scale = PROFILES[profile](amax, recipe.scale == "ue8m0")
    multiplier = multiplier.clamp(max=_FLOAT32_MAX)  # "hf" divides subnormal numbers into infinity
    finite = amax.isfinite()
    multiplier, scale = (torch.where(finite, t, torch.nan) for t in (multiplier, scale))
    at = _blocks.spread(multiplier, x.shape, blocks)
    scaled = torch.div(x, at) if profile == "vllm" else x * at
    # Some versions of torch cast what is above 448 to NaN.
    codes = scaled.clamp(-MAX, MAX).to(E4M3)
    return codes, scale.to(getattr(torch, recipe.store))


def decode(codes: Tensor, scale: Tensor, recipe: BlockFP8, role: Role) -> Tensor:
    """The float32 numbers that codes and scales stand for."""
    at = _blocks.spread(scale.float(), codes.shape, block_shape(recipe, role))
    return codes.float() * at
