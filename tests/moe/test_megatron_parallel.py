"""Expert and pipeline parallel in two gloo processes, virtual pipelines also in one."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist

from miles.errors import RoutingError, UnsupportedModelError
from miles.moe import RoutingTape, for_pipeline
from miles.moe.megatron import MegatronReplay
from tests.distributed.gloo import run as in_processes
from tests.moe.megatron import (
    FULL,
    CudaMeansCpu,
    assert_equal,
    config,
    gpt,
    gradients,
    loss,
    plan_for,
    pretended_rank,
    processes,
    run,
    tokens,
)

pytest.importorskip("megatron.core")

MICRO_BATCHES, DENSE_AND_MOE = 4, [1, 0, 1, 1]


def whole_run(tapes: list[RoutingTape]):
    """One process, one stage, no recomputation: losses and gradients of all micro-batches."""
    with processes():
        model = gpt(config(num_layers=4, moe_layer_freq=DENSE_AND_MOE))
        replay = MegatronReplay(model)
        for index, tape in enumerate(tapes):
            with replay.replay(tape):
                (loss(run(model, tokens(index))) / MICRO_BATCHES).backward()
        return gradients(model)


def plans() -> list[RoutingTape]:
    with processes():
        replay = MegatronReplay(gpt(config(num_layers=4, moe_layer_freq=DENSE_AND_MOE)))
        return [plan_for(replay, seed) for seed in range(MICRO_BATCHES)]


def one_step(tapes_ids: list[torch.Tensor], chunks: int):
    """megatron-core's own 1F1B, interleaved if there are several chunks; tapes of all layers."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    virtual = chunks if chunks > 1 else None
    sizes = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": virtual,
    }
    with processes(**sizes):
        settings = config(
            num_layers=4,
            moe_layer_freq=DENSE_AND_MOE,
            batch_p2p_comm=False,
            overlap_p2p_comm=False,
            **sizes,
            **FULL,
        )
        models = [
            gpt(
                settings,
                pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(False, vp_stage=stage),
                vp_stage=stage if virtual else None,
            )
            for stage in range(chunks)
        ]
        replay = MegatronReplay(models if virtual else models[0])
        tapes = [RoutingTape(ids, num_experts=8) for ids in tapes_ids]

        def step(batches, model):
            index = next(batches)
            with replay.replay(tapes[index]):
                out = run(model, tokens(index))
            return out, lambda logits: (loss(logits), {})

        with CudaMeansCpu(), replay.record() as recorded:
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[itertools.count() for _ in models],
                model=models,
                num_microbatches=MICRO_BATCHES,
                seq_length=6,
                micro_batch_size=2,
                forward_only=False,
            )
        return replay.moe_layers, recorded.expert_ids, gradients(*models)


def expert_parallel(plan_ids: torch.Tensor):
    with processes(expert_model_parallel_size=2):
        model = gpt(config(expert_model_parallel_size=2))
        replay, ids = MegatronReplay(model), tokens(dist.get_rank())
        with replay.record() as own:
            natural = run(model, ids)
        loss(natural).backward()
        plain = gradients(model)
        with replay.replay(own):
            again = run(model, ids)
        loss(again).backward()
        assert torch.equal(natural, again)
        assert_equal(gradients(model), plain)
        with replay.replay(RoutingTape(plan_ids, num_experts=8)):
            out = run(model, ids)
        loss(out).backward()
        return out.detach(), gradients(model)


def everything(tapes_ids: list[torch.Tensor]):
    return {
        1: one_step(tapes_ids, 1),
        2: one_step(tapes_ids, 2),
        "experts": expert_parallel(tapes_ids[0][:, :2]),
    }


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """The tapes, and for each layout what each of two processes got; they are spawned once."""
    tapes = plans()
    folder = tmp_path_factory.mktemp("two")
    ranks = in_processes(everything, 2, folder, [tape.expert_ids for tape in tapes])
    return tapes, {layout: [rank[layout] for rank in ranks] for layout in ranks[0]}


