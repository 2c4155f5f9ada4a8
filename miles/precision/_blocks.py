"""Blocks of a tensor, and powers of two, by their bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ceil_power_of_two", "floor_power_of_two", "rows", "spread", "tiles"]


def rows(tensor: Tensor, size: int) -> Tensor:
    """`[..., K]` as `[..., ceil(K / size), size]`, zeros at the end."""
    padded = F.pad(tensor, (0, -tensor.shape[-1] % size))
    blocks: Tensor = padded.unflatten(-1, (padded.shape[-1] // size, size))  # also of no rows
    return blocks


def tiles(tensor: Tensor, size: int) -> Tensor:
    """`[..., N, K]` as `[..., ceil(N / size), ceil(K / size), size * size]`, zeros at the ends."""
    n, k = tensor.shape[-2:]
    padded = F.pad(tensor, (0, -k % size, 0, -n % size))
    cut = padded.reshape(*padded.shape[:-2], -(-n // size), size, -(-k // size), size)
    return cut.transpose(-3, -2).flatten(-2)


def spread(scale: Tensor, shape: torch.Size, blocks: tuple[int, ...]) -> Tensor:
    """A block's scale at each of its elements; `blocks` are the sizes along the last dimensions."""
    for dim, size in enumerate(reversed(blocks), 1):
        scale = scale.repeat_interleave(size, -dim).narrow(-dim, 0, shape[-dim])
    return scale


_MANTISSA = 0x7FFFFF


def floor_power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below a positive float32; exact, no logarithm."""
    return (x.view(torch.int32) & ~_MANTISSA).view(torch.float32)


def ceil_power_of_two(x: Tensor) -> Tensor:
    """The power of two at or above a positive normal float32; exact, no logarithm."""
    bits = x.view(torch.int32)
    return ((bits + _MANTISSA) & ~_MANTISSA).view(torch.float32)
