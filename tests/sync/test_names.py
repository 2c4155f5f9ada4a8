import itertools
import weakref
import zlib

import pytest
import torch

from miles.errors import DtypeError, SettingError, ShapeError, SyncError, UnsupportedModelError
from miles.sync import MegatronNames, NameMap, NameRule, SGLangNames, families, name_map
from miles.sync.names import QueryGroups
from tests.sync.named import MODELS, MOE_MODELS, VOCAB, E, config, saved, tiny

EXPERTS = ["sequential", "te_grouped", "grouped"]


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.is_contiguous(), name
        assert torch.equal(tensor, theirs[name]), name


def shuffled(tensors):
    names = sorted(tensors, key=lambda name: zlib.crc32(name.encode()))
    return [(name, tensors[name]) for name in names]


def there_and_back(names: NameMap, tensors):
    there = dict(names.forward(shuffled(tensors)))
    assert set(there) == set(names.target_names)
    same(dict(names.backward(shuffled(there))), tensors)
    return there


def test_families_are_those_of_the_tests():
    assert set(families()) == {name.partition("-")[0] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_naming_and_back_bit_for_bit(name):
    model = tiny(name)
    disk = saved(model)
    assert set(name_map(model.config).source_names) == set(disk)
    for target in ("megatron", "sglang", "hf_module"):
        there_and_back(name_map(model.config, target=target), disk)
    for options in itertools.product((False, True), EXPERTS, (None, VOCAB + 24)):
        if options[1] != "grouped" or name != "gpt_oss":
            fused, experts, padded = options
            layout = MegatronNames(fused_layernorm=fused, experts=experts, padded_vocab_size=padded)
            there_and_back(name_map(model.config, megatron=layout), disk)


@pytest.mark.parametrize("name", MODELS)
def test_the_modules_names_are_those_of_its_state_dict(name):
    model = tiny(name)
    there = dict(name_map(model.config, target="hf_module").forward(saved(model).items()))
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    same(there, {name: tensor for name, tensor in state.items()})


@pytest.mark.parametrize("name", MODELS)
def test_between_two_others_is_by_way_of_the_checkpoint(name):
    model = tiny(name)
    disk = saved(model)
    spec = MegatronNames(fused_layernorm=True, experts="te_grouped", padded_vocab_size=64)
    engine = SGLangNames(padded_vocab_size=128)
    trained = dict(name_map(model.config, megatron=spec).forward(disk.items()))
    served = dict(name_map(model.config, target="sglang", sglang=engine).forward(disk.items()))
    direct = name_map(
        model.config, source="megatron", target="sglang", megatron=spec, sglang=engine
    )
    same(dict(direct.forward(shuffled(trained))), served)
    same(dict(direct.backward(shuffled(served))), trained)
    whole = name_map(model.config, source="hf_module", target="megatron", megatron=spec)
    same(dict(whole.forward(model.state_dict().items())), trained)  # lm_head too where it is tied
    two = name_map(model.config, source="hf_module", target="hf").then(
        name_map(model.config, megatron=spec)
    )
    same(dict(two.forward(model.state_dict().items())), trained)


STAGES = [range(0, 2), range(2, 3)]


@pytest.mark.parametrize("name", ["qwen3-tied", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("target", ["megatron", "sglang", "hf_module"])
def test_pipeline_stages_make_up_the_model(name, target):
    model = tiny(name)
    disk, back = saved(model), {}
    for stage in STAGES:
        names = name_map(model.config, target=target, layers=stage)
        there = dict(names.forward(disk.items()))  # what other stages hold passes by
        assert set(there) == set(names.target_names)
        back |= dict(names.backward(there.items()))
    same(back, disk)


@pytest.mark.parametrize("name", MOE_MODELS)
@pytest.mark.parametrize("target", ["megatron", "sglang", "hf_module"])
def test_experts_of_a_rank_come_back(name, target):
    model = tiny(name)
    disk, back = saved(model), {}
    for chosen in (range(0, 1), range(1, 4)):
        names = name_map(model.config, target=target, experts=chosen)
        there = dict(names.forward(disk.items()))
        for key, tensor in names.backward(there.items()):
            whole = tensor.shape == disk[key].shape
            piece = disk[key] if whole else disk[key][chosen.start : chosen.stop]
            assert torch.equal(tensor, piece), key  # gpt-oss saves all experts in one
            back[key] = disk[key]
    same(back, disk)


def layer_of(name, target, layer=1, **options):
    """Names without the layer's prefix, and shapes."""
    model = tiny(name)
    there = name_map(model.config, target=target, **options).forward(saved(model).items())
    prefix = f"{'decoder' if target == 'megatron' else 'model'}.layers.{layer}."
    return {k.removeprefix(prefix): tuple(t.shape) for k, t in there if k.startswith(prefix)}


def test_names_of_transformer_engine():
    spec = MegatronNames(fused_layernorm=True, experts="te_grouped")
    assert set(layer_of("llama", "megatron", megatron=spec)) == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    latent = layer_of("deepseek_v3", "megatron", megatron=spec)
    assert {name for name in latent if "norm" in name} == {
        "input_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "pre_mlp_layernorm.weight",
    }
    assert {name for name in latent if ".experts." in name} == {
        f"mlp.experts.linear_fc{i}.weight{e}" for i in (1, 2) for e in range(E)
    }


def test_names_of_sglang():
    assert layer_of("qwen2", "sglang") == {
        "input_layernorm.weight": (16,),
        "self_attn.qkv_proj.weight": (32, 16),
        "self_attn.qkv_proj.bias": (32,),
        "self_attn.o_proj.weight": (16, 16),
        "post_attention_layernorm.weight": (16,),
        "mlp.gate_up_proj.weight": (48, 16),
        "mlp.down_proj.weight": (16, 24),
    }
    latent = layer_of("deepseek_v3", "sglang")
    assert latent == {
        "input_layernorm.weight": (16,),
        "self_attn.fused_qkv_a_proj_with_mqa.weight": (8 + 8 + 4, 16),
        "self_attn.q_a_layernorm.weight": (8,),
        "self_attn.q_b_proj.weight": (4 * 12, 8),
        "self_attn.kv_a_layernorm.weight": (8,),
        "self_attn.kv_b_proj.weight": (4 * 14, 8),
        "self_attn.o_proj.weight": (16, 4 * 6),
        "post_attention_layernorm.weight": (16,),
        "mlp.gate.weight": (E, 16),
        "mlp.gate.e_score_correction_bias": (E,),
        "mlp.experts.w13_weight": (E, 24, 16),
        "mlp.experts.w2_weight": (E, 16, 12),
        "mlp.shared_experts.gate_up_proj.weight": (24, 16),
        "mlp.shared_experts.down_proj.weight": (16, 12),
    }
    oss = layer_of("gpt_oss", "sglang")
    assert {name: shape for name, shape in oss.items() if "mlp" in name or "sinks" in name} == {
        "self_attn.sinks": (4,),
        "mlp.router.weight": (E, 16),
        "mlp.router.bias": (E,),
        "mlp.experts.w13_weight": (E, 48, 16),
        "mlp.experts.w13_weight_bias": (E, 48),
        "mlp.experts.w2_weight": (E, 16, 24),
        "mlp.experts.w2_weight_bias": (E, 16),
    }


def test_the_shared_expert_may_be_the_last_of_sglangs_experts():
    model = tiny("deepseek_v3", n_shared_experts=1)
    disk = saved(model)
    names = name_map(model.config, target="sglang", sglang=SGLangNames(fused_shared_experts=True))
    there = there_and_back(names, disk)
    w13, w2 = (there[f"model.layers.2.mlp.experts.{w}_weight"] for w in ("w13", "w2"))
    assert len(w13) == E + 1 and not any("shared" in name for name in there)
    shared = "model.layers.2.mlp.shared_experts."
    assert torch.equal(w13[E, :12], disk[shared + "gate_proj.weight"])
    assert torch.equal(w2[E], disk[shared + "down_proj.weight"])
    for bad in (tiny("glm4_moe").config, tiny("qwen3_moe").config):
        with pytest.raises(SettingError, match="one shared expert"):
            name_map(bad, target="sglang", sglang=SGLangNames(fused_shared_experts=True))


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_a_tensor_leaves_as_soon_as_it_is_complete_and_is_not_held(name):
    model = tiny(name)
    disk = saved(model)
    names = name_map(model.config, target="sglang")
    taken, alive = [], []

    def stream():
        for key in names.source_names:  # table order: a rule's tensors follow each other
            tensor = disk[key].clone()
            alive.append(weakref.ref(tensor))
            taken.append(key)
            yield key, tensor
            del tensor

    most = 0
    for _ in names.forward(stream()):
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(taken) == len(disk)
    assert most <= 2 * E + 1  # the gates and ups of one layer's experts


def test_what_needs_no_rearranging_is_the_same_memory():
    model = tiny("qwen3")
    state = model.state_dict()
    there = dict(name_map(model.config).forward(state.items()))
    fc2 = there["decoder.layers.0.mlp.linear_fc2.weight"]
    assert fc2.data_ptr() == state["model.layers.0.mlp.down_proj.weight"].data_ptr()
    assert not any(tensor.requires_grad for tensor in there.values())


def test_dtypes_stay(name="deepseek_v3"):
    model = tiny(name).bfloat16()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    there = there_and_back(name_map(model.config), saved(model))
    for key, tensor in there.items():
        assert tensor.dtype == (torch.float32 if "expert_bias" in key else torch.bfloat16)


def test_padding_of_the_vocabulary_is_zeros_and_what_it_learnt_is_dropped():
    model = tiny("qwen3-tied")
    names = name_map(model.config, megatron=MegatronNames(padded_vocab_size=64))
    there = dict(names.forward(saved(model).items()))
    table = there["embedding.word_embeddings.weight"]
    assert table.shape == (64, 16) and not table[VOCAB:].any()
    table[VOCAB:] = torch.nan
    same(dict(names.backward(there.items())), saved(model))


def test_a_tied_head_may_come_if_it_is_the_embedding():
    model = tiny("qwen2-tied")
    disk, names = saved(model), name_map(model.config)
    head = disk["model.embed_tokens.weight"].clone()
    same(
        dict(names.forward([("lm_head.weight", head), *disk.items()])),
        dict(names.forward(disk.items())),
    )
    head[3, 3] += 1
    for stream in (
        [("lm_head.weight", head), *disk.items()],
        [*disk.items(), ("lm_head.weight", head)],
    ):
        with pytest.raises(SyncError, match=r"lm_head.weight differs from model.embed_tokens"):
            dict(names.forward(stream))


def refilled(tensors):
    """As a trainer hands them out that gathers each into one buffer."""
    size = max(tensor.numel() for tensor in tensors.values())
    buffer = torch.empty(size, dtype=next(iter(tensors.values())).dtype)
    for name, tensor in tensors.items():
        yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
        buffer.fill_(-7)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_stream_may_fill_one_buffer_again_and_again(name):
    model = tiny(name)
    disk = saved(model)
    for target in ("megatron", "sglang", "hf_module"):
        names = name_map(model.config, target=target)
        wanted = dict(names.forward(disk.items()))
        there = {key: tensor.clone() for key, tensor in names.forward(refilled(disk))}
        same(there, wanted)
        same({key: t.clone() for key, t in names.backward(refilled(wanted))}, disk)
    direct = name_map(model.config, source="sglang", target="megatron")
    served = dict(name_map(model.config, target="sglang").forward(disk.items()))
    there = {key: tensor.clone() for key, tensor in direct.forward(refilled(served))}
    same(there, dict(direct.forward(served.items())))


def test_ties_are_checked_in_a_stream_that_fills_one_buffer_again():
    model = tiny("qwen2-tied")
    disk, names = saved(model), name_map(model.config)
    head = disk["model.embed_tokens.weight"].clone()
    dict(names.forward(refilled({"lm_head.weight": head} | disk)))
    meta = {key: tensor.to("meta") for key, tensor in disk.items()}
    dict(names.forward((key, tensor) for key, tensor in meta.items()))  # for shapes alone
    head[3, 3] += 1
    for tensors in ({"lm_head.weight": head} | disk, disk | {"lm_head.weight": head}):
        with pytest.raises(SyncError, match=r"lm_head.weight differs from model.embed_tokens"):
            dict(names.forward(refilled(tensors)))


def test_what_no_side_has_a_place_for_passes_by():
    model = tiny("deepseek_v3", num_nextn_predict_layers=1)
    names, disk = name_map(model.config), saved(model)
    there = dict(names.forward(disk.items()))
    more = {"model.layers.3.eh_proj.weight": torch.ones(1), "model.rotary_emb.inv_freq": None}
    same(dict(names.forward((more | disk).items())), there)
    state = {"decoder.layers.0.self_attention.linear_proj._extra_state": None}
    same(dict(names.backward((state | there).items())), disk)


QWEN = config("qwen3")
Q = "model.layers.0.self_attn.q_proj.weight"


def failing(error, text, tensors, *, way="forward", strict=True, **options):
    names = name_map(options.pop("config", QWEN), **options)
    with pytest.raises(error, match=text):
        list(getattr(names, way)(tensors, strict=strict))


def test_missing_unknown_and_repeated_tensors_are_named():
    disk = saved(tiny("qwen3"))
    one_less = {name: tensor for name, tensor in disk.items() if name != Q}
    failing(
        SyncError, rf"missing tensors \['{Q}'\]; expected the 36 names of 'hf'", one_less.items()
    )
    failing(SyncError, "missing.*pass whole rules", one_less.items(), strict=False)
    failing(SyncError, r"missing tensors .* and 28 more; .*pass strict=False for a part", [])
    stranger = [("model.layers.3.mlp.up_proj.weight", torch.ones(1))]
    failing(SyncError, r"unknown tensor model\.layers\.3\.mlp\.up_proj.*'hf'", stranger)
    failing(SyncError, r"unknown tensor model\..* of 'megatron'", disk.items(), way="backward")
    failing(SyncError, f"got {Q} twice", [(Q, disk[Q])] * 2)
    assert not list(name_map(QWEN).forward([], strict=False))


def test_misshapen_tensors_are_named():
    disk = saved(tiny("qwen3"))
    bad = disk | {Q: torch.ones(16, 16)}
    failing(
        ShapeError, rf"{Q} \(16, 16\), .*got shape \(16, 16\); expected \(32, 16\)", bad.items()
    )
    gate = "model.layers.1.mlp.gate_proj.weight"
    failing(
        ShapeError, gate + r".*expected \(23, 16\)", (disk | {gate: torch.ones(23, 16)}).items()
    )
    embed = "model.embed_tokens.weight"
    failing(ShapeError, embed + ".*expected", (disk | {embed: torch.ones(41, 16)}).items())
    half = disk | {Q: disk[Q].bfloat16()}
    failing(DtypeError, Q + ".*bfloat16.*float32.*one dtype", half.items())
    there = dict(name_map(QWEN).forward(disk.items()))
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    wrong = there | {qkv: torch.ones(63, 16)}
    failing(ShapeError, qkv + r".*expected \(64, 16\)", wrong.items(), way="backward")
    odd = there | {"decoder.layers.0.mlp.linear_fc1.weight": torch.ones(47, 16)}
    failing(ShapeError, r"linear_fc1.*\(47, 16\).*2 equal parts", odd.items(), way="backward")


def test_misshapen_experts_are_named():
    model = tiny("qwen3_moe")
    disk = saved(model)
    down = "model.layers.0.mlp.experts.3.down_proj.weight"
    bad = (disk | {down: torch.ones(16, 11)}).items()
    failing(
        ShapeError, r"and 1 more: got shape \(16, 11\)", bad, target="sglang", config=model.config
    )
    model = tiny("gpt_oss")
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    for shape, text in (((5, 16, 48), r"expected \(4, 16, 48\)"), ((4, 16, 47), "in turns")):
        bad = (saved(model) | {experts: torch.ones(shape)}).items()
        failing(ShapeError, text, bad, config=model.config)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "vllm"}, "got naming 'vllm'; expected one of .*'sglang'"),
        ({"target": "hf"}, "source and target"),
        ({"layers": range(2, 5)}, r"layers=range\(2, 5\); expected a part of range\(0, 3\)"),
        ({"layers": range(0, 3, 2)}, "without gaps"),
        ({"experts": range(0, 2)}, r"experts=range\(0, 2\); expected a part of range\(0, 0\)"),
        ({"megatron": MegatronNames(padded_vocab_size=8)}, "padded_vocab_size=8.*vocab_size=40"),
        ({"megatron": MegatronNames(experts="fused")}, "experts='fused'"),
    ],
)
def test_settings_that_cannot_be(options, text):
    with pytest.raises(SettingError, match=text):
        name_map(QWEN, **options)


def test_models_that_cannot_be():
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*qwen3_moe.*own rules"):
        name_map(type("Config", (), {"model_type": "mamba"})())
    with pytest.raises(UnsupportedModelError, match="rope_interleave=False"):
        name_map(config("deepseek_v3", rope_interleave=False))
    with pytest.raises(SettingError, match="no biases"):
        name_map(config("gpt_oss"), megatron=MegatronNames(experts="grouped"))
    with pytest.raises(SettingError, match="got w in two rules"):
        NameMap([NameRule(("w",), ("a",)), NameRule(("w",), ("b",))])
    with pytest.raises(SettingError, match="3 attention heads and 2"):
        QueryGroups(3, 2, 4)
