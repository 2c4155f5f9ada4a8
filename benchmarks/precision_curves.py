"""Training curves of a dense Qwen3 and of a Qwen3-MoE in bf16, in FP8 and with INT4 weights.

    python benchmarks/precision_curves.py --device cuda --save ~/trained
    python benchmarks/precision_curves.py --device cuda --models moe --precisions bf16 fp8
    python benchmarks/precision_curves.py --plot-only

Both models start from random weights and read the Python source of the standard library byte by
byte; a twentieth of its files is held out. What differs between the runs of a model is `convert_`
alone: same first weights, same batches, same optimizer (AdamW on float32 masters of bf16
parameters). A run of bf16 from another seed for its first weights, over the same batches, shows how
far apart two runs of one precision are.

The accepted bands, stated beforehand: over the last 50 steps the mean of |loss - bf16's loss| is at
most 1 % of bf16's mean loss in FP8, and 5 % with INT4. INT4 is on all linears of the dense model
and on the experts of the other.

- `precision_curves.csv`: loss and norm of the gradient at every step.
- `precision_curves_summary.csv`: a row a run, and what is within its band.
- `precision_curves.png`: the curves, and below them their distance from bf16's.

`--learning-rates` are short runs, to see that nothing becomes NaN. `--save` keeps each model of a
curve as `MODEL-PRECISION`, as an engine loads it, and for FP8 and INT4 its bf16 parameters before
they are rounded as `MODEL-PRECISION-master`.
"""

from __future__ import annotations

import csv
import functools
import gc
import itertools
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from routing import append, environment
from torch import Tensor, nn

from miles.errors import NonFiniteError
from miles.precision import BlockFP8, Int4, Recipe, convert_, save

Model = Literal["dense", "moe"]
Precision = Literal["bf16", "fp8", "int4", "bf16-other-seed"]
BANDS = {"fp8": 0.01, "int4": 0.05}
LAST = 50
WARM_UP = 20
VOCABULARY = 512
"""256 bytes, and more so that the head's size is a multiple of 128."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Training in each precision."""

    device: str = "cpu"
    """Where all runs."""
    models: tuple[Model, ...] = ("dense", "moe")
    """What is trained."""
    precisions: tuple[Precision, ...] = ("bf16", "fp8", "int4", "bf16-other-seed")
    """In what; bf16 first, or it has to be in the CSV already."""
    steps: int = 200
    """Steps of a curve; 0 leaves the curves out."""
    learning_rate: float = 3e-4
    """Largest learning rate of a curve."""
    learning_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Those of the short runs."""
    short_steps: int = 30
    """Steps of a short run; 0 leaves the short runs out."""
    batch: int = 16
    """Sequences a step."""
    length: int = 512
    """Tokens of a sequence."""
    hidden: int = 1024
    """Width of both models."""
    layers: int = 24
    """Layers of the dense model."""
    intermediate: int = 3072
    """Width of its MLPs."""
    moe_layers: int = 10
    """Layers of the mixture of experts."""
    moe_intermediate: int = 768
    """Width of an expert."""
    num_experts: int = 16
    """Experts of a layer."""
    topk: int = 4
    """Experts a token."""
    group_size: int = 32
    """Weights that share a scale in INT4."""
    save: Path | None = None
    """Folder for the models of the curves; none of theirs may be there yet."""
    plot_only: bool = False
    """Draw what the CSV holds and train nothing."""
    out: Path = Path("benchmarks/results/precision_curves.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


@functools.cache
def standard_library() -> tuple[Tensor, Tensor]:
    """uint8: the bytes of its sources in order, without tests: to train on, and held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not left_out.intersection(path.relative_to(root).parts)
    ]
    held_out = b"".join(path.read_bytes() for path in files[::20])
    rest = b"".join(path.read_bytes() for i, path in enumerate(files) if i % 20)
    return tuple(torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (rest, held_out))


