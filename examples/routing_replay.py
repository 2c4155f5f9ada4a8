"""Two models that disagree on routing, before and after replay.

    python examples/routing_replay.py                    # R3: the engine chose the experts
    python examples/routing_replay.py --source trainer   # R2: the trainer's own earlier pass did

A Qwen3-MoE with random weights, 8 layers of 32 experts, 4 a token. With `--source engine` a
bfloat16 copy samples, and the trainer looks at its samples in float32. With `--source trainer` the
trainer looks at them itself, and again after its routers have moved. It prints how far log-probs
are apart, and how often each layer chose the same experts. Ten seconds on two CPU cores.

Expected: replay brings the mean gap from 0.036 to 0.010 and the largest from 0.30 to 0.05 (trainer:
from 0.056 to 0.008, and from 0.45 to 0.04). Without it the layers agree less and less from the
first to the last; under it, what a layer would have chosen differs by its own rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from miles.losses import token_logprobs
from miles.moe import RoutingReplay, RoutingTape, equal_sets
from miles.rollout import HFEngine, SamplingParams, TrainBatch, collate


@dataclass(frozen=True, kw_only=True)
class Config:
    """Routing replay, from the engine or from the trainer's own earlier pass."""

    source: Literal["engine", "trainer"] = "engine"
    """Who chose the experts that are replayed."""
    num_samples: int = 32
    """Samples that the engine generates."""
    num_tokens: int = 24
    """Tokens of each."""
    update: float = 0.02
    """How far routers move between the trainer's two passes, relative to their weights."""
    seed: int = 0
    """Decides weights, prompts and samples."""


def build_model(seed: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=32, num_experts_per_tok=4, norm_topk_prob=True, initializer_range=0.1,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@torch.no_grad()
def logprobs(model: Any, batch: TrainBatch) -> Tensor:
    logits_BLV = model(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    return token_logprobs(logits_BLV.flatten(0, 1), batch.targets_T)


def main(config: Config) -> tuple[list[Tensor], list[Tensor]]:
    # Samples of a bfloat16 engine, each with the experts that it chose.
    model = build_model(config.seed)
    engine = HFEngine(build_model(config.seed).bfloat16())
    params = SamplingParams(max_new_tokens=config.num_tokens, seed=config.seed)
    prompts = torch.randint(256, (config.num_samples, 8)).tolist()
    samples = [future.result() for future in [engine.submit(p, params) for p in prompts]]
    engine.close()
    batch = collate(samples)
    assert batch.routing is not None

    replay = RoutingReplay(model)
    tape, reference_T = batch.routing, batch.rollout_logprobs_T
    if config.source == "trainer":
        with replay.record() as tape:
            reference_T = logprobs(model, batch)
        for name in replay.layers:
            weight = model.get_submodule(name).weight.data
            weight.add_(config.update * weight.std() * torch.randn_like(weight))

    with replay.record() as natural:
        natural_T = logprobs(model, batch)
    # `live` is what the router would have chosen in this very pass.
    with replay.replay(tape, required_N=batch.routing_required_T, record_natural=True) as live:
        replayed_T = logprobs(model, batch)

    trained_T = batch.packed.mask_T
    gaps = [(x - reference_T)[trained_T].abs() for x in (natural_T, replayed_T)]
    agreements = [equal_sets(tape, other).nanmean(0) for other in (natural, live)]
    show(config, tape, gaps, agreements)
    return gaps, agreements


def show(config: Config, tape: RoutingTape, gaps: list[Tensor], agreements: list[Tensor]) -> None:
    console = Console()
    table = Table(title=f"log-probs: |now - {config.source}'s|")
    for column in ("", "mean", "p99", "max"):
        table.add_column(column, justify="right")
    for name, gap in zip(("natural", "replayed"), gaps, strict=True):
        values = (gap.mean(), gap.quantile(0.99), gap.max())
        table.add_row(name, *(f"{float(value):.4f}" for value in values))
    console.print(table)
    table = Table(title=f"tokens whose experts are those of the {config.source}")
    for column in ("layer", "natural pass", "router's own choice under replay"):
        table.add_column(column, justify="right")
    for layer, shares in enumerate(zip(*agreements, strict=True)):
        table.add_row(str(layer), *(f"{float(share):.1%}" for share in shares))
    console.print(table)
    console.print(f"{len(tape)} tokens, {tape.nbytes / len(tape):.0f} bytes of routing each")


if __name__ == "__main__":
    main(tyro.cli(Config))
