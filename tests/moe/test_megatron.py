import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from miles.errors import MissingExtraError, RoutingError, SettingError, UnsupportedModelError
from miles.moe import RoutingTape, for_pipeline, routing_agreement
from miles.moe.megatron import MegatronReplay, batch_first, is_megatron, sequence_first
from tests.moe.megatron import (
    BATCH,
    FULL,
    LENGTH,
    RECOMPUTE,
    assert_equal,
    config,
    forward_and_gradients,
    gpt,
    loss,
    plan_for,
    processes,
    run,
    tokens,
    with_holes,
)

pytest.importorskip("megatron.core")

ROWS = BATCH * LENGTH
SCORING = {
    "softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid-bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
}
scoring = pytest.mark.parametrize("settings", SCORING.values(), ids=SCORING)


@pytest.fixture(autouse=True, scope="module")
def _processes():
    with processes():
        yield


def raises(error, text: str):
    return pytest.raises(error, match=text)


def routers(model):
    return [layer.mlp.router for layer in model.decoder.layers]


def biased(model):
    """Expert biases, where there are any, that change what is chosen."""
    for index, router in enumerate(routers(model)):
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.5, 0.5, 8).roll(3 * index))
    return model


def test_sizes_and_places_are_read_off_the_model():
    replay = MegatronReplay(gpt(config(num_layers=3)))
    assert replay.layers == [f"decoder.layers.{i}.mlp.router" for i in range(3)]
    assert (replay.moe_layers, replay.num_experts, replay.topk) == ((0, 1, 2), 8, 2)
    assert replay.unrecorded(4).expert_ids.shape == (4, 3, 2)


@pytest.mark.parametrize("settings", [*SCORING.values(), *RECOMPUTE.values()])
def test_replay_of_ones_own_routing_is_bitwise_the_same_in_logits_and_gradients(settings):
    model, ids = biased(gpt(config(**settings))), tokens()
    plain, plain_gradients = forward_and_gradients(model, ids)
    replay = MegatronReplay(model)
    with replay.record() as tape:
        recorded, recorded_gradients = forward_and_gradients(model, ids)
    with replay.replay(tape):
        replayed, replayed_gradients = forward_and_gradients(model, ids)
    assert (len(tape), tape.num_layers) == (ROWS, 2)  # a layer that runs again is noted once
    assert torch.equal(plain, recorded) and torch.equal(plain, replayed)
    assert_equal(recorded_gradients, plain_gradients)
    assert_equal(replayed_gradients, plain_gradients)


@scoring
def test_a_random_plan_reaches_the_dispatcher_and_changes_the_output(settings):
    model, ids = gpt(config(**settings)), tokens()
    replay = MegatronReplay(model)
    plan, plain, maps = plan_for(replay), run(model, ids), []
    hooks = [
        r.register_forward_hook(lambda _, __, out: maps.append(out[1])) for r in routers(model)
    ]
    with replay.record() as tape, replay.replay(plan):
        forced = run(model, ids)
    for hook in hooks:
        hook.remove()
    for layer, map_NE in enumerate(maps):
        expected = torch.zeros_like(map_NE).scatter(1, plan.expert_ids[:, layer].long(), True)
        assert torch.equal(map_NE, expected)
    assert tape == plan
    assert (plain - forced).abs().amax(-1).min() > 1e-3


@scoring
def test_router_weights_get_the_gradient_of_the_forced_experts_gates(settings):
    # The softmax is float32 inside, so a central difference with step 3e-3 carries rounding of
    # about 1e-7 / 3e-3 and truncation of about 1e-5: 1% is wide of both. A gate of zero, such as
    # that of an expert outside the live groups, would give no slope at all.
    model, ids = biased(gpt(config(params_dtype=torch.float64, **settings))), tokens()
    replay = MegatronReplay(model)
    plan, weight = plan_for(replay), routers(model)[0].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def value(step: float) -> torch.Tensor:
        with torch.no_grad(), replay.replay(plan):
            weight.add_(step * direction)
            out = run(model, ids).log_softmax(-1)[..., 0].sum()
            weight.sub_(step * direction)
        return out

    with replay.replay(plan):
        run(model, ids).log_softmax(-1)[..., 0].sum().backward()
    slope = (weight.grad * direction).sum()
    assert slope.abs() > 0.1
    torch.testing.assert_close(slope, (value(3e-3) - value(-3e-3)) / 6e-3, rtol=1e-2, atol=0)


def test_experts_outside_the_live_groups_keep_their_gate_weights():
    model = gpt(config(**SCORING["groups"]))
    replay = MegatronReplay(model)
    with replay.record() as own:
        run(model, tokens())
    # Four groups of two: the experts whose group the router chose least.
    outside = torch.stack([ids.long().add(4) % 8 for ids in own.expert_ids.unbind(1)], 1)
    found = []
    hook = routers(model)[0].register_forward_hook(lambda _, __, out: found.append(out[0]))
    with replay.replay(RoutingTape(outside, num_experts=8)):
        run(model, tokens())
    hook.remove()
    gates = found[0].gather(1, outside[:, 0])
    assert float(gates.min()) > 0
    torch.testing.assert_close(gates.sum(1), torch.ones(ROWS))


