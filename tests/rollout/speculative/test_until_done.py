"""What a draft gains where rows that end are not replaced, and what a controller makes of it."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import EmptyBatchError, SettingError
from miles.rollout.speculative import AcceptanceStats, CostModel, DraftController
from miles.rollout.speculative.cost import (
    ROW_SPREAD,
    RowsLeft,
    _steps_of_last,
    expected_tokens,
)
from tests.rollout.speculative.costs import COST

FLAT = CostModel(floor=10e-3, draft_floor=2e-3)
"""Every pass takes as long, so that the number of steps is all that counts."""
RATES = [0.6, 0.5, 0.5]


def steps_of_rows(rng: random.Random, remaining, acceptance) -> list[int]:
    """Steps that each row takes, where some are easier to guess than others."""
    steps = []
    for left in remaining:
        easier, taken = rng.gauss(0, ROW_SPREAD), 0
        while left > 0:
            guesses = (rng.random() < rate + easier for rate in acceptance)
            left -= 1 + len(list(itertools.takewhile(bool, guesses)))
            taken += 1
        steps.append(taken)
    return steps


def steps_of_last(remaining, acceptance) -> float:
    return _steps_of_last(RowsLeft.of(remaining), acceptance)


LENGTHS = [[256] * 64, [64] * 16, [128] * 32 + [40] * 32, [128] * 32 + [120] * 32, [3]]
CHANCES = [[0.5], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.5], [0.9] * 7]


@pytest.mark.parametrize("acceptance", CHANCES, ids=len)
@pytest.mark.parametrize("remaining", LENGTHS, ids=sum)
def test_the_last_row_takes_as_many_steps_as_rows_that_are_drawn(acceptance, remaining):
    rng = random.Random(0)
    drawn = [max(steps_of_rows(rng, remaining, acceptance)) for _ in range(60)]
    off = 0.06 if len(remaining) > 1 else 0.4  # of few tokens the last draft is mostly not needed
    assert steps_of_last(remaining, acceptance) == pytest.approx(statistics.mean(drawn), rel=off)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80), st.lists(st.floats(0, 1), max_size=5)
)
def test_steps_of_the_last_row_are_between_the_mean_and_plain_ones(remaining, acceptance):
    steps, longest = steps_of_last(remaining, acceptance), max(remaining)
    assert longest / expected_tokens(acceptance) <= steps * (1 + 1e-9)
    assert 1 <= steps <= longest
    assert steps_of_last([*remaining, *remaining], acceptance) >= steps * (1 - 1e-9)


@given(st.integers(6, 1000), st.lists(st.floats(0, 1), max_size=5))
def test_one_row_gains_what_a_step_gains(left, acceptance):
    expected = COST.speedup(1, acceptance)
    assert COST.speedup_until_done([left], acceptance) == pytest.approx(expected)
    assert COST.speedup_until_done([1], acceptance) == pytest.approx(
        COST.t_decode(1) / COST.t_step(1, len(acceptance))
    )


def test_literals():
    # No chance at rates of 1; the last of 64 rows is 2.336 deviations off.
    longest, rate = steps_of_last([30] * 64, [1.0, 1.0]), 1 - 2.336 * ROW_SPREAD
    assert longest == pytest.approx(30 / (1 + rate + rate**2), rel=1e-3)
    gain = 30 * FLAT.t_decode(64) / (longest * FLAT.t_step(64, 2))
    assert FLAT.speedup_until_done([30] * 64, [1.0, 1.0]) == pytest.approx(gain)
    assert FLAT.speedup_until_done([30] * 64, []) == 1.0
    # Rows that end early make later steps cheaper, without a draft too.
    rows = CostModel(floor=1e-3, per_row=1e-3, draft_floor=1e-3)
    plain = 10 * rows.floor + 15 * rows.per_row
    steps = steps_of_last([10, 5], [1.0])
    drafted = steps * (rows.floor + rows.draft_floor) + 15 / 2 * rows.per_row
    assert rows.speedup_until_done([10, 5], [1.0]) == pytest.approx(plain / drafted)


def test_it_is_less_where_answers_are_short_and_alike():
    def gain(*remaining):
        return FLAT.speedup_until_done(remaining, RATES)

    ordered = [gain(*[16] * 64), gain(*[512] * 64), gain(*[512] * 8), gain(512, *[64] * 63)]
    assert ordered == sorted(ordered) and ordered[0] < 1 < ordered[1]
    assert ordered[-1] == pytest.approx(FLAT.speedup(1, RATES))


def test_rows_that_are_none_are_refused():
    with pytest.raises(EmptyBatchError, match="no row is left"):
        FLAT.speedup_until_done([], RATES)
    for remaining in ([0], [5, 0], [-3, 4]):
        with pytest.raises(SettingError, match=f"to get {min(remaining)} tokens; expected 1 or"):
            DraftController(FLAT, max_steps=1).choose(len(remaining), remaining)
    for remaining in ([], [5], [5, 5, 5]):
        with pytest.raises(SettingError, match=f"{len(remaining)} numbers for 2 rows"):
            DraftController(FLAT, max_steps=1).choose(2, remaining)


def test_a_controller_rests_where_the_last_row_would_be_late():
    controller = DraftController(FLAT, max_steps=1, exploration=0)
    controller.observe(AcceptanceStats.count(accepted=[1, 0] * 5000, proposed=[1] * 10_000))
    assert FLAT.speedup(64, [0.5]) == pytest.approx(1.5 / 1.2)
    assert controller.choose(64) == 1
    assert controller.choose(64, [24] * 64) == 0
    assert controller.choose(64, [2000] * 64) == 1  # luck evens out
    assert controller.choose(64, [24] * 64) == 0
    assert controller.choose(1, [24]) == 1
    assert controller.speedups(64, [24] * 64) == tuple(
        FLAT.speedup_until_done([24] * 64, controller.acceptance[:k]) for k in (0, 1)
    )


def test_rows_that_no_proposal_was_made_for_count_in_what_is_predicted():
    """A draft that copies has something to say about every other row."""
    controller = DraftController(FLAT, max_steps=1, exploration=0)
    controller.observe(AcceptanceStats.count(accepted=[1, 0] * 5000, proposed=[1, 0] * 5000))
    assert controller.acceptance[0] == pytest.approx(1, abs=1e-3)
    assert controller.speedups(64)[1] == pytest.approx(FLAT.speedup(64, [0.5]), rel=1e-2)


def test_a_gain_of_the_few_that_are_left_is_no_reason_to_lose_now():
    """One long row among many: it gains, but only once the others have ended."""
    controller = DraftController(COST, max_steps=1, exploration=0)
    controller.observe(AcceptanceStats.count(accepted=[1, 0] * 5000, proposed=[1] * 10_000))
    skewed, acceptance = [1000] + [100] * 255, controller.acceptance
    assert COST.speedup(256, acceptance) < 0.9 and COST.speedup(1, acceptance) > 1.2
    assert COST.speedup_until_done(skewed, acceptance) > 1.1
    assert controller.speedups(256, skewed) == controller.speedups(256)
    assert controller.choose(256, skewed) == 0 and controller.choose(1, [900]) == 1


def test_a_prediction_is_kept_for_rows_with_about_as_much_to_get_and_no_others():
    controller = DraftController(FLAT, max_steps=1, exploration=0)
    controller.observe(AcceptanceStats.count(accepted=[1, 0] * 5000, proposed=[1] * 10_000))
    for remaining in (
        [24] * 64,
        [88] + [24] * 63,
        [2000] * 64,
        [24] + [8] * 63,
        [24] * 64,
        [2000] + [24] * 63,
    ):
        speedups = controller._predictions(64, remaining)[0]
        assert speedups == controller.speedups(64, remaining)
        again = [tokens + 1 for tokens in remaining]
        assert controller._predictions(64, again)[0] is speedups
