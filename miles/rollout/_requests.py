"""What the embedded engine knows of a request."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miles.errors import EmptyBatchError, RoutingError
from miles.moe.tape import RoutingTape
from miles.rollout._sampling import Draws
from miles.rollout.sample import Sample, SamplingParams, Status

__all__ = ["Request", "new_sample", "resolve", "seed_of"]


@dataclass(eq=False)
class Request:
    """A request on its way through the engine."""

    request_id: str
    sample: Sample
    params: SamplingParams
    stop: frozenset[int]
    draws: Draws
    num_generated: int
    slot: int = -1
    ending: tuple[Status, str] = (Status.PENDING, "")
    error: Exception | None = None
    prompt_routing: RoutingTape | None = None
    """What its first pass here adds to the routing that its sample came with."""
    step_routing: list[tuple[Tensor, int, int]] = field(default_factory=list)
    """Stored ids `[R, M, K]` of a step, the row that is its own, and the version of the weights."""
    future: Future[Sample] = field(default_factory=Future)

    @property
    def ended(self) -> bool:
        """Whether it needs no further token."""
        return self.ending[0] is not Status.PENDING

    def complete_routing(self) -> None:
        """Append what was recorded here to what the sample came with; a fault is its error."""
        if self.prompt_routing is None:
            return
        kept = [] if self.sample.routing is None else [self.sample.routing]
        new = self.prompt_routing
        if self.step_routing:
            ids = torch.stack([ids_RMK[row] for ids_RMK, row, _ in self.step_routing])
            spans, end = [], 0
            for version, steps in itertools.groupby(version for *_, version in self.step_routing):
                start, end = end, end + sum(1 for _ in steps)
                spans.append((start, end, version))
            new = RoutingTape.cat([new, new._with(ids, None, ()).with_spans(spans)], copy=False)
        self.sample.routing = RoutingTape.cat([*kept, new], copy=False)
        if self.error is None:
            num_tokens = len(self.sample.tokens) - sum(map(len, kept))
            try:
                new.validate(num_tokens=num_tokens, request_id=self.request_id)
            except RoutingError as error:
                self.error = error


def resolve(requests: list[Request]) -> None:
    """Hand over what these requests came to."""
    for request in requests:
        if not request.future.set_running_or_notify_cancel():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.sample)


def seed_of(sample: Sample, params: SamplingParams) -> int | None:
    """A resumed sample goes on with the draws it began with, unless told otherwise."""
    if params.seed is None and sample.spans:
        seed: int | None = sample.metadata.get("seed")
        return seed
    return params.seed


def new_sample(prompt: Sequence[int]) -> Sample:
    """A sample that is only a prompt."""
    if not len(prompt):
        raise EmptyBatchError("the prompt has no token; expected at least one")
    return Sample(tokens=[int(token) for token in prompt])
