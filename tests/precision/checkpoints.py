"""Tiny models of several families whose weights block FP8 divides, and their checkpoints."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 128, "num_experts": 3, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", MOE),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 128,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
            "head_dim": 64,
        },
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 128}),
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "phi3": ("Phi3", {}),
    "qwen3_next": ("Qwen3Next", MOE | {"shared_expert_intermediate_size": 128}),
}
"""Families whose names differ in other ways."""


def tiny(family: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> Any:
    """A model of random weights, the same for the same seed."""
    prefix, extra = (FAMILIES | OTHERS)[family]
    config = getattr(transformers, f"{prefix}Config")(**SIZES | extra | changes)
    torch.manual_seed(seed)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Replace (or remove, with None) tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, file, {"format": "pt"})
