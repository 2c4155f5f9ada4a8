"""What each family's tensors are called by Hugging Face, by megatron-core 0.16.1 and by SGLang.

A row is one line of the table. Names of a layer come without `model.layers.{layer}.` and
`decoder.layers.{layer}.`; `{expert}` is the expert's number. Rows are data: what the kinds mean
is in `miles.sync._name_rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "Row"]

Kind = Literal["copy", "vocab", "qkv", "gate_up", "qkv_a", "turns", "turned", "stacked"]
Where = Literal["layer", "dense", "moe", "first", "last"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tensors that belong together, under each naming."""

    hf: tuple[str, ...]
    """On disk, as `save_pretrained` writes them."""
    megatron: tuple[str, ...]
    """With the local spec; as many as `hf` if it keeps them apart."""
    te: tuple[str, ...] | None = None
    """With Transformer Engine's spec, which moves layer norms into the linear layer after them."""
    sglang: tuple[str, ...] | None = None
    """The engine's parameter; None: as `hf`."""
    module: str | None = None
    """The parameter of the transformers 5 module, if it isn't `hf`."""
    kind: Kind = "copy"
    where: Where = "layer"
    """Every layer, only dense or sparse ones, or the model's first or last stage."""


def row(hf: str, megatron: str, **more: Any) -> Row:
    """Names separated by spaces."""
    for key in ("te", "sglang"):
        if key in more:
            more[key] = tuple(more[key].split())
    return Row(hf=tuple(hf.split()), megatron=tuple(megatron.split()), **more)


def biases(*rows: Row) -> tuple[Row, ...]:
    """The same rows for biases."""

    def bias(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.removesuffix("weight") + "bias" for name in names)

    return tuple(
        replace(
            one,
            hf=bias(one.hf),
            megatron=bias(one.megatron),
            sglang=one.sglang and bias(one.sglang),
        )
        for one in rows
    )


ENDS = (
    row(
        "model.embed_tokens.weight", "embedding.word_embeddings.weight", kind="vocab", where="first"
    ),
    row("model.norm.weight", "decoder.final_layernorm.weight", where="last"),
    row("lm_head.weight", "output_layer.weight", kind="vocab", where="last"),
)

