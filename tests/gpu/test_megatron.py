"""megatron-core on one GPU: bf16, the all-to-all dispatcher, with or without TransformerEngine."""

import pytest
import torch

from miles.errors import RoutingError
from miles.moe import RoutingTape
from miles.moe.megatron import MegatronReplay
from tests.moe.megatron import (
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
)

pytest.importorskip("megatron.core")

KINDS = ["none", "full", "selective"]
recompute = pytest.mark.parametrize("recomputed", [RECOMPUTE[kind] for kind in KINDS], ids=KINDS)
scoring = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moe_router_pre_softmax": True},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_dtype": "fp32"},
    ],
    ids=["softmax", "pre-softmax", "sigmoid-bias", "float32-router"],
)


@pytest.fixture(autouse=True, scope="module")
def _processes():
    before = torch.are_deterministic_algorithms_enabled()
    with processes(on_gpu=True):
        # Permuting tokens adds to rows in any order otherwise; bitwise equality needs one.
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before)


def bf16(**changes):
    return gpt(config(params_dtype=torch.bfloat16, bf16=True, **changes))


@recompute
@scoring
def test_replay_of_ones_own_routing_is_bitwise_the_same(settings, recomputed):
    model, ids = bf16(**settings, **recomputed), tokens()
    plain, plain_gradients = forward_and_gradients(model, ids)
    replay = MegatronReplay(model)
    with replay.record() as tape:
        recorded = run(model, ids)
    with replay.replay(tape):
        replayed, replayed_gradients = forward_and_gradients(model, ids)
    assert torch.equal(plain, recorded) and torch.equal(plain, replayed)
    assert_equal(replayed_gradients, plain_gradients)


@scoring
def test_a_random_plan_reaches_the_experts_and_changes_the_output(settings):
    model, ids = bf16(**settings), tokens()
    replay = MegatronReplay(model)
    plan, plain = plan_for(replay), run(model, ids)
    with replay.record() as tape, replay.replay(replay.prefetch(plan)):
        forced = run(model, ids)
    assert tape == plan
    assert (plain - forced).float().abs().amax(-1).min() > 1e-2
    loss(forced).backward()
    for layer in model.decoder.layers:
        assert layer.mlp.router.weight.grad.float().abs().max() > 0


@recompute
@pytest.mark.parametrize("order", ["AB", "BA"])
def test_micro_batches_may_be_interleaved_in_any_order(recomputed, order):
    """The backward pass of CUDA runs in a thread of its own, after the block."""
    model, plain = bf16(**recomputed), bf16()
    replay, whole = MegatronReplay(model), MegatronReplay(plain)
    batches = {"A": tokens(1), "B": tokens(2)}
    ids = plan_for(replay, 2).expert_ids
    ids[[3, 7]] = -1
    plans = {"A": plan_for(replay, 1), "B": RoutingTape(ids, num_experts=8)}
    expected, losses = {}, {}
    for name, plan in plans.items():
        with whole.replay(plan, invalid="drop"):
            loss(run(plain, batches[name])).backward()
        expected[name] = gradients(plain)
        with replay.replay(plan, invalid="drop"):
            losses[name] = loss(run(model, batches[name]))
    for name in order:
        losses[name].backward()
        assert_equal(gradients(model), expected[name])


def test_another_number_of_rows_and_a_foreign_second_run_raise():
    model = bf16(**RECOMPUTE["full"])
    replay = MegatronReplay(model)
    block = replay.replay(plan_for(replay, rows=11))
    with pytest.raises(RoutingError, match=r"\(layer 1 .* processes 12 .* 11"), block:
        run(model, tokens())
    natural = loss(run(model, tokens()))
    block = replay.replay(plan_for(replay))
    with pytest.raises(RoutingError, match="first run was not replayed"), block:
        natural.backward()
