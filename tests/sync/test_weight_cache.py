"""`SGLangWeightCacheSyncer` on files that a daemon, a server and a trainer map."""

import contextlib

import pytest
import torch
import transformers
from torch import nn

from miles.errors import SettingError, SyncError, UnsupportedModelError
from miles.protocols import WeightSyncer
from miles.sync import SGLangSyncer, _weight_cache_daemon
from miles.sync._weight_cache_views import FAMILIES, engine_views
from miles.sync.weight_cache import SGLangWeightCacheSyncer
from tests.sync import weight_cache_fake
from tests.sync.named import MODELS, VOCAB, config, tiny
from tests.sync.weight_cache_fake import PADDED, World, in_engine

NAMES = [name for name in MODELS if name.partition("-")[0] in FAMILIES]


def same(held, expected) -> bool:
    return all(torch.equal(held[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(_weight_cache_daemon, "open_tensor", weight_cache_fake.Opener())
    with contextlib.ExitStack() as stack:
        yield lambda name="qwen3", **settings: stack.enter_context(
            World(tmp_path, tiny(name).bfloat16(), **settings)
        )


def ones(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


# Where the trainer's parameters lie in the engine's.


def test_a_layer_by_hand():
    made = config("qwen3", num_hidden_layers=1)  # 4 query heads, 2 of keys, of size 8
    held = {
        "model.embed_tokens.weight": torch.rand(PADDED, 16),
        "model.norm.weight": torch.rand(16),
        "lm_head.weight": torch.rand(PADDED, 16),
    }
    layer = {
        "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
        "self_attn.qkv_proj.weight": (64, 16), "self_attn.o_proj.weight": (16, 32),
        "self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,),
        "mlp.gate_up_proj.weight": (48, 16), "mlp.down_proj.weight": (16, 24),
    }  # fmt: skip
    held |= {f"model.layers.0.{name}": torch.rand(shape) for name, shape in layer.items()}
    views = engine_views(made, held)
    qkv = held["model.layers.0.self_attn.qkv_proj.weight"]
    gate_up = held["model.layers.0.mlp.gate_up_proj.weight"]
    expected = {
        "self_attn.q_proj": qkv[:32], "self_attn.k_proj": qkv[32:48],
        "self_attn.v_proj": qkv[48:], "mlp.gate_proj": gate_up[:24], "mlp.up_proj": gate_up[24:],
    }  # fmt: skip
    for name, rows in expected.items():
        view = views[f"model.layers.0.{name}.weight"]
        assert (view.data_ptr(), view.shape) == (rows.data_ptr(), rows.shape)
    assert views["lm_head.weight"].shape == (VOCAB, 16)
    model = transformers.Qwen3ForCausalLM(made)
    assert views.keys() == dict(model.named_parameters()).keys()


def test_stacked_experts_are_one_tensor_for_both():
    model = tiny("qwen3_moe")
    held = in_engine(model)
    views = engine_views(model.config, held)
    for ours, theirs in (("gate_up_proj", "w13_weight"), ("down_proj", "w2_weight")):
        view = views[f"model.layers.1.mlp.experts.{ours}"]
        assert view is held[f"model.layers.1.mlp.experts.{theirs}"]
    assert views.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_write_to_an_aliased_module_is_the_engines(make, name):
    world = make(name)
    trained = tiny(name).bfloat16()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    syncer = world.syncer()
    syncer.alias_(trained)
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(trained(tokens).logits, world.model(tokens).logits)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    ones(trained)
    with syncer.updating(version=1):
        optimizer.step()
    assert not same(world.held, in_engine(world.model))
    assert same(world.held, in_engine(trained))
    assert syncer.last_report.copied_bytes == 0 < syncer.last_report.num_bytes
    assert syncer.last_report.version == 1
    syncer.close()


def test_pushed_master_weights_are_cast_into_place(make):
    world = make()
    syncer = world.syncer()
    assert isinstance(syncer, WeightSyncer)
    trained = tiny("qwen3").bfloat16()
    syncer.alias_(trained)
    masters = {name: p.detach().float() + 1e-3 for name, p in trained.named_parameters()}
    report = syncer.push(masters.items(), version=1)
    assert all(torch.equal(p, masters[name].bfloat16()) for name, p in trained.named_parameters())
    assert same(world.held, in_engine(trained))
    assert report.num_tensors == len(masters)
    assert report.copied_bytes == report.num_bytes == sum(2 * t.numel() for t in masters.values())
    again = syncer.push(masters.items(), version=1)
    assert (again.num_bytes, again.copied_bytes) == (0, 0)
    syncer.close()


def test_detached_parameters_keep_their_values_and_leave_the_engine_alone(make):
    world = make()
    syncer = world.syncer()
    trained = tiny("qwen3").bfloat16()
    before = {name: p for name, p in trained.named_parameters()}
    syncer.alias_(trained)
    assert all(p is before[name] for name, p in trained.named_parameters())
    syncer.detach_()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    assert same(world.held, in_engine(world.model))
    syncer.close()


# What the server goes through.


def test_the_server_stands_still_while_weights_change(make):
    world = make()
    syncer = world.syncer()
    server = world.server
    server.calls.clear()
    with syncer.updating(version=7):
        assert int(server.weight_version) < 0 and server.held
    assert server.weight_version == "7" and not server.held
    assert [path for path in server.calls if not path.endswith("_info")] == [
        "/continue_generation", "/pause_generation", "/flush_cache", "/update_weight_version",
        "/update_weight_version", "/continue_generation",
    ]  # fmt: skip
    assert set(syncer.last_report.phases) == {"load", "commit", "pause"}
    syncer.close()


def test_a_caller_who_pauses_does_so_alone(make):
    world = make()
    syncer = world.syncer(pause=None)
    with syncer.updating(version=1):
        pass
    assert not [path for path in world.server.calls if path.endswith("_generation")]
    syncer.close()


def test_an_error_in_between_leaves_the_server_marked_until_the_next_whole_write(make):
    world = make()
    syncer = world.syncer()
    trained = tiny("qwen3").bfloat16()
    kept = {name: p.detach().clone() for name, p in trained.named_parameters()}
    syncer.alias_(trained)
    with pytest.raises(ZeroDivisionError) as caught, syncer.updating(version=1):
        trained.lm_head.weight.data.zero_()
        raise ZeroDivisionError
    assert "write all weights again" in caught.value.__notes__[0]
    assert int(world.server.weight_version) < 0 and world.server.held
    syncer.close()
    # A trainer that starts again doesn't let the server go on either.
    syncer = world.syncer()
    assert int(world.server.weight_version) < 0 and world.server.held
    syncer.push(kept.items(), version=1)
    assert world.server.weight_version == "1" and not world.server.held
    assert same(world.held, in_engine(world.model))
    syncer.close()


def test_a_server_that_cannot_be_emptied_serves_on(make):
    world = make()
    syncer = world.syncer()
    world.server.refuse_flush = True
    with pytest.raises(SyncError, match="flush_cache failed") as caught, syncer.updating(version=1):
        raise AssertionError("not reached")
    assert "serves what it did" in caught.value.__notes__[0]
    assert world.server.weight_version == "0" and not world.server.held
    syncer.close()


def test_a_server_that_did_not_go_on_is_written_again(make, monkeypatch):
    world = make()
    syncer = world.syncer()

    def lost():
        raise SyncError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(syncer, "_go_on", lost)
        with pytest.raises(SyncError, match="no answer"), syncer.updating(version=1):
            pass
    assert int(world.server.weight_version) < 0 and world.server.held
    with syncer.updating(version=1):
        pass
    assert world.server.weight_version == "1" and not world.server.held
    syncer.close()


def test_a_server_that_cannot_be_emptied_does_not_serve_half_written_weights(make):
    world = make()
    syncer = world.syncer()
    with pytest.raises(ZeroDivisionError), syncer.updating(version=1):
        raise ZeroDivisionError
    world.server.refuse_flush = True
    with pytest.raises(SyncError) as caught, syncer.updating(version=1):
        raise AssertionError("not reached")
    assert "still holds a part of an earlier one, and stands still" in caught.value.__notes__[0]
    assert int(world.server.weight_version) < 0 and world.server.held
    world.server.refuse_flush = False
    with syncer.updating(version=1):
        pass
    assert world.server.weight_version == "1" and not world.server.held
    syncer.close()


@pytest.mark.parametrize("version", [0, 3])
def test_versions_only_grow(make, version):
    world = make(weight_version="3")
    syncer = world.syncer()
    with pytest.raises(SyncError, match="expected a larger number"), syncer.updating(version):
        raise AssertionError("not reached")
    assert "/flush_cache" not in world.server.calls
    syncer.close()


def test_versions_are_integers(make):
    world = make()
    syncer = world.syncer()
    world.server.calls.clear()
    with pytest.raises(SettingError, match="expected an integer"), syncer.updating("1"):
        raise AssertionError("not reached")
    with pytest.raises(SettingError, match="expected an integer"):
        syncer.push([], version=1.5)
    assert not world.server.calls
    syncer.close()


def test_a_server_that_was_started_again_is_looked_at_again(make):
    world = make()
    syncer = world.syncer()
    with syncer.updating(version=1):
        pass
    world.server.weight_version = "0"
    world.server.parameters = {name: tensor.clone() for name, tensor in world.held.items()}
    with pytest.raises(SyncError, match="does not see"), syncer.updating(version=2):
        raise AssertionError("not reached")
    world.server.parameters = world.held
    with syncer.updating(version=2):
        pass
    assert world.server.weight_version == "2"
    syncer.close()


# What is refused.


def test_a_server_with_weights_of_its_own_is_found_out(make):
    world = make()
    world.server.parameters = {name: tensor.clone() for name, tensor in world.held.items()}
    with pytest.raises(SyncError, match="loaded weights of its own; start the daemon"):
        world.syncer()
    assert same(world.held, in_engine(world.model)) and not world.server.held
    world.syncer(prove=False).close()


@pytest.mark.parametrize(
    "info, text",
    [
        ({"weight_cache_mode": "off"}, "--weight-cache-mode client"),
        ({"model_path": "./fake"}, "letter for letter"),
        ({"moe_runner_backend": "flashinfer_trtllm"}, "expected 'triton'"),
    ],
)
def test_servers_that_cannot_share_are_refused(make, info, text):
    world = make()
    world.server.info |= info
    with pytest.raises(SyncError, match=text):
        world.syncer()
    assert "/pause_generation" not in world.server.calls


def test_the_other_syncer_leaves_a_server_of_a_weight_cache_alone(make):
    world = make()
    syncer = SGLangSyncer(world.server.url, via="value", timeout=20.0)
    with pytest.raises(SyncError, match="use SGLangWeightCacheSyncer"):
        syncer.push(world.model.state_dict().items(), version=1)
    assert world.server.calls == ["/server_info", "/model_info"] and not world.server.held
    syncer.close()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"tp_size": 2}, "a part of the model"),
        ({"pp_size": 2}, "a part of the model"),
        ({"quant_method": "fp8"}, "quantised by 'fp8'"),
    ],
)
def test_daemons_with_parts_or_codes_are_refused(make, changes, text):
    world = make()
    world.daemon(**changes)
    with pytest.raises(SyncError, match=text):
        world.syncer()


