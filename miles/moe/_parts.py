"""The storage of a tape: pieces of memory laid end to end, some of which other tapes may share.

Shapes: n rows of one part, N rows of all, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Part", "cut", "holes_of", "ids_of"]

Part = tuple[Tensor, Tensor | None]
"""Ids `[n, M, K]` and, if some of these rows are missing, bool `[n]` that says which."""


def ids_of(parts: Sequence[Part]) -> Tensor:
    """The ids of all rows, in new memory if there are several parts."""
    return parts[0][0] if len(parts) == 1 else torch.cat([ids for ids, _ in parts])


def holes_of(parts: Sequence[Part]) -> Tensor | None:
    """bool `[N]`, rows that are missing, in new memory if there are several parts; None if none."""
    if len(parts) == 1:
        return parts[0][1]
    if all(holes is None for _, holes in parts):
        return None
    return torch.cat(
        [
            torch.zeros(len(ids), dtype=torch.bool) if holes is None else holes
            for ids, holes in parts
        ]
    )


def cut(parts: Sequence[Part], start: int, stop: int) -> tuple[Part, ...]:
    """Rows `start..stop-1`, where they lie; one part at least, for its M and K."""
    out: list[Part] = []
    for ids, holes in parts:
        rows = slice(max(start, 0), max(stop, 0))
        out.append((ids[rows], None if holes is None else holes[rows]))
        start, stop = start - len(ids), stop - len(ids)
    return tuple([part for part in out if len(part[0])] or out[:1])
