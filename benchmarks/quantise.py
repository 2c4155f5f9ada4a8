"""Quantise kernels on CUDA: bytes a second, beside a copy, torchao and DeepGEMM's casts.

    python benchmarks/quantise.py --commit $(git rev-parse --short HEAD)

Bytes are what has to move once: 2 read an element of bf16, 1 written for its code, 4 for a scale. A
pair is the codes of a matrix and of its transpose, so 2 read and 2 written; who reads twice for it
is not paid for that. INT4 has groups of 32 with scales of 2 bytes: fake-quantised weights are 2
read and 2 written, codes 1 written, packed codes a half.
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

from miles.precision import BlockFP8, Int4, _int4, _int4_triton, fake_quantize, quantize
from miles.precision._fp8_triton import encode, encode_pair
from miles.precision.quantize import quantize_pair

try:
    from torchao.prototype.blockwise_fp8_training import kernels as torchao
except ImportError:
    torchao = None
try:
    from deep_gemm.utils import math as deepgemm
except Exception as error:  # it looks for a compiler and a driver when it is imported
    print(f"without DeepGEMM's casts: {type(error).__name__}: {error}")
    deepgemm = None

AHEAD = 1_000_000
"""Cycles that the device spins before a call: about half a millisecond."""
FIELDS = ["device", "torch", "triton", "date", "commit", "shape", "kernel", "us", "gb_s", "of_copy"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Quantise kernels against a copy."""

    commit: str = ""
    """What is measured."""
    repeats: int = 50
    """Timed calls of each kernel, in turns."""
    compiled: bool = False
    """Whether torch.compile of the plain INT4 formula takes part; it takes a while to compile."""
    out: Path = Path("benchmarks/results/quantise.csv")
    """The CSV, written anew."""


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Microseconds on the device, each call in its turn, the cache flushed between.

    The device is kept busy until the host has launched all of a call, as in a training step, where
    the host runs ahead.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 5):
        for name, call in calls.items():
            flush.zero_()
            torch.cuda._sleep(AHEAD)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 5:
                times[name].append(1000 * start.elapsed_time(end))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


Kernels = dict[str, tuple[Callable[[], object], int]]


def fp8(x: torch.Tensor) -> Kernels:
    """Name to a call and its bytes."""
    m, k = x.shape
    rows, squares = 3 * m * k + 4 * m * k // 128, 3 * m * k + 4 * m * k // 128**2
    pair, square_pair = 4 * m * k + 8 * m * k // 128, 4 * m * k + 8 * m * k // 128**2
    plain, ue8m0 = BlockFP8(), BlockFP8(scale="ue8m0")
    found: Kernels = {
        "miles 1x128": (lambda: encode(x, plain, "activation"), rows),
        "miles 1x128 ue8m0": (lambda: encode(x, ue8m0, "activation"), rows),
        "miles 128x128": (lambda: encode(x, plain, "weight"), squares),
        "miles quantize() 1x128, checked": (lambda: quantize(x, plain, role="activation"), rows),
        "miles pair 1x128": (lambda: encode_pair(x, plain, "activation"), pair),
        "miles pair 1x128 ue8m0": (lambda: encode_pair(x, ue8m0, "activation"), pair),
        "miles pair 128x128": (lambda: encode_pair(x, plain, "weight"), square_pair),
        "miles quantize_pair() 1x128, checked": (
            lambda: quantize_pair(x, plain, role="activation"),
            pair,
        ),
    }
    if torchao is not None:
        one = torchao.triton_fp8_blockwise_act_quant_lhs
        turned = torchao.triton_fp8_blockwise_act_quant_transposed_lhs
        square = torchao.triton_fp8_blockwise_weight_quant_rhs
        square_turned = torchao.triton_fp8_blockwise_weight_quant_transposed_rhs
        found |= {
            "torchao 1x128": (lambda: one(x), rows),
            "torchao 1x128 transposed": (lambda: turned(x), rows),
            "torchao 128x1": (lambda: torchao.triton_fp8_blockwise_act_quant_rhs(x), rows),
            "torchao 128x128": (lambda: square(x), squares),
            "torchao 128x128 transposed": (lambda: square_turned(x), squares),
            "torchao pair 1x128, two kernels": (lambda: (one(x), turned(x)), pair),
            "torchao pair 128x128, two kernels": (
                lambda: (square(x), square_turned(x)),
                square_pair,
            ),
        }
    if deepgemm is not None:
        found |= {
            "deepgemm cast 1x128": (lambda: deepgemm.per_token_cast_to_fp8(x, False), rows),
            "deepgemm cast 128x128": (lambda: deepgemm.per_block_cast_to_fp8(x, False), squares),
        }
    return found


def int4(x: torch.Tensor, compiled: bool) -> Kernels:
    """Name to a call and its bytes."""
    recipe, scales = Int4(), 2 * x.numel() // 32

    def plain() -> torch.Tensor:
        return _int4.decode(*_int4.encode(x, recipe), recipe, x.dtype)

    fake = 4 * x.numel() + scales
    found: Kernels = {
        "miles fake_quantize() int4": (lambda: fake_quantize(x, recipe), fake),
        "miles quantize() int4, checked": (lambda: quantize(x, recipe), 3 * x.numel() + scales),
        "miles int4 codes": (lambda: _int4_triton.encode(x, recipe), 3 * x.numel() + scales),
        "miles int4 packed": (
            lambda: _int4_triton.encode_packed(x, recipe),
            5 * x.numel() // 2 + scales,
        ),
        "plain PyTorch int4 fake-quantised": (plain, fake),
    }
    if compiled:
        found["torch.compile int4 fake-quantised"] = (torch.compile(plain), fake)
    return found


def kernels(x: torch.Tensor, compiled: bool) -> Kernels:
    """Name to a call and its bytes; first the copy that all are measured against."""
    out = torch.empty_like(x)
    copy: Kernels = {"copy": (lambda: out.copy_(x), 4 * x.numel())}
    return copy | fp8(x) | int4(x, compiled)


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
            found = kernels(x, config.compiled)
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
            file.flush()  # a run that is cut keeps the shapes it has measured


if __name__ == "__main__":
    main(tyro.cli(Config))
