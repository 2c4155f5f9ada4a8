import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import SettingError, ShapeError
from miles.losses.ratios import log_ratio
from miles.losses.surrogates import cispo, dppo, dro, ppo_clip, reinforce, sapo
from tests.steps import quick, random_step

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


def test_a_ratio_or_divergence_exactly_at_its_bound_is_not_clipped():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    zeros_T, advantages_T = torch.zeros(2).double(), torch.tensor([1.0, -1.0]).double()
    bounds = {"ratio_min": 1.0, "ratio_max": 1.0}
    half_T = torch.full_like(zeros_T, 0.5).log()
    assert (1 - half_T.exp() == 0.5).all()
    moved = (zeros_T - half_T, advantages_T.abs(), packed)
    for got in (
        ppo_clip(zeros_T, advantages_T, **bounds),
        cispo(zeros_T, zeros_T, advantages_T, packed, **bounds),
        dppo(zeros_T, *moved, rollout_logprobs_T=half_T, delta=0.5),
    ):
        assert not (got.clipped_low_T | got.clipped_high_T).any()


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
    for t, (lr, advantage) in enumerate(pairs):
        r = math.exp(lr)
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


def packed_of(length: int) -> Packed:
    return Packed.from_padded(torch.ones(1, length).bool())


def float64(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# every surrogate of one token as f(logprobs, log_ratio, advantages, rollout, packed)
SURROGATES = {
    "ppo_clip": lambda x, lr, a, q, packed: ppo_clip(lr, a),
    "cispo": lambda x, lr, a, q, packed: cispo(x, lr, a, packed, ratio_max=2.0),
    "sapo": lambda x, lr, a, q, packed: sapo(lr, a),
    "reinforce": lambda x, lr, a, q, packed: reinforce(x, a, packed),
    "dro": lambda x, lr, a, q, packed: dro(x, lr, a, packed, beta=0.3),
    "dppo tv": lambda x, lr, a, q, packed: dppo(x, lr, a, packed, rollout_logprobs_T=q),
    "dppo kl": lambda x, lr, a, q, packed: dppo(
        x, lr, a, packed, rollout_logprobs_T=q, kind="kl", delta=0.05
    ),
    "dppo capped": lambda x, lr, a, q, packed: dppo(
        x, lr, a, packed, rollout_logprobs_T=q, ratio_cap=1.5
    ),
}
INPUTS = {  # which of logprobs, log-ratio, advantages and rollout log-probs each one reads
    "ppo_clip": (1, 2),
    "cispo": (0, 1, 2),
    "sapo": (1, 2),
    "reinforce": (0, 2),
    "dro": (0, 1, 2),
    "dppo tv": (0, 1, 2, 3),
    "dppo kl": (0, 1, 2, 3),
    "dppo capped": (0, 1, 2, 3),
}
every_surrogate = pytest.mark.parametrize("name", SURROGATES)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.0, 2.0, 3.0, -2.0, False, False),
        (4.0, 2.0, 6.0, -4.0, False, True),
        (4.0, -2.0, -6.0, 4.0, False, False),
        (0.25, -2.0, -1.5, 1.0, True, False),
        (0.25, 2.0, 1.5, -1.0, False, False),
        (4.0, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_cispo_literals(ratio, advantage, loss, gradient, low, high):
    logprobs_T, log_ratio_T = float64(-1.5, grad=True), float64(math.log(ratio), grad=True)
    bounds = {"ratio_min": 0.5, "ratio_max": 2.0}
    got = cispo(logprobs_T, log_ratio_T, float64(advantage), packed_of(1), **bounds)
    got.loss_T.sum().backward()
    assert got.loss_T.item() == pytest.approx(loss)
    assert logprobs_T.grad.item() == pytest.approx(gradient)
    assert log_ratio_T.grad is None
    assert (got.clipped_low_T.item(), got.clipped_high_T.item()) == (low, high)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 3.0, -6.0, -3.0),
        (1.0, -3.0, 3.0, 3.0),  # tau_neg is 2
        (2.0, 1.0, -4 * 0.7310585786, -8 * 0.1966119332),
        (2.0, -1.0, 2 * 0.8807970779, 8 * 0.1049935854),
        (1e300, 1.0, -4.0, 0.0),
        (1e-300, -1.0, 2 * 0.1192029220, 0.0),
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_sapo_literals(ratio, advantage, loss, gradient):
    log_ratio_T = float64(math.log(ratio), grad=True)
    got = sapo(log_ratio_T, float64(advantage), tau_neg=2.0)
    got.loss_T.sum().backward()
    assert got.loss_T.item() == pytest.approx(loss)
    assert log_ratio_T.grad.item() == pytest.approx(gradient)
    assert not got.clipped_low_T.any() and not got.clipped_high_T.any()


