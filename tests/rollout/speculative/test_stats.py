"""Acceptance: counts by position, readings, and merging that does not round."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import EmptyBatchError, SettingError, ShapeError
from miles.losses import reduce_metrics
from miles.rollout._sglang_api import Meta
from miles.rollout.speculative import AcceptanceStats, SpeculativeStats

ROWS = st.lists(st.integers(0, 4).flatmap(lambda k: st.tuples(st.integers(0, k), st.just(k))))


def of(rows) -> AcceptanceStats:
    return AcceptanceStats.count(accepted=[a for a, _ in rows], proposed=[p for _, p in rows])


def test_literals():
    # three rows of 3, 1 and 0 proposals, which keep 2, 0 and 0
    stats = of([(2, 3), (0, 1), (0, 0)])
    assert stats == AcceptanceStats(
        num_verify_steps=3, num_tokens=5,
        proposed=(2, 1, 1), judged=(2, 1, 1), accepted=(1, 1, 0),
    )  # fmt: skip
    assert stats.accept_length == pytest.approx(5 / 3)
    assert stats.tokens_per_verify == pytest.approx(5 / 3)
    assert stats.draft_length == pytest.approx(4 / 3)
    assert stats.accept_rate == 0.5
    assert stats.accept_rate_by_position == (0.5, 1.0, 0.0)
    # verify 1.2 decoding steps and 4/3 draft steps of 0.3 each: 1.6 for 5/3 tokens
    assert stats.speedup(verify=1.2, draft_step=0.3) == pytest.approx(5 / 3 / 1.6)
    assert stats.summary() == SpeculativeStats(
        num_verify_steps=3, num_proposed=4, num_accepted=2, num_tokens=5
    )


def test_a_position_counts_as_judged_only_after_all_before_it():
    stats = of([(0, 3), (1, 3), (3, 3)])
    assert stats.judged == (3, 2, 1) and stats.accepted == (2, 1, 1)
    assert stats.accept_rate_by_position == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert stats.conditional_accept_rates == (2 / 3, 0.5, 1.0)
    never = of([(0, 2)])
    assert never.conditional_accept_rates[0] == 0 and math.isnan(never.conditional_accept_rates[1])


def test_tokens_that_an_ending_cut_do_not_count_as_refused():
    stats = AcceptanceStats.count(accepted=[3], proposed=[3], num_tokens=2)
    assert (stats.accept_length, stats.tokens_per_verify, stats.accept_rate) == (4, 2, 1)


@given(ROWS, st.integers(0, 1000))
def test_parts_of_any_size_and_order_add_up_to_the_whole(rows, seed):
    rng = random.Random(seed)
    parts = [[] for _ in range(rng.randint(1, 5))]
    for row in rows:
        rng.choice(parts).append(row)
    whole = AcceptanceStats.total(map(of, parts))
    assert whole == of(rows)
    assert whole.summary() == sum(
        (of(part).summary() for part in parts), AcceptanceStats().summary()
    )
    assert AcceptanceStats.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


@given(ROWS)
def test_readings_fit_each_other(rows):
    stats = of(rows)
    assert stats.num_tokens == sum(stats.accepted) + len(rows)
    if not any(p for _, p in rows):
        return
    rates = stats.accept_rate_by_position
    assert all(0 <= rate <= 1 for rate in rates)
    weighted = sum(r * p for r, p in zip(rates, stats.proposed, strict=True))
    assert weighted / sum(stats.proposed) == pytest.approx(stats.accept_rate)
    assert stats.accept_length == pytest.approx(1 + stats.accept_rate * stats.draft_length)
    assert stats.speedup(verify=1.0, draft_step=0.0) == pytest.approx(stats.accept_length)


@settings(deadline=None, max_examples=30)
@given(ROWS, ROWS)
def test_metrics_of_ranks_merge_into_those_of_all_rows(one, other):
    parts = [of(rows).metrics(num_positions=5) for rows in (one, other)]
    merged = reduce_metrics(parts)
    expected = of(one + other)
    assert len(merged) == 9
    if not any(p for _, p in one + other):
        assert merged["speculative/accept_rate"].isnan()
        return
    assert merged["speculative/accept_length"].item() == pytest.approx(expected.accept_length)
    assert merged["speculative/accept_rate"].item() == pytest.approx(expected.accept_rate)
    for k, rate in enumerate(expected.accept_rate_by_position):
        assert merged[f"speculative/accept_rate/position_{k}"].item() == pytest.approx(rate)
    assert merged["speculative/accept_rate/position_4"].isnan()


def test_both_kinds_of_counts_read_the_same_where_an_answer_ends_inside_a_draft():
    stats = AcceptanceStats.count(accepted=[3, 3], proposed=[3, 3], num_tokens=5)
    assert stats.accept_length == stats.summary().accept_length == 4
    assert stats.tokens_per_verify == 2.5


def test_the_first_token_of_an_answer_of_sglangs_comes_of_no_verify_pass():
    meta = Meta(
        finish_reason=None, spec_verify_ct=2, spec_accept_token_num=4, spec_draft_token_num=6
    )
    stats = SpeculativeStats.from_meta(meta, 7)
    assert stats == SpeculativeStats(
        num_verify_steps=2, num_proposed=6, num_accepted=4, num_tokens=6
    )
    assert stats.accept_length == 3
    assert SpeculativeStats.from_meta(meta, 0).num_tokens == 0


def test_long_requests_weigh_more_than_short_ones():
    short = SpeculativeStats(num_verify_steps=1, num_proposed=3, num_accepted=3, num_tokens=4)
    long = SpeculativeStats(num_verify_steps=99, num_proposed=297, num_accepted=0, num_tokens=99)
    assert (short + long).accept_length == pytest.approx(1.03)
    assert (short + long).accept_rate == 0.01


READINGS = [
    "accept_length", "tokens_per_verify", "draft_length",
    "accept_rate", "accept_rate_by_position", "conditional_accept_rates",
]  # fmt: skip


@pytest.mark.parametrize("reading", READINGS)
def test_nothing_is_read_without_a_verify_pass(reading):
    with pytest.raises(EmptyBatchError, match="no verify pass was counted"):
        getattr(AcceptanceStats(), reading)
    if reading in ("accept_length", "accept_rate"):
        with pytest.raises(EmptyBatchError, match="no verify pass was counted"):
            getattr(AcceptanceStats().summary(), reading)


def test_steps_without_proposals_have_a_length_but_no_rate():
    stats = of([(0, 0), (0, 0)])
    assert stats.accept_length == 1 and stats.speedup(verify=1, draft_step=1) == 1
    for empty in (stats, stats.summary()):
        with pytest.raises(EmptyBatchError, match="2 verify passes judged no draft token"):
            _ = empty.accept_rate
    with pytest.raises(EmptyBatchError, match="no verify pass"):
        AcceptanceStats().speedup(verify=1, draft_step=1)


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(SettingError, match=r"row 1 accepted 3 of 2 .* bonus token"):
        AcceptanceStats.count(accepted=[0, 3], proposed=[2, 2])
    with pytest.raises(ShapeError, match="accepted has 1 rows and proposed 2"):
        AcceptanceStats.count(accepted=[0], proposed=[2, 2])
    with pytest.raises(SettingError, match="verify is 0"):
        of([(1, 1)]).speedup(verify=0, draft_step=0.1)
