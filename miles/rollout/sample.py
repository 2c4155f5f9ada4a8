"""What a rollout produces, and what it was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from miles.errors import (
    EmptyBatchError,
    MissingLogprobError,
    NonFiniteError,
    RewardError,
    RoutingError,
    SettingError,
    ShapeError,
)
from miles.moe.tape import RoutingTape

__all__ = ["Sample", "SamplingParams", "Span", "Status"]

NO_LOGPROB = math.nan


class Status(StrEnum):
    """Where a sample stands."""

    PENDING = "pending"
    """Not generated yet."""
    COMPLETED = "completed"
    """Ended with a stop token."""
    TRUNCATED = "truncated"
    """Ended because `max_new_tokens` or the context was used up."""
    ABORTED = "aborted"
    """Ended from outside; it can be given to an engine again and goes on where it stopped."""
    FAILED = "failed"
    """Not usable."""


@dataclass(frozen=True)
class Span:
    """Tokens `start..end-1` of a sample were generated with these weights."""

    start: int
    """First token, counted from the start of `Sample.tokens`."""
    end: int
    """One past the last token."""
    weight_version: int
    """Version that the engine served then."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request.

    Log-probs that an engine returns are those of `softmax(logits / temperature)` over the whole
    vocabulary; there is no top-p or top-k here, since their log-probs would be another policy's.
    """

    max_new_tokens: int
    """Most tokens to generate, counting those that a resumed sample already has."""
    temperature: float = 1.0
    """0 takes the most likely token, with its log-prob at temperature 1."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end the answer; they stay in it."""
    ignore_eos: bool = False
    """Go on after the model's own end-of-sequence tokens."""
    seed: int | None = None
    """Makes the answer reproducible whatever else is in the batch; None draws one."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SettingError(
                f"temperature is {self.temperature}; expected 0 (greedy) or a positive number"
            )


@dataclass
class Sample:
    """One prompt and its answer: token lists of one length, kept aligned by `append`.

    Args:
        tokens: prompt and answer.
        loss_mask: True for tokens to train on; all False when left out.
        rollout_logprobs: log-prob each token was sampled with, NaN where there is none.
        reward: a finite number, or None while it is not scored.
        status: where it stands.
        spans: which weights produced which tokens.
        routing: expert ids of the tokens that were processed (all but the last).
        metadata: anything of yours; the engine adds `finish_reason`, `seed`, `request_id`.

    Raises:
        ShapeError: lists of different lengths.
        MissingLogprobError: a trainable token without a log-prob.
        RewardError: a reward that is NaN or infinite.

    Example:
        >>> from miles.rollout import Sample
        >>> sample = Sample(tokens=[5, 6])
        >>> sample.append([7, 8], logprobs=[-0.1, -2.3], weight_version=3)
        >>> sample.loss_mask, sample.spans
        ([False, False, True, True], [Span(start=2, end=4, weight_version=3)])
    """

    tokens: list[int]
    loss_mask: list[bool] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)
    reward: float | None = None
    status: Status = Status.PENDING
    spans: list[Span] = field(default_factory=list)
    routing: RoutingTape | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.loss_mask = list(self.loss_mask) or [False] * len(self.tokens)
        self.rollout_logprobs = list(self.rollout_logprobs) or [NO_LOGPROB] * len(self.tokens)
        self.spans = list(self.spans)
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reward" and value is not None and not math.isfinite(value):
            raise RewardError(
                f"reward is {value}; expected a finite number, or None for a sample that was not "
                "scored (it then takes no part in its group's statistics)"
            )
        object.__setattr__(self, name, value)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first generated one."""
        return self.spans[0].start if self.spans else len(self.tokens)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that a policy generated, tool output not among them."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def response_tokens(self) -> list[int]:
        """Everything after the prompt."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def weight_versions(self) -> list[int]:
        """Versions that took part, oldest first."""
        return sorted({span.weight_version for span in self.spans})

    def append(
        self,
        tokens: Sequence[int],
        *,
        logprobs: Sequence[float] | None = None,
        loss_mask: bool | Sequence[bool] = True,
        weight_version: int | None = None,
    ) -> None:
        """Add tokens with all that belongs to them, or nothing if something is missing.

        Args:
            tokens: token ids.
            logprobs: one for each; may be left out for tokens that are not trained on.
            loss_mask: whether to train on them (False for tool output and the like).
            weight_version: version of the weights that generated them; None for tokens that no
                policy generated.

        Raises:
            ShapeError: lists of different lengths.
            MissingLogprobError: a trainable token without a log-prob.
        """
        count = len(tokens)
        mask = [loss_mask] * count if isinstance(loss_mask, bool) else [bool(m) for m in loss_mask]
        values = [NO_LOGPROB] * count if logprobs is None else [float(x) for x in logprobs]
        if len(mask) != count or len(values) != count:
            raise ShapeError(
                f"got {count} tokens, {len(values)} logprobs and {len(mask)} loss_mask entries; "
                "expected as many of each"
            )
        _check_logprobs(mask, values, offset=len(self.tokens))
        self.tokens.extend(int(token) for token in tokens)
        self.loss_mask.extend(mask)
        self.rollout_logprobs.extend(values)
        if weight_version is not None and count:
            self._extend_span(count, weight_version)

    def _append_sampled(self, token: int, logprob: float, weight_version: int) -> None:
        """`append` for an engine's inner loop, which has checked the log-prob."""
        self.tokens.append(token)
        self.loss_mask.append(True)
        self.rollout_logprobs.append(logprob)
        self._extend_span(1, weight_version)

    def _extend_span(self, count: int, weight_version: int) -> None:
        """Say which weights the last `count` tokens came from."""
        end = len(self.tokens)
        last = self.spans[-1] if self.spans else None
        if last is not None and last.end == end - count and last.weight_version == weight_version:
            self.spans[-1] = Span(last.start, end, weight_version)
        else:
            self.spans.append(Span(end - count, end, weight_version))

    def check(self) -> None:
        """Raise unless everything is aligned and complete; for samples that came from elsewhere."""
        lengths = {
            "tokens": len(self.tokens),
            "loss_mask": len(self.loss_mask),
            "rollout_logprobs": len(self.rollout_logprobs),
        }
        if len(set(lengths.values())) > 1:
            raise ShapeError(f"a Sample's lists have lengths {lengths}; expected one length")
        if not self.tokens:
            raise EmptyBatchError("a Sample has no token; expected at least one prompt token")
        _check_logprobs(self.loss_mask, self.rollout_logprobs, offset=0)
        end = 0
        for span in self.spans:
            if not end <= span.start < span.end <= len(self.tokens):
                raise ShapeError(
                    f"{span} does not fit {len(self.tokens)} tokens after a span that ends at "
                    f"{end}; expected spans in order, within the tokens, without overlap"
                )
            end = span.end
        if self.routing is not None and len(self.routing) > len(self.tokens):
            raise RoutingError(
                f"the routing has {len(self.routing)} rows for {len(self.tokens)} tokens; expected "
                "at most one a token (fewer: the rest was not processed yet)"
            )

    def copy(self) -> Sample:
        """A sample whose lists are its own."""
        return Sample(
            tokens=self.tokens,
            loss_mask=self.loss_mask,
            rollout_logprobs=self.rollout_logprobs,
            reward=self.reward,
            status=self.status,
            spans=self.spans,
            routing=self.routing,
            metadata=dict(self.metadata),
        )


def _check_logprobs(mask: Sequence[bool], values: Sequence[float], *, offset: int) -> None:
    for index, (trainable, value) in enumerate(zip(mask, values, strict=True)):
        if not trainable or math.isfinite(value):
            continue
        where = f"token {offset + index} is trainable"
        if math.isnan(value):
            raise MissingLogprobError(
                f"{where} and has no log-prob; expected the one it was sampled with, or "
                "loss_mask=False"
            )
        raise NonFiniteError(f"{where} and has log-prob {value}; expected a finite number")
