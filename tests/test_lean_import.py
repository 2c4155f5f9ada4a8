"""What an import costs: told by a fresh interpreter each time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = [
    "accelerate",
    "datasets",
    "httpx",
    "matplotlib",
    "megatron",
    "msgspec",
    "pandas",
    "safetensors.torch",
    "scipy",
    "sglang",
    "transformers",
    "triton",
    "tyro",
]


def in_fresh_python(code: str, **settings) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""


def test_import_miles_loads_nothing_heavy_and_leaves_cuda_alone():
    # torch itself may import some of these: only what miles adds counts.
    out = in_fresh_python("""
        import sys, torch
        before = set(sys.modules)
        import miles
        print(*sorted(set(sys.modules) - before), torch.cuda.is_initialized())
        """)
    *added, cuda = out.split()
    assert cuda == "False"
    assert not [name for name in added if name in HEAVY or name.split(".")[0] in HEAVY]
    assert [name for name in added if name.startswith("miles")] == [
        "miles",
        "miles.errors",
        "miles.packed",
    ]


def test_import_miles_works_in_an_empty_environment():
    assert in_fresh_python("import miles; print(miles.__version__)", env={}).strip()


def test_packages_are_imported_on_first_use():
    out = in_fresh_python("""
        import sys, miles
        names = [name for name in ("losses", "moe", "sync") if f"miles.{name}" in sys.modules]
        miles.losses.ppo_clip, miles.moe.RoutingTape, miles.sync.InProcessSyncer
        assert miles.Sample is miles.rollout.Sample
        print(names, sorted(miles.__all__) == dir(miles))
        try:
            miles.nothing
        except AttributeError as error:
            print(error)
        """)
    assert out.splitlines() == ["[] True", "module 'miles' has no attribute 'nothing'"]


def test_maths_and_carriers_need_torch_alone():
    code = BLOCK.format(blocked=["transformers", "msgspec", "triton", "accelerate", "httpx"])
    code += (
        "import miles.packed, miles.errors, miles.protocols, miles.losses, miles.moe, miles.sync"
    )
    in_fresh_python(code)
    with pytest.raises(AssertionError, match="transformers is blocked"):
        in_fresh_python(BLOCK.format(blocked=["transformers"]) + "import transformers")


def test_samples_need_neither_transformers_nor_msgspec_and_what_does_says_so():
    code = BLOCK.format(blocked=["transformers", "msgspec"]) + textwrap.dedent("""
        from miles.errors import MissingExtraError
        from miles.rollout import Sample, collate, HFEngine
        collate([Sample(tokens=[1, 2])])
        try:
            from miles.rollout import EngineProcess
        except MissingExtraError as error:
            print(error)
        """)
    assert in_fresh_python(code).strip() == (
        "this needs the package 'msgspec', which is not installed; "
        "install it with: pip install 'miles[hf]'"
    )
