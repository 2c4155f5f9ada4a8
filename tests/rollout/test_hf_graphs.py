"""The embedded engine as it runs on a GPU, with stand-ins for CUDA graphs: shapes and memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import EngineError, NonFiniteError
from miles.rollout import _kv
from miles.rollout._features import FeatureTap
from miles.rollout._graph import StepGraphs, coarse, power_of_two
from miles.rollout.speculative import Eagle3Draft
from tests.models import generate_all, params, serving, tiny, token_batch
from tests.rollout.graphs import pretend_graphs

LENGTHS = [1, 17, 5, 9, 33, 16, 2, 40]
PROMPTS = [token_batch(1, n, seed=n)[0].tolist() for n in LENGTHS]
PROMPTS += PROMPTS[2:4] * 2  # groups, which share a row
ROUNDING = 1e-4  # between two float32 passes, as in test_hf_engine


@pytest.fixture
def graphed(monkeypatch):
    pretend_graphs(monkeypatch)


def run(model, *, max_batch, apart, **settings):
    """Answers and the engine's memory; `apart`: one request after the other."""
    wanted = [params(9, seed=i, temperature=[0.8, 0.0][i % 2]) for i in range(len(PROMPTS))]
    draft = settings.get("draft")
    with serving(model, max_batch=max_batch, **settings) as engine:
        if apart:
            pairs = zip(PROMPTS, wanted, strict=True)
            samples = [engine.submit(*pair).result(timeout=60) for pair in pairs]
        else:
            samples = generate_all(engine, PROMPTS, wanted)
        stats = None if draft is None else engine.acceptance()
        return samples, stats, engine._memory


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("drafting", [False, True])
def test_answers_are_those_of_an_engine_without_graphs(
    name, apart, attention, drafting, monkeypatch
):
    model = tiny(name, experts="batched_mm", attn_implementation=attention)
    torch.manual_seed(0)
    settings = {"draft": Eagle3Draft.from_target(model)} if drafting else {}
    settings |= {"max_batch": 5, "apart": apart}
    expected, expected_stats, _ = run(model, cuda_graphs=False, **settings)
    with monkeypatch.context() as patch:
        pretend_graphs(patch)
        got, stats, memory = run(model, **settings)
    assert memory._prefills.outputs and memory._graphs.outputs
    assert stats == expected_stats
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tokens == theirs.tokens and ours.routing == theirs.routing
        logprobs = [torch.tensor(s.rollout_logprobs) for s in (ours, theirs)]
        torch.testing.assert_close(*logprobs, rtol=0, atol=ROUNDING, equal_nan=True)


def test_long_and_many_prompts_are_read_without_a_graph(graphed, monkeypatch):
    monkeypatch.setattr(_kv, "GRAPH_TOKENS", 64)
    model = tiny("llama")
    for apart in (False, True):
        _, _, memory = run(model, max_batch=12, apart=apart)
        shapes = list(memory._prefills.outputs)
        assert bool(shapes) == apart
        assert all(rows * width <= 64 for rows, _, width in shapes)


def test_a_draft_adds_a_shape_of_each_kind_and_no_more_at_the_ends_of_answers(graphed):
    model = tiny("llama", max_position_embeddings=256)
    draft = Eagle3Draft.from_target(model)
    wanted = [params(20 + i, seed=i, temperature=1.0) for i in range(len(PROMPTS))]
    with serving(model, max_batch=5, draft=draft, draft_steps=3) as engine:
        generate_all(engine, PROMPTS, wanted)
        assert {width for _, _, width in engine._memory._graphs.outputs} <= {1, 4}
        steps = engine._speculation._draft._steps._steps
    shapes = {key: list(step.outputs) for key, step in steps.items()}
    proposed = [shape for (what, *_), held in shapes.items() if what == "propose" for shape in held]
    settled = [shape for (what, *_), held in shapes.items() if what == "settle" for shape in held]
    assert proposed == [(16, 256, 3)]  # whoever is in which slot
    assert {width for _, _, width in settled} <= {4, 8, 16, 32, 64}


def test_what_a_pass_read_stays_when_the_next_one_runs(graphed):
    """A draft that rests is told later."""
    model = tiny("llama")
    memory = _kv.SlotMemory(
        model, None, num_slots=4, max_context=64, row_tile=1, cuda_graphs=True,
        tap=FeatureTap(model, (0,)),
    )  # fmt: skip
    with torch.no_grad():
        memory.prefill([[1]], [[3]])  # makes the room
        logits, _ = memory.prefill([[1, 2, 3]], [[0, 1]])
        features = memory.features
        held = logits.clone(), features.clone()
        memory.prefill([[4, 5] * 10], [[2]])
    assert torch.equal(logits, held[0]) and torch.equal(features, held[1])
    assert logits.isfinite().all() and features.shape[0] == 1


