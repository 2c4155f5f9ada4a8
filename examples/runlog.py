"""What a run shows and leaves behind: live table, samples, metrics, plot, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from miles.errors import CheckpointError

COLUMNS = {
    "step": "step",
    "reward": "reward",
    "loss": "loss",
    "grad_norm": "grad norm",
    "ratio/max": "ratio max",
    "mismatch/abs": "mismatch",
    "mismatch/ratio_max": "mismatch max",
    "time/tokens_per_second": "tokens/s",
}

MAY_DIFFER = ("out", "resume", "device", "num_rewards")
"""Settings that a resumed run may change: no number of its steps depends on them."""


class RunLog:
    """One run in one folder; a context manager that also turns Ctrl-C into `stopped`."""

    def __init__(self, folder: Path, config: Any, *, num_steps: int, start: int = 0) -> None:
        self.stopped = False
        self.start_accuracy: float | None = None
        self._folder, self._console = folder, Console()
        folder.mkdir(parents=True, exist_ok=True)
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
        if start:
            _same_run(json.loads((folder / "config.json").read_text()), plain)
        (folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
        self._rows = _truncate(folder / "metrics.jsonl", start)
        _truncate(folder / "samples.jsonl", start)
        self._samples = Text()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._steps = self._bar.add_task("step", total=num_steps, completed=start)
        self._phase = self._bar.add_task("", total=None)
        self._live = Live(self._view(), console=self._console, refresh_per_second=4)

    def __enter__(self) -> RunLog:
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()
        signal.signal(signal.SIGINT, self._handler)

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        self._live.console.print(text, highlight=False, markup=False)

    def phase(self, name: str, total: int) -> None:
        """Start the second bar anew."""
        self._bar.reset(self._phase, description=name, total=total)

    def advance(self, count: int = 1) -> None:
        """Move the second bar."""
        self._bar.advance(self._phase, count)

    def step(self, row: dict[str, Any], samples: list[tuple[str, str, float]]) -> None:
        """Record one training step; `samples` are (prompt, answer, reward)."""
        if self.start_accuracy is not None and row["step"] == 0:
            row["held_out_before"] = self.start_accuracy
        self._rows.append(row)
        shown = [
            {"step": row["step"], "prompt": p, "answer": a, "reward": r} for p, a, r in samples
        ]
        _append(self._folder / "metrics.jsonl", [row])
        _append(self._folder / "samples.jsonl", shown)
        self._samples = Text("\n".join(f"  {p}{a}   reward {r:.2f}" for p, a, r in samples))
        self._bar.update(self._steps, completed=row["step"] + 1)
        self._live.update(self._view())
        if not self._console.is_terminal and row["step"] % 20 == 0:
            self.say("  ".join(f"{COLUMNS[key]} {text}" for key, text in _texts(row).items()))

    def plot(self) -> None:
        """reward.png: training reward and held-out accuracy over steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        steps = [row["step"] for row in self._rows]
        axes.plot(steps, [row["reward"] for row in self._rows], label="training reward")
        held = [(0, row["held_out_before"]) for row in self._rows if "held_out_before" in row]
        held += [(row["step"] + 1, row["held_out"]) for row in self._rows if "held_out" in row]
        if held:
            axes.plot(*zip(*held, strict=True), "o-", label="held-out accuracy")
        axes.set(xlabel="step", ylabel="reward, accuracy", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        figure.savefig(self._folder / "reward.png", dpi=120)
        pyplot.close(figure)

    def _interrupt(self, *_: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        self.say("stopping after this step; Ctrl-C again to stop at once")

    def _view(self) -> Group:
        table = Table(box=None, padding=(0, 1))
        for title in COLUMNS.values():
            table.add_column(title, justify="right")
        for row in self._rows[-8:]:
            texts = _texts(row)
            table.add_row(*(texts.get(key, "") for key in COLUMNS))
        return Group(table, self._samples, self._bar)


def save_checkpoint(folder: Path, step: int, model: Any, tokenizer: Any, optimizer: Any) -> None:
    """`folder/step-NNNNNN` in HF format with the optimizer beside it; complete or not there."""
    target = folder / f"step-{step:06d}"
    partial = folder / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, partial / "trainer.pt")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in sorted(folder.glob("step-*"))[:-2]:
        if old.name != "step-000000":  # the engine starts from this one
            shutil.rmtree(old)


def load_checkpoint(folder: Path, model: Any, optimizer: Any) -> int:
    """The newest checkpoint into `model` and `optimizer`; returns its step."""
    found = sorted(folder.glob("step-*"))
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint; expected step-NNNNNN; start without --resume"
        )
    saved = type(model).from_pretrained(found[-1], dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    state = torch.load(found[-1] / "trainer.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    differ = [k for k in new if old.get(k) != new[k] and k not in MAY_DIFFER]
    if differ:
        texts = [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in differ]
        raise CheckpointError(
            f"this run was started with other settings: {', '.join(texts)}; expected the same, "
            "since only then do the numbers go on; give them again, or start a new run"
        )


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the rows before `step`: those after it are about to be made again."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have torn one
    rows = [row for row in rows if row["step"] < step]
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    _append(partial, rows)
    os.replace(partial, path)
    return rows


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _texts(row: dict[str, Any]) -> dict[str, str]:
    values = {key: row[key] for key in COLUMNS if key in row}
    return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
