import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import EmptyBatchError, SettingError, ShapeError
from miles.losses import Max, Mean, mean_over, mismatch_metrics, reduce_metrics
from miles.losses.metrics import max_over
from tests.steps import quick, random_step, select


def test_mean_and_max_of_literals_skip_masked_garbage():
    values_T = torch.tensor([1.0, torch.nan, 4.0, torch.inf], requires_grad=True)
    mask_T = torch.tensor([True, False, True, False])
    assert float(mean_over(values_T, mask_T)) == 2.5
    assert float(max_over(values_T, mask_T)) == 4.0
    assert not mean_over(values_T, mask_T).value().requires_grad


def test_means_of_flags_are_fractions():
    assert float(mean_over(torch.tensor([True, False]), torch.tensor([True, True]))) == 0.5


def test_reduce_weighs_tokens_and_not_micro_batches():
    ones_T = torch.ones(3).bool()
    parts = [
        {"a": mean_over(torch.ones(1), ones_T[:1]), "b": max_over(torch.ones(1), ones_T[:1])},
        {"a": mean_over(torch.full((3,), 5.0), ones_T), "b": max_over(-torch.ones(3), ones_T)},
    ]
    got = reduce_metrics(parts)
    assert {key: value.item() for key, value in got.items()} == {"a": 4.0, "b": 1.0}
    assert got["a"].dtype == torch.float64


def test_reduce_takes_one_dict_as_well():
    metrics = {"m": Max(torch.tensor(3.0)), "x": Mean(torch.tensor(3.0), torch.tensor(2.0))}
    got = reduce_metrics(metrics)
    assert {key: value.item() for key, value in got.items()} == {"m": 3.0, "x": 1.5}
    assert list(got) == ["m", "x"]


def test_nothing_counted_is_nan_and_minus_infinity():
    nothing_T = torch.zeros(2).bool()
    assert math.isnan(float(mean_over(torch.ones(2), nothing_T)))
    assert float(max_over(torch.ones(2), nothing_T)) == -math.inf
    assert float(max_over(torch.ones(0), nothing_T[:0])) == -math.inf


def test_a_counted_nan_is_not_hidden_by_other_micro_batches():
    ones_T = torch.ones(1).bool()
    parts = [
        {"mean": mean_over(x, ones_T), "max": max_over(x, ones_T)}
        for x in (torch.tensor([torch.nan]), torch.tensor([1.0]))
    ]
    for order in (parts, parts[::-1]):
        assert all(value.isnan() for value in reduce_metrics(order).values())


@quick
@given(st.integers(0, 10_000), st.permutations(range(8)), st.sets(st.integers(1, 7)))
def test_reduced_micro_batches_equal_the_whole_batch(seed, order, cuts):
    step = random_step(seed)
    whole = reduce_metrics(mismatch_metrics(step.old_T, step.rollout_T, step.packed))
    parts, bounds = [], [0, *sorted(cuts), 8]
    for low, high in pairwise(bounds):
        packed, index_T = select(step.packed, list(order[low:high]))
        parts.append(mismatch_metrics(step.old_T[index_T], step.rollout_T[index_T], packed))
    torch.testing.assert_close(reduce_metrics(parts), whole, rtol=1e-12, atol=1e-14)


def test_mismatch_literals():
    packed = Packed.from_padded(torch.tensor([[True, True, False]]))
    train_T, rollout_T = torch.tensor([-1.0, -3.0, torch.nan]), torch.tensor([-1.5, -2.0, 0.0])
    got = {key: float(m) for key, m in mismatch_metrics(train_T, rollout_T, packed).items()}
    k3 = ((math.exp(0.5) - 1.5) + math.exp(-1)) / 2
    assert got == pytest.approx(
        {
            "mismatch/abs": 0.75,
            "mismatch/k1": 0.25,
            "mismatch/k3": k3,
            "mismatch/abs_max": 1.0,
            "mismatch/ratio_max": math.exp(0.5),
        }
    )


def test_mismatch_of_a_trainable_nan_is_nan():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    got = mismatch_metrics(torch.tensor([0.0, torch.nan]), torch.zeros(2), packed)
    assert all(math.isnan(float(metric)) for metric in got.values())


def test_mismatch_of_a_tensor_with_itself_is_refused_but_equal_values_are_not():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    logprobs_T = torch.zeros(2)
    for same in (logprobs_T, logprobs_T.detach(), logprobs_T[:]):
        with pytest.raises(SettingError, match="are one tensor; expected the trainer's own"):
            mismatch_metrics(logprobs_T, same, packed)
    assert float(mismatch_metrics(logprobs_T, torch.zeros(2), packed)["mismatch/abs"]) == 0.0


def test_bad_input():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    with pytest.raises(ShapeError, match=r"rollout_logprobs_T has shape \(3,\); expected \(2,\)"):
        mismatch_metrics(torch.zeros(2), torch.zeros(3), packed)
    with pytest.raises(EmptyBatchError, match="no metrics; expected one dict"):
        reduce_metrics([])
    one = Max(torch.tensor(1.0))
    with pytest.raises(SettingError, match=r"differ between micro-batches by \['b'\]; expected"):
        reduce_metrics([{"a": one}, {"a": one, "b": one}])
