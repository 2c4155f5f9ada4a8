"""A layer that activation checkpointing runs again gets the experts of its first run."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from miles.errors import RoutingError, UnsupportedModelError
from miles.moe import RoutingReplay, _checkpoint
from tests.models import tiny, token_batch
from tests.moe.plans import gradients, random_plan, same, weighted, with_holes


def enable(model, kind: str):
    """Checkpoint every decoder layer in one of the ways that people do it."""
    model.train()
    if kind == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif kind == "wrapper":
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda layer: checkpoint_wrapper(
                layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT
            ),
            check_fn=lambda module: type(module).__name__ == "Qwen3MoeDecoderLayer",
        )
    elif kind == "by_hand":
        by_hand(model)
    elif kind == "nested":  # all layers in one region, each of them and its experts in another
        checkpointed(model.model)
        by_hand(model)
        for layer in model.model.layers:
            checkpointed(layer.mlp)
    elif kind == "offloaded":
        by_hand(model)
        for layer in model.model.layers:
            offloaded(layer.mlp)
    elif kind == "selective":
        # Of a whole layer, torch 2.13 can't do it, with or without a replay.
        for layer in model.model.layers:
            checkpointed(layer.mlp, context_fn=selective)
    elif kind == "no_early_stop":
        by_hand(model, early_stop=False)
    elif kind != "none":
        raise ValueError(kind)


def by_hand(model, **settings):
    for layer in model.model.layers:
        checkpointed(layer, **settings)


def checkpointed(module, **settings):
    forward = module.forward
    module.forward = lambda *args, **kwargs: checkpoint(
        forward, *args, use_reentrant=False, **settings, **kwargs
    )


def offloaded(module):
    forward = module.forward

    def saving_on_cpu(*args, **kwargs):
        with torch.autograd.graph.save_on_cpu():
            return forward(*args, **kwargs)

    module.forward = saving_on_cpu


def selective():
    def policy(ctx, op, *args, **kwargs):
        saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


KINDS = ["transformers", "wrapper", "by_hand", "nested", "offloaded", "selective", "no_early_stop"]
checkpointing = pytest.mark.parametrize("kind", KINDS)
# Batches A and B: forward A, forward B, then backward in this order, each replayed by its own tape.
INTERLEAVED = ["fA fB bA bB", "fA fB bB bA", "fA bA fB bB"]


def micro_batches(replay):
    tapes = [random_plan(replay, 21, seed=1), with_holes(random_plan(replay, 21, seed=2), every=4)]
    return {"A": (token_batch(seed=1), tapes[0]), "B": (token_batch(seed=2), tapes[1])}


def run(model, schedule: str, invalid="natural", backward_within=False):
    """Gradients of two micro-batches."""
    replay = RoutingReplay(model)
    batches, losses = micro_batches(replay), {}
    model.zero_grad()
    for step in schedule.split():
        input_ids, tape = batches[step[1]]
        if step[0] == "f":
            with replay.replay(tape, invalid):
                losses[step[1]] = weighted(model(input_ids).logits)
        else:
            # Another tape is in force, or none.
            others = replay.replay(batches["A"][1]) if backward_within else nullcontext()
            with others:
                losses[step[1]].backward()
    # The wrapper has its place in parameter names.
    return {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model).items()}


@checkpointing
@pytest.mark.parametrize("schedule", INTERLEAVED)
@pytest.mark.parametrize("backward_within", [False, True])
def test_interleaved_micro_batches_have_the_gradients_of_no_checkpointing(
    kind, schedule, backward_within
):
    plain, model = tiny("qwen3_moe"), tiny("qwen3_moe")
    plain.train()
    enable(model, kind)
    expected = run(plain, schedule)
    assert same(run(model, schedule, backward_within=backward_within), expected)
    assert not any("forward" in vars(m) for m in plain.modules())


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_dropped_rows_stay_dropped_in_the_second_run(experts):
    """All shapes are equal here, so only the values tell a hole that was filled."""
    plain, model = tiny("qwen3_moe", experts=experts), tiny("qwen3_moe", experts=experts)
    plain.train()
    enable(model, "transformers")
    expected = run(plain, "fA fB bA bB", "drop")
    assert same(run(model, "fA fB bA bB", "drop", backward_within=True), expected)
    assert not same(run(plain, "fA fB bA bB", "natural"), expected)


def test_without_the_binding_the_second_run_would_not_match_the_first(monkeypatch):
    """Else the tests above would be empty."""
    model = tiny("qwen3_moe", experts="grouped_mm")
    enable(model, "transformers")
    monkeypatch.setattr("miles.moe._checkpoint.bind", lambda router, forced: None)
    replay = RoutingReplay(model)
    with replay.replay(random_plan(replay, 21)):
        loss = weighted(model(token_batch()).logits)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        loss.backward()


def test_a_graph_kept_for_a_second_backward_pass_runs_again_with_its_experts():
    model = tiny("qwen3_moe")
    enable(model, "transformers")
    replay = RoutingReplay(model)
    input_ids, tape = micro_batches(replay)["A"]
    with replay.replay(tape):
        loss = weighted(model(input_ids).logits)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    twice = gradients(model)
    assert all(torch.equal(twice[name], 2 * once[name]) for name in once)


def test_the_binding_dies_with_the_graph():
    model = tiny("qwen3_moe")
    enable(model, "transformers")
    replay = RoutingReplay(model)
    input_ids, tape = micro_batches(replay)["A"]
    with replay.replay(tape):
        loss = weighted(model(input_ids).logits)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(bindings(model)) == 2
    loss.backward()
    del loss
    gc.collect()
    assert not bindings(model)


def bindings(model) -> list[_checkpoint.Again]:
    routers = {module for module in model.modules() if "Router" in type(module).__name__}
    found = [obj for obj in gc.get_objects() if type(obj) is _checkpoint.Again]
    return [obj for obj in found if routers & {router.module for router in obj.forced}]


@checkpointing
def test_recording_notes_the_first_run_only(kind):
    plain, model = tiny("qwen3_moe").train(), tiny("qwen3_moe")
    enable(model, kind)
    with RoutingReplay(plain).record() as expected:
        plain(token_batch())
    with RoutingReplay(model).record() as tape:
        weighted(model(token_batch()).logits).backward()
    assert tape == expected
    replay = RoutingReplay(model)
    with replay.replay(tape, record_natural=True) as natural:
        weighted(model(token_batch()).logits).backward()
    assert natural == tape


def test_checkpointing_may_be_turned_on_before_or_after():
    model = tiny("qwen3_moe")
    replay = RoutingReplay(model)
    enable(model, "transformers")
    with replay.record() as tape:
        model(token_batch())
    with replay.replay(tape):
        loss = weighted(model(token_batch()).logits)
    loss.backward()
    assert gradients(model)


def test_reentrant_checkpointing_is_refused():
    """It ran the routers again after the replay, with natural experts and without a word."""
    model = tiny("qwen3_moe").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    replay = RoutingReplay(model)
    block = replay.replay(random_plan(replay, 21))
    with pytest.raises(UnsupportedModelError, match=r"reentrant.*use_reentrant=False"), block:
        model(token_batch())
    model.eval()  # checkpoints nothing
    with replay.replay(random_plan(replay, 21)):
        model(token_batch())


def test_hooks_on_saved_tensors_are_left_as_they_were():
    model = tiny("qwen3_moe").train()
    offloaded(model.model)
    plain = run(tiny("qwen3_moe").train(), "fA fB bA bB")
    assert same(run(model, "fA fB bA bB"), plain)


def test_the_backward_pass_of_what_was_not_replayed_is_refused_inside_a_replay():
    model = tiny("qwen3_moe")
    enable(model, "transformers")
    replay = RoutingReplay(model)
    loss = weighted(model(token_batch()).logits)
    block = replay.replay(random_plan(replay, 21))
    with pytest.raises(RoutingError, match="first run was not replayed"), block:
        loss.backward()


@pytest.mark.parametrize("backward_within", [False, True])
@pytest.mark.parametrize("kind", ["transformers", "wrapper", "experts"])
def test_layers_compiled_inside_their_checkpoint(kind, backward_within):
    """Compiled code bound nothing, and its second run took the experts of another block."""
    torch._dynamo.reset()
    plain = tiny("qwen3_moe", experts="grouped_mm").train()
    model = tiny("qwen3_moe", experts="grouped_mm")
    expected = run(plain, "fA fB bA bB")
    for layer in model.model.layers:
        if kind == "experts":
            layer.mlp = torch.compile(layer.mlp, backend="aot_eager")
        else:
            layer.compile(backend="aot_eager")
    enable(model, "transformers" if kind == "experts" else kind)
    found = run(model, "fA fB bA bB", backward_within=backward_within)
    found = {name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_second_run_of_compiled_layers_that_were_not_replayed_is_refused_inside_a_replay():
    torch._dynamo.reset()
    model = tiny("qwen3_moe", experts="grouped_mm")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    enable(model, "wrapper")
    replay = RoutingReplay(model)
    loss = weighted(model(token_batch()).logits)
    block = replay.replay(random_plan(replay, 21))
    with pytest.raises(Exception, match=r"not replayed|different (number|metadata)"), block:
        loss.backward()
