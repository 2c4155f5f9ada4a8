"""What speculation saved: counts that add up exactly, and the readings that users know.

Every reading is a ratio of sums over tokens or steps, never a mean of ratios, so that short
requests do not weigh as much as long ones and parts of any size can be put together.

Shapes: R rows (requests) of a verify pass, K draft positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from miles.errors import EmptyBatchError, SettingError, ShapeError
from miles.losses.metrics import Mean, Metrics

if TYPE_CHECKING:
    from miles.rollout._sglang_api import Meta

__all__ = ["AcceptanceStats", "SpeculativeStats"]

NOTHING = (
    "no verify pass was counted, so there is nothing to read; expected at least one step that "
    "judged draft tokens. Turn speculation on, or ask for num_verify_steps first"
)
NO_PROPOSAL = (
    "{steps} verify passes judged no draft token; expected at least one. The draft proposed "
    "nothing, or the controller had switched it off"
)


@dataclass(frozen=True, kw_only=True)
class SpeculativeStats:
    """What a draft saved one request, or several; `+` puts them together.

    Example:
        >>> from miles.rollout.speculative import SpeculativeStats
        >>> one = SpeculativeStats(num_verify_steps=2, num_proposed=6, num_accepted=3, num_tokens=5)
        >>> two = SpeculativeStats(num_verify_steps=8, num_proposed=24, num_accepted=2,
        ...                        num_tokens=10)
        >>> (one + two).accept_length, one.accept_rate
        (1.5, 0.5)
    """

    num_verify_steps: int
    """Steps of the target model."""
    num_proposed: int
    """Draft tokens that it was given."""
    num_accepted: int
    """Draft tokens that it kept, without the bonus token of each step."""
    num_tokens: int
    """Tokens that came of them and stayed; the first of an answer comes of its prefill."""

    def __add__(self, other: SpeculativeStats) -> SpeculativeStats:
        return SpeculativeStats(
            num_verify_steps=self.num_verify_steps + other.num_verify_steps,
            num_proposed=self.num_proposed + other.num_proposed,
            num_accepted=self.num_accepted + other.num_accepted,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    @property
    def accept_rate(self) -> float:
        """Kept draft tokens by proposed ones.

        Raises:
            EmptyBatchError: nothing was verified.
        """
        if not self.num_proposed:
            raise EmptyBatchError(_nothing(self.num_verify_steps))
        return self.num_accepted / self.num_proposed

    @property
    def accept_length(self) -> float:
        """Accepted tokens a step, the bonus token too.

        Raises:
            EmptyBatchError: nothing was verified.
        """
        if not self.num_verify_steps:
            raise EmptyBatchError(NOTHING)
        return 1 + self.num_accepted / self.num_verify_steps

    @classmethod
    def from_meta(cls, meta: Meta, num_tokens: int) -> SpeculativeStats | None:
        """Out of SGLang's `meta_info` of an answer of so many tokens, whatever its version calls
        them; None without any."""
        accepted = _first(
            meta.spec_num_correct_drafts, meta.spec_accepted_drafts, meta.spec_accept_token_num
        )
        proposed = _first(
            meta.spec_num_proposed_drafts, meta.spec_proposed_drafts, meta.spec_draft_token_num
        )
        if accepted is None or proposed is None:
            return None
        steps = meta.spec_verify_ct or 0
        return cls(
            num_verify_steps=steps, num_proposed=proposed, num_accepted=accepted,
            num_tokens=max(num_tokens - 1, 0),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AcceptanceStats:
    """How verify passes went, by place in the draft; `+` puts them together exactly.

    A row of a pass counts as one step. Rows without a proposal (plain decoding) are steps of one
    token, and lower `accept_length` as they should.

    Example:
        >>> from miles.rollout.speculative import AcceptanceStats
        >>> stats = AcceptanceStats.count(accepted=[2, 0, 1], proposed=[2, 2, 2])
        >>> stats.accept_length, stats.accept_rate, stats.accept_rate_by_position
        (2.0, 0.5, (0.6666666666666666, 0.3333333333333333))
        >>> stats.conditional_accept_rates  # of the second draft token, where the first was kept
        (0.6666666666666666, 0.5)
        >>> stats.speedup(verify=1.1, draft_step=0.1)
        1.5384615384615383
    """

    num_verify_steps: int = 0
    """Rows of verify passes."""
    num_tokens: int = 0
    """Tokens that stayed: a stop token or a limit may cut what was accepted."""
    proposed: tuple[int, ...] = ()
    """`[K]`: rows that proposed a token at this position."""
    judged: tuple[int, ...] = ()
    """`[K]`: those whose earlier proposals were all kept, so that this one mattered."""
    accepted: tuple[int, ...] = ()
    """`[K]`: those that kept it."""

    @classmethod
    def count(
        cls,
        *,
        accepted: Sequence[int],
        proposed: Sequence[int],
        num_tokens: int | None = None,
    ) -> AcceptanceStats:
        """One verify pass.

        Args:
            accepted: `[R]`, draft tokens that each row kept, without the bonus token
                (`Verified.num_tokens_R - 1`).
            proposed: `[R]`, draft tokens that each row was given.
            num_tokens: tokens that stayed; None: all, a bonus token a row among them.

        Raises:
            ShapeError: lists of different lengths.
            SettingError: a row that kept more than it proposed.
        """
        if len(accepted) != len(proposed):
            raise ShapeError(
                f"accepted has {len(accepted)} rows and proposed {len(proposed)}; expected as many"
            )
        for row, (kept, given) in enumerate(zip(accepted, proposed, strict=True)):
            if not 0 <= kept <= given:
                raise SettingError(
                    f"row {row} accepted {kept} of {given} draft tokens; expected 0 to {given} "
                    "(the bonus token does not count)"
                )
        places = range(max(proposed, default=0))
        pairs = list(zip(accepted, proposed, strict=True))
        return cls(
            num_verify_steps=len(pairs),
            num_tokens=sum(accepted) + len(pairs) if num_tokens is None else num_tokens,
            proposed=tuple(sum(given > k for _, given in pairs) for k in places),
            judged=tuple(sum(given > k and kept >= k for kept, given in pairs) for k in places),
            accepted=tuple(sum(kept > k for kept, _ in pairs) for k in places),
        )

    def __add__(self, other: AcceptanceStats) -> AcceptanceStats:
        return AcceptanceStats(
            num_verify_steps=self.num_verify_steps + other.num_verify_steps,
            num_tokens=self.num_tokens + other.num_tokens,
            proposed=_add(self.proposed, other.proposed),
            judged=_add(self.judged, other.judged),
            accepted=_add(self.accepted, other.accepted),
        )

    @classmethod
    def total(cls, parts: Iterable[AcceptanceStats]) -> AcceptanceStats:
        """All of them together; the order does not matter."""
        return sum(parts, cls())

    @property
    def accept_length(self) -> float:
        """Accepted tokens a step, with the bonus token; 1 is what plain decoding gives.

        Raises:
            EmptyBatchError: nothing was verified. So for every reading below.
        """
        return 1 + sum(self.accepted) / self._steps()

    @property
    def tokens_per_verify(self) -> float:
        """Tokens a step that stayed; below `accept_length` where answers ended inside a draft."""
        return self.num_tokens / self._steps()

    @property
    def draft_length(self) -> float:
        """Draft tokens a step."""
        return sum(self.proposed) / self._steps()

    @property
    def accept_rate(self) -> float:
        """Kept draft tokens by proposed ones, over all positions."""
        self._proposals()
        return sum(self.accepted) / sum(self.proposed)

    @property
    def accept_rate_by_position(self) -> tuple[float, ...]:
        """`[K]`: share of the proposals at each position that were kept. It falls with k, since a
        token is kept only after all before it."""
        self._proposals()
        return tuple(a / p for a, p in zip(self.accepted, self.proposed, strict=True))

    @property
    def conditional_accept_rates(self) -> tuple[float, ...]:
        """`[K]`: the same among those whose earlier tokens were kept, NaN where there were none.
        This is the sum over tokens of min(p, q) that draft losses speak of."""
        self._proposals()
        pairs = zip(self.accepted, self.judged, strict=True)
        return tuple(a / j if j else float("nan") for a, j in pairs)

    def speedup(self, *, verify: float, draft_step: float) -> float:
        """Tokens a second against plain decoding, from what passes cost.

        Args:
            verify: time of a verify pass in units of a plain decoding step of the same batch.
            draft_step: time of one step of the draft, in the same unit.

        Raises:
            SettingError: a cost that is not positive (`draft_step` may be 0).
        """
        if not (verify > 0 and draft_step >= 0):
            raise SettingError(
                f"verify is {verify} and draft_step {draft_step}; expected times in units of a "
                "decoding step, verify above 0 and draft_step 0 or more"
            )
        return self.tokens_per_verify / (verify + self.draft_length * draft_step)

    def summary(self) -> SpeculativeStats:
        """Without positions: what `sample.metadata["speculative"]` holds."""
        return SpeculativeStats(
            num_verify_steps=self.num_verify_steps,
            num_proposed=sum(self.proposed),
            num_accepted=sum(self.accepted),
            num_tokens=self.num_tokens,
        )

    def metrics(self, *, num_positions: int, prefix: str = "speculative") -> Metrics:
        """For `miles.losses.reduce_metrics`, which merges them over ranks.

        `accept_length`, `tokens_per_verify`, `draft_length`, `accept_rate`, and
        `accept_rate/position_<k>` for `num_positions` positions: the same keys on every rank,
        whatever each of them saw. A reading without a verify pass is NaN after reduction.

        Example:
            >>> from miles.losses import reduce_metrics
            >>> one = AcceptanceStats.count(accepted=[2], proposed=[2])
            >>> parts = [one.metrics(num_positions=2), AcceptanceStats().metrics(num_positions=2)]
            >>> reduce_metrics(parts)["speculative/accept_length"].item()
            3.0
        """
        steps, kept = self.num_verify_steps, sum(self.accepted)
        named = {
            "accept_length": (steps + kept, steps),
            "tokens_per_verify": (self.num_tokens, steps),
            "draft_length": (sum(self.proposed), steps),
            "accept_rate": (kept, sum(self.proposed)),
        }
        for k in range(num_positions):
            inside = k < len(self.proposed)
            pair = (self.accepted[k], self.proposed[k]) if inside else (0, 0)
            named[f"accept_rate/position_{k}"] = pair
        return {
            f"{prefix}/{name}": Mean(*torch.tensor(pair, dtype=torch.float64).unbind())
            for name, pair in named.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AcceptanceStats:
        """What `to_dict` returned."""
        return cls(
            num_verify_steps=state["num_verify_steps"],
            num_tokens=state["num_tokens"],
            proposed=tuple(state["proposed"]),
            judged=tuple(state["judged"]),
            accepted=tuple(state["accepted"]),
        )

    def _steps(self) -> int:
        if not self.num_verify_steps:
            raise EmptyBatchError(NOTHING)
        return self.num_verify_steps

    def _proposals(self) -> None:
        if not sum(self.proposed):
            raise EmptyBatchError(_nothing(self.num_verify_steps))


def _nothing(steps: int) -> str:
    return NO_PROPOSAL.format(steps=steps) if steps else NOTHING


def _add(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
