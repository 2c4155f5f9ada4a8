import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses.advantages import (
    distill_advantages,
    group_advantages,
    multi_reward_advantages,
    passk_advantages,
    soft_overlong_penalty,
)
from tests.steps import poison, quick, random_step

rewards_and_groups = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=12
)
SCALES = ["group_std", "batch_std", "group_mean", "none"]
BASELINES = ["mean", "leave_one_out", "length_weighted", "max_two", "none"]
every_scale = pytest.mark.parametrize("scale", SCALES)
nan = math.nan


def of_one_group(rewards, dtype=torch.float64, **settings):
    rewards_S = torch.tensor(rewards, dtype=dtype)
    return group_advantages(rewards_S, torch.zeros(len(rewards), dtype=torch.int64), **settings)


def with_lengths(baseline, num_samples):
    """The settings of a baseline, with lengths 1, 2, 3, ... where it needs them."""
    lengths = {"lengths_S": torch.arange(num_samples) + 1} if baseline == "length_weighted" else {}
    return {"baseline": baseline, **lengths}


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
        ([1, 0, 0, 0], {"scale": "group_mean"}, [3.0, -1.0, -1.0, -1.0]),
        ([1, 0], {"scale": "group_mean", "eps": 0.5}, [0.5, -0.5]),
        ([-1, 0, 0], {"scale": "group_mean"}, [0.0, 0.0, 0.0]),
        ([1, -1], {"scale": "group_mean"}, [0.0, 0.0]),
        ([3, 1], {"baseline": "none", "scale": "group_mean"}, [1.5, 0.5]),
        ([5, 2, 4], {"baseline": "max_two", "scale": "none"}, [1.0, 0.0, 0.0]),
        ([5, 2, 5], {"baseline": "max_two", "scale": "none"}, [0.0, 0.0, 0.0]),
        ([1, 0], {"baseline": "max_two"}, [1.4142, 0.0]),
    ],
)
def test_literals(rewards, settings, expected):
    got = of_one_group(rewards, **settings).tolist()
    assert got == pytest.approx(expected, abs=1e-4)


def test_length_weighted_baseline_is_the_mean_reward_of_a_token():
    settings = {"baseline": "length_weighted", "scale": "none"}
    lengths = torch.tensor([1, 3])
    assert of_one_group([1, 0], lengths_S=lengths, **settings).tolist() == [0.75, -0.25]
    assert of_one_group([1, 0], lengths_S=0 * lengths, **settings).tolist() == [0.5, -0.5]
    unscored = torch.tensor([1, 100, 3])
    assert of_one_group([1, nan, 0], lengths_S=unscored, **settings).tolist() == [0.75, 0, -0.25]


def test_upstream_eight_equal_rewards_of_0_3_gave_0_0289_to_every_response():
    assert of_one_group([0.3] * 8, torch.float32).tolist() == [0.0] * 8


def test_upstream_groups_by_position_normalised_unequal_groups_over_the_whole_batch():
    rewards = torch.tensor([1.0, 0.0, 5.0, 5.0, 5.0])
    got = group_advantages(rewards, torch.tensor([0, 0, 1, 1, 1])).tolist()
    assert got == pytest.approx([0.7071, -0.7071, 0, 0, 0], abs=1e-4)


@every_scale
@pytest.mark.parametrize("baseline", BASELINES[:-1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(scale, baseline, dtype):
    for rewards in ([0.3] * 8, [0.1] * 3, [-0.7] * 7):
        settings = with_lengths(baseline, len(rewards))
        got = of_one_group(rewards, dtype, scale=scale, **settings)
        assert got.tolist() == [0.0] * len(rewards)


def test_equal_rewards_without_a_baseline_are_not_divided_by_eps():
    for scale in ("group_std", "group_mean"):
        assert of_one_group([0.3] * 8, baseline="none", scale=scale).tolist() == [0.0] * 8
    assert of_one_group([0.5] * 2, baseline="none", scale="none").tolist() == [0.5] * 2


def test_batch_std_is_that_of_the_raw_rewards_of_the_batch():
    rewards = torch.tensor([0.0, 2.0, 10.0, 14.0], dtype=torch.float64)
    std = math.sqrt(sum((x - 6.5) ** 2 for x in [0, 2, 10, 14]) / 3)
    got = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), scale="batch_std", eps=0.0)
    assert got.tolist() == pytest.approx([-1 / std, 1 / std, -2 / std, 2 / std])