def test_a_server_that_is_not_there(make):
    world = make()
    world.daemon()
    settings = {"socket": world.path, "timeout": 5.0}
    with pytest.raises(SyncError, match="expected an SGLang server there"):
        SGLangWeightCacheSyncer("http://127.0.0.1:1", world.model.config, **settings)


def test_retract_needs_a_newer_server(make):
    with pytest.raises(SettingError, match=r"0\.5\.21"):
        make().syncer(pause="retract")


def test_modules_that_are_not_the_engines_are_refused_whole(make):
    world = make()
    syncer = world.syncer()
    wide = tiny("qwen3", intermediate_size=32).bfloat16()
    deep = tiny("qwen3", num_hidden_layers=4).bfloat16()
    for module, text in (
        (wide, r"gate_proj.weight is torch.bfloat16 \(32, 16\)"),
        (deep, r"the engine no \['model.layers.3"),
        (tiny("qwen3"), "cast the module first"),
        (nn.Linear(1, 1), "neither wrapped nor with adapters"),
        (ones(tiny("qwen3").bfloat16()), "zero_grad"),
    ):
        before = {name: p.data_ptr() for name, p in module.named_parameters()}
        with pytest.raises(SyncError, match=text):
            syncer.alias_(module)
        assert before == {name: p.data_ptr() for name, p in module.named_parameters()}
    syncer.close()


