"""A converted model that FSDP2 shards over two processes trains as one process with all tokens."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from miles.precision import Int4
from miles.precision.modules import convert_
from tests.distributed import gloo
from tests.models import tiny, token_batch

WORLD = 2
SIZES = {"moe_intermediate_size": 16}


def build(checkpointing: bool):
    model = tiny("qwen3_moe", **SIZES).train()
    assert convert_(model, [("*", Int4(group_size=8))]).converted
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def train(model, ranks: list[int]):
    """Losses of three steps, two micro-batches each, and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for turn in range(3):
        optimizer.zero_grad()
        for seed in (2 * turn, 2 * turn + 1):
            input_ids = token_batch(4, seed=seed)
            for rank in ranks:
                logits = model(input_ids[2 * rank : 2 * rank + 2]).logits.float()
                loss = logits.log_softmax(-1)[..., 3].mean() / len(ranks)
                loss.backward()
                losses.append(loss.detach() * len(ranks))
        optimizer.step()
    return torch.stack(losses), {n: _whole(p) for n, p in model.named_parameters()}


def _whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def sharded(checkpointing: bool):
    model = build(checkpointing)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return train(model, [dist.get_rank()])


def both(_: None):
    return {checkpointing: sharded(checkpointing) for checkpointing in (False, True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return gloo.run(both, WORLD, tmp_path_factory.mktemp("fsdp"), None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_int4_training_under_fsdp2_is_that_of_one_process(results, checkpointing):
    losses, parameters = train(build(checkpointing=False), [0, 1])
    start = dict(build(checkpointing=False).named_parameters())
    for rank in range(WORLD):
        found, after = results[rank][checkpointing]
        torch.testing.assert_close(found, losses[rank::2], rtol=1e-5, atol=1e-6)
        for name, value in parameters.items():
            torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(start[name], parameters[name]) for name in start)
