"""Corrections and readings on two and four processes equal those on one.

Each number of processes is spawned once and computes every layout; the tests compare the results.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from miles import Packed
from miles.errors import SettingError
from miles.losses.corrections import (
    MaxStaleness,
    OffPolicyNegative,
    Reject,
    Weight,
    importance_weights,
    interpolate_proximal,
    veto,
)
from miles.losses.metrics import Max, Mean, argmax_over, mismatch_metrics, reduce_metrics
from tests.distributed.gloo import run
from tests.steps import random_step, select

LAYOUTS = [(2, "data"), (2, "context"), (4, "data"), (4, "context"), (4, "both")]
SEQS = {1: [list(range(8))], 2: [[5, 0, 2], [1, 7, 3, 4, 6]], 4: [[5], [0, 2], [1], [7, 3, 4, 6]]}
WEIGHTS = {
    "token": Weight(level="token", mode="truncate", high=2.0),
    "sequence_sum": Weight(level="sequence_sum", mode="clip", low=0.3, high=3.0),
    "sequence_mean": Weight(level="sequence_mean", mode="mask", low=0.4, high=2.0),
    "none": None,
}
RULES = [
    OffPolicyNegative(delta=0.1),
    MaxStaleness(4),
    veto(0.3),
    Reject(level="token", statistic="k2", high=0.5),
]
STEP = random_step(4)
VERSIONS_T = torch.where(STEP.packed.mask_T, torch.arange(STEP.packed.num_positions) % 6, -1)


def zigzag(packed: Packed, world: int, rank: int) -> torch.Tensor:
    """Chunks `rank` and its mirror image of every sequence."""
    parts = []
    for seq in range(packed.num_seqs):
        chunks = (packed.seq_ids_T == seq).nonzero().flatten().tensor_split(2 * world)
        parts += [chunks[rank], chunks[2 * world - 1 - rank]]
    return torch.cat(parts)


def here(layout: str) -> tuple[Packed, torch.Tensor, list[int], dict, dict]:
    """This rank's part, where it lies in the step, its sequences, and both kinds of group."""
    if layout == "single":
        return STEP.packed, torch.arange(STEP.packed.num_positions), SEQS[1][0], {}, {}
    world, rank = dist.get_world_size(), dist.get_rank()
    context = {"data": 1, "context": world, "both": 2}[layout]
    seqs = SEQS[world // context][rank // context]
    packed, index_T = select(STEP.packed, seqs)
    data_group, seq_group = {}, None
    for first in range(0, world, context):  # every rank takes part in making every group
        made = dist.new_group(list(range(first, first + context)))
        seq_group = made if first <= rank < first + context else seq_group
    for offset in range(context):
        made = dist.new_group(list(range(offset, world, context)))
        data_group = {"group": made} if rank % context == offset else data_group
    if context > 1:
        shard_T = zigzag(packed, context, rank % context)
        index_T = index_T[shard_T]
        packed = replace(
            packed,
            seq_ids_T=packed.seq_ids_T[shard_T],
            mask_T=packed.mask_T[shard_T],
            positions_T=packed.positions_T[shard_T],
            seq_group=seq_group,
        )
    return packed, index_T, seqs, data_group, {"group": dist.group.WORLD}


def compute(layout: str) -> dict[str, dict]:
    """`spread`: `[T]` tensors that ranks hold parts of; `shared`: readings, equal on all ranks."""
    packed, index_T, seqs, data_group, all_group = here(layout)
    old_T, rollout_T, advantages_T, versions_T = (
        x[index_T] for x in (STEP.old_T, STEP.rollout_T, STEP.advantages_T, VERSIONS_T)
    )
    spread, shared = {}, {}

    def lay_out(values_T):
        return torch.zeros(len(STEP.old_T), dtype=torch.float64).index_put((index_T,), values_T)

    evidence = {
        "advantages_T": advantages_T,
        "versions_T": versions_T,
        "current_version": 5,
        "reject": RULES,
    }
    for name, weight in WEIGHTS.items():
        normalize = None if weight is None else "mean"
        got = importance_weights(
            old_T, rollout_T, packed, weight=weight, normalize=normalize, **evidence, **data_group
        )
        spread[f"weights {name}"] = lay_out(got.weights_T)
        spread[f"keep {name}"] = lay_out(got.keep_T.double())
        shared[f"correction {name}"] = reduce_metrics(got.metrics, **all_group)
    proximal_T = interpolate_proximal(
        rollout_T, old_T, packed, versions_T=versions_T, proximal_version=4, current_version=5
    )
    spread["proximal"] = lay_out(proximal_T)

    def readings(train_T):
        metrics = mismatch_metrics(
            train_T,
            rollout_T,
            packed,
            versions_T=versions_T,
            current_version=5,
            position_buckets=(1, 3, 5),
            sample_ids_S=torch.tensor(seqs),
        )
        return reduce_metrics(metrics, **all_group)

    shared["mismatch"] = readings(old_T)
    shared["mismatch far"] = readings(rollout_T + 1000 * (old_T - rollout_T))
    shared["mismatch impossible"] = readings(torch.where(index_T == 0, -torch.inf, old_T))
    for t in STEP.packed.mask_T.nonzero().flatten().tolist():
        shared[f"nan {t}"] = readings(torch.where(index_T == t, torch.nan, old_T))
    return {"spread": spread, "shared": shared}


def refusals() -> list[str]:
    """What ranks that hold different metrics are told, and that they can go on afterwards."""
    rank, one = dist.get_rank(), torch.ones((), dtype=torch.float64)
    cases = [
        {"a": Max(one), **({"b": Max(one)} if rank == 0 else {})},
        {"a" if rank == 0 else "b": Max(one)},
        {"a": Max(one) if rank == 0 else Mean(one, one)},
    ]
    texts = []
    for metrics in cases:
        try:
            reduce_metrics(metrics, group=dist.group.WORLD)
        except SettingError as error:
            texts.append(str(error))
    texts.append(str(float(reduce_metrics({"a": Max(rank * one)}, group=dist.group.WORLD)["a"])))
    return texts


def ties() -> dict[str, torch.Tensor]:
    """The same largest value on every rank, in sequences 9, 8, ..., at position 5."""
    ones_T, rank = torch.ones(1), dist.get_rank()
    metric = argmax_over(
        ones_T,
        ones_T.bool(),
        sequences_T=torch.tensor([9 - rank]),
        positions_T=torch.tensor([5]),
    )
    return reduce_metrics({"m": metric}, group=dist.group.WORLD)


def everything(layouts: list[str]) -> dict:
    computed = {layout: compute(layout) for layout in layouts}
    return computed | {"refusals": refusals(), "ties": ties()}


@pytest.fixture(scope="module")
def single():
    return compute("single")


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    return {
        world: run(
            everything,
            world,
            tmp_path_factory.mktemp(f"world{world}"),
            [layout for number, layout in LAYOUTS if number == world],
        )
        for world in (2, 4)
    }


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def ranks(request, spawned):
    world, layout = request.param
    return [results[layout] for results in spawned[world]]


def assert_close(got, expected, name):
    torch.testing.assert_close(
        got,
        expected,
        rtol=1e-12,
        atol=1e-12,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def test_weights_keeps_and_proximal_logprobs_match(ranks, single):
    for name, expected in single["spread"].items():
        assert_close(sum(rank["spread"][name] for rank in ranks), expected, name)


def test_reduced_readings_match_on_every_rank(ranks, single):
    for name, expected in single["shared"].items():
        for rank in ranks:
            assert rank["shared"][name].keys() == expected.keys()
            assert_close(rank["shared"][name], expected, name)


def test_every_rank_has_the_same_bits(ranks):
    for name, values in ranks[0]["shared"].items():
        for rank in ranks[1:]:
            for key, value in values.items():
                other = rank["shared"][name][key]
                assert torch.equal(value, other) or (value.isnan() and other.isnan()), (name, key)


def test_what_is_compared_has_something_to_say(single):
    for name, weight in WEIGHTS.items():
        got = single["shared"][f"correction {name}"]
        kept = {key: value for key, value in got.items() if "/kept/" in key}
        assert len(kept) == len(RULES) + (weight is not None and weight.mode == "mask")
        assert 0 < got["correction/kept"] < 1 and 0 < got["correction/ess_advantage"] < 1
        assert 0 < got["correction/ess"] < 1 or weight is None
    got = single["shared"]["mismatch"]
    assert sum("/position_" in key for key in got) == 8 and sum("/age_" in key for key in got) == 10
    assert single["shared"]["mismatch far"]["mismatch/log1p_chi2_sequence"] > 800
    assert single["shared"]["mismatch impossible"]["mismatch/abs"] == math.inf


def test_a_nan_on_one_rank_is_found_by_all(ranks):
    for t in STEP.packed.mask_T.nonzero().flatten().tolist():
        for rank in ranks:
            got = rank["shared"][f"nan {t}"]
            place = [got["mismatch/ratio_max/sequence"], got["mismatch/ratio_max/position"]]
            assert place == [STEP.packed.seq_ids_T[t], STEP.packed.positions_T[t]]
            for name in (
                "abs",
                "ratio_max",
                "log1p_chi2_token",
                "log1p_chi2_sequence",
                "ppl_train",
            ):
                assert got[f"mismatch/{name}"].isnan(), (t, name)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_different_metrics_are_told_so_instead_of_hanging(spawned, world):
    for results in spawned[world]:
        *refused, largest = results["refusals"]
        assert len(refused) == 3 and float(largest) == world - 1
        assert all("metrics differ between ranks; this one has ['" in text for text in refused)


@pytest.mark.parametrize("world", [2, 4])
def test_of_equal_maxima_every_rank_names_the_first_sequence(spawned, world):
    for results in spawned[world]:
        got = {key: value.item() for key, value in results["ties"].items()}
        assert got == {"m": 1.0, "m/position": 5.0, "m/sequence": 10.0 - world}
