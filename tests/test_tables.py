import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


def test_the_tables_in_readme_and_docs_are_those_of_the_csvs():
    texts = [file.read_text() for file in tables.FILES]
    assert [tables.fill(text) for text in texts] == texts
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in tables.TABLES)
