import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, count
from miles.errors import DenominatorError, DtypeError, SettingError, ShapeError
from miles.losses import aggregate, icepop, keep_untruncated, presets, token_weights
from tests.steps import poison, quick, random_step, select

MODES = {
    "token_mean": {},
    "seq_mean_token_mean": {},
    "seq_mean_token_sum": {},
    "constant": {"constant": 5.0},
    "group_mean": {},
    "sum": {},
}
every_mode = pytest.mark.parametrize("mode", MODES)
# sequences of 2, 1 and 0 trainable tokens; groups of 3 and 0
PACKED = Packed.from_padded(
    torch.tensor([[True, True], [True, False], [False, False]]), torch.tensor([0, 0, 1])
)
LOSS = [1.0, 3.0, 6.0, torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize(
    ("mode", "expected", "gradient"),
    [
        ("token_mean", 10 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ("seq_mean_token_mean", 4.0, [1 / 4, 1 / 4, 1 / 2]),
        ("seq_mean_token_sum", 5.0, [1 / 2, 1 / 2, 1 / 2]),
        ("constant", 1.0, [1 / 10, 1 / 10, 1 / 10]),
        ("group_mean", 10 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ("sum", 10.0, [1.0, 1.0, 1.0]),
    ],
)
def test_literals_and_their_gradients(mode, expected, gradient):
    loss_T = torch.tensor(LOSS, requires_grad=True)
    loss = aggregate(loss_T, PACKED, count(PACKED), mode=mode, **MODES[mode])
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert loss_T.grad.tolist() == pytest.approx([*gradient, 0.0, 0.0, 0.0])
    assert (loss_T.grad[3:] == 0).all()


def test_group_mean_gives_each_group_the_same_say():
    packed = Packed.from_padded(
        torch.tensor([[True, True], [True, True], [True, False]]), torch.tensor([0, 0, 2])
    )
    loss_T = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0, torch.nan])
    assert aggregate(loss_T, packed, count(packed), mode="group_mean").item() == (3.0 + 10.0) / 2


def naive(loss_T, packed, mode, weights_T, keep_T, counted_T):
    """A double loop over sequences and tokens; `counted_T` are those of the denominators."""
    seqs, ids = packed.seq_ids_T.tolist(), packed.group_ids_S.tolist()
    counted = [t for t in range(len(seqs)) if counted_T[t]]
    per_seq = {s: sum(seqs[t] == s for t in counted) for s in range(packed.num_seqs)}
    per_group = {g: sum(ids[seqs[t]] == g for t in counted) for g in ids}
    num_seqs = sum(n > 0 for n in per_seq.values())
    num_groups = sum(n > 0 for n in per_group.values())
    total = 0.0
    for s in range(packed.num_seqs):
        for t in range(len(seqs)):
            if seqs[t] != s or not packed.mask_T[t] or not keep_T[t]:
                continue
            divisor = {
                "token_mean": len(counted),
                "seq_mean_token_mean": per_seq[s] * num_seqs,
                "seq_mean_token_sum": num_seqs,
                "constant": num_seqs * 5.0,
                "group_mean": per_group[ids[s]] * num_groups,
                "sum": 1,
            }[mode]
            total += loss_T[t].item() * weights_T[t].item() / divisor
    return total


@every_mode
@pytest.mark.parametrize("count_rejected", [True, False])
@quick
@given(seed=st.integers(0, 10_000))
def test_every_mode_matches_a_double_loop(mode, count_rejected, seed):
    step = random_step(seed)
    mask_T = step.packed.mask_T
    keep_T = (step.advantages_T < 0.8) | ~mask_T
    keep_T[0] = True
    counted_T = mask_T if count_rejected else mask_T & keep_T
    denominators = count(step.packed, keep_T=None if count_rejected else keep_T)
    settings = {
        "weights_T": step.rollout_T.exp(),
        "keep_T": keep_T,
        "count_rejected": count_rejected,
        **MODES[mode],
    }
    got = aggregate(step.logprobs_T, step.packed, denominators, mode=mode, **settings)
    args = (step.logprobs_T, step.packed, mode, settings["weights_T"], keep_T, counted_T)
    assert got.item() == pytest.approx(naive(*args), rel=1e-12)


@every_mode
def test_token_weights_are_the_gradient_of_aggregate(mode):
    step = random_step()
    settings = {
        "mode": mode,
        "weights_T": step.rollout_T.exp(),
        "keep_T": step.advantages_T < 0.8,
        "averaged_over": 3,
        **MODES[mode],
    }
    denominators = count(step.packed)
    coefficients_T = token_weights(step.packed, denominators, **settings)
    loss_T = step.leaf()
    aggregate(loss_T, step.packed, denominators, **settings).backward()
    assert coefficients_T.dtype == torch.float64 and not coefficients_T.requires_grad
    torch.testing.assert_close(loss_T.grad, coefficients_T, rtol=1e-14, atol=0)
    assert coefficients_T.isfinite().all()


@every_mode
def test_rejected_and_masked_garbage_changes_neither_value_nor_gradient(mode):
    step = random_step()
    keep_T = step.advantages_T < 0.8
    active_T = step.packed.mask_T & keep_T
    results = []
    for dirty in (True, False):
        loss_T = torch.where(active_T, step.logprobs_T, 0)
        loss_T = (poison(loss_T, active_T) if dirty else loss_T).requires_grad_()
        weights_T = (
            step.rollout_T.exp() if dirty else torch.where(active_T, step.rollout_T.exp(), 0)
        )
        settings = {"mode": mode, "weights_T": weights_T, "keep_T": keep_T, **MODES[mode]}
        loss = aggregate(loss_T, step.packed, count(step.packed), **settings)
        loss.backward()
        results.append((loss.detach(), loss_T.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0][1][~active_T] == 0).all()


@every_mode
@pytest.mark.parametrize("which", ["loss", "weight"])
def test_a_trainable_nan_is_not_hidden(mode, which):
    loss_T, weights_T = torch.tensor(LOSS), torch.ones(6)
    (loss_T if which == "loss" else weights_T)[1] = torch.nan
    settings = {"mode": mode, "weights_T": weights_T, **MODES[mode]}
    assert aggregate(loss_T, PACKED, count(PACKED), **settings).isnan()


@every_mode
def test_averaged_over_multiplies_back_what_a_wrapper_divides(mode):
    loss_T, d = torch.tensor(LOSS), count(PACKED)
    settings = {"mode": mode, **MODES[mode]}
    one = aggregate(loss_T, PACKED, d, **settings)
    assert aggregate(loss_T, PACKED, d, averaged_over=4, **settings).item() == pytest.approx(
        4 * one.item()
    )


@every_mode
def test_a_micro_batch_without_trainable_tokens_adds_zero_and_backpropagates(mode):
    idle = Packed.from_padded(torch.zeros(1, 2).bool(), torch.tensor([1]))
    loss_T = torch.full((2,), torch.nan, requires_grad=True)
    loss = aggregate(loss_T, idle, count([PACKED, idle]), mode=mode, **MODES[mode])
    loss.backward()
    assert loss.item() == 0.0 and loss_T.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_result(dtype, result):
    assert aggregate(torch.tensor(LOSS, dtype=dtype), PACKED, count(PACKED)).dtype == result


def test_many_float32_tokens_are_summed_in_float64():
    packed = Packed.from_padded(torch.ones(1, 4).bool())
    loss_T = torch.tensor([2.0**25, 1.0, 1.0, -(2.0**25)])
    assert aggregate(loss_T, packed, count(packed), mode="sum").item() == 2.0


KEEP = PACKED.mask_T.clone()


@pytest.mark.parametrize(
    ("counted_keep", "settings"),
    [
        (False, {"keep_T": KEEP, "count_rejected": False}),
        (True, {"keep_T": KEEP}),
        (True, {}),
    ],
)
def test_denominators_counted_another_way_are_refused(counted_keep, settings):
    denominators = count(PACKED, keep_T=KEEP if counted_keep else None)
    with pytest.raises(DenominatorError, match=r"counted with(out)? keep_T; use count"):
        aggregate(torch.tensor(LOSS), PACKED, denominators, **settings)


@pytest.mark.parametrize("where", ["packed", "denominators"])
def test_group_mean_needs_groups_on_both_sides(where):
    without = Packed.from_padded(torch.ones(1, 6).bool())
    packed, counted = (without, PACKED) if where == "packed" else (PACKED, without)
    with pytest.raises(DenominatorError, match="needs group_ids_S"):
        aggregate(torch.tensor(LOSS), packed, count(counted), mode="group_mean")


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (SettingError, "mode is 'mean'; expected one of", {"mode": "mean"}),
        (SettingError, "constant=None; expected constant > 0", {"mode": "constant"}),
        (SettingError, "constant=0; expected", {"mode": "constant", "constant": 0}),
        (SettingError, "constant=3.0; expected", {"constant": 3.0}),
        (SettingError, "averaged_over is 0; expected", {"averaged_over": 0}),
        (SettingError, "no effect without keep_T", {"count_rejected": False}),
        (ShapeError, r"keep_T has shape \(2,\); expected", {"keep_T": KEEP[:2]}),
        (ShapeError, r"weights_T has shape \(2,\); expected", {"weights_T": torch.ones(2)}),
    ],
)
def test_bad_input(error, match, settings):
    with pytest.raises(error, match=match):
        aggregate(torch.tensor(LOSS), PACKED, count(PACKED), **settings)


