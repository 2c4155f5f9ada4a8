"""The tables of the routers in docs/moe.md, made of the registry; `tables.py` writes them."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from miles.moe import REFUSED, ROUTER_FAMILIES

# No experts(hidden, ids, weights) beside the router; a test tries all the others.
WITHOUT_DROP = {"JetMoeTopKGating", "Llama4Router"}


@cache
def models() -> dict[str, str]:
    """Router class to the model of transformers whose code defines it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    names = {family.router for family in ROUTER_FAMILIES} | REFUSED.keys()
    found = {}
    for path in Path(spec.submodule_search_locations[0]).glob("models/*/modeling_*.py"):
        for name in re.findall(r"^class (\w+)\(", path.read_text(), re.M):
            if name in names:
                found[name] = path.parent.name
    return found


def router_families() -> str:
    """One line a family that is replayed, by the model's name."""
    lines = [
        "| model of transformers | router | experts | top-k | groups | `drop` |",
        "|---|---|---|---|---|---|",
    ]
    for family in sorted(ROUTER_FAMILIES, key=lambda family: models()[family.router]):
        cells = [
            models()[family.router],
            *(f"`{text}`" for text in (family.router, family.num_experts, family.topk)),
            "yes" if family.group_limited else "",
            "no" if family.router in WITHOUT_DROP else "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refused_routers() -> str:
    """One line a router that can't be replayed."""
    lines = ["| model of transformers | router | why not |", "|---|---|---|"]
    for router, reason in sorted(REFUSED.items(), key=lambda pair: models()[pair[0]]):
        lines.append(f"| {models()[router]} | `{router}` | {reason} |")
    return "\n".join(lines)
