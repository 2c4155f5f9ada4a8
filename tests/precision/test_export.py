"""What an engine gets: names, shapes and bits of a checkpoint, and the config beside it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miles.errors import CheckpointError, NonFiniteError, SettingError, UnsupportedModelError
from miles.precision import MXFP8, NVFP4, BlockFP8, Int4, _storage, quantize
from miles.precision._int4 import unpack
from miles.precision._modules import QuantizedParameter, quantized_parameters
from miles.precision.exporting import export, quantization_config
from miles.precision.modules import convert_
from miles.precision.saving import save
from tests.precision.checkpoints import FAMILIES, OTHERS, same_bits, tiny

every_family = pytest.mark.parametrize("family", FAMILIES)


def saved(model, folder):
    """What transformers saves of the model."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_unconverted_model_exports_what_save_pretrained_saves(family, tmp_path):
    model = tiny(family)
    expected, ours = saved(model, tmp_path), dict(export(model))
    assert ours.keys() == expected.keys()
    assert all(same_bits(ours[name], expected[name]) for name in expected)
    assert quantization_config(model) == {}


@every_family
def test_fused_experts_are_rounded_as_the_tensors_of_the_checkpoint(family, tmp_path):
    model = tiny(family)
    plain = saved(model, tmp_path)
    convert_(model, [("*", BlockFP8())])
    ours = dict(export(model))
    assert {name.removesuffix("_scale_inv") for name in ours} == plain.keys()
    for name, weight in plain.items():
        if f"{name}_scale_inv" in ours:
            q = quantize(weight, BlockFP8())
            assert same_bits(ours[name], q.codes)
            assert same_bits(ours[f"{name}_scale_inv"], q.scale)
        else:
            assert same_bits(ours[name], weight)
    assert any(".experts.1." in name for name in ours) == (family not in ("qwen3", "llama"))