QKV = row(
    "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
    "self_attention.linear_qkv.weight",
    sglang="self_attn.qkv_proj.weight",
    kind="qkv",
)
OUT = row("self_attn.o_proj.weight", "self_attention.linear_proj.weight")
NORM = row(
    "input_layernorm.weight",
    "input_layernorm.weight",
    te="self_attention.linear_qkv.layer_norm_weight",
)
QK_NORM = (
    row("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    row("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
)
SINKS = row("self_attn.sinks", "self_attention.core_attention.softmax_offset")
ATTENTION = (NORM, QKV, OUT)

MLA_DOWN = row(
    "self_attn.q_a_proj.weight self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_q_down_proj.weight self_attention.linear_kv_down_proj.weight",
    sglang="self_attn.fused_qkv_a_proj_with_mqa.weight",
    kind="qkv_a",
)
MLA_Q_LORA = (
    MLA_DOWN,
    row(
        "self_attn.q_a_layernorm.weight",
        "self_attention.q_layernorm.weight",
        te="self_attention.linear_q_up_proj.layer_norm_weight",
    ),
    row("self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight"),
)
MLA_KV_DOWN = row(
    "self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight"
)
MLA_Q = (row("self_attn.q_proj.weight", "self_attention.linear_q_proj.weight"), MLA_KV_DOWN)
MLA = (
    row("input_layernorm.weight", "input_layernorm.weight"),
    row(
        "self_attn.kv_a_layernorm.weight",
        "self_attention.kv_layernorm.weight",
        te="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    row("self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight"),
    OUT,
)

GATE_UP = row(
    "mlp.gate_proj.weight mlp.up_proj.weight",
    "mlp.linear_fc1.weight",
    sglang="mlp.gate_up_proj.weight",
    kind="gate_up",
    where="dense",
)
DOWN = row("mlp.down_proj.weight", "mlp.linear_fc2.weight", where="dense")
DENSE = (
    row(
        "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight",
        te="mlp.linear_fc1.layer_norm_weight",
        where="dense",
    ),
    GATE_UP,
    DOWN,
)

MOE_NORM = row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", where="moe")
ROUTER = row("mlp.gate.weight", "mlp.router.weight", where="moe")
ROUTER_BIAS = row("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", where="moe")
EXPERTS = (
    row(
        "mlp.experts.{expert}.gate_proj.weight mlp.experts.{expert}.up_proj.weight",
        "mlp.experts.linear_fc1.weight",
        sglang="mlp.experts.w13_weight",
        module="mlp.experts.gate_up_proj",
        kind="gate_up",
        where="moe",
    ),
    row(
        "mlp.experts.{expert}.down_proj.weight",
        "mlp.experts.linear_fc2.weight",
        sglang="mlp.experts.w2_weight",
        module="mlp.experts.down_proj",
        where="moe",
    ),
)
MOE = (MOE_NORM, ROUTER, *EXPERTS)


def shared(name: str) -> tuple[Row, ...]:
    """The shared expert, whose name differs."""
    return (
        row(
            f"mlp.{name}.gate_proj.weight mlp.{name}.up_proj.weight",
            "mlp.shared_experts.linear_fc1.weight",
            sglang=f"mlp.{name}.gate_up_proj.weight",
            kind="gate_up",
            where="moe",
        ),
        row(f"mlp.{name}.down_proj.weight", "mlp.shared_experts.linear_fc2.weight", where="moe"),
    )


SHARED_GATE = row("mlp.shared_expert_gate.weight", "mlp.shared_experts.gate_weight", where="moe")

# gpt-oss saves experts as the module holds them: [E, in, out], gate and up in turns.
GPT_OSS_MOE = (
    MOE_NORM,
    row("mlp.router.weight", "mlp.router.weight", where="moe"),
    row("mlp.router.bias", "mlp.router.bias", where="moe"),
    row(
        "mlp.experts.gate_up_proj",
        "mlp.experts.linear_fc1.weight",
        sglang="mlp.experts.w13_weight",
        kind="turns",
        where="moe",
    ),
    row(
        "mlp.experts.gate_up_proj_bias",
        "mlp.experts.linear_fc1.bias",
        sglang="mlp.experts.w13_weight_bias",
        kind="turns",
        where="moe",
    ),
    row(
        "mlp.experts.down_proj",
        "mlp.experts.linear_fc2.weight",
        sglang="mlp.experts.w2_weight",
        kind="turned",
        where="moe",
    ),
    row(
        "mlp.experts.down_proj_bias",
        "mlp.experts.linear_fc2.bias",
        sglang="mlp.experts.w2_weight_bias",
        kind="stacked",
        where="moe",
    ),
)


def _no_layer(config: Any, layer: int) -> bool:
    return False


def _every_layer(config: Any, layer: int) -> bool:
    return True


def _after_the_first(config: Any, layer: int) -> bool:
    return bool(layer >= (config.first_k_dense_replace or 0))


def _every_few(config: Any, layer: int) -> bool:
    dense = layer in config.mlp_only_layers or not config.num_experts
    return not dense and (layer + 1) % config.decoder_sparse_step == 0


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`."""

    rows: Callable[[Any], tuple[Row, ...]]
    """Of a config, which says what has biases."""
    is_sparse: Callable[[Any, int], bool] = _no_layer
    """Whether a layer of a config has experts."""
    num_experts: str = "num_experts"
    """The config's name for it."""


def _llama(config: Any) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*ENDS, *ATTENTION, *DENSE)
    rows += biases(QKV, OUT) if config.attention_bias else ()
    return rows + (biases(GATE_UP, DOWN) if config.mlp_bias else ())


def _qwen2(config: Any) -> tuple[Row, ...]:
    return (*ENDS, *ATTENTION, *biases(QKV), *DENSE)


def _qwen3(config: Any) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*ENDS, *ATTENTION, *QK_NORM, *DENSE)
    return rows + (biases(QKV, OUT) if config.attention_bias else ())


def _qwen2_moe(config: Any) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*ENDS, *ATTENTION, *DENSE, *MOE, *shared("shared_expert"), SHARED_GATE)
    return rows + (biases(QKV) if config.qkv_bias else ())


def _qwen3_moe(config: Any) -> tuple[Row, ...]:
    return (*_qwen3(config), *MOE)


def _deepseek_v3(config: Any) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*ENDS, *MLA, *(MLA_Q if config.q_lora_rank is None else MLA_Q_LORA))
    if config.attention_bias:
        rows += biases(MLA_KV_DOWN if config.q_lora_rank is None else MLA_DOWN, OUT)
    return (*rows, *DENSE, *MOE, ROUTER_BIAS, *shared("shared_experts"))


def _glm4_moe(config: Any) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*ENDS, *ATTENTION, *(QK_NORM if config.use_qk_norm else ()))
    rows += biases(QKV) if config.attention_bias else ()
    return (*rows, *DENSE, *MOE, ROUTER_BIAS, *shared("shared_experts"))


def _gpt_oss(config: Any) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*ENDS, *ATTENTION, SINKS, *GPT_OSS_MOE)
    return rows + (biases(QKV, OUT) if config.attention_bias else ())


FAMILIES = {
    "deepseek_v3": Family(_deepseek_v3, _after_the_first, "n_routed_experts"),
    "glm4_moe": Family(_glm4_moe, _after_the_first, "n_routed_experts"),
    "gpt_oss": Family(_gpt_oss, _every_layer, "num_local_experts"),
    "llama": Family(_llama),
    "qwen2": Family(_qwen2),
    "qwen2_moe": Family(_qwen2_moe, _every_few),
    "qwen3": Family(_qwen3),
    "qwen3_moe": Family(_qwen3_moe, _every_few),
}
"""By `model_type`."""