def test_bad_shape_of_the_loss():
    with pytest.raises(ShapeError, match=r"loss_T has shape \(1,\); expected \(6,\)"):
        aggregate(torch.zeros(1), PACKED, count(PACKED))


@pytest.mark.parametrize("group", [1, 5])
def test_a_group_that_count_never_saw_is_named(group):
    seen = Packed.from_padded(torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]))
    unseen = Packed.from_padded(torch.ones(1, 1, dtype=torch.bool), torch.tensor([group]))
    with pytest.raises(DenominatorError, match=f"group id {group} is not among the 1 groups"):
        aggregate(torch.ones(1), unseen, count(seen), mode="group_mean")


# sequences of 2, 1 and 1 trainable tokens, the last of them cut off; groups of two and one
CUT = Packed.from_padded(
    torch.tensor([[True, True], [True, False], [True, False]]), torch.tensor([0, 0, 1])
)
CUT_LOSS = [1.0, 3.0, 6.0, torch.nan, 100.0, torch.inf]


@pytest.mark.parametrize(
    ("mode", "counted", "left_out"),
    [
        ("token_mean", 10 / 4, 10 / 3),
        ("seq_mean_token_mean", 8 / 3, 8 / 2),
        ("seq_mean_token_sum", 10 / 3, 10 / 2),
        ("constant", 10 / 15, 10 / 10),
        ("group_mean", 10 / 3 / 2, 10 / 3),
        ("sum", 10.0, 10.0),
    ],
)
def test_truncated_sequences_stay_in_the_denominator_or_leave_it(mode, counted, left_out):
    keep_T = keep_untruncated(torch.tensor([False, False, True]), CUT)
    assert keep_T.tolist() == [True, True, True, False, False, False]
    for count_rejected, expected in ((True, counted), (False, left_out)):
        loss_T = torch.tensor(CUT_LOSS, requires_grad=True)
        denominators = count(CUT, keep_T=None if count_rejected else keep_T)
        settings = {"mode": mode, "keep_T": keep_T, "count_rejected": count_rejected}
        loss = aggregate(loss_T, CUT, denominators, **settings, **MODES[mode])
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert (loss_T.grad[:3] > 0).all() and (loss_T.grad[3:] == 0).all()


