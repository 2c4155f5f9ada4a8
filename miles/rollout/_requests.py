"""What the embedded engine knows of a request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import nn

from miles.errors import (
    EmptyBatchError,
    NonFiniteError,
    PromptTooLongError,
    RoutingError,
    SettingError,
    StopTokenError,
)
from miles.moe.replay import RoutingReplay
from miles.moe.tape import RoutingTape
from miles.rollout._routing import StepRow, rows_of
from miles.rollout._sampling import Draws
from miles.rollout.sample import Sample, SamplingParams, Status

__all__ = [
    "Request",
    "check_eval",
    "check_ids",
    "check_request",
    "check_stop_tokens",
    "new_sample",
    "resolve",
    "seed_of",
]


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
    speculative: dict[str, int] | None = None
    """`SpeculativeStats` as numbers that can be sent; None without a draft."""
    future: Future[Sample] = field(default_factory=Future)

    @property
    def ended(self) -> bool:
        """Whether it needs no further token."""
        return self.ending[0] is not Status.PENDING

    def take(self, token: int, logprob: float, *, weight_version: int, max_context: int) -> None:
        """Append what was sampled, and end where it has to."""
        if not math.isfinite(logprob):
            self.fail(
                NonFiniteError(
                    f"the logits for token {len(self.sample.tokens)} of {self.request_id} are NaN "
                    f"or infinite; look at the weights of version {weight_version}"
                )
            )
            return
        self.sample._append_sampled(token, logprob, weight_version)
        self.num_generated += 1
        if token in self.stop:
            self.ending = (Status.COMPLETED, "stop")
        elif (
            self.num_generated >= self.params.max_new_tokens
            or len(self.sample.tokens) >= max_context
        ):
            self.ending = (Status.TRUNCATED, "length")
        elif self.future.cancelled():
            self.ending = (Status.ABORTED, "cancelled")

    def remaining(self, max_context: int) -> int:
        """The tokens that it gets unless it stops before."""
        room = max_context - len(self.sample.tokens)
        return min(self.params.max_new_tokens - self.num_generated, room)

    def fail(self, error: Exception) -> None:
        """End with this error."""
        self.error = error
        self.ending = (Status.FAILED, "error")

    def complete(self, status: Status, reason: str) -> None:
        """Make the sample whole; a fault of its routing is the request's error."""
        self.sample.status = status
        self.sample.metadata["finish_reason"] = reason
        if self.speculative is not None:
            self.sample.metadata["speculative"] = self.speculative
        self._complete_routing()

    def _complete_routing(self) -> None:
        """Append what was recorded here to what the sample came with."""
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


def fit_routing(sample: Sample, model: RoutingReplay) -> None:
    """Check the routing that a sample to resume came with."""
    if sample.routing is None:
        return
    if sample.routing.num_experts_inferred:
        sample.routing = sample.routing.with_num_experts(model.num_experts)
    got = (sample.routing.num_layers, sample.routing.topk, sample.routing.num_experts)
    expected = (len(model.layers), model.topk, model.num_experts)
    if got != expected:
        raise RoutingError(
            f"the sample's routing has (layers, topk, experts) {got}; expected {expected}, "
            "as this model; set sample.routing = None to record it anew"
        )


def check_ids(request_ids: Sequence[str] | None) -> None:
    """A text is a sequence of texts too, and `in` finds parts of it."""
    if isinstance(request_ids, str):
        raise SettingError(f"request_ids is {request_ids!r}; expected a list: [{request_ids!r}]")


def check_eval(model: nn.Module) -> None:
    """Dropout and checkpointing would change what is sampled."""
    if model.training:
        raise SettingError(
            "the model is in training mode; expected eval mode, whenever the engine generates: "
            "call model.eval(), and pause() while you train the same module"
        )


def check_request(
    sample: Sample,
    params: SamplingParams,
    recorder: RoutingReplay | None,
    vocab_size: int,
    max_context: int,
) -> None:
    """Whether a model with such a vocabulary and context can go on with the sample."""
    outside = [t for t in sample.tokens if not 0 <= t < vocab_size]
    if outside:
        raise SettingError(f"the prompt holds tokens {outside[:8]}; expected 0..{vocab_size - 1}")
    if len(sample.tokens) >= max_context:
        raise PromptTooLongError(
            f"the prompt has {len(sample.tokens)} tokens and the context {max_context}; "
            "expected room for at least one more; shorten it, or raise max_context"
        )
    if sample.num_generated_tokens >= params.max_new_tokens:
        raise SettingError(
            f"the sample to resume has {sample.num_generated_tokens} generated tokens and "
            f"max_new_tokens is {params.max_new_tokens}; expected room for at least one more"
        )
    check_stop_tokens(params.stop_token_ids, vocab_size)
    if recorder is not None:
        fit_routing(sample, recorder)


def check_stop_tokens(tokens: Iterable[int], vocab_size: int) -> None:
    """Those of the request, or of the model."""
    unknown = sorted(t for t in tokens if not 0 <= t < vocab_size)
    if unknown:
        raise StopTokenError(
            f"stop tokens {unknown} are not in the vocabulary; expected 0..{vocab_size - 1}"
        )
