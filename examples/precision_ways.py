"""What `fp8_rl.py` and `int4_qat.py` share: the loop of `grpo_loop.py` three ways from one start.

`bf16`: trainer and engine in bf16. `engine only`: the engine rounds, the trainer doesn't know.
`both`: the trainer computes with the numbers that the engine serves. In all three the trainer
keeps float32 weights and computes with bf16 copies of them, as mixed-precision training does.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from arithmetic import ChainSum, build_model, build_tokenizer
from grpo_loop import Config, train
from rich.console import Console
from rich.table import Table
from rollouts import local_engine
from torch import Tensor
from torch.func import functional_call

from miles.precision import Recipe
from miles.precision.modules import convert_

COLUMNS = ("mismatch/k3", "mismatch/abs", "mismatch/abs_max", "reward")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class WaysConfig(Config):
    """The demo's settings, with fewer steps, and an engine in this process."""

    num_steps: int = 25
    """Rollout-and-train steps of each way."""
    num_prompts: int = 64
    """Prompts per step."""
    num_epochs: int = 2
    """Passes over one rollout; more than one leans on the clipped ratio."""
    warmup_steps: int = 300
    """Supervised steps before RL, once for all ways."""
    num_held_out: int = 128
    """Held-out problems."""
    engine_process: bool = False
    """Run the engine in its own process, synced through shared memory."""
    width: int = 128
    """Hidden size of model and experts."""
    attention: Literal["eager", "sdpa"] = "eager"
    """Of trainer and engine. With sdpa the bits of a token depend on the shape of its batch."""


def run_ways(config: WaysConfig, recipe: Recipe) -> None:
    """Train each way in a folder of its own, then write mismatch.csv and mismatch.png."""
    # The trainer's recipe and the engine's.
    ways = {"bf16": (None, None), "engine only": (None, recipe), "both": (recipe, recipe)}
    rows: dict[str, list[Row]] = {}
    for name, (in_trainer, in_engine) in ways.items():
        folder = config.out / name.replace(" ", "_")
        Console().print(f"\n{type(recipe).__name__}, {name}", style="bold", highlight=False)
        model = build_model(config.seed, width=config.width)
        if rows:  # all ways start from the first one's warm-up
            start = config.out / "bf16" / "checkpoints" / "step-000000"
            model = type(model).from_pretrained(start, dtype=torch.float32)
        prepare(model, attention=config.attention, recipe=in_trainer)
        train(
            replace(
                config, out=folder, warmup_steps=0 if rows else config.warmup_steps,
                eval_every=config.num_steps,
                resume=config.resume and (folder / "checkpoints").exists(),
            ),
            ChainSum(config.seed), model, build_tokenizer(), call=in_bf16(model),
            engine=partial(
                local_engine,
                prepare=partial(prepare, attention=config.attention, recipe=in_engine),
            ),
        )  # fmt: skip
        metrics = folder / "metrics.jsonl"
        rows[name] = [json.loads(line) for line in metrics.read_text().splitlines()]
        if len(rows[name]) < config.num_steps:
            return  # stopped, and the loop has said how to go on
    write(config.out / "mismatch.csv", rows)
    plot(config.out / "mismatch.png", rows, type(recipe).__name__)
    show(rows)


def prepare(model: Any, *, attention: str, recipe: Recipe | None) -> None:
    """Have the model's linears and experts, save router and head, compute with rounded weights.

    What is rounded is bf16: the engine's weights, or the trainer's copies of its own.
    """
    model.set_attn_implementation(attention)
    if recipe is not None:
        convert_(model, [("*", recipe)], dtype=torch.bfloat16)


def in_bf16(model: Any) -> Callable[..., Any]:
    """The forward pass on bf16 copies of the weights; gradients reach the float32 ones."""

    def call(ids_BL: Tensor, **inputs: Any) -> Any:
        copies = {name: weight.bfloat16() for name, weight in model.named_parameters()}
        return functional_call(model, copies, (ids_BL,), inputs)

    return call


def write(path: Path, rows: dict[str, list[Row]]) -> None:
    """One line for each step of each way."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["way", "step", *(column.replace("/", "_") for column in COLUMNS)])
        for name, steps in rows.items():
            for row in steps:
                values = (f"{row[column]:.4g}" for column in COLUMNS)
                writer.writerow([name, row["step"], *values])


def plot(path: Path, rows: dict[str, list[Row]], title: str) -> None:
    """Mismatch over steps, on a log axis, and the reward below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, sharex=True, figsize=(6, 6), layout="constrained")
    # bf16 and "both" often lie on each other.
    for (name, steps), style in zip(rows.items(), ("-", "-", "--"), strict=True):
        for axis, column in zip(axes, ("mismatch/abs", "reward"), strict=True):
            values = [row[column] for row in steps]
            axis.plot([row["step"] for row in steps], values, style, label=name)
    axes[0].set(title=title, ylabel="mean |trainer - engine| of log-probs", yscale="log")
    axes[1].set(xlabel="step", ylabel="reward", ylim=(0, 1.02))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(rows: dict[str, list[Row]]) -> None:
    """Means over the steps; reward over the last five, and held-out accuracy after the last."""
    Console().print()
    table = Table(title="trainer against engine, mean over steps")
    for column in ("way", "k3", "mean |d|", "largest |d|", "reward", "held-out"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, steps in rows.items():
        k3, gap, _, _ = (sum(row[c] for row in steps) / len(steps) for c in COLUMNS)
        largest = max(row["mismatch/abs_max"] for row in steps)
        reward = sum(row["reward"] for row in steps[-5:]) / len(steps[-5:])
        table.add_row(
            name, f"{k3:.2g}", f"{gap:.2g}", f"{largest:.2g}", f"{reward:.3f}",
            f"{steps[-1]['held_out']:.2f}",
        )  # fmt: skip
    Console().print(table)