def without_truncated(step, parts, truncated_S, mode, **settings):
    """Loss of the step and its gradient, over micro-batches."""
    leaf_T, total = step.leaf(), 0.0
    keeps = [keep_untruncated(truncated_S[seqs], packed) for seqs, packed, _ in parts]
    counted = keeps if settings["count_rejected"] is False else None
    denominators = count([packed for _, packed, _ in parts], keep_T=counted)
    for (_, packed, index_T), keep_T in zip(parts, keeps, strict=True):
        options = {"keep_T": keep_T, "mode": mode, **settings, **MODES[mode]}
        loss = aggregate(leaf_T[index_T], packed, denominators, **options)
        loss.backward()
        total += loss.item()
    return total, leaf_T.grad


def cut_into(step, split):
    return [(seqs, *select(step.packed, seqs)) for seqs in split]


@every_mode
@quick
@given(seed=st.integers(0, 10_000), cut=st.sets(st.integers(1, 7)))
def test_leaving_truncated_sequences_out_is_dropping_them_from_the_batch(mode, seed, cut):
    step = random_step(seed)
    truncated_S = torch.tensor([seq in cut for seq in range(8)])
    got = without_truncated(
        step, cut_into(step, [list(range(8))]), truncated_S, mode, count_rejected=False
    )
    rest, index_T = select(step.packed, [seq for seq in range(8) if seq not in cut])
    leaf_T = step.leaf()
    loss = aggregate(leaf_T[index_T], rest, count(rest), mode=mode, **MODES[mode])
    loss.backward()
    torch.testing.assert_close(got, (loss.item(), leaf_T.grad), rtol=1e-12, atol=1e-12)
    assert leaf_T.grad.abs().max() > 0


