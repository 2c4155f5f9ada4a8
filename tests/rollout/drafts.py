"""Drafts for tests of the engine; all of them check what the engine tells them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miles.rollout.speculative.draft import Proposal
from tests.models import VOCAB

Rows = Callable[[list[int], float], Tensor]
"""Tokens of a request and its temperature to `[V]`, the distribution of the next draft token."""


class ScriptedDraft:
    """Draws from `rows`; with `point`, takes the most likely token and says so."""

    def __init__(
        self,
        rows: Rows,
        *,
        point: bool = False,
        feature_layers: tuple[int, ...] = (),
        fail: Callable[[str, Sequence[int]], None] = lambda what, slots: None,
    ) -> None:
        self.rows, self.point, self.feature_layers, self.fail = rows, point, feature_layers, fail
        self.memories: list[ScriptedMemory] = []

    def memory(self, *, num_slots: int, max_context: int) -> "ScriptedMemory":
        self.memories.append(ScriptedMemory(self, num_slots, max_context))
        return self.memories[-1]

    @property
    def used(self) -> "ScriptedMemory":
        return self.memories[-1]


class ScriptedMemory:
    def __init__(self, draft: ScriptedDraft, num_slots: int, max_context: int) -> None:
        self.draft, self.num_slots, self.max_context = draft, num_slots, max_context
        self.tokens: dict[int, list[int]] = {}
        self.features: dict[int, list[Tensor]] = {}
        self.ended: list[tuple[list[int], Tensor | None]] = []
        self.calls: list[tuple[str, Any]] = []

    def extend(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        features: Sequence[Tensor] | None,
    ) -> None:
        self._note("extend", slots)
        assert (features is not None) == bool(self.draft.feature_layers)
        assert len(set(slots)) == len(slots) and all(0 <= s < self.num_slots for s in slots)
        for index, (slot, run, start) in enumerate(zip(slots, tokens, starts, strict=True)):
            if start == 0:
                self.tokens[slot], self.features[slot] = [run[0]], []
            held = self.tokens[slot]
            assert start == len(held) - 1 and run[0] == held[-1] and len(run) > 1
            held += run[1:]
            assert len(held) < self.max_context
            if features is not None:
                assert len(features[index]) == len(run) - 1
                self.features[slot].append(features[index].clone())

    def propose(
        self,
        slots: Sequence[int],
        *,
        num_steps: int,
        temperatures: Sequence[float],
        uniforms_RK: Tensor,
    ) -> Proposal:
        self._note("propose", slots, num_steps)
        assert uniforms_RK.shape == (len(slots), num_steps) and uniforms_RK.dtype == torch.float64
        tokens, probs = [], []
        for slot, temperature, draws in zip(slots, temperatures, uniforms_RK, strict=True):
            assert len(self.tokens[slot]) + num_steps < self.max_context
            run, qs = list(self.tokens[slot]), []
            for uniform in draws.tolist():
                q_V = self.draft.rows(run, temperature).double()
                if self.draft.point or temperature == 0:
                    token = int(q_V.argmax())
                    q_V = torch.zeros_like(q_V)
                    q_V[token] = 1
                else:
                    token = int(torch.searchsorted(q_V.cumsum(0) / q_V.sum(), uniform, right=True))
                run.append(token)
                qs.append(q_V.float())
            tokens.append(run[-num_steps:])
            probs.append(torch.stack(qs))
        return Proposal(
            tokens_RK=torch.tensor(tokens),
            probs_RKV=None if self.draft.point else torch.stack(probs),
        )

    def move(self, source: int, target: int) -> None:
        self._note("move", [source])
        assert target not in self.tokens
        self.tokens[target] = self.tokens.pop(source)
        self.features[target] = self.features.pop(source)

    def free(self, slot: int) -> None:
        tokens, features = self.tokens.pop(slot), self.features.pop(slot)
        self.ended.append((tokens, torch.cat(features) if features else None))
        self._note("free", [slot])

    def _note(self, what: str, slots: Sequence[int], *more: Any) -> None:
        self.calls.append((what, (list(slots), *more)))
        self.draft.fail(what, slots)


def random_rows(seed: int = 0, vocab: int = VOCAB, sharpness: float = 1.0) -> Rows:
    """Looks at the last token only, and knows nothing of the model."""
    generator = torch.Generator().manual_seed(seed)
    table_VV = torch.randn(vocab, vocab, generator=generator) * sharpness
    return lambda tokens, temperature: table_VV[tokens[-1]].softmax(-1)


def oracle_rows(model: Any) -> Rows:
    """The model's own distribution, from a pass over all tokens."""

    def rows(tokens: list[int], temperature: float) -> Tensor:
        with torch.no_grad():
            logits_V: Tensor = model(torch.tensor([tokens])).logits[0, -1]
        return (logits_V / (temperature or 1)).softmax(-1)

    return rows


def half_right_rows(model: Any, seed: int = 0) -> Rows:
    """The model's own distribution after even tokens, else a random one: rows of every length."""
    right, wrong = oracle_rows(model), random_rows(seed)
    return lambda tokens, temperature: (wrong if tokens[-1] % 2 else right)(tokens, temperature)
