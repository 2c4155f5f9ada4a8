"""How many draft tokens a step is worth, whether any, and when the draft should learn.

Shapes: K draft positions, A acceptances, B batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.errors import CheckpointError, EmptyBatchError, MissingExtraError, SettingError
from miles.rollout.speculative.cost import (
    CostModel,
    CostSample,
    RowsLeft,
    expected_tokens,
    speedup_of_rows,
)
from miles.rollout.speculative.stats import AcceptanceStats

__all__ = ["CostModel", "CostSample", "DraftController", "Simulation", "simulate"]

PRIOR_ROWS = 8.0
"""How many rows a guess of a position's acceptance counts as."""
RATIO_ROWS = 50.0
"""How many rows a position needs before it says how far it is behind the one before."""
TRIAL = 4.0
"""What a trial is taken to cost, in terms of what such a step costs more than a plain one: before
it, the draft has to be told of all the tokens of the plain steps."""
PATIENCE = 8.0
"""How many times as rare trials become, doubling, while they show nothing new."""

REMAINING_TILE = 8
"""Predictions are made anew when rows have come nearer to their end by so many tokens."""


class DraftController:
    """Chooses the number of draft tokens of each step from what was accepted and what steps cost.

    `choose` before a step, `observe` after it. Acceptance is kept for each position, over rows,
    with older ones fading; a position that was not tried yet is taken to be like the one before it,
    and one that was, but not lately, to be below that as it used to be, less and less.
    The choice is the number with the largest predicted speedup, 0 (plain decoding) unless that is
    above 1 by `margin`. What runs is left only for what is better by `margin`, so that the choice
    does not flicker, or when it no longer is above 1 by half of that: predictions err, and what is
    predicted to gain next to nothing may lose. While it is 0, single draft tokens are tried now and
    then to see whether the draft has recovered; they may cost at most `exploration` of the time
    even if each is refused, what the draft has to be told before counted in, and are the only steps
    that may be predicted to lose. Each that shows nothing new doubles the time to the next, up to
    eightfold; once one keeps far more than was believed, what was believed counts half.

    Whether the draft should learn is told by slower rates: the draft tokens that are kept a step,
    over the positions that were measured, against those of the best rates so far.

    Args:
        cost: what steps cost; may be replaced at any time (`controller.cost = ...`).
        max_steps: most draft tokens of a step.
        margin: how much better another number has to be, and any number than plain decoding.
        exploration: share of the time for trials while drafts are off; 0: never again on, unless
            the batch changes.
        halflife: rows after which an observation counts half in the choice.
        initial_acceptance: what an unknown draft is believed to reach; above 0, so that it is
            tried.
        train_share: the draft should learn when this share of its best is lost.
        train_halflife: rows after which an observation counts half in that, and in how far a
            position that is not tried is below the one before it; at least the rows of an RL step,
            since the best of few is luck.
        min_rows: rows that a position needs before its rate counts there.

    Raises:
        SettingError: a number outside its range.

    Example:
        >>> from miles.rollout.speculative import AcceptanceStats, CostModel, DraftController
        >>> cost = CostModel(floor=10e-3, per_token=0.1e-3, knee=64, draft_floor=1e-3)
        >>> controller = DraftController(cost, max_steps=3)
        >>> controller.choose(8), controller.choose(512)
        (3, 0)
        >>> controller.observe(AcceptanceStats.count(accepted=[0] * 50, proposed=[3] * 50))
        >>> controller.choose(8), round(controller.acceptance[0], 2)
        (0, 0.1)
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        max_steps: int,
        margin: float = 0.05,
        exploration: float = 0.01,
        halflife: float = 2000.0,
        initial_acceptance: float = 0.7,
        train_share: float = 0.1,
        train_halflife: float = 4000.0,
        min_rows: float = 500.0,
    ) -> None:
        if max_steps < 1:
            raise SettingError(f"max_steps is {max_steps}; expected 1 or more draft tokens")
        if not (margin >= 0 and 0 <= exploration < 1 and 0 < train_share < 1):
            raise SettingError(
                f"margin is {margin}, exploration {exploration} and train_share {train_share}; "
                "expected shares: 0 or more, 0 up to and without 1, and between 0 and 1"
            )
        if not 0 < initial_acceptance <= 1:
            raise SettingError(
                f"initial_acceptance is {initial_acceptance}; expected above 0, so that the draft "
                "is tried at all, and at most 1"
            )
        if not (halflife > 0 and train_halflife > 0 and min_rows > 0):
            raise SettingError(
                f"halflife is {halflife}, train_halflife {train_halflife} and min_rows {min_rows}; "
                "expected positive numbers of rows"
            )
        self.cost = cost
        self.max_steps = max_steps
        self._margin, self._exploration = margin, exploration
        self._initial = initial_acceptance
        self._train_share, self._min_rows = train_share, min_rows
        self._recent = _Rates(max_steps, halflife)
        self._slow = _Rates(max_steps, train_halflife)
        self._best = [0.0] * max_steps
        self._ratios = [1.0] * max_steps
        """Of each position's acceptance to that of the one before, up to 1, when it was last tried;
        then towards 1."""
        self._current = 0
        self._credit = 0.0
        self._patience = 1.0
        self._predicted: dict[tuple[int, int, int], tuple[tuple[float, ...], float, float]] = {}
        self._predicted_by = cost

    @property
    def acceptance(self) -> tuple[float, ...]:
        """`[K]`: believed share kept at each position where all before it were kept."""
        rates, believed = [], self._initial
        recent = zip(self._recent.accepted, self._recent.judged, self._ratios, strict=True)
        for kept, judged, ratio in recent:
            believed = (kept + PRIOR_ROWS * believed * ratio) / (judged + PRIOR_ROWS)
            rates.append(believed)
        return tuple(rates)

    def speedups(self, batch: int, remaining: Sequence[int] | None = None) -> tuple[float, ...]:
        """`[K + 1]`: predicted tokens a second for 0 to K draft tokens, against plain decoding.

        With `remaining`, as in `choose`, no more than `CostModel.speedup_until_done`.
        """
        first, *others = self.acceptance  # a row without a proposal gives one token
        rates = [first * self._recent.coverage, *others]
        speedups = _speedups(self.cost, batch, rates)
        if remaining is None:
            return speedups
        left = RowsLeft.of(remaining)
        # What is gained once the batch is small is no reason to lose now.
        pairs = enumerate(speedups)
        return tuple(min(s, speedup_of_rows(self.cost, left, rates[:k])) for k, s in pairs)

    def choose(self, batch: int, remaining: Sequence[int] | None = None) -> int:
        """The number of draft tokens for a step of `batch` rows, 0 to `max_steps`.

        Args:
            batch: rows.
            remaining: `[batch]`, the tokens that each row is still to get, where no others take the
                place of rows that end: what counts then is the time until the last one has them,
                too. None: the batch stays as large.

        Raises:
            SettingError: not as many numbers as rows, or one below 1.
        """
        if remaining is not None and len(remaining) != batch:
            raise SettingError(
                f"remaining has {len(remaining)} numbers for {batch} rows; expected one for each"
            )
        speedups, decode, at_worst = self._predictions(batch, remaining)
        self._current = _decide(speedups, self._current, self._margin)
        if self._current:
            self._patience = 1.0
        if self._current or not self._exploration:
            return self._current
        self._credit += self._exploration * decode
        price = self._patience * at_worst
        if self._credit < price:
            return 0
        self._credit -= price
        self._patience = min(2 * self._patience, PATIENCE)
        return 1

    def _predictions(
        self, batch: int, remaining: Sequence[int] | None
    ) -> tuple[tuple[float, ...], float, float]:
        """Speedups, seconds of a plain step, and of a trial at worst: kept until something is
        learnt, since most steps of a resting draft are at the same batch."""
        if self._predicted_by is not self.cost:
            self._predicted_by = self.cost
            self._predicted = {}
        kept = self._predicted  # what is learnt meanwhile, in another thread, begins another
        key = (batch, 0, 0)
        if remaining is not None:
            mean = sum(remaining) // batch
            key = (batch, 1 + max(remaining) // REMAINING_TILE, mean // REMAINING_TILE)
        found = kept.get(key)
        if found is None:
            decode = self.cost.t_decode(batch)
            at_worst = TRIAL * (self.cost.t_step(batch, 1) - decode)
            found = kept[key] = self.speedups(batch, remaining), decode, at_worst
        return found

    def observe(self, stats: AcceptanceStats) -> None:
        """What a step, or several, kept; plain steps change nothing."""
        if not stats.judged:
            return
        believed, judged = self.acceptance[0], stats.judged[0]
        if stats.accepted[0] > judged * believed + 2 * (judged * believed * (1 - believed)) ** 0.5:
            self._patience = 1.0
            if not self._current:  # a trial: the draft is no longer what it was
                self._recent.fade(0.5)
        self._recent.add(stats)
        fading, recent = self._slow.fading(stats), self._recent
        for k in range(1, self.max_steps):
            if k >= len(stats.judged) or not stats.judged[k]:
                self._ratios[k] **= fading
            elif recent.judged[k] >= RATIO_ROWS:
                self._ratios[k] = min(1.0, recent.rate(k) / recent.rate(k - 1))
        self._predicted = {}
        self._slow.add(stats)
        measured = self._slow.measured(self._min_rows)
        self._best[: len(measured)] = map(max, measured, self._best[: len(measured)])

    def should_train(self) -> bool:
        """Whether `train_share` of the best is lost; False while too little was measured.

        A draft that was never good has no best to fall from: train it before it is used.
        """
        return bool(self._slow.measured(self._min_rows)) and self.decay() > self._train_share

    def decay(self) -> float:
        """The share of its best that the draft has lost, 0 to 1.

        Raises:
            EmptyBatchError: fewer than `min_rows` rows of verify passes were seen.
        """
        now = self._slow.measured(self._min_rows)
        if not now:
            raise EmptyBatchError(
                f"{self._slow.judged[0]:.0f} rows of verify passes were seen; expected "
                f"{self._min_rows:.0f} (min_rows) or more before acceptance can be compared"
            )
        best = expected_tokens(self._best[: len(now)]) - 1
        return max(0.0, 1 - (expected_tokens(now) - 1) / best) if best else 0.0

    def rebase(self) -> None:
        """Take present acceptance for the best: when training no longer raises it, as when the
        policy's entropy has risen."""
        now = self._slow.measured(self._min_rows)
        self._best = [*now, *[0.0] * (self.max_steps - len(now))]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; settings and cost are not among them."""
        return {
            "recent": self._recent.state(),
            "slow": self._slow.state(),
            "best": list(self._best),
            "ratios": list(self._ratios),
            "current": self._current,
            "credit": self._credit,
            "patience": self._patience,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CheckpointError: a state of another kind, or of another `max_steps`.
        """
        lists = [state.get(k, {}) for k in ("recent", "slow")]
        complete = all("rows" in part for part in lists)
        # Older states have neither.
        ratios, patience = state.get("ratios", [1.0] * self.max_steps), state.get("patience", 1.0)
        lists = [part.get(k, []) for part in lists for k in ("judged", "accepted")]
        if (
            not complete
            or {"current", "credit", "best"} - state.keys()
            or any(len(part) != self.max_steps for part in [*lists, state["best"], ratios])
        ):
            raise CheckpointError(
                f"the state is not of a DraftController with max_steps={self.max_steps}; expected "
                "what state_dict() of one returned"
            )
        self._recent.load(state["recent"])
        self._predicted = {}
        self._slow.load(state["slow"])
        self._best, self._ratios = list(state["best"]), list(ratios)
        self._current, self._credit = int(state["current"]), float(state["credit"])
        self._patience = float(patience)


