import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, count
from miles.errors import SettingError, ShapeError
from miles.losses.aggregation import aggregate
from miles.losses.ratios import log_ratio
from miles.losses.sequence_surrogates import gmpo, vespo
from tests.steps import quick, random_step

# two sequences: the first trains on tokens 0 and 2, the second on token 3
PACKED = Packed.from_padded(torch.tensor([[True, False, True], [True, False, False]]))
NAN, INF = math.nan, math.inf


def float64(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def phi(w: float, k: float, lam: float) -> float:
    return math.exp(lam) * w**k * math.exp(-lam * w)


def test_gmpo_literals_and_their_gradients():
    log_ratio_T = float64(0.5, NAN, 0.1, -0.6, INF, -INF, grad=True)
    got = gmpo(log_ratio_T, float64(2.0, INF, 2.0, -3.0, NAN, NAN), PACKED)
    got.loss_T.backward(float64(1.0, NAN, 1.0, 1.0, NAN, NAN))
    first, second = -2 * math.exp(0.25), 3 * math.exp(-0.4)  # the mean of 0.4 and 0.1; -0.4
    assert got.loss_T.tolist() == pytest.approx([first, 0, first, second, 0, 0])
    assert log_ratio_T.grad.tolist() == pytest.approx([0, 0, first, 0, 0, 0])
    assert got.clipped_high_T.tolist() == [True] + [False] * 5
    assert got.clipped_low_T.tolist() == [False] * 3 + [True, False, False]


def test_gmpo_clips_only_on_the_side_that_the_advantage_pushes_to():
    got = gmpo(float64(-2.0, 0, -1.0, 3.0, 0, 0), float64(1.0, 0, 1.0, -1.0, 0, 0), PACKED)
    expected = [-math.exp(-1.5), 0, -math.exp(-1.5), math.exp(3), 0, 0]
    assert got.loss_T.tolist() == pytest.approx(expected)
    assert not (got.clipped_low_T | got.clipped_high_T).any()


@quick
@given(st.integers(0, 10_000))
def test_gmpo_with_sequence_means_is_the_loss_of_the_paper(seed):
    # verl ends in torch.mean over the micro-batch instead: -0.172 whole, -0.665 split
    step = random_step(seed)
    packed, expected = step.packed, []
    seq_advantages_S = torch.randn(packed.num_seqs, dtype=torch.float64)
    advantages_T = packed.per_token(seq_advantages_S)
    for seq in range(packed.num_seqs):
        member_T = packed.mask_T & (packed.seq_ids_T == seq)
        if not member_T.any():
            continue
        adv, product = seq_advantages_S[seq].item(), 1.0
        sign = math.copysign(1, adv)
        for lr in (step.logprobs_T - step.old_T)[member_T].tolist():
            clipped = min(max(math.exp(lr), math.exp(-0.4)), math.exp(0.4))
            product *= min(math.exp(lr) ** sign, clipped**sign) ** sign
        expected.append(-adv * product ** (1 / int(member_T.sum())))
    loss_T = gmpo(log_ratio(step.logprobs_T, step.old_T, packed), advantages_T, packed).loss_T
    got = aggregate(loss_T, packed, count(packed), mode="seq_mean_token_mean").item()
    assert got == pytest.approx(sum(expected) / len(expected))


def test_gmpo_takes_advantages_that_differ_within_a_sequence_by_their_mean():
    lr, a = float64(0.1, 0, 0.3, 0.2, 0, 0), float64(1.0, 0, 3.0, 1.0, 0, 0)
    loss = aggregate(gmpo(lr, a, PACKED).loss_T, PACKED, count(PACKED), mode="seq_mean_token_mean")
    assert loss.item() == pytest.approx((-2 * math.exp(0.2) - math.exp(0.2)) / 2)


def test_gmpo_counts_a_token_without_advantage_as_a_ratio_of_one():
    lr = float64(0.2, 0, 5.0, 0.1, 0, 0, grad=True)
    loss_T = gmpo(lr, float64(1.0, 0, 0.0, 1.0, 0, 0), PACKED).loss_T
    loss_T.sum().backward()
    first, second = -math.exp(0.1), -math.exp(0.1)  # the mean of 0.2 and 0; 0.1
    assert loss_T.tolist() == pytest.approx([first, 0, 0, second, 0, 0])
    assert lr.grad.tolist() == pytest.approx([first / 2, 0, 0, second, 0, 0])


def test_gmpo_of_a_sequence_without_trainable_tokens_is_zero():
    packed = Packed.from_padded(torch.tensor([[True, False], [False, False]]))
    lr = float64(0.1, NAN, NAN, INF, grad=True)
    loss_T = gmpo(lr, float64(1.0, NAN, NAN, -INF), packed).loss_T
    loss_T.sum().backward()
    assert loss_T[1:].tolist() == [0, 0, 0] and lr.grad[1:].tolist() == [0, 0, 0]


def test_a_ratio_that_overflows_is_harmless_where_it_does_not_count():
    lr = torch.tensor([900.0, 0, 900.0, 900.0, 0, 0], requires_grad=True)
    loss_T = gmpo(lr, torch.tensor([1.0, 0, 1.0, 0.0, 0, 0]), PACKED).loss_T
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([-math.exp(0.4), 0, -math.exp(0.4), 0, 0, 0])
    assert lr.grad.tolist() == [0] * 6


def test_vespo_literals_and_their_gradients():
    logprobs_T = float64(-1.0, NAN, -2.0, -0.5, INF, -INF, grad=True)
    log_ratio_T = float64(0.3, NAN, -0.1, 0.4, INF, -INF, grad=True)
    got = vespo(logprobs_T, log_ratio_T, float64(2.0, INF, 1.0, -3.0, NAN, NAN), PACKED)
    got.loss_T.backward(float64(1.0, NAN, 1.0, 1.0, NAN, NAN))
    pos, neg = phi(math.exp(0.2), 2.0, 3.0), phi(math.exp(0.4), 3.0, 2.0)
    assert got.loss_T.tolist() == pytest.approx([2 * pos, 0, 2 * pos, -1.5 * neg, 0, 0])
    assert logprobs_T.grad.tolist() == pytest.approx([-2 * pos, 0, -pos, 3 * neg, 0, 0])
    assert log_ratio_T.grad is None
    assert not (got.clipped_low_T | got.clipped_high_T).any()


def test_vespo_takes_importance_weights_into_the_ratio():
    x, lr, a = (
        float64(-1, 0, -2, -3, 0, 0),
        float64(0.3, 0, -0.1, 0.4, 0, 0),
        torch.ones(6).double(),
    )
    weights_T = float64(-0.3, NAN, 0.1, 0.2, INF, NAN)
    got = vespo(x, lr, a, PACKED, log_weights_T=weights_T).loss_T
    assert got.tolist() == pytest.approx([1, 0, 2, 3 * phi(math.exp(0.6), 2, 3), 0, 0])


@pytest.mark.parametrize("log_w", [-1e4, -200.0, 5.0, 90.0, 1e4])
def test_vespo_weight_of_a_far_sequence_is_0_and_not_nan(log_w):
    logprobs_T = torch.full((6,), -1.0, requires_grad=True)
    lr = torch.full((6,), log_w)
    for advantage in (1.0, -1.0):
        loss_T = vespo(logprobs_T, lr, torch.full((6,), advantage), PACKED).loss_T
        assert loss_T.abs().max() < 1e-6


def test_vespo_weight_is_largest_at_k_over_lam():
    log_w = torch.linspace(-2, 2, 401, dtype=torch.float64)
    packed = Packed.from_padded(torch.ones(401, 1).bool())
    ones_T = torch.ones_like(log_w)
    weights_T = vespo(-ones_T, log_w, ones_T, packed).loss_T
    assert log_w[weights_T.argmax()].exp().item() == pytest.approx(2 / 3, rel=0.01)


@quick
@given(st.integers(0, 10_000))
def test_vespo_matches_a_loop_over_sequences(seed):
    step = random_step(seed)
    packed, lr = step.packed, log_ratio(step.logprobs_T, step.old_T, step.packed)
    weights_T = step.old_T - step.rollout_T
    inputs = (step.logprobs_T, lr, step.advantages_T, packed)
    got = vespo(*inputs, log_weights_T=weights_T).loss_T
    for t in packed.mask_T.nonzero().flatten().tolist():
        member_T = packed.mask_T & (packed.seq_ids_T == packed.seq_ids_T[t])
        w = math.exp((lr + torch.where(packed.mask_T, weights_T, 0))[member_T].sum())
        adv, logp = step.advantages_T[t].item(), step.logprobs_T[t].item()
        weight = phi(w, 2.0, 3.0) if adv >= 0 else phi(w, 3.0, 2.0)
        assert got[t].item() == pytest.approx(-weight * adv * logp)


def test_gradcheck():
    lr, a = float64(0.05, 0, -0.1, 0.3, 0, 0, grad=True), float64(1, 0, -2, 1.5, 0, 0)
    assert torch.autograd.gradcheck(lambda x: gmpo(x, a, PACKED).loss_T, lr)
    x = float64(-1, 0, -2, -0.5, 0, 0, grad=True)
    assert torch.autograd.gradcheck(lambda x: vespo(x, lr.detach(), a, PACKED).loss_T, x)


def test_advantages_get_no_gradient_and_dtype_is_kept():
    x, a = torch.zeros(6, requires_grad=True), torch.ones(6, requires_grad=True)
    for got in (gmpo(x, a, PACKED), vespo(x, x, a, PACKED, log_weights_T=a)):
        got.loss_T.sum().backward()
        assert a.grad is None and got.loss_T.dtype == torch.float32


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_trainable_nan_reaches_the_loss(which, advantage):
    inputs = [float64(*[0.1] * 6), float64(*[0.1] * 6), float64(*[advantage] * 6)]
    inputs.append(float64(*[0.1] * 6))
    inputs[which][0] = torch.nan
    x, lr, a, weights_T = inputs
    if which in (1, 2):
        assert gmpo(lr, a, PACKED).loss_T[0].isnan()
    assert vespo(x, lr, a, PACKED, log_weights_T=weights_T).loss_T[0].isnan()


def test_bad_input():
    six, five = torch.zeros(6), torch.zeros(5)
    with pytest.raises(ShapeError, match=r"advantages_T has shape \(5,\); expected \(6,\)"):
        gmpo(six, five, PACKED)
    with pytest.raises(ShapeError, match=r"log_weights_T has shape \(5,\); expected \(6,\)"):
        vespo(six, six, six, PACKED, log_weights_T=five)
    for bounds in ({"log_min": 0.67, "log_max": 1.49}, {"log_max": -0.1}):
        with pytest.raises(SettingError, match="expected bounds of the log-ratio"):
            gmpo(six, six, PACKED, **bounds)
    for name in ("k_pos", "lam_pos", "k_neg", "lam_neg"):
        with pytest.raises(SettingError, match="expected numbers above 0"):
            vespo(six, six, six, PACKED, **{name: 0.0})
