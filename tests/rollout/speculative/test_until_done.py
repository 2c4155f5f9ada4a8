"""What a draft gains where rows that end are not replaced, and what a controller makes of it."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import EmptyBatchError
from miles.rollout.speculative import AcceptanceStats, CostModel, DraftController
from miles.rollout.speculative.cost import ROW_SPREAD, _steps_of_last, expected_tokens
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


@pytest.mark.parametrize("acceptance", [[0.5], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.5]])
@pytest.mark.parametrize("remaining", [[256] * 64, [64] * 16, [128] * 32 + [40] * 32])
def test_the_last_row_takes_as_many_steps_as_rows_that_are_drawn(acceptance, remaining):
    rng = random.Random(0)
    drawn = [max(steps_of_rows(rng, remaining, acceptance)) for _ in range(60)]
    predicted = _steps_of_last(remaining, acceptance)
    assert predicted == pytest.approx(statistics.mean(drawn), rel=0.06)
    assert predicted > 1.05 * max(remaining) / expected_tokens(acceptance)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80), st.lists(st.floats(0, 1), max_size=5)
)
def test_steps_of_the_last_row_are_between_the_mean_and_plain_ones(remaining, acceptance):
    steps, longest = _steps_of_last(remaining, acceptance), max(remaining)
    assert longest / expected_tokens(acceptance) <= steps * (1 + 1e-9)
    assert steps <= longest
    assert _steps_of_last([*remaining, *remaining], acceptance) >= steps * (1 - 1e-9)


@given(st.integers(1, 1000), st.lists(st.floats(0, 1), max_size=5))
def test_one_row_gains_what_a_step_gains(left, acceptance):
    expected = COST.speedup(1, acceptance)
    steps = left / expected_tokens(acceptance)
    assert COST.speedup_until_done([left], acceptance) == pytest.approx(expected) or steps < 1


def test_literals():
    # No chance at rates of 1: 1 + a + a^2 tokens a step, whose slope is 3.
    longest = _steps_of_last([30] * 64, [1.0, 1.0])
    assert longest == pytest.approx(30 / (3 - 2.336 * 3 * ROW_SPREAD), rel=1e-3)
    gain = 30 * FLAT.t_decode(64) / (longest * FLAT.t_step(64, 2))
    assert FLAT.speedup_until_done([30] * 64, [1.0, 1.0]) == pytest.approx(gain)
    assert FLAT.speedup_until_done([30] * 64, []) == 1.0
    # Rows that end early make later steps cheaper, without a draft too.
    rows = CostModel(floor=1e-3, per_row=1e-3, draft_floor=1e-3)
    plain = 10 * rows.floor + 15 * rows.per_row
    steps = _steps_of_last([10, 5], [1.0])
    drafted = steps * (rows.floor + rows.draft_floor) + 15 / 2 * rows.per_row
    assert rows.speedup_until_done([10, 5], [1.0]) == pytest.approx(plain / drafted)


def test_it_is_less_where_answers_are_short_and_alike():
    def gain(*remaining):
        return FLAT.speedup_until_done(remaining, RATES)

    ordered = [gain(*[16] * 64), gain(*[512] * 64), gain(*[512] * 8), gain(512, *[64] * 63)]
    assert ordered == sorted(ordered) and ordered[0] < 1 < ordered[1]
    assert ordered[-1] == pytest.approx(FLAT.speedup(1, RATES))
    with pytest.raises(EmptyBatchError, match="no row is left"):
        FLAT.speedup_until_done([], RATES)


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


def test_predictions_are_made_anew_as_rows_come_nearer_to_their_end():
    """The last of a batch is not judged by what was predicted for all of it."""
    controller = DraftController(COST, max_steps=3, exploration=0)
    controller.observe(AcceptanceStats.count(accepted=[2] * 1000, proposed=[3] * 1000))
    for batch, left in itertools.product((64, 8), (400, 100, 12, 1)):
        fresh = DraftController(COST, max_steps=3, exploration=0)
        fresh.load_state_dict(controller.state_dict())
        assert controller.choose(batch, [left] * batch) == fresh.choose(batch, [left] * batch)
