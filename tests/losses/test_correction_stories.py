"""What upstream corrections got wrong, and settings that cannot be meant."""

import math

import pytest
import torch

from miles import Packed, count
from miles.errors import (
    MissingLogprobError,
    SettingError,
)
from miles.losses.aggregation import aggregate
from miles.losses.corrections import (
    Reject,
    Weight,
    importance_weights,
    truncated_is,
    veto,
)
from miles.losses.metrics import mismatch_metrics, reduce_metrics
from miles.losses.ratios import log_ratio
from miles.losses.surrogates import ppo_clip
from tests.corrections import ALL_RULES, TRUNCATE, of_ratios, readings
from tests.steps import random_step, select


def losses_by_micro_batch_size(correct):
    """Of 8 sequences with advantages +-1, in micro-batches of 8, 4, 2 and 1."""
    step = random_step(3)
    chosen = [0, 2, 3, 4, 5, 6, 7, 0]
    advantages_S = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    losses = []
    for size in (8, 4, 2, 1):
        cuts = [range(start, start + size) for start in range(0, 8, size)]
        micros = [select(step.packed, [chosen[seq] for seq in cut]) for cut in cuts]
        pairs = [(step.old_T[index_T], step.rollout_T[index_T]) for _, index_T in micros]
        corrections = correct([packed for packed, _ in micros], pairs)
        denominators = count([packed for packed, _ in micros])
        losses += [
            sum(
                aggregate(
                    -packed.per_token(advantages_S[list(cut)]),
                    packed,
                    denominators,
                    mode="seq_mean_token_mean",
                    weights_T=correction.weights_T,
                ).item()
                for cut, (packed, _), correction in zip(cuts, micros, corrections, strict=True)
            )
        ]
    return losses


NORMALIZED = {
    "weight": Weight(level="sequence_mean", mode="truncate", high=2.0),
    "normalize": "mean",
}


def test_upstream_normalised_weights_per_micro_batch_so_the_loss_depended_on_its_size():
    def whole_step(parts, pairs):
        old_T, rollout_T = (torch.cat(side) for side in zip(*pairs, strict=True))
        whole = importance_weights(old_T, rollout_T, Packed.cat(parts), **NORMALIZED)
        return whole.split([packed.num_positions for packed in parts])

    def each_alone(parts, pairs):
        return [
            importance_weights(*pair, packed, **NORMALIZED)
            for packed, pair in zip(parts, pairs, strict=True)
        ]

    losses = losses_by_micro_batch_size(whole_step)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12) and abs(losses[0]) > 1e-3
    losses = losses_by_micro_batch_size(each_alone)  # what upstream does
    assert len({round(loss, 4) for loss in losses}) == 4 and losses[3] == pytest.approx(
        0, abs=1e-12
    )


def test_upstream_raised_for_the_geometric_level_with_normalisation():
    got = of_ratios([1.0, 4.0, 0.5, 2.0], width=2, **NORMALIZED)
    assert got.weights_T.tolist() == pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])


def test_upstream_let_normalised_weights_pass_their_cap():
    plain = of_ratios([0.2, 0.2, 2.0], weight=TRUNCATE).weights_T
    assert (plain / plain.mean()).tolist() == pytest.approx([0.25, 0.25, 2.5])  # what upstream gave
    got = of_ratios([0.2, 0.2, 2.0], weight=TRUNCATE, normalize="mean")
    assert got.weights_T.tolist() == pytest.approx([0.25, 0.25, 2.0])


def test_upstream_could_not_reject_without_weighting():
    got = of_ratios([1.0, 1.5, 9.0, 1.0], width=2, weight=None, reject=[veto(), *ALL_RULES[3:]])
    assert got.weights_T.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert got.keep_T.tolist() == [True, True, False, True]


def test_upstream_hid_a_broken_ratio_by_nan_to_num():
    packed = Packed.from_padded(torch.ones(1, 2).bool())
    old_T = torch.tensor([0.0, 0.0])
    with pytest.raises(MissingLogprobError, match=r"position 1 .* in rollout_logprobs_T"):
        truncated_is(old_T, torch.tensor([0.0, math.nan]), packed)
    never_sampled_T = torch.tensor([0.0, -math.inf])  # an infinite ratio, not a weight of 0
    assert truncated_is(old_T, never_sampled_T, packed).weights_T.tolist() == [1.0, 2.0]
    gap = reduce_metrics(mismatch_metrics(old_T, never_sampled_T, packed))
    assert gap["mismatch/ratio_max"] == gap["mismatch/abs"] == math.inf


def test_a_step_of_which_every_token_is_rejected_trains_on_nothing_and_says_so():
    step = random_step()
    got = importance_weights(
        step.old_T,
        step.rollout_T,
        step.packed,
        weight=TRUNCATE,
        reject=[Reject(level="token", statistic="ratio", high=0.0)],
        normalize="mean",
        advantages_T=step.advantages_T,
    )
    leaf_T = step.leaf()
    surrogate = ppo_clip(log_ratio(leaf_T, step.old_T, step.packed), step.advantages_T)
    loss = aggregate(
        surrogate.loss_T,
        step.packed,
        count(step.packed),
        weights_T=got.weights_T,
        keep_T=got.keep_T,
    )
    loss.backward()
    assert loss.item() == 0.0 and (leaf_T.grad == 0).all()
    values = readings(got)
    assert values["correction/kept"] == values["correction/kept/token_ratio"] == 0.0
    assert values["correction/weight_max"] == -math.inf
    for name in ("weight_mean", "ess", "ess_advantage", "capped"):
        assert math.isnan(values[f"correction/{name}"])


@pytest.mark.parametrize(
    "bounds", [{"low": 2.0, "high": 0.5}, {"low": math.nan}, {"high": 1e9}, {"low": 1e-10}]
)
def test_rejections_that_reject_all_or_can_never_reject_are_refused(bounds):
    with pytest.raises(SettingError, match="expected"):
        Reject(level="token", statistic="ratio", **bounds)