def test_a_hole_raises_unless_its_row_is_not_required():
    model = gpt(config())
    replay = MegatronReplay(model)
    plan = plan_for(replay)
    holed, required_N = with_holes(plan, 5, 9), torch.ones(ROWS, dtype=torch.bool)
    with raises(RoutingError, "2 of 12 rows.* first at token 5"), replay.replay(holed):
        pass
    required_N[[5, 9]] = False
    with replay.record() as tape, replay.replay(holed, required_N=required_N):
        run(model, tokens())
    assert torch.equal(tape.expert_ids[required_N], plan.expert_ids[required_N])


def test_natural_lets_the_live_router_choose_in_holes_only():
    model = gpt(config(num_layers=1))
    replay = MegatronReplay(model)
    with replay.record() as own:
        run(model, tokens())
    plan = plan_for(replay)
    with replay.record() as tape, replay.replay(with_holes(plan, 5), invalid="natural"):
        run(model, tokens())
    expected = plan.expert_ids
    assert not torch.equal(expected[5], own.expert_ids[5])
    expected[5] = own.expert_ids[5]  # one layer: what it sees does not depend on the plan
    assert torch.equal(tape.expert_ids, expected)


@pytest.mark.parametrize("shared", [None, 12])
def test_dropped_rows_get_nothing_from_the_experts_but_from_the_shared_one(shared):
    model = gpt(config(num_layers=1, moe_shared_expert_intermediate_size=shared))
    replay, outputs = MegatronReplay(model), []
    plan = plan_for(replay)
    mlp = model.decoder.layers[0].mlp
    mlp.register_forward_hook(lambda _, __, out: outputs.append(out[0].flatten(0, 1)))
    if shared:
        mlp.shared_experts.register_forward_hook(lambda _, __, out: outputs.append(out))
    with replay.replay(plan):
        run(model, tokens())
    with replay.replay(with_holes(plan, 5), invalid="drop"):
        run(model, tokens())
    if shared:
        always, whole, _, dropped = outputs
        expected = always.flatten(0, 1)[5]
    else:
        whole, dropped = outputs
        expected = torch.zeros(16)
    kept = torch.arange(ROWS) != 5
    # An expert with a row less multiplies another shape, which some CPUs round otherwise.
    torch.testing.assert_close(dropped[kept], whole[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(dropped[5], expected) and not torch.equal(whole[5], expected)


def test_another_number_of_rows_raises_with_layer_and_counts():
    model = gpt(config())
    replay = MegatronReplay(model)
    block = replay.replay(plan_for(replay, rows=11))
    with raises(RoutingError, r"layers\.0\.mlp\.router \(layer 1 .* processes 12 .* 11"), block:
        run(model, tokens())


def test_tapes_that_do_not_fit_are_refused():
    replay = MegatronReplay(gpt(config(num_layers=3)))
    plan = plan_for(replay)
    with raises(RoutingError, r"2 layers; expected 3"), replay.replay(for_pipeline(plan, [0, 1])):
        pass
    other = RoutingTape(plan.expert_ids, num_experts=9)
    with raises(RoutingError, r"\(3, 2, 9\)"), replay.replay(other):
        pass
    with raises(SettingError, "discover=True"):
        MegatronReplay(gpt(config()), discover=True)


REFUSED = {
    "moe_router_fusion": True,
    "moe_router_load_balancing_type": "sinkhorn",
    "overlap_moe_expert_parallel_comm": True,
    "cuda_graph_impl": "local",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_ignore_the_replay_are_refused_by_name(setting):
    model = gpt(config())
    setattr(model.config, setting, REFUSED[setting])
    with raises(UnsupportedModelError, f"{setting}=.*{REFUSED[setting]}.*;"):
        MegatronReplay(model)


def test_a_router_that_stops_asking_is_noticed():
    model = gpt(config())
    replay = MegatronReplay(model)
    routers(model)[1].routing_type = "sinkhorn"
    for block in (replay.record(), replay.replay(plan_for(replay))):
        with raises(RoutingError, r"\(layer 2 .*without asking"), block, torch.no_grad():
            run(model.eval(), tokens())


def test_a_dense_model_is_refused():
    with raises(UnsupportedModelError, "a dense model needs no replay"):
        MegatronReplay(gpt(config(num_moe_experts=None, moe_ffn_hidden_size=None)))


def test_a_router_without_a_layer_number_is_refused():
    model = gpt(config())
    routers(model)[1].layer_number = None
    with raises(UnsupportedModelError, r"layers\.1\.mlp\.router has no layer_number"):
        MegatronReplay(model)


def test_a_model_built_without_the_setting_is_replayed_too():
    model = gpt(config(moe_enable_routing_replay=False))
    replay = MegatronReplay(model)
    plan = plan_for(replay)
    with replay.record() as tape, replay.replay(plan):
        run(model, tokens())
    assert tape == plan
    assert all(router.router_replay is None for router in routers(model))


def test_models_are_released_with_their_instances():
    from megatron.core.transformer.moe.router_replay import RouterReplay

    before = list(RouterReplay.global_router_replay_instances)
    for _ in range(3):
        model = gpt(config(**FULL))
        replay = MegatronReplay(model)
        with replay.replay(plan_for(replay)):
            out = loss(run(model, tokens()))
        out.backward()
        gone = [weakref.ref(model), weakref.ref(routers(model)[0].router_replay)]
        del model, replay, out
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
    assert RouterReplay.global_router_replay_instances == before


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_stays_behind(fail):
    model, ids = gpt(config(**FULL)), tokens()
    replay = MegatronReplay(model)
    before = [(r.router_replay, dict(r._forward_hooks)) for r in routers(model)]
    plain = run(model, ids)
    for block in (replay.record(), replay.replay(with_holes(plan_for(replay), 1), "drop")):
        try:
            with block:
                out = run(model, ids)
                assert routers(model)[0].router_replay is not before[0][0]
                if fail:
                    raise KeyError
        except KeyError:
            assert fail
        loss(out).backward()
        assert [(r.router_replay, dict(r._forward_hooks)) for r in routers(model)] == before
    assert torch.equal(run(model, ids), plain)


def test_a_second_object_for_the_same_model_waits_for_its_turn():
    model = gpt(config())
    first, second = MegatronReplay(model), MegatronReplay(model)
    plan = plan_for(first)
    with raises(RoutingError, "another object for the same model"), first.record(), second.record():
        pass
    with first.replay(plan):
        run(model, tokens())
    with second.record() as tape, second.replay(plan):
        run(model, tokens())
    assert tape == plan


def test_replay_under_way_of_megatron_is_refused():
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    model = gpt(config())
    routers(model)[0].router_replay.set_router_replay_action(RouterReplayAction.RECORD)
    with raises(UnsupportedModelError, "RECORD.*clear_global_router_replay_action"):
        MegatronReplay(model)
    routers(model)[0].router_replay.clear_router_replay_action()
    MegatronReplay(model)


def test_the_natural_routing_is_told_beside_the_replayed_one():
    model = gpt(config(num_layers=1))
    replay = MegatronReplay(model)
    with replay.record() as own:
        run(model, tokens())
    plan = plan_for(replay)
    with replay.replay(replay.prefetch(plan), record_natural=True) as natural:
        run(model, tokens())
    assert natural == own and routing_agreement(natural, plan) < 1


def test_rows_of_a_padded_batch_replay_as_each_alone():
    """Sequences one by one give a tape in the order of an engine's; together they are [S, B]."""
    model, ids = gpt(config(params_dtype=torch.float64)), tokens()
    replay = MegatronReplay(model)
    plans = [plan_for(replay, seed, rows=LENGTH) for seed in range(BATCH)]
    alone = []
    for row, plan in enumerate(plans):
        with replay.replay(plan):
            alone.append(run(model, ids[row : row + 1]))
    tape = sequence_first(RoutingTape.cat(plans), BATCH)
    with replay.record() as recorded, replay.replay(tape):
        together = run(model, ids)
    # The router's softmax and RoPE are float32.
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert batch_first(recorded, BATCH) == RoutingTape.cat(plans)
    with raises(RoutingError, "12 rows and batch_size is 5"):
        sequence_first(tape, 5)


def test_dense_layers_have_no_place_on_a_tape():
    model = gpt(config(num_layers=4, moe_layer_freq=[0, 1, 0, 1]))
    replay = MegatronReplay(model)
    assert replay.layers == ["decoder.layers.1.mlp.router", "decoder.layers.3.mlp.router"]
    plan = plan_for(replay)
    with replay.record() as tape, replay.replay(plan):
        run(model, tokens())
    assert tape == plan and tape.num_layers == 2


def test_layers_of_multi_token_prediction_choose_by_themselves():
    model = gpt(config(mtp_num_layers=1), mtp=True)
    replay = MegatronReplay(model)
    assert replay.layers == [f"decoder.layers.{i}.mlp.router" for i in range(2)]
    plan, seen = plan_for(replay), []
    router = model.mtp.layers[0].transformer_layer.mlp.router
    router.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    with replay.record() as tape, replay.replay(plan):
        loss(run(model, tokens(), labels=tokens(1))).backward()
    assert tape == plan and seen[0].shape == (ROWS, 8)


def test_other_versions_and_none_are_refused(monkeypatch):
    import megatron.core

    model = gpt(config())
    assert is_megatron(model) and is_megatron([model]) and not is_megatron(torch.nn.Linear(1, 1))
    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    with raises(UnsupportedModelError, r"0\.17\.0; expected 0\.16\.1.*pip install"):
        MegatronReplay(model)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with raises(MissingExtraError, r"miles\[megatron\]"):
        MegatronReplay(model)


def test_importing_the_module_imports_no_megatron():
    code = "import sys, miles.moe.megatron; print('megatron' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
