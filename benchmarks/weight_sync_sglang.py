"""Weights into a real SGLang server: ours beside SGLang's own client and checkpoint-engine.

    python benchmarks/weight_sync_sglang.py --server-site ~/site --model qwen3-8b

One server with random weights (`--load-format dummy`) takes bf16 tensors of the same shapes, from
`SGLangSyncer(via="cuda_ipc")` where it may read them in place and in buckets, then in buckets of
the same sizes from two others, in processes that have SGLang: `FlattenedTensorBucket` and
`MultiprocessingSerializer`, one bucket after the other, as trainers use them; and the
`ParameterServer` of checkpoint-engine, which keeps weights in pinned host memory, to which a
trainer's are copied first (`gather`). All pause the server, empty its cache, and let it go on. The
trainer's weights have an allocation each, as transformers loads them, or lie in one, where
`pack_parameters_` moved them; for buckets that makes no difference.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import tyro
from weight_sync import MODELS, Shape, shapes

from miles.rollout import SGLangServer
from miles.sync import SGLangSyncer, _sglang_slabs, pack_parameters_, sglang

FLAGS = [
    "--skip-tokenizer-init", "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--disable-cuda-graph", "--weight-version", "0",
    "--load-format", "dummy",
]  # fmt: skip
RIVALS = {"SGLang": "rival_sglang_sync.py", "checkpoint-engine": "rival_checkpoint_engine.py"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Ours beside SGLang's client."""

    server_site: str
    """PYTHONPATH of the server, and of its client."""
    model: str = "qwen3-8b"
    """Whose weights, of `weight_sync.MODELS`."""
    bucket_mb: tuple[int, ...] = (1024,)
    """Sizes of a bucket, in MiB; in place, the first alone, for what is not read there."""
    allocation_mb: tuple[int, ...] = ()
    """Read weights in place of allocations of these sizes as well, whether or not that is worth
    their opening."""
    calls: tuple[int, ...] = ()
    """Push through buckets with so many calls under way at a time as well."""
    checkpoint_engine: bool = True
    """Also measure it, with buckets of the first size; the server's site has to hold it."""
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


@dataclass(frozen=True)
class Job:
    """Pushes to a server."""

    url: str
    model: Shape
    bucket_mb: int
    pushes: int
    first: int
    """Version."""


def laid_out(model: Shape, pool_mb: int | None) -> dict[str, torch.Tensor]:
    """A trainer's weights: packed (None), or in allocations of at least so many MiB each."""
    sizes = {name: torch.Size(shape) for name, shape in shapes(model)}
    weights: dict[str, torch.Tensor] = {}
    group: list[str] = []
    for name in sizes:
        group.append(name)
        count = sum(sizes[one].numel() for one in group)
        if 2 * count < (pool_mb or 0) << 20 and name != list(sizes)[-1]:
            continue
        pool = torch.empty(count, dtype=torch.bfloat16, device="cuda").normal_()
        parts = pool.split([sizes[one].numel() for one in group])
        weights |= {one: part.view(sizes[one]) for one, part in zip(group, parts, strict=True)}
        group = []
    if pool_mb is not None:
        return weights
    parameters = torch.nn.ParameterList(weights.values())
    pack_parameters_(parameters)
    return {name: p.detach() for name, p in zip(sizes, parameters, strict=True)}


def ours(
    job: Job,
    *,
    pool_mb: int | None = 0,
    per_call: float = sglang.PER_CALL,
    depth: int = sglang.DEPTH,
    in_place: bool | None = None,
) -> list[dict[str, float]]:
    """Of weights so laid out, and with such settings of what `miles` has as constants."""
    weights = laid_out(job.model, pool_mb)
    found = []
    with (
        mock.patch.object(sglang, "PER_CALL", per_call),
        mock.patch.object(sglang, "DEPTH", depth),
        mock.patch.object(_sglang_slabs, "DEPTH", depth),
        closing(SGLangSyncer(job.url, bucket_bytes=job.bucket_mb << 20, in_place=in_place)) as it,
    ):
        for version in range(job.first, job.first + job.pushes):
            report = it.push(weights.items(), version=version)
            found.append(dict(report.phases) | {"seconds": report.seconds})
    del weights
    torch.cuda.empty_cache()
    return found


def rival(job: Job, script: str, site: str) -> list[dict[str, float]]:
    """Seconds that a script beside this one prints, with the server's packages."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        told = {"url": job.url, "shapes": list(shapes(job.model)), "first": job.first,
                "bucket_bytes": job.bucket_mb << 20, "pushes": job.pushes}  # fmt: skip
        file.write_text(json.dumps(told))
        environment = [
            f"PYTHONPATH={Path(site).expanduser().resolve()}",
            "RANK=0", "WORLD_SIZE=1", f"PS_MAX_BUCKET_SIZE_GB={job.bucket_mb / 1024}",
        ]  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name(script)), str(file)]
        done = subprocess.run(
            ["env", *environment, *command], stdout=subprocess.PIPE, text=True, check=True
        )
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


def ways(config: Config) -> Iterator[tuple[str, int, Callable[[Job], list[dict[str, float]]]]]:
    """Who pushes, in buckets of so many MiB, and how."""
    first = config.bucket_mb[0]
    yield "miles, in place of one allocation", first, partial(ours, pool_mb=None)
    yield "miles, in place of own allocations", first, ours
    for size in config.allocation_mb:
        which = f"allocations of {size} MiB" if size else "own allocations, small ones too"
        who = f"miles, in place of {which}"
        yield who, first, partial(ours, pool_mb=size, per_call=math.inf)
    for size in config.bucket_mb:
        yield "miles", size, partial(ours, in_place=False)
        for depth in config.calls:
            who = f"miles, {depth} calls at a time"
            yield who, size, partial(ours, in_place=False, depth=depth)
        for who, script in RIVALS.items():
            if who == "SGLang" or (config.checkpoint_engine and size == first):
                yield who, size, partial(rival, script=script, site=config.server_site)


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
            for who, size, push in ways(config):
                times = push(Job(server.url, model, size, count, first))
                add(row(who, config, size, times), config.out)
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
