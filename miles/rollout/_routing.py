"""Routing of decoding steps, brought to the host many steps at a time.

A copy for every step would make the device wait for the host between the step and its sampling.

Shapes: R requests in a step, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miles.moe.tape import RoutingSpan, RoutingTape

__all__ = ["StepRouting", "StepRow", "rows_of"]


class _Steps:
    """The same requests in some steps, one after the other."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []
        self._host_SRMK: Tensor | None = None

    def read(self) -> Tensor:
        """All steps, on the host; none is added afterwards."""
        if self._host_SRMK is None:
            self._host_SRMK = torch.stack(self.waiting).cpu()
            self.waiting = []
        return self._host_SRMK

    @property
    def was_read(self) -> bool:
        return self._host_SRMK is not None


class StepRow(NamedTuple):
    """Where the routing of one token is, and which weights it is of."""

    steps: _Steps
    step: int
    row: int
    weight_version: int


class StepRouting:
    """Takes the expert ids of every step; requests read theirs when they end."""

    def __init__(self) -> None:
        self._steps = _Steps()

    def add(self, ids_RMK: Tensor, weight_version: int) -> list[StepRow]:
        """Note a step; returns where each of its R rows is."""
        steps = self._steps
        if steps.was_read or (steps.waiting and steps.waiting[0].shape != ids_RMK.shape):
            steps = self._steps = _Steps()
        steps.waiting.append(ids_RMK)
        step = len(steps.waiting) - 1
        return [StepRow(steps, step, row, weight_version) for row in range(len(ids_RMK))]


def rows_of(like: RoutingTape, noted: Sequence[StepRow]) -> RoutingTape:
    """The rows of one request as a tape like another of its model, with their spans."""
    parts, spans, end = [], [], 0
    # Between two that follow each other there may be steps whose tokens were not kept.
    for (steps, _, row, version), run in itertools.groupby(
        enumerate(noted),
        lambda one: (one[1].steps, one[1].step - one[0], one[1].row, one[1].weight_version),
    ):
        (_, first), *others = run
        count = 1 + len(others)
        parts.append(steps.read()[first.step : first.step + count, row])
        spans.append(RoutingSpan(end, end + count, version))
        end += count
    return like._with(torch.cat(parts), None, ()).with_spans(spans)
