"""Routing under torch.compile: one graph, compiled once however often the tape changes."""

import pytest
import torch
import torch._dynamo

from miles.moe import RoutingReplay
from tests.models import tiny, token_batch
from tests.moe.plans import gradients, random_plan, weighted, with_holes


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def pair(backend="eager", experts="grouped_mm"):
    """A model, and the same one traced as one graph; "aot_eager" also traces its gradient."""
    model = tiny("qwen3_moe", experts=experts)
    return model, torch.compile(model, backend=backend, fullgraph=True)


def step(model, run, input_ids):
    model.zero_grad()
    logits = run(input_ids, use_cache=False).logits
    weighted(logits).backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_replay_is_one_graph_for_all_tapes(experts):
    model, compiled = pair("aot_eager", experts)
    replay = RoutingReplay(model)
    for seed in range(4):
        with replay.replay(random_plan(replay, 21, seed)):
            expected, expected_gradients = step(model, model, token_batch(seed=seed))
            got, got_gradients = step(model, compiled, token_batch(seed=seed))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_gradients, expected_gradients, rtol=1e-4, atol=1e-4)
    assert graphs() == 1
    with replay.replay(random_plan(replay, 21, 0)):
        other = compiled(token_batch(seed=3), use_cache=False).logits
    assert not torch.allclose(other, expected, atol=1e-2)  # the tape is no constant of the graph


@pytest.mark.parametrize("invalid", ["natural", "drop"])
def test_holes_are_no_reason_to_compile_again(invalid):
    model, compiled = pair()
    replay = RoutingReplay(model)
    for seed, every in enumerate((2, 3, 0, 5)):
        plan = random_plan(replay, 21, seed)
        with replay.replay(with_holes(plan, every) if every else plan, invalid):
            expected = model(token_batch(), use_cache=False).logits
            got = compiled(token_batch(), use_cache=False).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 1


def test_recording_is_one_graph_however_many_passes():
    model, compiled = pair()
    replay = RoutingReplay(model)
    for passes in (1, 3, 2):
        with replay.record() as tape:
            for seed in range(passes):
                compiled(token_batch(seed=seed), use_cache=False)
        with replay.record() as expected:
            for seed in range(passes):
                model(token_batch(seed=seed), use_cache=False)
        assert tape == expected
    assert graphs() == 1


def test_natural_and_replayed_steps_alternate_between_two_graphs():
    model, compiled = pair()
    replay = RoutingReplay(model)
    for seed in range(3):
        free = compiled(token_batch(), use_cache=False).logits
        torch.testing.assert_close(free, model(token_batch()).logits, rtol=1e-5, atol=1e-5)
        with replay.replay(random_plan(replay, 21, seed), record_natural=True) as natural:
            compiled(token_batch(), use_cache=False)
        assert len(natural) == 21
    assert graphs() == 2


# To tell the compiler that a router's stand-in changes nothing the second run needs.
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_checkpointing_inside_the_compiled_model():
    plain, model = tiny("qwen3_moe", experts="grouped_mm"), tiny("qwen3_moe", experts="grouped_mm")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    replays = RoutingReplay(plain), RoutingReplay(model)
    losses, expected = [], []
    model.zero_grad()
    for seed in (1, 2):
        with replays[0].replay(random_plan(replays[0], 21, seed)):
            expected.append(weighted(plain(token_batch()).logits))
        with replays[1].replay(random_plan(replays[1], 21, seed)):
            losses.append(weighted(compiled(token_batch(), use_cache=False).logits))
    for loss in losses + expected:
        loss.backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-4)
    assert graphs() == 1


def test_layers_compiled_one_by_one():
    model = tiny("qwen3_moe", experts="grouped_mm")
    replay = RoutingReplay(model)
    tapes = [random_plan(replay, 21, seed) for seed in range(3)]
    expected = []
    for tape in tapes:
        with replay.replay(tape):
            expected.append(step(model, model, token_batch()))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for tape, (logits, grads) in zip(tapes, expected, strict=True):
        with replay.replay(tape):
            got, got_grads = step(model, model, token_batch())
        torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_grads, grads, rtol=1e-4, atol=1e-4)
    assert graphs() <= 2


def test_a_wrong_tape_is_told_also_by_a_compiled_model():
    model, compiled = pair()
    replay = RoutingReplay(model)
    block = replay.replay(random_plan(replay, 20))
    with pytest.raises(Exception, match="21 tokens and the tape has 20"), block:
        compiled(token_batch(), use_cache=False)
