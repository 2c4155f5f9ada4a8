"""The demo as a user runs it, a few steps long: stopped, resumed, killed, switched."""

import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from miles.errors import CheckpointError

LOOP = Path(__file__).parents[2] / "examples" / "grpo_loop.py"
SMALL = {
    "num-steps": 5, "num-prompts": 12, "num-samples-per-prompt": 4, "num-updates": 2,
    "micro-batch-size": 16, "num-epochs": 2, "max-batch": 16, "warmup-steps": 12,
    "num-held-out": 16, "eval-every": 2, "checkpoint-every": 2,
}  # fmt: skip
SETTINGS = [f"--{key}={value}" for key, value in SMALL.items()]


def rows(out: Path) -> list[dict[str, float]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def numbers(out: Path) -> list[dict[str, float]]:
    """All that a run computed, without the seconds it took."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(out)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One run of the script in a process of its own."""
    out = tmp_path_factory.mktemp("loop") / "reference"
    ran = subprocess.run(
        [sys.executable, str(LOOP), f"--out={out}", *SETTINGS],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return out, " ".join(ran.stdout.split())


@pytest.fixture
def loop(script):
    """The script in this process."""
    return partial(script, "grpo_loop")


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


def test_ctrl_c_and_resume_give_the_numbers_of_an_uninterrupted_run(
    reference, tmp_path, loop, forked_engines, monkeypatch, capsys
):
    from runlog import RunLog

    def interrupted(log, row, samples):
        step(log, row, samples)
        signal.raise_signal(signal.SIGINT)

    step = RunLog.step
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", interrupted)
        loop(f"--out={tmp_path}", *SETTINGS)
    assert "--resume goes on from there" in " ".join(capsys.readouterr().out.split())
    assert len(rows(tmp_path)) == 1
    loop(f"--out={tmp_path}", *SETTINGS, "--resume")
    assert numbers(tmp_path) == numbers(reference[0])


def test_killed_engine_loses_nothing_and_changes_nothing(
    reference, tmp_path, loop, forked_engines, kill_engine, capsys
):
    kill_engine(after=2)
    loop(f"--out={tmp_path}", *SETTINGS)
    text = " ".join(capsys.readouterr().out.split())
    assert "starting a new engine; what was finished is kept" in text
    assert numbers(tmp_path) == numbers(reference[0])


def test_switches_run_in_process(tmp_path, loop):
    flags = ["--no-r3", "--no-tis", "--no-engine-process", "--num-steps=2"]
    loop(f"--out={tmp_path}", *SETTINGS, *flags)
    assert "correction/kept" not in rows(tmp_path)[0] and len(rows(tmp_path)) == 2


def test_resume_without_a_checkpoint_says_so(tmp_path, loop):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        loop(f"--out={tmp_path / 'nothing'}", *SETTINGS, "--resume")


def test_help_is_readable(loop, capsys):
    with pytest.raises(SystemExit) as stopped:
        loop("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "Replay the engine's expert choices" in text and "--no-r3" in text
