"""Write the tables of README and docs anew, from the CSVs and from the registry of routers.

    python benchmarks/tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path

from router_table import refused_routers, router_families

from miles.precision.memory import BUILT_IN, RECIPES, engine_bytes, trainer_bytes, weights_of

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


def quantise() -> str:
    """GB/s of each quantise kernel, and the share of a copy's in the same run."""
    times: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows("quantise"):
        key = (f"{row['device']}, {row['date']}", row["kernel"])
        cell = f"{int(row['gb_s']):,} ({float(row['of_copy']):.0%})"
        times.setdefault(key, {})[row["shape"]] = cell
    shapes = list(dict.fromkeys(row["shape"] for row in rows("quantise")))
    lines = [
        "| hardware, date | kernel | " + " | ".join(shapes) + " |",
        "|---|---|" + "---|" * len(shapes),
    ]
    for key, cells in times.items():
        found = (cells.get(shape, "") for shape in shapes)
        lines.append(f"| {' | '.join([*key, *found])} |")
    return "\n".join(lines)


def fp8_linear() -> str:
    """Microseconds of a linear, and its speed against bf16's and against the bare FP8 GEMM's."""
    lines = [
        "| hardware, date | M x N x K | pass | what | us | times bf16 | of the bare GEMM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows("fp8_linear"):
        bare = f"{float(row['of_bare']):.0%}" if row["of_bare"] else ""
        what = " | ".join(row[name] for name in ("shape", "pass", "kernel"))
        lines.append(
            f"| {row['device']}, {row['date']} | {what} | {float(row['us']):,.0f} | "
            f"{float(row['of_bf16']):.2f} | {bare} |"
        )
    return "\n".join(lines)


def precision_step() -> str:
    """Milliseconds of a training step, its speed against bf16's, and what rounding takes of it."""
    lines = [
        "| hardware, date | layers | tokens | what | ms (p20 to p80) | times bf16 |"
        " rounding weights, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows("precision_step"):
        ms, p20, p80 = (float(row[key]) for key in ("ms", "p20", "p80"))
        rounding = row["rounding_ms"]
        if rounding:
            rounding = f"{float(rounding):.1f} ({float(row['rounding_percent']):.1f} %)"
        cells = [f"{row['hardware']}, {row['date']}", row["mode"]]
        cells += [f"{int(row['tokens']):,}", row["variant"]]
        cells += [f"{ms:,.0f} ({p20:,.0f} to {p80:,.0f})"]
        cells += [f"{1 / (1 + float(row['percent']) / 100):.2f}", rounding]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def precision_curves() -> str:
    """Losses of a run in each precision, how far from bf16's, and where nothing was NaN."""
    found = rows("precision_curves_summary")
    rates: dict[tuple[str, str], list[str]] = {}
    for row in sorted(found, key=lambda row: float(row["learning_rate"])):
        if row["run"] == "short":
            rate = f"{float(row['learning_rate']):.0e}".replace("e-0", "e-")
            text = rate if row["finite"] == "True" else f"{rate}: NaN"
            rates.setdefault((row["model"], row["precision"]), []).append(text)
    lines = [
        "| hardware, date | model | precision | loss, last 50 steps | held out | from bf16 (band) |"
        " ms a step | learning rates without NaN |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row["run"] != "curve":
            continue
        distance = f"{float(row['distance']):.2%}" if row["distance"] else ""
        if row["band"]:
            within = "" if row["within"] == "True" else ", not within"
            distance += f" ({float(row['band']):.0%}{within})"
        cells = [f"{row['hardware']}, {row['date']}"]
        cells += [f"{row['model']}, {int(row['parameters']) / 1e9:.2f} B", row["precision"]]
        cells += [row["last_loss"], row["held_out"], distance, f"{float(row['ms']):.0f}"]
        cells.append(", ".join(rates.get((row["model"], row["precision"]), [])))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def precision_sglang() -> str:
    """The log-prob gap between a server with rounded weights and trainers."""
    lines = [
        "| hardware, date, engine | weights | served | trainer | tokens | mean gap | p99 | max"
        " | k3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows("precision_sglang"):
        numbers = (f"{float(row[name]):.2g}" for name in ("mean", "p99", "max", "k3"))
        cells = [f"{row['hardware']}, {row['date']}, {row['engine']}", row["weights"]]
        cells += [row["recipe"].upper(), row["trainer"], row["tokens"], *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quantisers() -> str:
    """What other block-FP8 quantisers change of ours, and what their floors leave of gradients."""
    sigmas = ("1e-04", "1e-06", "1e-07", "1e-08", "1e-09")
    lines = [
        "| quantiser | scales | codes that differ | scales that differ | bf16 values that differ"
        " | block of zeros | " + " | ".join(f"{float(s):.0e}" for s in sigmas) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(sigmas),
    ]
    for row in rows("quantisers"):
        if row["data"] != "normal":
            continue
        cells = [f"{row['quantiser']}, {row['origin']}", row["scale"]]
        for key in ("codes", "scales", "dequantised"):
            share = float(row[key])
            cells.append(f"{100 * share:.2g} %" if share else "0")
        codes = "NaN" if row["zero_codes"] == "nan" else row["zero_codes"]
        cells.append(f"scale {row['zero_scale']}, codes {codes}")
        cells += [row[f"snr_{sigma}"] for sigma in sigmas]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def int4_rules() -> str:
    """How far rules of INT4 agree with themselves, on normal and on heavy-tailed weights."""
    lines = [
        "| rules | trainer and checkpoint differ | changed by rounding again | error, times ours |",
        "|---|---|---|---|",
    ]
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows("int4_rules"):
        found.setdefault(row["rules"], []).append(row)
    for name, both in found.items():
        cells = [name]
        for key in ("trainer_checkpoint", "rounded_again"):
            shares = [float(row[key]) for row in both]
            cells.append("; ".join(f"{100 * share:.2g} %" if share else "0" for share in shares))
        cells.append("; ".join(f"{float(row['error']):.2f}" for row in both))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# GB of INT4 weights; where there is none, what the usual factor makes of bf16.
IN_CIRCULATION = {"llama-3.1-70b": 45.0, "qwen3-235b-a22b": 150.0, "deepseek-v3": 420.0}
USUAL_FACTOR = 3.1


def memory() -> str:
    """GB of each built-in model, for an engine and for a trainer, beside figures in circulation."""
    lines = [
        "| model | parameters | bf16 | FP8 | INT4, all | INT4, experts only | in circulation |"
        " trainer, bf16 | trainer, FP8 or INT4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in BUILT_IN:
        weights = weights_of(model)
        engine = {
            (name, scope): sum(engine_bytes(weights, RECIPES[name], scope=scope).values()) / 1e9
            for name in ("bf16", "fp8", "int4")
            for scope in ("all", "experts")
        }
        trainer = [sum(trainer_bytes(weights, RECIPES[r]).values()) / 1e9 for r in ("bf16", "int4")]
        plain, whole = engine["bf16", "all"], engine["int4", "all"]
        has_experts = any(weight.kind == "experts" for weight in weights)
        ours = engine["int4", "experts"] if has_experts else whole
        known = IN_CIRCULATION.get(model, plain / USUAL_FACTOR)
        cells = [
            model,
            f"{sum(weight.numel for weight in weights) / 1e9:,.1f} B",
            f"{plain:,.0f}",
            f"{engine['fp8', 'all']:,.0f} ({plain / engine['fp8', 'all']:.2f}x)",
            f"{whole:,.0f} ({plain / whole:.2f}x)",
            f"{ours:,.0f} ({plain / ours:.2f}x)" if has_experts else "",
            f"{known:,.0f} ({known / ours - 1:+.0%})",
            f"{trainer[0]:,.0f}",
            f"{trainer[1]:,.0f} ({trainer[0] / trainer[1]:.2f}x)",
        ]
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


def delta_sparsity() -> str:
    """What a step changes of bf16 weights, and what it takes to tell; medians over the steps."""
    lines = [
        "| hardware, date | model | learning rate | against | changed | least to most | bitmap"
        " | gaps | delta, zstd | times smaller |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows("delta_sparsity"):
        key = (f"{row['hardware']}, {row['date']}", row["model"], row["learning_rate"])
        found.setdefault((*key, f"the {row['against']}"), []).append(row)
    for key, group in found.items():
        shares = sorted(float(row["share"]) for row in group)
        full = int(group[0]["full_bytes"])
        names = ("bitmap_bytes", "index_bytes", "delta_bytes")
        sizes = [statistics.median(int(row[name]) for row in group) for name in names]
        cells = [*key, f"{statistics.median(shares):.2%}", f"{shares[0]:.2%} to {shares[-1]:.2%}"]
        cells += [f"{size / full:.2%}" for size in sizes]
        cells.append(f"{full / max(sizes[2], 1):,.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speculative() -> str:
    """Tokens a second of rollouts with a draft and without, by requests on their way at once."""
    lines = [
        "| hardware, date, commit | policy, draft | engine | in flight, of | variant"
        " | tokens a second (p20 to p80) | times plain (p20 to p80) | accept length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows("speculative"):
        speed = "{tokens_per_second} ({p20} to {p80})".format(**row)
        times = [f"{float(row[f'speedup{end}']):.2f}" for end in ("", "_p20", "_p80")]
        cells = [f"{row['hardware']}, {row['date']}, {row['commit']}"]
        batch, waves = int(row["batch"]), int(row["waves"])
        cells += [f"{row['policy']}, {row['draft']}", row["engine"]]
        cells += [f"{batch} of {waves * batch}", row["variant"]]
        cells += [speed, "{} ({} to {})".format(*times)]
        cells += [f"{float(row['accept_length']):.2f}" if row["accept_length"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draft_cost() -> str:
    """What a draft that learns online adds to the policy's step."""
    lines = [
        "| hardware, date, commit | activations | what | ms | time | FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows("draft_cost"):
        again = "computed again" if row["checkpointing"] == "True" else "kept"
        cells = [f"{row['hardware']}, {row['date']}, {row['commit']}", again, row["variant"]]
        cells += [f"{float(row['ms']):,.0f}"]
        cells += [f"{float(row[key]):+.1f} %" for key in ("percent", "flop_percent")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def weight_sync() -> str:
    """GB/s of each carrier and model, beside a copy, and where the time goes."""
    lines = [
        "| hardware, date | carrier | model | GB, tensors | bucket, MiB | ms | gather, send, load,"
        " commit | pause, ms | GB/s | of a copy | of its traffic |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows("weight_sync"):
        cells = [f"{row['device']}, {row['date']}", row["carrier"], row["model"]]
        cells += [f"{int(row['bytes']) / 1e9:.1f}, {int(row['tensors']):,}", row["bucket_mb"]]
        phases = [row[f"{name}_ms"] for name in ("gather", "send", "load", "commit", "pause")]
        phases = [f"{float(ms):.1f}" if ms else "" for ms in phases]
        cells += [f"{float(row['ms']):,.1f}", ", ".join(filter(None, phases[:4])), phases[4]]
        cells += [f"{float(row['gb_s']):,.1f}"]
        cells += [f"{float(row[name]):.0%}" for name in ("of_copy", "of_traffic")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def weight_sync_sglang() -> str:
    """Milliseconds of a push into a real server, ours beside SGLang's own client."""
    lines = [
        "| hardware, date, commit | client | model | GB | bucket, MiB | ms (p20 to p80) |"
        " gather, load, commit | pause, ms | GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows("weight_sync_sglang"):
        cells = [f"{row['device']}, {row['date']}, {row['commit']}", row["client"], row["model"]]
        cells += [f"{int(row['bytes']) / 1e9:.1f}", row["bucket_mb"]]
        cells += [f"{row['ms']} ({row['ms_p20']} to {row['ms_p80']})"]
        cells += [", ".join(filter(None, (row[f"{n}_ms"] for n in ("gather", "load", "commit"))))]
        cells += [row["pause_ms"], row["gb_s"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "delta_sparsity": delta_sparsity,
    "engine_throughput": engine_throughput,
    "draft_cost": draft_cost,
    "fp8_linear": fp8_linear,
    "int4_rules": int4_rules,
    "losses": losses,
    "losses_of_heads": losses_of_heads,
    "memory": memory,
    "precision_curves": precision_curves,
    "precision_sglang": precision_sglang,
    "precision_step": precision_step,
    "quantise": quantise,
    "quantisers": quantisers,
    "refused_routers": refused_routers,
    "router_families": router_families,
    "routing": routing,
    "routing_bytes": routing_bytes,
    "routing_sglang": routing_sglang,
    "speculative": speculative,
    "weight_sync": weight_sync,
    "weight_sync_sglang": weight_sync_sglang,
}
PAGES = (
    "README.md", "docs/losses.md", "docs/moe.md", "docs/precision.md", "docs/speculative.md",
    "docs/sync.md",
)  # fmt: skip
FILES = [HERE.parent / path for path in PAGES]


def fill(text: str) -> str:
    """The text with every table in it made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for file in FILES:
        file.write_text(fill(file.read_text()))
