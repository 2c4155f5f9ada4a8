"""Block-FP8 quantisers of the field on the same tensors: how many bits of ours each one changes.

    python benchmarks/quantisers.py --commit $(git rev-parse --short HEAD)

Each is a formula, from the source that it names, for blocks of 1 x 128. Those of `PROFILES` come
out of `miles.precision`, the others are written below. Where torchao or transformers is installed,
the output of the package itself is compared as well.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor

from miles.precision import PROFILES, BlockFP8, quantize

SHAPE = (2048, 4096)
SIGMAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
FIELDS = [
    "torch", "date", "commit", "quantiser", "origin", "scale", "data", "codes", "scales",
    "dequantised", "zero_scale", "zero_codes", *(f"snr_{sigma:.0e}" for sigma in SIGMAS),
]  # fmt: skip
MAX = 448.0

# bf16 [M, K], power-of-two scales or not -> codes [M, K], scales [M, K / 128].
Quantiser = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Quantisers against ours."""

    commit: str = ""
    """What is measured."""
    out: Path = Path("benchmarks/results/quantisers.csv")
    """The CSV, written anew."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    origin: str
    run: Quantiser
    powers_of_two: bool = True


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 blocks [M, K / 128, 128] and their amax."""
    blocks = x.float().unflatten(-1, (-1, 128))
    return blocks, blocks.abs().amax(-1)


def _codes(blocks: Tensor) -> Tensor:
    return blocks.clamp(-MAX, MAX).to(torch.float8_e4m3fn).flatten(-2)


def _by_448(amax: Tensor) -> Tensor:
    return torch.div(amax, torch.full_like(amax, MAX))


def torchao(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """torchao, prototype/blockwise_fp8_training/kernels.py: 448 / amax in float64."""
    blocks, amax = _blocks(x)
    multiplier = (MAX / amax.double().clamp(min=1e-12)).float()
    return _codes(blocks * multiplier[..., None]), 1.0 / multiplier


def triton_of_frameworks(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """radixark/miles, miles/utils/fp8_kernel.py, also in slime and verl; its division as true."""
    blocks, amax = _blocks(x)
    scale = _by_448(amax.clamp(min=1e-10))
    return _codes(blocks * (1.0 / scale)[..., None]), scale


def converter(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """radixark/miles, tools/convert_hf_to_fp8.py: nothing under the scale."""
    blocks, amax = _blocks(x)
    scale = _by_448(amax)
    return _codes(torch.div(blocks, scale[..., None].expand_as(blocks))), scale


def prime_rl(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """prime-rl, trainer/models/layers/kernels/fp8_utils.py: the floor is under the scale."""
    blocks, amax = _blocks(x)
    scale = _by_448(amax).clamp(min=1e-4)
    return _codes(torch.div(blocks, scale[..., None].expand_as(blocks))), scale


def profile(name: str) -> Quantiser:
    def run(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
        recipe = BlockFP8(profile=name, scale="ue8m0" if power_of_two else "fp32")
        q = quantize(x, recipe, role="activation")
        return q.codes, q.scale

    return run


def packages() -> dict[str, Entry]:
    """Quantisers of installed packages that run on a CPU."""
    found = {}
    try:
        from torchao.prototype.blockwise_fp8_training import kernels

        found["torchao"] = Entry(
            origin=f"package {importlib.metadata.version('torchao')}",
            run=lambda x, _: kernels.torch_blockwise_scale_act_quant_lhs(x),
            powers_of_two=False,
        )
    except ImportError:
        print("torchao is not installed: its formula only")
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Quantize
    except ImportError:
        print("transformers is not installed: its formula only")
        return found

    def transformers(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
        settings = SimpleNamespace(
            weight_block_size=(1, 128), scale_fmt="ue8m0" if power_of_two else "float"
        )
        step = Fp8Quantize(SimpleNamespace(quantization_config=settings))
        out = step.convert({"x.weight": x})
        return out["x.weight"], out["x.weight_scale_inv"].float()

    version = importlib.metadata.version("transformers")
    found["hf"] = Entry(origin=f"package {version}", run=transformers)
    return found


ENTRIES: list[tuple[str, Entry]] = [
    *((name, Entry(origin="formula", run=profile(name))) for name in PROFILES),
    ("torchao", Entry(origin="formula", run=torchao, powers_of_two=False)),
    ("slime and verl", Entry(origin="formula", run=triton_of_frameworks, powers_of_two=False)),
    ("converter", Entry(origin="formula", run=converter, powers_of_two=False)),
    ("prime-rl", Entry(origin="formula", run=prime_rl, powers_of_two=False)),
]
"""What is compared; ours, "te", first."""


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float().unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2)


def differ(a: Tensor, b: Tensor) -> float:
    """Share of elements with other bits; one NaN is another's equal."""
    a, b = a.float(), b.float()
    return float(((a != b) & ~(a.isnan() & b.isnan())).float().mean())


def snr(x: Tensor, rounded: Tensor) -> float:
    """In dB."""
    noise = (rounded.double() - x.double()).square().sum()
    return 10 * math.log10(float(x.double().square().sum() / noise))


def readings(run: Quantiser, power_of_two: bool, x: Tensor) -> dict[str, str]:
    """The columns of one quantiser on one tensor."""
    codes, scale = run(x, power_of_two)
    our_codes, our_scale = profile("te")(x, power_of_two)
    values, ours = (
        dequantise(*pair).bfloat16() for pair in ((codes, scale), (our_codes, our_scale))
    )
    zero_codes, zero_scale = run(torch.zeros(1, 128, dtype=x.dtype), power_of_two)
    out = {
        "codes": f"{differ(codes, our_codes):.3e}",
        "scales": f"{differ(scale, our_scale):.3e}",
        "dequantised": f"{differ(values, ours):.3e}",
        "zero_scale": f"{float(zero_scale):.3g}",
        "zero_codes": f"{float(zero_codes.float().mean()):.3g}",
    }
    for sigma in SIGMAS:
        gradient = (x.float() * sigma).to(x.dtype)
        rounded = dequantise(*run(gradient, power_of_two))
        out[f"snr_{sigma:.0e}"] = f"{snr(gradient, rounded):.1f}"
    return out


def data() -> dict[str, Tensor]:
    """Standard normal numbers, and Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator)
    below = torch.randn(3, *SHAPE, generator=generator).square().mean(0).sqrt()
    return {
        "normal": normal.bfloat16(),
        "heavy": (torch.randn(SHAPE, generator=generator) / below).bfloat16(),
    }


def main(config: Config) -> None:
    base = {
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": config.commit,
    }
    with config.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for kind, x in data().items():
            for name, entry in [*ENTRIES, *packages().items()]:
                for scale in ("fp32", "ue8m0") if entry.powers_of_two else ("fp32",):
                    row = {"quantiser": name, "origin": entry.origin, "scale": scale, "data": kind}
                    writer.writerow(base | row | readings(entry.run, scale == "ue8m0", x))
                    print(*row.values())


if __name__ == "__main__":
    main(tyro.cli(Config))