class _Rates:
    """Counts by position, of which older ones fade."""

    def __init__(self, max_steps: int, halflife: float) -> None:
        self._halflife = halflife
        self.judged = [0.0] * max_steps
        self.accepted = [0.0] * max_steps
        self.rows = 0.0

    @property
    def coverage(self) -> float:
        """Share of the rows of passes with proposals that had one."""
        return self.judged[0] / self.rows if self.rows else 1.0

    def rate(self, k: int) -> float:
        """The share kept at a position."""
        return self.accepted[k] / self.judged[k]

    def fading(self, stats: AcceptanceStats) -> float:
        """What is left of earlier counts after these."""
        return float(0.5 ** (stats.judged[0] / self._halflife))

    def add(self, stats: AcceptanceStats) -> None:
        if len(stats.judged) > len(self.judged):
            raise SettingError(
                f"statistics of {len(stats.judged)} draft positions; expected at most max_steps, "
                f"{len(self.judged)}"
            )
        # Every position fades with the rows of the first: what is no longer tried is forgotten.
        self.fade(self.fading(stats))
        self.rows += stats.num_verify_steps
        for counts, new in ((self.judged, stats.judged), (self.accepted, stats.accepted)):
            for k, count in enumerate(new):
                counts[k] += count

    def fade(self, share: float) -> None:
        """Keep so much of what was counted."""
        self.rows *= share
        for counts in (self.judged, self.accepted):
            counts[:] = [share * count for count in counts]

    def measured(self, min_rows: float) -> list[float]:
        """Rates of the first positions, as far as they are known."""
        rates = []
        for kept, judged in zip(self.accepted, self.judged, strict=True):
            if judged < min_rows:
                break
            rates.append(kept / judged)
        return rates

    def state(self) -> dict[str, Any]:
        return {"judged": list(self.judged), "accepted": list(self.accepted), "rows": self.rows}

    def load(self, state: Mapping[str, Any]) -> None:
        self.judged, self.accepted = list(state["judged"]), list(state["accepted"])
        self.rows = float(state["rows"])


