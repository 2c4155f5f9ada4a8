"""Checksums of bytes in memory: the same on every device, one read, nothing left behind."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "block_sums"]

BLOCK = 4096
"""Bytes that share a sum."""


def block_sums(data: Tensor, *, version: int) -> Tensor:
    """The sum of each block's 64-bit words, modulo 2^64.

    Any change of a single word shows, and so does a block that lies elsewhere, since sums are
    compared block by block; two words that change places within a block don't. The version goes
    into every sum: what an earlier version left behind agrees with itself but not with this one.

    Args:
        data: uint8 `[n]`, n a multiple of `BLOCK`, aligned to 8 bytes.
        version: of the weights.

    Returns:
        int64 `[n / BLOCK]`.

    Example:
        >>> data = torch.zeros(2 * BLOCK, dtype=torch.uint8)
        >>> data[BLOCK] = 5
        >>> (block_sums(data, version=1) - block_sums(torch.zeros_like(data), version=1)).tolist()
        [0, 5]
    """
    salt = (version * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)
    return data.view(torch.int64).view(-1, BLOCK // 8).sum(1) + salt
