import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses import group_advantages
from tests.steps import quick

rewards_and_groups = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=12
)
every_setting = pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])


def of_one_group(rewards, dtype=torch.float64, **settings):
    rewards_S = torch.tensor(rewards, dtype=dtype)
    return group_advantages(rewards_S, torch.zeros(len(rewards), dtype=torch.int64), **settings)


def split(pairs):
    rewards, ids = zip(*pairs, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids)


@pytest.mark.parametrize(
    ("rewards", "settings", "expected"),
    [
        ([1, 0], {}, [0.7071, -0.7071]),
        ([1] * 7 + [0], {}, [0.3536] * 7 + [-2.4749]),
        ([0.95] * 7 + [0], {}, [0.3536] * 7 + [-2.4749]),
        ([1] * 7 + [0], {"ddof": 0}, [0.3780] * 7 + [-2.6458]),
        ([1] * 7 + [0], {"scale": "none"}, [0.125] * 7 + [-0.875]),
        ([1, 0], {"baseline": "leave_one_out", "scale": "none"}, [1.0, -1.0]),
        ([1] * 7 + [0], {"baseline": "leave_one_out", "scale": "none"}, [0.1429] * 7 + [-1.0]),
        ([0.95] * 7 + [0], {"baseline": "leave_one_out", "scale": "none"}, [0.1357] * 7 + [-0.95]),
        ([1, 0], {"baseline": "leave_one_out"}, [1.4142, -1.4142]),
        ([3, 1], {"baseline": "none", "scale": "none"}, [3.0, 1.0]),
        ([3, 1], {"baseline": "none"}, [2.1213, 0.7071]),
        ([1, 0], {"eps": 1.0}, [0.2929, -0.2929]),
    ],
)
def test_literals(rewards, settings, expected):
    got = of_one_group(rewards, **settings).tolist()
    assert got == pytest.approx(expected, abs=1e-4)


@every_setting
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(scale, baseline, dtype):
    for rewards in ([0.3] * 8, [0.1] * 3, [-0.7] * 7):
        assert of_one_group(rewards, dtype, scale=scale, baseline=baseline).tolist() == [0.0] * len(
            rewards
        )


def test_equal_rewards_without_a_baseline_are_not_divided_by_eps():
    assert of_one_group([0.3] * 8, baseline="none").tolist() == [0.0] * 8
    assert of_one_group([0.5] * 2, baseline="none", scale="none").tolist() == [0.5] * 2


def test_batch_std_is_that_of_the_raw_rewards_of_the_batch():
    rewards = torch.tensor([0.0, 2.0, 10.0, 14.0], dtype=torch.float64)
    std = math.sqrt(sum((x - 6.5) ** 2 for x in [0, 2, 10, 14]) / 3)
    got = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), scale="batch_std", eps=0.0)
    assert got.tolist() == pytest.approx([-1 / std, 1 / std, -2 / std, 2 / std])


@pytest.mark.parametrize(("singleton", "expected"), [("zero", 0.0), ("raw", 0.7)])
@pytest.mark.parametrize("settings", [{}, {"scale": "none"}, {"baseline": "leave_one_out"}])
def test_a_lone_sample_gives_zero_or_its_raw_reward(singleton, expected, settings):
    assert of_one_group([0.7], singleton=singleton, **settings).tolist() == [expected]


def test_a_lone_sample_can_be_an_error_that_names_its_group():
    rewards, ids = torch.tensor([1.0, 0.0, 0.5, math.nan]), torch.tensor([3, 3, 8, 8])
    with pytest.raises(SettingError, match=r"groups \[8\].*expected siblings"):
        group_advantages(rewards, ids, singleton="error")
    group_advantages(rewards[:2], ids[:2], singleton="error")


def test_a_lone_sample_needs_no_siblings_without_statistics():
    assert of_one_group([0.7], baseline="none", scale="none", singleton="error").tolist() == [0.7]


@every_setting
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
def test_nan_rewards_are_left_out_and_get_zero(scale, baseline):
    nan = math.nan
    rewards = torch.tensor([1.0, nan, 0.0, 0.25, nan, nan], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 0, 0, 1])
    scored = ~rewards.isnan()
    got = group_advantages(rewards, ids, scale=scale, baseline=baseline)
    without = group_advantages(rewards[scored], ids[scored], scale=scale, baseline=baseline)
    assert got[scored].tolist() == pytest.approx(without.tolist())
    assert got[~scored].tolist() == [0.0] * 3


