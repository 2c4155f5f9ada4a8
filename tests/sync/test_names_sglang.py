"""Where each row lies in the tensors that SGLang fuses: where its loaders (0.5.17) put it.

`load_weights` of Llama, and of the others like it: q, k, v; gate, up. Of DeepSeek:
`torch.cat([q_a_proj_weight, kv_a_proj_weight])`. Of gpt-oss: gate and up in turns, as on disk, each
expert's matrix the other way round.
"""

import pytest
import torch

from miles.sync import name_map
from tests.sync.named import E, saved, tiny

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATE_UP = "mlp.gate_proj mlp.up_proj"
LATENT = "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa"
Q32_K16_V16 = [*range(32), *range(100, 116), *range(200, 216)]
Q16_K8_V8 = [*range(16), *range(100, 108), *range(200, 208)]
GATE24_UP24 = [*range(24), *range(100, 124)]
Q8_KV12 = [*range(8), *range(100, 112)]


def fused(name, sources, axis=0):
    """What these of layer 1 become, and its name.

    Row r, along `axis`, of source number s is full of 100 s + r.
    """
    model, layer = tiny(name), "model.layers.1."
    disk, parts = saved(model), []
    for number, source in enumerate(sources):
        shape = disk[layer + source].shape
        row = torch.arange(shape[axis]).view(-1, *[1] * (len(shape) - axis - 1))
        parts.append((layer + source, (100 * number + row).expand(shape)))
    names = name_map(model.config, target="sglang")
    ((target, tensor),) = names.forward(parts, strict=False)
    return target.removeprefix(layer), tensor


def rows(tensor):
    """What its rows are full of."""
    table = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    assert (table == table[:, :1]).all()
    return table[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "sources", "target", "order"),
    [
        ("llama", QKV, "self_attn.qkv_proj", Q32_K16_V16),
        ("qwen2", QKV, "self_attn.qkv_proj", Q16_K8_V8),
        ("qwen3", QKV, "self_attn.qkv_proj", Q32_K16_V16),
        ("gpt_oss", QKV, "self_attn.qkv_proj", Q32_K16_V16),
        ("llama", GATE_UP, "mlp.gate_up_proj", GATE24_UP24),
        ("qwen3", GATE_UP, "mlp.gate_up_proj", GATE24_UP24),
        ("deepseek_v3", LATENT, "self_attn.fused_qkv_a_proj_with_mqa", Q8_KV12),
        ("deepseek_v3", "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj",
         "mlp.shared_experts.gate_up_proj", [*range(12), *range(100, 112)]),
        ("qwen2_moe", "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj",
         "mlp.shared_expert.gate_up_proj", [*range(20), *range(100, 120)]),
    ],
)  # fmt: skip
def test_parts_lie_one_under_the_other(name, sources, target, order):
    key, tensor = fused(name, [f"{source}.weight" for source in sources.split()])
    assert key == f"{target}.weight" and rows(tensor) == order


@pytest.mark.parametrize(
    ("name", "sources", "target", "order"),
    [
        ("llama-biased", QKV, "self_attn.qkv_proj", Q16_K8_V8),
        ("llama-biased", GATE_UP, "mlp.gate_up_proj", GATE24_UP24),
        ("qwen2", QKV, "self_attn.qkv_proj", Q16_K8_V8),
        ("gpt_oss", QKV, "self_attn.qkv_proj", Q32_K16_V16),
    ],
)
def test_and_so_do_those_of_biases(name, sources, target, order):
    key, tensor = fused(name, [f"{source}.bias" for source in sources.split()])
    assert key == f"{target}.bias" and rows(tensor) == order


def test_the_gate_of_each_expert_lies_above_its_up():
    parts = [
        f"mlp.experts.{e}.{part}.weight" for e in range(E) for part in ("gate_proj", "up_proj")
    ]
    key, tensor = fused("qwen3_moe", parts)
    assert key == "mlp.experts.w13_weight" and tensor.shape == (E, 24, 16)
    assert [rows(expert) for expert in tensor] == [
        [*range(0, 12), *range(100, 112)],
        [*range(200, 212), *range(300, 312)],
        [*range(400, 412), *range(500, 512)],
        [*range(600, 612), *range(700, 712)],
    ]
    key, tensor = fused("qwen3_moe", [f"mlp.experts.{e}.down_proj.weight" for e in range(E)])
    assert key == "mlp.experts.w2_weight" and tensor.shape == (E, 16, 12)
    assert [rows(expert) for expert in tensor] == [
        [*range(0, 16)], [*range(100, 116)], [*range(200, 216)], [*range(300, 316)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "axis", "target", "count"),
    [
        ("gate_up_proj", 2, "w13_weight", 48),  # gate, up, gate, up, ...
        ("gate_up_proj_bias", 1, "w13_weight_bias", 48),
        ("down_proj", 2, "w2_weight", 16),
        ("down_proj_bias", 1, "w2_weight_bias", 16),
    ],
)
def test_gpt_oss_keeps_gate_and_up_in_turns(source, axis, target, count):
    key, tensor = fused("gpt_oss", [f"mlp.experts.{source}"], axis)
    assert key == f"mlp.experts.{target}" and len(tensor) == E
    assert [rows(expert) for expert in tensor] == [list(range(count))] * E
