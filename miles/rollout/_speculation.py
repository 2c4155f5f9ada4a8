"""Speculative decoding steps of the embedded engine: propose, verify, keep what was accepted.

Shapes: R requests in a step, K draft tokens of a step, W = K + 1 tokens that the target processes,
V vocabulary entries, F features of a token, M mixture-of-experts layers.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miles.errors import EngineError, SettingError, ShapeError
from miles.rollout._requests import Request
from miles.rollout._routing import StepRouting
from miles.rollout._sampling import draw
from miles.rollout._step_costs import StepCosts, Stopwatch
from miles.rollout.sample import Sample
from miles.rollout.speculative.draft import Draft, Proposal
from miles.rollout.speculative.stats import AcceptanceStats
from miles.rollout.speculative.verify import verify_chain

if TYPE_CHECKING:
    from miles.rollout._kv import SlotMemory

__all__ = ["Speculation", "StepController", "uniforms"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 by the golden ratio
SUM_TOLERANCE = 1e-3
NO_DRAWS = torch.empty(0)
MAX_WAITING = 8192
"""Tokens of all requests whose features are kept for the draft while it is not used."""


class StepController(Protocol):
    """What says how many tokens the draft proposes; `DraftController` does."""

    def choose(self, batch: int) -> int:
        """Draft tokens of a step of so many requests; 0: a step without the draft."""
        ...

    def observe(self, stats: AcceptanceStats) -> None:
        """What came of a step."""
        ...


@dataclass
class _State:
    """What the draft knows of a request, and what it is still to be told."""

    start: int = 0
    """Position of the last token that it was told; 0: of none."""
    num_waiting: int = 0
    """Tokens after it."""
    features: list[Tensor] = field(default_factory=list)
    """`[n, F]` each, in order: of all tokens from `start` on but the last."""


class Speculation:
    """A draft beside the target: what it remembers of each request, and the steps of both.

    The random numbers of a step depend on the request's seed and on how many tokens it has
    generated, not on its company nor on what came before, so that a resumed sample goes on with
    numbers that it has not used.
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
        self._max_context, self._max_steps = max_context, num_steps
        self._vocab_size = vocab_size
        self._watch = Stopwatch(memory.device)
        self.acceptance, self.costs = AcceptanceStats(), StepCosts()
        most = getattr(controller, "max_steps", 0)
        if most > num_steps:
            raise SettingError(
                f"the controller chooses up to {most} draft steps and draft_steps is {num_steps}; "
                "expected room for all of them"
            )

    @staticmethod
    def before(sample: Sample) -> dict[str, int]:
        """The `SpeculativeStats` of a sample, which goes on with those of its earlier parts."""
        none = {"num_verify_steps": 0, "num_proposed": 0, "num_accepted": 0, "num_tokens": 0}
        return {**none, **sample.metadata.get("speculative", {})}

    def begin(self, groups: Sequence[Sequence[Request]]) -> None:
        """After a prefill, of which each group shares a row, and the first tokens."""
        for row, group in enumerate(groups):
            for request in group:
                self._states[request] = _State()
                self._settle(request, row, len(request.sample.tokens) - 1)

    def step(self, requests: Sequence[Request], weight_version: int) -> None:
        """One pass of the target, and the tokens that come of it, one to W for each request."""
        begun, first = perf_counter(), self._watch.mark()
        proposal, draws_RU = self._propose(requests)
        last = self._watch.mark()
        requests = [request for request in requests if not request.ended]
        if not requests:
            return
        samples = [request.sample for request in requests]
        logits_RWV, ids_RWMK = self._memory.verify(
            [request.slot for request in requests],
            [sample.tokens[-1] for sample in samples],
            [len(sample.tokens) - 1 for sample in samples],
            # What is outside fails below; here it must not take the device down.
            None if proposal is None else proposal.tokens_RK.clamp(0, self._vocab_size - 1),
        )
        if proposal is None:
            tokens, logprobs = _plain(requests, logits_RWV[:, 0])
            lengths: Sequence[int] = [0] * len(requests)
        else:
            tokens, logprobs = self._verify(requests, proposal, logits_RWV, draws_RU)
            lengths = proposal.lengths or ()
        counts = self._keep(requests, tokens, logprobs, ids_RWMK, weight_version)
        self._count(requests, lengths, [len(row) - 1 for row in tokens], counts)
        if sum(state.num_waiting for state in self._states.values()) > MAX_WAITING:
            self._extend([request for request in requests if not request.ended])
        # A cost is of the whole step, as users see it; the device is done, since tokens are here.
        seconds, batch = perf_counter() - begun, len(requests)
        if proposal is None:
            self.costs.add("decode", batch=batch, tokens=1, seconds=seconds)
        else:
            num_steps = proposal.tokens_RK.shape[1]
            drafting = self._watch.seconds(first, last)
            self.costs.add("draft", batch=batch, tokens=num_steps, seconds=drafting)
            self.costs.add("verify", batch=batch, tokens=num_steps + 1, seconds=seconds - drafting)

    def move(self, request: Request, target: int) -> None:
        """The request goes to a free slot."""
        if self._states[request].start:
            with self._draft_of([request], "move"):
                self._draft.move(request.slot, target)

    def free(self, request: Request) -> None:
        """The request has left its slot."""
        state = self._states.pop(request, None)
        if state is not None and state.start:
            with self._draft_of([request], "free"):
                self._draft.free(request.slot)

    def _lengths(self, requests: Sequence[Request]) -> list[int]:
        """How many proposals of each request can be kept, the bonus token after them included."""
        chosen = self._max_steps
        if self._controller is not None:
            chosen = self._controller.choose(len(requests))
            if not 0 <= chosen <= self._max_steps:
                raise SettingError(
                    f"the controller chose {chosen} draft steps; expected 0 to {self._max_steps}, "
                    "the engine's draft_steps"
                )
        return [
            # The draft has no more room than the target.
            max(0, min(chosen, request.params.max_new_tokens - request.num_generated - 1))
            if len(request.sample.tokens) + chosen < self._max_context
            else 0
            for request in requests
        ]

    def _draws(self, requests: Sequence[Request], salt: int = 0) -> Tensor:
        """Float64 `[R, 2 K + 1]`, K the largest: for each proposal, for each verdict, and what the
        target draws its own token with, as it does in a step without the draft."""
        draws_RU = uniforms(
            [request.draws.seed + salt * int(GOLDEN) for request in requests],
            [request.num_generated for request in requests],
            2 * self._max_steps + bool(salt),
        )
        if salt:
            return torch.from_numpy(draws_RU).to(self._memory.device)
        own_R1 = [[request.draws[request.num_generated]] for request in requests]
        return torch.from_numpy(np.hstack([draws_RU, own_R1])).to(self._memory.device)

    def _propose(self, requests: Sequence[Request]) -> tuple[Proposal | None, Tensor]:
        """For all requests, with a length for each, and the draws; None: nothing to verify."""
        lengths = self._lengths(requests)
        asked = [row for row, length in enumerate(lengths) if length]
        ours = [requests[row] for row in asked]
        self._extend(ours)
        if not ours or any(request.ended for request in ours):
            return None, NO_DRAWS
        proposal, num_steps, draws_RU = None, max(lengths), self._draws(requests)
        draws_RK = draws_RU[:, :num_steps]
        with self._draft_of(ours, "propose"):
            proposal = self._draft.propose(
                [request.slot for request in ours],
                num_steps=num_steps,
                temperatures=[request.params.temperature for request in ours],
                uniforms_RK=draws_RK if len(ours) == len(requests) else draws_RK[asked],
            )
            _check_shapes(proposal, (len(asked), num_steps, self._vocab_size))
            if proposal.lengths is not None:
                for row, length in zip(asked, proposal.lengths, strict=True):
                    lengths[row] = min(lengths[row], length)
            if proposal.salt:
                draws_RU = self._draws(requests, proposal.salt)
            proposal = _spread(proposal, asked, lengths, self._memory.device)
        if any(request.ended for request in ours):
            return None, NO_DRAWS
        return proposal, draws_RU

    def _verify(
        self,
        requests: Sequence[Request],
        proposal: Proposal,
        logits_RWV: Tensor,
        draws_RU: Tensor,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """What comes of each request: its accepted tokens and one more, with their log-probs."""
        num_steps = proposal.tokens_RK.shape[1]
        last = self._max_steps + num_steps
        verdicts_RU = torch.cat([draws_RU[:, self._max_steps : last], draws_RU[:, -1:]], dim=1)
        verified = verify_chain(
            logits_RWV,
            proposal.tokens_RK,
            proposal.probs_RKV,
            temperatures_R=[request.params.temperature for request in requests],
            uniforms_RU=verdicts_RU,
            lengths_R=proposal.lengths,
            check=False,  # what can be wrong is looked at when the device is done with it
        )
        heads_R2 = torch.stack([verified.num_tokens_R, self._wrong(proposal)], dim=1)
        parts = (heads_R2, verified.tokens_RK, verified.logprobs_RK)
        # One transfer; integers are exact in float64.
        host = torch.cat([part.double() for part in parts], dim=1).tolist()
        tokens, logprobs = [], []
        for request, (count, wrong, *rest) in zip(requests, host, strict=True):
            if wrong:
                request.fail(
                    EngineError(
                        f"the draft ({self._name}) proposed tokens that are not in the vocabulary, "
                        "or probabilities that do not sum to 1 or are 0 for a proposed token; "
                        f"expected ids in 0..{self._vocab_size - 1}, drawn from the probabilities"
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
            self._settle(request, row, counts[-1])
        return counts

    def _wrong(self, proposal: Proposal) -> Tensor:
        """bool `[R]`: rows that the draft cannot have drawn as it says."""
        tokens_RK = proposal.tokens_RK
        known_RK = tokens_RK.clamp(0, self._vocab_size - 1)
        right_RK = known_RK == tokens_RK
        if proposal.probs_RKV is not None:
            chosen_RK = proposal.probs_RKV.gather(-1, known_RK[..., None])[..., 0]
            right_RK &= (proposal.probs_RKV.sum(-1) - 1).abs() < SUM_TOLERANCE
            right_RK &= chosen_RK > 0
        lengths_R1 = torch.tensor(proposal.lengths, device=tokens_RK.device)[:, None]
        used_RK = torch.arange(tokens_RK.shape[1], device=tokens_RK.device) < lengths_R1
        return (used_RK & ~right_RK).any(1)

    def _settle(self, request: Request, row: int, count: int) -> None:
        """Keep, for the draft, what the target's last pass had in `row` for `count` tokens.

        The draft gets it when it is asked next: a step without it then costs nothing of it.
        """
        state, features = self._states[request], self._memory.features
        state.num_waiting += count
        if features is not None:
            state.features.append(features[row, :count])

    def _extend(self, requests: Sequence[Request]) -> None:
        """Tell the draft what was settled since it was last told."""
        requests = [request for request in requests if self._states[request].num_waiting]
        if not requests:
            return
        states = [self._states[request] for request in requests]
        tokens = [
            request.sample.tokens[state.start :]
            for request, state in zip(requests, states, strict=True)
        ]
        starts = [state.start for state in states]
        features = None
        if self._memory.features is not None:
            features = [torch.cat(state.features) for state in states]
        for request, state in zip(requests, states, strict=True):
            state.start, state.num_waiting = len(request.sample.tokens) - 1, 0
            state.features = []
        with self._draft_of(requests, "extend"):
            self._draft.extend([request.slot for request in requests], tokens, starts, features)

    def _count(
        self,
        requests: Sequence[Request],
        proposed: Sequence[int],
        accepted: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        stats = AcceptanceStats.count(accepted=accepted, proposed=proposed, num_tokens=sum(counts))
        self.acceptance += stats
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


def _plain(
    requests: Sequence[Request], logits_RV: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """One token for each request, as without a draft."""
    tokens, logprobs = draw(
        logits_RV,
        [request.params.temperature for request in requests],
        [request.draws[request.num_generated] for request in requests],
    )
    return [[token] for token in tokens], [[logprob] for logprob in logprobs]


def _check_shapes(proposal: Proposal, expected: tuple[int, int, int]) -> None:
    got = proposal.tokens_RK
    if got.shape != expected[:2] or got.dtype != torch.int64:
        raise ShapeError(
            f"tokens_RK is {got.dtype} of shape {tuple(got.shape)}; expected int64 of shape "
            f"{expected[:2]}"
        )
    lengths = proposal.lengths
    if lengths is not None and (
        len(lengths) != expected[0] or not all(0 <= length <= expected[1] for length in lengths)
    ):
        raise ShapeError(
            f"lengths are {lengths}; expected {expected[0]} numbers of 0 to {expected[1]}"
        )
    if proposal.probs_RKV is not None and proposal.probs_RKV.shape != expected:
        raise ShapeError(
            f"probs_RKV has shape {tuple(proposal.probs_RKV.shape)}; expected {expected}, over the "
            "target's vocabulary"
        )


def _spread(
    proposal: Proposal, rows: list[int], lengths: list[int], device: torch.device
) -> Proposal | None:
    """The same on the target's device, among rows that propose nothing; None if no row does."""
    width, num_rows = max(lengths), len(lengths)
    if not width:
        return None
    tokens_RK, probs_RKV = proposal.tokens_RK[:, :width].to(device), proposal.probs_RKV
    probs_RKV = None if probs_RKV is None else probs_RKV[:, :width].to(device)
    if len(rows) < num_rows:
        index = torch.tensor(rows, device=device)
        all_RK = tokens_RK.new_zeros((num_rows, width))
        tokens_RK = all_RK.index_copy_(0, index, tokens_RK)
        if probs_RKV is not None:
            all_RKV = probs_RKV.new_zeros((num_rows, *probs_RKV.shape[1:]))
            probs_RKV = all_RKV.index_copy_(0, index, probs_RKV)
    return Proposal(tokens_RK=tokens_RK, probs_RKV=probs_RKV, lengths=tuple(lengths))


def uniforms(seeds: Sequence[int], steps: Sequence[int], count: int) -> NDArray[np.float64]:
    """Float64 `[R, count]` in [0, 1): what R requests draw at their steps, each another number.

    SplitMix64 of a counter, so that any place of a request's stream costs the same. Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> uniforms([7, 7], [0, 1], 2).round(3).tolist() == [
        ...     uniforms([7], [0], 2)[0].round(3).tolist(),
        ...     uniforms([7], [1], 2)[0].round(3).tolist()]
        True
    """
    seed_R1 = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)[:, None]
    first_R1 = np.array(steps, dtype=np.uint64)[:, None] * np.uint64(count)
    place_RU = first_R1 + np.arange(1, count + 1, dtype=np.uint64)
    bits_RU = _mixed(_mixed(seed_R1) + np.multiply(place_RU, GOLDEN, dtype=np.uint64))
    return (bits_RU >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
