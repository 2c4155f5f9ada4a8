"""FP8 linear layers on CUDA, rounding included, beside bf16, DeepGEMM's bare GEMM and torchao.

    python benchmarks/fp8_linear.py --commit $(git rev-parse --short HEAD)

`miles` rounds the weight once for many calls, so forward is: round x, multiply. torchao rounds the
weight at every call. "bare" multiplies operands that are rounded already. Operations are
2 M N K a GEMM: one forward, three with backward.
"""

from __future__ import annotations

import csv
import datetime
import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from quantise import medians
from routing import synchronize
from torch import Tensor, nn

from miles.precision import BlockFP8, _gemm, quantize
from miles.precision.backends import Gemm, explain, refusal
from miles.precision.linears import linear

SHAPES = [(4096, 7168, 16384), (8192, 4096, 7168)]
FIELDS = ["device", "torch", "triton", "date", "commit", "shape", "pass", "kernel"]
FIELDS += ["us", "tflops", "of_bf16", "of_bare"]
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """FP8 linear against bf16 and rivals."""

    commit: str = ""
    """What is measured."""
    repeats: int = 30
    """Timed calls of each, in turns."""
    out: Path = Path("benchmarks/results/fp8_linear.csv")
    """The CSV, written anew."""


def backends(m: int, n: int, k: int) -> list[str]:
    """Fast ones that run here."""
    found = []
    for name in ("deepgemm", "scaled_mm", "triton"):
        sizes = Gemm(
            kind="fprop",
            rows=m,
            columns=n,
            depth=k,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        )
        if reason := refusal(name, sizes):
            print(f"without {name}: {reason}")
        else:
            found.append(name)
    return found


def torchao(weight: Tensor, **keywords: object) -> nn.Module | None:
    """Its prototype of this layer."""
    try:
        from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear
    except Exception as error:  # a prototype; whatever it raises, the row is left out and named
        print(f"without torchao: {type(error).__name__}: {error}")
        return None
    n, k = weight.shape
    with torch.device("meta"):
        layer = Float8BlockwiseLinear(k, n, bias=False, **keywords)
    layer.weight = nn.Parameter(weight.detach())
    return layer


def works(name: str, call: Callable[[], object]) -> bool:
    """Whether a call runs; the first one compiles."""
    try:
        call()
        synchronize()
    except Exception as error:  # of a rival or a compiler; the row is left out and named
        print(f"without {name}: {type(error).__name__}: {str(error)[:200]}")
        return False
    return True


def layers(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name to a forward pass."""
    m, k = x.shape
    q = quantize(weight.detach(), BlockFP8())
    turned = q.t()
    found: dict[str, Callable[[], Tensor]] = {"torch bf16": lambda: F.linear(x, weight)}
    for name in backends(m, weight.shape[0], k):
        for wgrad in ("bf16", "fp8"):
            found[f"miles {name}, wgrad {wgrad}"] = functools.partial(
                linear,
                x,
                weight,
                BlockFP8(wgrad=wgrad),
                backend=name,
                quantized_weight=q,
                transposed_weight=turned,
            )
    recipe = BlockFP8()
    found["miles auto, weight rounded in the call"] = lambda: linear(x, weight, recipe)
    for kind in (False, True):
        layer = torchao(weight, use_triton=kind)
        if layer is not None:
            name = f"torchao {'triton' if kind else 'scaled_mm'}"
            found[name] = functools.partial(layer, x)
    return found


def bare(x: Tensor, weight: Tensor) -> Calls:
    """GEMMs of operands that are rounded already."""
    a = _gemm.encode(x, "fp32", "activation")
    b = _gemm.encode(weight, "fp32", "weight")
    return {
        f"{name} bare": functools.partial(_gemm.dense, name, a, b, torch.bfloat16)
        for name in backends(*x.shape[:1], *weight.shape)
    }


def forward_and_backward(
    forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor
) -> None:
    torch.autograd.grad(forward(), leaves, dy)


def measure(shape: tuple[int, int, int], repeats: int) -> list[dict[str, str]]:
    m, n, k = shape
    print(explain(BlockFP8(wgrad="fp8"), m, n, k, "cuda"))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16) * 1e-6
    found = layers(x, weight)
    both: Calls = {}
    for name, call in found.items():
        # torchao's layer holds a parameter of its own, of the same memory.
        owner = getattr(getattr(call, "func", None), "weight", weight)
        both[name] = functools.partial(forward_and_backward, call, (x, owner), dy)
    with torch.no_grad():
        # Forward is the same whatever wgrad is.
        only = {name: call for name, call in found.items() if "wgrad fp8" not in name}
        only |= bare(x.detach(), weight.detach())
        only = {name: call for name, call in only.items() if works(name, call)}
        passes = {"forward": (medians(only, repeats), 2 * m * n * k)}
    both = {name: call for name, call in both.items() if works(name, call)}
    passes["forward+backward"] = (medians(both, repeats), 6 * m * n * k)
    rows = []
    for kind, (times, operations) in passes.items():
        for name, us in times.items():
            baseline = times.get("deepgemm bare", times.get("scaled_mm bare"))
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "pass": kind,
                    "kernel": name,
                    "us": f"{us:.1f}",
                    "tflops": f"{operations / us / 1e6:.0f}",
                    "of_bf16": f"{times['torch bf16'] / us:.3f}",
                    "of_bare": f"{baseline / us:.3f}" if baseline else "",
                }
            )
            print(rows[-1])
    return rows


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
        for shape in SHAPES:
            for row in measure(shape, config.repeats):
                writer.writerow(base | row)
            file.flush()


if __name__ == "__main__":
    main(tyro.cli(Config))
