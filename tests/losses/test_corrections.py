import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, unpack
from miles.errors import (
    DtypeError,
    MissingLogprobError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from miles.losses.corrections import (
    MaxStaleness,
    OffPolicyNegative,
    Reject,
    Weight,
    importance_weights,
    interpolate_proximal,
    truncated_is,
    veto,
)
from miles.losses.metrics import reduce_metrics
from tests.corrections import ALL_RULES, TRUNCATE, of_ratios, proximal, readings, versions_of
from tests.steps import poison, quick, random_step, select

LEVELS = ["token", "sequence_mean", "sequence_sum", "sequence_max", "sequence_min"]


STATISTICS = ["ratio", "k1", "k2", "k3"]


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
    assert readings(got) == pytest.approx(
        {
            "correction/weight_mean": 5 / 3,
            "correction/weight_max": 2.0,
            "correction/capped": 2 / 3,
            "correction/ess": 5**2 / (3 * 9),
            "correction/kept": 3 / 4,
            "correction/kept/token_ratio": 3 / 4,
        }
    )


def test_advantages_add_the_effective_sample_size_of_what_the_gradient_is_made_of():
    advantages_T = torch.tensor([-1.0, 3.0])
    got = readings(of_ratios([1.0, 1.0], weight=None, advantages_T=advantages_T))
    assert got["correction/ess"] == 1.0
    assert got["correction/ess_advantage"] == pytest.approx(4**2 / (2 * 10))


def test_each_rule_reports_what_it_keeps_on_its_own():
    got = readings(
        of_ratios(
            [0.1, 1.0, 4.0, 16.0],
            weight=Weight(level="token", mode="mask", low=0.5, high=20.0),
            reject=[
                Reject(level="token", statistic="ratio", high=10.0),
                Reject(level="token", statistic="ratio", high=2.0),
                OffPolicyNegative(),
                MaxStaleness(0),
            ],
            advantages_T=torch.full((4,), -1.0),
            versions_T=torch.tensor([1, 2, 1, 2]),
            current_version=2,
        )
    )
    kept = {key.removeprefix("correction/"): x for key, x in got.items() if "/kept" in key}
    assert kept == {
        "kept": 0.25,
        "kept/max_staleness": 0.5,
        "kept/off_policy_negative": 0.75,
        "kept/token_ratio": 0.75,
        "kept/token_ratio_2": 0.5,
        "kept/weight": 0.75,
    }


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
        ("delta is -1; expected", lambda: OffPolicyNegative(delta=-1)),
        ("delta is nan; expected", lambda: OffPolicyNegative(delta=math.nan)),
        ("limit is -1; expected", lambda: MaxStaleness(-1)),
        ("threshold is 1e-10; expected a ratio below 1 and above 2.1e-09", lambda: veto(1e-10)),
        ("threshold is 1; expected", lambda: veto(1)),
        ("reject is Reject.*; expected a list", lambda: of_ratios([1], weight=None, reject=veto())),
        ("reject is .*; expected a list", lambda: of_ratios([1], weight=None, reject=[TRUNCATE])),
        (
            "OffPolicyNegative needs advantages_T; got None",
            lambda: of_ratios([1], weight=None, reject=[OffPolicyNegative()]),
        ),
        (
            "MaxStaleness needs versions_T and current_version; got no versions_T and no current",
            lambda: of_ratios([1], weight=None, reject=[MaxStaleness(1)]),
        ),
        (
            "got no versions_T$",
            lambda: of_ratios([1], weight=None, reject=[MaxStaleness(1)], current_version=1),
        ),
        (
            "versions_T and current_version without MaxStaleness in reject have no effect",
            lambda: of_ratios([1], weight=None, versions_T=torch.tensor([0]), current_version=0),
        ),
        (
            "^current_version without MaxStaleness",
            lambda: of_ratios([1], weight=None, current_version=0),
        ),
        (
            "proximal_version is 3; expected current_version",
            lambda: proximal([0.0], [0.0], [0], proximal_version=3, current_version=2),
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(match, call):
    with pytest.raises(SettingError, match=match):
        call()


@pytest.mark.parametrize("version", [-1, 6])
def test_a_version_that_is_unknown_or_of_the_future_is_refused_where_it_is_trained_on(version):
    packed = Packed.from_padded(torch.tensor([[True, False], [True, True]]))
    versions_T = torch.tensor([5, -1, 5, version])
    match = rf"1 trainable .* position 3 \(sequence 1\) with {version}; expected 0 to 5"
    settings = {"versions_T": versions_T, "current_version": 5}
    inputs = (torch.zeros(4), torch.ones(4), packed)
    with pytest.raises(SettingError, match=match):
        importance_weights(*inputs, weight=None, reject=[MaxStaleness(9)], **settings)
    with pytest.raises(SettingError, match=match):
        interpolate_proximal(*inputs, proximal_version=4, **settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_advantage_that_is_no_number_is_refused_where_it_is_trained_on(bad):
    packed = Packed.from_padded(torch.tensor([[True, False], [True, True]]))
    advantages_T = torch.tensor([1.0, math.nan, 1.0, bad])
    with pytest.raises(NonFiniteError, match=rf"{bad} at position 3 \(sequence 1\), 1 such"):
        importance_weights(
            torch.zeros(4), torch.ones(4), packed, weight=None, advantages_T=advantages_T
        )


def test_bad_shape_and_dtype():
    step = random_step()
    with pytest.raises(ShapeError, match=r"rollout_logprobs_T has shape \(2,\); expected"):
        truncated_is(step.old_T, step.rollout_T[:2], step.packed)
    settings = {"weight": None, "reject": [MaxStaleness(1)], "current_version": 1}
    inputs = (step.old_T, step.rollout_T, step.packed)
    with pytest.raises(ShapeError, match=r"versions_T has shape \(1,\); expected"):
        importance_weights(*inputs, **settings, versions_T=torch.zeros(1).long())
    with pytest.raises(DtypeError, match=r"versions_T is torch\.float64; expected torch\.int64"):
        importance_weights(*inputs, **settings, versions_T=torch.zeros_like(step.old_T))
    with pytest.raises(ShapeError, match=r"advantages_T has shape \(8,\); expected"):
        importance_weights(*inputs, weight=None, advantages_T=torch.zeros(8))
    with pytest.raises(ShapeError, match=r"current_logprobs_T has shape \(1,\); expected"):
        proximal([0.0, 0.0], [0.0], [0, 0])


def corrected(step, versions_T, packed=None, index_T=None, **settings):
    """With every kind of rule; of the tokens at `index_T`, as `packed` lays them out."""
    names = {"advantages_T": step.advantages_T, "versions_T": versions_T}
    inputs = [step.old_T, step.rollout_T, *names.values()]
    if index_T is not None:
        inputs = [x[index_T] for x in inputs]
    return importance_weights(
        *inputs[:2],
        step.packed if packed is None else packed,
        reject=ALL_RULES,
        current_version=5,
        **dict(zip(names, inputs[2:], strict=True)),
        **settings,
    )


@quick
@given(
    st.integers(0, 10_000),
    st.permutations(range(8)),
    st.sets(st.integers(1, 7)),
    st.sampled_from(["token", "sequence_sum", "sequence_mean"]),
)
def test_nothing_depends_on_how_a_step_is_permuted_split_or_padded(seed, order, cuts, level):
    step = random_step(seed)
    versions_T = versions_of(step, seed)
    weight = Weight(level=level, mode="clip", low=0.5, high=1.5)
    close = {"rtol": 1e-12, "atol": 1e-14, "equal_nan": True}

    whole = corrected(step, versions_T, weight=weight, normalize="mean")
    packed, index_T = select(step.packed, list(order))
    moved = corrected(step, versions_T, packed, index_T, weight=weight, normalize="mean")
    torch.testing.assert_close(moved.weights_T, whole.weights_T[index_T], **close)
    assert torch.equal(moved.keep_T, whole.keep_T[index_T])
    torch.testing.assert_close(
        reduce_metrics(moved.metrics), reduce_metrics(whole.metrics), **close
    )

    def rows(x_T, fill):
        return unpack(x_T, step.packed, fill=fill).flatten()

    mask_SL = unpack(step.packed.mask_T.long(), step.packed).bool()
    padded = importance_weights(
        rows(step.old_T, math.nan),
        rows(step.rollout_T, math.inf),
        Packed.from_padded(mask_SL),
        weight=weight,
        reject=ALL_RULES,
        normalize="mean",
        advantages_T=rows(step.advantages_T, math.nan),
        versions_T=rows(versions_T, -1),
        current_version=5,
    )
    torch.testing.assert_close(padded.weights_T, rows(whole.weights_T, 0), **close)
    assert torch.equal(padded.keep_T, rows(whole.keep_T.long(), 0).bool())
    torch.testing.assert_close(
        reduce_metrics(padded.metrics), reduce_metrics(whole.metrics), **close
    )

    whole, parts = corrected(step, versions_T, weight=weight), []
    for low, high in pairwise([0, *sorted(cuts), 8]):
        packed, index_T = select(step.packed, list(order[low:high]))
        parts.append(corrected(step, versions_T, packed, index_T, weight=weight))
        assert torch.equal(parts[-1].weights_T, whole.weights_T[index_T])
        assert torch.equal(parts[-1].keep_T, whole.keep_T[index_T])
    torch.testing.assert_close(
        reduce_metrics([part.metrics for part in parts]), reduce_metrics(whole.metrics), **close
    )


def test_every_rule_of_the_test_above_keeps_some_and_rejects_some():
    steps = [random_step(seed) for seed in range(5)]
    parts = [corrected(step, versions_of(step, 0), weight=TRUNCATE).metrics for step in steps]
    shares = {key: x.item() for key, x in reduce_metrics(parts).items() if "/kept" in key}
    assert len(shares) == 1 + len(ALL_RULES) and all(0 < x < 1 for x in shares.values()), shares
