import copy
import pickle
from contextlib import ExitStack

import pytest
import torch

from miles.errors import RoutingError, SettingError, UnsupportedModelError
from miles.moe import ROUTER_FAMILIES, RoutingReplay, RoutingTape
from tests.models import MOE_FAMILIES, routers, tiny, token_batch
from tests.moe.plans import loss_and_gradients, random_plan, same, weighted, with_holes

family = pytest.mark.parametrize("name", MOE_FAMILIES)


def raises(error, text: str):
    return pytest.raises(error, match=text)


def experts_seen(model, run) -> torch.Tensor:
    """Ids `[N, M, K]` that reach `experts(hidden, ids, weights)` while `run` runs."""
    seen = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
                stack.callback(hook.remove)
        run()
    return torch.stack(seen, 1)


def test_the_families_of_this_file_are_registered():
    names = {type(routers(tiny(name))[0]).__name__ for name in MOE_FAMILIES}
    assert names <= {entry.router for entry in ROUTER_FAMILIES}


@family
def test_sizes_are_read_off_the_model(name):
    replay = RoutingReplay(tiny(name))
    assert (len(replay.layers), replay.num_experts, replay.topk) == (2, 8, 2)
    assert replay.layers[0] == "model.layers.0.mlp.gate"
    assert (len(replay.unrecorded(3)), replay.unrecorded(3).num_layers) == (3, 2)


@family
def test_recorded_ids_are_those_that_reach_the_experts(name):
    model, input_ids = tiny(name), token_batch()
    with RoutingReplay(model).record() as tape:
        seen_NMK = experts_seen(model, lambda: model(input_ids))
    assert torch.equal(tape.expert_ids.long(), seen_NMK)
    assert (len(tape), tape.num_experts) == (21, 8)


@family
def test_recording_changes_nothing(name):
    model, input_ids = tiny(name), token_batch()
    plain = model(input_ids).logits
    with RoutingReplay(model).record():
        recorded = model(input_ids).logits
    assert torch.equal(plain, recorded)


@family
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_replay_of_ones_own_routing_is_bitwise_the_same_in_logits_and_gradients(name, experts):
    model, input_ids = tiny(name, experts=experts), token_batch()
    replay = RoutingReplay(model)
    with replay.record() as tape:
        logits, gradients = loss_and_gradients(model, input_ids)
    with replay.replay(tape):
        again, gradients_again = loss_and_gradients(model, input_ids)
    assert torch.equal(logits, again)
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[parameter]), parameter


@family
def test_a_random_plan_reaches_the_experts_and_changes_the_output(name):
    model, input_ids = tiny(name), token_batch()
    replay = RoutingReplay(model)
    plan = random_plan(replay, input_ids.numel())
    plain = model(input_ids).logits
    with replay.record() as tape, replay.replay(plan):
        seen_NMK = experts_seen(model, lambda: model(input_ids))
        forced = model(input_ids).logits
    assert torch.equal(seen_NMK, plan.expert_ids.long())
    assert tape == RoutingTape.cat([plan, plan])
    assert (plain - forced).abs().amax(-1).min() > 1e-3


@family
def test_router_weights_get_the_gradient_of_the_forced_experts_gates(name):
    # Routers compute their softmax in float32, so a central difference with step 3e-3 carries
    # rounding of about 1e-7 / 3e-3 and truncation of about 1e-5: 1% is wide of both.
    model, input_ids = tiny(name, dtype=torch.float64), token_batch()
    replay = RoutingReplay(model)
    plan = random_plan(replay, input_ids.numel())
    weight = routers(model)[0].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad(), replay.replay(plan):
            weight.add_(step * direction)
            value = model(input_ids).logits.log_softmax(-1)[..., 0].sum()
            weight.sub_(step * direction)
        return value

    with replay.replay(plan):
        model(input_ids).logits.log_softmax(-1)[..., 0].sum().backward()
    slope = (weight.grad * direction).sum()
    measured = (loss(3e-3) - loss(-3e-3)) / 6e-3
    assert slope.abs() > 0.1
    torch.testing.assert_close(slope, measured, rtol=1e-2, atol=0)