@pytest.mark.parametrize(("singleton", "expected"), [("zero", 0.0), ("raw", 0.7)])
@pytest.mark.parametrize("baseline", BASELINES[:-1])
@every_scale
def test_a_lone_sample_gives_zero_or_its_raw_reward(singleton, expected, baseline, scale):
    settings = {"singleton": singleton, "scale": scale, **with_lengths(baseline, 1)}
    assert of_one_group([0.7], **settings).tolist() == [expected]


def test_a_lone_sample_can_be_an_error_that_names_its_group():
    rewards, ids = torch.tensor([1.0, 0.0, 0.5, math.nan]), torch.tensor([3, 3, 8, 8])
    with pytest.raises(SettingError, match=r"groups \[8\].*expected siblings"):
        group_advantages(rewards, ids, singleton="error")
    group_advantages(rewards[:2], ids[:2], singleton="error")


def test_a_lone_sample_needs_no_siblings_without_statistics():
    assert of_one_group([0.7], baseline="none", scale="none", singleton="error").tolist() == [0.7]


@every_scale
@pytest.mark.parametrize("baseline", BASELINES)
def test_nan_rewards_are_left_out_and_get_zero(scale, baseline):
    rewards = torch.tensor([1.0, nan, 0.0, 0.25, nan, nan], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 0, 0, 1])
    scored = ~rewards.isnan()
    settings = with_lengths(baseline, 6)
    got = group_advantages(rewards, ids, scale=scale, **settings)
    settings = {key: x[scored] if torch.is_tensor(x) else x for key, x in settings.items()}
    without = group_advantages(rewards[scored], ids[scored], scale=scale, **settings)
    assert got[scored].tolist() == pytest.approx(without.tolist())
    assert got[~scored].tolist() == [0.0] * 3


def test_all_rewards_nan_give_zeros():
    for scale in SCALES:
        assert of_one_group([nan] * 2, scale=scale).tolist() == [0.0, 0.0]


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
@given(rewards_and_groups, st.randoms(), st.sampled_from(SCALES), st.sampled_from(BASELINES))
def test_order_of_samples_and_names_of_groups_do_not_matter(pairs, random, scale, baseline):
    rewards, ids = split(pairs)
    order = list(range(len(pairs)))
    random.shuffle(order)
    settings = with_lengths(baseline, len(pairs))
    got = group_advantages(rewards, ids, scale=scale, **settings)
    settings = {key: x[order] if torch.is_tensor(x) else x for key, x in settings.items()}
    moved = group_advantages(rewards[order], 1000 - 7 * ids[order], scale=scale, **settings)
    torch.testing.assert_close(moved, got[order], rtol=1e-9, atol=1e-9)


@quick
@given(rewards_and_groups, st.sampled_from(["mean", "leave_one_out"]))
def test_advantages_sum_to_zero_in_each_group(pairs, baseline):
    rewards, ids = split(pairs)
    advantages = group_advantages(rewards, ids, baseline=baseline, scale="none")
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, ids, advantages)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


@quick
@given(rewards_and_groups, st.sampled_from(SCALES), st.sampled_from(BASELINES))
def test_sparse_and_dense_group_ids_agree(pairs, scale, baseline):
    rewards, ids = split(pairs)
    settings = {"scale": scale, **with_lengths(baseline, len(pairs))}
    got = group_advantages(rewards, ids, **settings)
    sparse = group_advantages(rewards, ids * 10**9, **settings)
    torch.testing.assert_close(sparse, got, rtol=1e-12, atol=1e-12)


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
        (SettingError, "needs lengths_S", [0.0], [0], {"baseline": "length_weighted"}),
    ],
)
def test_bad_input(error, match, rewards, ids, settings):
    dtype = torch.int64 if not rewards else None
    with pytest.raises(error, match=match):
        ids = torch.tensor(ids, dtype=dtype)
        group_advantages(torch.tensor(rewards), ids, **settings)


