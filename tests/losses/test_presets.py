import math
from dataclasses import replace

import pytest
import torch

from miles import Packed, count
from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses import (
    Reject,
    importance_weights,
    kl_penalty,
    reduce_metrics,
    token_logprobs,
    truncated_is,
)
from miles.losses.presets import dapo, dr_grpo, grpo, ppo, reinforce_plus_plus_baseline, vapo
from tests.steps import random_step


def grpo_by_hand(step, correction=None, kl_coef=0.0):
    """Equation 3 of the paper with scalar loops: value only."""
    per_sequence = []
    for seq in range(step.packed.num_seqs):
        member_T = step.packed.mask_T & (step.packed.seq_ids_T == seq)
        terms = []
        for t in member_T.nonzero().flatten().tolist():
            ratio = math.exp(step.logprobs_T[t] - step.old_T[t])
            a = step.advantages_T[t].item()
            term = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            if correction is not None:
                term *= correction.weights_T[t].item()
            d = (step.logprobs_T[t] - step.ref_T[t]).item()
            terms.append(-term + kl_coef * (math.exp(-d) - 1 + d))
        if terms:
            per_sequence.append(sum(terms) / len(terms))
    return sum(per_sequence) / len(per_sequence)


def test_grpo_literal():
    packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
    old_T = torch.zeros(4, dtype=torch.float64)
    ratios = torch.tensor([1.5, 1.0, 0.5, 9.0], dtype=torch.float64)
    logprobs_T = ratios.log().requires_grad_()
    advantages_T = packed.per_token(torch.tensor([1.0, -1.0], dtype=torch.float64))
    loss, metrics = grpo(logprobs_T, old_T, advantages_T, packed, count(packed))
    loss.backward()
    assert loss.item() == pytest.approx(((-1.2 - 1.0) / 2 + 0.8) / 2)
    assert logprobs_T.grad.tolist() == pytest.approx([0.0, -0.25, 0.0, 0.0])
    readings = {key: value.item() for key, value in reduce_metrics(metrics).items()}
    assert readings == pytest.approx(
        {"ratio/mean": 1.0, "ratio/max": 1.5, "clip/low": 1 / 3, "clip/high": 1 / 3}
    )


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_matches_the_equation(kl_coef, corrected):
    step = random_step()
    correction = truncated_is(step.old_T, step.rollout_T, step.packed) if corrected else None
    ref = {"ref_logprobs_T": step.ref_T, "kl_coef": kl_coef} if kl_coef else {}
    inputs = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    loss, _ = grpo(*inputs, correction=correction, **ref)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(grpo_by_hand(step, correction, kl_coef), rel=1e-12)


def test_grpo_passes_gradcheck():
    step = random_step(3)
    mask_T = step.packed.mask_T
    logprobs_T = torch.where(mask_T, step.logprobs_T, 0).requires_grad_()
    correction = truncated_is(step.old_T, step.rollout_T, step.packed)
    settings = {"correction": correction, "ref_logprobs_T": step.ref_T, "kl_coef": 0.1}
    rest = (step.old_T, step.advantages_T, step.packed, count(step.packed))
    assert torch.autograd.gradcheck(lambda x: grpo(x, *rest, **settings)[0], logprobs_T)


def test_grpo_is_untouched_by_masked_garbage():
    step = random_step()
    mask_T = step.packed.mask_T
    clean = step._replace(
        **{
            name: torch.where(mask_T, getattr(step, name), 0)
            for name in ("logprobs_T", "old_T", "rollout_T", "ref_T", "advantages_T")
        }
    )
    results = []
    for each in (step, clean):
        leaf_T = each.leaf()
        loss, metrics = grpo(
            leaf_T,
            each.old_T,
            each.advantages_T,
            each.packed,
            count(each.packed),
            correction=truncated_is(each.old_T, each.rollout_T, each.packed),
            ref_logprobs_T=each.ref_T,
            kl_coef=0.1,
        )
        loss.backward()
        results.append((loss.detach(), leaf_T.grad, reduce_metrics(metrics)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0][1][~mask_T] == 0).all() and results[0][1].isfinite().all()


@pytest.mark.parametrize("which", ["logprobs_T", "old_T", "advantages_T"])
def test_grpo_does_not_hide_a_trainable_nan(which):
    step = random_step()
    getattr(step, which)[0] = torch.nan
    inputs = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    assert grpo(*inputs)[0].isnan()


def test_grpo_leaves_a_rejected_token_out_even_where_its_loss_is_infinite():
    step = random_step()
    step.old_T[0], step.advantages_T[0] = -torch.inf, -1.0
    rule = Reject(level="token", statistic="ratio", low=1e-6)
    inputs = (step.old_T, step.rollout_T, step.packed)
    correction = importance_weights(*inputs, weight=None, reject=[rule])
    assert not correction.keep_T[0] and correction.keep_T.any()
    inputs = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    assert grpo(*inputs)[0] == torch.inf
    assert grpo(*inputs, correction=correction)[0].isfinite()