@every_mode
@quick
@given(seed=st.integers(0, 10_000), cut=st.sets(st.integers(1, 7)))
def test_counting_truncated_sequences_is_giving_them_a_loss_of_zero(mode, seed, cut):
    step = random_step(seed)
    truncated_S = torch.tensor([seq in cut for seq in range(8)])
    whole = cut_into(step, [list(range(8))])
    got = without_truncated(step, whole, truncated_S, mode, count_rejected=True)
    leaf_T = step.leaf()
    zeroed_T = torch.where(truncated_S[step.packed.seq_ids_T], 0, leaf_T)
    loss = aggregate(zeroed_T, step.packed, count(step.packed), mode=mode, **MODES[mode])
    loss.backward()
    torch.testing.assert_close(got, (loss.item(), leaf_T.grad), rtol=1e-12, atol=1e-12)


@every_mode
@pytest.mark.parametrize("count_rejected", [True, False])
@pytest.mark.parametrize("split", [[[2, 3], [1, 5, 0, 4], [7, 6]], [[seq] for seq in range(8)]])
def test_truncated_sequences_do_not_tie_the_loss_to_the_split(mode, count_rejected, split):
    step = random_step()
    truncated_S = torch.tensor([seq in (2, 3, 6) for seq in range(8)])  # all of one micro-batch
    got, expected = (
        without_truncated(
            step, cut_into(step, cut), truncated_S, mode, count_rejected=count_rejected
        )
        for cut in (split, [list(range(8))])
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert expected[1].abs().max() > 0


def test_a_preset_leaves_truncated_sequences_out_by_its_correction():
    step, rest = random_step(), [0, 1, 4, 5, 7]
    kept, index_T = select(step.packed, rest)
    keep_T = keep_untruncated(torch.tensor([seq not in rest for seq in range(8)]), step.packed)
    results = []
    for packed, here_T in ((step.packed, slice(None)), (kept, index_T)):
        old_T, rollout_T, advantages_T = (
            x_T[here_T] for x_T in (step.old_T, step.rollout_T, step.advantages_T)
        )
        correction = icepop(old_T, rollout_T, packed, low=0.6)
        both_T = correction.keep_T & keep_T[here_T]
        correction = dataclasses.replace(correction, keep_T=both_T)
        leaf_T, denominators = step.leaf(), count(packed, keep_T=both_T)
        loss, _ = presets.dapo(
            leaf_T[here_T], old_T, advantages_T, packed, denominators,
            correction=correction, count_rejected=False,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), leaf_T.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert 0 < both_T.sum() < kept.mask_T.sum() and results[0][1].abs().max() > 0


def test_truncation_that_does_not_fit_is_refused():
    for truncated_S in (torch.ones(2).bool(), torch.ones(6).bool(), torch.ones(1, 3).bool()):
        with pytest.raises(ShapeError, match=r"truncated_S has shape .*; expected \[3\], one bool"):
            keep_untruncated(truncated_S, CUT)
    with pytest.raises(DtypeError, match=r"truncated_S is torch\.int64; expected torch\.bool"):
        keep_untruncated(torch.tensor([0, 0, 1]), CUT)
