"""Converted models that FSDP2 shards over two GPUs train as one GPU with all tokens."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from miles.precision import BlockFP8, Int4
from miles.precision.modules import convert_
from tests.models import tiny, token_batch

WORLD = 2
RECIPES = {"fp8": BlockFP8(), "int4": Int4()}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 64,
    "initializer_range": 0.05,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES = [
    (family, recipe, checkpointing)
    for family in ("llama", "qwen3_moe")
    for recipe in RECIPES
    for checkpointing in (False, True)
]


def build(family: str, recipe: str, checkpointing: bool):
    extra = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    model = tiny(family, dtype=torch.bfloat16, **SIZES | extra).train().cuda()
    model.set_attn_implementation("eager")
    report = convert_(model, [("*", RECIPES[recipe])])
    assert len(report.converted) >= 8, report
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def train(model, ranks: list[int]) -> dict[str, torch.Tensor]:
    """Losses of three steps of two micro-batches, and the gradients of the first step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses, gradients = [], {}
    for turn in range(3):
        optimizer.zero_grad()
        for seed in (2 * turn, 2 * turn + 1):
            input_ids = token_batch(4, length=64, seed=seed).cuda()
            for rank in ranks:
                logits = model(input_ids[2 * rank : 2 * rank + 2]).logits.float()
                loss = logits.log_softmax(-1)[..., 3].mean() / len(ranks)
                loss.backward()
                losses.append(loss.detach().cpu() * len(ranks))
        if not gradients:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
    return {"losses": torch.stack(losses)} | gradients


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().clone()


def sharded(rank: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=WORLD)
    try:
        for family, recipe, checkpointing in CASES:
            model = build(family, recipe, checkpointing)
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            found = train(model, [rank])
            torch.save(found, folder / f"{rank}-{family}-{recipe}-{checkpointing}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA devices")
def test_training_under_fsdp2_and_nccl_is_that_of_one_gpu(tmp_path):
    mp.spawn(sharded, (tmp_path,), nprocs=WORLD)
    for family, recipe, checkpointing in CASES:
        expected = train(build(family, recipe, checkpointing=False), [0, 1])
        for rank in range(WORLD):
            found = torch.load(tmp_path / f"{rank}-{family}-{recipe}-{checkpointing}.pt")
            case = (family, recipe, checkpointing, rank)
            losses, those = found.pop("losses"), expected["losses"][rank::2]
            assert torch.equal(losses[:2], those[:2]), case  # those of the first step, to the bit
            assert float((losses - those).abs().max()) < 5e-2, case
            assert found.keys() == expected.keys() - {"losses"}
            for name, gradient in found.items():
                apart = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
                assert float(apart) < 3e-2, (case, name, apart)
