"""What a draft model computes for an engine, on the device, as CUDA graphs where there is one.

Shapes: R slots of a call, with padding, M rows of a slot, K draft tokens, F features of a position,
H hidden size, V vocabulary entries of the draft or of the target, U uniform numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from miles.rollout._graph import (
    Outputs,
    StepGraphs,
    coarse,
    graphs_run_on,
    power_of_two,
    round_up,
)

if TYPE_CHECKING:
    from miles.rollout.speculative._model_draft import ModelDraft

__all__ = ["DraftSteps"]

Mode = Literal["greedy", "sampled", "mixed"]
Step = Callable[[int, int, int], Outputs]
Rows = tuple[list[int], Sequence[int], bool]
"""The slot of each row of a call, the rows of those asked, and whether slots are 0, 1, ..."""

KEY_TILE, GRAPH_KEY_TILE = 64, 256
GRAPH_ROW_TILE = 16
"""As of the engine's steps: each shape is captured, at its second time."""
GRAPH_WIDTH = 16
"""Rows of a slot that a step of the target settles at most; prompts have more."""
SETTLE_TOKENS = 2048
"""Most tokens of a pass, padding included. More are settled in pieces, so that few shapes do: for a
new one attention's kernel may be made first (cuDNN), which takes longer than the pass."""


