import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[[str], str]]:
    """What goes wrong in a part of `interpreted_kernels`: a traceback, or nothing.

    One process for all parts: its imports take as long as most parts do.
    """
    pytest.importorskip("triton")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.precision.interpreted_kernels"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def check(part: str) -> str:
        if process.poll() is None:
            print(part, file=process.stdin, flush=True)
            if answer := process.stdout.readline():
                return json.loads(answer)
        return f"the process of interpreted_kernels ended with {process.wait()}"

    with process:
        yield check
