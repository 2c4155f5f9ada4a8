"""However a step is cut into micro-batches, ordered or laid out, its loss is the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, count
from miles.losses import (
    Correction,
    Reject,
    Weight,
    aggregate,
    importance_weights,
    kl_penalty,
    log_ratio,
    ppo_clip,
    reduce_metrics,
    truncated_is,
)
from miles.losses.presets import grpo
from tests.steps import Step, quick, random_step, select

MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "group_mean", "sum"]
every_mode = pytest.mark.parametrize("mode", MODES)
SPLITS = {
    "1x8": [list(range(8))],
    "2x4": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "8x1": [[seq] for seq in range(8)],
    "uneven": [[6], [1, 3, 0, 7, 5], [4, 2]],
    "reversed": [list(range(8))[::-1]],
}
partitions = st.permutations(range(8)).flatmap(
    lambda order: st.sets(st.integers(1, 7)).map(
        lambda cuts: [
            list(order[low:high])
            for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 8], strict=True)
        ]
    )
)
CORRECTIONS = {
    "none": {},
    "kept": {"count_rejected": True},
    "left out": {"count_rejected": False},
}


def correct(step: Step) -> Correction:
    """TIS weights, normalised, with rejected tokens and sequences; once for the whole step."""
    return importance_weights(
        step.old_T,
        step.rollout_T,
        step.packed,
        weight=Weight(level="token", mode="truncate", high=2.0),
        reject=[
            Reject(level="token", statistic="ratio", low=0.2),
            Reject(level="sequence_max", statistic="k2", high=1.5),
        ],
        normalize="mean",
    )


def take(step: Step, packed: Packed, index_T: torch.Tensor) -> Step:
    return Step(packed, *(values_T[index_T] for values_T in step[1:]))


def micro_batches(step: Step, split: list[list[int]]) -> list[tuple[Packed, torch.Tensor]]:
    return [select(step.packed, seqs) for seqs in split]


def padded(step: Step, extra: int) -> tuple[Packed, torch.Tensor]:
    """The step as a `[S, L + extra]` batch; padding reads a masked token, so it is garbage."""
    packed = step.packed
    masked = int((~packed.mask_T).nonzero()[0])
    width = int(packed.positions_T.max()) + 1 + extra
    index_SL = torch.full((packed.num_seqs, width), masked)
    index_SL[packed.seq_ids_T, packed.positions_T] = torch.arange(packed.num_positions)
    return Packed.from_padded(packed.mask_T[index_SL], packed.group_ids_S), index_SL.flatten()


def aggregated(step: Step, parts, mode: str, level: str = "token", **rejection):
    """The step's loss and the gradient of every log-prob, summed over micro-batches."""
    leaf_T = step.leaf()
    correction = correct(step) if rejection else None
    keeps = [correction.keep_T[index_T] for _, index_T in parts] if rejection else None
    counted = keeps if rejection.get("count_rejected") is False else None
    denominators = count([packed for packed, _ in parts], keep_T=counted)
    total = 0.0
    for packed, index_T in parts:
        part = take(step, packed, index_T)
        ratio_T = log_ratio(leaf_T[index_T], part.old_T, packed, level=level)
        loss_T = ppo_clip(ratio_T, part.advantages_T).loss_T
        loss_T = loss_T + 0.1 * kl_penalty(leaf_T[index_T], part.ref_T, packed, grad="reverse_kl")
        corrected = (
            {"weights_T": correction.weights_T[index_T], "keep_T": correction.keep_T[index_T]}
            if rejection
            else {}
        )
        constant = 6.0 if mode == "constant" else None
        settings = {"mode": mode, "constant": constant, **corrected, **rejection}
        loss = aggregate(loss_T, packed, denominators, **settings)
        loss.backward()
        total += loss.item()
    return total, leaf_T.grad


