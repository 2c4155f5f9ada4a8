"""`policy_loss`: every backend is the composition of the parts, in value and in gradient."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from miles import Packed, count
from miles.errors import DenominatorError, DtypeError, SettingError, ShapeError
from miles.losses import (
    Correction,
    _policy_closed,
    policy,
    policy_loss,
    policy_loss_backend,
    reduce_metrics,
    truncated_is,
)
from tests.steps import random_step

MODES = [
    ("token_mean", None),
    ("seq_mean_token_mean", None),
    ("seq_mean_token_sum", None),
    ("constant", 16.0),
    ("group_mean", None),
    ("sum", None),
]


def run(step, backend, dtype=torch.float64, device="cpu", *, mode="token_mean", constant=None,
        corrected=True, count_rejected=True, kl=True, dual_clip=None):  # fmt: skip
    packed = step.packed.to(device)
    new, old, rollout, ref, advantages = (
        x.to(device, dtype)
        for x in (step.logprobs_T, step.old_T, step.rollout_T, step.ref_T, step.advantages_T)
    )
    leaf = new.clone().requires_grad_()
    correction, keep_T = None, None
    if corrected:
        correction = truncated_is(old, rollout, packed)
        rejected = torch.arange(len(new), device=device) % 5 == 3
        correction.keep_T.logical_and_(~rejected)
        correction.weights_T.mul_(~rejected)
        keep_T = None if count_rejected else correction.keep_T
    loss, metrics = policy_loss(
        leaf, old, advantages, packed, count(packed, keep_T=keep_T), mode=mode, constant=constant,
        correction=correction, count_rejected=count_rejected, dual_clip=dual_clip,
        ref_logprobs_T=ref if kl else None, kl_coef=0.1 if kl else 0.0, averaged_over=2,
        backend=backend,
    )  # fmt: skip
    (3 * loss).backward()
    values = {key: value.item() for key, value in reduce_metrics(metrics).items()}
    return loss.item(), leaf.grad.cpu(), values


def assert_equal(step, backend, *, device="cpu", dtype=torch.float64, rtol=1e-12, **settings):
    expected = run(step, "reference", **settings)
    loss, gradient_T, values = run(step, backend, dtype, device, **settings)
    assert loss == pytest.approx(expected[0], rel=rtol, abs=rtol)
    torch.testing.assert_close(gradient_T.double(), expected[1], rtol=rtol, atol=rtol)
    assert values == pytest.approx(expected[2], rel=rtol, abs=rtol)


@pytest.mark.parametrize("block", [2**15, 7])
def test_chunked_is_the_composition(block, monkeypatch):
    monkeypatch.setattr(_policy_closed, "TOKENS_PER_THREAD", block)
    for seed, (mode, constant) in enumerate(MODES):
        for dual_clip in (None, 3.0):
            settings = {"mode": mode, "constant": constant, "dual_clip": dual_clip}
            assert_equal(random_step(seed), "chunked", **settings)
    assert_equal(random_step(7), "chunked", count_rejected=False)
    assert_equal(random_step(8), "chunked", corrected=False, kl=False)
    assert_equal(random_step(9), "chunked", dtype=torch.float32, rtol=1e-5)


@pytest.mark.parametrize("wide", [0, 1, 2, 3])
def test_inputs_of_several_dtypes_give_what_the_reference_gives(wide):
    step = random_step(3)
    inputs = [step.logprobs_T, step.old_T, step.advantages_T, step.ref_T]
    inputs = [x.to(torch.float64 if i == wide else torch.float32) for i, x in enumerate(inputs)]
    results = []
    for backend in ("reference", "chunked"):
        leaf = inputs[0].clone().requires_grad_()
        loss, _ = policy_loss(
            leaf, inputs[1], inputs[2], step.packed, count(step.packed), ref_logprobs_T=inputs[3],
            kl_coef=0.1, backend=backend,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_the_gradient_can_be_asked_for_again_and_grows_with_what_comes_back():
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    leaf = torch.tensor([0.1, -0.1], requires_grad=True)
    args = (torch.zeros(2), torch.tensor([1.0, -1.0]), packed, count(packed))
    gradients = []
    for backend in ("reference", "chunked"):
        loss, _ = policy_loss(leaf, *args, backend=backend)
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = first.clone()
        (again,) = torch.autograd.grad(2 * loss, leaf, retain_graph=True)
        torch.testing.assert_close(again, 2 * kept)
        assert torch.equal(first, kept)
        gradients.append(first)
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_refused_where_there_is_none():
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    leaf = torch.tensor([0.1, -0.1], requires_grad=True)
    loss, _ = policy_loss(leaf, torch.zeros(2), torch.ones(2), packed, count(packed))
    with pytest.raises(SettingError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_compiled_is_the_composition():
    for seed, (mode, constant) in enumerate(MODES):
        assert_equal(random_step(seed), "compiled", mode=mode, constant=constant, dual_clip=3.0)
    assert_equal(random_step(7), "compiled", count_rejected=False)
    assert_equal(random_step(8), "compiled", corrected=False, kl=False)


def test_the_triton_kernel_under_the_interpreter_is_the_closed_form():
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpreted_policy.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_what_is_broken_at_a_trained_token_shows(backend):
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    old = torch.zeros(2)
    leaf = torch.tensor([float("nan"), 0.0], requires_grad=True)
    loss, metrics = policy_loss(leaf, old, torch.ones(2), packed, count(packed), backend=backend)
    assert loss.isnan() and reduce_metrics(metrics)["ratio/max"].isnan()


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_a_reference_at_coefficient_0_is_read_alone_even_where_it_is_infinitely_far(backend):
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    leaf = torch.zeros(2, requires_grad=True)
    ref = torch.tensor([200.0, 0.0])
    loss, metrics = policy_loss(
        leaf, torch.zeros(2), torch.ones(2), packed, count(packed), ref_logprobs_T=ref,
        backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss == -1 and leaf.grad.tolist() == [-0.5, -0.5] and metrics["kl/ref"].value().isinf()


@pytest.mark.parametrize("backend", ["chunked", "compiled"])
def test_at_rounding_ties_with_a_bound_every_backend_gives_the_whole_gradient_or_none(backend):
    """torch.maximum halved it: a token one rounding off the clip got half a gradient."""
    old = -torch.rand(64, generator=torch.Generator().manual_seed(0)) * 3
    for bound, sign in ((1.2, 1.0), (0.8, -1.0), (3.0, -1.0)):
        new, advantages = old + math.log(bound), torch.full((64,), sign)
        packed = Packed.from_padded(torch.ones(1, 64, dtype=torch.bool))
        gradients = []
        for each in ("reference", backend):
            leaf = new.clone().requires_grad_()
            loss, _ = policy_loss(
                leaf, old, advantages, packed, count(packed), mode="sum", dual_clip=3.0,
                backend=each,
            )  # fmt: skip
            loss.backward()
            gradients.append(leaf.grad)
            near = ((leaf.grad.abs() - bound).abs() < 1e-5) | (leaf.grad == 0)
            assert near.all()
        if backend == "chunked":  # a compiler's exp may round to the other side of a bound
            assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_exactly_on_the_dual_clip_a_token_is_not_clipped(backend):
    packed = Packed.from_padded(torch.tensor([[True]]))
    new = torch.tensor([2.0], dtype=torch.float64).log().requires_grad_()
    loss, _ = policy_loss(
        new, torch.zeros(1, dtype=torch.float64), -torch.ones(1), packed, count(packed),
        dual_clip=new.exp().item(), backend=backend,
    )  # fmt: skip
    loss.backward()
    assert new.grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_a_nan_shows_in_the_gradient_even_where_the_advantage_is_0(backend):
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    inf = float("inf")
    for new, advantage in ((float("nan"), 0.0), (-inf, inf), (0.0, float("nan"))):
        leaf = torch.tensor([new, 0.0], requires_grad=True)
        advantages = torch.tensor([advantage, 1.0])
        loss, _ = policy_loss(
            leaf, torch.zeros(2), advantages, packed, count(packed), backend=backend
        )
        loss.backward()
        assert loss.isnan() and leaf.grad[0].isnan() and leaf.grad[1] == -0.5


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_a_clipped_token_of_infinite_ratio_sends_back_nothing(backend):
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    leaf = torch.tensor([800.0, 0.0], requires_grad=True)
    loss, _ = policy_loss(
        leaf, torch.zeros(2), torch.ones(2), packed, count(packed), backend=backend
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.1) and leaf.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_an_empty_micro_batch_adds_nothing(backend):
    packed = Packed.from_padded(torch.zeros(1, 3, dtype=torch.bool))
    other = count(Packed.from_padded(torch.ones(1, 3, dtype=torch.bool)))
    leaf = torch.full((3,), float("nan"), requires_grad=True)
    loss, _ = policy_loss(leaf, leaf.detach(), torch.ones(3), packed, other, backend=backend)
    loss.backward()
    assert loss.item() == 0 and leaf.grad.tolist() == [0.0] * 3


def test_bad_settings_are_refused():
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    x, denominators = torch.zeros(2), count(packed)
    with pytest.raises(SettingError, match="expected one of auto, reference"):
        policy_loss(x, x, x, packed, denominators, backend="fast")
    with pytest.raises(SettingError, match="expected float32 on cuda"):
        policy_loss(x, x, x, packed, denominators, backend="triton")
    with pytest.raises(SettingError, match="expected both, or kl_coef"):
        policy_loss(x, x, x, packed, denominators, kl_coef=0.1)
    for kl_coef in (-0.1, float("nan"), float("inf")):
        with pytest.raises(SettingError, match="expected a finite number, 0 or more"):
            policy_loss(x, x, x, packed, denominators, ref_logprobs_T=x, kl_coef=kl_coef)
    with pytest.raises(ShapeError, match="advantages_T"):
        policy_loss(x, x, torch.zeros(1), packed, denominators)
    for backend in ("reference", "chunked", "compiled"):
        with pytest.raises(SettingError, match="absolute ratios"):
            policy_loss(x, x, x, packed, denominators, ratio_max=0.28, backend=backend)
    correction = truncated_is(x, x, packed)
    with pytest.raises(DenominatorError, match="count_rejected=False"):
        policy_loss(
            x, x, x, packed, denominators, correction=correction, count_rejected=False,
            backend="compiled",
        )  # fmt: skip


def test_it_says_which_backend_it_takes_and_why():
    assert policy_loss_backend(torch.zeros(1), backend="compiled") == (
        "compiled",
        "asked for by name",
    )
    kinds = itertools.product([torch.bfloat16, torch.float64], ["auto"])
    for dtype, backend in kinds:
        chosen, why = policy_loss_backend(torch.zeros(1, dtype=dtype), backend=backend)
        assert chosen == "chunked" and str(dtype).removeprefix("torch.") in why


def test_float64_anywhere_rules_the_float32_kernel_out():
    """It was taken for float64 advantages, and gave float32."""
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    installed = importlib.util.find_spec("triton") is not None
    assert policy._choose(on_cuda, "auto", False)[0] == ("triton" if installed else "reference")
    chosen, why = policy._choose(on_cuda, "auto", True)
    assert chosen == "reference" and why.endswith("another input is float64")
    with pytest.raises(SettingError, match="another input is float64; expected float32"):
        policy._choose(on_cuda, "triton", True)


def test_old_logprobs_carry_no_gradient_in_any_backend():
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    for backend in ("reference", "chunked", "compiled"):
        leaf = torch.tensor([-1.0, -2.0], requires_grad=True)
        policy_loss(leaf, leaf, torch.ones(2), packed, count(packed), backend=backend)[0].backward()
        assert leaf.grad.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_a_weight_of_zero_hides_no_nan_and_a_short_one_is_refused(backend):
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    new, old = torch.tensor([float("nan"), 0.0]), torch.zeros(2)
    nothing = Correction(torch.zeros(2), packed.mask_T, {})
    args = (new, old, torch.ones(2), packed, count(packed))
    assert policy_loss(*args, correction=nothing, backend=backend)[0].isnan()
    short = Correction(torch.ones(1), packed.mask_T, {})
    with pytest.raises(ShapeError, match="weights_T"):
        policy_loss(*args, correction=short, backend=backend)
    floats = Correction(torch.ones(2), torch.ones(2), {})
    with pytest.raises(DtypeError, match=r"torch\.bool"):
        policy_loss(*args, correction=floats, backend=backend)


def test_no_position_at_all_gives_zero():
    empty = Packed.from_padded(torch.zeros(0, 3, dtype=torch.bool))
    other = count(Packed.from_padded(torch.ones(1, 3, dtype=torch.bool)))
    leaf = torch.zeros(0, requires_grad=True)
    loss, _ = policy_loss(leaf, leaf, torch.zeros(0), empty, other, backend="compiled")
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("backend", ["reference", "chunked", "compiled"])
def test_bfloat16_log_probs_are_compared_in_float32(backend):
    packed = Packed.from_padded(torch.tensor([[True, True]]))
    leaf = torch.tensor([-1.9297, -2.0], dtype=torch.bfloat16).requires_grad_()
    old = torch.tensor([-2.0, -2.0], dtype=torch.bfloat16)
    loss, metrics = policy_loss(leaf, old, torch.ones(2), packed, count(packed), backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    expected = torch.exp(leaf[0].detach().float() + 2).item()
    assert float(metrics["ratio/max"]) == pytest.approx(expected, rel=1e-6)
