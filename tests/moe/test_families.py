import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from miles.errors import RoutingError, UnsupportedModelError
from miles.moe import ROUTER_FAMILIES, RouterFamily, RoutingReplay, RoutingTape
from miles.moe.discovery import discover, self_test
from miles.moe.families import REFUSED, find_routers
from tests.moe.families import FAMILIES, VOCAB, E, output, tiny

family = pytest.mark.parametrize("name", FAMILIES)
model_of = cache(tiny)  # no test changes a parameter
WITHOUT_EXPERTS_CALL = {"jetmoe", "llama4"}  # no experts(hidden, ids, weights) to look into
INPUT_IDS = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def empty_registry():
    known = list(ROUTER_FAMILIES)
    ROUTER_FAMILIES.clear()
    yield
    ROUTER_FAMILIES[:] = known


def routers(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name) for name in RoutingReplay(model).layers]


def random_plan(replay: RoutingReplay, seed: int = 1) -> RoutingTape:
    shape = (INPUT_IDS.numel(), len(replay.layers), replay.num_experts)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    ids = scores.argsort(-1)[..., : replay.topk]
    return RoutingTape(ids, num_experts=replay.num_experts)


def with_holes(tape: RoutingTape, rows: list[int]) -> RoutingTape:
    ids = tape.expert_ids
    ids[rows] = -1
    return RoutingTape(ids, num_experts=tape.num_experts)


