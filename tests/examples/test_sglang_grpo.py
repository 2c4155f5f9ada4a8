"""The demo loop against a stand-in for SGLang, which cannot learn: what comes and goes is real."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from miles.errors import EngineDiedError
from tests.rollout.sglang_fake import layout_of
from tests.sync.test_sglang import Server as WeightServer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SMALL = {
    "num-steps": 3, "num-prompts": 8, "num-samples-per-prompt": 2, "num-updates": 2,
    "micro-batch-size": 16, "num-epochs": 1, "max-batch": 16, "warmup-steps": 2,
    "num-held-out": 4, "eval-every": 2, "checkpoint-every": 1, "device": "cpu", "via": "value",
    "num-layers": 1,
}  # fmt: skip


@pytest.fixture
def python(tmp_path):
    """An interpreter that has a stand-in for SGLang and nothing else."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\ntest "$2" = sglang.launch_server || exit 9\nshift 2\n'
        f'PYTHONPATH={ROOT} exec {sys.executable} -m tests.rollout.sglang_fake "$@"\n'
    )
    script.chmod(0o755)
    return script


def flags(out: Path, python: Path) -> list[str]:
    settings = [f"--{key}={value}" for key, value in SMALL.items()]
    return [f"--out={out}", f"--server-python={python}", *settings]


def start(out: Path, python: Path) -> subprocess.Popen:
    command = [sys.executable, str(EXAMPLES / "sglang_grpo.py"), *flags(out, python)]
    # On a busy machine threads that spin while they wait for each other take minutes.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return " ".join(text.split())


def rows(out: Path) -> list[dict[str, float]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.timeout(300)
def test_run_leaves_readings_of_every_step_and_goes_on_after_a_stop(
    python, tmp_path, script, capsys
):
    out = tmp_path / "run"
    process = start(out, python)
    while not rows(out):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text = finish(process)
    assert "the server has answered after" in text and "--resume goes on from there" in text
    done = len(rows(out))
    assert done < 3
    script("sglang_grpo", *flags(out, python), "--resume")
    text = " ".join(capsys.readouterr().out.split())
    assert f"resumed at step {done}" in text and "held-out accuracy after RL" in text
    assert "gap to the server, nats" in text and "in which the server stood still" in text
    assert [row["step"] for row in rows(out)] == [0, 1, 2]
    for row in rows(out):
        assert row["time/sync"] > row["time/sync/pause"] > 0
        assert 0 <= row["natural/agreement"] < 0.5, "the stand-in's experts are not the model's"
        assert row["natural/mismatch/abs"] != row["mismatch/abs"]
    assert (out / "reward.png").stat().st_size > 1000
    assert "listening on http://127.0.0.1" in (out / "server.log").read_text()
    config = json.loads((out / "checkpoints" / "step-000003" / "config.json").read_text())
    assert config["head_dim"] == 64 and not config["tie_word_embeddings"]


@pytest.mark.timeout(300)
def test_a_killed_server_is_started_again_and_gets_the_weights_of_the_step(
    python, tmp_path, script, kill_engine, capsys
):
    out = tmp_path / "run"
    kill_engine(after=1)
    script("sglang_grpo", *flags(out, python), "--no-r3", "--num-steps=4")
    text = " ".join(capsys.readouterr().out.split())
    assert "starting a new engine; what was finished is kept" in text
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3]
    assert "natural/agreement" not in rows(out)[0]


def test_help_is_readable(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script("sglang_grpo", "--help")
    text = capsys.readouterr().out
    assert "The server's PYTHONPATH" in text and "{cuda_ipc,value,disk}" in text
    assert "--engine-process" not in text


class Server(WeightServer):
    """Stands where `SGLangServer` does, in this process; may die in the middle of a push."""

    made: ClassVar[list["Server"]] = []
    pid = 1
    dies = False

    def __init__(self, path, **settings):
        super().__init__("0.5.17", model_path=str(path), layout=layout_of(path))
        self.path, self.settings, self.starts = path, settings, 0
        Server.made.append(self)

    def check(self):
        if self.died:
            raise EngineDiedError(self.died)

    def start(self):
        self.weight_version, self.died, self.loaded = "0", "", {}
        self.starts += 1
        return super().start()

    def update(self, name, body):
        if self.dies and name.startswith("update_weights"):
            self.dies = False
            self.die("killed")
        return super().update(name, body)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import sglang_grpo

    monkeypatch.setattr(sglang_grpo, "SGLangServer", Server)
    monkeypatch.setattr(sglang_grpo, "GONE_SECONDS", 0.2)
    monkeypatch.setattr(Server, "made", [])
    return sglang_grpo


@pytest.mark.parametrize("via", ["value", "disk"])
def test_weights_come_under_the_checkpoints_names_even_if_the_server_dies_of_them(
    example, tmp_path, via
):
    from arithmetic import build_model
    from rollouts import Rollouts

    class Log:
        said = ""

        def say(self, text):
            self.said += text

    config = example.SGLangConfig(out=tmp_path, device="cpu", via=via)
    model, log = build_model(0, num_experts=4, tie_word_embeddings=False), Log()
    model.save_pretrained(tmp_path / "first")
    make = partial(example.served_engine, model=model)
    with closing(Rollouts(model, make, config, tmp_path / "first", log)) as rollouts:
        server = Server.made[0]
        first = load_file(server.path / "model.safetensors")
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        server.dies = True
        report = rollouts.sync(3)
        assert "starting a new engine" in log.said and server.starts == 2
        assert server.weight_version == "3" and report.phases["pause"] > 0
        sent = server.loaded
        assert {w.dtype for w in [*sent.values(), *first.values()]} == {torch.bfloat16}
        assert sent.keys() == first.keys(), "names are those that the server found on the disk"
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in sent
        assert [name for name in sent if not sent[name].equal(first[name])] == ["lm_head.weight"]
    assert "--enable-return-routed-experts" in server.settings["args"]
