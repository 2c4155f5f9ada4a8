import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses.returns import (
    discounted_returns,
    gae,
    length_adaptive_lambda,
    terminal_rewards,
    whiten,
)
from tests.steps import poison, quick, random_step

nan, inf = math.nan, math.inf
decays = st.sampled_from([0.0, 1.0, 0.5, 0.95, 1e-200])
seeds = st.integers(0, 10_000)


def one_sequence(num_tokens):
    return Packed.from_padded(torch.ones(1, num_tokens, dtype=torch.bool))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def steps_of(packed, seq):
    """Where the trainable tokens of a sequence lie, in time order."""
    here = ((packed.seq_ids_T == seq) & packed.mask_T).nonzero().flatten().tolist()
    positions_T = packed.positions_T
    return here if positions_T is None else sorted(here, key=lambda t: positions_T[t].item())


def loop_gae(rewards_T, values_T, packed, gamma, lams):
    """One token after another, from the last to the first."""
    advantages_T = torch.zeros_like(values_T)
    for seq in range(packed.num_seqs):
        following_value = following = 0.0
        for t in reversed(steps_of(packed, seq)):
            delta = rewards_T[t] + gamma * following_value - values_T[t]
            following = delta + gamma * lams[seq] * following
            following_value = values_T[t]
            advantages_T[t] = following
    returns_T = torch.where(packed.mask_T, advantages_T + values_T, 0)
    return advantages_T, returns_T


def random_inputs(seed, **sizes):
    """A step whose tokens are shuffled, with garbage at masked positions."""
    step = random_step(seed, **sizes)
    order_T = torch.randperm(step.packed.num_positions, generator=torch.Generator().manual_seed(1))
    return shuffled(step.packed, order_T), step.advantages_T[order_T], step.ref_T[order_T]


def shuffled(packed, order_T):
    return replace(
        packed,
        seq_ids_T=packed.seq_ids_T[order_T],
        mask_T=packed.mask_T[order_T],
        positions_T=packed.positions_T[order_T],
    )


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_gae_literals():
    rewards, values = doubles(0, 0, 1), doubles(0.5, 0.5, 0.5)
    advantages, returns = gae(rewards, values, one_sequence(3), gamma=0.5, lam=0.5)
    # deltas -0.25, -0.25, 0.5; decay 0.25
    assert advantages.tolist() == [-0.28125, -0.125, 0.5]
    assert returns.tolist() == [0.21875, 0.375, 1.0]


def test_without_discount_or_decay_the_return_is_the_sum_of_what_follows():
    advantages, returns = gae(doubles(1, 2, 3), doubles(9, 8, 7), one_sequence(3))
    assert returns.tolist() == [6.0, 5.0, 3.0]
    assert advantages.tolist() == [-3.0, -3.0, -4.0]


def test_lambda_zero_is_the_temporal_difference_and_gamma_zero_the_reward_alone():
    rewards, values = doubles(1, 2, 3), doubles(9, 8, 7)
    assert gae(rewards, values, one_sequence(3), lam=0.0)[0].tolist() == [0.0, 1.0, -4.0]
    assert gae(rewards, values, one_sequence(3), gamma=0.0)[1].tolist() == [1.0, 2.0, 3.0]


def test_masked_tokens_are_skipped_without_decay_and_their_rewards_do_not_exist():
    packed = Packed.from_padded(torch.tensor([[False, True, False, False, True, False]]))
    rewards, values = doubles(nan, 0, 100, inf, 1, 7), doubles(nan, 0.5, 100, -inf, 0.5, 7)
    advantages, returns = gae(rewards, values, packed, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.0, -0.125, 0.0, 0.0, 0.5, 0.0]
    assert returns.tolist() == [0.0, 0.375, 0.0, 0.0, 1.0, 0.0]
    assert discounted_returns(rewards, packed, gamma=0.5).tolist() == [0, 0.5, 0, 0, 1, 0]