def batches(text: Tensor, config: Config, seed: int) -> Iterator[Tensor]:
    """int64 `[batch, length + 1]` from random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - config.length, (config.batch, 1), generator=generator)
        yield text[starts + torch.arange(config.length + 1)].long().to(config.device)


def build(config: Config, name: Model, seed: int) -> Any:
    """A model of random weights in bf16."""
    common = dict(
        vocab_size=VOCABULARY, hidden_size=config.hidden, head_dim=128,
        num_attention_heads=max(1, config.hidden // 128),
        num_key_value_heads=max(1, config.hidden // 256),
        max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None, pad_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(seed)
    if name == "dense":
        model: Any = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **common, intermediate_size=config.intermediate, num_hidden_layers=config.layers
            )
        )
    else:
        model = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **common, intermediate_size=config.moe_intermediate,
                moe_intermediate_size=config.moe_intermediate,
                num_hidden_layers=config.moe_layers, num_experts=config.num_experts,
                num_experts_per_tok=config.topk, norm_topk_prob=True,
            )
        )  # fmt: skip
        model.config._experts_implementation = "grouped_mm"
    return model.to(torch.bfloat16).to(config.device)


def rules(name: Model, precision: Precision, group_size: int) -> list[tuple[str, Recipe | None]]:
    """For `convert_`; none for bf16."""
    if precision == "fp8":
        return [("*", BlockFP8())]
    if precision == "int4":
        return [("*.experts" if name == "moe" else "*", Int4(group_size=group_size))]
    return []


class MasterAdamW:
    """AdamW on float32 masters of low-precision parameters, which become their rounded copies."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        fused = self.parameters[0].is_cuda
        self.adamw = torch.optim.AdamW(
            self.masters, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self, lr: float | None = None, max_norm: float = 1.0) -> Tensor:
        """One step with the parameters' gradients, which are gone then; their norm."""
        for group in self.adamw.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, max_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        torch._foreach_copy_(self.parameters, self.masters)
        return norm


@dataclass
class Run:
    """What a training run gave."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    failure: str = ""
    """What was not finite, and where."""


def loss_of(model: Any, ids_BL: Tensor) -> Tensor:
    logits = model(input_ids=ids_BL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids_BL[:, 1:].flatten())


def schedule(step: int, steps: int) -> float:
    """Share of the largest learning rate: a linear warm-up, then half a cosine down to a tenth."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def train(config: Config, model: Any, learning_rate: float, steps: int) -> Run:
    run = Run()
    optimizer = MasterAdamW(model.parameters(), learning_rate)
    model.train()
    for step, ids in enumerate(
        itertools.islice(batches(standard_library()[0], config, seed=1), steps)
    ):
        start = time.perf_counter()
        try:
            loss = loss_of(model, ids)
        except NonFiniteError as error:
            run.failure = f"step {step}: {error}"
            break
        loss.backward()
        norm = optimizer.step(learning_rate * schedule(step, steps))
        run.losses.append(float(loss.detach()))
        run.norms.append(float(norm))
        run.milliseconds.append(1e3 * (time.perf_counter() - start))
        if not math.isfinite(run.losses[-1] + run.norms[-1]):
            run.failure = f"step {step}: loss {run.losses[-1]}, norm {run.norms[-1]}"
            break
        if step % 20 == 0 or step + 1 == steps:
            print(f"    step {step}: loss {run.losses[-1]:.4f}, norm {float(norm):.3g}", flush=True)
    return run


@torch.no_grad()
def held_out_loss(config: Config, model: Any, count: int = 8) -> float:
    """Over `count` batches, in the precision that the model has."""
    model.eval()
    chosen = itertools.islice(batches(standard_library()[1], config, seed=2), count)
    return statistics.fmean([float(loss_of(model, ids)) for ids in chosen])


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def bf16_losses(config: Config, run: dict[str, Any]) -> list[float]:
    """Of the latest bf16 run in the CSV that is like this one."""
    same = ("hardware", "torch", "model", "parameters", "run", "learning_rate", "steps", "tokens")
    found = [
        float(row["loss"])
        for row in rows_of(config.out)
        if row["precision"] == "bf16" and all(row[key] == str(run[key]) for key in same)
    ]
    return found[-run["steps"] :]


def distance(losses: list[float], others: list[float]) -> float:
    """Mean of |loss - other| over the last steps, as a share of the other's mean."""
    losses, others = losses[-LAST:], others[-LAST:]
    gaps = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    return statistics.fmean(gaps) / statistics.fmean(others)


def summary(config: Config, common: dict[str, Any], run: Run) -> dict[str, Any]:
    precision, steps = common["precision"], common["steps"]
    others = bf16_losses(config, common)
    band, gap = BANDS.get(precision), None
    if precision != "bf16" and len(others) == len(run.losses) == steps:
        gap = distance(run.losses, others)
    elif precision != "bf16":
        print("    no whole run of bf16 to compare with", flush=True)
    within = "" if band is None or gap is None else gap <= band
    return {
        "finite": not run.failure,
        "failure": run.failure,
        "first_loss": f"{run.losses[0]:.4f}" if run.losses else "",
        "last_loss": f"{statistics.fmean(run.losses[-LAST:]):.4f}" if run.losses else "",
        "distance": "" if gap is None else f"{gap:.5f}",
        "band": "" if band is None else band,
        "within": False if run.failure else within,
        "ms": f"{statistics.median(run.milliseconds or [math.nan]):.1f}",
    }


