"""Write the tables of README and docs anew, from the CSVs and from the registry of routers.

    python benchmarks/tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from router_table import refused_routers, router_families

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


def losses_of_heads() -> str:
    """Milliseconds and peak memory from hidden states or logits to a loss and back."""
    lines = [
        "| task | hardware, date | library | ms | times ours | peak MiB | loss, gradient off by |",
        "|---|---|---|---|---|---|---|",
    ]
    ours: dict[tuple[str, str], float] = {}
    for row in rows("losses_of_heads"):
        key = (row["task"], f"{row['hardware']}, {row['date']}")
        ms = float(row["ms"])
        if row["library"].startswith("miles"):
            ours[key] = ms
        cells = [*key, row["library"], f"{ms:,.0f}", f"{ms / ours[key]:.3g}", row["peak_mib"]]
        cells.append(f"{row['loss_gap']}, {row['gradient_gap']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def routing_bytes() -> str:
    """Bytes a token of SGLang's payload, of a tape, and of the entropy bound."""
    lines = [
        "| model | layers / experts / top-k | SGLang, base64 | SGLang, int32 | `RoutingTape`"
        " | bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows("routing_bytes"):
        shape = f"{row['moe_layers']} / {row['num_experts']} / {row['topk']}"
        cells = [row["model"], shape]
        cells += [f"{int(row[k]):,}" for k in ("sglang_base64", "sglang_int32", "tape", "bound")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def routing() -> str:
    """Milliseconds with recording or replay, and percent of those without."""
    lines = [
        "| hardware, date | part | variant | ms (p20 to p80) | percent more (p20 to p80)"
        " | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows("routing"):
        part = row["part"]
        if part == "train":
            pieces = (
                "" if row["micro_batches"] == "1" else f"{row['micro_batches']} micro-batches, "
            )
            part += f", {pieces}{'' if row['checkpointing'] == 'True' else 'not '}checkpointed"
        ms, p20, p80 = (float(row[key]) for key in ("ms", "p20", "p80"))
        more = [float(row[f"percent{end}"]) for end in ("", "_p20", "_p80")]
        alone = row["part"] == "copy" or row["variant"] == "without"
        cells = [f"{row['hardware']}, {row['date']}", part, row["variant"]]
        cells.append(f"{ms:.2f} ({p20:.2f} to {p80:.2f})")
        cells.append("" if alone else f"{more[0]:+.2f} ({more[1]:+.2f} to {more[2]:+.2f})")
        cells.append(f"{float(row['peak_gib']):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def routing_sglang() -> str:
    """The log-prob gap to SGLang with and without replay, and how often the routers agree."""
    lines = [
        "| hardware, date, engine | routing | tokens | mean gap | p99 | max | same experts"
        " | first layer, last layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"without": "the trainer's own", "replay": "replayed"}
    for row in rows("routing_sglang"):
        layers = [f"{float(share):.2%}" for share in row["agreement_by_layer"].split()]
        cells = [f"{row['hardware']}, {row['date']}, {row['engine']}", names[row["variant"]]]
        cells += [row["tokens"], *(f"{float(row[key]):.2g}" for key in ("mean", "p99", "max"))]
        cells += [f"{float(row['agreement']):.2%}", f"{layers[0]}, {layers[-1]}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "engine_throughput": engine_throughput,
    "losses": losses,
    "losses_of_heads": losses_of_heads,
    "refused_routers": refused_routers,
    "router_families": router_families,
    "routing": routing,
    "routing_bytes": routing_bytes,
    "routing_sglang": routing_sglang,
}
FILES = [HERE.parent / path for path in ("README.md", "docs/losses.md", "docs/moe.md")]


def fill(text: str) -> str:
    """The text with every table in it made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, table=table: m[1] + table() + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    for file in FILES:
        file.write_text(fill(file.read_text()))