@pytest.mark.parametrize(
    ("error", "match", "lengths", "baseline"),
    [
        (SettingError, "lengths_S has no effect with baseline='mean'", [1, 1], "mean"),
        (ShapeError, r"lengths_S has shape \(1,\); expected \(2,\)", [1], "length_weighted"),
        (SettingError, "negative or infinite", [1, -1], "length_weighted"),
        (SettingError, "or NaN", [1.0, nan], "length_weighted"),
    ],
)
def test_bad_lengths(error, match, lengths, baseline):
    with pytest.raises(error, match=match):
        of_one_group([0.0, 1.0], baseline=baseline, lengths_S=torch.tensor(lengths))


def passk(rewards, k, ids=None, **settings):
    ids = [0] * len(rewards) if ids is None else ids
    rewards_S = torch.tensor(rewards, dtype=torch.float64)
    return passk_advantages(rewards_S, torch.tensor(ids), k=k, **settings)


def test_passk_literals():
    # n = 4, c = 1, k = 2: R = 1/2, sigma = 1/2; a wrong sample fails with C(2,1)/C(3,1) = 2/3
    assert passk([1, 0, 0, 0], 2).tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    # k = 1 is GRPO with the population's standard deviation
    assert passk([1, 0, 0, 0], 1).tolist() == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)
    # every subgroup of 3 out of 4 holds one of two right ones
    assert passk([1, 1, 0, 0], 3).tolist() == [0.0] * 4
    assert passk([0.3, 0.6], 1, threshold=0.2).tolist() == [0.0, 0.0]
    assert passk([nan, nan, 1, 0, nan], 1, ids=[7, 7, 3, 3, 3]).tolist() == [0, 0, 1, -1, 0]


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_passk_is_the_mean_advantage_over_all_subgroups(right, data):
    n, k = len(right), data.draw(st.integers(1, len(right)))
    subgroups = list(itertools.combinations(range(n), k))
    passed = [any(right[i] for i in members) for members in subgroups]
    rate = sum(passed) / len(passed)
    sigma = math.sqrt(rate * (1 - rate))
    for index, got in enumerate(passk(right, k).tolist()):
        mine = [p - rate for p, members in zip(passed, subgroups, strict=True) if index in members]
        expected = sum(mine) / len(mine) / sigma if 0 < rate < 1 else 0.0
        assert got == pytest.approx(expected, abs=1e-12)


def test_passk_of_large_groups_is_exact_at_the_ends_and_finite_between():
    rewards = torch.zeros(4096, dtype=torch.float64)
    ids = torch.zeros(4096, dtype=torch.int64)
    assert passk_advantages(rewards, ids, k=1024).abs().max() == 0
    assert passk_advantages(rewards + 1, ids, k=1024).abs().max() == 0
    rewards[0] = 1
    got = passk_advantages(rewards, ids, k=1024)
    assert got[0].item() == pytest.approx(math.sqrt(3)) and got.isfinite().all()


def test_passk_bad_input():
    with pytest.raises(SettingError, match=r"groups \[8\] have fewer scored samples than k=2"):
        passk([1, 0, 1, nan], 2, ids=[3, 3, 8, 8])
    with pytest.raises(SettingError, match="k is 0; expected 1 or more"):
        passk([1.0], 0)
    with pytest.raises(NonFiniteError, match="infinite"):
        passk([math.inf], 1)


def multi(rewards, ids=None, **settings):
    rewards_SR = torch.tensor(rewards, dtype=torch.float64)
    ids = [0] * len(rewards) if ids is None else ids
    return multi_reward_advantages(rewards_SR, torch.tensor(ids), **settings)


