"""Sources for `_copies.copy`, of every kind, in two copies of a destination; on any device."""

import numpy as np
import torch

from miles.sync import _copies
from miles.sync._checksum import BLOCK
from miles.sync._copies import Pieces


def sources(device, *, exact: bool):
    """(tensor, dtype, first byte) by what is odd of them.

    `exact` float32 need no rounding to bfloat16, which Triton's interpreter does in its own way.
    """
    generator = torch.Generator().manual_seed(0)

    def of(*shape, dtype=torch.uint8):
        made = torch.randint(256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
        return made.to(device).view(dtype).view(shape)

    def normal(*shape):
        made = torch.randn(shape, generator=generator)
        return (made.bfloat16().float() if exact else made).to(device)

    return {
        "whole blocks": (of(3 * BLOCK), torch.uint8, 0),
        "more than a program": (of(35 * BLOCK + 16), torch.uint8, 0),
        "its later bytes": (of(5 * BLOCK + 48), torch.uint8, 2 * BLOCK),
        "no bytes": (of(0), torch.uint8, 0),
        "a byte": (of(1), torch.uint8, 0),
        "16 bytes": (of(16), torch.uint8, 0),
        "odd": (of(5, 9, dtype=torch.bfloat16), torch.bfloat16, 0),
        "odd, of two blocks": (of(4099), torch.uint8, 0),
        "scalar": (of(dtype=torch.float32), torch.float32, 0),
        "float8": (of(64, 96, dtype=torch.float8_e4m3fn), torch.float8_e4m3fn, 0),
        "int64": (of(1000, dtype=torch.int64), torch.int64, 0),
        "misaligned view": (of(3000, dtype=torch.bfloat16)[3:2051], torch.bfloat16, 0),
        "aligned view": (of(40, 64, dtype=torch.bfloat16)[7:], torch.bfloat16, 0),
        "rounded": (normal(64, 36), torch.bfloat16, 0),
        "rounded, later bytes": (normal(100, 100), torch.bfloat16, 3 * BLOCK),
        "rounded, of many programs": (normal(300, 256), torch.bfloat16, 0),
        "rounded, to four bytes": (normal(4), torch.bfloat16, 0),
    }


def both(device, write, *, exact: bool) -> None:
    """`write` and the reference leave the same bytes and sums."""
    given = sources(device, exact=exact)
    assert all(_copies.is_taken(t, dtype, t.device) for t, dtype, _ in given.values())
    nbytes = [t.numel() * dtype.itemsize - start for t, dtype, start in given.values()]
    blocks = [-(-n // BLOCK) for n in nbytes]
    order = np.random.default_rng(0).permutation(len(blocks))  # places in another order
    places = np.empty(len(blocks), dtype=np.int64)
    places[order] = 1 + np.cumsum([0, *[blocks[i] + 1 for i in order[:-1]]])  # with gaps
    total = sum(blocks) + len(blocks) + 1
    pieces = Pieces(np.array([start for *_, start in given.values()]), np.array(nbytes), places)
    found = []
    for how in (_copies.reference, write):
        out = torch.full((total * BLOCK,), 7, dtype=torch.uint8, device=device)
        sums = torch.full((total,), 7, dtype=torch.int64, device=device)
        tensors, dtypes, _ = zip(*given.values(), strict=True)
        how(tensors, dtypes, pieces, out, sums, version=3)
        found.append((out.cpu(), sums.cpu()))
    (out, sums), (other, others) = found
    for name, place, count in zip(given, places.tolist(), blocks, strict=True):
        there = slice(place * BLOCK, (place + count) * BLOCK)
        assert torch.equal(out[there], other[there]), name
        assert torch.equal(sums[place : place + count], others[place : place + count]), name
    assert torch.equal(out, other) and torch.equal(sums, others), "a gap was written"