class DraftSteps:
    """Settles tokens and proposes some, for slots whose next places the caller knows.

    Padding rows of a call belong to slots that are not asked, and write beyond what those have
    settled, as proposals do: there nothing is looked at before it is written again.
    """

    def __init__(
        self, draft: ModelDraft, *, num_slots: int, max_context: int, cuda_graphs: bool
    ) -> None:
        self._draft, self._max_context, self._device = draft, max_context, draft.device
        self._graphed = cuda_graphs and graphs_run_on(self._device)
        self._row_tile = GRAPH_ROW_TILE if self._graphed else 1
        self._key_tile = GRAPH_KEY_TILE if self._graphed else KEY_TILE
        self._room = round_up(num_slots, self._row_tile)
        # One more slot, for padding where the slots are not in order.
        self._keys = [draft.slot_keys(self._room + 1, max_context) for _ in range(draft.depths)]
        # Of each module, its state at its last settled row; the next module reads it one row later.
        self._states = [
            torch.zeros((self._room + 1, draft.hidden_size), dtype=draft.dtype, device=self._device)
            for _ in range(draft.depths)
        ]
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._addresses: tuple[int, ...] = ()
        width = GRAPH_WIDTH if self._graphed else 0
        empty = partial(torch.zeros, device=self._device)
        # What graphs read lies where it lay when they were captured.
        most = max(self._room * width, SETTLE_TOKENS if width else 0)
        self._numbers = empty(power_of_two(self._room) * 3 + most, dtype=torch.int64)
        self._features = empty((most, draft.num_features), dtype=draft.dtype)
        self._uniforms = empty(self._room * width, dtype=torch.float64)
        self._temperatures = empty((self._room, 1), dtype=torch.float32)

    def clear(self, slots: Sequence[int]) -> None:
        """Forget what these slots held."""
        slots_R = self._upload(torch.tensor(slots))
        for keys in self._keys:
            keys.clear(slots_R)
        for states in self._states:
            states.index_fill_(0, slots_R, 0)

    def copy(self, source: int, target: int) -> None:
        """Give one slot's to another."""
        for keys in self._keys:
            keys.copy(source, target)
        for states in self._states:
            states[target] = states[source]

    def settle(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        tokens: Sequence[Sequence[int]],
        features: Sequence[Tensor] | None,
    ) -> None:
        """Process rows from the next place of each slot on; `places` are those of every slot."""
        width, few = max(map(len, tokens)), power_of_two(len(slots))
        piece = max(GRAPH_WIDTH, SETTLE_TOKENS // few)
        if self._graphed and width > piece:
            self._settle_pieces(slots, list(places), tokens, features, piece)
            return
        # As graphs few shapes: what is beyond the tokens is padding.
        if not self._graphed:
            every, own, in_order = _side_by_side(slots)
        elif width <= GRAPH_WIDTH:
            width = max(4, power_of_two(width))
            every, own, in_order = self._in_place(slots)
        else:
            width = coarse(width)
            every = [*slots, *[self._room] * (few - len(slots))]
            own, in_order = range(len(slots)), False
        rows = len(every)
        num_keys = self._reserve(_end(slots, places, tokens))
        of_rows: list[Sequence[int]] = [()] * rows
        for row, new in zip(own, tokens, strict=True):
            of_rows[row] = new
        filled = [[*new, *[0] * (width - len(new))] for new in of_rows]
        numbers = torch.tensor(
            [
                every,
                [places[slot] if slot < len(places) else 0 for slot in every],
                [len(new) for new in of_rows],
                *zip(*filled, strict=True),
            ]
        )
        if not self._graphed:
            features_RMF = None
            if features is not None:
                held = self._features.new_empty((rows * width, self._draft.num_features))
                features_RMF = _spread(features, own, held, width, self._upload)
            self._settle_rows(in_order, num_keys, self._upload(numbers), features_RMF)
            return
        if features is not None:
            _spread(features, own, self._features[: rows * width], width, self._upload)
        self._upload(numbers.flatten(), self._numbers)
        self._step("settle", in_order, features is not None)(rows, num_keys, width)

    def _settle_pieces(
        self,
        slots: Sequence[int],
        places: list[int],
        tokens: Sequence[Sequence[int]],
        features: Sequence[Tensor] | None,
        piece: int,
    ) -> None:
        """`settle`, so many tokens of each, and then what is left of those that have more."""
        self._reserve(_end(slots, places, tokens))  # at once, since graphs don't survive a move
        heads = None if features is None else [given[:piece] for given in features]
        self.settle(slots, places, [new[:piece] for new in tokens], heads)
        for slot, new in zip(slots, tokens, strict=True):
            places[slot] += min(piece, len(new))
        rows = [row for row, new in enumerate(tokens) if len(new) > piece]
        rest = None if features is None else [features[row][piece:] for row in rows]
        left = [tokens[row][piece:] for row in rows]
        self.settle([slots[row] for row in rows], places, left, rest)

    def propose(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        temperatures: Sequence[float],
        uniforms_RK: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The target's ids `[R, K]`, and what they were drawn from, `[R, K, V]`.

        The next call may write over both.
        """
        num_steps = uniforms_RK.shape[1]
        num_keys = self._reserve(max(places[slot] for slot in slots) + num_steps - 1)
        graphed = self._graphed and num_steps <= GRAPH_WIDTH
        every, own, in_order = self._in_place(slots) if graphed else _side_by_side(slots)
        numbers = torch.tensor(
            [every, [places[slot] if slot < len(places) else 0 for slot in every]]
        )
        of_rows = [float(any(temperatures))] * len(every)
        for row, temperature in zip(own, temperatures, strict=True):
            of_rows[row] = temperature
        temperature_R1 = torch.tensor(of_rows, dtype=torch.float32)[:, None]
        uniforms_RK = uniforms_RK.to(self._device)
        mode: Mode = "mixed"
        if all(temperatures) or not any(temperatures):
            mode = "sampled" if any(temperatures) else "greedy"
        if not graphed:
            return self._propose_rows(
                in_order,
                mode,
                num_keys,
                self._upload(numbers),
                self._upload(temperature_R1),
                uniforms_RK,
            )
        own_R = self._upload(torch.tensor(list(own)))
        self._upload(numbers.flatten(), self._numbers)
        self._upload(temperature_R1, self._temperatures)
        held = self._uniforms[: len(every) * num_steps].view(-1, num_steps)
        held.index_copy_(0, own_R, uniforms_RK)
        step = self._step("propose", in_order, mode)
        tokens_RK, probs_RKV, _ = step(len(every), num_keys, num_steps)
        return tokens_RK[own_R], None if probs_RKV is None else probs_RKV[own_R]

    def _in_place(self, slots: Sequence[int]) -> Rows:
        """All slots from the first on, up to a tile: one shape for any order of those asked."""
        every = list(range(round_up(max(slots) + 1, self._row_tile)))
        return every, slots, True

    def _reserve(self, num_keys: int) -> int:
        """Room for so many keys, in whole tiles."""
        num_keys = min(round_up(num_keys, self._key_tile), self._max_context)
        moved = [keys.reserve(num_keys) for keys in self._keys]
        if self._graphed:
            draft = self._draft
            parts = [draft.parameters(), draft.buffers()]
            parts += [part.parameters() for part in draft.borrowed()]
            addresses = tuple(tensor.data_ptr() for tensor in chain.from_iterable(parts))
            if any(moved) or addresses != self._addresses:
                self._steps, self._addresses = {}, addresses
        return num_keys

    def _step(self, what: str, *settings: Any) -> Step:
        key = (what, *settings)
        if key not in self._steps:
            step = self._settle_graphed if what == "settle" else self._propose_graphed
            self._steps[key] = StepGraphs(partial(step, *settings))
        return self._steps[key]

    def _settle_graphed(
        self, in_order: bool, featured: bool, rows: int, num_keys: int, width: int
    ) -> Outputs:
        numbers = self._numbers[: (3 + width) * rows].view(3 + width, rows)
        features_RMF = None
        if featured:
            features_RMF = self._features[: rows * width].view(rows, width, -1)
        self._settle_rows(in_order, num_keys, numbers, features_RMF)
        return numbers, None, None

    def _propose_graphed(
        self, in_order: bool, mode: Mode, rows: int, num_keys: int, num_steps: int
    ) -> Outputs:
        tokens_RK, probs_RKV = self._propose_rows(
            in_order,
            mode,
            num_keys,
            self._numbers[: 2 * rows].view(2, rows),
            self._temperatures[:rows],
            self._uniforms[: rows * num_steps].view(rows, num_steps),
        )
        return tokens_RK, probs_RKV, None

    def _settle_rows(
        self, in_order: bool, num_keys: int, numbers: Tensor, features_RMF: Tensor | None
    ) -> None:
        draft = self._draft
        slots_R, places_R, counts_R, ids_RM = *numbers[:3], numbers[3:].T
        rows, width = ids_RM.shape
        index_RM = places_R[:, None] + torch.arange(width, device=self._device)
        last_R = (counts_R - 1).clamp(min=0)
        every_R = torch.arange(rows, device=self._device)
        state_RMH = None if features_RMF is None else draft.fuse(features_RMF)
        before = [states[slots_R] for states in self._states]
        for depth, keys in enumerate(self._keys):
            if depth:
                assert state_RMH is not None
                state_RMH = torch.cat([before[depth - 1][:, None], state_RMH[:, :-1]], dim=1)
            keys.begin(slots_R, index_RM, in_order=in_order, num_keys=num_keys, first_key=depth)
            positions_RM = (index_RM - depth).clamp(0, self._max_context - 1)
            state_RMH = draft.step(ids_RM, state_RMH, positions_RM, keys, depth)
            last_RH = state_RMH[every_R, last_R]
            kept_RH = torch.where(counts_R[:, None] > 0, last_RH, before[depth])
            self._states[depth].index_copy_(0, slots_R, kept_RH.to(draft.dtype))

    def _propose_rows(
        self,
        in_order: bool,
        mode: Mode,
        num_keys: int,
        numbers: Tensor,
        temperature_R1: Tensor,
        uniforms_RK: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        draft, (slots_R, places_R) = self._draft, numbers
        target_ids = draft.target_ids
        rows, num_steps = uniforms_RK.shape
        tokens_RK = torch.zeros((rows, num_steps), dtype=torch.int64, device=self._device)
        probs_RKV = None
        if mode != "greedy":
            size = (rows, num_steps, draft.vocab_size)
            make = torch.empty if target_ids is None else torch.zeros
            probs_RKV = make(size, dtype=torch.float32, device=self._device)
        state_RMH = self._states[0][slots_R][:, None]
        for i in range(num_steps):
            logits_RV = draft.logits(state_RMH[:, -1])
            if probs_RKV is None:
                drawn_R = logits_RV.argmax(-1)
            else:
                drawn_R, probs_RV = _draw(logits_RV, mode, temperature_R1, uniforms_RK[:, i])
                if target_ids is None:
                    probs_RKV[:, i] = probs_RV
                else:
                    probs_RKV[:, i].index_copy_(1, target_ids, probs_RV)
            tokens_RK[:, i] = drawn_R if target_ids is None else target_ids[drawn_R]
            if i == num_steps - 1:
                break
            depth, begin = 0, i
            if draft.depths > 1:  # the next module has seen none of the proposed tokens
                depth, begin = i + 1, 0
                before = self._states[i][slots_R][:, None]
                state_RMH = before if i == 0 else torch.cat([before, state_RMH], dim=1)
            index_RM = places_R[:, None] + torch.arange(begin, i + 1, device=self._device)
            keys = self._keys[depth]
            keys.begin(slots_R, index_RM, in_order=in_order, num_keys=num_keys, first_key=depth)
            positions_RM = (index_RM - depth).clamp(0, self._max_context - 1)
            state_RMH = draft.step(
                tokens_RK[:, begin : i + 1], state_RMH, positions_RM, keys, depth
            )
        return tokens_RK, probs_RKV

    def _upload(self, numbers: Tensor, held: Tensor | None = None) -> Tensor:
        """To the device, into the beginning of `held` if given; nobody waits for it."""
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
        if held is None:
            return numbers.to(self._device, non_blocking=True)
        return held[: len(numbers)].copy_(numbers, non_blocking=True)


def _draw(
    logits_RV: Tensor, mode: Mode, temperature_R1: Tensor, uniforms_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids of the draft's vocabulary, `[R]`, and their distribution, float32 `[R, V]`."""
    sampled_R1 = temperature_R1 > 0
    scaled_RV = logits_RV.float() / torch.where(sampled_R1, temperature_R1, 1)
    probs_RV = scaled_RV.softmax(-1)
    if mode == "mixed":
        best_R1 = logits_RV.argmax(-1, keepdim=True)
        sure_RV = torch.zeros_like(probs_RV).scatter_(1, best_R1, 1)
        probs_RV = torch.where(sampled_R1, probs_RV, sure_RV)
    cdf_RV = probs_RV.double().cumsum(-1)
    total_R1 = cdf_RV[:, -1:]
    at_R1 = torch.minimum(
        uniforms_R[:, None] * total_R1, total_R1.nextafter(torch.zeros_like(total_R1))
    )
    drawn_R = torch.searchsorted(cdf_RV, at_R1, right=True)[:, 0]
    return drawn_R.clamp(max=probs_RV.shape[1] - 1), probs_RV


def _end(slots: Sequence[int], places: Sequence[int], tokens: Sequence[Sequence[int]]) -> int:
    """The place after the last of these."""
    return max(places[slot] + len(new) for slot, new in zip(slots, tokens, strict=True))


def _side_by_side(slots: Sequence[int]) -> Rows:
    """The slots that are asked alone."""
    places = range(len(slots))
    return list(slots), places, list(slots) == list(places)


def _spread(
    features: Sequence[Tensor],
    own: Sequence[int],
    held_TF: Tensor,
    width: int,
    upload: Callable[[Tensor], Tensor],
) -> Tensor:
    """`[R, M, F]` in `held`, with zeros where there is none; three launches."""
    pairs = zip(own, features, strict=True)
    rows = [range(row * width, row * width + len(given)) for row, given in pairs]
    places = list(chain.from_iterable(rows))
    given_TF = torch.cat([given.to(held_TF.device, held_TF.dtype) for given in features])
    held_TF.zero_().index_copy_(0, upload(torch.tensor(places)), given_TF)
    return held_TF.view(-1, width, held_TF.shape[1])
