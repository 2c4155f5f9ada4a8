"""The example of a trainer, an engine and a kill, once as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "weight_sync.py"


def flags(carrier):
    sizes = ["--hidden", "64", "--layers", "2", "--versions", "3", "--kill-at", "2"]
    return ["--carrier", carrier, *sizes]


@pytest.fixture
def disk(script, forked_engines, capsys):
    script("weight_sync", *flags("disk"))
    return capsys.readouterr().out


@pytest.fixture
def shared_memory():
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), *flags("shared-memory")],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize("carrier", ["shared_memory", "disk"])
def test_every_version_is_served_though_the_engine_is_killed(request, carrier):
    said = request.getfixturevalue(carrier)
    gaps = [line.split()[5] for line in said.splitlines() if "mean |d|" in line]
    assert len(gaps) == 3 and all(float(gap) < 1e-4 for gap in gaps), said
    assert "the engine is back, with version" in said
    failed = "version 2: the receiver went away" in said
    assert failed == (carrier == "shared_memory")