def test_sapo_gradient_is_finite_at_a_ratio_that_overflows():
    log_ratio_T = torch.tensor([200.0, 200.0], requires_grad=True)
    loss_T = sapo(log_ratio_T, torch.tensor([1.0, -1.0])).loss_T
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([-4.0, 4 / 1.05])
    assert log_ratio_T.grad.tolist() == [0.0, 0.0]


def test_reinforce_literals():
    logprobs_T = float64(-1.5, -0.5, grad=True)
    loss_T = reinforce(logprobs_T, float64(2.0, -4.0), packed_of(2)).loss_T
    loss_T.sum().backward()
    assert loss_T.tolist() == [3.0, -2.0]
    assert logprobs_T.grad.tolist() == [-2.0, 4.0]


def test_dro_literals():
    logprobs_T, log_ratio_T = float64(-1.5, grad=True), float64(0.5, grad=True)
    loss_T = dro(logprobs_T, log_ratio_T, float64(2.0), packed_of(1), beta=0.8).loss_T
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(3.0 + 0.4 * 0.25)
    assert (logprobs_T.grad.item(), log_ratio_T.grad.item()) == pytest.approx((-2.0, 0.4))


@pytest.mark.parametrize(
    ("kind", "p", "q", "advantage", "loss", "low", "high"),
    [
        ("tv", 0.6, 0.3, 1.0, 0.0, False, True),
        ("tv", 0.6, 0.3, -1.0, 2.0, False, False),
        ("tv", 0.3, 0.6, -1.0, 0.0, True, False),
        ("tv", 0.3, 0.6, 1.0, -0.5, False, False),
        ("tv", 0.45, 0.3, 1.0, -1.5, False, False),
        ("tv", 0.04, 0.01, 1.0, -4.0, False, False),  # a rare token: PPO would clip it
        ("tv", 0.6, 0.3, 0.0, 0.0, False, False),
        ("kl", 0.6, 0.3, 1.0, 0.0, False, True),
        ("kl", 0.6, 0.3, -1.0, 2.0, False, False),
        ("kl", 0.3, 0.6, -1.0, 0.0, True, False),
        ("kl", 0.4, 0.3, 1.0, -4 / 3, False, False),  # a divergence of 0.0216
        ("kl", 1.0, 0.5, 1.0, 0.0, False, True),  # an infinite one
        ("kl", 1.0, 1.0, 1.0, -1.0, False, False),
        ("kl", 0.5, 1.0, -1.0, 0.0, True, False),
    ],
)
def test_dppo_literals(kind, p, q, advantage, loss, low, high):
    log_p_T, log_q_T = float64(math.log(p)), float64(math.log(q))
    log_ratio_T = (log_p_T - log_q_T).requires_grad_()
    delta = 0.2 if kind == "tv" else 0.05
    given = {"rollout_logprobs_T": log_q_T, "kind": kind, "delta": delta}
    got = dppo(log_p_T, log_ratio_T, float64(advantage), packed_of(1), **given)
    got.loss_T.sum().backward()
    assert got.loss_T.item() == pytest.approx(loss)
    assert log_ratio_T.grad.item() == pytest.approx(loss)  # of -r A by log r
    assert (got.clipped_low_T.item(), got.clipped_high_T.item()) == (low, high)


