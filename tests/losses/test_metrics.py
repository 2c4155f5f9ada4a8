import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, unpack
from miles.errors import DtypeError, EmptyBatchError, SettingError, ShapeError
from miles.losses.metrics import (
    ArgMax,
    Ess,
    LogMeanExp,
    Max,
    Mean,
    argmax_over,
    ess_over,
    exp_mean_over,
    log_mean_exp_over,
    max_over,
    mean_over,
    mismatch_metrics,
    reduce_metrics,
)
from tests.steps import quick, random_step, select


def test_mean_and_max_of_literals_skip_masked_garbage():
    values_T = torch.tensor([1.0, torch.nan, 4.0, torch.inf], requires_grad=True)
    mask_T = torch.tensor([True, False, True, False])
    assert float(mean_over(values_T, mask_T)) == 2.5
    assert float(max_over(values_T, mask_T)) == 4.0
    assert not mean_over(values_T, mask_T).value().requires_grad


def test_means_of_flags_are_fractions():
    assert float(mean_over(torch.tensor([True, False]), torch.tensor([True, True]))) == 0.5


def test_reduce_weighs_tokens_and_not_micro_batches():
    ones_T = torch.ones(3).bool()
    parts = [
        {"a": mean_over(torch.ones(1), ones_T[:1]), "b": max_over(torch.ones(1), ones_T[:1])},
        {"a": mean_over(torch.full((3,), 5.0), ones_T), "b": max_over(-torch.ones(3), ones_T)},
    ]
    got = reduce_metrics(parts)
    assert {key: value.item() for key, value in got.items()} == {"a": 4.0, "b": 1.0}
    assert got["a"].dtype == torch.float64


def test_reduce_takes_one_dict_as_well():
    metrics = {"m": Max(torch.tensor(3.0)), "x": Mean(torch.tensor(3.0), torch.tensor(2.0))}
    got = reduce_metrics(metrics)
    assert {key: value.item() for key, value in got.items()} == {"m": 3.0, "x": 1.5}
    assert list(got) == ["m", "x"]


def test_nothing_counted_is_nan_and_minus_infinity():
    nothing_T = torch.zeros(2).bool()
    assert math.isnan(float(mean_over(torch.ones(2), nothing_T)))
    assert float(max_over(torch.ones(2), nothing_T)) == -math.inf
    assert float(max_over(torch.ones(0), nothing_T[:0])) == -math.inf


def test_a_counted_nan_is_not_hidden_by_other_micro_batches():
    ones_T = torch.ones(1).bool()
    parts = [
        {"mean": mean_over(x, ones_T), "max": max_over(x, ones_T)}
        for x in (torch.tensor([torch.nan]), torch.tensor([1.0]))
    ]
    for order in (parts, parts[::-1]):
        assert all(value.isnan() for value in reduce_metrics(order).values())


def place_of(key):
    return {"sequences_T": torch.tensor(key[0]), "positions_T": torch.tensor(key[1])}


def test_argmax_of_literals_finds_the_first_of_the_largest():
    values_T, ones_T = torch.tensor([9.0, 2.0, 5.0, 5.0, 5.0]), torch.ones(5).bool()
    place = place_of(([1, 7, 3, 2, 2], [0, 0, 0, 9, 4]))
    got = argmax_over(values_T, ones_T.index_fill(0, torch.tensor([0]), False), **place)
    reduced = {key: x.item() for key, x in reduce_metrics({"m": got}).items()}
    assert reduced == {"m": 5.0, "m/position": 4.0, "m/sequence": 2.0} and float(got) == 5.0
    parts = [{"m": argmax_over(values_T[t:], ones_T[t:], **place_of(([t], [t])))} for t in (4,)]
    parts += [{"m": argmax_over(values_T[:0], ones_T[:0], **place_of(([], [])))}]
    for order in (parts, parts[::-1]):
        reduced = {key: x.item() for key, x in reduce_metrics(order).items()}
        assert reduced == {"m": 5.0, "m/position": 4.0, "m/sequence": 4.0}