def test_discounted_returns_literals():
    rewards = doubles(1, 2, 4)
    assert discounted_returns(rewards, one_sequence(3), gamma=0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted_returns(rewards, one_sequence(3)).tolist() == [7.0, 6.0, 4.0]
    assert discounted_returns(rewards, one_sequence(3), gamma=0.0).tolist() == [1.0, 2.0, 4.0]


@quick
@given(seeds, decays, decays, decays)
def test_gae_matches_a_loop_over_time(seed, gamma, lam, lam_value):
    packed, rewards_T, values_T = random_inputs(seed)
    lams = [lam] * packed.num_seqs
    got = gae(rewards_T, values_T, packed, gamma=gamma, lam=lam)
    assert_same(got, loop_gae(rewards_T, values_T, packed, gamma, lams))
    advantages_T, returns_T = gae(
        rewards_T, values_T, packed, gamma=gamma, lam=lam, lam_value=lam_value
    )
    assert_same(advantages_T, got[0])
    lams = [lam_value] * packed.num_seqs
    assert_same(returns_T, loop_gae(rewards_T, values_T, packed, gamma, lams)[1])


@quick
@given(seeds, decays, st.lists(decays, min_size=8, max_size=8))
def test_each_sequence_may_have_its_own_lambda(seed, gamma, lams):
    packed, rewards_T, values_T = random_inputs(seed)
    inputs = (rewards_T, values_T, packed)
    expected = loop_gae(*inputs, gamma, lams)
    assert_same(gae(*inputs, gamma=gamma, lam=doubles(*lams)), expected)
    advantages_T, returns_T = gae(*inputs, gamma=gamma, lam=0.9, lam_value=doubles(*lams))
    assert_same(returns_T, expected[1])
    assert_same(advantages_T, gae(*inputs, gamma=gamma, lam=0.9)[0])


@quick
@given(seeds, decays)
def test_returns_are_those_of_gae_without_a_critic(seed, gamma):
    packed, rewards_T, _ = random_inputs(seed)
    expected, _ = gae(rewards_T, torch.zeros_like(rewards_T), packed, gamma=gamma)
    assert_same(discounted_returns(rewards_T, packed, gamma=gamma), expected)


@quick
@given(seeds, st.randoms())
def test_order_of_tokens_does_not_matter(seed, random):
    packed, rewards_T, values_T = random_inputs(seed)
    order = list(range(packed.num_positions))
    random.shuffle(order)
    moved = shuffled(packed, torch.tensor(order))
    settings = {"gamma": 0.9, "lam": 0.8}
    expected = gae(rewards_T, values_T, packed, **settings)
    got = gae(rewards_T[order], values_T[order], moved, **settings)
    assert_same(got, tuple(x_T[order] for x_T in expected))
    rewards_S = torch.arange(packed.num_seqs).double()
    expected_T = terminal_rewards(rewards_S, packed)[order]
    assert terminal_rewards(rewards_S, moved).tolist() == expected_T.tolist()


def test_positions_far_apart_order_tokens_too():
    packed, rewards_T, values_T = random_inputs(5)
    expected = gae(rewards_T, values_T, packed, gamma=0.9)
    sparse = replace(packed, positions_T=packed.positions_T * 10**12)
    assert_same(gae(rewards_T, values_T, sparse, gamma=0.9), expected)


def test_without_positions_the_order_is_that_of_the_array():
    mask_T = torch.tensor([True, True, True, False, True])
    packed = Packed(seq_ids_T=torch.tensor([1, 0, 1, 1, 0]), mask_T=mask_T, num_seqs=2)
    rewards_T = doubles(1, 2, 3, nan, 4)
    assert discounted_returns(rewards_T, packed).tolist() == [4.0, 6.0, 3.0, 0.0, 4.0]
    assert terminal_rewards(doubles(5, 6), packed).tolist() == [0.0, 0.0, 6.0, 0.0, 5.0]


@quick
@given(seeds)
def test_padding_changes_nothing(seed):
    rng = torch.Generator().manual_seed(seed)
    mask_BL = torch.rand((3, 5), generator=rng) < 0.6
    rewards_BL, values_BL = torch.randn((2, 3, 5), generator=rng, dtype=torch.float64)
    expected = gae(rewards_BL.flatten(), values_BL.flatten(), Packed.from_padded(mask_BL), lam=0.9)
    wide_BL = torch.cat([mask_BL, torch.zeros(3, 4, dtype=torch.bool)], 1)
    padding = torch.full((3, 4), nan, dtype=torch.float64)
    wide = [torch.cat([x_BL, padding], 1).flatten() for x_BL in (rewards_BL, values_BL)]
    got = gae(*wide, Packed.from_padded(wide_BL), lam=0.9)
    for got_T, expected_T in zip(got, expected, strict=True):
        assert_same(got_T.view(3, 9)[:, :5].flatten(), expected_T)
        assert got_T.view(3, 9)[:, 5:].abs().max() == 0


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 1000, 4097])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_long_sequences_match_a_loop(num_tokens, decay):
    packed = Packed.from_padded(torch.ones(2, num_tokens, dtype=torch.bool))
    rng = torch.Generator().manual_seed(num_tokens)
    rewards_T = torch.randn(2 * num_tokens, generator=rng, dtype=torch.float64)
    expected, following = [], torch.zeros(2, dtype=torch.float64)
    for reward_S in reversed(rewards_T.view(2, -1).unbind(1)):
        following = reward_S + decay * following
        expected.append(following)
    expected_T = torch.stack(expected[::-1], 1).flatten()
    got = discounted_returns(rewards_T, packed, gamma=decay)
    torch.testing.assert_close(got, expected_T, rtol=1e-10, atol=1e-10)
    values_T, lam_S = torch.zeros_like(rewards_T), doubles(decay, decay)
    got, _ = gae(rewards_T, values_T, packed, lam=lam_S)
    torch.testing.assert_close(got, expected_T, rtol=1e-10, atol=1e-10)


