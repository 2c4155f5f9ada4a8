"""Bytes a token of a routing tape, beside what SGLang sends and the least that would do.

    python benchmarks/routing_bytes.py

For each model a random routing of its shape, as SGLang's payload (int32, every layer, base64) and
as the `RoutingTape` made of it. The bound is the entropy of K experts out of E, chosen evenly and
in no order: log2 of E over K bits a layer.
"""

from __future__ import annotations

import base64
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from miles.moe import RoutingTape

MODELS = {  # decoder layers, dense layers at their beginning, experts, experts a token
    "Qwen3-30B-A3B": (48, 0, 128, 8),
    "Qwen3-235B-A22B": (94, 0, 128, 8),
    "Qwen3-Next-80B-A3B": (48, 0, 512, 10),
    "DeepSeek-V3": (61, 3, 256, 8),
    "Kimi-K2": (61, 1, 384, 8),
    "GLM-4.5-Air": (46, 1, 128, 8),
    "gpt-oss-120b": (36, 0, 128, 4),
    "MiniMax-M2": (62, 0, 256, 8),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Bytes a token of routing."""

    tokens: int = 300
    """Tokens of each routing."""
    out: Path = Path("benchmarks/results/routing_bytes.csv")
    """The CSV, written anew."""


def measure(model: str, tokens: int) -> dict[str, object]:
    layers, dense, num_experts, topk = MODELS[model]
    scores = torch.rand(tokens, layers, num_experts, generator=torch.Generator().manual_seed(0))
    ids = scores.topk(topk).indices.to(torch.int32)
    ids[:, :dense] = 0
    raw = ids.numpy().tobytes()
    payload = base64.b64encode(raw)
    tape = RoutingTape.from_sglang(
        payload,
        num_layers=layers,
        topk=topk,
        moe_layers=range(dense, layers),
        num_tokens=tokens + 1,
        num_experts=num_experts,
    )
    tape.validate(num_tokens=tokens + 1)
    bound = (layers - dense) * math.log2(math.comb(num_experts, topk)) / 8
    return {
        "model": model,
        "layers": layers,
        "moe_layers": layers - dense,
        "num_experts": num_experts,
        "topk": topk,
        "sglang_base64": round(len(payload) / tokens),
        "sglang_int32": len(raw) // tokens,
        "tape": tape.nbytes // len(tape),
        "bound": round(bound),
    }


def main(config: Config) -> None:
    rows = [measure(model, config.tokens) for model in MODELS]
    with config.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(" ".join(f"{value!s:>{18 if key == 'model' else 7}}" for key, value in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Config))
