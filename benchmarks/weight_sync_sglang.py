"""Weights into a real SGLang server: ours beside SGLang's own flattened-bucket client.

    python benchmarks/weight_sync_sglang.py --server-site ~/site --model qwen3-8b

One server with random weights (`--load-format dummy`) takes the same bf16 tensors, from
`SGLangSyncer(via="cuda_ipc")` where it may read them in place and in buckets, then in buckets of
the same sizes from SGLang's `FlattenedTensorBucket` and `MultiprocessingSerializer` in a process
that has SGLang, one bucket after the other, as trainers use them. Both pause the server, empty its
cache, and let it go on. The trainer's weights lie in one allocation, as a Megatron trainer's do, or
each in one of its own, as transformers loads them; for buckets that makes no difference.
"""

from __future__ import annotations

import csv
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from weight_sync import MODELS, Shape, shapes

from miles.rollout import SGLangServer
from miles.sync import SGLangSyncer

FLAGS = [
    "--skip-tokenizer-init", "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--disable-cuda-graph", "--weight-version", "0",
    "--load-format", "dummy",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Ours beside SGLang's client."""

    server_site: str
    """PYTHONPATH of the server, and of its client."""
    model: str = "qwen3-8b"
    """Whose weights, of `weight_sync.MODELS`."""
    bucket_mb: tuple[int, ...] = (512,)
    """Sizes of a bucket, in MiB; in place, the first alone, for what is not read there."""
    pushes: int = 8
    """Timed, after two others."""
    memory: float = 0.5
    """The server's share of the GPU."""
    start_seconds: float = 400
    """How long it may take to start."""
    commit: str = ""
    """What is measured."""
    out: Path = Path("benchmarks/results/weight_sync_sglang.csv")
    """The CSV, to which rows are added."""


def hf_config(model: Shape) -> transformers.PretrainedConfig:
    common = {
        "vocab_size": model.vocabulary, "hidden_size": model.hidden,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads, "head_dim": 128, "max_position_embeddings": 4096,
        "tie_word_embeddings": model.tied, "eos_token_id": None, "bos_token_id": None,
        "dtype": "bfloat16",
    }  # fmt: skip
    if not model.experts:
        return transformers.Qwen3Config(
            intermediate_size=model.inner, architectures=["Qwen3ForCausalLM"], **common
        )
    return transformers.Qwen3MoeConfig(
        intermediate_size=model.hidden * 3, moe_intermediate_size=model.inner,
        num_experts=model.experts, num_experts_per_tok=8, norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"], **common,
    )  # fmt: skip


def laid_out(model: Shape, layout: str) -> dict[str, torch.Tensor]:
    """A trainer's weights."""
    sizes = {name: torch.Size(shape) for name, shape in shapes(model)}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    if layout == "own allocations":
        return {name: torch.randn(size, **options) for name, size in sizes.items()}
    pool = torch.empty(sum(size.numel() for size in sizes.values()), **options).normal_()
    parts = pool.split([size.numel() for size in sizes.values()])
    return {n: part.view(size) for (n, size), part in zip(sizes.items(), parts, strict=True)}


def ours(
    url: str, model: Shape, bucket_mb: int, pushes: int, first: int, layout: str = ""
) -> list[dict[str, float]]:
    """In place if a layout is given, else in buckets."""
    weights = laid_out(model, layout or "one allocation")
    syncer = SGLangSyncer(url, via="cuda_ipc", bucket_bytes=bucket_mb << 20, in_place=bool(layout))
    found = []
    for version in range(first, first + pushes):
        report = syncer.push(weights.items(), version=version)
        found.append(dict(report.phases) | {"seconds": report.seconds})
    syncer.close()
    del weights
    torch.cuda.empty_cache()
    return found


def rival(
    url: str, model: Shape, bucket_mb: int, pushes: int, first: int, site: str
) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        job = {"url": url, "shapes": list(shapes(model)), "bucket_bytes": bucket_mb << 20,
               "pushes": pushes, "first": first}  # fmt: skip
        file.write_text(json.dumps(job))
        script = Path(__file__).with_name("rival_sglang_sync.py")
        path = f"PYTHONPATH={Path(site).expanduser().resolve()}"
        command = ["env", path, sys.executable, str(script), str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(who: str, config: Config, bucket_mb: int, times: list[dict[str, float]]) -> dict[str, Any]:
    timed = times[2:]
    seconds = sorted(one["seconds"] for one in timed)
    nbytes = sum(2 * torch.Size(shape).numel() for _, shape in shapes(MODELS[config.model]))
    median = statistics.median(seconds)
    made = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "commit": config.commit, "client": who,
        "model": config.model, "bytes": nbytes, "bucket_mb": bucket_mb,
    }  # fmt: skip
    for phase in ("gather", "load", "commit", "pause"):
        values = [1000 * one[phase] for one in timed if phase in one]
        made[f"{phase}_ms"] = f"{statistics.median(values):.1f}" if values else ""
    return made | {
        "ms": f"{1000 * median:.1f}",
        "ms_p20": f"{1000 * seconds[len(seconds) // 5]:.1f}",
        "ms_p80": f"{1000 * seconds[len(seconds) * 4 // 5]:.1f}",
        "gb_s": f"{nbytes / median / 1e9:.1f}",
    }


def main(config: Config) -> None:
    model = MODELS[config.model]
    with tempfile.TemporaryDirectory() as folder:
        hf_config(model).save_pretrained(folder)
        site = str(Path(config.server_site).expanduser().resolve())
        start = time.perf_counter()
        with SGLangServer(
            folder, args=[*FLAGS, "--mem-fraction-static", str(config.memory)],
            env={"PYTHONPATH": site}, cwd=folder, start_timeout=config.start_seconds,
        ) as server:  # fmt: skip
            print(f"the server is up after {time.perf_counter() - start:.0f} s", flush=True)
            first, count = 1, config.pushes + 2
            in_place = [
                (f"miles, in place of {layout}", lambda *a, layout=layout: ours(*a, layout))
                for layout in ("one allocation", "own allocations")
            ]
            buckets = [("miles", ours), ("SGLang", lambda *a: rival(*a, config.server_site))]
            for number, bucket_mb in enumerate(config.bucket_mb):
                for who, push in buckets if number else in_place + buckets:
                    times = push(server.url, model, bucket_mb, count, first)
                    add(row(who, config, bucket_mb, times), config.out)
                    first += count


def add(made: dict[str, Any], out: Path) -> None:
    print(made, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, made, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(made)


if __name__ == "__main__":
    main(tyro.cli(Config))