def keep(folder: Path, model: Any) -> None:
    """As an engine loads it, and the parameters that were rounded for that."""
    if folder.name.endswith(("fp8", "int4")):
        save(model, folder)
        model.save_pretrained(f"{folder}-master")
    else:
        model.save_pretrained(folder)


def measure(
    config: Config,
    name: Model,
    precision: Precision,
    learning_rate: float,
    kind: Literal["curve", "short"],
) -> None:
    """Train, and append to both CSVs."""
    steps = config.steps if kind == "curve" else config.short_steps
    print(f"  {name}, {precision}, {kind}, learning rate {learning_rate:g}", flush=True)
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(config, name, seed=1 if precision == "bf16-other-seed" else 0)
    if chosen := rules(name, precision, config.group_size):
        print("    " + convert_(model, chosen).table().splitlines()[-1], flush=True)
    common = environment(config.device, config.commit) | {
        "model": name, "parameters": sum(p.numel() for p in model.parameters()),
        "precision": precision, "run": kind, "learning_rate": f"{learning_rate:g}", "steps": steps,
        "tokens": config.batch * config.length,
    }  # fmt: skip
    run = train(config, model, learning_rate, steps)
    steps_of = zip(run.losses, run.norms, strict=True)
    rows = [
        common | {"step": step, "loss": f"{loss:.5f}", "grad_norm": f"{norm:.4g}"}
        for step, (loss, norm) in enumerate(steps_of)
    ]
    if rows:
        append(config.out, rows)
    last = summary(config, common, run)
    last["held_out"] = "" if run.failure else f"{held_out_loss(config, model):.4f}"
    peak = torch.cuda.max_memory_allocated() / 2**30 if config.device == "cuda" else 0.0
    last["peak_gib"] = f"{peak:.2f}"
    last["python"] = ".".join(map(str, sys.version_info[:3]))
    last["bytes"] = len(standard_library()[0])
    append(summary_path(config.out), [common | last])
    print("    " + ", ".join(f"{key} {value}" for key, value in last.items()), flush=True)
    if config.save is not None and kind == "curve" and not run.failure:
        keep(config.save / f"{name}-{precision}", model)


def summary_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_summary.csv")


def plot(out: Path) -> None:
    """The latest curve of each model and precision, and how far it is from bf16's."""
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str], list[float]] = {}
    for row in rows_of(out):
        if row["run"] == "curve":
            key = (row["model"], row["precision"])
            if row["step"] == "0":
                curves[key] = []
            curves[key].append(float(row["loss"]))
    titles = {"dense": "Qwen3, dense", "moe": "Qwen3-MoE"}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, height_ratios=(2, 1))
    for column, (model, title) in enumerate(titles.items()):
        above, below = axes[0, column], axes[1, column]
        above.set_title(title)
        base = curves.get((model, "bf16"))
        for (other, precision), losses in curves.items():
            if other != model:
                continue
            label = precision.replace("-", ", ", 1).replace("-", " ")
            grey = {"color": "0.6"} if precision == "bf16-other-seed" else {}
            (line,) = above.plot(losses, linewidth=1, label=label, **grey)
            if base is not None and len(base) == len(losses) and precision != "bf16":
                percents = [100 * (a - b) / b for a, b in zip(losses, base, strict=True)]
                below.plot(percents, linewidth=1, color=line.get_color())
        below.set_xlabel("step")
        if above.lines:
            above.legend()
    axes[0, 0].set_ylabel("loss, nats a byte")
    axes[1, 0].set_ylabel("percent above bf16")
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main(config: Config) -> None:
    if config.plot_only:
        plot(config.out)
        return
    if config.save is not None and config.steps:
        for name, precision in itertools.product(config.models, config.precisions):
            if (config.save / f"{name}-{precision}").exists():
                raise SystemExit(f"{config.save / f'{name}-{precision}'} is there already")
    train_text, held_out = standard_library()
    print(f"{len(train_text):,} bytes to train on, {len(held_out):,} held out", flush=True)
    start = time.perf_counter()
    for name in config.models:
        runs = [(p, config.learning_rate, "curve") for p in config.precisions if config.steps]
        runs += [
            (precision, rate, "short")
            for rate in config.learning_rates
            for precision in config.precisions
            if config.short_steps and precision != "bf16-other-seed"
        ]
        for precision, rate, kind in runs:
            measure(config, name, precision, rate, kind)
            gc.collect()  # converted modules hold references in circles
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    plot(config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
