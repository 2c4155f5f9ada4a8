"""Losses on two and four processes, data-, context-parallel or both, equal those on one.

Each number of processes is spawned once and computes every layout; the tests compare the results.
"""

import pytest
import torch
import torch.distributed as dist

from miles import count
from miles.losses import (
    Reject,
    Weight,
    aggregate,
    importance_weights,
    keep_untruncated,
    log_ratio,
    mean_over,
    mismatch_metrics,
    ppo_clip,
    reduce_metrics,
)
from miles.losses.metrics import max_over
from miles.losses.presets import grpo
from tests.distributed.gloo import run
from tests.distributed.test_surrogates_gloo import LAYOUTS, here
from tests.steps import random_step, select

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
TRUNCATED_S = torch.tensor([seq in (2, 3, 6) for seq in range(8)])


def compute(layout: str | None) -> dict[str, dict]:
    """`summed`: what ranks add up, `[T]` tensors spread over the step; `shared`: equal on ranks."""
    packed, index_T, seqs, group = here(*LAYOUTS[layout]) if layout else here(1, 1)
    everyone = {"group": dist.group.WORLD if layout else None}
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

    denominators = count(packed, group=group)
    names = ("num_tokens", "num_seqs", "num_groups", "group_tokens_G")
    shared["count"] = {name: getattr(denominators, name) for name in names}

    inputs = (old_T, rollout_T, packed)
    for name, weight in WEIGHTS.items():
        rule = Reject(level="token", statistic="ratio", low=0.3)
        settings = {"weight": weight, "reject": [rule], "normalize": "mean"}
        correction = importance_weights(*inputs, **settings, group=group)
        summed[f"weights {name}"] = spread(correction.weights_T)
        kept = count(packed, keep_T=correction.keep_T, group=group)
        shared[f"count kept {name}"] = {key: getattr(kept, key) for key in names}
        shared[f"metrics {name}"] = reduce_metrics(correction.metrics, **everyone)
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
    keep_T = keep_untruncated(TRUNCATED_S[seqs], packed)
    left_out = count(packed, keep_T=keep_T, group=group)
    for mode in MODES:
        for counted, rejection in ((denominators, True), (left_out, False)):
            settings = {"mode": mode, "keep_T": keep_T, "count_rejected": rejection}
            settings["constant"] = 6.0 if mode == "constant" else None
            record(
                f"truncated {mode} {rejection}",
                lambda x, counted=counted, settings=settings: aggregate(
                    log_ratio(x, old_T, packed, level="sequence_mean"), packed, counted, **settings
                ),
            )
    rest = (old_T, advantages_T, packed, denominators)
    settings = {"correction": correction, "ref_logprobs_T": ref_T, "kl_coef": 0.04}
    record("grpo", lambda x: grpo(x, *rest, **settings)[0])
    readings = grpo(step.logprobs_T[index_T], *rest, **settings)[1]
    readings |= mismatch_metrics(old_T, rollout_T, packed)
    shared["metrics grpo"] = reduce_metrics(readings, **everyone)
    each_seq = [select(packed, [seq]) for seq in range(packed.num_seqs)]
    readings = [mismatch_metrics(old_T[i_T], rollout_T[i_T], part) for part, i_T in each_seq]
    shared["metrics of micro-batches"] = reduce_metrics(readings, **everyone)
    nans = {}  # a NaN at each trainable position in turn: some on this rank, some on others
    for t in step.packed.mask_T.nonzero().flatten().tolist():
        nan_T = torch.where(index_T == t, torch.nan, 1.0)
        nans |= {f"max {t}": max_over(nan_T, packed.mask_T)}
        nans |= {f"mean {t}": mean_over(nan_T, packed.mask_T)}
    shared["nan"] = reduce_metrics(nans, **everyone)
    return {"summed": summed, "shared": shared}


def compute_all(layouts: list[str]) -> dict[str, dict]:
    return {layout: compute(layout) for layout in layouts}


@pytest.fixture(scope="module")
def single():
    return compute(None)


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """What each rank of 2 and of 4 computed, by layout."""
    results = {}
    for world in (2, 4):
        layouts = [name for name, (data, context) in LAYOUTS.items() if data * context == world]
        ranks = run(compute_all, world, tmp_path_factory.mktemp(f"world{world}"), layouts)
        results |= {layout: [rank[layout] for rank in ranks] for layout in layouts}
    return results


@pytest.fixture(params=LAYOUTS)
def ranks(request, spawned):
    return spawned[request.param]


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


def test_two_and_four_ranks_are_compared_value_and_gradient(spawned, single):
    assert sorted(map(len, spawned.values())) == [2, 2, 4, 4, 4]
    assert sum(isinstance(value, tuple) for value in single["summed"].values()) == 24 + 12 + 1


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


@pytest.mark.parametrize("mode", MODES)
def test_truncated_sequences_are_left_out_alike(ranks, single, mode):
    names = [f"truncated {mode} {rejection}" for rejection in (True, False)]
    assert_sums_match(ranks, single, names)
    values = [single["summed"][name][0].item() for name in names]
    assert (values[0] == values[1]) == (mode == "sum")


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


def test_a_nan_on_one_rank_is_not_hidden_by_the_others(ranks, single):
    for rank in (*ranks, single):
        assert [name for name, value in rank["shared"]["nan"].items() if not value.isnan()] == []
