"""How much of a model a step of reinforcement learning changes, in the bf16 that engines serve.

    python benchmarks/delta_sparsity.py --commit $(git rev-parse --short HEAD)    # the demo, CPU
    python benchmarks/delta_sparsity.py --model smollm2 --device cuda --commit ...

Runs `examples/grpo_loop.py` (or `grpo_smollm2.py`), whose trainer holds float32 masters, at several
learning rates. After every rollout step the weights are rounded to bf16 and compared bit for bit
with those of the step before and with the first: how many elements changed, what telling their
places takes as a bitmap or as gaps between them, and what `miles.sync.delta` writes, zstd included.
"""

from __future__ import annotations

import csv
import datetime
import platform
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from miles.sync.delta import DeltaReport, encode_delta

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """How sparse updates are."""

    commit: str = ""
    """What is measured."""
    model: Literal["demo", "smollm2"] = "demo"
    """The mixture of experts of `grpo_loop.py`, or SmolLM2-135M-Instruct."""
    learning_rates: tuple[float, ...] = (1e-6, 1e-5, 5e-4)
    """Of AdamW, after ten steps of warm-up."""
    num_steps: int = 20
    """Rollout steps, each of several optimizer steps and a sync."""
    num_prompts: int = 0
    """Prompts per step; the example's number by default."""
    warmup_steps: int | None = None
    """Supervised steps before; the example's number by default."""
    device: str = "cpu"
    """Of trainer and engine."""
    out: Path = Path("benchmarks/results/delta_sparsity.csv")
    """The CSV, to which rows are added."""


Weights = dict[str, Tensor]


def weights_of(model: Any) -> Weights:
    """What an engine would serve, on the CPU; tied tensors once."""
    return {name: p.detach().bfloat16().cpu() for name, p in model.named_parameters()}


def compared(old: Weights, new: Weights) -> dict[str, Any]:
    """The numbers of one row."""
    bitmap = index = 0
    deltas = []
    for name, tensor in new.items():
        deltas.append(encode_delta(old[name], tensor))
        changed_N = old[name].view(torch.int16) != tensor.view(torch.int16)
        places_K = changed_N.flatten().nonzero().flatten().numpy()
        if len(places_K):
            widest = int(np.diff(places_K, prepend=0).max())
            index += len(places_K) * next(w for w in (1, 2, 4, 8) if widest < 256**w)
            bitmap += -(-tensor.numel() // 8)
    report = DeltaReport.of(deltas)
    return {
        "elements": report.num_elements,
        "changed": report.num_changed,
        "share": f"{report.changed_share:.6f}",
        "full_bytes": report.full_bytes,
        "bitmap_bytes": bitmap,
        "index_bytes": index,
        "delta_bytes": report.delta_bytes,
    }


def run(config: Config, learning_rate: float, folder: str) -> list[dict[str, Any]]:
    """Train, and compare at every sync."""
    import grpo_loop
    from arithmetic import ChainSum, build_model, build_tokenizer
    from grpo_smollm2 import ChatSums, SmolConfig, load_smollm2

    options: dict[str, Any] = {
        "out": Path(folder),
        "learning_rate": learning_rate,
        "num_steps": config.num_steps,
        "eval_every": 10**9,
        "num_held_out": 16,
        "device": config.device,
        "engine_process": False,
    }
    if config.num_prompts:
        options["num_prompts"] = config.num_prompts
    if config.warmup_steps is not None:
        options["warmup_steps"] = config.warmup_steps
    if config.model == "demo":
        loop, model, tokenizer = grpo_loop.Config(), build_model(0), build_tokenizer()
        task: Any = ChainSum(0)
    else:
        loop, (model, tokenizer) = SmolConfig(), load_smollm2()
        task = ChatSums(0, tokenizer)
    rows: list[dict[str, Any]] = []
    seen: list[Weights] = []

    class Recorded(grpo_loop.Rollouts):
        """Compares what goes to the engine."""

        def sync(self, version: int, *args: Any) -> Any:
            now = weights_of(model)
            for against, old in (("step before", seen[-1:]), ("first", seen[:1])):
                for weights in old:
                    rows.append({"step": version, "against": against, **compared(weights, now)})
            seen[1:] = [now]
            return super().sync(version, *args)

    plain = grpo_loop.Rollouts
    grpo_loop.Rollouts = Recorded
    try:
        grpo_loop.train(replace(loop, **options), task, model, tokenizer)
    finally:
        grpo_loop.Rollouts = plain
    return rows


def main(config: Config) -> None:
    cuda = config.device.startswith("cuda")
    common = {
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": config.commit,
        "model": config.model,
    }
    for learning_rate in config.learning_rates:
        with tempfile.TemporaryDirectory() as folder:
            rows = run(config, learning_rate, folder)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not config.out.exists()
        with config.out.open("a", newline="") as file:
            for row in rows:
                row = common | {"learning_rate": f"{learning_rate:g}"} | row
                writer = csv.DictWriter(file, row, lineterminator="\n")
                if fresh:
                    writer.writeheader()
                    fresh = False
                writer.writerow(row)
                print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Config))
