"""Speculative decoding steps of the embedded engine: propose, verify, keep what was accepted.

Shapes: R requests in a step, K draft tokens of a step, W = K + 1 tokens that the target processes,
V vocabulary entries, F features of a token, M mixture-of-experts layers.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from miles.errors import EngineError, SettingError
from miles.rollout._features import UntoldFeatures
from miles.rollout._occupancy import Occupancy
from miles.rollout._proposals import check_shapes, spread
from miles.rollout._requests import Request
from miles.rollout._routing import StepRouting
from miles.rollout._sampling import uniforms
from miles.rollout._step_costs import StepCosts, Stopwatch
from miles.rollout.sample import Sample
from miles.rollout.speculative.draft import Draft, Proposal
from miles.rollout.speculative.stats import AcceptanceStats
from miles.rollout.speculative.verify import verify_chain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from miles.rollout._kv import SlotMemory

__all__ = ["Speculation", "StepController"]

SUM_TOLERANCE = 1e-3
MAX_WAITING = 8192
"""Tokens of all requests whose features are kept for the draft while it is not used. Where older
ones are gone, it begins anew after the gap."""


class StepController(Protocol):
    """What says how many tokens the draft proposes; `DraftController` does."""

    def choose(self, batch: int, remaining: Sequence[int] | None = None) -> int:
        """Draft tokens of a step of so many requests; 0: a step without the draft.

        `remaining` are the tokens that each is to get, where no others take the place of those that
        end and most run into their length; None: others do, or it is not known when they end.
        """
        ...

    def observe(self, stats: AcceptanceStats) -> None:
        """What came of a step."""
        ...


@dataclass(eq=False, slots=True)
class _State:
    """What the draft knows of a request: the tokens `first` to `told`; `told` 0: none."""

    uncounted: int
    """Generated tokens that `request.speculative` does not count, when it came in."""
    first: int = 0
    told: int = 0


@dataclass(frozen=True)
class _Inputs:
    """What a step computes with, on the device."""

    draws_RU: Tensor
    """float64 `[R, 2 K + 1]` in [0, 1), K the largest."""
    temperatures_R: Tensor
    """float64."""


class Speculation:
    """A draft beside the target: what it remembers of each request, and the steps of both.

    The random numbers of a step depend on the request's seed, on how many tokens it has generated
    and, where the draft copies from earlier answers, on all that it remembers (`DraftMemory`), not
    on the request's company nor on what came before, so that a resumed sample goes on with numbers
    that it has not used.
    """

    def __init__(
        self,
        draft: Draft,
        memory: SlotMemory,
        routing: StepRouting,
        *,
        num_slots: int,
        max_context: int,
        vocab_size: int,
        num_steps: int,
        controller: StepController | None,
    ) -> None:
        self.draft, self._name = draft, type(draft).__name__
        self._memory, self._routing, self._controller = memory, routing, controller
        self._draft = draft.memory(num_slots=num_slots, max_context=max_context)
        self._states: dict[Request, _State] = {}
        self._occupancy = Occupancy()
        self._company: Sequence[Request] = ()
        self._rows: dict[_State, tuple[int, int]] = {}
        """Owners of the last plain step, which was `_company`'s."""
        self._untold = UntoldFeatures() if draft.feature_layers else None
        self._max_context, self._max_steps = max_context, num_steps
        self._vocab_size = vocab_size
        self._watch, self._begun = Stopwatch(memory.device), 0.0
        self.costs = StepCosts()
        self._drafted = AcceptanceStats()
        self._rested = (0, 0)
        """Rows of all plain steps, and their tokens."""
        self._plain = AcceptanceStats()
        """The last of these steps."""
        if controller is not None:
            _check_choose(controller)
        most = getattr(controller, "max_steps", 0)
        if most > num_steps:
            raise SettingError(
                f"the controller chooses up to {most} draft steps and draft_steps is {num_steps}; "
                "expected room for all of them"
            )

    @property
    def acceptance(self) -> AcceptanceStats:
        """How all steps so far went, plain ones too."""
        steps, tokens = self._rested
        return self._drafted + AcceptanceStats(num_verify_steps=steps, num_tokens=tokens)

    @staticmethod
    def before(sample: Sample) -> dict[str, int]:
        """The `SpeculativeStats` of a sample, which goes on with those of its earlier parts."""
        none = {"num_verify_steps": 0, "num_proposed": 0, "num_accepted": 0, "num_tokens": 0}
        return {**none, **sample.metadata.get("speculative", {})}

    def begin(self, groups: Sequence[Sequence[Request]]) -> None:
        """After a prefill, of which each group shares a row, and the first tokens."""
        self._occupancy.came()
        owners = {}
        for row, group in enumerate(groups):
            for request in group:
                assert request.speculative is not None
                counted = request.speculative["num_tokens"]
                state = self._states[request] = _State(request.num_generated - counted)
                owners[state] = (row, len(request.sample.tokens) - 1)
        self._settle(owners)

    def draws(self, requests: Sequence[Request]) -> list[float]:
        """What the target draws a token of its own with: at a prompt's end, and in plain steps."""
        if salt := self._salt:
            own: list[float] = self._salted(requests, salt)[:, -1].tolist()
            return own
        return [request.draws[request.num_generated] for request in requests]

    def step(self, requests: Sequence[Request], weight_version: int, *, waiting: bool) -> bool:
        """One pass of the target over proposals, and the tokens that come of it, one to W for each
        request. False: there are none, so the engine takes a plain step, and calls `decoded`.
        `waiting`: more requests than the engine has room for."""
        self._begun = perf_counter()
        chosen = self._choose(requests, waiting)
        lengths = self._lengths(requests, chosen)
        if not any(lengths):
            return False
        first = self._watch.mark()
        proposed = self._propose(requests, lengths, chosen)
        if proposed is None:
            return False
        proposal, inputs, usual = proposed
        last = self._watch.mark()
        samples = [request.sample for request in requests]
        logits_RWV, ids_RWMK = self._memory.verify(
            [request.slot for request in requests],
            [sample.tokens[-1] for sample in samples],
            [len(sample.tokens) - 1 for sample in samples],
            # What is outside fails below; here it must not take the device down.
            proposal.tokens_RK.clamp(0, self._vocab_size - 1),
        )
        tokens, logprobs = self._verify(requests, proposal, logits_RWV, inputs)
        counts = self._keep(requests, tokens, logprobs, ids_RWMK, weight_version)
        self._count(requests, proposal.lengths or (), [len(row) - 1 for row in tokens], counts)
        # A cost is of the whole step, as users see it; the device is done, since tokens are here.
        seconds, batch = perf_counter() - self._begun, len(requests)
        num_steps = proposal.tokens_RK.shape[1]
        drafting = self._watch.seconds(first, last)
        if usual:
            self.costs.add("draft", batch=batch, tokens=num_steps, seconds=drafting)
        self.costs.add("verify", batch=batch, tokens=num_steps + 1, seconds=seconds - drafting)
        return True

    def decoded(self, requests: Sequence[Request]) -> None:
        """The engine has taken a plain step, which these were in; nothing of the draft runs."""
        if self._untold is not None:
            if requests != self._company:  # in most steps it is that of the step before
                self._company = requests
                self._rows = {self._states[one]: (row, 1) for row, one in enumerate(requests)}
            self._settle(self._rows)
            self._untold.drop_beyond(MAX_WAITING)
        rows, num_tokens = len(requests), [request.error for request in requests].count(None)
        self._rested = (self._rested[0] + rows, self._rested[1] + num_tokens)
        if self._controller is not None:
            if (self._plain.num_verify_steps, self._plain.num_tokens) != (rows, num_tokens):
                self._plain = AcceptanceStats(num_verify_steps=rows, num_tokens=num_tokens)
            self._controller.observe(self._plain)
        seconds = perf_counter() - self._begun
        self.costs.add("decode", batch=len(requests), tokens=1, seconds=seconds)

    def move(self, request: Request, target: int) -> None:
        """The request goes to a free slot."""
        if self._states[request].told:
            with self._draft_of([request], "move"):
                self._draft.move(request.slot, target)

    def free(self, request: Request) -> None:
        """The request has left its slot."""
        state = self._states.pop(request, None)
        if state is None:  # it was never prefilled
            return
        self._company = ()
        self._occupancy.left(request, company=bool(self._states))
        counts = request.speculative
        assert counts is not None
        # What no verify pass gave came of plain steps, of which nothing was written down.
        plain = request.num_generated - state.uncounted - counts["num_tokens"]
        counts["num_verify_steps"] += plain
        counts["num_tokens"] += plain
        if self._untold is not None:
            self._untold.forget(state)
        if state.told:
            with self._draft_of([request], "free"):
                self._draft.free(request.slot)

    def _choose(self, requests: Sequence[Request], waiting: bool) -> int:
        """The number of draft tokens of this step."""
        if self._controller is None:
            return self._max_steps
        remaining = self._occupancy.remaining(requests, self._max_context, waiting=waiting)
        chosen = self._controller.choose(len(requests), remaining)
        if not 0 <= chosen <= self._max_steps:
            raise SettingError(
                f"the controller chose {chosen} draft steps; expected 0 to {self._max_steps}, "
                "the engine's draft_steps"
            )
        return chosen

    def _lengths(self, requests: Sequence[Request], chosen: int) -> list[int]:
        """How many proposals of each request can be kept, the bonus token after them included."""
        if not chosen:
            return []
        return [
            # The draft has no more room than the target.
            max(0, min(chosen, request.params.max_new_tokens - request.num_generated - 1))
            if len(request.sample.tokens) + chosen < self._max_context
            else 0
            for request in requests
        ]

    @property
    def _salt(self) -> int:
        salt: int = getattr(self._draft, "salt", 0)
        return salt

    def _salted(self, requests: Sequence[Request], salt: int) -> NDArray[np.float64]:
        """`[R, 2 K + 1]`: a number for each proposal and each verdict, K the largest, and what the
        target draws its own token with."""
        return uniforms(
            [request.draws.seed for request in requests],
            [request.num_generated for request in requests],
            2 * self._max_steps + 1,
            salt,
        )

    def _inputs(self, requests: Sequence[Request], salt: int) -> _Inputs:
        """Numbers of a step for the device, in one transfer."""
        draws_RU = self._salted(requests, salt)
        if not salt:  # the target's own are those of an engine without a draft
            draws_RU[:, -1] = [request.draws[request.num_generated] for request in requests]
        temperatures_R1 = np.array([[request.params.temperature] for request in requests])
        packed = torch.from_numpy(np.hstack([draws_RU, temperatures_R1]))
        if self._memory.device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(self._memory.device, non_blocking=True)
        return _Inputs(packed[:, :-1], packed[:, -1])

    def _propose(
        self, requests: Sequence[Request], lengths: list[int], chosen: int
    ) -> tuple[Proposal, _Inputs, bool] | None:
        """For all requests, with a length for each; what the step computes with; whether the draft
        was told no more than steps with it leave. None: nothing to verify.

        Where steps are graphs there are `chosen` tokens for each, even if none is to have as many:
        to capture one more shape costs more than they do.
        """
        asked = [row for row, length in enumerate(lengths) if length]
        ours = [requests[row] for row in asked]
        usual = self._extend(ours)
        if any(request.ended for request in ours):
            return None
        salt = self._salt
        num_steps = chosen if self._memory.graphed else max(lengths)
        proposal, inputs = None, self._inputs(requests, salt)
        draws_RK = inputs.draws_RU[:, :num_steps]
        with self._draft_of(ours, "propose"):
            proposal = self._draft.propose(
                [request.slot for request in ours],
                num_steps=num_steps,
                temperatures=[request.params.temperature for request in ours],
                uniforms_RK=draws_RK if len(ours) == len(requests) else draws_RK[asked],
            )
            check_shapes(proposal, (len(asked), num_steps, self._vocab_size))
            if proposal.lengths is not None:
                for row, length in zip(asked, proposal.lengths, strict=True):
                    lengths[row] = min(lengths[row], length)
            if (now := self._salt) != salt:  # it may have read what was remembered meanwhile
                inputs = self._inputs(requests, now)
            width = num_steps if self._memory.graphed else max(lengths)
            proposal = spread(proposal, asked, lengths, width, self._memory.device)
        if proposal is None or any(request.ended for request in ours):
            return None
        return proposal, inputs, usual

    def _verify(
        self,
        requests: Sequence[Request],
        proposal: Proposal,
        logits_RWV: Tensor,
        inputs: _Inputs,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """What comes of each request: its accepted tokens and one more, with their log-probs."""
        num_steps, draws_RU = proposal.tokens_RK.shape[1], inputs.draws_RU
        last = self._max_steps + num_steps
        verdicts_RU = torch.cat([draws_RU[:, self._max_steps : last], draws_RU[:, -1:]], dim=1)
        lengths_R = torch.tensor(proposal.lengths)
        if verdicts_RU.is_cuda:
            lengths_R = lengths_R.pin_memory().to(verdicts_RU.device, non_blocking=True)
        verified = verify_chain(
            logits_RWV,
            proposal.tokens_RK,
            proposal.probs_RKV,
            temperatures_R=inputs.temperatures_R,
            uniforms_RU=verdicts_RU,
            lengths_R=lengths_R,
            check=False,  # what can be wrong is looked at when the device is done with it
        )
        wrong_R = self._wrong(proposal, lengths_R, inputs.temperatures_R)
        heads_R2 = torch.stack([verified.num_tokens_R, wrong_R], dim=1)
        parts = (heads_R2, verified.tokens_RK, verified.logprobs_RK)
        # One transfer; integers are exact in float64.
        host = torch.cat([part.double() for part in parts], dim=1).tolist()
        tokens, logprobs = [], []
        for request, (count, wrong, *rest) in zip(requests, host, strict=True):
            if wrong:
                request.fail(
                    EngineError(
                        f"the draft ({self._name}) proposed tokens that are not in the vocabulary, "
                        "or probabilities that are negative, do not sum to 1, are 0 for a proposed "
                        "token, or leave a choice at temperature 0; expected ids in "
                        f"0..{self._vocab_size - 1}, drawn from the probabilities"
                    )
                )
            tokens.append([int(token) for token in rest[: int(count)]])
            logprobs.append(rest[num_steps + 1 :][: int(count)])
        return tokens, logprobs

    def _keep(
        self,
        requests: Sequence[Request],
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        ids_RWMK: Tensor | None,
        weight_version: int,
    ) -> list[int]:
        """Give each request its tokens up to its end, and their routing; returns how many."""
        passes = () if ids_RWMK is None else ids_RWMK.unbind(1)
        noted = [self._routing.add(ids_RMK, weight_version) for ids_RMK in passes]
        counts = []
        for row, request in enumerate(requests):
            before = len(request.sample.tokens)
            for token, logprob in zip(tokens[row], logprobs[row], strict=True):
                if not request.ended:
                    request.take(
                        token, logprob, weight_version=weight_version, max_context=self._max_context
                    )
            counts.append(len(request.sample.tokens) - before)
            # A token is processed in the pass after its own, so the last one was not.
            request.step_routing += [rows[row] for rows in noted[: counts[-1]]]
        rows = zip(requests, enumerate(counts), strict=True)
        self._settle({self._states[one]: (row, count) for one, (row, count) in rows if count})
        return counts

    def _wrong(self, proposal: Proposal, lengths_R: Tensor, temperatures_R: Tensor) -> Tensor:
        """bool `[R]`: rows that the draft cannot have drawn as it says."""
        tokens_RK = proposal.tokens_RK
        known_RK = tokens_RK.clamp(0, self._vocab_size - 1)
        right_RK = known_RK == tokens_RK
        if proposal.probs_RKV is not None:
            chosen_RK = proposal.probs_RKV.gather(-1, known_RK[..., None])[..., 0]
            right_RK &= (proposal.probs_RKV.sum(-1) - 1).abs() < SUM_TOLERANCE
            right_RK &= proposal.probs_RKV.amin(-1) >= 0
            right_RK &= chosen_RK > 0
            right_RK &= (chosen_RK > 1 - SUM_TOLERANCE) | (temperatures_R[:, None] > 0)
        used_RK = torch.arange(tokens_RK.shape[1], device=tokens_RK.device) < lengths_R[:, None]
        return (used_RK & ~right_RK).any(1)

    def _settle(self, owners: Mapping[_State, tuple[int, int]]) -> None:
        """Keep, for the draft, what the target's last pass had in a row for some first tokens.

        The draft gets it when it is asked next: a step without it then costs nothing of it.
        """
        if self._untold is not None:
            assert self._memory.features is not None
            self._untold.add(self._memory.features, owners)

    def _extend(self, requests: Sequence[Request]) -> bool:
        """Tell the draft what was settled since it was last told; whether that was little."""
        states = [self._states[request] for request in requests]
        tokens, starts = [], []
        features = None if self._untold is None else self._untold.take(states)
        for index, (request, state) in enumerate(zip(requests, states, strict=True)):
            all_tokens = request.sample.tokens
            last = len(all_tokens) - 1
            if features is not None and len(features[index]) < last - state.told:
                state.first = state.told = last - len(features[index])
            tokens.append(all_tokens[state.told :])
            starts.append(state.told - state.first)
            state.told = last
        with self._draft_of(requests, "extend"):
            self._draft.extend([request.slot for request in requests], tokens, starts, features)
        return max(map(len, tokens)) <= 2 * (self._max_steps + 1)

    def _count(
        self,
        requests: Sequence[Request],
        proposed: Sequence[int],
        accepted: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        stats = AcceptanceStats.count(accepted=accepted, proposed=proposed, num_tokens=sum(counts))
        self._drafted += stats
        if self._controller is not None:
            self._controller.observe(stats)
        rows = zip(requests, proposed, accepted, counts, strict=True)
        for request, given, kept, count in rows:
            total = request.speculative
            assert total is not None
            total["num_verify_steps"] += 1
            total["num_proposed"] += given
            total["num_accepted"] += kept
            total["num_tokens"] += count

    @contextlib.contextmanager
    def _draft_of(self, requests: Sequence[Request], what: str) -> Iterator[None]:
        """What the draft raises ends these requests, and no others."""
        try:
            yield
        except Exception:  # whatever it was, it is told to all whose requests it ends
            failure = traceback.format_exc()
            for request in requests:
                if request.error is None:
                    request.fail(
                        EngineError(f"the draft ({self._name}) failed to {what}:\n{failure}")
                    )


def _check_choose(controller: StepController) -> None:
    try:
        inspect.signature(controller.choose).bind(1, None)
    except TypeError as error:
        raise SettingError(
            f"{type(controller).__name__}.choose cannot be called as choose(batch, remaining): "
            f"{error}; `remaining` is None, or a list of the tokens that each row is to get"
        ) from error
