"""The checksum of bytes, computed where they are: one number for a tensor, or one for each block.

The bytes, padded with zeros, are blocks of 16 rows of 32 little-endian int64 words `x[b, r, j]`.
The checksum is the sum of `g(b) * h(r) * w(j) * x[b, r, j]` modulo 2^64, with odd weights that look
random. A change of one word always changes it. Rows that change places, are dropped or repeated,
and bytes that are shifted, go unseen with a probability of about 2^-60; so do two words that change
places, unless they differ in nothing but their highest bits (19, in a block, at most). It is the
same number on every device and in any order of adding, and the sum of those of a tensor's pieces.
It guards against faults, not against forgers.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.sync import _kernels

__all__ = ["BLOCK", "block_sums", "checksum", "salt", "weights", "wrap"]

BLOCK = 4096
"""Bytes that share a sum in `block_sums`."""
_ROWS, _WORDS = 16, 32
# The golden ratio's and splitmix64's odd constants, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_PART = 1 << 21
"""Words that are worth a thread of their own."""


def wrap(number: int) -> int:
    """A sum of checksums as the signed 64-bit number that it is modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def salt(version: int) -> int:
    """What `block_sums` adds to every sum."""
    return wrap(version * _GOLDEN)


def checksum(tensor: Tensor) -> int:
    """The checksum of a tensor's bytes, whatever its dtype and strides.

    Example:
        >>> a, b = torch.tensor([1, 0]), torch.tensor([0, 1])
        >>> checksum(torch.zeros(3)), checksum(a) == checksum(b)
        (0, False)
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    full = flat.numel() // BLOCK
    tail = flat.new_zeros(BLOCK)
    tail[: flat.numel() - full * BLOCK] = flat[full * BLOCK :]
    sums_B = torch.cat([_sums(flat[: full * BLOCK]), _sums(tail)])
    return int((_mix(torch.arange(full + 1, device=flat.device)) * sums_B).sum())


def block_sums(data: Tensor, *, version: int) -> Tensor:
    """The checksum of each block of 4096 bytes by itself, plus a number that the version decides.

    Sums are compared block by block, so a block that lies elsewhere shows. What an earlier version
    left behind agrees with itself but not with this one.

    Args:
        data: uint8 `[n]`, n a multiple of `BLOCK`.
        version: of the weights.

    Returns:
        int64 `[n / BLOCK]`.

    Example:
        >>> data = torch.zeros(2 * BLOCK, dtype=torch.uint8)
        >>> data[BLOCK] = 5
        >>> sums = block_sums(data, version=1) - block_sums(torch.zeros_like(data), version=1)
        >>> sums.tolist() == [0, checksum(data[BLOCK:])]
        True
    """
    return _sums(data).add_(salt(version))


@functools.cache
def weights(device: torch.device) -> Tensor:
    """int64, of the words of a block, `h(r) * w(j)`."""
    of_words_J = _mix(torch.arange(_WORDS) + 2**32)
    of_rows_R = _mix(torch.arange(_ROWS) + 2**33)
    return (of_rows_R[:, None] * of_words_J).flatten().to(device)


def _sums(data: Tensor) -> Tensor:
    """int64: the weighted sum of every block."""
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()
    words_BK = data.view(torch.int64).view(-1, BLOCK // 8)
    weights_K = weights(data.device)
    sums_B = torch.empty(len(words_BK), dtype=torch.int64, device=data.device)
    if data.device.type == "cpu":
        _add_up(words_BK.numpy(), weights_K.numpy(), sums_B.numpy())
    elif (kernels := _kernels.of(data.device)) is not None:
        kernels.sums(words_BK, weights_K, sums_B)
    else:  # the products take as much room as the words
        for part, out in zip(words_BK.split(1 << 16), sums_B.split(1 << 16), strict=True):
            torch.sum(part * weights_K, 1, out=out)
    return sums_B


def _add_up(words_BK: Any, weights_K: Any, sums_B: Any) -> None:
    """By numpy, which multiplies and adds in one pass: torch's integers take three."""

    def part(first: int, end: int) -> None:
        np.einsum("bk,k->b", words_BK[first:end], weights_K, out=sums_B[first:end])

    threads = min(torch.get_num_threads(), words_BK.size // _PART)
    if threads < 2:
        return part(0, len(words_BK))
    ends = [len(words_BK) * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, ends[:-1], ends[1:]))


def _mix(numbers: Tensor) -> Tensor:
    """Odd numbers that look random, by splitmix64; `>>` keeps the sign, which does no harm."""
    mixed = numbers * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    return (mixed ^ (mixed >> 31)) | 1