def grpo_of(step: Step, parts):
    leaf_T, whole = step.leaf(), correct(step)
    denominators = count([packed for packed, _ in parts])
    total, metrics = 0.0, []
    for packed, index_T in parts:
        part = take(step, packed, index_T)
        loss, readings = grpo(
            leaf_T[index_T],
            part.old_T,
            part.advantages_T,
            packed,
            denominators,
            correction=Correction(whole.weights_T[index_T], whole.keep_T[index_T], {}),
            ref_logprobs_T=part.ref_T,
            kl_coef=0.04,
        )
        loss.backward()
        total += loss.item()
        metrics.append(readings)
    return total, leaf_T.grad, reduce_metrics(metrics)


def whole_step(step: Step):
    return [(step.packed, torch.arange(step.packed.num_positions))]


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert expected[1].abs().max() > 1e-3 and expected[1].isfinite().all()


@pytest.mark.parametrize("name", SPLITS)
def test_grpo_is_the_same_for_every_split(name):
    step = random_step()
    parts = micro_batches(step, SPLITS[name])
    assert_same(grpo_of(step, parts), grpo_of(step, whole_step(step)))


@quick
@given(st.integers(0, 10_000), partitions)
def test_grpo_is_the_same_for_random_partitions(seed, split):
    step = random_step(seed)
    assert_same(grpo_of(step, micro_batches(step, split)), grpo_of(step, whole_step(step)))


@every_mode
@pytest.mark.parametrize("rejection", CORRECTIONS)
@pytest.mark.parametrize("name", SPLITS)
def test_aggregate_is_the_same_for_every_split(mode, rejection, name):
    step = random_step()
    settings = CORRECTIONS[rejection]
    parts = micro_batches(step, SPLITS[name])
    assert_same(
        aggregated(step, parts, mode, **settings),
        aggregated(step, whole_step(step), mode, **settings),
    )


@pytest.mark.parametrize("level", ["sequence_mean", "sequence_sum", "sequence_token"])
@quick
@given(split=partitions, mode=st.sampled_from(MODES))
def test_sequence_ratios_are_the_same_for_random_partitions(level, split, mode):
    step = random_step()
    assert_same(
        aggregated(step, micro_batches(step, split), mode, level),
        aggregated(step, whole_step(step), mode, level),
    )


@every_mode
@pytest.mark.parametrize("extra", [0, 5])
def test_padded_equals_packed(mode, extra):
    step = random_step()
    layout = [padded(step, extra)]
    for settings in CORRECTIONS.values():
        assert_same(
            aggregated(step, layout, mode, "sequence_mean", **settings),
            aggregated(step, whole_step(step), mode, "sequence_mean", **settings),
        )
    assert_same(grpo_of(step, layout), grpo_of(step, whole_step(step)))


@every_mode
def test_order_of_tokens_does_not_matter(mode):
    step = random_step()
    order = torch.randperm(step.packed.num_positions)
    shuffled = Packed(
        seq_ids_T=step.packed.seq_ids_T[order],
        mask_T=step.packed.mask_T[order],
        num_seqs=step.packed.num_seqs,
        group_ids_S=step.packed.group_ids_S,
    )
    assert_same(
        aggregated(step, [(shuffled, order)], mode, "sequence_mean", count_rejected=False),
        aggregated(step, whole_step(step), mode, "sequence_mean", count_rejected=False),
    )


@quick
@given(st.integers(0, 10_000))
def test_weights_of_the_padded_step_are_those_of_the_packed_one(seed):
    step = random_step(seed)
    packed, index_T = padded(step, 2)
    real_T = packed.mask_T
    got, expected = correct(take(step, packed, index_T)), correct(step)
    torch.testing.assert_close(got.weights_T[real_T], expected.weights_T[index_T[real_T]])
    assert torch.equal(got.keep_T[real_T], expected.keep_T[index_T[real_T]])


def test_split_correction_goes_with_micro_batches_laid_end_to_end():
    step = random_step()
    parts = [packed for packed, _ in micro_batches(step, SPLITS["2x4"])]
    whole = truncated_is(step.old_T, step.rollout_T, Packed.cat(parts))
    start = 0
    for part, correction in zip(parts, whole.split([p.num_positions for p in parts]), strict=True):
        window = slice(start, start + part.num_positions)
        alone = truncated_is(step.old_T[window], step.rollout_T[window], part)
        assert torch.equal(correction.weights_T, alone.weights_T)
        start = window.stop
