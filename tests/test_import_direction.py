"""Who may import whom, read off the source: the order that keeps each block usable alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"packed", "errors", "protocols"}
MAY_IMPORT = {
    "env": BASE,
    "errors": set(),
    "packed": {"errors", "protocols"},
    "protocols": {"errors", "packed"},
    "losses": BASE,
    "moe": BASE,
    "precision": BASE,
    "sync": BASE | {"precision"},
    "rollout": BASE | {"losses", "moe"},
}
FILES = sorted((ROOT / "miles").rglob("*.py"))


def part_of(path: Path) -> str:
    """`losses` for miles/losses/ratios.py, `packed` for miles/packed.py."""
    return path.relative_to(ROOT / "miles").with_suffix("").parts[0]


def imported_parts(source: str) -> set[str]:
    """Parts of miles that are imported anywhere in it, function bodies too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("miles.")}


def test_the_reader_sees_every_form_of_import():
    source = "import miles.moe.tape\nfrom miles import sync\ndef f():\n from miles.losses import x"
    assert imported_parts(source) == {"moe", "sync", "losses"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "__init__.py" or path.parent.name != "miles"]
)
def test_imports_go_one_way(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    assert imported_parts(path.read_text()) <= MAY_IMPORT[part] | {part}


def test_the_root_imports_base_names_only_unless_for_types():
    tree = ast.parse((ROOT / "miles/__init__.py").read_text())
    now = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imported_parts(ast.unparse(ast.Module(now, []))) <= BASE | {"MilesError"}


@pytest.mark.parametrize("part", ["losses", "moe", "packed", "protocols", "errors", "sync"])
def test_no_optional_dependency_is_imported_when_a_module_loads(part):
    files = [path for path in FILES if part_of(path) == part]
    assert files
    for path in files:
        if path.name.endswith("_triton.py"):  # imported when its kernel is wanted, not before
            continue
        tree = ast.parse(path.read_text())
        modules = {
            name.split(".")[0]
            for node in tree.body
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not modules & {"transformers", "msgspec", "triton", "httpx", "megatron"}, path