def test_argmax_of_nan_names_its_place_and_of_nothing_names_none():
    ones_T, place = torch.ones(2).bool(), place_of(([3, 4], [5, 6]))
    nan = argmax_over(torch.tensor([torch.inf, torch.nan]), ones_T, **place)
    fine = argmax_over(torch.tensor([torch.inf, 1.0]), ones_T, **place)
    for parts in ([{"m": nan}, {"m": fine}], [{"m": fine}, {"m": nan}]):
        got = reduce_metrics(parts)
        assert got["m"].isnan() and got["m/sequence"] == 4.0 and got["m/position"] == 6.0
    lowest = argmax_over(torch.tensor([-torch.inf, 0.0]), ones_T & (ones_T.cumsum(0) < 2), **place)
    assert reduce_metrics({"m": lowest})["m/sequence"] == 3.0
    nothing = reduce_metrics({"m": argmax_over(torch.zeros(2), ~ones_T, **place)})
    assert nothing["m"] == -math.inf
    assert nothing["m/sequence"].isnan() and nothing["m/position"].isnan()


def test_effective_sample_size_of_literals():
    weights_T, mask_T = torch.tensor([1.0, 1.0, 4.0, torch.nan]), torch.tensor([1, 1, 1, 0]).bool()
    assert float(ess_over(weights_T, mask_T)) == pytest.approx(36 / (3 * 18))
    assert float(ess_over(torch.full((4,), 0.3), torch.ones(4).bool())) == pytest.approx(1.0)
    parts = [{"e": ess_over(weights_T[t : t + 1], mask_T[t : t + 1])} for t in range(4)]
    assert reduce_metrics(parts)["e"].item() == pytest.approx(36 / (3 * 18))
    assert math.isnan(float(ess_over(weights_T, mask_T & False)))


def test_exp_of_a_mean_reduces_the_mean_and_not_the_exponentials():
    ones_T = torch.ones(2).bool()
    parts = [
        {"p": exp_mean_over(torch.tensor([1.0, 2.0]), ones_T)},
        {"p": exp_mean_over(torch.tensor([6.0, torch.nan]), torch.tensor([True, False]))},
    ]
    assert reduce_metrics(parts)["p"].item() == pytest.approx(math.exp(3.0))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[0.0, math.log(3.0)]], math.log(2.0)),
        ([[1000.0], [1000.0, 1000.0]], 1000.0),
        ([[-900.0], [-900.0]], -900.0),
        ([[2000.0], [-2000.0]], 2000.0 - math.log(2)),
        ([[], [-900.0]], -900.0),
        ([[-math.inf], [-900.0]], -900.0 - math.log(2)),
        ([[900.0], [-math.inf, -math.inf]], 900.0 - math.log(3)),
        ([[-math.inf], [-math.inf]], -math.inf),
        ([[math.inf], [900.0]], math.inf),
        ([[math.inf, -900.0]], math.inf),
        ([[math.nan], [math.inf], [5.0]], math.nan),
        ([[]], math.nan),
    ],
)
def test_log_mean_exp_neither_overflows_nor_hides_what_is_not_finite(parts, expected):
    def metric(values):
        values_T = torch.tensor([*values, torch.nan], dtype=torch.float64)
        return {"x": log_mean_exp_over(values_T, torch.arange(len(values_T)) < len(values))}

    for order in (parts, parts[::-1]):
        got = reduce_metrics([metric(values) for values in order])["x"].item()
        assert got == pytest.approx(expected, rel=1e-14, nan_ok=True)
        nested = [metric(values)["x"] for values in order]
        rows = torch.stack([torch.stack(part.numbers()) for part in nested])
        merged = torch.stack(LogMeanExp.merge(rows).numbers())
        again = LogMeanExp.merge(torch.stack([merged, merged])).value().item()
        assert again == pytest.approx(expected, rel=1e-14, nan_ok=True)


BUCKETS = {"position_buckets": (1, 3), "current_version": 5, "age_buckets": (1, 4)}