def gates_seen(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights, both `[N, M, K]`, that reach the experts in one pass."""
    seen = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                hook = module.register_forward_hook(lambda _, args, out: seen.append(args))
                stack.callback(hook.remove)
        assert output(model, INPUT_IDS).isfinite().all()
    return tuple(torch.stack([args[i].detach() for args in seen], 1) for i in (1, 2))


def output_and_gradients(model: nn.Module):
    model.zero_grad()
    out = output(model, INPUT_IDS)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_every_registered_family_is_tested():
    tested = {type(routers(model_of(name))[0]).__name__ for name in FAMILIES}
    assert tested == {entry.router for entry in ROUTER_FAMILIES}


@family
def test_recording_changes_nothing_and_notes_what_reaches_the_experts(name):
    model = model_of(name)
    plain = output(model, INPUT_IDS)
    with RoutingReplay(model).record() as tape:
        recorded = output(model, INPUT_IDS)
    assert torch.equal(plain, recorded)
    assert len(tape) == INPUT_IDS.numel()
    assert bool(tape.recorded_N.all())
    if name not in WITHOUT_EXPERTS_CALL | {"zaya"}:  # zaya shows skipped tokens as expert 0
        assert torch.equal(tape.expert_ids.long(), gates_seen(model)[0].long())


@family
def test_replay_of_ones_own_routing_is_bitwise_the_same_in_output_and_gradients(name):
    model = model_of(name)
    replay = RoutingReplay(model)
    with replay.record() as tape:
        plain, gradients = output_and_gradients(model)
    with replay.replay(tape):
        again, gradients_again = output_and_gradients(model)
    assert torch.equal(plain, again)
    assert gradients.keys() == gradients_again.keys()
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[parameter]), parameter


@family
def test_a_random_plan_reaches_the_experts_and_the_routers_get_gradient(name):
    model = model_of(name)
    replay = RoutingReplay(model)
    plan = random_plan(replay)
    plain = output(model, INPUT_IDS)
    with replay.record() as tape, replay.replay(plan):
        forced, gradients = output_and_gradients(model)
    assert tape == plan
    assert not torch.allclose(plain, forced, rtol=1e-3, atol=1e-4)
    for layer in replay.layers:
        own = [n for n in gradients if n.startswith(layer + ".")]
        own = [n for n in own if ".experts." not in n.removeprefix(layer)]  # Dbrx's block owns both
        assert any(bool(gradients[n].abs().max() > 0) for n in own), layer
    if name not in WITHOUT_EXPERTS_CALL:
        with replay.replay(plan):
            ids, weights = gates_seen(model)
        live = plan.expert_ids.long() < (E if name == "zaya" else replay.num_experts)
        assert torch.equal(ids[live].long(), plan.expert_ids[live].long())
        # None is lost to the mask of a losing group; zaya's last class skips the experts.
        assert bool((weights[live] > 0).all())
        assert bool((weights[~live] == 0).all())


@family
def test_dropped_rows_go_to_the_experts_with_weight_zero(name):
    model = model_of(name)
    replay = RoutingReplay(model)
    plan = random_plan(replay)
    holed = replay.replay(with_holes(plan, [2, 7]), invalid="drop")
    if name in WITHOUT_EXPERTS_CALL:
        with pytest.raises(UnsupportedModelError, match='invalid="drop"'), holed:
            output(model, INPUT_IDS)
        assert not any("forward" in vars(module) for module in model.modules())
        return
    with holed:
        ids, weights = gates_seen(model)
    dropped = torch.zeros(len(plan), dtype=torch.bool)
    dropped[[2, 7]] = True
    assert bool((weights[dropped] == 0).all())
    live = plan.expert_ids.long() < (E if name == "zaya" else replay.num_experts)
    live[dropped] = False
    assert torch.equal(ids[live].long(), plan.expert_ids[live].long())
    assert bool((weights[live] > 0).all())
    assert not any(module._forward_pre_hooks for module in model.modules())


@family
def test_an_unregistered_family_is_discovered(name, empty_registry):
    model = model_of(name)
    with pytest.raises(UnsupportedModelError, match="pass discover=True"):
        RoutingReplay(model)
    replay = RoutingReplay(model, discover=True)
    ROUTER_FAMILIES.extend(discover(model))
    assert len(ROUTER_FAMILIES) == 1
    assert RoutingReplay(model).layers == replay.layers
    assert not discover(model)


@family
def test_discovery_agrees_with_the_registry(name):
    model = model_of(name)
    known = RoutingReplay(model)
    entry = {f.router: f for f in ROUTER_FAMILIES}[type(routers(model)[0]).__name__]
    ROUTER_FAMILIES.remove(entry)
    try:
        (found,) = discover(model)
    finally:
        ROUTER_FAMILIES.append(entry)
    module = routers(model)[0]
    assert (found.router, found.score_ndim) == (entry.router, entry.score_ndim)
    assert found.sizes(module) == entry.sizes(module) == (known.num_experts, known.topk)


def test_holes_obey_the_group_limit_when_the_router_chooses():
    model = tiny("deepseek_v2", num_hidden_layers=1, mlp_layer_types=["sparse"])
    replay = RoutingReplay(model)
    with replay.record() as own:
        output(model, INPUT_IDS)
    plan = random_plan(replay)
    with replay.replay(with_holes(plan, [3]), invalid="natural"):
        ids, _ = gates_seen(model)
    expected = plan.expert_ids.long()
    expected[3] = own.expert_ids[3].long()
    assert torch.equal(ids.long(), expected)


def test_as_many_groups_as_experts_is_refused_as_ambiguous():
    # Groups of one expert: the group's topk has the size and the k of the experts' own.
    model = tiny("deepseek_v2", n_group=E, topk_group=2)
    with (
        pytest.raises(RoutingError, match=r"topk\(k=2\) over 8 scores twice"),
        RoutingReplay(model).record(),
    ):
        output(model, INPUT_IDS)


@pytest.mark.parametrize("router", REFUSED)
def test_refused_routers_are_named_with_the_reason(router):
    model = nn.Sequential(nn.Linear(2, 2), type(router, (nn.Module,), {})())
    with pytest.raises(UnsupportedModelError, match=f"1 is a {router}, .*: ..."):
        RoutingReplay(model)
    with pytest.raises(UnsupportedModelError) as refusal:
        find_routers(model, [])
    assert REFUSED[router] in str(refusal.value)


def test_every_router_of_transformers_is_registered_or_refused():
    known = {entry.router for entry in ROUTER_FAMILIES} | REFUSED.keys()
    known.add("Qwen3OmniMoeTextTopKRouter")  # defined and never built
    models = Path(transformers.__file__).parent / "models"
    routers, defined = set(), set()
    for path in models.glob("*/modeling_*.py"):
        for body in re.split(r"^(?=class )", path.read_text(), flags=re.M)[1:]:
            name = re.match(r"class (\w+)", body)[1]
            defined.add(name)
            chooses = re.search(r"topk\(\s*[^)]*\btop_k", body) and "experts" in body
            if chooses and not re.search(r"^class \w+(Indexer|Model|ForC\w+)\b", body):
                routers.add(name)
    assert routers - known == set()
    assert len(routers) > 60
    assert known <= defined


def test_no_router_is_both_registered_and_refused():
    assert not {entry.router for entry in ROUTER_FAMILIES} & REFUSED.keys()


def test_a_size_that_is_not_there_is_named():
    entry = RouterFamily(router="Linear", num_experts="config.num_experts", topk="in_features")
    with pytest.raises(UnsupportedModelError, match=r"Linear\.config\.num_experts is None; exp"):
        entry.sizes(nn.Linear(2, 2))


class Decoy(nn.Module):
    """Runs a topk like a router's, whose result goes nowhere, or which is noisy."""

    def __init__(self, noisy: bool):
        super().__init__()
        self.num_experts, self.top_k, self.noisy = 4, 2, noisy
        self.embed, self.proj = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        scores = self.proj(self.embed(input_ids.flatten()))
        values, _ = torch.topk(scores, self.top_k, -1)
        if self.noisy:
            return scores + torch.rand(()) + values.sum()
        return scores


@pytest.mark.parametrize(("noisy", "what"), [(False, "left the output"), (True, "two passes")])
def test_the_self_test_refuses_what_does_not_replay(noisy, what):
    model = Decoy(noisy).train()
    with pytest.raises(UnsupportedModelError, match=f"Decoy failed the self-test: .*{what}"):
        RoutingReplay(model, discover=True)
    assert model.training
    assert not model._forward_hooks
    assert "forward" not in vars(model)


def test_the_self_test_passes_a_registered_family():
    model = model_of("qwen3_moe")
    self_test(RoutingReplay(model), model, {"input_ids": INPUT_IDS})
