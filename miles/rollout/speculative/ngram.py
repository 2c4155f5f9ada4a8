"""A draft without weights: what followed the last time that these tokens stood in a row.

Shapes: R rows (requests), K draft tokens of a step, F features of a position, n tokens of one
request.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from miles.errors import EmptyBatchError, SettingError, ShapeError
from miles.rollout.sample import Sample
from miles.rollout.speculative.draft import Proposal

__all__ = ["NgramDraft"]

Tokens = tuple[int, ...]


class NgramDraft:
    """Copies from the request's own tokens, or from earlier answers to the same prompt.

    The longest run of last tokens that has stood before, `max_ngram` down to `min_ngram` tokens, is
    looked up, and what followed its latest occurrence is proposed: of the request's own tokens if
    they have one, else of the newest answer that does. A copy of own tokens that reaches their end
    goes on into itself, so that a period is continued. A request without a match proposes nothing.
    No choice is made by chance: `Proposal.probs_RKV` is None.

    Earlier answers (of the last epoch, or of siblings that are done) help where a prompt comes
    again and the policy has moved little; `remember` them, from any thread.

    Args:
        max_ngram: longest run that is looked up.
        min_ngram: shortest run; 1 matches on the last token alone and is often wrong, which costs
            only the time to judge it.
        answers_per_prompt: earlier answers to keep for each prompt, the oldest going first.
        max_prompts: prompts to keep answers for, the one used longest ago going first.

    Raises:
        SettingError: numbers outside their range.

    References:
        Saxena, "Prompt Lookup Decoding", https://github.com/apoorvumang/prompt-lookup-decoding;
        earlier answers as drafts: "SPEC-RL", https://arxiv.org/abs/2509.23232

    Example:
        >>> import torch
        >>> from miles.rollout.speculative import NgramDraft
        >>> memory = NgramDraft().memory(num_slots=1, max_context=32)
        >>> memory.extend([0], [[7, 8, 9, 1, 7, 8]], [0], None)
        >>> none = torch.zeros(1, 3, dtype=torch.float64)
        >>> memory.propose([0], num_steps=3, temperatures=[1.0], uniforms_RK=none).tokens_RK
        tensor([[9, 1, 7]])
    """

    feature_layers: tuple[int, ...] = ()
    """It reads tokens only."""

    def __init__(
        self,
        *,
        max_ngram: int = 4,
        min_ngram: int = 1,
        answers_per_prompt: int = 8,
        max_prompts: int = 4096,
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise SettingError(
                f"min_ngram is {min_ngram} and max_ngram {max_ngram}; expected 1 <= min_ngram <= "
                "max_ngram"
            )
        if answers_per_prompt < 1 or max_prompts < 1:
            raise SettingError(
                f"answers_per_prompt is {answers_per_prompt} and max_prompts {max_prompts}; "
                "expected 1 or more of each"
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self._answers_per_prompt, self._max_prompts = answers_per_prompt, max_prompts
        self._answers: OrderedDict[Tokens, tuple[_Index, ...]] = OrderedDict()
        self._ends: Counter[tuple[int, int]] = Counter()  # lengths and last tokens of the prompts
        self._num_changes = self._salt = 0
        self._lock = threading.Lock()

    def memory(self, *, num_slots: int, max_context: int) -> _NgramMemory:
        """Room for so many requests of so many tokens.

        Raises:
            SettingError: no room at all.
        """
        if num_slots < 1 or max_context < 1:
            raise SettingError(
                f"num_slots is {num_slots} and max_context {max_context}; expected 1 or more of "
                "each"
            )
        return _NgramMemory(self, num_slots=num_slots, max_context=max_context)

    def remember(self, sample: Sample) -> None:
        """Keep an answer for later requests with the same prompt; those that run see it too.

        Raises:
            EmptyBatchError: a sample without an answer.

        Example:
            >>> from miles.rollout import Sample
            >>> sample = Sample(tokens=[5, 6])
            >>> sample.append([7, 8], logprobs=[-0.1, -2.3], weight_version=3)
            >>> draft = NgramDraft()
            >>> draft.remember(sample)
            >>> memory = draft.memory(num_slots=1, max_context=32)
            >>> memory.extend([0], [[5, 6, 7]], [0], None)
            >>> memory.propose([0], num_steps=1, temperatures=[1.0],
            ...                uniforms_RK=torch.zeros(1, 1, dtype=torch.float64)).tokens_RK
            tensor([[8]])
        """
        split = sample.num_prompt_tokens
        if not 0 < split < len(sample.tokens):
            raise EmptyBatchError(
                f"a sample of {len(sample.tokens)} tokens, {split} of them the prompt, has nothing "
                "to remember; expected a prompt and an answer that was generated"
            )
        # With the end of the prompt, so that the first tokens of an answer are found.
        index = _Index(self.min_ngram, self.max_ngram)
        index.append(sample.tokens[max(0, split - self.max_ngram) :])
        prompt = tuple(sample.tokens[:split])
        end = (split, prompt[-1])
        with self._lock:
            self._salt = hash((self._salt, *sample.tokens)) or 1
            if prompt not in self._answers:
                self._ends[end] += 1
                self._num_changes += 1
            answers = (index, *self._answers.pop(prompt, ()))
            self._answers[prompt] = answers[: self._answers_per_prompt]
            if len(self._answers) > self._max_prompts:
                oldest, _ = self._answers.popitem(last=False)
                self._ends[len(oldest), oldest[-1]] -= 1
                self._ends = +self._ends  # without zeros

    def forget(self) -> None:
        """Drop all answers, for instance when the policy has moved far."""
        with self._lock:
            self._answers.clear()
            self._ends.clear()

    def _answers_to(self, request: _Request) -> tuple[_Index, ...]:
        """Those to the longest known prompt that the request starts with, the newest first."""
        tokens = request.own.tokens
        with self._lock:
            if request.num_changes != self._num_changes:
                request.num_changes, request.prompt = self._num_changes, None
                for length, last in sorted(self._ends, reverse=True):
                    if length <= len(tokens) and tokens[length - 1] == last:
                        prompt = tuple(tokens[:length])
                        if prompt in self._answers:
                            self._answers.move_to_end(prompt)
                            request.prompt = prompt
                            break
            return () if request.prompt is None else self._answers.get(request.prompt, ())


class _Index:
    """One sequence, and where each run of its tokens ended last."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.tokens: list[int] = []
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._next: dict[Tokens, int] = {}

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            for ngram in self.last_ngrams():
                self._next[ngram] = end
            self.tokens.append(token)

    def last_ngrams(self) -> Iterator[Tokens]:
        """The runs that end with the last token, longest first."""
        for size in self._sizes:
            if size <= len(self.tokens):
                yield tuple(self.tokens[-size:])

    def following(self, ngram: Tokens, count: int) -> list[int]:
        """Up to `count` tokens after the latest occurrence that anything follows."""
        place = self._next.get(ngram)
        return [] if place is None else self.tokens[place : place + count]


