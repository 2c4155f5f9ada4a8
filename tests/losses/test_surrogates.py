import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import SettingError, ShapeError
from miles.losses import ppo_clip
from tests.steps import quick

# ratio, advantage, loss, gradient by the log-ratio, clipped low, clipped high
CASES = [
    (1.0, 2.0, -2.0, -2.0, False, False),
    (1.1, 2.0, -2.2, -2.2, False, False),
    (1.5, 2.0, -2.4, 0.0, False, True),
    (0.5, 2.0, -1.0, -1.0, False, False),
    (0.5, -2.0, 1.6, 0.0, True, False),
    (1.5, -2.0, 3.0, 3.0, False, False),
    (0.9, -2.0, 1.8, 1.8, False, False),
    (1.5, 0.0, 0.0, 0.0, False, False),
    (0.5, 0.0, 0.0, 0.0, False, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "low", "high"), CASES)
def test_ppo_clip_literals(ratio, advantage, loss, gradient, low, high):
    log_ratio_T = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    got = ppo_clip(log_ratio_T, torch.tensor([advantage], dtype=torch.float64))
    got.loss_T.sum().backward()
    assert got.loss_T.item() == pytest.approx(loss)
    assert log_ratio_T.grad.item() == pytest.approx(gradient)
    assert (got.clipped_low_T.item(), got.clipped_high_T.item()) == (low, high)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(5.0, -2.0, 6.0, 0.0), (2.0, -2.0, 4.0, 4.0), (5.0, 2.0, -2.4, 0.0), (0.1, -2.0, 1.6, 0.0)],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages_only(ratio, advantage, loss, gradient):
    log_ratio_T = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    got = ppo_clip(log_ratio_T, torch.tensor([advantage], dtype=torch.float64), dual_clip=3.0)
    got.loss_T.sum().backward()
    assert got.loss_T.item() == pytest.approx(loss)
    assert log_ratio_T.grad.item() == pytest.approx(gradient)


def test_bounds_are_absolute_ratios():
    log_ratio_T = torch.tensor([2.0, 0.5]).log()
    got = ppo_clip(log_ratio_T, torch.tensor([1.0, -1.0]), ratio_min=0.7, ratio_max=1.28)
    assert got.loss_T.tolist() == pytest.approx([-1.28, 0.7])


@quick
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=20),
    st.sampled_from([None, 1.5, 3.0]),
)
def test_ppo_clip_matches_scalar_arithmetic(pairs, dual_clip):
    x, a = torch.tensor(pairs, dtype=torch.float64).T
    got = ppo_clip(x, a, ratio_min=0.6, ratio_max=1.3, dual_clip=dual_clip)
    for t, (log_ratio, advantage) in enumerate(pairs):
        r = math.exp(log_ratio)
        expected = max(-r * advantage, -min(max(r, 0.6), 1.3) * advantage)
        if dual_clip is not None and advantage < 0:
            expected = min(expected, -dual_clip * advantage)
        assert got.loss_T[t].item() == pytest.approx(expected)
        assert got.clipped_low_T[t].item() == (advantage < 0 and r < 0.6)
        assert got.clipped_high_T[t].item() == (advantage > 0 and r > 1.3)


def test_gradcheck_away_from_the_kinks():
    log_ratio_T = torch.tensor([0.05, -0.1, 0.5, -0.5, 1.3], dtype=torch.float64)
    for sign in (1.0, -1.0):
        advantages_T = sign * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, a=advantages_T: ppo_clip(x, a, dual_clip=3.0).loss_T,
            log_ratio_T.requires_grad_(),
        )


def test_on_policy_gradient_is_minus_the_advantage():
    log_ratio_T = torch.zeros(3, requires_grad=True)
    advantages_T = torch.tensor([1.5, -2.0, 0.0])
    ppo_clip(log_ratio_T, advantages_T).loss_T.sum().backward()
    assert log_ratio_T.grad.tolist() == (-advantages_T).tolist()


def test_advantages_get_no_gradient():
    advantages_T = torch.ones(2, requires_grad=True)
    loss_T = ppo_clip(torch.zeros(2, requires_grad=True), advantages_T).loss_T
    loss_T.sum().backward()
    assert advantages_T.grad is None


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_nan_is_not_hidden(dual_clip):
    nan = torch.nan
    got = ppo_clip(
        torch.tensor([nan, 0.0, nan]), torch.tensor([1.0, nan, -1.0]), dual_clip=dual_clip
    )
    assert got.loss_T.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert ppo_clip(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)).loss_T.dtype == dtype


@pytest.mark.parametrize(
    "bounds",
    [
        {"ratio_min": 0.2, "ratio_max": 0.28},
        {"ratio_min": 1.1},
        {"ratio_min": -0.1},
        {"ratio_max": math.nan},
    ],
)
def test_bounds_that_look_relative_are_refused(bounds):
    with pytest.raises(SettingError, match=r"ratio_max .*; expected absolute ratios"):
        ppo_clip(torch.zeros(1), torch.zeros(1), **bounds)


def test_bad_input():
    with pytest.raises(ShapeError, match=r"\(3,\) and advantages_T \(2,\); expected \[T\]"):
        ppo_clip(torch.zeros(3), torch.zeros(2))
    with pytest.raises(SettingError, match=r"dual_clip is 1\.0; expected a number above 1"):
        ppo_clip(torch.zeros(1), torch.zeros(1), dual_clip=1.0)