def test_prompts_as_long_as_the_context(graphed):
    model = tiny("llama")
    prompt = token_batch(1, 35, seed=1)[0].tolist()
    with serving(model, max_context=36) as engine:
        sample = engine.submit(prompt, params(4, temperature=0.0)).result(timeout=60)
        assert set(engine._memory._prefills.outputs) == {(1, 1, 36)}
    assert sample.tokens[35] == int(model(torch.tensor([prompt])).logits[0, -1].argmax())


def test_new_weights_and_more_room_are_captured_anew(graphed):
    with serving(tiny("llama", max_position_embeddings=512)) as engine:

        def shapes(length):
            engine.submit([1] * length, params(2)).result(timeout=60)
            return set(engine._memory._prefills.outputs)

        shapes(3)  # makes the room
        assert shapes(3) == {(1, 1, 32)}
        assert shapes(40) == {(1, 1, 32), (1, 1, 64)}
        weights = {name: t.clone() for name, t in engine.weight_tensors().items()}
        engine.commit_weights(weights, version=1, alias=True)
        assert shapes(3) == {(1, 1, 32)}
        assert shapes(300) == {(1, 1, 384)}  # it moved before that pass


def test_graphs_are_forgotten_when_any_layer_moves(graphed, monkeypatch):
    """Without memory for one of them the others have grown already."""
    reserve, short = _kv.SlotLayer.reserve, [0]

    def scarce(layer, length):
        if layer is short[0] and length > layer.num_keys:
            raise torch.OutOfMemoryError("none left")
        reserve(layer, length)

    monkeypatch.setattr(_kv.SlotLayer, "reserve", scarce)
    with serving(tiny("llama", max_position_embeddings=512)) as engine:

        def answer(length):
            return engine.submit([1] * length, params(2)).result(timeout=60)

        answer(3)
        short[0] = engine._memory._layers[1]
        with pytest.raises(EngineError, match="none left"):
            answer(300)
        answer(3)
        held = engine._memory._prefills.outputs
        assert set(held) == {(1, 1, 32)}
        short[0] = None
        assert answer(300).num_generated_tokens == 2
        assert set(engine._memory._prefills.outputs) == {(1, 1, 384)}


def test_a_shape_whose_first_run_failed_is_not_captured(monkeypatch):
    """It may still have to make room, which no capture should hold."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)  # a capture would need it
    failing = [True]

    def step(rows, keys, width):
        if failing.pop():
            raise torch.OutOfMemoryError("none left")
        return torch.ones(rows), None, None

    graphs = StepGraphs(step)
    with pytest.raises(torch.OutOfMemoryError):
        graphs(1, 2, 3)
    failing.append(False)
    assert graphs(1, 2, 3)[0].tolist() == [1]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_slot_that_held_nan_serves_the_next_request(graphs, monkeypatch):
    if graphs:
        pretend_graphs(monkeypatch)
    model, other = tiny("llama"), tiny("llama")
    wanted = [params(6, seed=i) for i in range(3)]
    with serving(other) as engine:
        expected = [s.tokens for s in generate_all(engine, [[1, 2], [3], [4, 5]], wanted)]
    with serving(model, max_batch=3, row_tile=1) as engine:
        good = {name: t.clone() for name, t in engine.weight_tensors().items()}
        spoilt = {name: torch.full_like(t, torch.nan) for name, t in good.items()}
        engine.commit_weights(spoilt, version=1)
        for length in (40, 30, 35):
            with pytest.raises(NonFiniteError):
                engine.submit([1] * length, params(2)).result(timeout=60)
        with engine._between_steps():  # all three slots, and one that others move into
            engine._memory._spoilt.update(range(3))
        engine.commit_weights(good, version=2)
        got = generate_all(engine, [[1, 2], [3], [4, 5]], wanted)
        assert [s.tokens for s in got] == expected
        assert not engine._memory._spoilt


def test_who_moves_into_a_slot_that_held_nan_is_not_spoilt():
    memory = _kv.SlotMemory(
        tiny("llama"), None, num_slots=2, max_context=64, row_tile=1, cuda_graphs=False
    )
    with torch.no_grad():
        memory.prefill([[1] * 40, [1, 2]], [[0], [1]])
        for layer in memory._layers:
            for rectangle in layer._rectangles:
                rectangle[0] = torch.nan
        memory.free(0, spoilt=True)
        memory.move(1, 0, 2)
        logits, _ = memory.decode([0], [3], [2])
    assert logits.isfinite().all()


@given(length=st.integers(1, 4096))
def test_coarse_lengths_are_few_and_near(length):
    assert length <= coarse(length) < max(length + 32, 1.5 * length)
    assert coarse(coarse(length)) == coarse(length) and coarse(length) % 32 == 0
    assert power_of_two(length) // 2 < length <= power_of_two(length)


def test_there_are_ten_coarse_lengths_up_to_a_thousand():
    assert len({coarse(length) for length in range(1, 1025)}) == 10
