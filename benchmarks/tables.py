"""Write the benchmark tables of README and docs anew from the CSVs.

    python benchmarks/tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

HERE = Path(__file__).parent


def rows(name: str) -> list[dict[str, str]]:
    """A CSV of `results/`."""
    with (HERE / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def engine_throughput() -> str:
    """Times `transformers.generate`, one line a hardware and model."""
    slots = ("16", "32", "64")
    lines = [
        "| hardware, date | model | " + " | ".join(f"{n} slots" for n in slots) + " |",
        "|---|---|" + "---|" * len(slots),
    ]
    times: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows("engine_throughput"):
        dtype = row["dtype"].removeprefix("torch.")
        key = (f"{row['hardware']}, {row['date']}", f"{row['model']}, {dtype}")
        times.setdefault(key, {})[row["engine"].rpartition("=")[2]] = row["times_generate"]
    for (hardware, model), values in times.items():
        cells = " | ".join(f"{float(values[n]):.2f}" for n in slots)
        lines.append(f"| {hardware} | {model} | {cells} |")
    return "\n".join(lines)


def losses() -> str:
    """Milliseconds of each library, beside our fastest as it is called (not as a graph)."""
    lines = ["| task | hardware, date | library | ms | times ours |", "|---|---|---|---|---|"]
    ours: dict[tuple[str, str], float] = {}
    for row in rows("losses"):
        key = (row["task"], f"{row['hardware']}, {row['date']}")
        if row["library"].startswith("miles") and "graph" not in row["library"]:
            ours[key] = min(ours.get(key, float("inf")), float(row["ms"]))
    for row in rows("losses"):
        key = (row["task"], f"{row['hardware']}, {row['date']}")
        ms = float(row["ms"])
        cells = [*key, row["library"], f"{ms:.3g}", f"{ms / ours[key]:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"engine_throughput": engine_throughput, "losses": losses}
FILES = [HERE.parent / "README.md", HERE.parent / "docs" / "losses.md"]


def fill(text: str) -> str:
    """The text with every table in it made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, table=table: m[1] + table() + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    for file in FILES:
        file.write_text(fill(file.read_text()))
