"""The benchmark of a server with rounded weights, with a stand-in in the server's place."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from miles.errors import EngineDiedError, EngineError
from miles.rollout import SGLangServer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def sglang(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("precision_sglang")
    monkeypatch.setattr(module, "TELL_SECONDS", 0.3)
    return module


def served_by(monkeypatch, sglang, *flags, module="sglang_fake"):
    """Have a stand-in started, with flags of its own."""

    def made(folder, *, args, **settings):
        return SGLangServer(
            folder, args=[*args, *flags], module=f"tests.rollout.{module}",
            **settings | {"cwd": BENCHMARKS.parent},
        )  # fmt: skip

    monkeypatch.setattr(sglang, "SGLangServer", made)


def config(sglang, **changes):
    return sglang.Config(**{"prompts": 3, "answer_tokens": 4, "port": None} | changes)


@pytest.mark.parametrize("recipe", ["fp8", "int4"])
def test_answers_become_samples(monkeypatch, sglang, tmp_path, recipe):
    served_by(monkeypatch, sglang)
    settings = config(sglang, recipe=recipe)
    prompts = [[3, 4], [5, 6, 7], [8]]
    samples = sglang.answers_of(settings, str(tmp_path), prompts)
    assert [sample.tokens[: len(p)] for sample, p in zip(samples, prompts, strict=True)] == prompts
    assert all(sample.num_generated_tokens == 4 for sample in samples)
    assert sglang.answers_of(config(sglang, warm_up=True), str(tmp_path), prompts) == []


def test_a_server_that_takes_long_is_told_of_and_its_log_is_shown(
    monkeypatch, sglang, tmp_path, capsys
):
    served_by(monkeypatch, sglang, module="sglang_asleep")
    monkeypatch.setattr(sglang, "compilers", lambda group: ["cicc"])
    late = pytest.raises(EngineError, match="within 2 s")
    with late, sglang.serving(config(sglang, server_seconds=2.0), str(tmp_path)):
        pass
    said = capsys.readouterr().out
    assert f"waiting for the server; it runs cicc; its log ends: serving {tmp_path}" in said
    assert "the end of the server's log" in said and "the server is gone" in said


def test_one_that_dies_says_of_what(monkeypatch, sglang, tmp_path, capsys):
    served_by(monkeypatch, sglang, "--die-after=0.1")
    with pytest.raises(EngineDiedError), sglang.serving(config(sglang), str(tmp_path)):
        pass
    assert "no memory is left" in capsys.readouterr().out


def test_a_timeout_from_outside_still_shows_the_log(monkeypatch, sglang, tmp_path, capsys):
    served_by(monkeypatch, sglang, "--start-seconds=60")
    before = signal.getsignal(signal.SIGTERM)

    log = tmp_path / "server.log"

    def end():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit), sglang.serving(config(sglang), str(tmp_path)):
        pass
    shown = f"SystemExit; the end of the server's log:\nserving {tmp_path}"
    assert shown in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_compilers_of_a_group_are_found(sglang, tmp_path):
    tool = tmp_path / "ptxas"
    tool.symlink_to(sys.executable)
    code = "import time; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([tool, "-c", code], stdout=subprocess.PIPE, process_group=0) as running:
        try:
            running.stdout.readline()
            assert sglang.compilers(running.pid) == ["ptxas"]
            assert sglang.compilers(os.getpid()) == []
        finally:
            running.kill()
