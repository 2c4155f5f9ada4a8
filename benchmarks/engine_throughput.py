"""Tokens per second of `HFEngine` and of `transformers.generate`, at mixed answer lengths.

    python benchmarks/engine_throughput.py
    python benchmarks/engine_throughput.py --device cuda --model smollm2

64 requests whose answers have lengths drawn evenly from 1:8 (the longest is eight times the
shortest). The rival is one call of `generate` over the padded batch of all 64, sampling at
temperature 1, which has to run until the longest answer is there; what is counted, for both, is the
tokens that were asked for. The engine also returns log-probs (and the routing, for a
mixture-of-experts model), which `generate` is not asked for. The medians go to a CSV and a table.
"""

from __future__ import annotations

import csv
import datetime
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro

from miles.rollout import HFEngine, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """HFEngine against transformers.generate."""

    model: Literal["qwen3_moe", "llama", "smollm2"] = "qwen3_moe"
    """Two random models of about six million parameters, or SmolLM2-135M-Instruct."""
    device: str = "cpu"
    """Where both run."""
    num_requests: int = 64
    """Requests, all there from the start."""
    longest: int = 128
    """Tokens of the longest answers; the shortest have an eighth."""
    max_batch: tuple[int, ...] = (16, 32, 64)
    """Slots of the engine, one run for each."""
    repeats: int = 5
    """Timed runs of each, after one that is not."""
    num_threads: int = 2
    """CPU threads of both."""
    out: Path = Path("benchmarks/results/engine_throughput.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def build(name: str) -> Any:
    if name == "smollm2":
        from grpo_smollm2 import load_smollm2

        return load_smollm2()[0]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 384,
        "head_dim": 32,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes | experts))


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    model = build(config.model).to(config.device, dtype).eval()
    rng = random.Random(0)
    lengths = [rng.randint(config.longest // 8, config.longest) for _ in range(config.num_requests)]
    prompts = [
        [rng.randrange(1, model.config.vocab_size) for _ in range(rng.randint(8, 64))]
        for _ in range(config.num_requests)
    ]

    def rival() -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=config.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=config.device
        )
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0,
            max_new_tokens=max(lengths), min_new_tokens=max(lengths), pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == width + max(lengths)

    def ours(engine: HFEngine) -> None:
        futures = [
            engine.submit(p, SamplingParams(max_new_tokens=n, seed=i, ignore_eos=True))
            for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]
        assert [len(f.result().response_tokens) for f in futures] == lengths

    runs: dict[str, Any] = {"transformers.generate": rival}
    for slots in config.max_batch:
        engine = HFEngine(model, max_batch=slots)
        runs[f"HFEngine max_batch={slots}"] = lambda engine=engine: ours(engine)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(config.repeats + 1):
        for name, run in runs.items():  # interleaved, so that a busy machine hits all alike
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    report(config, dtype, sum(lengths), seconds)


def current_commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def report(
    config: Config, dtype: torch.dtype, num_tokens: int, seconds: dict[str, list[float]]
) -> None:
    on_gpu = config.device == "cuda"
    hardware = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} CPU, {config.num_threads} threads"
    )
    common = {
        "date": datetime.date.today().isoformat(), "hardware": hardware, "torch": torch.__version__,
        "transformers": transformers.__version__, "model": config.model, "dtype": str(dtype),
        "requests": config.num_requests, "tokens": num_tokens,
        "commit": config.commit or current_commit(),
    }  # fmt: skip
    base = statistics.median(seconds["transformers.generate"])
    print(f"{config.model}, {hardware}, {num_tokens} tokens of {config.num_requests} requests")
    print("| engine | seconds, median (p20 to p80) | times generate |\n|---|---|---|")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    new = not config.out.exists()
    with config.out.open("a", newline="") as file:
        writer = csv.DictWriter(
            file,
            [*common, "engine", "seconds", "p20", "p80", "tokens_per_second", "times_generate"],
        )
        if new:
            writer.writeheader()
        for name, values in seconds.items():
            median = statistics.median(values)
            p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
            print(f"| {name} | {median:.3f} ({p20:.3f} to {p80:.3f}) | {base / median:.2f} |")
            writer.writerow(
                common | {
                    "engine": name,
                    "seconds": round(median, 4), "p20": round(p20, 4), "p80": round(p80, 4),
                    "tokens_per_second": round(num_tokens / median),
                    "times_generate": round(base / median, 3),
                }
            )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config))
