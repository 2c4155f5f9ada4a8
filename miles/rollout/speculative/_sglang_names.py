"""Where SGLang's draft classes put each tensor of a checkpoint, derived from their naming rules.

They skip names that they do not know without a word, and leave parameters that nothing filled as
they were made. `sglang_destinations` says both in advance; checked against SGLang 0.5.17.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from miles.errors import CheckpointError

__all__ = ["check_sglang", "sglang_destinations"]

Place = tuple[str, str]
"""A parameter of the server's module, and which part of it ("" for all)."""
Shape = tuple[int, ...]

FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
}
LEGACY = {"midlayer": "layers.0"}
UNUSED = ("t2d", "unused")
NEXTN_OWN = ("shared_head.norm", "eh_proj", "enorm", "hnorm")
NEXTN_BORROWED = ("shared_head.head", "embed_tokens")
EAGLE = ("LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle")
EAGLE3 = "LlamaForCausalLMEagle3"
NEXTN = "DeepseekV3ForCausalLM"


def sglang_destinations(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Place | None]:
    """Where each tensor goes; None where the server skips it.

    Args:
        config: The checkpoint's `config.json`.
        names: Its tensors' names.

    Raises:
        CheckpointError: An architecture that is none of SGLang's drafts that we export.
    """
    known = _places(config)
    architecture = _architecture(config)
    found: dict[str, Place | None] = {}
    for name in names:
        place = _place(architecture, config, name)
        found[name] = place if place in known or place == UNUSED else None
    return found


def check_sglang(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the server uses every tensor and misses none.

    Args:
        config: The checkpoint's `config.json`.
        shapes: Its tensors' names and shapes.
    """
    found = sglang_destinations(config, shapes)
    skipped = sorted(name for name, place in found.items() if place is None)
    if skipped:
        raise CheckpointError(f"SGLang would skip {skipped} of this draft without a word")
    known = _places(config)
    filled: dict[Place, str] = {}
    for name, place in found.items():
        if place in filled:
            raise CheckpointError(f"{filled[place]} and {name} would both become SGLang's {place}")
        if place is not None:
            filled[place] = name
    if missing := sorted(known.keys() - filled.keys()):
        raise CheckpointError(
            f"SGLang's draft would keep {missing} as they were made: not exported"
        )
    for place, name in filled.items():
        expected = known.get(place)
        if expected is not None and shapes[name] != expected:
            raise CheckpointError(
                f"{name} has shape {shapes[name]}, but SGLang's {place} takes {expected}"
            )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [None]
    if names[0] not in (*EAGLE, EAGLE3, NEXTN):
        raise CheckpointError(
            f"architectures is {names}; expected one of {[*EAGLE, EAGLE3, NEXTN]}, which SGLang "
            "serves as drafts"
        )
    return str(names[0])


def _place(architecture: str, config: Mapping[str, Any], name: str) -> Place | None:
    if architecture in EAGLE:
        return None if "lm_head" in name else _fused(f"model.{name}")
    if architecture == EAGLE3:
        for old, new in LEGACY.items():
            name = name.replace(old, new)
        if "d2t" in name:
            return ("hot_token_id", "")
        if "t2d" in name:
            return UNUSED
        return _fused(name if name == "lm_head.weight" else f"model.{name}")
    layer = config["num_hidden_layers"]
    prefix = f"model.layers.{0 if layer == 1 else layer}"
    if not name.startswith(prefix) or any(part in name for part in NEXTN_BORROWED):
        return None
    own = any(part in name for part in NEXTN_OWN)
    return (name.replace(prefix, "model" if own else "model.decoder"), "")


def _fused(name: str) -> Place:
    for part, (whole, shard) in FUSED.items():
        if f".{part}." in name:
            return (name.replace(part, whole), shard)
    return (name, "")


def _places(config: Mapping[str, Any]) -> dict[Place, Shape]:
    """What the server's module has to be given, each with its shape."""
    architecture = _architecture(config)
    if architecture == NEXTN:
        return _nextn_places(config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query = config["num_attention_heads"] * head_dim
    group = config["num_key_value_heads"] * head_dim
    third = architecture == EAGLE3
    width = 2 * hidden if third else hidden
    layer = "model.layers.0."
    places: dict[Place, Shape] = {
        (f"{layer}self_attn.o_proj.weight", ""): (hidden, query),
        (f"{layer}mlp.gate_up_proj.weight", "gate"): (inner, hidden),
        (f"{layer}mlp.gate_up_proj.weight", "up"): (inner, hidden),
        (f"{layer}mlp.down_proj.weight", ""): (hidden, inner),
        (f"{layer}post_attention_layernorm.weight", ""): (hidden,),
    }
    for shard, rows in (("q", query), ("k", group), ("v", group)):
        places[f"{layer}self_attn.qkv_proj.weight", shard] = (rows, width)
        if architecture == "Qwen2ForCausalLMEagle":
            places[f"{layer}self_attn.qkv_proj.bias", shard] = (rows,)
    if not third:
        places["model.fc.weight", ""] = (hidden, 2 * hidden)
        places["model.fc.bias", ""] = (hidden,)
        return places
    num_layers = len(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    places["model.fc.weight", ""] = (hidden, num_layers * hidden)
    for norm in (f"{layer}input_layernorm", f"{layer}hidden_norm", "model.norm"):
        places[f"{norm}.weight", ""] = (hidden,)
    if config["draft_vocab_size"] is not None:
        places["lm_head.weight", ""] = (config["draft_vocab_size"], hidden)
        if config["draft_vocab_size"] != config["vocab_size"]:
            places["hot_token_id", ""] = (config["draft_vocab_size"],)
    return places


def _nextn_places(config: Mapping[str, Any]) -> dict[Place, Shape]:
    """Of a latent-attention layer with experts, DeepSeek-V3's."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, value = config["kv_lora_rank"], config["v_head_dim"]
    shapes: dict[str, Shape] = {f"{norm}.weight": (hidden,) for norm in ("enorm", "hnorm")}
    shapes |= {"shared_head.norm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
    attention: dict[str, Shape] = {
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (hidden, heads * value),
    }
    if (query := config.get("q_lora_rank")) is None:
        attention["q_proj"] = (heads * (nope + rope), hidden)
    else:
        attention |= {"q_a_proj": (query, hidden), "q_a_layernorm": (query,)}
        attention["q_b_proj"] = (heads * (nope + rope), query)
    for part, shape in attention.items():
        shapes[f"decoder.self_attn.{part}.weight"] = shape
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"decoder.{norm}.weight"] = (hidden,)
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes["decoder.mlp.gate.weight"] = (experts, hidden)
    shapes["decoder.mlp.gate.e_score_correction_bias"] = (experts,)
    shared = inner * config["n_shared_experts"]
    sizes = {f"experts.{e}": inner for e in range(experts)} | {"shared_experts": shared}
    for part, size in sizes.items():
        shapes[f"decoder.mlp.{part}.gate_proj.weight"] = (size, hidden)
        shapes[f"decoder.mlp.{part}.up_proj.weight"] = (size, hidden)
        shapes[f"decoder.mlp.{part}.down_proj.weight"] = (hidden, size)
    return {(f"model.{name}", ""): shape for name, shape in shapes.items()}
