"""Replay in a model that FSDP2 shards over two processes, against one process with all tokens."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from miles.moe import RoutingReplay
from tests.distributed import gloo
from tests.models import tiny, token_batch
from tests.moe.plans import gradients, random_plan, weighted, with_holes

WORLD = 2


def micro_batches(replay: RoutingReplay):
    """Two micro-batches of four sequences, of which each of two ranks takes two."""
    full = random_plan(replay, 4 * 7, seed=1)
    return [
        (token_batch(4, seed=1), full),
        (token_batch(4, seed=2), with_holes(random_plan(replay, 4 * 7, seed=2), every=5)),
    ]


def train(model, ranks: list[int], checkpointing: bool):
    """Both forward passes, then both backward passes; what each rank has of the mean gradient."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    replay = RoutingReplay(model)
    losses, recorded = [], []
    for input_ids, tape in micro_batches(replay):
        parts = [(input_ids[2 * r : 2 * r + 2], tape[14 * r : 14 * r + 14]) for r in ranks]
        for ids, rows in parts:
            with replay.record() as used, replay.replay(rows, "natural"):
                losses.append(weighted(model(ids).logits) / WORLD)
            recorded.append(used.expert_ids)
    for loss in losses:
        loss.backward()
    return gradients(model), torch.cat(recorded)


def sharded(everything: bool, checkpointing: bool):
    model = tiny("qwen3_moe", dtype=torch.float64)
    for layer in model.model.layers:
        if everything:
            fully_shard(layer.mlp.gate)  # gives the router a class of another name
        fully_shard(layer)
    fully_shard(model)
    found, recorded = train(model, [dist.get_rank()], checkpointing)
    assert everything == (type(model.model.layers[0].mlp.gate).__name__[:4] == "FSDP")
    # FSDP averages over ranks, and each loss is divided by their number already.
    return {n: WORLD * g.full_tensor() for n, g in found.items()}, recorded


def both(_: None):
    return {(e, c): sharded(e, c) for e in (False, True) for c in (False, True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return gloo.run(both, WORLD, tmp_path_factory.mktemp("fsdp"), None)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_fsdp2_are_those_of_one_process(results, everything, checkpointing):
    expected, _ = train(tiny("qwen3_moe", dtype=torch.float64), [0, 1], checkpointing=False)
    for rank in range(WORLD):
        found, _ = results[rank][everything, checkpointing]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_each_rank_replays_its_own_rows(results):
    _, whole = train(tiny("qwen3_moe", dtype=torch.float64), [0, 1], checkpointing=False)
    first, second = (results[rank][True, True][1] for rank in range(WORLD))
    assert torch.equal(torch.cat([first[:14], second[:14], first[14:], second[14:]]), whole)
    assert not torch.equal(first, second)
