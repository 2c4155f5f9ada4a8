"""INT4 rules of the field on the same weights: do trainer and checkpoint agree, does it hold still?

    python benchmarks/int4_rules.py --commit $(git rev-parse --short HEAD)

Each pairs what a trainer computes with and what its packed checkpoint holds.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from miles.precision import Int4, fake_quantize

SHAPE = (2048, 4096)
FIELDS = [
    "torch", "date", "commit", "rules", "data", "trainer_checkpoint", "rounded_again", "error",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Rules of INT4 against ours."""

    commit: str = ""
    """What is measured."""
    out: Path = Path("benchmarks/results/int4_rules.csv")
    """The CSV, written anew."""


def by_recipe(recipe: Int4) -> Callable[[Tensor], Tensor]:
    return lambda weight: fake_quantize(weight, recipe)


def float32_scale(size: int) -> Callable[[Tensor], Tensor]:
    """radixark/miles and slime, the patch of Megatron-LM for INT4 QAT: a scale never rounded."""

    def run(weight: Tensor) -> Tensor:
        groups = weight.float().unflatten(-1, (-1, size))
        amax = groups.abs().amax(-1, keepdim=True)
        scale = torch.div(amax, torch.full_like(amax, 7.0)).clamp(min=1e-5)
        codes = torch.div(groups, scale.expand_as(groups)).round().clamp(-7, 7)
        return (codes * scale).flatten(-2).to(weight.dtype)

    return run


def bfloat16_scale(size: int) -> Callable[[Tensor], Tensor]:
    """radixark/miles, its weight sync: rounds by amax * (1 / 7), then again by that in bf16."""

    def run(weight: Tensor) -> Tensor:
        groups = weight.float().unflatten(-1, (-1, size))
        amax = groups.abs().amax(-1, keepdim=True)
        scale = (amax * torch.full_like(amax, 1 / 7)).clamp(min=1e-5)
        stored = scale.bfloat16().float()
        codes = torch.div(groups, scale.expand_as(groups)).round().clamp(-7, 7)
        codes = torch.div(codes * stored, stored.expand_as(groups)).round().clamp(-7, 7)
        return (codes * stored).flatten(-2).to(weight.dtype)

    return run


# (trainer, checkpoint) by name.
Rule = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
RULES: dict[str, Rule] = {
    "miles, groups of 32": (by_recipe(Int4()), by_recipe(Int4())),
    "miles, groups of 128": (by_recipe(Int4(group_size=128)), by_recipe(Int4(group_size=128))),
    "compressed-tensors (7.5, -8), 32": (
        by_recipe(Int4.compressed_tensors()),
        by_recipe(Int4.compressed_tensors()),
    ),
    "float32 scale in the trainer, bf16 in the checkpoint, 32": (
        float32_scale(32),
        bfloat16_scale(32),
    ),
    "float32 scale in the trainer, bf16 in the checkpoint, 128": (
        float32_scale(128),
        bfloat16_scale(128),
    ),
    "trained with 128, served with 32": (float32_scale(128), bfloat16_scale(32)),
}


def differ(a: Tensor, b: Tensor) -> float:
    return float((a != b).float().mean())


def error(weight: Tensor, rounded: Tensor) -> float:
    return float((rounded.double() - weight.double()).square().mean())


def main(config: Config) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = 0.02 * torch.randn(SHAPE, generator=generator)
    below = torch.randn(3, *SHAPE, generator=generator).square().mean(0).sqrt()
    heavy = 0.02 * torch.randn(SHAPE, generator=generator) / below
    base = {
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": config.commit,
    }
    with config.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for kind, tensor in (("normal", normal), ("heavy", heavy)):
            weight = tensor.bfloat16()
            ours = error(weight, fake_quantize(weight, Int4()))
            for name, (trainer, checkpoint) in RULES.items():
                stored = checkpoint(weight)
                row = {
                    "rules": name,
                    "data": kind,
                    "trainer_checkpoint": f"{differ(trainer(weight), stored):.3e}",
                    "rounded_again": f"{differ(checkpoint(stored), stored):.3e}",
                    "error": f"{error(weight, stored) / ours:.3f}",
                }
                writer.writerow(base | row)
                print(row)


if __name__ == "__main__":
    main(tyro.cli(Config))
