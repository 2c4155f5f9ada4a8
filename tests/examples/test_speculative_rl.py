"""RL with a draft that learns, a few steps long: stopped, and resumed to the same numbers."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from miles.rollout import HFEngine
from tests.examples.test_grpo_loop import rows

SCRIPT = Path(__file__).parents[2] / "examples" / "speculative_rl.py"
SMALL = {
    "num-steps": 4, "num-prompts": 8, "num-samples-per-prompt": 2, "num-updates": 2,
    "micro-batch-size": 8, "num-epochs": 1, "max-batch": 16, "warmup-steps": 12,
    "num-held-out": 8, "eval-every": 2, "checkpoint-every": 1, "num-compared": 8,
    "draft-warmup-updates": 12, "num-rewards": 16,
}  # fmt: skip


def flags(out: Path) -> list[str]:
    return [f"--out={out}", *(f"--{key}={value}" for key, value in SMALL.items())]


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *flags(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return " ".join(text.split())


def numbers(out: Path) -> list[dict[str, float]]:
    """What a run computed; a draft's own readings are of the step before, if there was one."""
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "draft/"))} for r in rows(out)
    ]


def test_a_run_that_is_resumed_at_step_0_goes_on_with_the_draft_that_was_warmed_up(
    tmp_path, script
):
    import speculative_rl as example

    def made(resume):
        config = example.SpeculativeConfig(
            out=tmp_path, resume=resume, num_prompts=4, micro_batch_size=4, num_compared=4,
            draft_warmup_updates=3, max_batch=8,
        )  # fmt: skip
        torch.manual_seed(5 if resume else 6)
        model, tokenizer = example.build_model(0), example.build_tokenizer()
        model.save_pretrained(tmp_path / "policy")
        task = example.RunningTotals(0, num_terms=config.num_terms)
        made = example.Speculation(config, task, model, tokenizer)
        made.start(config, tmp_path / "policy", "")
        made.push(model.named_parameters(), version=0)
        made.close()
        return made

    first, again = made(False), made(True)
    assert first.trainer.version == again.trainer.version == 3
    expected = dict(first.draft.named_parameters())
    served = again._engines[0].draft_weights.weight_tensors()
    for name, parameter in again.draft.named_parameters():
        assert torch.equal(parameter, expected[name]) and torch.equal(parameter, served[name])


@pytest.mark.timeout(300)
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, script, capsys, monkeypatch):
    def slow(*given, **named):
        time.sleep(0.01)  # a step takes less: by the time that requests come does not decide
        return submit(*given, **named)

    submit = HFEngine.submit
    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "submit", slow)
        script("speculative_rl", *flags(tmp_path / "whole"))
    text = " ".join(capsys.readouterr().out.split())
    assert "reward with the draft" in text and "standard errors apart" in text
    assert (tmp_path / "whole" / "acceptance.png").stat().st_size > 1000
    found = rows(tmp_path / "whole")
    assert len(found) == 4
    assert all(1 <= row["speculative/accept_length"] <= 5 for row in found)
    assert all(1 <= row["frozen/accept_length"] <= 5 for row in found)
    assert found[-1]["draft/acceptance/step_0"] > 0
    versions = [row["speculative/draft_version"] for row in found]
    assert 0 < versions[0] < versions[1] < versions[2] < versions[3]  # it is served

    process = start(tmp_path / "parts")
    deadline = time.monotonic() + 120
    while not rows(tmp_path / "parts"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "--resume goes on" in finish(process)
    assert 1 <= len(rows(tmp_path / "parts")) < 4
    script("speculative_rl", *flags(tmp_path / "parts"), "--resume")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
