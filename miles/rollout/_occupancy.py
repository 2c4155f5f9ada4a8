"""Whether the rows that an engine runs are the last ones, and how long they go on."""

from __future__ import annotations

from collections.abc import Sequence

from miles.rollout._requests import Request
from miles.rollout.sample import Status

__all__ = ["Occupancy"]

PATIENCE = 8
"""Steps until a place that was left counts as empty: callers need a moment to send what is next."""
ENDINGS = 64
"""How many endings tell whether requests run into their length."""


class Occupancy:
    """What a controller should know where rows that end leave the batch to shrink.

    Where requests wait, others take their place. Where callers send one as an answer comes nobody
    waits, and what became of the last place that was left tells. Until one was left, the batch is
    taken to shrink.
    """

    def __init__(self) -> None:
        self._refilled = False
        self._vacant = 0
        """Steps since requests left and none has come, from 1 on; 0: some have, or none left."""
        self._truncated = 0.0
        """Share of the requests with stop tokens that ended by their length."""

    def came(self) -> None:
        """Requests have come in."""
        self._refilled = self._refilled or self._vacant > 0
        self._vacant = 0

    def left(self, request: Request, company: bool) -> None:
        """One has gone; `company`: others stay. Where none do, what comes next is a beginning."""
        self._vacant = max(self._vacant, 1) if company else 0
        self._refilled = self._refilled and company
        status = request.ending[0]
        if request.stop and status in (Status.COMPLETED, Status.TRUNCATED):
            self._truncated += ((status is Status.TRUNCATED) - self._truncated) / ENDINGS

    def remaining(
        self, requests: Sequence[Request], max_context: int, *, waiting: bool
    ) -> list[int] | None:
        """At the beginning of a step: the tokens that each is to get until it ends by its length;
        None where others will take their places, or where most end before."""
        if self._vacant:
            self._vacant += 1
            self._refilled = self._refilled and self._vacant <= PATIENCE
        if waiting or self._refilled:
            return None
        if self._truncated < 0.5 and any(request.stop for request in requests):
            return None
        return [request.remaining(max_context) for request in requests]
