"""Which weights computed which rows of a tape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miles.errors import RoutingError

__all__ = ["RoutingSpan", "checked", "clipped", "joined", "taken"]


class RoutingSpan(NamedTuple):
    """Rows `start..end-1` of a tape were computed with these weights.

    `Sample.spans` says which weights sampled a token; this says which weights processed it.
    """

    start: int
    """First row."""
    end: int
    """One past the last row."""
    weight_version: int
    """Version that the engine served then."""


def checked(spans: Iterable[Sequence[int]], num_rows: int) -> tuple[RoutingSpan, ...]:
    """Spans in their one form: in order, and touching ones of one version merged."""
    out: list[RoutingSpan] = []
    end = 0
    for triple in spans:
        if len(triple) != 3:
            raise RoutingError(f"got span {triple!r}; expected (start, end, weight_version)")
        span = RoutingSpan(*(int(number) for number in triple))
        if not end <= span.start < span.end <= num_rows:
            raise RoutingError(
                f"{span} does not fit {num_rows} rows after a span that ends at {end}; expected "
                "spans in order, within the rows, without overlap"
            )
        end = span.end
        _push(out, span)
    return tuple(out)


def clipped(spans: Sequence[RoutingSpan], start: int, stop: int) -> tuple[RoutingSpan, ...]:
    """The spans of rows `start..stop-1`, counted from `start`."""
    return tuple(
        RoutingSpan(max(a, start) - start, min(b, stop) - start, version)
        for a, b, version in spans
        if max(a, start) < min(b, stop)
    )


def joined(parts: Iterable[tuple[Sequence[RoutingSpan], int]]) -> tuple[RoutingSpan, ...]:
    """The spans of several tapes, each moved to the row where its tape begins."""
    out: list[RoutingSpan] = []
    for spans, offset in parts:
        for start, end, version in spans:
            _push(out, RoutingSpan(start + offset, end + offset, version))
    return tuple(out)


def taken(spans: Sequence[RoutingSpan], index_N: Tensor) -> tuple[RoutingSpan, ...]:
    """The spans after the rows `index_N` were picked; -1 picks none."""
    if not spans:
        return ()
    starts_S, ends_S = torch.tensor([span[:2] for span in spans]).unbind(1)
    ends_S = ends_S.contiguous()
    which_N = torch.searchsorted(ends_S, index_N.contiguous(), right=True)
    inside_N = (which_N < len(spans)) & (index_N >= starts_S[which_N.clamp(max=len(spans) - 1)])
    runs, counts = torch.unique_consecutive(torch.where(inside_N, which_N, -1), return_counts=True)
    out: list[RoutingSpan] = []
    row = 0
    for which, count in zip(runs.tolist(), counts.tolist(), strict=True):
        if which >= 0:
            _push(out, RoutingSpan(row, row + count, spans[which].weight_version))
        row += count
    return tuple(out)


def _push(out: list[RoutingSpan], span: RoutingSpan) -> None:
    """Append, or lengthen the last one if it touches and has the same version."""
    if out and out[-1].end == span.start and out[-1].weight_version == span.weight_version:
        out[-1] = out[-1]._replace(end=span.end)
    else:
        out.append(span)