def _speedups(cost: CostModel, batch: int, acceptance: Sequence[float]) -> tuple[float, ...]:
    return tuple(cost.speedup(batch, acceptance[:k]) for k in range(len(acceptance) + 1))


def _decide(speedups: Sequence[float], current: int, margin: float) -> int:
    best = max(range(len(speedups)), key=speedups.__getitem__)  # the fewest among equals
    if current and speedups[current] <= 1 + margin / 2:
        current = 0
    return best if speedups[best] > speedups[current] * (1 + margin) else current


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Predicted speedups over batch sizes and acceptances, and what a controller would choose."""

    batches: tuple[int, ...]
    """`[B]`: rows of a step."""
    acceptances: tuple[tuple[float, ...], ...]
    """`[A, K]`: share kept at each position."""
    speedups: tuple[tuple[tuple[float, ...], ...], ...]
    """`[A, B, K + 1]`: tokens a second with 0 to K draft tokens, against plain decoding."""
    chosen: tuple[tuple[int, ...], ...]
    """`[A, B]`: draft tokens that a controller takes up, coming from none."""

    def rows(self) -> Iterator[dict[str, float | int | bool]]:
        """A tidy table: `acceptance` (of the first position), `batch`, `num_steps`, `speedup`,
        `chosen`."""
        for rates, of_batches, picks in zip(
            self.acceptances, self.speedups, self.chosen, strict=True
        ):
            for batch, speedups, pick in zip(self.batches, of_batches, picks, strict=True):
                for k, speedup in enumerate(speedups):
                    yield {
                        "acceptance": rates[0], "batch": batch, "num_steps": k,
                        "speedup": speedup, "chosen": k == pick,
                    }  # fmt: skip

    def plot(self, axes: Any = None) -> Any:
        """Speedup against batch, a curve for each acceptance: dashed with K draft tokens always,
        solid with the controller's choice.

        Args:
            axes: matplotlib axes to draw on; None: new ones.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise MissingExtraError("matplotlib", "examples") from error
            axes = Figure(layout="constrained").subplots()
        for index, (rates, of_batches, picks) in enumerate(
            zip(self.acceptances, self.speedups, self.chosen, strict=True)
        ):
            picked = [values[k] for values, k in zip(of_batches, picks, strict=True)]
            fixed = [values[-1] for values in of_batches]
            axes.plot(self.batches, picked, color=f"C{index % 10}", label=f"{rates[0]:.2f}")
            axes.plot(self.batches, fixed, "--", color=f"C{index % 10}", alpha=0.5)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch (rows)")
        axes.set_ylabel("tokens a second against plain decoding")
        axes.legend(title="acceptance")
        return axes


