import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import SettingError, ShapeError
from miles.losses.preferences import dpo, ipo, orpo, sequence_logprobs, simpo
from tests.steps import quick, random_step

# every loss as f(chosen, rejected, ref_chosen, ref_rejected)
LOSSES = {
    "dpo": lambda c, r, ref_c, ref_r: dpo(c, r, ref_c, ref_r, beta=0.5),
    "dpo smoothed": lambda c, r, ref_c, ref_r: dpo(c, r, ref_c, ref_r, label_smoothing=0.1),
    "ipo": lambda c, r, ref_c, ref_r: ipo(c, r, ref_c, ref_r, beta=0.5),
    "simpo": lambda c, r, ref_c, ref_r: simpo(c, r),
    "orpo": lambda c, r, ref_c, ref_r: orpo(c, r),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def float64(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


# chosen, rejected, ref_chosen, ref_rejected: the lead is (-1 + 1.5) - (-2 + 1) = 1.5
PAIR = (-1.0, -2.0, -1.5, -1.0)
SIGMOID = 1 / (1 + math.exp(-0.75))


@pytest.mark.parametrize(
    ("name", "loss", "margin", "by_chosen", "by_rejected"),
    [
        ("dpo", -math.log(SIGMOID), 0.75, 0.5 * (SIGMOID - 1), 0.5 * (1 - SIGMOID)),
        ("ipo", 0.25, 0.75, 1.0, -1.0),
        ("simpo", -log_sigmoid(1.0), 2.0, -2 / (1 + math.e), 2 / (1 + math.e)),
    ],
)
def test_literals_and_their_gradients(name, loss, margin, by_chosen, by_rejected):
    inputs = [float64(x, grad=True) for x in PAIR]
    got = LOSSES[name](*inputs)
    got.loss_P.sum().backward()
    assert (got.loss_P.item(), got.margin_P.item()) == pytest.approx((loss, margin))
    assert inputs[0].grad.item() == pytest.approx(by_chosen)
    assert inputs[1].grad.item() == pytest.approx(by_rejected)
    assert inputs[2].grad is None and inputs[3].grad is None
    assert not got.margin_P.requires_grad


def test_label_smoothing_literal():
    got = dpo(*(float64(x) for x in PAIR), beta=1.0, label_smoothing=0.2).loss_P.item()
    assert got == pytest.approx(-0.8 * log_sigmoid(1.5) - 0.2 * log_sigmoid(-1.5))


def test_orpo_literal_and_its_gradient():
    chosen, rejected = float64(math.log(0.5), grad=True), float64(math.log(0.25), grad=True)
    got = orpo(chosen, rejected, lam=0.4)
    got.loss_P.sum().backward()
    # odds of 1 and 1/3; d log odds / d mean is 1 / (1 - p)
    assert got.loss_P.item() == pytest.approx(math.log(2) + 0.4 * math.log(4 / 3))
    assert got.margin_P.item() == pytest.approx(math.log(3))
    assert chosen.grad.item() == pytest.approx(-1 - 0.4 * 0.25 * 2)
    assert rejected.grad.item() == pytest.approx(0.4 * 0.25 * 4 / 3)


def test_orpo_is_finite_for_a_certain_answer():
    chosen = torch.zeros(1, requires_grad=True)
    got = orpo(chosen, torch.full((1,), -1.0))
    got.loss_P.sum().backward()
    assert got.loss_P.isfinite().all() and chosen.grad.item() == -1.0


@quick
@given(
    st.lists(st.tuples(*(st.floats(-5, -0.01) for _ in range(4))), min_size=1, max_size=10),
    st.floats(0.01, 3.0),
)
def test_matches_scalar_arithmetic(pairs, beta):
    inputs = torch.tensor(pairs, dtype=torch.float64).T
    got = {
        "dpo": dpo(*inputs, beta=beta, label_smoothing=0.1),
        "ipo": ipo(*inputs, beta=beta),
        "simpo": simpo(*inputs[:2], beta=beta, gamma=0.3),
        "orpo": orpo(*inputs[:2], lam=beta),
    }
    for i, (c, r, ref_c, ref_r) in enumerate(pairs):
        lead = c - ref_c - (r - ref_r)
        ratio = log_odds(c) - log_odds(r)
        expected = {
            "dpo": (
                -0.9 * log_sigmoid(beta * lead) - 0.1 * log_sigmoid(-beta * lead),
                beta * lead,
            ),
            "ipo": ((lead - 1 / (2 * beta)) ** 2, beta * lead),
            "simpo": (-log_sigmoid(beta * (c - r) - 0.3), beta * (c - r)),
            "orpo": (-c - beta * log_sigmoid(ratio), ratio),
        }
        for name, values in expected.items():
            pair = (got[name].loss_P[i].item(), got[name].margin_P[i].item())
            assert pair == pytest.approx(values, abs=1e-9), name


@every_loss
def test_gradcheck(name):
    inputs = [float64(-1.0, -0.5, grad=True), float64(-2.0, -0.4, grad=True)]
    refs = [float64(-1.5, -1.0), float64(-1.0, -0.2)]
    assert torch.autograd.gradcheck(lambda c, r: LOSSES[name](c, r, *refs).loss_P, inputs)


@every_loss
def test_a_nan_is_not_hidden_and_dtype_is_kept(name):
    for which in range(4 if name.startswith(("dpo", "ipo")) else 2):
        inputs = [torch.full((2,), -1.0) for _ in range(4)]
        inputs[which][0] = torch.nan
        got = LOSSES[name](*inputs)
        assert got.loss_P.isnan().tolist() == [True, False]
        assert got.loss_P.dtype == got.margin_P.dtype == torch.float32


def test_a_far_lead_has_no_loss_and_no_nan():
    inputs = [torch.tensor([x], requires_grad=True) for x in (-1.0, -1e9, -1.0, -1.0)]
    got = dpo(*inputs, beta=1e30)
    got.loss_P.sum().backward()
    assert got.loss_P.item() == 0 and inputs[0].grad.isfinite().all()


@pytest.mark.parametrize("mean", [False, True])
def test_sequence_logprobs_of_trainable_tokens_only(mean):
    step = random_step()
    packed, leaf_T = step.packed, step.leaf()
    got_S = sequence_logprobs(leaf_T, packed, mean=mean)
    got_S.backward(torch.arange(1.0, 9.0, dtype=torch.float64))
    for seq in range(packed.num_seqs):
        member_T = packed.mask_T & (packed.seq_ids_T == seq)
        values_T = step.logprobs_T[member_T]
        expected = values_T.mean() if mean and len(values_T) else values_T.sum()
        torch.testing.assert_close(got_S[seq], expected)
        share = 1 / len(values_T) if mean and len(values_T) else 1
        slopes_T = torch.full_like(values_T, (seq + 1) * share)
        torch.testing.assert_close(leaf_T.grad[member_T], slopes_T)
    assert (leaf_T.grad[~packed.mask_T] == 0).all()


def test_a_trainable_nan_reaches_its_sequence():
    packed = Packed.from_padded(torch.ones(2, 2).bool())
    got_S = sequence_logprobs(torch.tensor([torch.nan, -1.0, -1.0, -1.0]), packed)
    assert got_S.isnan().tolist() == [True, False]


def test_bad_input():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ShapeError, match=r"'ref_chosen_P': \(3,\).*expected \[P\] for all"):
        dpo(two, two, three, two)
    with pytest.raises(ShapeError, match=r"expected \[P\] for all"):
        simpo(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ShapeError, match=r"logprobs_T|values_T"):
        sequence_logprobs(three, Packed.from_padded(torch.ones(1, 2).bool()))
    for call in (
        lambda: dpo(two, two, two, two, beta=0.0),
        lambda: ipo(two, two, two, two, beta=0.0),
        lambda: simpo(two, two, beta=0.0),
    ):
        with pytest.raises(SettingError, match=r"beta is 0\.0; expected a number above 0"):
            call()
    with pytest.raises(SettingError, match=r"label_smoothing is 0\.5; expected a share"):
        dpo(two, two, two, two, label_smoothing=0.5)
    with pytest.raises(SettingError, match=r"gamma is -1\.0; expected 0 or more"):
        simpo(two, two, gamma=-1.0)
    with pytest.raises(SettingError, match=r"lam is -1\.0; expected 0 or more"):
        orpo(two, two, lam=-1.0)
