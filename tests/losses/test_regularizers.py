import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import SettingError, ShapeError
from miles.losses import kl_penalty
from tests.steps import quick, random_step

VALUES = ["k1", "k2", "k3", "abs"]
PACKED = Packed.from_padded(torch.ones(1, 2).bool())


@pytest.mark.parametrize(
    ("value", "expected", "gradient"),
    [
        ("k1", [0.5, -1.0], [1.0, 1.0]),
        ("k2", [0.125, 0.5], [0.5, -1.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),
        ("abs", [0.5, 1.0], [1.0, -1.0]),
    ],
)
@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
def test_literals_and_their_gradients(value, expected, gradient, grad):
    logprobs_T = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-1.5, -2.0], dtype=torch.float64)
    kl_T = kl_penalty(logprobs_T, ref_T, PACKED, value=value, grad=grad)
    kl_T.sum().backward()
    assert kl_T.tolist() == pytest.approx(expected)
    wanted = gradient if grad == "pathwise" else [0.5, -1.0]
    assert logprobs_T.grad.tolist() == pytest.approx(wanted)


def test_defaults_are_k3_pathwise():
    step = random_step()
    got = kl_penalty(step.logprobs_T, step.ref_T, step.packed)
    explicit = kl_penalty(step.logprobs_T, step.ref_T, step.packed, value="k3", grad="pathwise")
    assert torch.equal(got, explicit)


@pytest.mark.parametrize("value", VALUES)
def test_gradcheck(value):
    logprobs_T = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-1.5, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, ref_T, PACKED, value=value), logprobs_T)


@quick
@given(st.integers(0, 10_000))
def test_k2_k3_and_abs_are_never_negative(seed):
    step = random_step(seed)
    for value in ("k2", "k3", "abs"):
        assert (kl_penalty(step.logprobs_T, step.ref_T, step.packed, value=value) >= 0).all()


@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
@pytest.mark.parametrize("value", VALUES)
def test_equal_policies_have_no_penalty(value, grad):
    logprobs_T = torch.tensor([-1.0, -2.0], dtype=torch.float32)
    assert kl_penalty(logprobs_T, logprobs_T.clone(), PACKED, value=value, grad=grad).tolist() == [
        0,
        0,
    ]


def test_k3_of_a_tiny_float32_gap_is_not_rounded_away():
    k3_T = kl_penalty(torch.full((2,), 1e-3), torch.zeros(2), PACKED)
    assert k3_T.tolist() == pytest.approx([1e-6 / 2 - 1e-9 / 6] * 2, rel=1e-3)


def test_reverse_kl_gradient_is_that_of_the_exact_reverse_kl_in_expectation():
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    every_token = Packed.from_padded(torch.ones(1, 3).bool())
    kl_V = kl_penalty(logp, ref, every_token, value="k1", grad="reverse_kl")
    expected = torch.autograd.grad((logp.exp().detach() * kl_V).sum(), logits)[0]
    torch.testing.assert_close(expected, exact)


@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
@pytest.mark.parametrize("value", VALUES)
def test_masked_garbage_gives_zero_and_no_gradient(value, grad):
    step = random_step()
    mask_T = step.packed.mask_T
    logprobs_T, ref_T = step.leaf(), step.ref_T.clone().requires_grad_()
    kl_T = kl_penalty(logprobs_T, ref_T, step.packed, value=value, grad=grad)
    kl_T.sum().backward()
    assert (kl_T[~mask_T] == 0).all() and (logprobs_T.grad[~mask_T] == 0).all()
    assert kl_T.isfinite().all() and logprobs_T.grad.isfinite().all()
    assert ref_T.grad is None and kl_T.dtype == torch.float64


@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
@pytest.mark.parametrize("value", VALUES)
def test_a_trainable_nan_is_not_hidden(value, grad):
    new_T, old_T = torch.tensor([torch.nan, 0.0]), torch.tensor([0.0, torch.nan])
    assert kl_penalty(new_T, old_T, PACKED, value=value, grad=grad).isnan().all()


def test_bad_input():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ShapeError, match=r"ref_logprobs_T has shape \(3,\); expected \(2,\)"):
        kl_penalty(two, three, PACKED)
    with pytest.raises(SettingError, match="value is 'k4'; expected k1"):
        kl_penalty(two, two, PACKED, value="k4")
    with pytest.raises(SettingError, match="grad is 'forward'; expected pathwise"):
        kl_penalty(two, two, PACKED, grad="forward")
