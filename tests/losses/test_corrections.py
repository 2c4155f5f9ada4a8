import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import MissingLogprobError, SettingError, ShapeError
from miles.losses import (
    Correction,
    Reject,
    Weight,
    importance_weights,
    reduce_metrics,
    truncated_is,
)
from tests.steps import poison, quick, random_step

LEVELS = ["token", "sequence_mean", "sequence_sum", "sequence_max", "sequence_min"]
STATISTICS = ["ratio", "k1", "k2", "k3"]
TRUNCATE = Weight(level="token", mode="truncate", high=2.0)


def of_ratios(ratios, *, width=None, **settings) -> Correction:
    """Every token trainable; `width` tokens a sequence."""
    x_T = torch.tensor(ratios, dtype=torch.float64).log()
    packed = Packed.from_padded(torch.ones(len(ratios) // (width or 1), width or 1).bool())
    return importance_weights(x_T - 1, torch.full_like(x_T, -1.0), packed, **settings)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (TRUNCATE, [0.25, 1.0, 2.0, 2.0]),
        (Weight(level="token", mode="clip", low=0.5, high=2.0), [0.5, 1.0, 2.0, 2.0]),
        (Weight(level="token", mode="mask", low=0.5, high=4.0), [0.0, 1.0, 4.0, 0.0]),
        (Weight(level="sequence_sum", mode="truncate", high=20.0), [0.25, 0.25, 20.0, 20.0]),
        (Weight(level="sequence_mean", mode="truncate", high=5.0), [0.5, 0.5, 5.0, 5.0]),
        (Weight(level="sequence_mean", mode="mask", low=0.4, high=5.0), [0.5, 0.5, 0.0, 0.0]),
        (None, [1.0] * 4),
    ],
)
def test_weights_of_literals(weight, expected):
    got = of_ratios([0.25, 1.0, 4.0, 16.0], width=2, weight=weight)
    assert got.weights_T.tolist() == pytest.approx(expected)
    assert got.keep_T.tolist() == [w != 0 for w in expected]


def test_log_ratios_are_clamped_to_20_before_the_exponential():
    got = of_ratios([1e30, 1e-30], weight=Weight(level="token", mode="truncate", high=1e12))
    assert got.weights_T.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_truncated_is_is_the_token_ratio_up_to_high():
    step = random_step()
    got = truncated_is(step.old_T, step.rollout_T, step.packed, high=1.5)
    rho_T = (step.old_T - step.rollout_T).exp().clamp(max=1.5)
    assert torch.equal(got.weights_T, torch.where(step.packed.mask_T, rho_T, 0))
    assert torch.equal(got.keep_T, step.packed.mask_T)


def naive_statistic(x, level, statistic):
    """Per trainable token of one sequence, with scalar arithmetic."""

    def exp(value):
        return math.exp(min(max(value, -20.0), 20.0))

    def of(value):
        if statistic == "ratio":
            return exp(value)
        return {"k1": -value, "k2": value**2 / 2, "k3": exp(value) - 1 - value}[statistic]

    values = [of(value) for value in x]
    if level == "token":
        return values
    if statistic == "ratio" and level in ("sequence_mean", "sequence_sum"):
        total = sum(x) / len(x) if level == "sequence_mean" else sum(x)
        return [exp(total)] * len(x)
    reduce = {"sequence_sum": sum, "sequence_max": max, "sequence_min": min}
    reduce["sequence_mean"] = lambda v: sum(v) / len(v)
    return [reduce[level](values)] * len(x)


