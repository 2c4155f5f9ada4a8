"""The model that `sglang_fake` pretends to have: which token comes next, and what is said of it."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 32
EOS = 2


@dataclass(frozen=True)
class Layout:
    """Experts of the model that is pretended."""

    num_layers: int = 3
    topk: int = 2
    num_experts: int = 8
    moe_layers: tuple[int, ...] = (1, 2)


def next_token(previous: int, position: int, version: int) -> int:
    """The token at `position`, whatever was sampled before the one before it; never EOS."""
    token = (7 * previous + 3 * position + 5 * version + 11) % VOCAB
    return token if token != EOS else 3


@functools.cache
def logprob(previous: int, token: int, version: int, temperature: float) -> float:
    """What it was sampled with: a row of a table through a tempered softmax."""
    logits = np.sin(np.arange(VOCAB) * (1 + previous) + version) * 3
    logits = logits / (temperature or 1.0)
    return float(logits[token] - math.log(np.exp(logits).sum()))


def experts(token: int, version: int, layout: Layout) -> np.ndarray:
    """int32 `[layers, topk]`; dense layers are zeros, as in the real one."""
    ids = np.zeros((layout.num_layers, layout.topk), np.int32)
    for layer in layout.moe_layers:
        for k in range(layout.topk):
            ids[layer, k] = (3 * token + layer + k + version) % layout.num_experts
    return ids


def runs_of(versions: list[int]) -> list[dict[str, Any]]:
    """Spans of equal versions, as 0.5.19 and later send them."""
    spans: list[dict[str, Any]] = []
    for at, version in enumerate(versions):
        if spans and spans[-1]["version"] == str(version):
            spans[-1]["end"] = at + 1
        else:
            spans.append({"version": str(version), "start": at, "end": at + 1})
    return spans


def acceptance(names: str, count: int) -> dict[str, Any]:
    steps, proposed, accepted = max(1, count // 2), 3 * max(1, count // 2), max(0, count // 2)
    if names == "old":  # up to 0.5.10
        return {
            "spec_verify_ct": steps, "spec_draft_token_num": proposed,
            "spec_accept_token_num": accepted,
        }  # fmt: skip
    new = {
        "spec_verify_ct": steps, "spec_num_proposed_drafts": proposed,
        "spec_num_correct_drafts": accepted, "spec_accept_rate": accepted / proposed,
        "spec_accept_length": count / steps, "spec_correct_drafts_histogram": [steps],
    }  # fmt: skip
    if names == "both":
        new |= {"spec_accepted_drafts": accepted, "spec_proposed_drafts": proposed}
    return new


def layout_of(model_path: str) -> Layout:
    """That of a mixture of experts without dense layers."""
    config = json.loads(Path(model_path, "config.json").read_text())
    layers = config["num_hidden_layers"]
    experts_there = config.get("num_experts") or config["num_local_experts"]
    return Layout(layers, config["num_experts_per_tok"], experts_there, tuple(range(layers)))