def test_powers_that_underflow_do_no_harm():
    packed = one_sequence(3000)
    got = discounted_returns(torch.ones(3000, dtype=torch.float64), packed, gamma=0.5)
    assert got[0].item() == 2.0 and got[-1].item() == 1.0


@pytest.mark.parametrize("bad", [nan, inf])
def test_nan_reaches_its_token_and_the_earlier_ones_of_its_sequence_alone(bad):
    packed = Packed.from_padded(torch.ones(3, 5, dtype=torch.bool))
    for where in range(15):
        rewards_T = torch.zeros(15, dtype=torch.float64)
        rewards_T[where] = bad
        expected = [where // 5 * 5 <= t <= where for t in range(15)]
        got = discounted_returns(rewards_T, packed, gamma=0.9)
        assert (~got.isfinite()).tolist() == expected
        for inputs in ((rewards_T, 0 * got.nan_to_num()), (0 * got.nan_to_num(), rewards_T)):
            advantages_T, _ = gae(*inputs, packed, lam=0.5)
            assert (~advantages_T.isfinite()).tolist() == expected


def test_steps_without_a_trainable_token_give_zeros():
    packed = Packed.from_padded(torch.zeros(2, 3, dtype=torch.bool))
    garbage_T = torch.full((6,), nan)
    for got_T in gae(garbage_T, garbage_T, packed):
        assert got_T.tolist() == [0.0] * 6
    assert terminal_rewards(torch.ones(2), packed).tolist() == [0.0] * 6
    empty = shuffled(packed, torch.tensor([], dtype=torch.int64))
    assert gae(garbage_T[:0], garbage_T[:0], empty)[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_no_gradient_flows(dtype):
    rewards_T = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    packed = one_sequence(3)
    results = [
        *gae(rewards_T, rewards_T, packed, lam=torch.tensor([0.5])),
        discounted_returns(rewards_T, packed),
        terminal_rewards(rewards_T[:1], packed),
        whiten(rewards_T, packed.mask_T),
    ]
    assert all(x_T.dtype == dtype and not x_T.requires_grad for x_T in results)
    mixed = gae(rewards_T, rewards_T.float(), packed)
    assert mixed[0].dtype == torch.promote_types(dtype, torch.float32)


def test_inputs_are_left_as_they_were():
    packed, rewards_T, values_T = one_sequence(4), doubles(1, 2, 3, 4), doubles(4, 3, 2, 1)
    gae(rewards_T, values_T, packed, gamma=0.5, lam=0.5)
    assert rewards_T.tolist() == [1, 2, 3, 4] and values_T.tolist() == [4, 3, 2, 1]
    returns_T = discounted_returns(rewards_T[:1], one_sequence(1))
    returns_T += 1
    assert rewards_T[0] == 1


def test_terminal_rewards_lie_on_the_last_trainable_token():
    mask_BL = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    got = terminal_rewards(torch.tensor([5.0, 6.0, nan]), Packed.from_padded(mask_BL))
    assert got[:8].tolist() == [0, 5, 0, 0, 0, 0, 0, 0] and got[8].isnan()


def test_whiten_literals():
    values_T, mask_T = doubles(1, 2, 3, nan, inf), torch.tensor([True] * 3 + [False] * 2)
    assert whiten(values_T, mask_T, eps=0).tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]
    root = 1.5**0.5
    got = whiten(values_T, mask_T, eps=0, ddof=0).tolist()
    assert got == pytest.approx([-root, 0.0, root, 0.0, 0.0])
    assert whiten(values_T, mask_T, eps=3).tolist() == [-0.5, 0.0, 0.5, 0.0, 0.0]
    assert whiten(values_T, mask_T, eps=3, mean=False).tolist() == [1.5, 2.0, 2.5, 0.0, 0.0]


def test_upstream_whitening_one_token_gave_nan():
    values_T, mask_T = torch.tensor([3.0, nan]), torch.tensor([True, False])
    assert whiten(values_T, mask_T).tolist() == [0.0, 0.0]
    assert whiten(values_T, mask_T, mean=False).tolist() == [3.0, 0.0]
    assert whiten(values_T, torch.tensor([False, False])).tolist() == [0.0, 0.0]


def test_upstream_one_pass_float32_variance_was_nan_at_mean_1000_and_std_0_1():
    values_T = 1000 + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert (values_T.square().mean() - values_T.mean().square()) / 0.01 < 0.5  # no digits left
    wide_T = values_T.double()
    expected_T = (wide_T - wide_T.mean()) / (wide_T.var() + 1e-8).sqrt()
    got = whiten(values_T, torch.ones(64, dtype=torch.bool))
    torch.testing.assert_close(got, expected_T.float())


@quick
@given(seeds, st.randoms())
def test_whitened_values_have_mean_zero_and_variance_one_in_any_order(seed, random):
    step = random_step(seed)
    mask_T, values_T = step.packed.mask_T, step.advantages_T
    got = whiten(values_T, mask_T, eps=1e-30)
    kept = got[mask_T]
    if len(kept) > 1:
        assert_same(torch.stack(torch.var_mean(kept)), doubles(1, 0))
    order = list(range(len(mask_T)))
    random.shuffle(order)
    assert_same(whiten(values_T[order], mask_T[order], eps=1e-30), got[order])
    other_T = poison(values_T.flip(0), ~mask_T.flip(0)).flip(0)  # other garbage where masked
    assert_same(whiten(torch.where(mask_T, values_T, other_T), mask_T, eps=1e-30), got)


def test_whiten_does_not_hide_nan_at_a_trainable_token():
    assert whiten(doubles(1, nan, 2), torch.tensor([True, True, False]))[:2].isnan().all()


def test_length_adaptive_lambda_literals():
    got = length_adaptive_lambda(torch.tensor([0, 1, 20, 25, 100, 2000]))
    assert got.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.2, 0.8, 0.99])
    assert length_adaptive_lambda(torch.tensor([4.0]), alpha=1.0).tolist() == [0.75]
    mask_BL = torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3, [False] * 5])
    packed = Packed.from_padded(mask_BL)
    lam_S = length_adaptive_lambda(packed, alpha=1.0)
    assert lam_S.tolist() == [0.75, 0.5, 0.0]
    assert gae(torch.zeros(15), torch.ones(15), packed, lam=lam_S)[0][:5].tolist() == [
        -(0.75**3),
        -(0.75**2),
        -0.75,
        -1.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (SettingError, "gamma is 1.5; expected a number in", {"gamma": 1.5}),
        (SettingError, "lam is nan; expected a number in", {"lam": nan}),
        (SettingError, "lam_value is -0.5; expected a number in", {"lam_value": -0.5}),
        (SettingError, r"lam is \[2.0\]; expected numbers in", {"lam": torch.tensor([2.0])}),
        (ShapeError, r"lam has shape \(2,\).*\[1\]", {"lam": torch.ones(2)}),
        (DtypeError, "lam_value is torch.int64", {"lam_value": torch.tensor([1])}),
    ],
)
def test_bad_settings(error, match, settings):
    with pytest.raises(error, match=match):
        gae(torch.zeros(2), torch.zeros(2), one_sequence(2), **settings)