def test_rewards_normalised_before_the_sum_tell_apart_what_their_sum_does_not():
    # columns (0, 1, 0) and (2, 1, 0) become (-1, 2, -1)/sqrt(3) and (1, 0, -1)
    root = 3**-0.5
    each = [1 - root, 2 * root, -1 - root]
    rewards = [[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]
    assert multi(rewards, final="none", eps=0).tolist() == pytest.approx(each)
    rms = math.sqrt(sum(x * x for x in each) / 2)
    assert multi(rewards, eps=0).tolist() == pytest.approx([x / rms for x in each])
    summed = multi(rewards, how="sum_then_normalize", final="none")
    assert summed.tolist() == of_one_group([2, 2, 0]).tolist()


def test_weights_scale_each_reward():
    rewards, weights = [[1.0, 5.0], [0.0, 7.0]], torch.tensor([2.0, 0.5])
    got = multi(rewards, weights_R=weights, final="none", eps=0)
    assert got.tolist() == pytest.approx([1.5 * 0.5**0.5, -1.5 * 0.5**0.5])
    got = multi(rewards, weights_R=weights, how="sum_then_normalize", final="none", eps=0)
    assert got.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


@pytest.mark.parametrize("how", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("final", ["batch", "none"])
def test_equal_rewards_give_exactly_zero_beside_another_group(how, final):
    settings = {"how": how, "final": final}
    assert multi([[0.1, 0.2]] * 3, **settings).tolist() == [0.0] * 3
    got = multi([[0.1, 0.7]] * 3 + [[1.0, 0.3], [0.2, 0.9]], [4, 4, 4, 1, 1], **settings)
    assert got[:3].tolist() == [0.0] * 3
    weighted = multi([[1.0, 0.3], [0.2, 0.4]], weights_R=torch.tensor([1.0, 0.5]), **settings)
    assert weighted.abs().min() > 0.1


def test_a_reward_that_is_not_scored_adds_nothing_or_takes_its_sample_out():
    rewards = [[1.0, nan], [0.0, 1.0], [0.5, 0.0]]
    got = multi(rewards, final="none", eps=0)
    root = 0.5**0.5
    assert got.tolist() == pytest.approx([1.0, -1 + root, -root])
    got = multi(rewards, how="sum_then_normalize", final="none", eps=0)
    assert got.tolist() == pytest.approx([0.0, root, -root])
    # a sample without any score does not count in the batch
    with_unscored = multi([[1.0], [0.0], [nan]], eps=0)
    assert with_unscored[:2].tolist() == multi([[1.0], [0.0]], eps=0).tolist()


@quick
@given(rewards_and_groups, st.integers(1, 3), st.randoms())
def test_final_normalisation_is_by_the_std_over_responses(pairs, num_rewards, random):
    rewards, ids = split(pairs)
    columns = [rewards * random.uniform(0.1, 2) ** 2 for _ in range(num_rewards)]
    rewards_SR = torch.stack(columns, 1)
    plain = multi_reward_advantages(rewards_SR, ids, final="none")
    got = multi_reward_advantages(rewards_SR, ids)
    std = plain.std() if len(pairs) > 1 else torch.zeros(())
    torch.testing.assert_close(got, plain / (std + 1e-6), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (SettingError, "how is 'sum'; expected", {"how": "sum"}),
        (SettingError, "final is 'std'; expected", {"final": "std"}),
        (ShapeError, r"weights_R.*\(3,\); expected \[2\]", {"weights_R": torch.ones(3)}),
    ],
)
def test_multi_reward_bad_settings(error, match, settings):
    with pytest.raises(error, match=match):
        multi([[1.0, 0.0]], **settings)


def test_multi_reward_bad_rewards():
    with pytest.raises(ShapeError, match=r"rewards_SR.*expected \[S, R\]"):
        multi([1.0, 0.0])
    for how in ("normalize_then_sum", "sum_then_normalize"):
        with pytest.raises(NonFiniteError, match="infinite"):
            multi([[1.0, math.inf], [0.0, 1.0]], how=how)


def test_distillation_is_the_teachers_lead_and_carries_no_gradient():
    step = random_step()
    mask_T, student_T = step.packed.mask_T, step.leaf()
    got = distill_advantages(student_T, step.ref_T, step.packed, coef=0.5)
    assert not got.requires_grad and got.dtype == torch.float64
    expected = torch.where(mask_T, 0.5 * (step.ref_T - step.logprobs_T), 0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    centred = distill_advantages(student_T, step.ref_T, step.packed, coef=0.5, center=True)
    expected = torch.where(mask_T, got - got[mask_T].mean(), 0)
    torch.testing.assert_close(centred, expected, rtol=1e-12, atol=1e-12)


def test_distillation_centres_itself_and_not_the_advantages_it_is_added_to():
    packed = Packed.from_padded(torch.tensor([[True, True, False]]))
    student, teacher = torch.tensor([-1.0, -3.0, nan]), torch.tensor([-2.0, -1.0, nan])
    base = torch.tensor([10.0, 20.0, math.inf])
    got = distill_advantages(student, teacher, packed, base_advantages_T=base)
    assert got.tolist() == [9.0, 22.0, 0.0]
    got = distill_advantages(student, teacher, packed, base_advantages_T=base, center=True)
    assert got.tolist() == [8.5, 21.5, 0.0]


def test_distillation_does_not_hide_nan_at_a_trainable_token():
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    values, others = torch.tensor([nan, -1.0]), torch.tensor([-1.0, -1.0])
    for student, teacher in ((values, others), (others, values)):
        got = distill_advantages(student, teacher, packed)
        assert got[0].isnan() and got[1] == 0


def test_distillation_bad_input():
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    with pytest.raises(ShapeError, match="teacher_logprobs_T"):
        distill_advantages(torch.zeros(2), torch.zeros(3), packed)
    with pytest.raises(ShapeError, match="base_advantages_T"):
        distill_advantages(torch.zeros(2), torch.zeros(2), packed, base_advantages_T=torch.zeros(1))


def test_masked_garbage_does_not_reach_distillation():
    step = random_step(3)
    zeros_T = torch.zeros_like(step.ref_T)
    got = distill_advantages(step.logprobs_T, zeros_T, step.packed, center=True)
    clean_T = torch.where(step.packed.mask_T, step.logprobs_T, 0)
    poisoned_T = poison(zeros_T, step.packed.mask_T)
    again = distill_advantages(clean_T, poisoned_T, step.packed, center=True)
    assert got.tolist() == again.tolist()


def test_soft_overlong_penalty_literals():
    lengths = torch.tensor([0, 12288, 14336, 16384, 20480])
    got = soft_overlong_penalty(lengths, max_length=16384, buffer=4096)
    assert got.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0] and got.dtype == torch.float32
    got = soft_overlong_penalty(lengths.double(), max_length=16384, buffer=4096, factor=0.5)
    assert got.tolist() == [0.0, 0.0, -0.25, -0.5, -0.5] and got.dtype == torch.float64


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("buffer=0 and max_length=8; expected", {"max_length": 8, "buffer": 0}),
        ("buffer=9 and max_length=8; expected", {"max_length": 8, "buffer": 9}),
        ("factor is -1.0", {"max_length": 8, "buffer": 4, "factor": -1.0}),
    ],
)
def test_soft_overlong_penalty_bad_settings(match, settings):
    with pytest.raises(SettingError, match=match):
        soft_overlong_penalty(torch.tensor([3]), **settings)
    with pytest.raises(ShapeError, match=r"expected \[S\]"):
        soft_overlong_penalty(torch.tensor(3), max_length=8, buffer=4)