def test_a_parameter_that_left_is_noticed_before_the_server_stops(make):
    world = make()
    syncer = world.syncer()
    trained = tiny("qwen3").bfloat16()
    syncer.alias_(trained)
    trained.lm_head.weight.data = trained.lm_head.weight.data.clone()
    world.server.calls.clear()
    with pytest.raises(SyncError, match="is no longer in the engine's"), syncer.updating(version=1):
        raise AssertionError("not reached")
    assert "/pause_generation" not in world.server.calls
    syncer.close()


def test_pushes_that_are_not_the_engines_change_nothing(make):
    world = make()
    syncer = world.syncer()
    good = {name: torch.zeros_like(p) for name, p in world.model.named_parameters()}
    for wrong, text in (
        ({**good, "more": torch.zeros(1)}, "unknown tensors"),
        ({name: good[name] for name in list(good)[1:]}, "missing tensors"),
        ({**good, "lm_head.weight": torch.zeros(3, 3)}, "lm_head.weight has shape"),
        ({**good, "lm_head.weight": syncer.weights["lm_head.weight"]}, "the engine's own memory"),
    ):
        with pytest.raises(SyncError, match=text):
            syncer.push(wrong.items(), version=1)
    assert same(world.held, in_engine(world.model)) and world.server.weight_version == "0"
    syncer.close()


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "gpt_oss", "qwen2_moe"])
def test_families_that_sglang_holds_in_another_form_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="use SGLangSyncer"):
        engine_views(config(name), {})


def test_engines_of_another_config_are_refused():
    model = tiny("qwen3")
    held = in_engine(model)
    with pytest.raises(SyncError, match=r"holds no \[\], and \['model.layers.2"):
        engine_views(config("qwen3", num_hidden_layers=2), held)
    with pytest.raises(SyncError, match=r"holds no \['model.layers.3"):
        engine_views(config("qwen3", num_hidden_layers=4), held)
    with pytest.raises(UnsupportedModelError, match="holds them apart"):
        engine_views(config("qwen3", tie_word_embeddings=True), held)