def all_readings(step, versions_T, packed=None, index_T=None, seqs=range(8)):
    """Every reading there is, of the tokens at `index_T`, as `packed` lays them out."""
    inputs = [step.old_T, step.rollout_T, versions_T]
    if index_T is not None:
        inputs = [x[index_T] for x in inputs]
    return mismatch_metrics(
        *inputs[:2],
        step.packed if packed is None else packed,
        versions_T=inputs[2],
        sample_ids_S=torch.tensor(list(seqs)),
        **BUCKETS,
    )


@quick
@given(st.integers(0, 10_000), st.permutations(range(8)), st.sets(st.integers(1, 7)))
def test_no_reading_depends_on_how_a_step_is_permuted_split_or_padded(seed, order, cuts):
    step = random_step(seed)
    versions_T = torch.arange(step.packed.num_positions) * 5 % 8 - 1  # unknown and future ones too
    whole = reduce_metrics(all_readings(step, versions_T))
    parts = []
    for low, high in pairwise([0, *sorted(cuts), 8]):
        seqs = list(order[low:high])
        packed, index_T = select(step.packed, seqs)
        parts.append(all_readings(step, versions_T, packed, index_T, seqs))
    close = {"rtol": 1e-12, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(reduce_metrics(parts), whole, **close)

    def rows(x_T, fill):
        return unpack(x_T, step.packed, fill=fill).flatten()

    padded = mismatch_metrics(
        rows(step.old_T, math.nan),
        rows(step.rollout_T, -math.inf),
        Packed.from_padded(unpack(step.packed.mask_T.long(), step.packed).bool()),
        versions_T=rows(versions_T, -7),
        sample_ids_S=torch.arange(8),
        **BUCKETS,
    )
    torch.testing.assert_close(reduce_metrics(padded), whole, **close)


def test_mismatch_literals():
    packed = Packed.from_padded(torch.tensor([[True, True, False]]))
    train_T, rollout_T = torch.tensor([-1.0, -3.0, torch.nan]), torch.tensor([-1.5, -2.0, 0.0])
    got = {key: float(m) for key, m in mismatch_metrics(train_T, rollout_T, packed).items()}
    k3 = ((math.exp(0.5) - 1.5) + math.exp(-1)) / 2
    assert got == pytest.approx(
        {
            "mismatch/abs": 0.75,
            "mismatch/k1": 0.25,
            "mismatch/k3": k3,
            "mismatch/abs_max": 1.0,
            "mismatch/ratio_max": math.exp(0.5),
            "mismatch/log1p_chi2_token": math.log((math.exp(1.0) + math.exp(-2.0)) / 2),
            "mismatch/log1p_chi2_sequence": -1.0,
            "mismatch/ppl_train": math.exp(2.0),
            "mismatch/ppl_rollout": math.exp(1.75),
            "mismatch/ppl_ratio": math.exp(0.25),
        }
    )


def test_mismatch_of_a_trainable_nan_is_nan():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    got = mismatch_metrics(torch.tensor([0.0, torch.nan]), torch.zeros(2), packed)
    assert all(math.isnan(float(metric)) for metric in got.values())


@pytest.mark.parametrize("side", [0, 1])
def test_mismatch_with_a_nan_on_either_side_is_nan_and_names_its_place(side):
    packed = Packed.from_padded(torch.ones(2, 2).bool())
    both = [torch.full((4,), -1.0), torch.full((4,), -1.5)]
    both[side][3] = torch.nan
    metrics = mismatch_metrics(*both, packed, sample_ids_S=torch.tensor([70, 80]))
    got = reduce_metrics(metrics)
    assert got.pop("mismatch/ratio_max/sequence") == 80
    assert got.pop("mismatch/ratio_max/position") == 1
    assert len(got) == 10 and all(value.isnan() for value in got.values())


def test_mismatch_of_a_token_that_the_trainer_calls_impossible_is_infinite():
    packed = Packed.from_padded(torch.ones(2, 1).bool())
    train_T, rollout_T = torch.tensor([-1.0, -torch.inf]), torch.tensor([-1.0, -2.0])
    got = {
        k: x.item() for k, x in reduce_metrics(mismatch_metrics(train_T, rollout_T, packed)).items()
    }
    for name in ("abs", "k1", "k3", "abs_max", "ppl_train", "ppl_ratio"):
        assert got[f"mismatch/{name}"] == math.inf, name
    assert got["mismatch/ratio_max"] == 1.0  # its own ratio is 0
    assert got["mismatch/log1p_chi2_token"] == pytest.approx(math.log(0.5))
    got = reduce_metrics(mismatch_metrics(rollout_T, train_T, packed))  # and the other way round
    for name in (
        "abs",
        "k3",
        "ratio_max",
        "log1p_chi2_token",
        "log1p_chi2_sequence",
        "ppl_rollout",
    ):
        assert got[f"mismatch/{name}"] == math.inf, name
    assert got["mismatch/k1"] == -math.inf and got["mismatch/ppl_ratio"] == 0.0


def test_chi_square_of_a_long_sequence_does_not_overflow():
    packed = Packed.from_padded(torch.ones(2, 1000).bool())
    train_T = torch.full((2000,), -1.0, dtype=torch.float64)
    rollout_T = torch.where(torch.arange(2000) < 1000, -2.0, -1.0)
    got = reduce_metrics(mismatch_metrics(train_T, rollout_T, packed))
    assert got["mismatch/log1p_chi2_sequence"].item() == pytest.approx(2000 - math.log(2))
    expected = math.log((math.exp(2.0) + 1) / 2)
    assert got["mismatch/log1p_chi2_token"].item() == pytest.approx(expected)


def test_sequences_without_a_trainable_token_are_no_part_of_chi_square():
    packed = Packed.from_padded(torch.tensor([[True, True], [False, False]]))
    train_T, rollout_T = torch.tensor([-1.0, -1.0, 0.0, 0.0]), torch.tensor([-2.0, -2.0, 0.0, 0.0])
    got = reduce_metrics(mismatch_metrics(train_T, rollout_T, packed))
    assert got["mismatch/log1p_chi2_sequence"] == 4.0


def test_gap_by_position_and_by_age_of_literals():
    packed = Packed.from_padded(torch.tensor([[True, True, True, True, False]]))
    got = mismatch_metrics(
        torch.tensor([0.0, 1.0, 2.0, 3.0, torch.nan]),
        torch.zeros(5),
        packed,
        versions_T=torch.tensor([9, 7, 10, -1, -1]),
        current_version=9,
        position_buckets=(2, 3, 9),
        age_buckets=(1, 2),
    )
    buckets = {
        key.removeprefix("mismatch/abs/"): float(m) for key, m in got.items() if "abs/" in key
    }
    expected = {
        "position_0_2": 0.5,
        "position_2_3": 2.0,
        "position_3_9": 3.0,
        "position_9_up": math.nan,
        "age_0_1": 0.0,
        "age_1_2": math.nan,
        "age_2_up": 1.0,
        "age_unknown": 2.5,  # the one of the future and the one without a version
    }
    assert buckets == pytest.approx(expected, nan_ok=True)
    shares = {
        key.removeprefix("mismatch/share/"): float(m) for key, m in got.items() if "share/" in key
    }
    assert shares == pytest.approx(
        {
            "position_0_2": 1 / 6,
            "position_2_3": 2 / 6,
            "position_3_9": 3 / 6,
            "position_9_up": 0.0,
            "age_0_1": 0.0,
            "age_1_2": 0.0,
            "age_2_up": 1 / 6,
            "age_unknown": 5 / 6,
        }
    )


def test_the_place_of_the_largest_ratio_is_its_sequence_and_position():
    packed = Packed.from_cu_seqlens(torch.tensor([0, 2, 5]), torch.tensor([1, 1, 0, 1, 1]).bool())
    train_T = torch.tensor([0.5, 0.0, torch.inf, 0.7, 0.7])
    metrics = mismatch_metrics(
        train_T, torch.zeros(5), packed, sample_ids_S=torch.tensor([2**53 - 1, 6])
    )
    assert isinstance(metrics["mismatch/ratio_max"], ArgMax)
    got = reduce_metrics(metrics)
    assert got["mismatch/ratio_max"].item() == pytest.approx(math.exp(0.7))
    assert (got["mismatch/ratio_max/sequence"], got["mismatch/ratio_max/position"]) == (6, 1)


def test_no_reading_carries_gradient():
    step = random_step()
    metrics = all_readings(
        step._replace(old_T=step.leaf()), torch.zeros_like(step.packed.seq_ids_T)
    )
    assert not any(x.requires_grad for m in metrics.values() for x in m.numbers())


def test_upstream_reported_a_gap_of_0_because_both_sides_were_one_tensor():
    step = random_step()
    old_T = step.rollout_T  # bypass mode: the trainer's log-probs are the engine's
    with pytest.raises(SettingError, match="are one tensor; expected the trainer's own"):
        mismatch_metrics(old_T, step.rollout_T, step.packed)


def test_mismatch_of_a_tensor_with_itself_is_refused_but_equal_values_are_not():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    logprobs_T = torch.zeros(2)
    for same in (logprobs_T, logprobs_T.detach(), logprobs_T[:]):
        with pytest.raises(SettingError, match="are one tensor; expected the trainer's own"):
            mismatch_metrics(logprobs_T, same, packed)
    assert float(mismatch_metrics(logprobs_T, torch.zeros(2), packed)["mismatch/abs"]) == 0.0


def test_bad_input():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    with pytest.raises(ShapeError, match=r"rollout_logprobs_T has shape \(3,\); expected \(2,\)"):
        mismatch_metrics(torch.zeros(2), torch.zeros(3), packed)
    with pytest.raises(EmptyBatchError, match="no metrics; expected one dict"):
        reduce_metrics([])
    one = Max(torch.tensor(1.0))
    for parts in ([{"a": one}, {"a": one, "b": one}], [{"a": one, "b": one}, {"a": one}]):
        with pytest.raises(SettingError, match=r"between micro-batches by \['b'\]; expected"):
            reduce_metrics(parts)
    three = Ess(one.largest, one.largest, one.largest)
    with pytest.raises(SettingError, match=r"between micro-batches by \['a'\]; expected"):
        reduce_metrics([{"a": one}, {"a": three}])
    assert reduce_metrics([{}, {}]) == {}


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        (r"position_buckets is \(\); expected", {"position_buckets": ()}),
        (r"position_buckets is \(4, 4\); expected", {"position_buckets": (4, 4)}),
        (r"position_buckets is \(0, 4\); expected", {"position_buckets": (0, 4)}),
        ("one of versions_T and current_version", {"versions_T": torch.zeros(2).long()}),
        ("one of versions_T and current_version", {"current_version": 3}),
        (
            r"age_buckets is \(2, 1\); expected",
            {"versions_T": torch.zeros(2).long(), "current_version": 3, "age_buckets": (2, 1)},
        ),
    ],
)
def test_mismatch_settings_that_cannot_be_meant_are_refused(match, settings):
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    with pytest.raises(SettingError, match=match):
        mismatch_metrics(torch.zeros(2), torch.ones(2), packed, **settings)


