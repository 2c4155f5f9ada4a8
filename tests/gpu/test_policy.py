"""The Triton kernel of `policy_loss` is the composition of the parts."""

import pytest
import torch

from miles import Packed, count
from miles.losses import policy_loss, reduce_metrics
from tests.losses.test_policy import MODES, assert_equal
from tests.steps import random_step

FLOAT32 = {"device": "cuda", "dtype": torch.float32, "rtol": 3e-5}


@pytest.mark.parametrize(("mode", "constant"), MODES)
@pytest.mark.parametrize("num_seqs", [8, 2001])
def test_triton_is_the_composition(mode, constant, num_seqs):
    step = random_step(1, num_seqs=num_seqs)
    for dual_clip in (None, 3.0):
        assert_equal(step, "triton", mode=mode, constant=constant, dual_clip=dual_clip, **FLOAT32)
    assert_equal(step, "triton", corrected=False, kl=False, **FLOAT32)
    assert_equal(step, "triton", count_rejected=False, **FLOAT32)


def test_two_million_tokens_give_the_same_bits_every_time():
    generator = torch.Generator("cuda").manual_seed(0)
    T = 2**21 + 77
    mask = torch.rand(1, T, device="cuda", generator=generator) < 0.8
    packed = Packed.from_padded(mask)
    old = -torch.rand(T, device="cuda", generator=generator)
    new = old + 0.1 * torch.randn(T, device="cuda", generator=generator)
    advantages = torch.randn(T, device="cuda", generator=generator)
    results = []
    for backend in ("triton", "triton", "reference"):
        leaf = new.clone().requires_grad_()
        loss, metrics = policy_loss(leaf, old, advantages, packed, count(packed), backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad, reduce_metrics(metrics)))
    first, again, reference = results
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert all(torch.equal(first[2][key], again[2][key]) for key in first[2])
    torch.testing.assert_close(first[0], reference[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first[1], reference[1], rtol=1e-5, atol=0)
    for key in first[2]:
        torch.testing.assert_close(first[2][key], reference[2][key], rtol=1e-6, atol=1e-9)


def test_the_program_that_is_last_sees_the_sums_of_all_others():
    T = 2**20
    packed = Packed.from_padded(torch.ones(1, T, dtype=torch.bool, device="cuda"))
    new, old = torch.zeros(T, device="cuda"), torch.zeros(T, device="cuda")
    advantages, denominators = torch.ones(T, device="cuda"), count(packed)
    numbers = []
    for _ in range(500):
        loss, metrics = policy_loss(new, old, advantages, packed, denominators, backend="triton")
        numbers.append(torch.stack([loss.double(), *metrics["ratio/mean"].numbers()]))
    assert torch.stack(numbers).unique(dim=0).tolist() == [[-1.0, T, T]]


def test_the_gradient_can_be_asked_for_again():
    packed = Packed.from_padded(torch.tensor([[True, True]])).to("cuda")
    leaf = torch.tensor([0.1, -0.1], device="cuda", requires_grad=True)
    old, advantages = torch.zeros(2, device="cuda"), torch.tensor([1.0, -1.0], device="cuda")
    loss, _ = policy_loss(leaf, old, advantages, packed, count(packed), backend="triton")
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (again,) = torch.autograd.grad(2 * loss, leaf)
    assert torch.equal(again, 2 * kept) and torch.equal(first, kept)


def test_nan_and_infinity_as_in_the_reference():
    packed = Packed.from_padded(torch.tensor([[True, True, False]])).to("cuda")
    old = torch.tensor([0.0, 0.0, float("nan")], device="cuda")
    leaf = torch.tensor([800.0, 0.0, float("inf")], device="cuda", requires_grad=True)
    advantages = torch.ones(3, device="cuda")
    loss, _ = policy_loss(leaf, old, advantages, packed, count(packed), backend="triton")
    loss.backward()
    assert loss.item() == pytest.approx(-1.1) and leaf.grad.tolist() == [0.0, -0.5, 0.0]
    broken = torch.tensor([float("nan"), 0.0, 0.0], device="cuda", requires_grad=True)
    loss, metrics = policy_loss(broken, old, advantages, packed, count(packed), backend="triton")
    assert loss.isnan() and reduce_metrics(metrics)["ratio/max"].isnan()


def test_strided_sequence_ids_are_read_where_they_are():
    ids = torch.arange(12, device="cuda") // 4
    packed = Packed(
        seq_ids_T=ids[::2], mask_T=torch.ones(12, device="cuda").bool()[::2], num_seqs=3,
        group_ids_S=None, positions_T=None, seq_group=None,
    )  # fmt: skip
    new = torch.linspace(-1, 1, 6, device="cuda")
    results = []
    for backend in ("reference", "triton"):
        leaf = new.clone().requires_grad_()
        loss, _ = policy_loss(
            leaf, torch.zeros_like(new), torch.ones_like(new), packed, count(packed),
            mode="seq_mean_token_mean", backend=backend,
        )  # fmt: skip
        loss.backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)