class _Request:
    """A slot's tokens, and the prompt whose answers it reads."""

    def __init__(self, own: _Index) -> None:
        self.own = own
        self.prompt: Tokens | None = None
        self.num_changes = -1


class _NgramMemory:
    """The tokens of every request (`DraftMemory`)."""

    def __init__(self, draft: NgramDraft, *, num_slots: int, max_context: int) -> None:
        self._draft, self._num_slots, self._max_context = draft, num_slots, max_context
        self._requests: dict[int, _Request] = {}

    @property
    def salt(self) -> int:
        """Another one after every `remember`, whatever prompt it was of; 0 before the first."""
        return self._draft._salt

    def extend(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        features: Sequence[Tensor] | None,
    ) -> None:
        del features  # read by other drafts
        if not len(slots) == len(tokens) == len(starts):
            raise ShapeError(
                f"got {len(slots)} slots, {len(tokens)} runs of tokens and {len(starts)} starts; "
                "expected as many of each"
            )
        for slot, run, start in zip(slots, tokens, starts, strict=True):
            if start == 0:
                self._check_exists(slot)
                index = _Index(self._draft.min_ngram, self._draft.max_ngram)
                index.append(run)
                self._requests[slot] = _Request(index)
            else:
                index = self._request(slot).own
                if start != len(index.tokens) - 1 or list(run[:1]) != index.tokens[-1:]:
                    raise ShapeError(
                        f"slot {slot} was given tokens from position {start} on; expected them to "
                        f"begin with its last one, {index.tokens[-1]} at {len(index.tokens) - 1}"
                    )
                index.append(run[1:])
            if len(index.tokens) > self._max_context:
                raise SettingError(
                    f"slot {slot} holds {len(index.tokens)} tokens; expected at most "
                    f"max_context, {self._max_context}"
                )

    def propose(
        self,
        slots: Sequence[int],
        *,
        num_steps: int,
        temperatures: Sequence[float],
        uniforms_RK: Tensor,
    ) -> Proposal:
        del temperatures  # a copy is the same at any
        rows = [self._continue(slot, num_steps) for slot in slots]
        filled = [row + [0] * (num_steps - len(row)) for row in rows]
        tokens_RK = torch.tensor(filled, dtype=torch.int64, device=uniforms_RK.device)
        return Proposal(
            tokens_RK=tokens_RK.view(len(slots), num_steps),
            lengths=tuple(len(row) for row in rows),
        )

    def move(self, source: int, target: int) -> None:
        request = self._request(source)
        if target in self._requests:
            raise SettingError(f"slot {target} holds a request; expected a free slot to move to")
        self._check_exists(target)
        self._requests[target] = request
        del self._requests[source]

    def free(self, slot: int) -> None:
        self._request(slot)
        del self._requests[slot]

    def _continue(self, slot: int, num_steps: int) -> list[int]:
        request = self._request(slot)
        answers = self._draft._answers_to(request)
        for ngram in request.own.last_ngrams():
            found = request.own.following(ngram, num_steps)
            if found:
                period = len(found)
                return [found[k % period] for k in range(num_steps)]
            for answer in answers:
                found = answer.following(ngram, num_steps)
                if found:
                    return found
        return []

    def _request(self, slot: int) -> _Request:
        if slot not in self._requests:
            raise SettingError(
                f"slot {slot} holds no request; expected one that began with start 0, among "
                f"{sorted(self._requests)}"
            )
        return self._requests[slot]

    def _check_exists(self, slot: int) -> None:
        if not 0 <= slot < self._num_slots:
            raise SettingError(
                f"slot {slot} does not exist; expected 0 to {self._num_slots - 1} (num_slots)"
            )