def test_block_borders_begin_with_each_half_where_128_does_not_divide_it(tmp_path, monkeypatch):
    model = tiny("qwen3_moe", moe_intermediate_size=72)
    plain = saved(model, tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weight = model.get_parameter(name)
    rounded = QuantizedParameter(name, weight, model, BlockFP8(), weight.dtype)
    # `convert_` leaves such experts alone, since grouped GEMMs want whole blocks.
    monkeypatch.setattr("miles.precision.exporting.quantized_parameters", lambda _: iter([rounded]))
    ours = dict(export(model))
    up = "model.layers.1.mlp.experts.2.up_proj.weight"
    q = quantize(plain[up], BlockFP8())
    assert same_bits(ours[up], q.codes)
    assert same_bits(ours[f"{up}_scale_inv"], q.scale)
    # Rounded as one matrix with the gate, its blocks would be others.
    both = torch.cat([plain[up.replace("up_proj", "gate_proj")], plain[up]])
    assert not same_bits(quantize(both, BlockFP8()).codes[72:], q.codes)


@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_tensors_hold_the_rounded_weight(group_size, tmp_path):
    model = tiny("qwen3_moe")
    recipe = Int4(group_size=group_size)
    plain = saved(model, tmp_path)
    convert_(model, [("*.experts", recipe), ("*_proj", recipe)])
    ours = dict(export(model))
    for name in (
        "model.layers.0.mlp.experts.2.gate_proj",
        "model.layers.1.self_attn.q_proj",
    ):
        assert f"{name}.weight" not in ours
        q = quantize(plain[f"{name}.weight"], recipe)
        packed, scale = ours[f"{name}.weight_packed"], ours[f"{name}.weight_scale"]
        assert (packed.dtype, packed.shape) == (torch.int32, (128, 16))
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (128, 128 // group_size))
        assert same_bits(unpack(packed), q.codes)
        assert same_bits(scale, q.scale)
        assert ours[f"{name}.weight_shape"].tolist() == [128, 128]


def test_nvfp4_and_mxfp8_have_the_names_of_their_formats():
    def tensors(recipe):
        model = nn.Sequential(nn.Linear(64, 8, bias=False))
        convert_(model, [("0", recipe)])
        return {name: (t.dtype, tuple(t.shape)) for name, t in export(model)}

    assert tensors(MXFP8()) == {
        "0.weight": (torch.float8_e4m3fn, (8, 64)),
        "0.weight_scale_inv": (torch.uint8, (8, 2)),
    }
    assert tensors(NVFP4()) == {
        "0.weight": (torch.uint8, (8, 32)),
        "0.weight_scale": (torch.float8_e4m3fn, (8, 4)),
        "0.weight_scale_2": (torch.float32, ()),
    }


@pytest.mark.parametrize("recipe", [Int4(), NVFP4(), MXFP8()], ids=str)
def test_gate_and_up_of_one_expert_are_what_the_forward_pass_rounds(recipe):
    model = tiny("qwen3_moe")
    convert_(model, [("*.experts", recipe)])
    (first, *_) = quantized_parameters(model)
    assert first.name.endswith("0.mlp.experts.gate_up_proj")
    whole = torch.cat([part.dequantize() for part in first.parts()], -2)
    ours = dict(export(model))
    base = "model.layers.0.mlp.experts.1.up_proj."
    parts = {name.removeprefix(base): t for name, t in ours.items() if name.startswith(base)}
    stored = _storage.unpack(recipe, parts).dequantize()
    assert same_bits(stored, whole[1, 128:])


def test_tied_weights_are_exported_once():
    model = tiny("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in export(model)]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names
    convert_(model, [("*_proj", BlockFP8())])
    assert "lm_head" in quantization_config(model)["modules_to_not_convert"]


def test_rounded_tied_weight_is_refused():
    model = tiny("llama")
    convert_(model, [("lm_head", Int4())])
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight is rounded and tied to"):
        dict(export(model))


def test_nan_is_named():
    model = tiny("qwen3_moe")
    convert_(model, [("*.experts", Int4())])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        dict(export(model))


def test_modules_without_transformers_keep_their_names():
    model = nn.Sequential(nn.Linear(32, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    convert_(model, [("0", Int4())])
    names = {name for name, _ in export(model)}
    rest = {name for name in model.state_dict() if name != "0.weight"}
    assert names == rest | {"0.weight_packed", "0.weight_scale", "0.weight_shape"}


def test_layout_is_found_again_after_the_shapes_changed():
    model = nn.Sequential(nn.Linear(32, 3))
    assert dict(export(model))["0.weight"].shape == (3, 32)
    model[0] = nn.Linear(16, 3)
    assert dict(export(model))["0.weight"].shape == (3, 16)


def test_compiled_model_has_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(32, 3))
    convert_(model, [("0", Int4())])
    assert [n for n, _ in export(torch.compile(model))] == [n for n, _ in export(model)]


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_fp8_config_is_read_back_as_the_recipe(scale):
    model = tiny("qwen3_moe")
    convert_(model, [("*", BlockFP8(scale=scale))])
    config = quantization_config(model)
    assert BlockFP8.from_hf(config) == BlockFP8(scale=scale)
    assert config["modules_to_not_convert"] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]
    assert json.loads(json.dumps(config)) == config


def test_unrounded_experts_are_one_entry():
    model = tiny("qwen3_moe")
    convert_(model, [("*_proj", BlockFP8())])
    ignored = quantization_config(model)["modules_to_not_convert"]
    assert ignored == [
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]


def test_experts_that_a_checkpoint_holds_fused_are_listed_too():
    model = tiny("gpt_oss", num_hidden_layers=1)
    convert_(model, [("*_proj", BlockFP8())])
    ignored = quantization_config(model)["modules_to_not_convert"]
    assert "model.layers.0.mlp.experts" in ignored
    model = tiny("gpt_oss", num_hidden_layers=1)
    convert_(model, [("*_proj", Int4())])
    patterns = [x[3:] for x in quantization_config(model)["ignore"] if x.startswith("re:")]
    assert len(patterns) == 1 and re.match(patterns[0], "model.layers.0.mlp.experts.3.up_proj")


def test_int4_config_is_that_of_compressed_tensors():
    model = tiny("qwen3_moe", num_hidden_layers=1)
    convert_(model, [("*.q_proj", Int4(group_size=64))])
    config = quantization_config(model)
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 64,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
    experts = r"re:model\.layers\.0\.mlp\.experts\.\d+\."
    assert config["ignore"] == [
        *(f"model.layers.0.self_attn.{x}_proj" for x in "kvo"),
        *(rf"{experts}{x}_proj$" for x in ("gate", "up", "down")),
        "model.layers.0.mlp.gate",
        "lm_head",
    ]
    assert re.match(config["ignore"][3][3:], "model.layers.0.mlp.experts.17.gate_proj")


def mixed(model):
    convert_(model, [("*.experts", Int4()), ("*_proj", BlockFP8(scale="ue8m0"))])
    return model


def test_mixed_recipes_are_groups_of_one_config():
    model = mixed(tiny("qwen3_moe", num_hidden_layers=1))
    config, names = quantization_config(model), dict(export(model))
    assert config["format"] == "mixed-precision"
    fp8, int4 = config["config_groups"].values()
    assert (fp8["format"], int4["format"]) == ("float-quantized", "pack-quantized")
    assert fp8["targets"] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    assert len(int4["targets"]) == 3  # a pattern for each projection of all experts
    assert config["ignore"] == ["model.layers.0.mlp.gate", "lm_head"]
    assert "model.layers.0.self_attn.q_proj.weight_scale" in names
    assert not any(name.endswith("weight_scale_inv") for name in names)
    assert "model.layers.0.mlp.experts.0.up_proj.weight_packed" in names


def test_nvfp4_among_others_is_refused():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_(model, [("0", NVFP4()), ("1", Int4())])
    with pytest.raises(SettingError, match="reciprocal of its global scale"):
        dict(export(model))


# Saving


def test_shards_hold_what_one_file_holds(tmp_path):
    model = mixed(tiny("qwen3_moe"))
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_bytes=50_000)
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    many = {}
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        many |= tensors
    assert one.keys() == many.keys()
    assert all(same_bits(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())


def test_config_is_that_of_save_pretrained_and_the_rounding(tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "theirs")
    expected = json.loads((tmp_path / "theirs" / "config.json").read_text())
    convert_(model, [("*", BlockFP8())])
    save(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config.pop("quantization_config") == quantization_config(model)
    assert config == expected


def test_a_directory_in_use_is_not_replaced(tmp_path):
    (tmp_path / "step").mkdir()
    save(nn.Linear(2, 2), tmp_path / "step")  # empty: fine
    with pytest.raises(CheckpointError, match="is there and not empty"):
        save(nn.Linear(2, 2), tmp_path / "step")


@pytest.mark.parametrize("fails_at", [1, 3])
def test_full_disk_leaves_nothing_behind(fails_at, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    write, calls = safetensors.torch.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half a file")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        write(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    model = tiny("qwen3")
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(model, tmp_path / "step", max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "step")
    assert (tmp_path / "step" / "config.json").exists()


def test_nan_leaves_nothing_behind(tmp_path):
    model = nn.Linear(32, 2)
    convert_(model, [("", Int4())])
    nn.init.constant_(model.weight, torch.inf)
    with pytest.raises(NonFiniteError):
        save(model, tmp_path / "step")
    assert list(tmp_path.iterdir()) == []
