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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from miles.sync import _kernels
from miles.sync._plan import ALIGNMENT

__all__ = ["BLOCK", "block_sums", "checksum", "checksums", "salt", "weights", "wrap"]

BLOCK = 4096
"""Bytes that share a sum in `block_sums`."""
_ROWS, _WORDS = BLOCK // ALIGNMENT, ALIGNMENT // 8
# The golden ratio's and splitmix64's odd constants, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_PART = 1 << 21
"""Words that are worth a thread of their own."""


class _Piece(Protocol):
    @property
    def start(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


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
    sums_B = torch.cat([_sums(flat[: full * BLOCK], _ROWS), _sums(tail, _ROWS)])
    return int((_mix(torch.arange(full + 1, device=flat.device)) * sums_B).sum())


def checksums(data: Tensor, pieces: Sequence[_Piece]) -> Tensor:
    """What each piece adds to the checksum of its tensor; on a GPU without waiting for it.

    Args:
        data: uint8, a multiple of 256 long; pieces are at multiples of 256 and followed by zeros.
        pieces: in order, without gaps but the zeros.

    Returns:
        int64 `[pieces]`, on the device of `data`.
    """
    firsts = [piece.offset // ALIGNMENT for piece in pieces]
    counts = [-(-piece.nbytes // ALIGNMENT) for piece in pieces]
    shifts = [piece.start // ALIGNMENT - first for piece, first in zip(pieces, firsts, strict=True)]
    table = torch.tensor([firsts, counts, shifts], dtype=torch.int64).to(data.device)
    num_rows = data.numel() // ALIGNMENT
    max_block = max((piece.start + piece.nbytes) // BLOCK for piece in pieces)
    rows_R = torch.arange(num_rows, device=data.device)
    rows_R += torch.repeat_interleave(table[2], table[1], output_size=num_rows)
    before_R1 = torch.zeros(num_rows + 1, dtype=torch.int64, device=data.device)
    sums_R = _sums(data, 1).mul_(_of_rows(data.device)[rows_R % _ROWS])
    sums_R *= _mix(torch.arange(max_block + 1, device=data.device))[rows_R // _ROWS]
    torch.cumsum(sums_R, 0, out=before_R1[1:])
    return before_R1[table[0] + table[1]] - before_R1[table[0]]


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
    return _sums(data, _ROWS).add_(salt(version))


@functools.cache
def weights(num_rows: int, device: torch.device) -> Tensor:
    """int64, of the words of a row, `w(j)`, or of those of a block's 16 rows, `h(r) * w(j)`."""
    weights_J = _mix(torch.arange(_WORDS) + 2**32).to(device)
    return weights_J if num_rows == 1 else (_of_rows(device)[:, None] * weights_J).flatten()


@functools.cache
def _of_rows(device: torch.device) -> Tensor:
    return _mix(torch.arange(_ROWS) + 2**33).to(device)


def _sums(data: Tensor, num_rows: int) -> Tensor:
    """int64: the weighted sum of every row, or of every 16."""
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()
    words_BK = data.view(torch.int64).view(-1, num_rows * _WORDS)
    weights_K = weights(num_rows, data.device)
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