def test_bad_tensors():
    packed, zeros = one_sequence(2), torch.zeros(2)
    with pytest.raises(ShapeError, match="values_T"):
        gae(zeros, torch.zeros(3), packed)
    with pytest.raises(DtypeError, match=r"rewards_T is torch.int64"):
        discounted_returns(zeros.long(), packed)
    with pytest.raises(SettingError, match="gamma is 2"):
        discounted_returns(zeros, packed, gamma=2)
    with pytest.raises(ShapeError, match="one value for each sequence"):
        terminal_rewards(zeros, packed)
    with pytest.raises(ShapeError, match=r"expected \[T\] for both"):
        whiten(zeros, packed.mask_T[:1])
    with pytest.raises(DtypeError, match=r"mask_T is torch.float32"):
        whiten(zeros, zeros)
    with pytest.raises(DtypeError, match=r"values_T is torch.int64"):
        whiten(zeros.long(), packed.mask_T)
    with pytest.raises(SettingError, match="alpha is 0; expected a number above 0"):
        length_adaptive_lambda(torch.tensor([3]), alpha=0)
    with pytest.raises(ShapeError, match=r"expected \[S\]"):
        length_adaptive_lambda(torch.tensor(3))


def test_sequences_spread_over_ranks_need_positions():
    packed = replace(one_sequence(2), positions_T=None, seq_group=object())
    for call in (
        lambda: gae(torch.zeros(2), torch.zeros(2), packed),
        lambda: discounted_returns(torch.zeros(2), packed),
        lambda: terminal_rewards(torch.zeros(1), packed),
    ):
        with pytest.raises(SettingError, match="seq_group and no positions_T; expected positions"):
            call()


@pytest.mark.parametrize("factor", [1, 10**9])
def test_two_trainable_tokens_at_one_position_are_an_error(factor):
    packed = Packed(
        seq_ids_T=torch.zeros(4, dtype=torch.int64),
        mask_T=torch.tensor([True, True, True, False]),
        num_seqs=1,
        positions_T=torch.tensor([0, 2, 2, 2]) * factor,
    )
    with pytest.raises(SettingError, match="the same position; expected each token once"):
        discounted_returns(torch.zeros(4), packed)
    once = replace(packed, mask_T=torch.tensor([True, True, False, False]))
    assert discounted_returns(torch.ones(4), once).tolist() == [2.0, 1.0, 0.0, 0.0]
