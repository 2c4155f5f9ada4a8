import importlib
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_tables_in_readme_and_docs_are_those_of_the_csvs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = importlib.import_module("tables")
    texts = [file.read_text() for file in tables.FILES]
    assert [tables.fill(text) for text in texts] == texts
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in tables.TABLES)