def test_mismatch_shapes_and_dtypes_are_checked():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    inputs = (torch.zeros(2), torch.ones(2), packed)
    with pytest.raises(ShapeError, match=r"sample_ids_S has shape \(2,\); expected \[1\]"):
        mismatch_metrics(*inputs, sample_ids_S=torch.zeros(2).long())
    with pytest.raises(DtypeError, match=r"sample_ids_S is torch\.float32; expected torch\.int64"):
        mismatch_metrics(*inputs, sample_ids_S=torch.zeros(1))
    with pytest.raises(ShapeError, match=r"versions_T has shape \(1,\); expected"):
        mismatch_metrics(*inputs, versions_T=torch.zeros(1).long(), current_version=3)
    with pytest.raises(DtypeError, match=r"versions_T is torch\.float32; expected torch\.int64"):
        mismatch_metrics(*inputs, versions_T=torch.zeros(2), current_version=3)
    bare = Packed(seq_ids_T=packed.seq_ids_T, mask_T=packed.mask_T, num_seqs=1)
    for settings in ({"position_buckets": (4,)}, {"sample_ids_S": torch.zeros(1).long()}):
        with pytest.raises(SettingError, match="positions_T; build the Packed with it"):
            mismatch_metrics(*inputs[:2], bare, **settings)
