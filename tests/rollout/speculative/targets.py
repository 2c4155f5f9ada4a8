"""Tiny targets of the families that drafts are made for, and what drafts see of them."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from miles.rollout.speculative import (
    FINAL,
    Eagle3Draft,
    EagleDraft,
    MTPDraft,
    Proposal,
    StandaloneDraft,
)
from miles.rollout.speculative.eagle3 import frequent_tokens
from tests.models import SIZES, VOCAB

HIDDEN = SIZES["hidden_size"]
K = 3
"""Draft steps of a proposal."""
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}


def target(name: str = "llama", *, num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """A model of the family in float64, far from flat, the same for the same seed."""
    prefix, extra = TARGETS[name]
    sizes = SIZES | {"num_hidden_layers": num_layers} | extra | changes
    config = getattr(transformers, prefix + "Config")(**sizes)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    return model.double().eval()


DRAFTS = ["eagle", "eagle3", "eagle3_reduced", "eagle3_borrowed", "mtp", "mtp_3", "standalone"]


def draft_of(kind: str, model: nn.Module, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    counts = torch.rand(VOCAB)
    match kind:
        case "eagle":
            return EagleDraft.from_target(model)
        case "eagle3":
            return Eagle3Draft.from_target(model)
        case "eagle3_reduced":
            return Eagle3Draft.from_target(model, target_ids=frequent_tokens(counts, 12))
        case "eagle3_borrowed":
            return Eagle3Draft.from_target(model, own_head=False)
        case "mtp":
            return MTPDraft.from_target(model)
        case "mtp_3":
            return MTPDraft.from_target(model, num_modules=3)
        case "standalone":
            return StandaloneDraft.from_target(
                model, target(num_layers=2, seed=9, max_position_embeddings=1024)
            )
    raise AssertionError(kind)


@torch.no_grad()
def features_of(model: Any, ids_BL: Tensor, layers: tuple[int, ...]) -> Tensor | None:
    """What the target's own forward pass gives of every position, by hooks."""
    if not layers:
        return None
    seen: dict[int, Tensor] = {}
    decoder = model.get_decoder()
    modules = {layer: decoder.norm if layer == FINAL else decoder.layers[layer] for layer in layers}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, layer=layer: seen.__setitem__(
                layer, out[0] if isinstance(out, tuple) else out
            )
        )
        for layer, module in modules.items()
    ]
    model(ids_BL)
    for handle in handles:
        handle.remove()
    return torch.cat([seen[layer] for layer in layers], dim=-1)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, shape, generator=generator)


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def random_features(draft: Any, *shape: int, seed: int = 5) -> Tensor | None:
    if not draft.feature_layers:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((*shape, draft.num_features), generator=generator, dtype=torch.float64)


def extend(memory: Any, slot: int, ids: Tensor, features: Tensor | None, start: int = 0) -> None:
    """Tell it `ids[start:]`, with the features of all but the last."""
    given = None if features is None else [features[start : len(ids) - 1]]
    memory.extend([slot], [ids[start:].tolist()], [start], given)


def propose(memory: Any, slots: list[int], *, steps: int = K, temperature: float = 1.0) -> Proposal:
    return memory.propose(
        slots,
        num_steps=steps,
        temperatures=[temperature] * len(slots),
        uniforms_RK=uniforms(len(slots), steps),
    )


CACHE: dict[str, Any] = {}


def cached_draft(kind: str) -> Any:
    if kind not in CACHE:
        CACHE[kind] = draft_of(kind, target("llama", max_position_embeddings=128))
    return CACHE[kind]
