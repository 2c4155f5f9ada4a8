import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


def test_the_readmes_tables_are_those_of_the_csvs():
    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme) == readme
    assert all(f"<!-- {name} -->" in readme for name in tables.TABLES)