def test_dppo_with_a_cap_differentiates_the_log_prob():
    log_p_T, log_q_T = float64(math.log(0.02), grad=True), float64(math.log(0.01))
    log_ratio_T = (log_p_T - log_q_T).detach().requires_grad_()
    given = {"rollout_logprobs_T": log_q_T, "ratio_cap": 1.5}
    loss_T = dppo(log_p_T, log_ratio_T, float64(2.0), packed_of(1), **given).loss_T
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(-3.0 * math.log(0.02))
    assert log_p_T.grad.item() == pytest.approx(-3.0) and log_ratio_T.grad is None


def test_dppo_gives_a_dropped_token_no_gradient_even_at_a_ratio_that_overflows():
    log_p_T, log_q_T = float64(-0.1, -0.1, -0.1), float64(-5.0, -5.0, -0.1)
    log_ratio_T = float64(800.0, 0.0, 800.0, grad=True)
    advantages_T = float64(1.0, 1.0, 0.0)
    loss_T = dppo(log_p_T, log_ratio_T, advantages_T, packed_of(3), rollout_logprobs_T=log_q_T)[0]
    loss_T.sum().backward()
    assert loss_T.tolist() == [0, 0, 0] and log_ratio_T.grad.tolist() == [0, 0, 0]


@quick
@given(
    st.lists(
        st.tuples(*(st.floats(-3, -0.01) for _ in range(3)), st.floats(-3, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_surrogates_match_scalar_arithmetic(rows):
    x, old, q, a = torch.tensor(rows, dtype=torch.float64).T
    packed, lr = packed_of(len(rows)), x - old
    got = {name: f(x, lr, a, q, packed).loss_T.tolist() for name, f in SURROGATES.items()}
    for t, (logp, old_logp, log_q, adv) in enumerate(rows):
        r, tau = math.exp(logp - old_logp), 1.0 if adv > 0 else 1.05
        p, q_t = math.exp(logp), math.exp(log_q)
        kl = q_t * math.log(q_t / p) + (1 - q_t) * math.log((1 - q_t) / (1 - p))
        outward = (p - q_t) * adv > 0
        tv_drops, kl_drops = outward and abs(p - q_t) > 0.2, outward and kl > 0.05
        expected = {
            "cispo": -min(r, 2.0) * adv * logp,
            "sapo": -adv * 4 / tau / (1 + math.exp(-tau * (r - 1))),
            "reinforce": -adv * logp,
            "dro": -(adv * logp - 0.15 * (logp - old_logp) ** 2),
            "dppo tv": 0.0 if tv_drops else -adv * r,
            "dppo kl": 0.0 if kl_drops else -adv * r,
            "dppo capped": 0.0 if tv_drops else -adv * min(r, 1.5) * logp,
        }
        for name, value in expected.items():
            assert got[name][t] == pytest.approx(value, abs=1e-12), name


@every_surrogate
def test_gradcheck_of_every_surrogate(name):
    x, lr = float64(-0.5, -1.0, -2.0, grad=True), float64(0.05, -0.1, 0.07, grad=True)
    a, q = float64(1.0, -2.0, 0.5), float64(-0.6, -1.2, -0.4)
    needed = [i for i in (0, 1) if i in INPUTS[name]]
    if name in ("cispo", "dppo capped"):  # their log-ratio is data
        lr, needed = lr.detach(), [0]
    elif name.startswith("dppo"):  # their log-prob is data
        x, needed = x.detach(), [1]
    inputs = tuple((x, lr)[i] for i in needed)

    def loss_of(*given):
        both = dict(zip(needed, given, strict=True))
        return SURROGATES[name](both.get(0, x), both.get(1, lr), a, q, packed_of(3)).loss_T

    assert torch.autograd.gradcheck(loss_of, inputs)


@every_surrogate
def test_masked_garbage_changes_nothing(name):
    step, gradients, losses = random_step(), [], []
    mask_T = step.packed.mask_T
    clean = step._replace(
        **{k: torch.where(mask_T, v, 0) for k, v in step._asdict().items() if k != "packed"}
    )
    for each in (step, clean):
        leaf_T = each.leaf()
        lr = log_ratio(leaf_T, each.old_T, each.packed)
        loss_T = SURROGATES[name](leaf_T, lr, each.advantages_T, each.rollout_T, each.packed).loss_T
        loss_T = torch.where(mask_T, loss_T, 0)  # as aggregate does
        loss_T.sum().backward()
        losses.append(loss_T.detach())
        gradients.append(leaf_T.grad)
    assert torch.equal(*losses) and torch.equal(*gradients)
    assert gradients[0].isfinite().all() and (gradients[0][~mask_T] == 0).all()


@pytest.mark.parametrize("name", [name for name in SURROGATES if name not in ("ppo_clip", "sapo")])
def test_what_takes_packed_is_clean_at_masked_positions_by_itself(name):
    step = random_step()
    mask_T, inputs = step.packed.mask_T, (step.logprobs_T, step.old_T, step.advantages_T)
    x, lr, a = (values_T.clone().requires_grad_() for values_T in inputs)
    got = SURROGATES[name](x, lr, a, step.rollout_T, step.packed)
    got.loss_T.backward(torch.full_like(got.loss_T, torch.nan).where(~mask_T, 1.0))
    assert (got.loss_T[~mask_T] == 0).all() and got.loss_T.isfinite().all()
    assert not (got.clipped_low_T | got.clipped_high_T)[~mask_T].any()
    for leaf_T in (x, lr):
        assert leaf_T.grad is None or leaf_T.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "which"), [(name, which) for name, inputs in INPUTS.items() for which in inputs]
)
def test_a_trainable_nan_reaches_the_loss(name, which):
    for advantage in (1.0, 0.0, -1.0):
        inputs = [float64(-0.1), float64(0.0), float64(advantage), float64(-3.0)]
        inputs[which] = float64(torch.nan)
        assert SURROGATES[name](*inputs, packed_of(1)).loss_T.isnan().all()


@every_surrogate
def test_advantages_of_every_surrogate_get_no_gradient_and_dtype_is_kept(name):
    x, lr, q = torch.full((2,), -1.0), torch.zeros(2), torch.full((2,), -1.0)
    a = torch.ones(2, requires_grad=True)
    got = SURROGATES[name](x.requires_grad_(), lr.requires_grad_(), a, q, packed_of(2))
    got.loss_T.sum().backward()
    assert a.grad is None and got.loss_T.dtype == torch.float32
    assert got.clipped_low_T.dtype == got.clipped_high_T.dtype == torch.bool


@every_surrogate
def test_inputs_of_different_length_are_refused(name):
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ShapeError, match=r"shape \(3,\).* expected|expected \[T\] for both"):
        SURROGATES[name](two, two, three, two, packed_of(2))


def test_bad_settings_of_the_other_surrogates():
    one, packed = torch.zeros(1), packed_of(1)
    for bounds in ({"ratio_max": 0.28}, {"ratio_min": 1.2, "ratio_max": 5.0}):
        with pytest.raises(SettingError, match=r"ratio_max .*; expected absolute ratios"):
            cispo(one, one, one, packed, **bounds)
    with pytest.raises(SettingError, match=r"tau_neg 0\.0; expected numbers above 0"):
        sapo(one, one, tau_neg=0.0)
    with pytest.raises(SettingError, match=r"beta is -1\.0; expected 0 or more"):
        dro(one, one, one, packed, beta=-1.0)
    for wrong, text in (
        ({"kind": "js"}, "kind is 'js'; expected tv or kl"),
        ({"delta": 0.0}, r"delta is 0\.0; expected a number above 0"),
        ({"ratio_cap": 0.2}, r"ratio_cap is 0\.2; expected 1 or more"),
    ):
        with pytest.raises(SettingError, match=text):
            dppo(one, one, one, packed, rollout_logprobs_T=one, **wrong)
