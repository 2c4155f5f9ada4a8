"""Quantise kernels on CUDA: bytes a second, beside a copy and torchao's kernels in the same run.

    python benchmarks/quantise.py --commit $(git rev-parse --short HEAD)

Bytes are what has to move once: 2 read an element of bf16, 1 written for its code, 4 for a scale.
"""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from miles.precision import BlockFP8, quantize
from miles.precision._fp8_triton import encode

try:
    from torchao.prototype.blockwise_fp8_training import kernels as torchao
except ImportError:
    torchao = None

FIELDS = ["device", "torch", "triton", "date", "commit", "shape", "kernel", "us", "gb_s", "of_copy"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Quantise kernels against a copy."""

    commit: str = ""
    """What is measured."""
    repeats: int = 50
    """Timed calls of each kernel, in turns."""
    out: Path = Path("benchmarks/results/quantise.csv")
    """The CSV, written anew."""


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Microseconds, each call in its turn, the cache flushed between."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 5):
        for name, call in calls.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 5:
                times[name].append(1000 * start.elapsed_time(end))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def kernels(x: torch.Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Name to a call and its bytes."""
    m, k = x.shape
    out = torch.empty_like(x)
    moved = 3 * m * k
    rows, squares = moved + 4 * m * k // 128, moved + 4 * m * k // 128**2
    ue8m0 = BlockFP8(scale="ue8m0")
    found: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: out.copy_(x), 4 * m * k),
        "miles 1x128": (lambda: encode(x, BlockFP8(), "activation"), rows),
        "miles 1x128 ue8m0": (lambda: encode(x, ue8m0, "activation"), rows),
        "miles 128x128": (lambda: encode(x, BlockFP8(), "weight"), squares),
        "miles quantize() 1x128, checked": (
            lambda: quantize(x, BlockFP8(), role="activation"),
            rows,
        ),
    }
    if torchao is not None:
        found["torchao 1x128"] = (lambda: torchao.triton_fp8_blockwise_act_quant_lhs(x), rows)
        found["torchao 128x128"] = (
            lambda: torchao.triton_fp8_blockwise_weight_quant_rhs(x),
            squares,
        )
    return found


def main(config: Config) -> None:
    base = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "date": datetime.date.today().isoformat(),
        "commit": config.commit or platform.node(),
    }
    with config.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for shape in ((4096, 7168), (16384, 7168), (32768, 16384)):
            x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            found = kernels(x)
            times = medians({name: call for name, (call, _) in found.items()}, config.repeats)
            copied = found["copy"][1] / times["copy"]
            for name, (_, count) in found.items():
                rate = count / times[name]
                row = {
                    "shape": "x".join(map(str, shape)),
                    "kernel": name,
                    "us": f"{times[name]:.1f}",
                    "gb_s": f"{rate / 1000:.0f}",
                    "of_copy": f"{rate / copied:.3f}",
                }
                writer.writerow(base | row)
                print(row)


if __name__ == "__main__":
    main(tyro.cli(Config))
