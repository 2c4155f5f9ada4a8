"""Drafts on disk: the bits come back, SGLang takes every tensor, and damaged files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from miles.errors import (
    CheckpointError,
    MilesError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnsupportedModelError,
)
from miles.rollout.speculative import (
    Eagle3Draft,
    EagleDraft,
    MTPDraft,
    StandaloneDraft,
    export_draft,
    load_draft,
)
from miles.rollout.speculative._sglang_names import check_sglang, sglang_destinations
from tests.models import VOCAB, tiny
from tests.rollout.speculative.targets import DRAFTS, HIDDEN, TARGETS, draft_of, target, tokens

EAGLE3_NAMES = {
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.post_attention_layernorm.weight",
    *(f"midlayer.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"midlayer.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
}
EAGLE_NAMES = {
    "fc.weight",
    "fc.bias",
    "layers.0.post_attention_layernorm.weight",
    *(f"layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def rewrite(folder: Path, *, config: dict[str, Any] | None = None, **changes: Any) -> None:
    """Tensors replaced (None: left out), entries of the configuration too."""
    old_config, tensors = read(folder)
    (folder / "config.json").write_text(json.dumps(old_config | (config or {})))
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_exported_comes_back_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    model = target(name)
    draft = draft_of(kind, model)
    again = load_draft(export_draft(draft, tmp_path / "draft"), model)
    assert type(again) is type(draft) and again.dtype == draft.dtype
    assert again.feature_layers == draft.feature_layers and again.depths == draft.depths
    state, wanted = again.state_dict(), draft.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    features = None
    if draft.num_features:
        features = torch.randn(1, 30, draft.num_features, dtype=torch.float64)
    first, second = (
        part.unroll(tokens(1, 30), features, num_steps=2)[1] for part in (draft, again)
    )
    assert torch.equal(first, second)  # positions too


def test_literal_names_and_configuration_of_eagle3(tmp_path: Path) -> None:
    model = target("qwen3", num_layers=8)
    ids = torch.tensor([1, 2, 7, 39])
    draft = Eagle3Draft.from_target(model, target_ids=ids)
    config, tensors = read(export_draft(draft, tmp_path))
    assert tensors.keys() == EAGLE3_NAMES | {"d2t", "t2d"}
    assert tensors["d2t"].dtype == torch.int64 and tensors["d2t"].tolist() == [1, 1, 5, 36]
    assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].nonzero()[:, 0].equal(ids)
    assert tensors["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (2 * 12, 2 * HIDDEN)
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "draft_vocab_size": 4,
        "head_dim": 12,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        },
        "torch_dtype": "float64",
    }
    assert {key: config[key] for key in expected} == expected
    full, tensors = read(export_draft(Eagle3Draft.from_target(model), tmp_path / "full"))
    assert tensors.keys() == EAGLE3_NAMES and full["draft_vocab_size"] == VOCAB
    borrowed = Eagle3Draft.from_target(model, own_head=False)
    config, tensors = read(export_draft(borrowed, tmp_path / "borrowed"))
    assert tensors.keys() == EAGLE3_NAMES - {"lm_head.weight"}
    assert config["draft_vocab_size"] is None  # the server then takes the target's head


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "deepseek_v3"])
def test_literal_names_and_configuration_of_eagle(name: str, bias: bool, tmp_path: Path) -> None:
    model = target(name)
    draft = EagleDraft.from_target(model, bias=bias)
    config, tensors = read(export_draft(draft, tmp_path))
    qwen = name == "qwen2"
    biases = {f"layers.0.self_attn.{part}_proj.bias" for part in "qkv"} if qwen else set()
    assert tensors.keys() == EAGLE_NAMES | biases
    architecture = "Qwen2ForCausalLMEagle" if qwen else "LlamaForCausalLMEagle"
    assert config["architectures"] == [architecture]
    # Tied, the server would have one parameter where it deletes two.
    assert config["tie_word_embeddings"] is False
    if not bias:  # the server's fc has one in any case, and would keep what memory held
        assert not tensors["fc.bias"].any()
        assert load_draft(tmp_path, model).checkpoint_tensors().keys() == tensors.keys() - {
            "fc.bias"
        }


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "llama_llama3", "qwen2"])
def test_transformers_reads_the_same_positions(name: str, tmp_path: Path) -> None:
    draft = EagleDraft.from_target(target(name))
    export_draft(draft, tmp_path)
    read_back = AutoConfig.from_pretrained(tmp_path)
    assert read_back.rope_parameters == draft.config.rope_parameters
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 10000.0  # what transformers 4 reads
    assert (config.get("rope_scaling") is None) == (name in ("llama", "qwen2"))


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle3_reduced", "mtp"])
def test_sglang_has_a_place_for_every_tensor_and_lacks_none(kind: str, tmp_path: Path) -> None:
    draft = draft_of(kind, target("deepseek_v3"))
    config, tensors = read(export_draft(draft, tmp_path))
    places = sglang_destinations(config, tensors)
    assert None not in places.values() and len(set(places.values())) == len(places)
    for name in tensors:
        without = shapes(tensors)
        shape = without.pop(name)
        if name != "t2d":
            with pytest.raises(CheckpointError, match="as they were made: not exported"):
                check_sglang(config, without)
            with pytest.raises(CheckpointError, match=f"{name} has shape"):
                check_sglang(config, without | {name: (*shape, 1)})
        # A typo is not a warning there.
        with pytest.raises(CheckpointError, match=r"would skip .*typo|would both become"):
            check_sglang(config, shapes(tensors) | {name + "_typo": shape})


def test_literal_places_in_sglang() -> None:
    model = target("llama")
    shared = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 6}
    shared |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    third = shared | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 8,
        "vocab_size": 8,
    }
    third["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 1]}
    assert sglang_destinations(
        third, ["midlayer.self_attn.k_proj.weight", "lm_head.weight", "t2d", "embed.weight"]
    ) == {
        "midlayer.self_attn.k_proj.weight": ("model.layers.0.self_attn.qkv_proj.weight", "k"),
        "lm_head.weight": ("lm_head.weight", ""),
        "t2d": ("t2d", "unused"),
        "embed.weight": None,
    }
    first = shared | {"architectures": ["LlamaForCausalLMEagle"]}
    assert sglang_destinations(first, ["lm_head.weight", "midlayer.mlp.up_proj.weight"]) == {
        "lm_head.weight": None,
        "midlayer.mlp.up_proj.weight": None,
    }
    with pytest.raises(CheckpointError, match="SGLang serves as drafts"):
        sglang_destinations({"architectures": ["LlamaForCausalLM"]}, [])
    assert "midlayer.mlp.up_proj.weight" in Eagle3Draft.from_target(model).checkpoint_tensors()


def test_features_that_sglang_cannot_capture_are_refused(tmp_path: Path) -> None:
    model = target("llama")
    with pytest.raises(UnsupportedModelError, match="is out of its reach: read 0 to 2"):
        export_draft(Eagle3Draft.from_target(model, feature_layers=(1, 3)), tmp_path)
    with pytest.raises(UnsupportedModelError, match="read two layers or more"):
        export_draft(Eagle3Draft.from_target(model, feature_layers=(1,)), tmp_path)


def test_weights_may_be_cast_and_tables_stay(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=4)
    draft = Eagle3Draft.from_target(model, target_ids=torch.tensor([5, 9]))
    config, tensors = read(export_draft(draft, tmp_path, dtype=torch.bfloat16))
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds.pop("d2t") == torch.int64 and kinds.pop("t2d") == torch.bool
    assert set(kinds.values()) == {torch.bfloat16}
    again = load_draft(tmp_path, model)
    assert again.dtype == torch.bfloat16 and draft.dtype == torch.float32
    assert torch.equal(again.norm.weight, draft.norm.weight.bfloat16())


def test_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    model = target("llama")
    export_draft(draft_of("eagle", model), tmp_path)
    draft = draft_of("eagle3", model)
    export_draft(draft, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert isinstance(load_draft(tmp_path, model), Eagle3Draft)


def test_published_checkpoints_with_other_names_load(tmp_path: Path) -> None:
    """Prefixes, an embedding inside, a pickle that torch reads safely, no `eagle_config`."""
    model = target("llama", num_layers=8)
    draft = draft_of("eagle3_reduced", model)
    config, tensors = read(export_draft(draft, tmp_path))
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    renamed["embed_tokens.weight"] = torch.zeros(VOCAB, HIDDEN)
    del config["eagle_config"], config["target_num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    again = load_draft(tmp_path, model)
    assert torch.equal(again.lm_head.weight, draft.lm_head.weight)
    assert again.feature_layers == (1, 3, 4)
    first = draft_of("eagle", model)
    config, tensors = read(export_draft(first, tmp_path / "first"))
    (tmp_path / "first" / "model.safetensors").unlink()
    del config["fc_bias"]
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    torch.save(
        {f"model.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "first" / "pytorch_model.bin",
    )
    assert torch.equal(load_draft(tmp_path / "first", model).fc.bias, first.fc.bias)


class TestMTP:
    def carried(self, folder: Path, **changes: Any) -> tuple[Any, MTPDraft]:
        """A target's checkpoint with its module, in two files, as published ones are laid out."""
        model = target("deepseek_v3")
        draft = MTPDraft.from_target(model)
        tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        extra = {name: t.detach().clone() for name, t in draft.checkpoint_tensors().items()}
        extra |= {
            "model.layers.4.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN),
            "model.layers.4.shared_head.head.weight": torch.zeros(VOCAB, HIDDEN),
        }
        extra |= changes
        save_file(tensors, folder / "a.safetensors")
        save_file(extra, folder / "b.safetensors")
        where = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(extra, "b.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
        (folder / "config.json").write_text(
            json.dumps(model.config.to_dict() | {"num_nextn_predict_layers": 1})
        )
        return model, draft

    def test_the_layer_that_a_checkpoint_carries(self, tmp_path: Path) -> None:
        model, draft = self.carried(tmp_path)
        again = MTPDraft.from_checkpoint(tmp_path, model)
        wanted = draft.state_dict()
        assert all(torch.equal(t, wanted[name]) for name, t in again.state_dict().items())
        assert isinstance(load_draft(tmp_path, model), MTPDraft)
        names = draft.checkpoint_tensors().keys()
        assert {
            "model.layers.4.enorm.weight",
            "model.layers.4.hnorm.weight",
            "model.layers.4.eh_proj.weight",
            "model.layers.4.shared_head.norm.weight",
            "model.layers.4.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.4.mlp.gate.e_score_correction_bias",
            "model.layers.4.mlp.experts.3.up_proj.weight",
            "model.layers.4.mlp.shared_experts.down_proj.weight",
        } <= names

    def test_experts_are_split_as_the_fused_ones_compute(self) -> None:
        draft = MTPDraft.from_target(target("qwen3_moe"))
        experts: Any = draft.stages[0].layer.mlp.experts
        tensors = draft.checkpoint_tensors()
        gate = tensors["model.layers.4.mlp.experts.2.gate_proj.weight"]
        assert torch.equal(gate, experts.gate_up_proj[2, :12])
        down = tensors["model.layers.4.mlp.experts.1.down_proj.weight"]
        assert torch.equal(down, experts.down_proj[1]) and down.shape == (HIDDEN, 12)
        gate.zero_()  # live, so that a sync may write to it
        assert not experts.gate_up_proj[2, :12].any()

    def test_without_one(self, tmp_path: Path) -> None:
        model = target("deepseek_v3")
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.4\.\*"):
            MTPDraft.from_checkpoint(tmp_path, model)

    def test_quantised_or_damaged(self, tmp_path: Path) -> None:
        name = "model.layers.4.eh_proj.weight"
        for tensor, changes, error, text in (
            (None, {f"{name}_scale_inv": torch.ones(1)}, CheckpointError, "dequantise"),
            (torch.zeros(2, 2), {}, CheckpointError, r"shape \(2, 2\); this draft's is \(16, 32\)"),
            (torch.full((16, 32), torch.nan), {}, NonFiniteError, f"{name} holds NaN"),
        ):
            given = changes if tensor is None else {name: tensor}
            model, _ = self.carried(tmp_path, **given)
            with pytest.raises(error, match=text):
                MTPDraft.from_checkpoint(tmp_path, model)


class TestBadInput:
    @pytest.fixture
    def exported(self, tmp_path: Path) -> tuple[Any, Path]:
        model = target("llama")
        return model, export_draft(draft_of("eagle3_reduced", model), tmp_path)

    def test_another_vocabulary_or_hidden_size(self, exported: tuple[Any, Path]) -> None:
        _, folder = exported
        with pytest.raises(ShapeError, match=r"weight of shape \(42, 16\)"):
            load_draft(folder, target("llama", vocab_size=42))
        with pytest.raises(ShapeError, match=r"weight of shape \(40, 32\)"):
            load_draft(folder, target("llama", hidden_size=32))
        with pytest.raises(SettingError, match=r"not among the target's 2 layers"):
            load_draft(folder, target("llama", num_layers=2))

    def test_a_map_outside_the_vocabulary(self, exported: tuple[Any, Path]) -> None:
        model, folder = exported
        d2t = read(folder)[1]["d2t"].clone()
        d2t[-1] = VOCAB
        rewrite(folder, d2t=d2t)
        with pytest.raises(SettingError, match="those of the target, 0 to 39"):
            load_draft(folder, model)

    def test_a_map_that_repeats(self, exported: tuple[Any, Path]) -> None:
        model, folder = exported
        d2t = read(folder)[1]["d2t"].clone()
        d2t[1] = d2t[0] - 1
        rewrite(folder, d2t=d2t)
        with pytest.raises(SettingError, match="more than one of its tokens to 0"):
            load_draft(folder, model)

    def test_maps_that_contradict_each_other(self, exported: tuple[Any, Path]) -> None:
        model, folder = exported
        t2d = read(folder)[1]["t2d"]
        rewrite(folder, t2d=~t2d)
        with pytest.raises(CheckpointError, match="expected both to be one draft's"):
            load_draft(folder, model)
        rewrite(folder, t2d=t2d.long())
        with pytest.raises(CheckpointError, match=r"t2d \(torch.int64"):
            load_draft(folder, model)

    def test_sizes_that_contradict_each_other(self, exported: tuple[Any, Path]) -> None:
        model, folder = exported
        rewrite(folder, config={"draft_vocab_size": 13})
        with pytest.raises(CheckpointError, match="is 13, but d2t has 12 entries"):
            load_draft(folder, model)
        rewrite(folder, d2t=None, t2d=None)
        with pytest.raises(CheckpointError, match="is 13, but there is no d2t"):
            load_draft(folder, model)

    def test_missing_and_unknown_tensors(self, exported: tuple[Any, Path]) -> None:
        model, folder = exported
        norm = read(folder)[1]["norm.weight"]
        rewrite(folder, **{"norm.weight": None})
        with pytest.raises(CheckpointError, match=r"missing \['norm.weight'\]"):
            load_draft(folder, model)
        save_file(
            read(folder)[1] | {"norm.weight": norm, "nrm": norm + 1}, folder / "model.safetensors"
        )
        with pytest.raises(CheckpointError, match=r"unknown \['nrm'\]"):
            load_draft(folder, model)
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="has none of"):
            load_draft(folder, model)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            load_draft(folder, model)

    def test_not_a_number(self, exported: tuple[Any, Path], tmp_path: Path) -> None:
        model, folder = exported
        draft = load_draft(folder, model)
        before = read(folder)[1]["norm.weight"]
        with torch.no_grad():
            draft.midlayer.mlp.up_proj.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"midlayer.mlp.up_proj.weight holds NaN"):
            export_draft(draft, folder)
        with torch.no_grad():
            draft.midlayer.mlp.up_proj.weight[0, 0] = 1e6
        with pytest.raises(NonFiniteError, match=r"up_proj.weight holds .*\(torch.float16\)"):
            export_draft(draft, folder, dtype=torch.float16)
        assert torch.equal(read(folder)[1]["norm.weight"], before)  # the old one stays
        small = StandaloneDraft.from_target(model, tiny("llama", num_hidden_layers=1))
        with torch.no_grad():
            small.model.lm_head.weight[0, 0] = 1e6
        with pytest.raises(NonFiniteError, match=r"lm_head.weight holds .*\(torch.float16\)"):
            export_draft(small, tmp_path / "small", dtype=torch.float16)
        rewrite(folder, **{"norm.weight": torch.full_like(before, torch.inf)})
        with pytest.raises(NonFiniteError, match=r"norm.weight holds NaN or infinity"):
            load_draft(folder, model)

    @pytest.mark.parametrize(
        "config",
        [
            {"norm_output": True},
            {"eagle_config": {"norm_before_fc": True}},
            {"num_hidden_layers": 2},
            {"target_hidden_size": 32},
        ],
    )
    def test_variants(self, exported: tuple[Any, Path], config: dict[str, Any]) -> None:
        model, folder = exported
        rewrite(folder, config=config)
        with pytest.raises(UnsupportedModelError, match="implemented here"):
            load_draft(folder, model)

    def test_errors_are_of_this_library(self, tmp_path: Path) -> None:
        with pytest.raises(MilesError):
            load_draft(tmp_path, target("llama"))

    def test_a_standalone_draft_of_another_vocabulary(self, tmp_path: Path) -> None:
        small = target("llama", num_layers=1, vocab_size=42)
        export_draft(StandaloneDraft(small, vocab_size=42), tmp_path)
        with pytest.raises(ShapeError, match="vocabulary of 42, the target one of 40"):
            load_draft(tmp_path, target("llama"))
