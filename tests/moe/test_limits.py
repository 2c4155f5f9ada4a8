"""What docs/moe.md says that replay does not do."""

import importlib
from pathlib import Path

import pytest
import torch

from miles.errors import UnsupportedModelError
from miles.moe import REFUSED, ROUTER_FAMILIES, RoutingReplay
from tests.models import tiny, token_batch
from tests.moe import families
from tests.moe.plans import random_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("router_table")


def test_the_load_balancing_loss_counts_the_routers_own_choice():
    model, input_ids = tiny("qwen3_moe", num_hidden_layers=1), token_batch()
    replay = RoutingReplay(model)
    plan = random_plan(replay, input_ids.numel())
    natural = model(input_ids, output_router_logits=True)
    with replay.replay(plan):
        replayed = model(input_ids, output_router_logits=True)
    assert not torch.allclose(natural.logits, replayed.logits, rtol=1e-3)
    assert torch.equal(natural.aux_loss, replayed.aux_loss)


@pytest.mark.parametrize("name", ["jetmoe", "llama4"])
def test_families_that_can_not_drop_say_so(name, table):
    model = families.tiny(name)
    replay = RoutingReplay(model)
    input_ids = token_batch(1, 3)
    with (
        pytest.raises(UnsupportedModelError, match=r'could zero the weights.*"natural"'),
        replay.replay(replay.unrecorded(3), invalid="drop"),
    ):
        model(input_ids=input_ids, use_cache=False)
    router = model.get_submodule(replay.layers[0])
    assert type(router).__name__ in table.WITHOUT_DROP


def test_the_table_names_every_router_and_its_model(table):
    assert len(table.WITHOUT_DROP) == 2  # the two above; test_families.py tries all the others
    text = table.router_families()
    assert text.count("\n") == len(ROUTER_FAMILIES) + 1
    assert "| qwen3_moe | `Qwen3MoeTopKRouter` | `num_experts` | `top_k` |  | yes |" in text
    assert "| llama4 | `Llama4Router` | `num_experts` | `top_k` |  | no |" in text
    assert (
        "| gemma4 | `Gemma4TextRouter` | `config.num_experts` | `config.top_k_experts` |  | yes |"
        in text
    )
    assert "| deepseek_v3 | `DeepseekV3TopkRouter` | `num_experts` | `top_k` | yes | yes |" in text
    refused = table.refused_routers()
    assert refused.count("\n") == len(REFUSED) + 1
    assert f"| phimoe | `PhimoeTopKRouter` | {REFUSED['PhimoeTopKRouter']} |" in refused
