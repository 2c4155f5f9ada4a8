"""Tiny models of every family that has a table of names, and the same in megatron-core."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from miles.sync._name_tables import FAMILIES
from tests.moe import megatron

VOCAB, E = megatron.VOCAB, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEAD = {"head_dim": 8}  # not hidden_size / num_attention_heads
MOE = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
QWEN_MOE = HEAD | MOE | {"num_experts": E}
GROUPS = MOE | {"n_routed_experts": E, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 2,
    "topk_group": 1,
}
GLM = HEAD | GROUPS | {"n_group": 1, "topk_group": 1, "n_shared_experts": 2}
GPT_OSS = {
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention"] * 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN2_MOE = QWEN_MOE | {"shared_expert_intermediate_size": 20}
# Name: (prefix of the classes, what else its config needs).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", HEAD),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-query": ("Llama", HEAD | {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", HEAD),
    "qwen3-tied": ("Qwen3", HEAD | {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", QWEN2_MOE | {"mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"norm_topk_prob": True}),
    "qwen3_moe-some-dense": (
        "Qwen3Moe",
        QWEN_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "deepseek_v3": ("DeepseekV3", GROUPS | MLA | {"q_lora_rank": 8}),
    "deepseek_v3-whole-q": ("DeepseekV3", GROUPS | MLA | {"q_lora_rank": None}),
    "deepseek_v3-biased": ("DeepseekV3", GROUPS | MLA | {"q_lora_rank": 8, "attention_bias": True}),
    "glm4_moe": ("Glm4Moe", GLM | {"use_qk_norm": True}),
    "glm4_moe-biased": ("Glm4Moe", GLM | {"attention_bias": True}),
    "gpt_oss": ("GptOss", HEAD | GPT_OSS),
}
MOE_MODELS = [name for name in MODELS if name.partition("-")[0].endswith(("moe", "v3", "oss"))]


def config(name: str, **changes: Any) -> Any:
    prefix, more = MODELS[name]
    made = getattr(transformers, f"{prefix}Config")(**SIZES | more | changes)
    made._experts_implementation = "eager"
    made._attn_implementation = "eager"
    return made


def tiny(name: str, **changes: Any) -> Any:
    """A model in which no parameter is all zeros or ones, so that none can take another's place."""
    torch.manual_seed(0)
    made = config(name, **changes)
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(made).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor += torch.randn_like(tensor) * 0.1
    return model


def saved(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return dict(revert_weight_conversion(model, state))


def megatron_config(hf: Any, **parallel: int) -> Any:
    """The same model's settings for megatron-core."""
    from megatron.core.activations import quick_gelu
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    settings: dict[str, Any] = parallel
    kind = hf.model_type
    sparse = kind.endswith(("moe", "v3", "oss"))
    settings |= {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "layernorm_epsilon": hf.rms_norm_eps,
        "add_bias_linear": bool(getattr(hf, "mlp_bias", False)) or kind == "gpt_oss",
        "add_qkv_bias": kind in ("qwen2", "qwen2_moe")
        or (kind == "glm4_moe" and hf.attention_bias),
        "qk_layernorm": kind in ("qwen3", "qwen3_moe", "deepseek_v3")
        or (kind == "glm4_moe" and hf.use_qk_norm),
        "moe_enable_routing_replay": False,
        "num_moe_experts": E if sparse else None,
        "moe_ffn_hidden_size": None,
    }
    if sparse:
        layers = [FAMILIES[kind].is_sparse(hf, layer) for layer in range(hf.num_hidden_layers)]
        settings |= {
            "moe_ffn_hidden_size": getattr(hf, "moe_intermediate_size", hf.intermediate_size),
            "moe_layer_freq": [int(sparse) for sparse in layers],
        }
    if kind == "qwen2_moe":
        settings |= {
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
        }
    if kind in ("glm4_moe", "deepseek_v3"):
        settings |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
            "moe_shared_expert_intermediate_size": hf.n_shared_experts * hf.moe_intermediate_size,
        }
    if kind == "gpt_oss":
        settings |= {
            "activation_func": quick_gelu,
            "activation_func_clamp_value": 7.0,
            "glu_linear_offset": 1.0,
            "softmax_type": "learnable",
        }
    if kind != "deepseek_v3":
        return megatron.config(**settings)
    settings |= {
        "moe_router_num_groups": hf.n_group,
        "moe_router_group_topk": hf.topk_group,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }
    return megatron.config(MLATransformerConfig, **settings)


class Attention(nn.Module):
    """For latent attention, which the `DotProductAttention` of 0.16.1 doesn't take part in."""

    def __init__(self, config: Any, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> Tensor:
        """`[S, B, heads, dim]`."""
        scores = torch.einsum("sbhd,tbhd->bhst", q, k) * self.scale
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(2)


def gpt(hf: Any, *, pre_process: bool = True, post_process: bool = True, **parallel: int) -> Any:
    """A `GPTModel` with the local spec, inside `megatron.processes()`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import multi_latent_attention

    settings = megatron_config(hf, **parallel)
    spec = get_gpt_decoder_block_spec(
        settings, use_transformer_engine=False, normalization="RMSNorm"
    )
    if hf.model_type == "deepseek_v3":
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = Attention
    rope = hf.rope_parameters
    with pytest.MonkeyPatch.context() as patch:
        # Without Transformer Engine this module takes it for there and then misses its classes.
        patch.setattr(multi_latent_attention, "HAVE_TE", False)
        patch.setattr(Tensor, "cuda", lambda tensor: tensor)  # of embeddings tied between stages
        model = GPTModel(
            settings,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=64,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            rotary_percent=rope.get("partial_rotary_factor", 1.0),
            rotary_base=rope["rope_theta"],
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
        )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, Tensor):
                tensor.fill_(torch.nan)  # what the map forgets shows
    return model.eval()