def test_grpo_reports_the_kl_it_adds():
    step = random_step()
    inputs = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    _, metrics = grpo(*inputs, ref_logprobs_T=step.ref_T, kl_coef=0.1)
    kl_T = kl_penalty(step.logprobs_T, step.ref_T, step.packed)[step.packed.mask_T]
    torch.testing.assert_close(metrics["kl/ref"].value(), kl_T.mean())


def test_averaged_over_scales_the_whole_loss_with_its_kl():
    step = random_step()
    inputs = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    settings = {"ref_logprobs_T": step.ref_T, "kl_coef": 0.1}
    one, four = (grpo(*inputs, averaged_over=n, **settings)[0] for n in (1, 4))
    torch.testing.assert_close(four, 4 * one)


def test_grpo_teaches_a_bandit_the_rewarded_arm():
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    packed = Packed.from_padded(torch.ones(3, 1).bool())
    advantages_T = torch.tensor([-0.5, 1.0, -0.5], dtype=torch.float64)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(30):
        logprobs_T = token_logprobs(logits.expand(3, 3), targets)
        loss, _ = grpo(logprobs_T, logprobs_T.detach(), advantages_T, packed, count(packed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(-1)[0, 1] > 0.9


def test_bad_input():
    step = random_step()
    inputs = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    with pytest.raises(SettingError, match=r"kl_coef=0.1 and no ref_logprobs_T; expected both"):
        grpo(*inputs, kl_coef=0.1)
    with pytest.raises(ShapeError, match="advantages_T has shape"):
        grpo(*inputs[:2], torch.zeros(step.packed.num_seqs), *inputs[3:])


def test_dr_grpo_does_not_divide_by_the_padded_width():
    """verl's fallback did: 0.60 at width 8, 0.30 at width 16, for the same tokens."""
    losses = []
    for width in (8, 16):
        mask = torch.zeros(2, width, dtype=torch.bool)
        mask[:, :6] = True
        packed = Packed.from_padded(mask)
        new_T, advantages_T = torch.zeros(2 * width), torch.ones(2 * width)
        loss, _ = dr_grpo(new_T, new_T, advantages_T, packed, count(packed), max_tokens=8)
        losses.append(loss.item())
    assert losses == [pytest.approx(-0.75)] * 2


def test_a_preset_refuses_half_of_a_pair():
    packed = Packed.from_padded(torch.ones(1, 2, dtype=torch.bool))
    x, denominators = torch.zeros(2), count(packed)
    with pytest.raises(SettingError, match="got 1 of values_T"):
        ppo(x, x, x, packed, denominators, values_T=x)
    with pytest.raises(SettingError, match="expected both, or kl_coef"):
        reinforce_plus_plus_baseline(x, x, x, packed, denominators, kl_coef=0.1)


@pytest.mark.parametrize("preset", [grpo, reinforce_plus_plus_baseline])
def test_a_reference_at_coefficient_0_is_read_and_not_trained_on(preset):
    step = random_step()
    inputs = (step.leaf(), step.old_T, step.advantages_T, step.packed, count(step.packed))
    plain, _ = preset(*inputs)
    read, metrics = preset(*inputs, ref_logprobs_T=step.ref_T)
    _, trained = preset(*inputs, ref_logprobs_T=step.ref_T, kl_coef=0.1)
    assert read == plain and metrics["kl/ref"].value() == trained["kl/ref"].value()


def test_vapo_without_a_right_answer_is_dapo():
    step = random_step()
    nobody = torch.zeros(step.packed.num_seqs, dtype=torch.bool)
    args = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    loss, _ = vapo(*args, right_S=nobody, right_denominators=None)
    assert loss == dapo(*args)[0]


def test_presets_take_denominators_without_the_rejected():
    step = random_step()
    reject = [Reject(level="token", statistic="ratio", low=0.5)]
    correction = importance_weights(
        step.old_T, step.rollout_T, step.packed, weight=None, reject=reject
    )
    kept = count(step.packed, keep_T=correction.keep_T)
    args = (step.logprobs_T, step.old_T, step.advantages_T)
    fewer = replace(step.packed, mask_T=correction.keep_T)
    for preset in (dapo, grpo, ppo, reinforce_plus_plus_baseline):
        loss, _ = preset(*args, step.packed, kept, correction=correction, count_rejected=False)
        expected, _ = preset(*args, fewer, count(fewer))
        torch.testing.assert_close(loss, expected)


def test_vapo_with_right_answers_needs_their_count():
    step = random_step()
    everybody = torch.ones(step.packed.num_seqs, dtype=torch.bool)
    args = (step.logprobs_T, step.old_T, step.advantages_T, step.packed, count(step.packed))
    with pytest.raises(SettingError, match="NLL would be left out"):
        vapo(*args, right_S=everybody, right_denominators=None)
    with pytest.raises(DtypeError, match="right_S"):
        vapo(*args, right_S=everybody.float(), right_denominators=None)