def test_all_rewards_nan_give_zeros():
    for scale in ("group_std", "batch_std", "none"):
        assert of_one_group([math.nan] * 2, scale=scale).tolist() == [0.0, 0.0]


def test_unequal_group_sizes_and_arbitrary_interleaved_ids():
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0, 9.0], dtype=torch.float64)
    ids = torch.tensor([10**12, 3, 10**12, 3, 3])
    got = group_advantages(rewards, ids, scale="none")
    assert got.tolist() == [0.5, -2.0, -0.5, 0.0, 2.0]


@quick
@given(rewards_and_groups)
def test_leave_one_out_is_the_reward_less_the_mean_of_the_siblings(pairs):
    rewards, ids = split(pairs)
    got = group_advantages(rewards, ids, baseline="leave_one_out", scale="none")
    for index in range(len(pairs)):
        siblings = [r for j, (r, g) in enumerate(pairs) if g == ids[index] and j != index]
        expected = pairs[index][0] - sum(siblings) / len(siblings) if siblings else 0.0
        assert got[index].item() == pytest.approx(expected, abs=1e-9)


@quick
@given(rewards_and_groups, st.sampled_from([0, 1]))
def test_default_advantages_match_a_loop_over_groups(pairs, ddof):
    rewards, ids = split(pairs)
    got = group_advantages(rewards, ids, ddof=ddof)
    for group in ids.unique():
        member = ids == group
        r = rewards[member]
        expected = torch.zeros_like(r)
        if len(r) > 1 and r.max() > r.min():
            expected = (r - r.mean()) / (r.std(correction=ddof) + 1e-6)
        torch.testing.assert_close(got[member], expected, rtol=1e-6, atol=1e-9)


@quick
@given(rewards_and_groups, st.randoms(), st.sampled_from(["group_std", "batch_std", "none"]))
def test_order_of_samples_and_names_of_groups_do_not_matter(pairs, random, scale):
    rewards, ids = split(pairs)
    order = list(range(len(pairs)))
    random.shuffle(order)
    got = group_advantages(rewards, ids, scale=scale)
    moved = group_advantages(rewards[order], 1000 - 7 * ids[order], scale=scale)
    torch.testing.assert_close(moved, got[order], rtol=1e-9, atol=1e-9)


@quick
@given(rewards_and_groups, st.sampled_from(["mean", "leave_one_out"]))
def test_advantages_sum_to_zero_in_each_group(pairs, baseline):
    rewards, ids = split(pairs)
    advantages = group_advantages(rewards, ids, baseline=baseline, scale="none")
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, ids, advantages)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


def test_large_offsets_do_not_cost_precision():
    got = of_one_group([1e8 + 1, 1e8], dtype=torch.float64).tolist()
    assert got == pytest.approx([0.7071, -0.7071], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_of_rewards_is_kept_and_no_gradient_flows(dtype):
    rewards = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
    got = group_advantages(rewards, torch.tensor([0, 0]))
    assert got.dtype == dtype and not got.requires_grad


@pytest.mark.parametrize(
    ("error", "match", "rewards", "ids", "settings"),
    [
        (NonFiniteError, r"infinite at \[1\].*expected finite", [0.0, math.inf], [0, 0], {}),
        (NonFiniteError, r"infinite at \[0\].*NaN for", [-math.inf, 0.0], [0, 0], {}),
        (EmptyBatchError, "no reward; expected at least one", [], [], {}),
        (ShapeError, r"\(2,\).*\(1,\); expected \[S\]", [0.0, 1.0], [0], {}),
        (ShapeError, r"\(1, 2\).*expected \[S\]", [[0.0, 1.0]], [[0, 0]], {}),
        (DtypeError, "torch.int64.*expected floating", [0, 1], [0, 0], {}),
        (DtypeError, "torch.float32; expected.*int64", [0.0, 1.0], [0.0, 0.0], {}),
        (SettingError, "baseline is 'median'; expected one of", [0.0], [0], {"baseline": "median"}),
        (SettingError, "scale is 'std'; expected one of", [0.0], [0], {"scale": "std"}),
        (SettingError, "singleton is 'x'; expected one of", [0.0], [0], {"singleton": "x"}),
    ],
)
def test_bad_input(error, match, rewards, ids, settings):
    dtype = torch.int64 if not rewards else None
    with pytest.raises(error, match=match):
        ids = torch.tensor(ids, dtype=dtype)
        group_advantages(torch.tensor(rewards), ids, **settings)