def simulate(
    cost: CostModel,
    *,
    batches: Sequence[int],
    acceptances: Sequence[float | Sequence[float]],
    max_steps: int,
    margin: float = 0.05,
) -> Simulation:
    """What a `DraftController` would do with drafts of these acceptances, without running any.

    Args:
        cost: what steps cost.
        batches: rows of a step.
        acceptances: for each draft, the share kept at every position, or one for each of
            `max_steps` positions.
        max_steps: most draft tokens of a step.
        margin: as in `DraftController`.

    Raises:
        SettingError: rates outside [0, 1] or of another number of positions; nothing to simulate.

    Example:
        >>> from miles.rollout.speculative import CostModel, simulate
        >>> cost = CostModel(floor=10e-3, per_token=0.1e-3, knee=64, draft_floor=1e-3)
        >>> result = simulate(cost, batches=[1, 32, 128], acceptances=[0.3, 0.8], max_steps=4)
        >>> result.chosen
        ((1, 1, 0), (4, 1, 0))
    """
    if not batches or not acceptances or max_steps < 1:
        raise SettingError(
            f"got {len(batches)} batch sizes, {len(acceptances)} acceptances and max_steps "
            f"{max_steps}; expected 1 or more of each"
        )
    rates = []
    for given in acceptances:
        positions = (given,) * max_steps if isinstance(given, (int, float)) else tuple(given)
        if len(positions) != max_steps:
            raise SettingError(
                f"an acceptance of {len(positions)} positions; expected one rate, or one for each "
                f"of {max_steps} positions"
            )
        rates.append(positions)
    speedups = tuple(tuple(_speedups(cost, batch, of) for batch in batches) for of in rates)
    return Simulation(
        batches=tuple(batches),
        acceptances=tuple(rates),
        speedups=speedups,
        chosen=tuple(tuple(_decide(values, 0, margin) for values in row) for row in speedups),
    )
