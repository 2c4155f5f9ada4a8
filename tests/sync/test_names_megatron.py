"""Names of megatron-core, told by its own modules."""

import re

import pytest
import torch

from miles.sync import MegatronNames, name_map
from tests.moe import megatron
from tests.sync.named import MODELS, E, gpt, saved, tiny


def extra_state(model):
    return {k: v for k, v in model.state_dict().items() if k.endswith("_extra_state")}


LAYERS_4 = {"layer_types": ["full_attention"] * 4}


@pytest.mark.parametrize("name", MODELS)
def test_a_gpt_model_of_megatron_core_computes_what_transformers_does(name):
    if name == "deepseek_v3-biased":
        pytest.skip("latent attention of megatron-core 0.16.1 has no biases")
    model = tiny(name)
    names = name_map(model.config)
    with megatron.processes():
        other = gpt(model.config)
        loaded = dict(names.forward(saved(model).items()))
        other.load_state_dict(loaded | extra_state(other), strict=True)
        ids = megatron.tokens()
        with torch.no_grad():
            theirs = megatron.run(other, ids)
        back = dict(names.backward(other.state_dict().items()))
    for key, tensor in saved(model).items():
        assert torch.equal(back.pop(key), tensor), key
    assert not back
    with torch.no_grad():
        ours = model(ids).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3_moe", "glm4_moe", "gpt_oss"])
def test_stages_are_those_of_megatron_core(name):
    model = tiny(name, num_hidden_layers=4, **({} if name != "gpt_oss" else LAYERS_4))
    for rank, stage in enumerate((range(0, 2), range(2, 4))):
        names = name_map(model.config, layers=stage)
        with megatron.pretended_rank(rank, 2, pipeline_model_parallel_size=2):
            part = gpt(
                model.config,
                pre_process=rank == 0,
                post_process=rank == 1,
                pipeline_model_parallel_size=2,
            )
            loaded = dict(names.forward(saved(model).items()))
            part.load_state_dict(loaded | extra_state(part), strict=True)


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe", "gpt_oss"])
def test_experts_of_a_rank_are_those_of_megatron_core(name):
    model = tiny(name)
    whole = dict(name_map(model.config).forward(saved(model).items()))
    for rank, chosen in enumerate((range(0, 2), range(2, 4))):
        names = name_map(model.config, experts=chosen)
        with megatron.pretended_rank(rank, 2, expert_model_parallel_size=2):
            part = gpt(model.config, expert_model_parallel_size=2)
            loaded = dict(names.forward(saved(model).items()))
            part.load_state_dict(loaded | extra_state(part), strict=True)
        for key, tensor in loaded.items():
            there = re.sub(
                r"local_experts\.(\d+)",
                lambda match, start=chosen.start: f"local_experts.{int(match[1]) + start}",
                key,
            )
            assert torch.equal(tensor, whole[there])


def test_grouped_mlp_reads_its_matrix_as_stacked_experts():
    model = tiny("qwen3_moe")
    disk = dict(saved(model))
    names = name_map(model.config, megatron=MegatronNames(experts="grouped"))
    there = dict(names.forward(disk.items()))
    # As `GroupedMLP.forward` of megatron-core 0.16.1 views them.
    weight1 = there["decoder.layers.1.mlp.experts.weight1"].view(E, 16, -1)
    weight2 = there["decoder.layers.1.mlp.experts.weight2"].view(E, -1, 16)
    for e in range(E):
        expert = f"model.layers.1.mlp.experts.{e}."
        gate, up = weight1[e].chunk(2, -1)
        assert torch.equal(gate.t(), disk[expert + "gate_proj.weight"])
        assert torch.equal(up.t(), disk[expert + "up_proj.weight"])
        assert torch.equal(weight2[e].t(), disk[expert + "down_proj.weight"])
