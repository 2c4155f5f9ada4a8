"""Weights from a trainer's process to an engine's, beside a copy in the same run.

    python benchmarks/weight_sync.py --commit $(git rev-parse --short HEAD)
    python benchmarks/weight_sync.py --carriers shm --models qwen3-0.6b    # without a GPU

The tensors are those of Qwen3-1.7B, 8B and 30B-A3B in bf16, by their names in a checkpoint: 4, 16
and 61 GB in 311, 399 and 18,867 tensors. The trainer's are views of a pool of 2 GB, so that the
largest fits on one H200 with the engine's two copies.

A sync that checks what arrived cannot be as fast as a copy: the bytes are copied once (`direct`) or
twice (`slab`), the sender's checksums come with its copy, and the receiver reads all once more for
its own. `of_copy` is the whole push beside one copy of the bytes; `of_traffic` beside copies that
read and write as many bytes in all, 1.5 of them or 2.5.
"""

from __future__ import annotations

import csv
import datetime
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from miles.sync import (
    CudaIpcReceiver,
    CudaIpcSyncer,
    SharedMemoryReceiver,
    SharedMemorySyncer,
    SyncReport,
)

POOL_BYTES = 1 << 31
PASSES = {"direct": 1.5, "slab": 2.5, "shm": 1.5}
"""Copies' worth of memory traffic: each copy 1, each reading half."""
PHASES = ("gather", "send", "load", "commit", "pause")
Carrier = Literal["direct", "slab", "shm"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a Qwen3 the shapes of its weights follow from."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False
    vocabulary: int = 151_936


MODELS = {
    "qwen3-0.6b": Shape(layers=28, hidden=1024, inner=3072, heads=16, kv_heads=8, tied=True),
    "qwen3-1.7b": Shape(layers=28, hidden=2048, inner=6144, heads=16, kv_heads=8),
    "qwen3-8b": Shape(layers=36, hidden=4096, inner=12_288, heads=32, kv_heads=8),
    "qwen3-30b-a3b": Shape(layers=48, hidden=2048, inner=768, heads=32, kv_heads=4, experts=128),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Carriers beside a copy."""

    commit: str = ""
    """What is measured."""
    models: tuple[str, ...] = ("qwen3-1.7b", "qwen3-8b", "qwen3-30b-a3b")
    """Whose weights."""
    carriers: tuple[Carrier, ...] = ("direct", "slab")
    """CUDA IPC into the receiver's memory, through the sender's slab, or shared memory on CPU."""
    bucket_mb: tuple[int, ...] = (256,)
    """Sizes of a bucket, in MiB."""
    pushes: int = 10
    """Timed, after three others."""
    out: Path = Path("benchmarks/results/weight_sync.csv")
    """The CSV, to which rows are added."""


def shapes(model: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint."""
    h, i, d = model.hidden, model.inner, 128
    yield "model.embed_tokens.weight", (model.vocabulary, h)
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (model.heads * d, h)
        yield f"{at}.self_attn.k_proj.weight", (model.kv_heads * d, h)
        yield f"{at}.self_attn.v_proj.weight", (model.kv_heads * d, h)
        yield f"{at}.self_attn.o_proj.weight", (h, model.heads * d)
        yield f"{at}.self_attn.q_norm.weight", (d,)
        yield f"{at}.self_attn.k_norm.weight", (d,)
        if model.experts:
            yield f"{at}.mlp.gate.weight", (model.experts, h)
        blocks = [f"experts.{e}." for e in range(model.experts)] or [""]
        for block in blocks:
            yield f"{at}.mlp.{block}gate_proj.weight", (i, h)
            yield f"{at}.mlp.{block}up_proj.weight", (i, h)
            yield f"{at}.mlp.{block}down_proj.weight", (h, i)
        yield f"{at}.input_layernorm.weight", (h,)
        yield f"{at}.post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    if not model.tied:
        yield "lm_head.weight", (model.vocabulary, h)


def trainer(model: Shape, device: str) -> dict[str, Tensor]:
    """Tensors that lie one after the other in a pool, from the start again when it is full."""
    pool = torch.randn(POOL_BYTES // 2, dtype=torch.bfloat16, device=device)
    found, at = {}, 0
    for name, shape in shapes(model):
        count = torch.Size(shape).numel()
        at = at if at + count <= pool.numel() else 0
        found[name] = pool[at : at + count].view(shape)
        at += -(-count // 256) * 256
    return found


class Engine:
    """Serves tensors, and does nothing with them."""

    def __init__(self, model: Shape, device: str) -> None:
        self.live: Mapping[str, Tensor] = {
            name: torch.empty(shape, dtype=torch.bfloat16, device=device)
            for name, shape in shapes(model)
        }
        self.weight_version = 0

    def weight_tensors(self) -> Mapping[str, Tensor]:
        return self.live

    def commit_weights(
        self, tensors: Mapping[str, Tensor], *, version: int, alias: bool = False
    ) -> None:
        assert alias
        self.live, self.weight_version = dict(tensors), version


def serve(address: str, carrier: Carrier, model: str, pipe: Connection) -> None:
    """The engine's process, until the other one hangs up."""
    device = "cpu" if carrier == "shm" else "cuda"
    engine = Engine(MODELS[model], device)
    if carrier == "shm":
        receiver: Any = SharedMemoryReceiver(engine, address)
    else:
        receiver = CudaIpcReceiver(engine, address, direct=carrier == "direct")
    pipe.send("ready")
    pipe.recv()
    sums = {n: t.view(torch.int16).sum().item() for n, t in list(engine.live.items())[:100]}
    pipe.send(sums)
    receiver.close()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: str, repeats: int = 10) -> float:
    """GB/s of payload of a plain copy."""
    source = torch.ones(POOL_BYTES // 4, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            out.copy_(source)
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return source.nbytes / statistics.median(times[2:]) / 1e9


def measure(carrier: Carrier, model: str, bucket_mb: int, pushes: int) -> dict[str, Any]:
    """One row."""
    device = "cpu" if carrier == "shm" else "cuda"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/weights"
        pipe, theirs = context.Pipe()
        child = context.Process(target=serve, args=(address, carrier, model, theirs), daemon=True)
        child.start()
        theirs.close()
        assert pipe.recv() == "ready"
        weights = trainer(MODELS[model], device)
        if carrier == "shm":
            syncer: Any = SharedMemorySyncer(address)
        else:
            syncer = CudaIpcSyncer(address, bucket_bytes=bucket_mb << 20)
        reports: list[SyncReport] = []
        for version in range(1, pushes + 4):
            synchronize(device)
            reports.append(syncer.push(weights.items(), version=version))
        pipe.send("sums")
        for name, value in pipe.recv().items():
            assert weights[name].view(torch.int16).sum().item() == value, name
        syncer.close()
        child.join(60)
    copy = copy_rate(device)
    timed = reports[3:]
    seconds = sorted(report.seconds for report in timed)
    median = statistics.median(seconds)
    rate = timed[0].num_bytes / median / 1e9
    row = {
        "carrier": {"shm": "shared memory"}.get(carrier, f"CUDA IPC, {carrier}"),
        "model": model,
        "bytes": timed[0].num_bytes,
        "tensors": timed[0].num_tensors,
        "bucket_mb": "" if carrier == "shm" else bucket_mb,
        "buckets": timed[0].num_buckets or "",
    }
    for phase in PHASES:
        values = [report.phases[phase] for report in timed if phase in report.phases]
        row[f"{phase}_ms"] = f"{1000 * statistics.median(values):.3f}" if values else ""
    return row | {
        "ms": f"{1000 * median:.3f}",
        "ms_p20": f"{1000 * seconds[len(seconds) // 5]:.3f}",
        "ms_p80": f"{1000 * seconds[len(seconds) * 4 // 5]:.3f}",
        "gb_s": f"{rate:.1f}",
        "copy_gb_s": f"{copy:.1f}",
        "of_copy": f"{rate / copy:.3f}",
        "of_traffic": f"{rate / copy * PASSES[carrier]:.3f}",
    }


def main(config: Config) -> None:
    cuda = torch.cuda.is_available() and "shm" not in config.carriers
    common = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": config.commit,
    }
    for model in config.models:
        for carrier in config.carriers:
            for bucket_mb in config.bucket_mb if carrier != "shm" else (0,):
                row = common | measure(carrier, model, bucket_mb, config.pushes)
                print(*(f"{key}={value}" for key, value in row.items()))
                config.out.parent.mkdir(parents=True, exist_ok=True)
                fresh = not config.out.exists()
                with config.out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, row, lineterminator="\n")
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main(tyro.cli(Config))
