"""The log-prob gap between an SGLang server with FP8 weights and trainers in bf16 and in FP8.

    python benchmarks/precision_sglang.py --device cuda --server-site ~/site

A Qwen3 with random weights is converted and exported; a real SGLang server loads the directory as
its config says and samples answers at temperature 1; then the model scores them twice on the same
device: with its bf16 weights, as a trainer that knows nothing of the engine's rounding, and as it
was converted, whose weights are bit for bit the server's.
"""

from __future__ import annotations

import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import routing_sglang as server
import torch
import transformers
import tyro
from routing import append, environment
from torch import Tensor

from miles.losses import token_logprobs
from miles.precision import BlockFP8, convert_, high_precision, save, verify_parity
from miles.rollout import Sample, TrainBatch, collate


@dataclass(frozen=True, kw_only=True)
class Config:
    """SGLang in FP8 against trainers in bf16 and FP8."""

    device: str = "cuda"
    """Where the trainer runs; a server always takes the GPU."""
    server_site: str = ""
    """Folder with SGLang and what it needs, for the server alone."""
    port: int = 30_000
    """The server's port."""
    server_seconds: float = 300
    """How long the server may take to start, and then for its first answer."""
    scale: Literal["fp32", "ue8m0"] = "fp32"
    """Of the weights' scales."""
    profiles: tuple[Literal["te", "deepgemm", "sglang", "vllm", "hf"], ...] = ("sglang", "te")
    """Ways to round the trainer's activations, each compared."""
    layers: int = 12
    """Layers of the model."""
    hidden: int = 1024
    """Its width."""
    vocabulary: int = 4096
    """Tokens there are."""
    logits_std: float = 2.5
    """Spread of the next-token logits."""
    prompts: int = 64
    """Requests, all at once; each prompt has 32 to 128 tokens."""
    answer_tokens: int = 64
    """Tokens of each answer."""
    out: Path = Path("benchmarks/results/precision_sglang.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def build(config: Config) -> Any:
    model_config = transformers.Qwen3Config(
        vocab_size=config.vocabulary, hidden_size=config.hidden,
        intermediate_size=3 * config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 128, num_key_value_heads=config.hidden // 256,
        head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(model_config)
    gains = {"lm_head.weight": config.logits_std, "embed_tokens.weight": math.sqrt(config.hidden)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
                weight.normal_(0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    return model.to(torch.bfloat16).to(config.device).eval()


def answers_of(config: Config, folder: str, prompts: list[list[int]]) -> list[Sample]:
    bodies = [server.request(prompt, config.answer_tokens) for prompt in prompts]
    for body in bodies:
        del body["return_routed_experts"]
    pool = ThreadPoolExecutor(len(prompts))
    with pool, server.sglang(config, folder, "--quantization", "fp8") as url:
        calls = [pool.submit(server.ask, url, body, timeout=300) for body in bodies]
        answers = [call.result() for call in calls]
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        triples = answer["meta_info"]["output_token_logprobs"]
        sample = Sample(tokens=prompt)
        sample.append(
            [int(token) for _, token, *_ in triples],
            logprobs=[float(triple[0]) for triple in triples],
            weight_version=0,
        )
        samples.append(sample)
    return samples


@torch.no_grad()
def gap_of(model: Any, batch: TrainBatch) -> Tensor:
    """float64: trainer minus engine at every answered token."""
    out = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
    logprobs_T = token_logprobs(out.logits.flatten(0, 1), batch.targets_T)
    gap_T = logprobs_T.double() - batch.rollout_logprobs_T.double()
    return gap_T[batch.packed.mask_T].cpu()


def summary(gap: Tensor) -> dict[str, Any]:
    size = gap.abs()
    return {
        "tokens": len(gap),
        "mean": f"{float(size.mean()):.3e}",
        "p99": f"{float(size.quantile(0.99)):.3e}",
        "max": f"{float(size.max()):.3e}",
        "k3": f"{float((gap.expm1() - gap).mean()):.3e}",
    }


def main(config: Config) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 129, (config.prompts,), generator=generator).tolist()
    prompts = [
        torch.randint(1, config.vocabulary, (length,), generator=generator).tolist()
        for length in lengths
    ]
    model = build(config)
    report = convert_(model, [("*", BlockFP8(scale=config.scale, profile=config.profiles[0]))])
    server.say(report.table().splitlines()[-1])
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        save(model, folder)
        verify_parity(model, folder)
        samples = answers_of(config, folder, prompts)
    batches = [collate(samples[i : i + 16]).to(config.device) for i in range(0, len(samples), 16)]
    rows = []
    with high_precision(model):
        rows.append({"trainer": "bf16"} | summary(torch.cat([gap_of(model, b) for b in batches])))
    for profile in config.profiles:
        other = build(config)
        convert_(other, [("*", BlockFP8(scale=config.scale, profile=profile))])
        gap = torch.cat([gap_of(other, batch) for batch in batches])
        rows.append({"trainer": f"FP8, activations as {profile}"} | summary(gap))
    for row in rows:
        server.say(", ".join(f"{key} {value}" for key, value in row.items()))
    common = environment(config.device, config.commit) | {
        "engine": server.sglang_version(config), "scale": config.scale, "layers": config.layers,
        "hidden": config.hidden,
    }  # fmt: skip
    append(config.out, [common | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Config))