def test_whole_numbers_as_rewards_are_refused_everywhere():
    """Their dtype would come back, and cut the advantages off."""
    with pytest.raises(DtypeError, match=r"rewards_SR is torch\.int64"):
        multi_reward_advantages(torch.tensor([[1, 0], [0, 1]]), torch.tensor([0, 0]))


def test_equal_rewards_of_a_whole_batch_give_exactly_zero_without_a_baseline():
    rewards, groups = torch.ones(4), torch.tensor([0, 0, 1, 1])
    advantages = group_advantages(rewards, groups, baseline="none", scale="batch_std")
    assert advantages.tolist() == [0.0] * 4


@pytest.mark.parametrize("settings", [{"eps": -1.0}, {"eps": math.nan}, {"ddof": 5}])
def test_settings_that_would_turn_signs_are_refused(settings):
    with pytest.raises(SettingError):
        group_advantages(torch.rand(4), torch.tensor([0, 0, 1, 1]), **settings)


def test_without_a_baseline_equal_rewards_are_0_only_under_a_scale_of_the_group():
    rewards, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    for scale, zeroed in (("group_std", True), ("group_mean", True), ("batch_std", False),
                          ("none", False)):  # fmt: skip
        got = group_advantages(rewards, groups, baseline="none", scale=scale)
        assert (got[:2] == 0).all() == zeroed and got[2] > 0
