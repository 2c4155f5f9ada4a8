"""Losses on two processes, data- or context-parallel, equal those on one.

Each layout is spawned once and computes everything; the tests compare the results.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from miles import Packed, count
from miles.losses import (
    Reject,
    Weight,
    aggregate,
    importance_weights,
    log_ratio,
    mean_over,
    mismatch_metrics,
    ppo_clip,
    reduce_metrics,
)
from miles.losses.metrics import max_over
from miles.losses.presets import grpo
from tests.distributed.gloo import run
from tests.steps import random_step, select

LAYOUTS = ["data_parallel", "context_parallel"]
RATIOS = ["token", "sequence_mean", "sequence_sum", "sequence_token"]
MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "group_mean", "sum"]
WEIGHTS = {
    "token": Weight(level="token", mode="truncate", high=2.0),
    "sequence_sum": Weight(level="sequence_sum", mode="clip", low=0.3, high=3.0),
    "sequence_mean": Weight(level="sequence_mean", mode="mask", low=0.4, high=2.0),
}
REJECTS = [
    Reject(level=level, statistic=statistic, low=0.1, high=1.2)
    for level in ("token", "sequence_mean", "sequence_sum", "sequence_max", "sequence_min")
    for statistic in ("ratio", "k1", "k2", "k3")
]


def zigzag(packed: Packed) -> list[torch.Tensor]:
    """Where the tokens of each of two ranks lie: chunks 0 and 3 of every sequence, or 1 and 2."""
    chunks = [
        (packed.seq_ids_T == seq).nonzero().flatten().tensor_split(4)
        for seq in range(packed.num_seqs)
    ]
    return [
        torch.cat([c for four in chunks for c in (four[a], four[b])]) for a, b in ((0, 3), (2, 1))
    ]


def here(layout: str) -> tuple[Packed, torch.Tensor, dict, dict]:
    """This rank's part, where it lies in the step, and the groups for counts and readings."""
    packed = random_step().packed
    if layout == "single":
        return packed, torch.arange(packed.num_positions), {}, {}
    world, rank = dist.group.WORLD, dist.get_rank()
    if layout == "data_parallel":
        part, index_T = select(packed, [[5, 0, 2], [1, 7, 3, 4, 6]][rank])
        return part, index_T, {"group": world}, {"group": world}
    index_T = zigzag(packed)[rank]
    part = replace(
        packed,
        seq_ids_T=packed.seq_ids_T[index_T],
        mask_T=packed.mask_T[index_T],
        positions_T=packed.positions_T[index_T],
        seq_group=world,
    )
    return part, index_T, {}, {"group": world}


def compute(layout: str) -> dict[str, dict]:
    """`summed`: what ranks add up, `[T]` tensors spread over the step; `shared`: equal on ranks."""
    packed, index_T, data_group, all_group = here(layout)
    step = random_step()
    old_T, rollout_T, ref_T, advantages_T = (
        x[index_T] for x in (step.old_T, step.rollout_T, step.ref_T, step.advantages_T)
    )
    summed, shared = {}, {}

    def spread(values_T):
        return torch.zeros(len(step.old_T), dtype=torch.float64).index_put((index_T,), values_T)

    def record(name, make_loss):
        leaf_T = step.leaf()
        loss = make_loss(leaf_T[index_T])
        loss.backward()
        summed[name] = (loss.detach(), leaf_T.grad)

    denominators = count(packed, **data_group)
    names = ("num_tokens", "num_seqs", "num_groups", "group_tokens_G")
    shared["count"] = {name: getattr(denominators, name) for name in names}

    inputs = (old_T, rollout_T, packed)
    for name, weight in WEIGHTS.items():
        rule = Reject(level="token", statistic="ratio", low=0.3)
        settings = {"weight": weight, "reject": [rule], "normalize": "mean"}
        correction = importance_weights(*inputs, **settings, **data_group)
        summed[f"weights {name}"] = spread(correction.weights_T)
        kept = count(packed, keep_T=correction.keep_T, **data_group)
        shared[f"count kept {name}"] = {key: getattr(kept, key) for key in names}
        shared[f"metrics {name}"] = reduce_metrics(correction.metrics, **all_group)
    for rule in REJECTS:
        keep_T = importance_weights(*inputs, weight=None, reject=[rule]).keep_T
        summed[f"keep {rule.level} {rule.statistic}"] = spread(keep_T.double())

    for level in RATIOS:
        ratio_T = log_ratio(step.logprobs_T[index_T], old_T, packed, level=level)
        summed[f"ratio {level}"] = spread(ratio_T)
        for mode in MODES:
            record(
                f"{level} {mode}",
                lambda x, level=level, mode=mode: aggregate(
                    ppo_clip(log_ratio(x, old_T, packed, level=level), advantages_T).loss_T,
                    packed,
                    denominators,
                    mode=mode,
                    weights_T=correction.weights_T,
                    keep_T=correction.keep_T,
                    constant=6.0 if mode == "constant" else None,
                ),
            )
    rest = (old_T, advantages_T, packed, denominators)
    settings = {"correction": correction, "ref_logprobs_T": ref_T, "kl_coef": 0.04}
    record("grpo", lambda x: grpo(x, *rest, **settings)[0])
    readings = grpo(step.logprobs_T[index_T], *rest, **settings)[1]
    readings |= mismatch_metrics(old_T, rollout_T, packed)
    shared["metrics grpo"] = reduce_metrics(readings, **all_group)
    each_seq = [select(packed, [seq]) for seq in range(packed.num_seqs)]
    readings = [mismatch_metrics(old_T[i_T], rollout_T[i_T], part) for part, i_T in each_seq]
    shared["metrics of micro-batches"] = reduce_metrics(readings, **all_group)
    nans = {}  # a NaN at each trainable position in turn: some on this rank, some on the other
    for t in step.packed.mask_T.nonzero().flatten().tolist():
        nan_T = torch.where(index_T == t, torch.nan, 1.0)
        nans |= {f"max {t}": max_over(nan_T, packed.mask_T)}
        nans |= {f"mean {t}": mean_over(nan_T, packed.mask_T)}
    shared["nan"] = reduce_metrics(nans, **all_group)
    return {"summed": summed, "shared": shared}