def naive_keep(step, rules):
    x_T, keep = step.old_T - step.rollout_T, [False] * step.packed.num_positions
    for seq in range(step.packed.num_seqs):
        member_T = step.packed.mask_T & (step.packed.seq_ids_T == seq)
        tokens = member_T.nonzero().flatten().tolist()
        for token in tokens:
            keep[token] = True
        for rule in rules if tokens else ():
            values = naive_statistic(x_T[tokens].tolist(), rule.level, rule.statistic)
            for token, value in zip(tokens, values, strict=True):
                low_ok = rule.low is None or value >= rule.low
                high_ok = rule.high is None or value <= rule.high
                keep[token] &= low_ok and high_ok
    return keep


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_reject_matches_a_loop_over_sequences(level, statistic):
    both_outcomes = set()
    for seed in range(6):
        step = random_step(seed)
        for bounds in ({"low": 0.1}, {"high": 0.4}, {"low": 0.05, "high": 1.2}):
            rule = Reject(level=level, statistic=statistic, **bounds)
            got = importance_weights(
                step.old_T, step.rollout_T, step.packed, weight=TRUNCATE, reject=[rule]
            )
            assert got.keep_T.tolist() == naive_keep(step, [rule]), (seed, bounds)
            assert (got.weights_T[~got.keep_T] == 0).all()
            both_outcomes |= set(got.keep_T[step.packed.mask_T].tolist())
    assert both_outcomes == {True, False}


@quick
@given(st.integers(0, 10_000))
def test_a_token_stays_when_every_rule_keeps_it_and_its_weight_does_not_change(seed):
    step = random_step(seed)
    inputs = (step.old_T, step.rollout_T, step.packed)
    rules = [
        Reject(level="token", statistic="ratio", low=0.3, high=3.0),
        Reject(level="sequence_max", statistic="k2", high=0.8),
    ]
    got = importance_weights(*inputs, weight=TRUNCATE, reject=rules)
    plain = importance_weights(*inputs, weight=TRUNCATE)
    assert got.keep_T.tolist() == naive_keep(step, rules)
    assert torch.equal(got.weights_T, torch.where(got.keep_T, plain.weights_T, 0))
    ones = importance_weights(*inputs, weight=None, reject=rules)
    assert torch.equal(ones.weights_T, got.keep_T.double())


def test_bounds_are_inclusive():
    rule = Reject(level="token", statistic="ratio", low=1.0, high=1.0)
    assert of_ratios([1.0, 1.01, 0.99], weight=None, reject=[rule]).keep_T.tolist() == [
        True,
        False,
        False,
    ]


def test_normalized_token_weights_have_mean_one_over_kept_tokens():
    rule = Reject(level="token", statistic="ratio", high=50.0)
    weight = Weight(level="token", mode="truncate", high=10.0)
    got = of_ratios([0.5, 1.0, 4.5, 99.0], weight=weight, reject=[rule], normalize="mean")
    assert got.weights_T.tolist() == pytest.approx([0.25, 0.5, 2.25, 0.0])


def test_normalized_weights_are_capped_again():
    weight = Weight(level="token", mode="truncate", high=1.5)
    got = of_ratios([0.1, 0.1, 0.1, 1.5], weight=weight, normalize="mean")
    assert got.weights_T.tolist() == pytest.approx([0.1 / 0.45] * 3 + [1.5])


def test_normalized_sequence_weights_count_each_kept_sequence_once():
    cu_S1, x_T = torch.tensor([0, 1, 4]), torch.tensor([3.0, 1.0, 1.0, 1.0]).double().log()
    packed = Packed.from_cu_seqlens(cu_S1, torch.ones(4).bool())
    weight = Weight(level="sequence_mean", mode="truncate", high=10.0)
    settings = {"weight": weight, "normalize": "mean"}
    got = importance_weights(x_T, torch.zeros_like(x_T), packed, **settings)
    assert got.weights_T.tolist() == pytest.approx([1.5, 0.5, 0.5, 0.5])
    rule = Reject(level="sequence_max", statistic="ratio", high=2.0)
    got = importance_weights(x_T, torch.zeros_like(x_T), packed, reject=[rule], **settings)
    assert got.weights_T.tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0])


def test_normalizing_when_everything_is_rejected_gives_zeros():
    rule = Reject(level="token", statistic="ratio", high=0.1)
    got = of_ratios([1.0, 2.0], weight=TRUNCATE, reject=[rule], normalize="mean")
    assert got.weights_T.tolist() == [0.0, 0.0] and not got.keep_T.any()


