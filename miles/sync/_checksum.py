"""A 64-bit checksum of a tensor's bytes, computed where the tensor is.

The bytes, padded with zeros to rows of 256, are 64 little-endian int32 words `x[r, j]` to a row.
The checksum is the sum of `g(r) * w(j) * x[r, j]` modulo 2^64, with odd weights that look random. A
change of one word always changes it; two words that change places, or rows that are dropped,
repeated or exchanged, go unseen with a probability of about 2^-32. It is the same number on every
device, and the sum of those of a tensor's pieces. It guards against faults, not against forgers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from miles.sync._plan import ALIGNMENT

__all__ = ["checksum", "checksums", "wrap"]

WORDS = ALIGNMENT // 4
# The golden ratio's and splitmix64's odd constants, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


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
    rows_R = torch.arange(num_rows, device=data.device)
    rows_R += torch.repeat_interleave(table[2], table[1], output_size=num_rows)
    before_R1 = torch.zeros(num_rows + 1, dtype=torch.int64, device=data.device)
    torch.cumsum(_row_sums(data).mul_(_mix(rows_R)), 0, out=before_R1[1:])
    return before_R1[table[0] + table[1]] - before_R1[table[0]]


def checksum(tensor: Tensor) -> int:
    """The checksum of a tensor's bytes, whatever its dtype and strides.

    Example:
        >>> a, b = torch.tensor([1, 0]), torch.tensor([0, 1])
        >>> checksum(torch.zeros(3)), checksum(a) == checksum(b)
        (0, False)
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    full = flat.numel() // ALIGNMENT * ALIGNMENT
    head, tail = flat[:full], flat.new_zeros(ALIGNMENT)
    tail[: flat.numel() - full] = flat[full:]
    if head.data_ptr() % 4 or head.storage_offset() % 4:
        head = head.clone()
    total = 0
    for data, first in ((head, 0), (tail, full // ALIGNMENT)):
        rows_R = torch.arange(first, first + data.numel() // ALIGNMENT, device=data.device)
        total += int(_row_sums(data).mul_(_mix(rows_R)).sum())
    return wrap(total)


def _row_sums(data: Tensor) -> Tensor:
    """int64 `[R]`: the sum of `w(j) * x[r, j]` over j."""
    words_RJ = data.view(torch.int32).view(-1, WORDS)
    weights_J = _mix(torch.arange(WORDS, device=data.device) + 2**32)
    sums_R = torch.empty(words_RJ.shape[0], dtype=torch.int64, device=data.device)
    # The products take twice the room of the words: in a CPU's cache, so much the faster.
    step = 1 << 18 if data.device.type == "cuda" else 1 << 12
    for start in range(0, words_RJ.shape[0], step):
        part_RJ = words_RJ[start : start + step]
        torch.sum(part_RJ * weights_J, 1, out=sums_R[start : start + step])
    return sums_R


def _mix(numbers: Tensor) -> Tensor:
    """Odd numbers that look random, by splitmix64; `>>` keeps the sign, which does no harm."""
    mixed = numbers * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    return (mixed ^ (mixed >> 31)) | 1
