"""Checkpoints in: the same bits as went out, and nothing at all where anything is wrong."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from miles.errors import CheckpointError
from miles.precision import MXFP8, NVFP4, BlockFP8, Int4, fake_quantize
from miles.precision.exporting import export, quantization_config
from miles.precision.loading import load, verify_parity
from miles.precision.modules import convert_
from miles.precision.saving import save
from tests.precision.checkpoints import FAMILIES, OTHERS, edit, same_bits, snapshot, tiny
from tests.test_lean_import import in_fresh_python

RECIPES = [BlockFP8(), BlockFP8(scale="ue8m0"), Int4(), MXFP8(), NVFP4()]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def converted(family, recipe, **changes):
    model = tiny(family, **changes)
    convert_(model, [("*", recipe)])
    return model


def mixed(seed=0):
    model = tiny("qwen3_moe", seed=seed)
    convert_(model, [("*.experts", Int4()), ("*_proj", BlockFP8(scale="ue8m0"))])
    return model


def same_exports(a, b):
    a, b = dict(export(a)), dict(export(b))
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.fixture
def fp8(tmp_path):
    """A checkpoint in block FP8, and another model to load it into."""
    save(converted("qwen3", BlockFP8()), tmp_path / "step")
    return tmp_path / "step", converted("qwen3", BlockFP8(), seed=1)


@pytest.fixture
def int4(tmp_path):
    save(converted("qwen3", Int4()), tmp_path / "step")
    return tmp_path / "step", converted("qwen3", Int4(), seed=1)


def refuses(model, folder, match):
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=match):
        load(model, folder)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES[:3], ids=str)
def test_export_load_export_changes_no_bit(family, recipe, tmp_path):
    first, second = converted(family, recipe), converted(family, recipe, seed=1)
    save(first, tmp_path / "step")
    load(second, tmp_path / "step")
    assert same_exports(first, second)
    verify_parity(second, tmp_path / "step")


@pytest.mark.parametrize("recipe", RECIPES[3:], ids=str)
def test_micro_formats_come_back_as_they_were_rounded(recipe, tmp_path):
    first, second = converted("qwen3_moe", recipe), tiny("qwen3_moe", seed=1)
    save(first, tmp_path / "step")
    report = load(second, tmp_path / "step")
    weight = first.model.layers[0].self_attn.o_proj.weight  # its global scale is its own
    expected = fake_quantize(weight, recipe)
    assert same_bits(second.model.layers[0].self_attn.o_proj.weight, expected)
    assert report.recipes[type(recipe).__name__] == 8 + 2 * 3 * 3
    verify_parity(first, tmp_path / "step")


@pytest.mark.parametrize("recipe", [BlockFP8(scale="ue8m0"), Int4()], ids=str)
def test_float32_master_weights_round_trip(recipe, tmp_path):
    first = converted("qwen3_moe", recipe, dtype=torch.float32)
    second = converted("qwen3_moe", recipe, dtype=torch.float32, seed=1)
    save(first, tmp_path / "step")
    load(second, tmp_path / "step")
    assert same_exports(first, second)


def test_scales_stored_as_e8m0_round_trip(tmp_path):
    recipe = BlockFP8(scale="ue8m0", store="float8_e8m0fnu")
    first, second = converted("qwen3", recipe), converted("qwen3", recipe, seed=1)
    save(first, tmp_path / "step")
    load(second, tmp_path / "step")
    assert same_exports(first, second)


def test_mixed_recipes_round_trip(tmp_path):
    first, second = mixed(), mixed(1)
    save(first, tmp_path / "step", max_shard_bytes=50_000)
    report = load(second, tmp_path / "step")
    assert same_exports(first, second)
    assert report.recipes == {"BlockFP8": 8, "Int4": 18, "none": 13}
    assert verify_parity(second, tmp_path / "step").num_rounded == 26


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_plain_checkpoint_of_transformers_loads(family, tmp_path):
    first, second = tiny(family), converted(family, BlockFP8(), seed=1)
    first.save_pretrained(tmp_path)
    load(second, tmp_path)
    expected = first.state_dict()
    assert all(same_bits(t, expected[name]) for name, t in second.state_dict().items())


def test_values_are_those_of_the_fake_quantised_weights(tmp_path):
    first, second = converted("qwen3_moe", BlockFP8()), tiny("qwen3_moe", seed=1)
    save(first, tmp_path / "step")
    load(second, tmp_path / "step")
    before, after = first.state_dict(), second.state_dict()
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    halves = [fake_quantize(half, BlockFP8()) for half in before[fused].chunk(2, 1)]
    assert same_bits(after[fused], torch.cat(halves, 1))
    assert same_bits(after[Q], fake_quantize(before[Q], BlockFP8()))
    assert same_bits(after["lm_head.weight"], before["lm_head.weight"])


def test_forward_pass_after_loading_uses_the_new_weights(int4):
    folder, model = int4
    tokens = torch.arange(1, 6)[None]
    before = model(tokens).logits
    load(model, folder)
    assert torch.equal(model(tokens).logits, converted("qwen3", Int4())(tokens).logits)
    assert not torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_element_by_element_is_row_by_row(family, tmp_path, monkeypatch):
    first = tiny(family)
    rows = dict(export(first))
    monkeypatch.setattr("miles.precision._places._is_run", lambda *_: False)
    second = tiny(family)
    elements = dict(export(second))
    assert rows.keys() == elements.keys()
    assert all(same_bits(rows[name], elements[name]) for name in rows)
    save(second, tmp_path / "step")
    third = tiny(family, seed=1)
    load(third, tmp_path / "step")
    assert all(same_bits(t, second.state_dict()[n]) for n, t in third.state_dict().items())


def test_transposed_weights_come_back_too():
    """Elements that transformers moves one by one: here, a stand-in that transposes."""
    from miles.precision import _places

    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0, 10.0).view(2, 2)}

    def revert(state):
        joined = torch.cat([state["a"].T, state["b"]], 0) if len(state) == 2 else state
        return {"c": joined}

    (place,) = _places._places(weights, {"c": torch.Size([5, 2])}, revert)
    assert place.sources == ("a", "b")
    piece = place.read(weights)
    assert torch.equal(piece, revert(weights)["c"])
    fresh = {name: torch.empty_like(t) for name, t in weights.items()}
    place.write(piece, fresh)
    assert all(torch.equal(fresh[name], weights[name]) for name in weights)


# Refusals


def test_fp8_codes_without_their_scale_are_refused(fp8):
    folder, model = fp8
    edit(folder, **{f"{Q}_scale_inv": None})
    refuses(model, folder, r"q_proj\.weight: got .*expected its scale beside it")


def test_missing_tensor_is_named(fp8):
    folder, model = fp8
    edit(folder, **{NORM: None})
    refuses(model, folder, r"lacks model\.norm\.weight and holds nothing")


def test_extra_tensor_is_named(fp8):
    folder, model = fp8
    edit(folder, extra=torch.zeros(2))
    refuses(model, folder, r"lacks nothing and holds extra")


def test_checkpoint_of_another_size_is_refused(fp8, tmp_path):
    _, model = fp8
    save(converted("qwen3", BlockFP8(), hidden_size=256), tmp_path / "large")
    refuses(model, tmp_path / "large", r"weight: got .*256.*expected")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (f"{Q}_scale_inv", lambda t: t.new_ones(2, 1), "scale_inv.*expected"),
        (f"{Q}_scale_inv", lambda t: t.new_ones(1), "scale_inv"),
        (f"{Q}_scale_inv", lambda t: t * torch.nan, "q_proj.weight_scale_inv holds NaN"),
        (f"{Q}_scale_inv", lambda t: t.to(torch.int32), "one unrounded tensor, or"),
        (Q, lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype), "q_proj.weight holds NaN"),
        (Q, lambda t: t.float(), "one unrounded tensor, or"),
        (Q, lambda t: t.view(torch.float8_e5m2), "F8_E5M2"),
        (NORM, lambda t: t.fill_(torch.inf), "model.norm.weight holds NaN or infinity"),
        (NORM, lambda t: t[:-1], "shape"),
        (NORM, lambda t: t.to(torch.int32), "one unrounded tensor, or"),
    ],
)
def test_damaged_fp8_tensors_are_refused(fp8, name, change, match):
    folder, model = fp8
    tensors = load_file(folder / "model.safetensors")
    edit(folder, **{name: change(tensors[name])})
    refuses(model, folder, match)


@pytest.mark.parametrize(
    ("suffix", "change", "match"),
    [
        ("_packed", lambda t: None, "got .*weight_scale.*expected one unrounded"),
        ("_scale", lambda t: None, "got .*weight_packed.*expected one unrounded"),
        ("_shape", lambda t: None, "got .*weight_packed.*expected one unrounded"),
        ("_packed", lambda t: t[:, :-1], "weight_packed.*expected"),
        ("_packed", lambda t: t.to(torch.int64), "one unrounded"),
        ("_scale", lambda t: t[:, :-1], "weight_scale.*expected"),
        ("_shape", lambda t: t + 1, r"weight_shape \[129, 129\].*expected \[128, 128\]"),
    ],
)
def test_damaged_int4_tensors_are_refused(int4, suffix, change, match):
    folder, model = int4
    tensors = load_file(folder / "model.safetensors")
    edit(folder, **{f"{Q}{suffix}": change(tensors[f"{Q}{suffix}"])})
    refuses(model, folder, match)


def test_shape_in_int32_is_read_too(int4):
    folder, model = int4
    shape = load_file(folder / "model.safetensors")[f"{Q}_shape"]
    edit(folder, **{f"{Q}_shape": shape.to(torch.int32)})
    load(model, folder)


def test_scale_bits_that_stand_for_nan_are_refused(tmp_path):
    model = converted("qwen3", MXFP8())
    save(model, tmp_path / "step")
    scale = load_file(tmp_path / "step" / "model.safetensors")[f"{Q}_scale_inv"]
    scale[3, 1] = 255
    edit(tmp_path / "step", **{f"{Q}_scale_inv": scale})
    refuses(model, tmp_path / "step", "q_proj.weight_scale_inv holds NaN")


def test_last_tensor_is_checked_before_the_first_is_set(fp8):
    folder, model = fp8
    tensors = load_file(folder / "model.safetensors")
    last = list(model.state_dict())[-1]
    edit(folder, **{last: torch.full_like(tensors[last], torch.nan)})
    refuses(model, folder, f"{last} holds NaN")


def test_checkpoint_of_published_form_leaves_out_what_the_model_ignores(fp8):
    folder, model = fp8
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\..*"]  # a draft layer, say
    edit(folder, **{"model.layers.2.eh_proj.weight": torch.zeros(2, 2)})
    load(model, folder)


def test_truncated_file_is_refused(fp8):
    folder, model = fp8
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(model, folder, r"model\.safetensors can't be read")


def test_shard_that_is_missing_or_disagrees_with_the_index_is_refused(tmp_path):
    model = tiny("qwen3")
    save(model, tmp_path / "step", max_shard_bytes=100_000)
    shutil.copytree(tmp_path / "step", tmp_path / "other")
    first = sorted((tmp_path / "step").glob("*.safetensors"))[0].name
    (tmp_path / "step" / first).unlink()
    refuses(model, tmp_path / "step", f"{first} can't be read")
    tensors = load_file(tmp_path / "other" / first)
    tensors.popitem()
    save_file(tensors, tmp_path / "other" / first)
    refuses(model, tmp_path / "other", "the index disagree")


def test_directory_without_weights_is_refused(tmp_path):
    refuses(nn.Linear(2, 2), tmp_path, "has neither model.safetensors nor its index")


def test_other_block_size_is_refused(fp8):
    folder, model = fp8
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(config))
    refuses(model, folder, r"weight_block_size \[64, 64\]")


def test_tied_copy_has_to_be_the_same(tmp_path):
    model = tiny("llama")
    save(model, tmp_path / "step")
    head = model.lm_head.weight.detach().clone()
    edit(tmp_path / "step", **{"lm_head.weight": head})
    load(model, tmp_path / "step")
    edit(tmp_path / "step", **{"lm_head.weight": head + 1})
    refuses(model, tmp_path / "step", "the model ties them")


# Parity


@every_recipe
def test_what_was_saved_has_the_trainers_bits(recipe, tmp_path):
    model = converted("qwen3_moe", recipe)
    save(model, tmp_path / "step")
    report = verify_parity(model, tmp_path / "step")
    assert (report.num_rounded, report.num_plain) == (26, 13)
    assert report.num_values == sum(p.numel() for p in model.parameters())


def test_parity_names_the_first_tensor_that_differs(fp8):
    folder, _ = fp8
    model = converted("qwen3", BlockFP8())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] *= 2
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight differs.* 1 of"):
        verify_parity(model, folder)


def test_parity_refuses_other_recipes(int4):
    folder, _ = int4
    model = converted("qwen3", Int4(group_size=64))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight differs"):
        verify_parity(model, folder)
    save(tiny("qwen3"), folder.parent / "plain")
    with pytest.raises(CheckpointError, match=r"is not rounded in .* and Int4 in the model"):
        verify_parity(model, folder.parent / "plain")


# Other readers of the same files


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "deepseek_v3"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_transformers_dequantises_fp8_to_the_same_weights(family, scale, tmp_path):
    pytest.importorskip("accelerate")
    model, ours = converted(family, BlockFP8(scale=scale)), tiny(family, seed=1)
    save(model, tmp_path / "step")
    load(ours, tmp_path / "step")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "step",
        dtype=torch.bfloat16,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    expected = ours.state_dict()
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    # transformers keeps some tensors in float32 whatever the dtype asked for.
    differ = [n for n in expected if not same_bits(found[n].to(expected[n].dtype), expected[n])]
    assert differ == []


@pytest.fixture
def compressed_tensors():
    return pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("group_size", [32, 128])
def test_compressed_tensors_unpacks_the_same_numbers(compressed_tensors, group_size):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = converted("qwen3", Int4(group_size=group_size))
    config = QuantizationConfig(**quantization_config(model))
    assert "lm_head" in config.ignore
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = dict(export(model))
    base = Q.removesuffix("weight")
    stored = {n.removeprefix(base): t for n, t in tensors.items() if n.startswith(base)}
    theirs = compressor.decompress(stored, scheme)["weight"]
    weight = model.get_parameter(Q)
    assert same_bits(theirs, fake_quantize(weight, Int4(group_size=group_size)).detach())
    again = compressor.compress(
        {"weight": weight.detach(), "weight_scale": stored["weight_scale"]}, scheme
    )
    assert same_bits(again["weight_packed"], stored["weight_packed"])
    assert same_bits(again["weight_shape"], stored["weight_shape"])


def test_compressed_tensors_reads_the_config_of_mixed_recipes(compressed_tensors):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = mixed()
    config = QuantizationConfig(**quantization_config(model))
    fp8 = next(g for g in config.config_groups.values() if g.format == "float-quantized")
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    tensors = dict(export(model))
    base = Q.removesuffix("weight")
    stored = {n.removeprefix(base): t for n, t in tensors.items() if n.startswith(base)}
    theirs = compressor.decompress(stored, fp8)["weight"]
    expected = fake_quantize(model.get_parameter(Q).float(), BlockFP8(scale="ue8m0")).detach()
    assert same_bits(theirs.float(), expected)


@pytest.mark.parametrize(
    "build",
    [lambda: converted("qwen3", Int4()), lambda: converted("qwen3_moe", Int4()), mixed],
    ids=["qwen3", "qwen3_moe", "mixed"],
)
def test_transformers_reads_compressed_tensors_as_we_do(compressed_tensors, build, tmp_path):
    model = build()
    ours = tiny(model.config.model_type, seed=1)
    save(model, tmp_path / "step")
    load(ours, tmp_path / "step")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "step",
        dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    expected, found = ours.state_dict(), theirs.state_dict()
    assert [n for n in expected if not same_bits(found[n], expected[n])] == []


def test_importing_the_package_loads_no_transformers():
    out = in_fresh_python("""
        import sys
        import miles.precision.exporting, miles.precision.loading, miles.precision.saving
        import miles.precision.compatibility
        print([name for name in ("transformers", "safetensors", "triton") if name in sys.modules])
        """)
    assert out.strip() == "[]"
