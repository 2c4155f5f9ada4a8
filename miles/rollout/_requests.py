"""What the embedded engine knows of a request."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from miles.errors import EmptyBatchError, RoutingError
from miles.moe.tape import RoutingTape
from miles.rollout._routing import StepRow, rows_of
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
    step_routing: list[StepRow] = field(default_factory=list)
    """Where the rows of the tokens that it generated are."""
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
            new = RoutingTape.cat([new, rows_of(new, self.step_routing)], copy=False)
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
