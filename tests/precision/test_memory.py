"""The calculator against tensors that were quantised and totals that were published."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from miles.errors import SettingError, UnsupportedModelError
from miles.precision import MXFP8, NVFP4, BlockFP8, Int4, quantize
from miles.precision._int4 import pack
from miles.precision._micro import pack_nvfp4
from miles.precision.memory import (
    RECIPES,
    Weight,
    engine_bytes,
    is_packed,
    main,
    stored_bytes,
    trainer_bytes,
    weights_of,
    weights_of_model,
)
from tests.precision.data import tensor

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_MOE = {
    **TINY,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "tie_word_embeddings": False,
}


def total(config) -> int:
    return sum(weight.numel for weight in weights_of(config))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-70b", 70.6),
        ("qwen3-235b-a22b", 235.1),
        ("deepseek-v3", 671.0),
        ("kimi-k2", 1026.4),  # published as "1T"
    ],
)
def test_built_in_configs_have_the_published_number_of_parameters(name, billions):
    assert round(total(name) / 1e9, 1) == billions


def test_kinds_of_a_model_of_experts():
    kinds = {weight.name: weight.kind for weight in weights_of(TINY_MOE)}
    layer = "model.layers.0."
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "head"
    assert kinds[f"{layer}mlp.gate.weight"] == "router"
    assert kinds[f"{layer}mlp.experts.gate_up_proj"] == "experts"
    assert kinds[f"{layer}self_attn.q_proj.weight"] == "linear"
    assert kinds[f"{layer}input_layernorm.weight"] == "vector"
    assert "other" not in kinds.values()


def test_shared_experts_are_linear_layers_and_lists_of_experts_are_experts():
    model = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict(
                {
                    "experts": nn.ModuleList([nn.Linear(8, 8, bias=False)]),
                    "shared_experts": nn.Linear(8, 8, bias=False),
                    "shared_expert_gate": nn.Linear(8, 1),
                    "conv": nn.Conv1d(8, 8, 3),
                }
            )
        }
    )
    kinds = {weight.name: weight.kind for weight in weights_of_model(model)}
    assert kinds == {
        "mlp.experts.0.weight": "experts",
        "mlp.shared_experts.weight": "linear",
        "mlp.shared_expert_gate.weight": "router",
        "mlp.shared_expert_gate.bias": "vector",
        "mlp.conv.weight": "other",
        "mlp.conv.bias": "vector",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_counted_once(tied):
    config = {**TINY, "model_type": "qwen3", "tie_word_embeddings": tied}
    kinds = [weight.kind for weight in weights_of(config)]
    assert kinds.count("embedding") == 1 and kinds.count("head") == (0 if tied else 1)


def test_a_quantised_checkpoint_counts_as_the_model_it_was_made_of():
    plain = total({**TINY, "model_type": "qwen3"})
    config = {**TINY, "model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}
    assert total(config) == plain


@pytest.mark.parametrize(
    "recipe",
    [
        BlockFP8(),
        BlockFP8(scale="ue8m0", store="float8_e8m0fnu"),
        Int4(),
        Int4(group_size=64, scale_dtype="float32"),
        MXFP8(),
        NVFP4(),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(128, 256), (3, 130, 192)])
def test_bytes_are_those_of_the_tensors_that_are_stored(recipe, shape):
    q = quantize(tensor("normal", shape), recipe)
    codes = q.codes
    if isinstance(recipe, Int4):
        codes = pack(codes)
    elif isinstance(recipe, NVFP4):
        codes = pack_nvfp4(codes)
    stored = sum(t.nbytes for t in (codes, q.scale, q.global_scale) if t is not None)
    assert stored_bytes(shape, recipe) == stored


def test_bits_per_weight_of_the_usual_recipes():
    shape = (4096, 4096)
    bits = {
        name: 8 * stored_bytes(shape, recipe) / 4096**2
        for name, recipe in RECIPES.items()
        if recipe is not None
    }
    assert (bits["int4"], bits["int4-128"], bits["mxfp8"]) == (4.5, 4.125, 8.25)
    assert bits["fp8"] == 8 * (1 + 4 / 16384)


def test_what_is_packed():
    experts = Weight(name="experts.up", shape=(2, 64, 64), kind="experts")
    linear = Weight(name="up.weight", shape=(64, 48), kind="linear")
    head = Weight(name="lm_head.weight", shape=(64, 64), kind="head")
    assert is_packed(experts, Int4()) and is_packed(experts, Int4(), "experts")
    assert not is_packed(linear, Int4())  # 48 is not a multiple of 32
    assert is_packed(linear, BlockFP8()) and not is_packed(linear, BlockFP8(), "experts")
    assert not is_packed(head, BlockFP8()) and not is_packed(experts, None)


def test_an_engines_bytes_are_packed_codes_and_bf16_for_the_rest():
    weights = weights_of(TINY_MOE)
    plain = engine_bytes(weights, None)
    assert plain == {"packed": 0.0, "bf16": 2.0 * total(TINY_MOE)}
    packed = sum(weight.numel for weight in weights if weight.kind in ("linear", "experts"))
    found = engine_bytes(weights, Int4())
    assert found == {
        "packed": packed * 4.5 / 8,
        "bf16": plain["bf16"] - 2.0 * packed,
    }


def test_a_trillion_parameters_in_int4_fit_eight_gpus_of_141_gb():
    """Experts packed and the rest in bf16, as Kimi-K2-Thinking is; in bf16 it takes two nodes."""
    weights = weights_of("kimi-k2")
    packed = sum(engine_bytes(weights, Int4(), scope="experts").values())
    assert round(packed / 1e9) == 594 < 8 * 141 < sum(engine_bytes(weights, None).values()) / 1e9


def test_a_trainer_holds_its_working_copies_on_top():
    weights = [Weight(name="up.weight", shape=(128, 128), kind="linear")]
    n = 128 * 128

    def each(recipe, **settings):
        return {
            part: count / n for part, count in trainer_bytes(weights, recipe, **settings).items()
        }

    assert each(None) == {
        "master weights": 4, "bf16 copy": 2, "gradients": 4, "Adam moments": 8,
        "quantised copy": 0, "transposed copy": 0,
    }  # fmt: skip
    lean = each(None, master="bfloat16", gradients="bfloat16", moments="bfloat16")
    assert sum(lean.values()) == 2 + 2 + 4
    fp8 = 1 + 4 / n
    assert list(each(BlockFP8()).values())[-2:] == [fp8, fp8]
    assert list(each(BlockFP8(dgrad="bf16")).values())[-2:] == [fp8, 0]
    assert list(each(BlockFP8(fprop="dequant", dgrad="dequant")).values())[-2:] == [2, 0]
    assert list(each(Int4()).values())[-2:] == [2, 0]
    assert list(each(MXFP8()).values())[-2:] == [1 + 1 / 32] * 2


def test_the_same_counts_on_a_model_as_on_its_config():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(TINY_MOE)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    )
    assert weights_of_model(model) == weights_of(TINY_MOE)
    assert next(model.parameters()).device == torch.device("cpu")


def test_the_command_reads_files_and_directories(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY_MOE))
    main([str(tmp_path), str(tmp_path / "config.json"), "--recipe", "bf16", "int4", "--engine"])
    out = capsys.readouterr().out
    assert out.count("engine, weights only") == 2 and "trainer" not in out
    assert f"{total(TINY_MOE):,}" in out
    main([str(tmp_path), "--trainer", "--master", "bfloat16", "--scope", "experts"])
    out = capsys.readouterr().out
    assert "Adam moments" in out and "engine" not in out


def test_the_module_is_a_command(tmp_path):
    command = [sys.executable, "-m", "miles.precision.memory", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "MODEL_CONFIG" in done.stdout and not done.stderr


def test_what_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"got 'llama-7b'; expected .*kimi-k2"):
        weights_of("llama-7b")
    with pytest.raises(SettingError, match=r"config\.json"):
        weights_of(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'my_model'"):
        weights_of({"model_type": "my_model"})
    with pytest.raises(UnsupportedModelError, match="'None'"):
        weights_of({"hidden_size": 64})
    with pytest.raises(SettingError, match="master is 'float16'"):
        trainer_bytes([], None, master="float16")
