"""Tiny random models of every mixture-of-experts family that `RoutingReplay` knows."""

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn

E, K, VOCAB = 8, 2, 40

# What the families call their sizes; each takes those that its configuration has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "image_token_id": None,
    "sliding_window": 8,
    # experts
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "moe_topk": K,
    "top_k_experts": K,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "expert_ffn_hidden_size": 12,
    "share_expert_dim": 12,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    # multi-head latent attention and its indexer
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # linear attention, state spaces, convolutions, hyper-connections
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "hc_mult": 2,
}
FULL = {"layer_types": ["full_attention"] * 2}

# Name: (configuration, model, what else it needs).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", "AfmoeForCausalLM", {}),
    "aria": ("AriaTextConfig", "AriaTextForCausalLM", {}),
    "axk1": ("AXK1Config", "AXK1ForCausalLM", {}),
    "axk2": ("AXK2Config", "AXK2ForCausalLM", {}),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", {}),
    "beam": ("BeamConfig", "BeamForCausalLM", {}),
    "cohere2_moe": ("Cohere2MoeConfig", "Cohere2MoeForCausalLM", {}),
    "dbrx": (
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 12,
                "moe_num_experts": E,
                "moe_top_k": K,
                "hidden_size": 16,
            },
        },
    ),
    "deepseek_ocr2": (
        "DeepseekOcr2TextConfig",
        "DeepseekOcr2TextModel",
        {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {}),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", {}),
    "deepseek_v4": (
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {
            "mlp_layer_types": ["moe", "moe"],
            "o_groups": 2,
            "o_lora_rank": 8,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        },
    ),
    "dots1": ("Dots1Config", "Dots1ForCausalLM", {}),
    "dots3_note": ("Dots3NoteTextConfig", "Dots3NoteForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 0}),
    "exaone_moe": ("ExaoneMoeConfig", "ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoConfig", "FlexOlmoForCausalLM", {}),
    "flint": ("FlintConfig", "FlintForCausalLM", {"mlp_only_layers": []}),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        FULL | {"enable_moe_block": True, "hidden_size_per_layer_input": 4},
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {}),
    "glm4v_moe": (
        "Glm4vMoeTextConfig",
        "Glm4vMoeTextModel",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
    ),
    "glm5_next": (
        "Glm5NextTextConfig",
        "Glm5NextTextModel",
        {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
    ),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", {}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3Config", "HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4Config", "HYV4ForCausalLM", {}),
    "inkling": ("InklingTextConfig", "InklingForCausalLM", {}),
    "inkling2": ("Inkling2TextConfig", "Inkling2ForCausalLM", {}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", {}),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", {}),
    "kolibri1": ("Kolibri1Config", "Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaConfig", "LagunaForCausalLM", {}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"]},
    ),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {}),
    "longcat_flash": (
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {"num_layers": 2, "zero_expert_num": 4},
    ),
    "mellum": ("MellumConfig", "MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", "MiMoV2FlashForCausalLM", {"num_key_value_heads": 1}),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", {}),
    "mistral4": ("Mistral4Config", "Mistral4ForCausalLM", {}),
    "mistral_large4": ("MistralLarge4TextConfig", "MistralLarge4TextModel", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {}),
    "muse_spark": ("MuseSparkTextConfig", "MuseSparkTextModel", {}),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_groups": 2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel", {}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {}),
    "qwen3_omni_moe": ("Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", "Qwen3VLMoeTextModel", {}),
    "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", {}),
    "solar_open": ("SolarOpenConfig", "SolarOpenForCausalLM", {}),
    "step3p7": ("Step3p7TextConfig", "Step3p7TextModel", {}),
    "unlimited_ocr": (
        "UnlimitedOcrTextConfig",
        "UnlimitedOcrTextModel",
        {"topk_method": "group_limited_greedy"},
    ),
    "zaya": ("ZayaConfig", "ZayaForCausalLM", {"num_experts_per_tok": 1, "initializer_range": 0.1}),
}


def tiny(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A float32 model of the family in eval mode, the same for the same seed."""
    config_name, model_name, extra = FAMILIES[name]
    kind = getattr(transformers, config_name)
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    config = kind(**{key: SIZES[key] for key in SIZES if key in known} | extra | changes)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, model_name)._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some are left at zero, or empty
            if not bool(parameter.isfinite().all()) or bool((parameter == 0).all()):
                parameter.normal_(0, 0.2)
    return model.float().eval()


def output(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    out = model(input_ids=input_ids, use_cache=False)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found