@pytest.fixture(scope="module")
def single():
    return compute("single")


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tmp_path_factory):
    return run(compute, 2, tmp_path_factory.mktemp(request.param), request.param)


def assert_sums_match(ranks, single, names):
    assert names
    for name in names:
        parts = [rank["summed"][name] for rank in ranks]
        expected = single["summed"][name]
        got = sum(parts) if torch.is_tensor(expected) else tuple(map(sum, zip(*parts, strict=True)))
        torch.testing.assert_close(
            got, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_every_rank_has(ranks, single, name):
    for rank in ranks:
        torch.testing.assert_close(
            rank["shared"][name], single["shared"][name], rtol=1e-12, atol=1e-12
        )


def test_both_ranks_have_work_and_share_a_sequence_only_in_context_parallel():
    packed = random_step().packed
    seqs = [set(packed.seq_ids_T[index_T].tolist()) for index_T in zigzag(packed)]
    assert len(seqs[0] & seqs[1]) >= 3
    assert sum(len(index_T) for index_T in zigzag(packed)) == packed.num_positions


def test_counts_match(ranks, single):
    for name in ("count", *(f"count kept {weight}" for weight in WEIGHTS)):
        assert_every_rank_has(ranks, single, name)


@pytest.mark.parametrize("level", RATIOS)
def test_ratios_match(ranks, single, level):
    assert_sums_match(ranks, single, [f"ratio {level}"])


@pytest.mark.parametrize("level", RATIOS)
@pytest.mark.parametrize("mode", MODES)
def test_aggregated_losses_and_gradients_match(ranks, single, level, mode):
    assert_sums_match(ranks, single, [f"{level} {mode}"])
    assert single["summed"][f"{level} {mode}"][1].abs().max() > 1e-3


def test_grpo_loss_and_gradient_match(ranks, single):
    assert_sums_match(ranks, single, ["grpo"])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_normalized_weights_match(ranks, single, weight):
    assert_sums_match(ranks, single, [f"weights {weight}"])


def test_rejections_match(ranks, single):
    names = [name for name in single["summed"] if name.startswith("keep ")]
    assert len(names) == len(REJECTS)
    assert_sums_match(ranks, single, names)


@pytest.mark.parametrize("name", ["grpo", "of micro-batches", *WEIGHTS])
def test_reduced_metrics_match(ranks, single, name):
    assert_every_rank_has(ranks, single, f"metrics {name}")


def test_a_nan_on_one_rank_is_not_hidden_by_the_other(ranks, single):
    for rank in (*ranks, single):
        assert [name for name, value in rank["shared"]["nan"].items() if not value.isnan()] == []
