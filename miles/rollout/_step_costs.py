"""How long the steps of a speculating engine take, for the cost model of a controller."""

from __future__ import annotations

import statistics
from collections import deque
from time import perf_counter
from typing import Any

import torch

from miles.rollout.speculative.cost import CostSample, Kind

__all__ = ["StepCosts", "Stopwatch"]

RECENT = 64


class StepCosts:
    """The last times of every kind of step, batch and number of tokens."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Kind, int, int], deque[float]] = {}

    def add(self, kind: Kind, *, batch: int, tokens: int, seconds: float) -> None:
        """Note one, of however little time."""
        key = (kind, batch, tokens)
        self._seconds.setdefault(key, deque(maxlen=RECENT)).append(max(seconds, 1e-9))

    def samples(self) -> list[CostSample]:
        """Medians, since a shape's first steps and those with a prompt take longer."""
        return [
            CostSample(
                kind=kind, batch=batch, tokens=tokens, seconds=statistics.median(tuple(seconds))
            )
            for (kind, batch, tokens), seconds in sorted(self._seconds.items())
        ]


class Stopwatch:
    """Marks in a device's work, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """Now, or when the device gets here."""
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks that the device has passed."""
        if self._device.type != "cuda":
            return float(last - first)
        return float(first.elapsed_time(last)) / 1e3