def test_padded_rows_replay_as_each_alone():
    model, input_ids = tiny("qwen3_moe", dtype=torch.float64), token_batch()
    lengths, mask = [7, 4, 1], torch.ones_like(input_ids)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    replay = RoutingReplay(model)
    plan = random_plan(replay, input_ids.numel())
    with replay.replay(plan):
        padded = model(input_ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        with replay.replay(plan[7 * row : 7 * row + length]):
            alone = model(input_ids[row : row + 1, :length]).logits[0]
        # The router's own float32 softmax and weights are all that may round.
        torch.testing.assert_close(padded[row, :length], alone, rtol=1e-6, atol=1e-6)


def test_packed_rows_replay_as_each_alone():
    model, input_ids = tiny("qwen3_moe", dtype=torch.float64), token_batch()
    replay = RoutingReplay(model)
    plan = random_plan(replay, 21)
    positions = torch.arange(7).repeat(3)[None]
    with replay.replay(plan):
        flat = model(input_ids.view(1, 21), position_ids=positions, use_cache=False).logits
        rows = model(input_ids).logits
    torch.testing.assert_close(flat.view(3, 7, -1), rows, rtol=1e-6, atol=1e-6)


def with_hole(tape: RoutingTape, row: int) -> RoutingTape:
    ids = tape.expert_ids
    ids[row] = -1
    return RoutingTape(ids, num_experts=tape.num_experts)


def test_a_hole_raises_and_names_the_row():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    replay = RoutingReplay(model)
    holed = with_hole(with_hole(random_plan(replay, 21), 9), 5)
    with raises(RoutingError, r"2 of 21 rows.* first at token 5"), replay.replay(holed):
        model(input_ids)


def test_natural_lets_the_live_router_choose_in_holes_only():
    model, input_ids = tiny("qwen3_moe", num_hidden_layers=1), token_batch()
    replay = RoutingReplay(model)
    with replay.record() as own:
        model(input_ids)
    plan = random_plan(replay, 21)
    with replay.replay(with_hole(plan, 5), invalid="natural"):
        seen_NMK = experts_seen(model, lambda: model(input_ids))
    # One layer, so what the router sees does not depend on the experts that were forced.
    expected = plan.expert_ids.long()
    assert not torch.equal(expected[5], own.expert_ids[5].long())
    expected[5] = own.expert_ids[5]
    assert torch.equal(seen_NMK, expected)


def test_only_required_rows_have_to_be_recorded():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    replay = RoutingReplay(model)
    plan = random_plan(replay, 21)
    holed, required_N = with_hole(plan, 5), torch.ones(21, dtype=torch.bool)
    block = replay.replay(holed, required_N=required_N)
    with raises(RoutingError, r"1 of 21 rows.* first at token 5"), block:
        pass
    required_N[5] = False
    with replay.replay(holed, required_N=required_N):
        seen_NMK = experts_seen(model, lambda: model(input_ids))
    assert torch.equal(seen_NMK[required_N], plan.expert_ids.long()[required_N])


def test_another_number_of_rows_raises_with_layer_and_counts():
    model = tiny("qwen3_moe")
    replay = RoutingReplay(model)
    block = replay.replay(random_plan(replay, 20))
    with raises(RoutingError, r"model\.layers\.0\.mlp\.gate processes 21 .* 20"), block:
        model(token_batch())


@pytest.mark.parametrize(
    ("shape", "num_experts"), [((21, 1, 2), 8), ((21, 2, 3), 8), ((21, 2, 2), 9)]
)
def test_a_tape_of_other_sizes_is_refused(shape, num_experts):
    tape = RoutingTape(torch.zeros(shape, dtype=torch.int64), num_experts=num_experts)
    block = RoutingReplay(tiny("qwen3_moe")).replay(tape)
    with raises(RoutingError, r"the model \(2, 2, 8\)"), block:
        pass


def test_bad_settings_are_refused():
    replay = RoutingReplay(tiny("qwen3_moe"))
    plan = random_plan(replay, 3)
    with raises(SettingError, "'skip'; expected"), replay.replay(plan, invalid="skip"):
        pass
    block = replay.replay(plan, required_N=torch.ones(2, dtype=torch.bool))
    with (
        raises(RoutingError, r"required_N is torch.bool of shape \(2,\); expected bool \[3\]"),
        block,
    ):
        pass


def test_a_model_without_routers_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no router.*dense model"):
        RoutingReplay(tiny("llama"))


def test_a_router_that_runs_no_topk_is_noticed():
    model = tiny("qwen3_moe")
    replay = RoutingReplay(model)
    gate = routers(model)[1]

    def argsorted(hidden):
        logits = hidden.reshape(-1, 16) @ gate.weight.T
        ids = logits.argsort(-1, descending=True)[:, :2]
        return logits, logits.softmax(-1).gather(-1, ids), ids

    gate.forward = argsorted
    for block in (replay.record(), replay.replay(random_plan(replay, 21))):
        with raises(RoutingError, r"layers\.1\.mlp\.gate ran no topk"), block:
            model(token_batch())
    assert gate.forward is argsorted


def test_recording_inside_a_replay_gives_what_was_replayed():
    model = tiny("qwen3_moe")
    replay = RoutingReplay(model)
    plan = random_plan(replay, 21)
    with replay.replay(plan), replay.record() as inside:
        model(token_batch())
    with replay.record() as outside, replay.replay(plan):
        model(token_batch())
    assert inside == outside == plan


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.parametrize("record_natural", [False, True])
def test_recording_inside_the_replay_of_another_object_is_refused(every, record_natural):
    """With holes, or with `record_natural`, it took the router's own choice for the forced one."""
    model = tiny("qwen3_moe")
    plan = random_plan(RoutingReplay(model), 21)
    plan = with_holes(plan, every) if every else plan
    forced = RoutingReplay(model).replay(plan, "natural", record_natural=record_natural)
    with raises(RoutingError, "another RoutingReplay"), forced, RoutingReplay(model).record():
        model(token_batch())


def test_a_context_entered_twice_is_refused_and_the_first_goes_on():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    replay = RoutingReplay(model)
    plan, other = random_plan(replay, 21), random_plan(replay, 21, seed=2)
    with replay.replay(plan):
        forced = model(input_ids).logits
        with (
            raises(RoutingError, r"replay\(\) was entered inside replay\(\)"),
            replay.replay(other),
        ):
            pass
        assert torch.equal(model(input_ids).logits, forced)
    with replay.record() as tape:
        with raises(RoutingError, r"record\(\) was entered inside record\(\)"), replay.record():
            pass
        model(input_ids)
    assert len(tape) == 21
    with replay.replay(other):  # neither refusal left anything behind
        model(input_ids)


def test_the_routers_own_choice_is_noted_beside_the_replayed_one():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    replay = RoutingReplay(model)
    plan = with_holes(random_plan(replay, 21), every=4)
    with replay.replay(plan, "natural") as nothing:
        forced = model(input_ids).logits
    with replay.replay(plan, "natural", record_natural=True) as natural, replay.record() as used:
        noted = model(input_ids).logits
    with replay.record() as free:
        model(input_ids)
    assert len(nothing) == 0 and torch.equal(forced, noted)
    assert torch.equal(natural.expert_ids[:, 0], free.expert_ids[:, 0])  # before any expert
    assert natural != free  # the second layer routes what the forced experts of the first made
    assert torch.equal(used.expert_ids[1:4], plan.expert_ids[1:4])
    assert torch.equal(used.expert_ids[::4], natural.expert_ids[::4])


def test_a_prefetched_tape_replays_as_the_tape():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    replay = RoutingReplay(model)
    for tape in (random_plan(replay, 21), with_holes(random_plan(replay, 21), every=3)):
        plan = replay.prefetch(tape)
        with replay.replay(tape, "natural"):
            direct = model(input_ids).logits
        for _ in range(2):
            with replay.replay(plan, "natural"):
                assert torch.equal(model(input_ids).logits, direct)
    with raises(RoutingError, "7 of 21 rows were not recorded"), replay.replay(plan):
        pass
    with raises(RoutingError, "the tape has"):
        replay.prefetch(RoutingTape.unrecorded(21, num_layers=3, topk=2, num_experts=8))


@family
def test_autocast_replays_its_own_routing_bitwise(name):
    model, input_ids = tiny(name, experts="grouped_mm"), token_batch()
    replay = RoutingReplay(model)
    with torch.autocast("cpu", torch.bfloat16):
        with replay.record() as tape:
            plain = loss_and_gradients(model, input_ids)
        with replay.replay(tape):
            replayed = loss_and_gradients(model, input_ids)
        with replay.replay(random_plan(replay, 21)):
            other, _ = loss_and_gradients(model, input_ids)
    assert torch.equal(plain[0], replayed[0]) and same(plain[1], replayed[1])
    assert not torch.equal(plain[0], other)


@family
def test_a_frozen_router_passes_the_gradient_of_its_gates_on(name):
    model, input_ids = tiny(name), token_batch()
    replay = RoutingReplay(model)
    plan = random_plan(replay, 21)
    with replay.replay(plan):
        _, free = loss_and_gradients(model, input_ids)
    for router in routers(model):
        router.requires_grad_(False)
    with replay.replay(plan):
        _, frozen = loss_and_gradients(model, input_ids)
    gates = free.keys() - frozen.keys()
    assert len(gates) == 2 and all(free[gate].any() for gate in gates)
    assert same({name: free[name] for name in frozen}, frozen)


@pytest.mark.parametrize("source", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_routing_recorded_under_one_experts_implementation_replays_under_another(source, experts):
    input_ids = token_batch()
    recorder, model = tiny("qwen3_moe", experts=source), tiny("qwen3_moe", experts=experts)
    with RoutingReplay(recorder).record() as tape:
        expected = recorder(input_ids).logits
    replay = RoutingReplay(model)
    with replay.replay(tape), replay.record() as used:
        got = model(input_ids).logits
    assert used == tape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_stays_behind(fail):
    model, input_ids = tiny("qwen3_moe"), token_batch()
    before, plain = [dict(r.__dict__) for r in routers(model)], model(input_ids).logits
    replay = RoutingReplay(model)
    plan = random_plan(replay, 21)
    for block in (replay.record(), replay.replay(plan)):
        with pytest.raises(KeyError) if fail else ExitStack(), block:
            model(input_ids)
            assert "forward" in routers(model)[0].__dict__
            if fail:
                raise KeyError
    assert [r.__dict__.keys() for r in routers(model)] == [b.keys() for b in before]
    assert torch.equal(model(input_ids).logits, plain)


def test_contexts_left_in_the_order_they_were_entered_leave_nothing_behind():
    model, ids = tiny("qwen3_moe"), token_batch()
    first, second = RoutingReplay(model), RoutingReplay(model)
    outer, inner = first.record(), second.record()
    tape = outer.__enter__()
    model(input_ids=ids)
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert len(tape) == ids.numel()
    model(input_ids=ids)  # the one that was left passes everything on
    inner.__exit__(None, None, None)
    assert len(tape) == ids.numel()
    assert not any("forward" in vars(module) for module in model.modules())


def test_two_models_replayed_at_once_do_not_mix():
    models, input_ids = [tiny("qwen3_moe"), tiny("qwen3_moe", seed=1)], token_batch()
    replays = [RoutingReplay(model) for model in models]
    plans = [random_plan(replay, 21, seed) for seed, replay in enumerate(replays)]
    apart = []
    for model, replay, plan in zip(models, replays, plans, strict=True):
        with replay.replay(plan):
            apart.append(model(input_ids).logits)
    with replays[0].replay(plans[0]), replays[1].replay(plans[1]):
        together = [model(input_ids).logits for model in models]
    assert all(map(torch.equal, apart, together))


def test_several_passes_are_laid_end_to_end():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    replay = RoutingReplay(model)
    with replay.record() as tape:
        model(input_ids[:1])
        model(input_ids[1:])
    with replay.record() as whole:
        model(input_ids)
    assert (len(tape), tape) == (21, whole)
    with replay.record() as nothing:
        pass
    assert len(nothing) == 0


def test_routers_that_were_replaced_are_told():
    """They were neither noted nor forced, without a word."""
    model = tiny("qwen3_moe")
    replay = RoutingReplay(model)
    model.model.layers[1].mlp.gate = copy.deepcopy(model.model.layers[1].mlp.gate)
    for block in (replay.record(), replay.replay(random_plan(replay, 21))):
        with raises(RoutingError, r"layers\.1\.mlp\.gate is another module"), block:
            pass


@pytest.mark.parametrize(
    "changes", [{"num_experts": 16}, {"num_hidden_layers": 3}, {"num_experts_per_tok": 3}]
)
def test_a_plan_of_another_model_is_refused(changes):
    other = RoutingReplay(tiny("qwen3_moe", **changes))
    plan = other.prefetch(random_plan(other, 21))
    block = RoutingReplay(tiny("qwen3_moe")).replay(plan)
    with raises(RoutingError, "was it recorded with this model"), block:
        pass
    moved = RoutingReplay(tiny("qwen3_moe").to("meta"))
    own = RoutingReplay(tiny("qwen3_moe"))
    with raises(RoutingError, "call prefetch"), moved.replay(own.prefetch(random_plan(own, 21))):
        pass


def test_copies_of_a_model_made_inside_a_block_are_free():
    model, input_ids = tiny("qwen3_moe"), token_batch()
    free = model(input_ids).logits
    replay = RoutingReplay(model)
    plan = random_plan(replay, 21)
    with replay.replay(plan):
        forced = model(input_ids).logits
        twin = copy.deepcopy(model)
        with raises(RoutingError, "can't be pickled while"):
            pickle.dumps(model)
    assert torch.equal(twin(input_ids).logits, free)
    assert twin.model.layers[0].mlp.gate.forward.__self__ is twin.model.layers[0].mlp.gate
    both = copy.deepcopy({"model": model, "replay": replay})
    with both["replay"].replay(plan):
        assert torch.equal(both["model"](input_ids).logits, forced)
        assert torch.equal(model(input_ids).logits, free)


def test_a_plan_fetched_in_inference_mode_serves_a_backward_pass():
    model = tiny("qwen3_moe")
    replay = RoutingReplay(model)
    with torch.inference_mode():
        plan = replay.prefetch(with_holes(random_plan(replay, 21), every=4))
    with replay.replay(plan, "drop"):
        weighted(model(token_batch()).logits).backward()


def test_what_is_no_tape_or_no_model_is_refused():
    replay = RoutingReplay(tiny("qwen3_moe"))
    with raises(RoutingError, "got Tensor; expected a RoutingTape"), replay.replay(torch.zeros(1)):
        pass
    whole = replay.replay(random_plan(replay, 21), required_N=torch.ones(21, dtype=torch.int64))
    with raises(RoutingError, "required_N is torch.int64"), whole:
        pass
    with raises(UnsupportedModelError, "got list"):
        RoutingReplay([])
