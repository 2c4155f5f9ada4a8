"""A draft model's state of an engine's requests.

Shapes: R slots of a call, K draft tokens, V the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError
from miles.rollout.speculative._draft_steps import GRAPH_WIDTH, DraftSteps
from miles.rollout.speculative.draft import Proposal

if TYPE_CHECKING:
    from miles.rollout.speculative._model_draft import ModelDraft

__all__ = ["ModelMemory"]


class ModelMemory:
    """Follows `DraftMemory`; see there.

    A token of position p has its keys at place p - 1, where the feature before it stands beside it
    (at place p for drafts without features). What was proposed lies beyond what is settled, until
    the next `extend` writes over it.
    """

    def __init__(
        self, draft: ModelDraft, *, num_slots: int, max_context: int, cuda_graphs: bool = True
    ) -> None:
        if num_slots < 1 or max_context <= draft.depths:
            raise SettingError(
                f"got num_slots={num_slots}, max_context={max_context}; expected at least 1 slot "
                f"of at least {draft.depths + 1} tokens"
            )
        self._draft, self._num_slots, self._max_context = draft, num_slots, max_context
        self._steps = DraftSteps(
            draft, num_slots=num_slots, max_context=max_context, cuda_graphs=cuda_graphs
        )
        self._places = [0] * num_slots  # where a slot's next row goes

    @torch.no_grad()
    def extend(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        features: Sequence[Tensor] | None,
    ) -> None:
        """Take settled tokens; see `DraftMemory.extend`.

        Raises:
            ShapeError, DtypeError: Another number of features than tokens, or of another width.
            SettingError: A slot that does not exist, or a start that is not where it ended.
        """
        self._check(slots, tokens, starts, features)
        whole = self._draft.reads_first_token
        fresh = [slot for slot, start in zip(slots, starts, strict=True) if start == 0]
        if fresh:
            self._steps.clear(fresh)
        for slot in fresh:
            self._places[slot] = 0
        rows = [
            (i, new if start == 0 and whole else new[1:])
            for i, (new, start) in enumerate(zip(tokens, starts, strict=True))
        ]
        rows = [(i, new) for i, new in rows if new]
        if not rows:
            return
        reads = features is not None and self._draft.feature_layers
        for wide in (False, True):  # a few long rows must not pad the others
            part = [(i, new) for i, new in rows if (len(new) > GRAPH_WIDTH) == wide]
            if not part:
                continue
            given = [features[i] for i, _ in part] if features is not None and reads else None
            own = [slots[i] for i, _ in part]
            self._steps.settle(own, self._places, [new for _, new in part], given)
            for slot, (_, new) in zip(own, part, strict=True):
                self._places[slot] += len(new)

    @torch.no_grad()
    def propose(
        self,
        slots: Sequence[int],
        *,
        num_steps: int,
        temperatures: Sequence[float],
        uniforms_RK: Tensor,
    ) -> Proposal:
        """Tokens after the settled ones; see `DraftMemory.propose`.

        Nothing here waits for the device. The next call may write over what this one returns.

        Raises:
            SettingError: A slot without a settled token, too many steps, no room for them, or a
                temperature below 0.
            ShapeError, DtypeError: Not one uniform number for each token.
        """
        self._check_proposal(slots, num_steps, temperatures, uniforms_RK)
        tokens_RK, probs_RKV = self._steps.propose(slots, self._places, temperatures, uniforms_RK)
        return Proposal(tokens_RK=tokens_RK, probs_RKV=probs_RKV)

    def move(self, source: int, target: int) -> None:
        """Give what `source` holds to the free slot `target`."""
        self._steps.copy(source, target)
        self._places[target], self._places[source] = self._places[source], 0

    def free(self, slot: int) -> None:
        """Forget what the slot holds."""
        self._places[slot] = 0

    def _check(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        features: Sequence[Tensor] | None,
    ) -> None:
        draft = self._draft
        counts = {len(slots), len(tokens), len(starts)} | (
            {len(features)} if features is not None else set()
        )
        if len(counts) != 1:
            raise ShapeError(
                f"got {len(slots)} slots, {len(tokens)} lists of tokens, {len(starts)} starts and "
                f"{'no' if features is None else len(features)} features; expected one for each"
            )
        if features is None and draft.feature_layers:
            raise ShapeError(
                f"this draft reads the target's layers {draft.feature_layers}; got no features"
            )
        self._check_slots(slots)
        for i, (slot, new, start) in enumerate(zip(slots, tokens, starts, strict=True)):
            ended = self._places[slot] - (1 if draft.reads_first_token else 0)
            if not new or start not in (0, ended):
                raise SettingError(
                    f"slot {slot} is to go on at position {start} with {len(new)} tokens; expected "
                    f"one or more from {ended} on, its last settled token, or from 0 to begin anew"
                )
            if start + len(new) > self._max_context:
                raise SettingError(
                    f"slot {slot} would hold {start + len(new)} tokens; max_context is "
                    f"{self._max_context}"
                )
            if features is not None and draft.feature_layers:
                draft.check_features(features[i])
                if features[i].shape[:-1] != (len(new) - 1,):
                    raise ShapeError(
                        f"slot {slot}: got features of shape {tuple(features[i].shape)} with "
                        f"{len(new)} tokens; expected [{len(new) - 1}, {draft.num_features}], one "
                        "row for each token but the last"
                    )

    def _check_slots(self, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or not all(0 <= s < self._num_slots for s in slots):
            raise SettingError(
                f"slots are {list(slots)}; expected different ones of 0 to {self._num_slots - 1}"
            )

    def _check_proposal(
        self,
        slots: Sequence[int],
        num_steps: int,
        temperatures: Sequence[float],
        uniforms_RK: Tensor,
    ) -> None:
        self._draft.check_steps(num_steps)
        self._check_slots(slots)
        if not slots:
            raise SettingError("no slots to propose for; skip the call")
        for slot in slots:
            if not self._places[slot]:
                raise SettingError(
                    f"slot {slot} has no settled token to draft from; extend it first (a draft "
                    "that reads features needs two tokens)"
                )
            if self._places[slot] + num_steps - 1 > self._max_context:
                raise SettingError(
                    f"slot {slot} has {self._max_context - self._places[slot]} places left of "
                    f"{self._max_context}, too few for {num_steps} tokens; propose fewer"
                )
        if len(temperatures) != len(slots) or min(temperatures) < 0:
            raise SettingError(
                f"temperatures are {list(temperatures)}; expected {len(slots)} numbers of 0 or more"
            )
        if uniforms_RK.shape != (len(slots), num_steps):
            raise ShapeError(
                f"uniforms_RK has shape {tuple(uniforms_RK.shape)}; expected "
                f"{(len(slots), num_steps)}"
            )
        if uniforms_RK.dtype != torch.float64:
            raise DtypeError(f"uniforms_RK is {uniforms_RK.dtype}; expected float64")
