"""Scripts and engines without the imports, which take longer than most of what they do here."""

import multiprocessing
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miles.rollout import process
from tests.distributed.gloo import PRELOAD

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    """Runs an example as a script in this process: `script("grpo_loop", "--num-steps=2")`."""

    def run(name: str, *flags: str) -> None:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *flags])
        runpy.run_path(path, run_name="__main__")

    monkeypatch.syspath_prepend(EXAMPLES)
    num_threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture
def kill_engine(script, monkeypatch, capsys):
    """Has a run's engine killed as the first answer after so many steps is there."""

    def kill(after: int) -> None:
        from runlog import RunLog

        def counting(log, *row):
            done.append(step(log, *row))

        def killing(log, *count):
            advance(log, *count)
            if len(done) == after and not killed:
                said = capsys.readouterr().out
                killed.append(int(re.findall(r"engine process (\d+) is up", said)[-1]))
                os.kill(killed[0], signal.SIGKILL)

        step, advance, done, killed = RunLog.step, RunLog.advance, [], []
        monkeypatch.setattr(RunLog, "step", counting)
        monkeypatch.setattr(RunLog, "advance", killing)

    return kill


@pytest.fixture
def forked_engines(monkeypatch):
    """Forks engines from the server that ranks are forked from. How they are spawned is seen by
    the tests of `EngineProcess`, and by those of the examples without this fixture."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    monkeypatch.setattr(process, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
