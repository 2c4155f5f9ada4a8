"""What a draft is to an engine.

Shapes: R rows (requests), K draft tokens of a step, V the target's vocabulary, F features of a
position, n tokens of one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["FINAL", "Draft", "DraftMemory", "Proposal"]

FINAL = -1
"""In `Draft.feature_layers`: the output of the target's final norm, which its head reads."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Draft tokens, and the distributions that they were drawn from."""

    tokens_RK: Tensor
    """int64 `[R, K]`."""
    probs_RKV: Tensor | None = None
    """float32 `[R, K, V]` over the target's vocabulary; None: the draft had no choice, so each
    token counts as drawn with probability 1."""
    lengths: tuple[int, ...] | None = None
    """`[R]`: how many tokens of each row are proposals, the others being filling; None: all."""


class DraftMemory(Protocol):
    """A draft's state of every request that an engine runs; a slot is a request.

    One that copies from earlier answers has `salt` besides: an int that is another one whenever an
    answer is added to what it copies from, and 0 before the first. All random numbers of its engine
    depend on it, since a request whose seed made such an answer must not be judged, nor go on where
    the copy ends, by the numbers that made it.
    """

    def extend(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        features: Sequence[Tensor] | None,
    ) -> None:
        """The target has settled tokens.

        `tokens[i]` are those of `slots[i]` at positions `starts[i]` and after, the last of which
        the target has not processed yet; `features[i]`, `[n - 1, F]`, belong to the others. A slot
        begins anew with start 0; the next `starts[i]` is the position of the last token of this
        call.
        """
        ...

    def propose(
        self,
        slots: Sequence[int],
        *,
        num_steps: int,
        temperatures: Sequence[float],
        uniforms_RK: Tensor,
    ) -> Proposal:
        """`num_steps` tokens after the settled ones of each slot.

        `uniforms_RK` are float64 in [0, 1), one for each token that is drawn; at temperature 0 the
        most likely one is taken.
        """
        ...

    def move(self, source: int, target: int) -> None:
        """Give what `source` holds to the free slot `target`."""
        ...

    def free(self, slot: int) -> None:
        """Forget what the slot holds."""
        ...


@runtime_checkable
class Draft(Protocol):
    """Proposes tokens that the target then judges."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Decoder layers of the target, from 0, whose outputs it reads, concatenated in this order;
        `FINAL` among them; () if it reads tokens only."""
        ...

    def memory(self, *, num_slots: int, max_context: int) -> DraftMemory:
        """Room for so many requests of so many tokens."""
        ...