@pytest.mark.parametrize("chunks", [1, 2], ids=["1F1B", "interleaved-1F1B"])
def test_a_pipeline_with_recomputation_equals_one_stage_without(in_two, chunks):
    tapes, results = in_two
    parts = results[chunks]
    # Layers 0, 2 and 3 of four are mixtures of experts: 0, 1 and 2 on a tape.
    places = [(0,), (1, 2)] if chunks == 1 else [(0, 1), (2,)]
    assert [layers for layers, _, _ in parts] == places
    whole = RoutingTape.cat(tapes)
    for layers, recorded, _ in parts:
        assert torch.equal(recorded, for_pipeline(whole, layers).expert_ids)
    assert_equal(parts[0][2] | parts[1][2], whole_run(tapes))


def test_expert_parallel_equals_one_process(in_two):
    tapes, results = in_two
    with processes():
        model = gpt(config())
        replay = MegatronReplay(model)
        expected = []
        for rank in range(2):
            with replay.replay(for_pipeline(tapes[0], range(2))):
                expected.append(run(model, tokens(rank)))
        sum(map(loss, expected)).backward()
        whole = gradients(model)
    (out_0, part_0), (out_1, part_1) = results["experts"]
    # Sums over tokens and experts run in another order.
    torch.testing.assert_close([out_0, out_1], expected, rtol=1e-5, atol=1e-5)
    for name, gradient in whole.items():
        parts = [part[name] for part in (part_0, part_1) if name in part]
        assert len(parts) == (1 if "local_experts" in name else 2), name
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def stage(rank: int, **settings):
    """The chunks of one rank of a pipeline of two, without its neighbour."""
    virtual = settings.get("virtual_pipeline_model_parallel_size")
    sizes = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": virtual,
    }
    with pretended_rank(rank, 2, **sizes):
        built = config(num_layers=8, **settings | sizes)
        yield [
            gpt(built, pre_process=False, post_process=False, vp_stage=chunk if virtual else None)
            for chunk in range(virtual or 1)
        ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"virtual_pipeline_model_parallel_size": 2}, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ({"moe_layer_freq": 2}, [(0, 1), (2, 3)]),
        ({"moe_layer_freq": [0] * 4 + [1] * 4}, [(), (0, 1, 2, 3)]),
        (
            {"moe_layer_freq": [0, 1] * 4, "virtual_pipeline_model_parallel_size": 2},
            [(0, 2), (1, 3)],
        ),
        ({"num_layers_in_first_pipeline_stage": 3}, [(0, 1, 2), (3, 4, 5, 6, 7)]),
    ],
)
def test_the_places_of_a_stages_layers_among_the_models(settings, expected):
    for rank, places in enumerate(expected):
        with stage(rank, **settings) as chunks:
            replay = MegatronReplay(chunks[::-1])  # layers count, not the order of chunks
        assert replay.moe_layers == places
        assert len(replay.layers) == len(places)
        assert (replay.num_experts, replay.topk) == (8, 2)


def random_tape(layers: int) -> RoutingTape:
    return RoutingTape(torch.rand(12, layers, 8).argsort(-1)[..., :2], num_experts=8)


def test_a_stage_takes_its_own_layers_of_a_whole_tape_or_just_those():
    whole = random_tape(4)
    with stage(1, moe_layer_freq=2) as (model,):
        replay = MegatronReplay([model])
        own = for_pipeline(whole, replay.moe_layers)
        for tape in (whole, own):
            model.set_input_tensor(torch.randn(6, 2, 16))
            with replay.record() as recorded, replay.replay(tape):
                run(model, tokens())
            assert recorded == own
    with pytest.raises(RoutingError, match=r"3 layers; expected 4, .* or 2,"):
        replay.prefetch(random_tape(3))


def test_a_stage_without_experts_records_and_replays_nothing():
    with stage(0, moe_layer_freq=[0] * 4 + [1] * 4) as (model,):
        replay = MegatronReplay(model)
        model.set_input_tensor(torch.randn(6, 2, 16))
        with replay.record() as recorded, replay.replay(random_tape(4)):
            run(model, tokens())
    assert (len(recorded), recorded.num_layers) == (0, 0)


def test_layers_that_are_not_where_the_config_says_are_refused():
    with stage(1, moe_layer_freq=2) as (model,):
        model.config.moe_layer_freq = [1] * 5 + [0] * 3
        text = r"layers\.0 \(layer 5 of the model\)|layers\.2 \(layer 7 .* a mixture.* it is dense"
        with pytest.raises(UnsupportedModelError, match=text):
            MegatronReplay(model)
