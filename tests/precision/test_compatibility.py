"""A trainer and an engine that disagree are told so, difference by difference."""

import pytest

from miles.errors import SettingError
from miles.precision import MXFP8, NVFP4, BlockFP8, Int4
from miles.precision.compatibility import check_compatible
from miles.precision.exporting import quantization_config
from miles.precision.modules import convert_
from tests.precision.checkpoints import tiny

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
KIMI_IGNORE = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"]


def int4(group_size=32, ignore=(), **weights):
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    } | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignore),
    }


def config_of(rules, family="qwen3_moe"):
    model = tiny(family)
    convert_(model, rules)
    return quantization_config(model)


@pytest.mark.parametrize(
    ("recipe", "engine"),
    [
        (BlockFP8(), FP8),
        (BlockFP8(), FP8 | {"scale_fmt": "float"}),
        (BlockFP8(scale="ue8m0"), FP8 | {"scale_fmt": "ue8m0"}),
        (BlockFP8(), {"model_type": "qwen3", "quantization_config": FP8}),
        (Int4(), int4()),
        (Int4(group_size=128), int4(128)),
        (MXFP8(), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
        (NVFP4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    ],
)
def test_same_recipe_passes(recipe, engine):
    check_compatible(recipe, engine)


@pytest.mark.parametrize(
    ("recipe", "engine", "difference"),
    [
        (
            BlockFP8(scale="ue8m0"),
            FP8,
            "scale format: power of two in the trainer, float32 in the engine",
        ),
        (
            BlockFP8(),
            FP8 | {"weight_block_size": [64, 128]},
            "block or group size: blocks of 128 x 128 in the trainer, blocks of 64 x 128 in the",
        ),
        (BlockFP8(), FP8 | {"weight_block_size": None}, "one scale a tensor in the engine"),
        (
            BlockFP8(),
            FP8 | {"activation_scheme": "static"},
            "activations: 8 bits, dynamic in the trainer, 8 bits, static in the engine",
        ),
        (BlockFP8(), FP8 | {"fmt": "e5m2"}, "format: float e4m3 in the trainer, float e5m2 in"),
        (Int4(group_size=128), int4(32), "groups of 128 in the trainer, groups of 32 in"),
        (Int4(), int4(num_bits=8), "bits: 4 in the trainer, 8 in the engine"),
        (Int4(), int4(symmetric=False), "zero points: symmetric in the trainer, asymmetric in"),
        (Int4(), int4(strategy="channel"), "one scale a row in the engine"),
        (Int4(), FP8, "format: integer in the trainer, float e4m3 in the engine"),
        (BlockFP8(), {}, "the engine rounds nothing"),
        (BlockFP8(), {"model_type": "qwen3"}, "the engine rounds nothing"),
        ({}, FP8, "the trainer rounds nothing"),
    ],
)
def test_difference_is_named(recipe, engine, difference):
    with pytest.raises(SettingError, match="don't round alike") as error:
        check_compatible(recipe, engine)
    assert difference in str(error.value)


def test_all_differences_are_named_at_once():
    engine = FP8 | {"scale_fmt": "ue8m0", "activation_scheme": "static"}
    with pytest.raises(SettingError) as error:
        check_compatible(BlockFP8(), engine)
    assert str(error.value).count("\n- ") == 2


def test_unknown_method_is_refused():
    with pytest.raises(SettingError, match="engine's quant_method is 'gptq'"):
        check_compatible(Int4(), {"quant_method": "gptq", "bits": 4})


RULES = {
    "fp8": [("*", BlockFP8(scale="ue8m0"))],
    "int4": [("*.experts", Int4())],
    "mixed": [("*.experts", Int4()), ("*_proj", BlockFP8())],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_own_config_passes(rules):
    config = config_of(rules)
    check_compatible(config, config)
    check_compatible(config, {"quantization_config": config})


def test_routers_that_one_side_rounds_are_named():
    trainer = config_of(RULES["fp8"])
    engine = trainer | {"modules_to_not_convert": ["lm_head"]}
    with pytest.raises(SettingError) as error:
        check_compatible(trainer, engine)
    assert (
        "ignored modules: the trainer leaves out model.layers.0.mlp.gate, model.layers.1.mlp.gate, "
        "the engine doesn't"
    ) in str(error.value)
    with pytest.raises(SettingError, match=r"the engine leaves out model\.layers\.0\.mlp\.gate"):
        check_compatible(engine, trainer)


def test_norms_and_embeddings_are_not_compared():
    trainer = config_of(RULES["fp8"])
    more = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.norm"]
    ignored = trainer["modules_to_not_convert"]
    check_compatible(trainer, trainer | {"modules_to_not_convert": ignored + more})


def test_end_of_a_name_and_a_module_around_it_count():
    trainer = config_of([("*.experts", BlockFP8())])
    engine = FP8 | {
        "modules_to_not_convert": [
            "lm_head",
            "mlp.gate",
            "model.layers.0.self_attn",
            "model.layers.1.self_attn",
        ]
    }
    check_compatible(trainer, engine)


def test_patterns_match_from_the_start():
    trainer = config_of(RULES["int4"])
    check_compatible(trainer, int4(ignore=["lm_head", "re:.*self_attn", "re:.*mlp.gate$"]))
    with pytest.raises(
        SettingError, match=r"the trainer leaves out model\.layers\.0\.self_attn\.q"
    ):
        check_compatible(trainer, int4(ignore=["lm_head", "re:self_attn", "re:.*mlp.gate$"]))


def test_patterns_of_experts_are_compared_by_example():
    trainer = config_of([("*_proj", Int4())])
    check_compatible(trainer, int4(ignore=["lm_head", "re:.*mlp.experts.*", "re:.*mlp.gate$"]))
    with pytest.raises(SettingError, match="the trainer leaves out re:model"):
        check_compatible(trainer, int4(ignore=["lm_head", "re:.*mlp.gate$"]))


def test_pattern_that_matches_nothing_of_the_trainers_is_named():
    trainer = config_of([("*.experts", Int4()), ("*_proj", Int4())])
    with pytest.raises(SettingError) as error:
        check_compatible(trainer, int4(ignore=[*KIMI_IGNORE, "re:.*mlp.gate$"]))
    assert "the engine leaves out re:.*self_attn.*, re:.*shared_experts.*" in str(error.value)


MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (1, 10)
    for name in ("self_attn.q_proj", "mlp.gate", "mlp.experts.0.up_proj")
]


def test_modules_settle_which_patterns_matter():
    trainer = int4(ignore=["re:.*self_attn.*", "re:.*gate$"])
    engine = int4(ignore=["re:model.layers.\\d+.self_attn", "mlp.gate", "re:.*vision.*"])
    check_compatible(trainer, engine, modules=MODULES)
    with pytest.raises(SettingError, match="ignored modules"):
        check_compatible(trainer, engine)
    with pytest.raises(SettingError) as error:
        check_compatible(trainer, int4(ignore=["re:.*self_attn.*"]), modules=MODULES)
    assert "leaves out model.layers.1.mlp.gate, model.layers.10.mlp.gate" in str(error.value)


def test_entry_that_engines_read_differently_is_named():
    ignore = ["model.layers.1"]
    with pytest.raises(SettingError) as error:
        check_compatible(int4(ignore=ignore), int4(ignore=ignore), modules=MODULES)
    text = str(error.value)
    assert "'model.layers.1' of the engine is also the beginning of model.layers.10.mlp" in text


def test_swapped_recipes_of_a_mixed_config_are_named():
    trainer = config_of(RULES["mixed"])
    swapped = config_of([("*.experts", BlockFP8()), ("*_proj", Int4())])
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.2.up_proj"]
    check_compatible(trainer, trainer, modules=modules)
    with pytest.raises(SettingError) as error:
        check_compatible(trainer, swapped, modules=modules)
    assert (
        "model.layers.0.self_attn.q_proj: float e4m3 of 8 bits in blocks of 128 x 128 in the "
        "trainer and integer of 4 bits in groups of 32 in the engine"
    ) in str(error.value)


def test_recipe_that_only_one_side_has_is_named():
    trainer = config_of(RULES["mixed"])
    with pytest.raises(SettingError) as error:
        check_compatible(trainer, int4())
    assert "the trainer has float e4m3 of 8 bits in blocks of 128 x 128, nothing like it" in str(
        error.value
    )
