"""The demo as a user runs it, a few steps long: stopped, resumed, killed, switched."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from miles.errors import CheckpointError

LOOP = Path(__file__).parents[2] / "examples" / "grpo_loop.py"
SMALL = {
    "num-steps": 5, "num-prompts": 12, "num-samples-per-prompt": 4, "num-updates": 2,
    "micro-batch-size": 16, "num-epochs": 2, "max-batch": 16, "warmup-steps": 12,
    "num-held-out": 16, "eval-every": 2, "checkpoint-every": 2,
}  # fmt: skip
SETTINGS = [f"--{key}={value}" for key, value in SMALL.items()]


class Loop:
    """One run of the script in a process of its own."""

    def __init__(self, out: Path, *flags: str) -> None:
        command = [sys.executable, str(LOOP), f"--out={out}", *SETTINGS, *flags]
        self.out = out
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while len(rows(self.out)) <= step:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def finish(self) -> str:
        text, _ = self.process.communicate(timeout=200)
        assert self.process.returncode == 0, text
        return " ".join(text.split())


def rows(out: Path) -> list[dict[str, float]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def numbers(out: Path) -> list[dict[str, float]]:
    """All that a run computed, without the seconds it took."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(out)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    loop = Loop(tmp_path_factory.mktemp("loop") / "reference")
    return loop.out, loop.finish()


def test_run_says_and_leaves_what_the_readme_promises(reference):
    out, text = reference
    assert re.search(r"held-out accuracy before RL: \d\.\d\d", text)
    assert re.search(r"held-out accuracy after RL: \d\.\d\d", text)
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3, 4]
    assert (out / "reward.png").stat().st_size > 1000
    assert json.loads((out / "config.json").read_text())["num_steps"] == 5
    checkpoint = out / "checkpoints" / "step-000005"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)("3+4-5=")["input_ids"]
    assert model.config.model_type == "qwen3_moe" and len(ids) == 6


def test_engine_disagrees_with_the_trainer_a_little(reference):
    gaps = [row["mismatch/abs"] for row in rows(reference[0])]
    assert all(1e-5 < gap < 0.1 for gap in gaps)


def test_ctrl_c_and_resume_give_the_numbers_of_an_uninterrupted_run(reference, tmp_path):
    loop = Loop(tmp_path / "run")
    loop.wait_for_step(0)
    loop.process.send_signal(signal.SIGINT)
    assert "--resume goes on from there" in loop.finish()
    assert len(rows(loop.out)) < 5
    Loop(tmp_path / "run", "--resume").finish()
    assert numbers(loop.out) == numbers(reference[0])


def test_killed_engine_loses_nothing_and_changes_nothing(reference, tmp_path):
    loop = Loop(tmp_path / "run")
    loop.wait_for_step(1)
    children = Path(f"/proc/{loop.process.pid}/task/{loop.process.pid}/children").read_text()
    engines = [pid for pid in map(int, children.split()) if is_engine(pid)]
    os.kill(engines[0], signal.SIGKILL)
    text = loop.finish()
    assert "starting a new engine; what was finished is kept" in text
    assert numbers(loop.out) == numbers(reference[0])


def is_engine(pid: int) -> bool:
    return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture
def script(monkeypatch):
    """The script in this process, which has done its imports: for what needs none of its own."""

    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(LOOP), *flags])
        runpy.run_path(str(LOOP), run_name="__main__")

    monkeypatch.syspath_prepend(LOOP.parent)
    num_threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(num_threads)


def test_switches_run_in_process(tmp_path, script):
    flags = ["--no-r3", "--no-tis", "--no-engine-process", "--num-steps=2"]
    script(f"--out={tmp_path}", *SETTINGS, *flags)
    assert "correction/kept" not in rows(tmp_path)[0] and len(rows(tmp_path)) == 2


def test_resume_without_a_checkpoint_says_so(tmp_path, script):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        script(f"--out={tmp_path / 'nothing'}", *SETTINGS, "--resume")


def test_help_is_readable(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "Replay the engine's expert choices" in text and "--no-r3" in text