@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean"])
def test_masked_garbage_changes_nothing(level):
    step = random_step()
    mask_T = step.packed.mask_T
    settings = {
        "weight": Weight(level=level, mode="clip", low=0.5, high=2.0),
        "reject": [Reject(level="sequence_min", statistic="ratio", low=0.1)],
        "normalize": "mean",
    }
    got = importance_weights(step.old_T, step.rollout_T, step.packed, **settings)
    clean = [torch.where(mask_T, x, 0) for x in (step.old_T, step.rollout_T)]
    expected = importance_weights(*clean, step.packed, **settings)
    assert torch.equal(got.weights_T, expected.weights_T) and got.weights_T.isfinite().all()
    assert torch.equal(got.keep_T, expected.keep_T)
    assert (got.weights_T[~mask_T] == 0).all() and not got.keep_T[~mask_T].any()


def test_nothing_in_a_correction_carries_gradient():
    step = random_step()
    got = truncated_is(step.leaf(), step.rollout_T, step.packed)
    assert not got.weights_T.requires_grad
    assert not any(m.value().requires_grad for m in got.metrics.values())


@pytest.mark.parametrize("which", ["old_logprobs_T", "rollout_logprobs_T"])
def test_a_missing_logprob_names_position_sequence_and_source(which):
    packed = Packed.from_padded(torch.tensor([[True, False], [True, True]]))
    inputs = {
        "old_logprobs_T": poison(torch.zeros(4), packed.mask_T),
        "rollout_logprobs_T": poison(torch.zeros(4), packed.mask_T),
    }
    inputs[which][3] = torch.nan
    with pytest.raises(
        MissingLogprobError, match=rf"position 3 \(sequence 1\), in {which}; expected"
    ):
        importance_weights(*inputs.values(), packed, weight=TRUNCATE)


def test_split_gives_each_micro_batch_its_part():
    step = random_step()
    whole = truncated_is(step.old_T, step.rollout_T, step.packed)
    lengths = [3, 0, step.packed.num_positions - 3]
    parts = whole.split(lengths)
    assert [len(part.keep_T) for part in parts] == lengths
    assert torch.equal(torch.cat([part.weights_T for part in parts]), whole.weights_T)
    assert torch.equal(torch.cat([part.keep_T for part in parts]), whole.keep_T)
    assert all(part.metrics == {} for part in parts)  # they are the whole step's
    with pytest.raises(ShapeError, match="lengths sum to 3; expected"):
        whole.split([3])


def test_metrics_of_literals():
    rule = Reject(level="token", statistic="ratio", low=0.3)
    got = of_ratios([0.25, 1.0, 4.0, 16.0], weight=TRUNCATE, reject=[rule])
    readings = {key: value.item() for key, value in reduce_metrics(got.metrics).items()}
    assert readings == pytest.approx(
        {
            "correction/weight_mean": 5 / 3,
            "correction/weight_max": 2.0,
            "correction/capped": 2 / 3,
            "correction/kept": 3 / 4,
        }
    )


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("level is 'seq'; expected token", lambda: Weight(level="seq", mode="truncate", high=2.0)),
        ("mode is 'cap'; expected truncate", lambda: Weight(level="token", mode="cap", high=2.0)),
        ("high=None; expected high alone", lambda: Weight(level="token", mode="truncate")),
        ("expected high alone", lambda: Weight(level="token", mode="truncate", low=0.5, high=2.0)),
        ('both for "clip"', lambda: Weight(level="token", mode="clip", high=2.0)),
        ("expected 0 <= low", lambda: Weight(level="token", mode="mask", low=3.0, high=2.0)),
        ("level is 'x'; expected one of", lambda: Reject(level="x", statistic="k1", low=0.0)),
        ("statistic is 'k4'; expected", lambda: Reject(level="token", statistic="k4", low=0.0)),
        ("neither low nor high", lambda: Reject(level="token", statistic="k1")),
        ("normalize is 'sum'; expected", lambda: of_ratios([1], weight=TRUNCATE, normalize="sum")),
        ("no effect without a weight", lambda: of_ratios([1], weight=None, normalize="mean")),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(match, call):
    with pytest.raises(SettingError, match=match):
        call()


def test_bad_shape():
    step = random_step()
    with pytest.raises(ShapeError, match=r"rollout_logprobs_T has shape \(2,\); expected"):
        truncated_is(step.old_T, step.rollout_T[:2], step.packed)
