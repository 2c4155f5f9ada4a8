"""Preset corrections, OPSM, staleness and the interpolated proximal policy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.losses.corrections import (
    MaxStaleness,
    OffPolicyNegative,
    Weight,
    icepop,
    importance_weights,
    interpolate_proximal,
    masked_is,
    veto,
)
from miles.losses.ratios import log_ratio
from tests.corrections import TRUNCATE, of_ratios, proximal, versions_of
from tests.steps import quick, random_step, select


def test_masked_is_keeps_or_drops_whole_sequences_by_their_geometric_mean():
    step = random_step()
    got = masked_is(step.old_T, step.rollout_T, step.packed, low=0.7, high=1.4)
    rho_T = log_ratio(step.old_T, step.rollout_T, step.packed, level="sequence_mean").exp()
    keep_T = step.packed.mask_T & (rho_T >= 0.7) & (rho_T <= 1.4)
    assert torch.equal(got.keep_T, keep_T) and 0 < keep_T.sum() < step.packed.mask_T.sum()
    assert torch.equal(got.weights_T, torch.where(keep_T, rho_T, 0))


def test_a_ratio_exactly_at_the_cap_was_not_capped():
    packed, zeros_T = Packed.from_padded(torch.ones(1, 2).bool()), torch.zeros(2)
    weight = Weight(level="token", mode="truncate", high=1.0)
    got = importance_weights(torch.tensor([0.0, 0.5]), zeros_T, packed, weight=weight)
    assert float(got.metrics["correction/capped"]) == 0.5 and got.weights_T.tolist() == [1.0, 1.0]


def test_masked_is_and_icepop_of_literals():
    old_T = torch.tensor([0.4, 0.5, 2.0, 2.5, 5.0, 5.5], dtype=torch.float64).log()
    packed, rollout_T = Packed.from_padded(torch.ones(6, 1).bool()), torch.zeros(6).double()
    got = masked_is(old_T, rollout_T, packed).weights_T.tolist()
    assert got == pytest.approx([0.0, 0.5, 2.0, 0.0, 0.0, 0.0])
    got = icepop(old_T[1:].clone(), rollout_T[1:], Packed.from_padded(torch.ones(1, 5).bool()))
    assert got.weights_T.tolist() == pytest.approx([0.5, 2.0, 2.5, 5.0, 0.0])
    assert got.keep_T.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight": TRUNCATE}, [1.10517, 0.22313, 2.0, 4.53999e-05, 1.34986]),
        (
            {"weight": Weight(level="token", mode="mask", low=0.5, high=2.0)},
            [1.10517, 0, 0, 0, 1.34986],
        ),
        ({"weight": TRUNCATE, "reject": [veto()]}, [0.0] * 5),
        ({"weight": Weight(level="sequence_mean", mode="truncate", high=2.0)}, [0.12745] * 5),
        ({"weight": Weight(level="sequence_sum", mode="truncate", high=2.0)}, [3.363e-05] * 5),
    ],
)
def test_the_worked_example_of_the_survey(settings, expected):
    x_T = torch.tensor([0.1, -1.5, 0.8, -10.0, 0.3], dtype=torch.float64)
    packed = Packed.from_padded(torch.ones(1, 5).bool())
    got = importance_weights(x_T, torch.zeros_like(x_T), packed, **settings)
    assert got.weights_T.tolist() == pytest.approx(expected, rel=1e-4)


def test_veto_rejects_the_sequence_of_one_broken_token():
    got = of_ratios([1.0, 5e-5, 1.0, 2e-4], width=2, weight=None, reject=[veto()])
    assert got.keep_T.tolist() == [False, False, True, True]
    got = of_ratios([1.0, 5e-5, 1.0, 2e-4], width=2, weight=None, reject=[veto(1e-5)])
    assert got.keep_T.all()


@pytest.mark.parametrize(
    ("advantages", "kept"),
    [
        ([-1.0, -1.0, -1.0, -1.0], [False, True]),  # only the first has moved away
        ([1.0, 1.0, -1.0, -1.0], [True, True]),
        ([0.0, 0.0, 0.0, 0.0], [True, True]),
        ([3.0, -4.0, -1.0, -1.0], [False, True]),  # its mean is below 0
        ([4.0, -3.0, -1.0, -1.0], [True, True]),
    ],
)
def test_off_policy_negative_of_literals(advantages, kept):
    packed = Packed.from_padded(torch.ones(2, 2).bool())
    old_T, rollout_T = (
        torch.tensor([-3.0, -1.0, -1.0, -2.0]),
        torch.tensor([-1.0, -2.0, -2.0, -1.0]),
    )
    settings = {"weight": None, "advantages_T": torch.tensor(advantages)}
    for delta, expected in ((0.1, kept), (0.5, [True, True])):  # mean(rollout - old) is 0.5 and 0
        rules = [OffPolicyNegative(delta=delta)]
        got = importance_weights(old_T, rollout_T, packed, reject=rules, **settings)
        assert got.keep_T.tolist() == [keep for keep in expected for _ in range(2)]


def test_off_policy_negative_looks_at_trainable_tokens_only():
    packed = Packed.from_padded(torch.tensor([[True, False, False]]))
    old_T, rollout_T = torch.tensor([-1.0, -9.0, math.nan]), torch.tensor([-1.0, 0.0, math.inf])
    rules = [OffPolicyNegative()]
    advantages_T = torch.tensor([-1.0, math.inf, math.nan])
    got = importance_weights(
        old_T, rollout_T, packed, weight=None, reject=rules, advantages_T=advantages_T
    )
    assert got.keep_T.tolist() == [True, False, False]


@quick
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-4, 0.1]))
def test_off_policy_negative_matches_a_loop_over_sequences(seed, delta):
    step = random_step(seed)
    got = importance_weights(
        step.old_T,
        step.rollout_T,
        step.packed,
        weight=None,
        reject=[OffPolicyNegative(delta=delta)],
        advantages_T=step.advantages_T,
    )
    expected = [False] * step.packed.num_positions
    for seq in range(step.packed.num_seqs):
        member_T = step.packed.mask_T & (step.packed.seq_ids_T == seq)
        gap = (step.rollout_T - step.old_T)[member_T].mean()
        for token in member_T.nonzero().flatten().tolist():
            expected[token] = not (step.advantages_T[member_T].mean() < 0 and gap > delta)
    assert got.keep_T.tolist() == expected


def test_max_staleness_rejects_single_tokens_of_old_versions():
    packed = Packed.from_padded(torch.tensor([[True, True, True, True, False]]))
    settings = {"weight": None, "versions_T": torch.tensor([2, 3, 4, 5, -1]), "current_version": 5}
    for limit, expected in ((0, [3]), (1, [2, 3]), (2, [1, 2, 3]), (9, [0, 1, 2, 3])):
        got = importance_weights(
            torch.zeros(5), torch.ones(5), packed, reject=[MaxStaleness(limit)], **settings
        )
        assert got.keep_T.nonzero().flatten().tolist() == expected


def test_proximal_logprobs_of_literals():
    got = proximal([-2.0] * 5, [-1.0] * 5, [1, 2, 3, 4, 5])
    assert got.tolist() == pytest.approx([-1.25, -4 / 3, -1.5, -2.0, -2.0])
    assert not got.requires_grad
    # Versions above the proximal one, and those of the current policy, keep what they sampled with.
    got = proximal([-2.0] * 4, [-1.0] * 4, [1, 3, 4, 5], proximal_version=2)
    assert got.tolist() == [-1.75, -2.0, -2.0, -2.0]
    got = proximal([-0.1, -0.3], [-0.7, -0.9], [1, 5], proximal_version=5)
    assert got.tolist() == [-0.7, -0.3]


def test_proximal_logprobs_skip_masked_garbage_and_show_broken_tokens():
    got = proximal(
        [math.nan, -math.inf, -1.0, -1.0, math.nan],
        [math.inf, math.nan, -math.inf, -math.inf, -1.0],
        [-1, 99, 5, 3, 3],
        mask=[False, False, True, True, True],
    )
    assert got.tolist()[:4] == [0.0, 0.0, -1.0, -math.inf] and got[4].isnan()
    assert proximal([-1.0], [math.nan], [5]).isnan().all()


@quick
@given(st.integers(0, 10_000), st.integers(0, 5), st.permutations(range(8)))
def test_proximal_logprobs_lie_between_both_policies_and_follow_their_tokens(seed, version, order):
    step = random_step(seed)
    mask_T, versions_T = step.packed.mask_T, versions_of(step, seed)
    settings = {"proximal_version": version, "current_version": 5}
    got = interpolate_proximal(
        step.rollout_T, step.old_T, step.packed, versions_T=versions_T, **settings
    )
    low_T, high_T = (
        torch.minimum(step.rollout_T, step.old_T),
        torch.maximum(step.rollout_T, step.old_T),
    )
    assert ((got >= low_T - 1e-12) & (got <= high_T + 1e-12))[mask_T].all()
    assert (got[~mask_T] == 0).all()
    packed, index_T = select(step.packed, list(order))
    moved = interpolate_proximal(
        step.rollout_T[index_T],
        step.old_T[index_T],
        packed,
        versions_T=versions_T[index_T],
        **settings,
    )
    assert torch.equal(moved, got[index_T])
