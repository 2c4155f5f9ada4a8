"""Activation recomputation: every second run gets the experts of its first, or raises."""

import pytest
import torch
import torch.utils.checkpoint

from miles.errors import RoutingError, UnsupportedModelError
from miles.moe.megatron import MegatronReplay
from tests.moe.megatron import (
    FULL,
    RECOMPUTE,
    assert_equal,
    config,
    forward_and_gradients,
    gpt,
    gradients,
    loss,
    plan_for,
    processes,
    run,
    tokens,
    with_holes,
)

pytest.importorskip("megatron.core")

recompute = pytest.mark.parametrize("settings", RECOMPUTE.values(), ids=RECOMPUTE)


@pytest.fixture(autouse=True, scope="module")
def _processes():
    with processes():
        yield


def raises(error, text: str):
    return pytest.raises(error, match=text)


ORDERS = {"as-run": "AB", "reversed": "BA"}


@recompute
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("inside", [False, True])
def test_micro_batches_may_be_interleaved_in_any_order(settings, order, inside):
    """Forward A, forward B, backward of one, of the other: megatron-core pops a FIFO here."""
    model, batches = gpt(config(**settings)), {"A": tokens(1), "B": tokens(2)}
    replay = MegatronReplay(model)
    plans = {"A": plan_for(replay, 1), "B": with_holes(plan_for(replay, 2), 3, 7)}

    def forward(name):
        block = replay.replay(plans[name], invalid="drop" if name == "B" else "raise")
        with block:
            return loss(run(model, batches[name]))

    expected = {}
    plain = gpt(config())
    whole = MegatronReplay(plain)
    for name, plan in plans.items():
        with whole.replay(plan, invalid="drop"):
            loss(run(plain, batches[name])).backward()
        expected[name] = gradients(plain)

    losses = {name: forward(name) for name in "AB"}
    for name in order:
        if inside:  # of a third micro-batch
            with replay.replay(plan_for(replay, 3)):
                losses[name].backward()
        else:
            losses[name].backward()
        assert_equal(gradients(model), expected[name])


def test_a_recomputed_region_inside_another_is_right_too():
    """Its own second run belongs to the second run of the outer one."""
    model, plain = gpt(config(**FULL)), gpt(config())
    for layer in model.decoder.layers:
        layer.mlp.moe_layer_recompute = True
    replay, whole = MegatronReplay(model), MegatronReplay(plain)
    plan = plan_for(replay)
    with replay.replay(plan):
        out = loss(run(model, tokens()))
    out.backward()
    with whole.replay(plan):
        loss(run(plain, tokens())).backward()
    assert_equal(gradients(model), gradients(plain))


@pytest.mark.parametrize("name", ["full", "selective", "nested"])
def test_a_second_run_that_no_replay_belongs_to_raises(name):
    """The first run was natural; the tape of the block is of other tokens."""
    model = gpt(config(**RECOMPUTE.get(name, FULL)))
    for layer in model.decoder.layers:
        layer.mlp.moe_layer_recompute = name != "full"
    replay = MegatronReplay(model)
    natural = loss(run(model, tokens(1)))
    with raises(RoutingError, "first run was not replayed"), replay.replay(plan_for(replay)):
        natural.backward()


def test_without_a_block_recomputation_is_natural():
    model = gpt(config(**FULL))
    replay = MegatronReplay(model)
    natural = loss(run(model, tokens(1)))
    with replay.replay(plan_for(replay)):
        forced = loss(run(model, tokens(2)))
    natural.backward()
    own = gradients(model)
    forced.backward()
    plain = gpt(config())
    loss(run(plain, tokens(1))).backward()
    assert_equal(own, gradients(plain))


def checkpointed(model, **how):
    """The experts of layer 2 under torch's checkpointing."""
    mlp = model.decoder.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden, **_: torch.utils.checkpoint.checkpoint(forward, hidden, **how)
    return model


@pytest.mark.parametrize("around", [{}, RECOMPUTE["selective"], FULL], ids=str)
def test_checkpointing_by_torch_is_right(around):
    """Also around a region of megatron-core, or in one, where a router runs three times."""
    plain = gpt(config())
    replay = MegatronReplay(plain)
    plan = plan_for(replay)
    with replay.replay(plan):
        expected = forward_and_gradients(plain, tokens())[1]
    model = checkpointed(gpt(config(**around)), use_reentrant=False)
    with MegatronReplay(model).replay(plan):
        out = loss(run(model, tokens()))
    out.backward()
    assert_equal(gradients(model), expected)


def test_checkpointing_by_torch_of_the_reentrant_kind_is_refused():
    model = checkpointed(gpt(config()), use_reentrant=True)
    replay = MegatronReplay(model)
    with raises(UnsupportedModelError, "layer 2.*reentrant"), replay.replay(plan_for(replay)):
        run(model, tokens())


def test_other_functions_that_may_run_a_layer_again_are_refused():
    class Offloaded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, run):
            return run(hidden)[0]

    model = gpt(config())
    mlp = model.decoder.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden, **_: (Offloaded.apply(hidden, forward), None)
    replay = MegatronReplay(model)
    block = replay.replay(plan_for(replay))
    with raises(UnsupportedModelError, "layer 2.*Offloaded.forward.*tensor_parallel"), block:
        run(model, tokens())
