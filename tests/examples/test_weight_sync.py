"""The example of a trainer, an engine and a kill, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "weight_sync.py"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("carrier", ["shared-memory", "disk"])
def test_every_version_is_served_though_the_engine_is_killed(carrier):
    sizes = ["--hidden", "64", "--layers", "2", "--versions", "3", "--kill-at", "2"]
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "--carrier", carrier, *sizes],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    gaps = [line.split()[5] for line in run.stdout.splitlines() if "mean |d|" in line]
    assert len(gaps) == 3 and all(float(gap) < 1e-4 for gap in gaps), run.stdout
    assert "the engine is back, with version" in run.stdout
    failed = "version 2: the receiver went away" in run.stdout
    assert failed == (carrier == "shared-memory")
