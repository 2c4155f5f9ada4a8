"""CUDA graphs of an engine's passes: prompts that come one by one, and memory that graphs share."""

import time

import pytest
import torch

from miles.rollout._graph import StepGraphs
from miles.rollout.speculative import Eagle3Draft
from tests.models import VOCAB, params, serving, tiny, token_batch

LENGTHS = [1, 17, 5, 40, 33, 16, 300, 90]
PROMPTS = [token_batch(1, n, seed=n)[0].tolist() for n in LENGTHS]


def one_by_one(engine):
    wanted = [params(6, seed=i, temperature=0.8 * (i % 2)) for i in range(len(PROMPTS))]
    pairs = zip(PROMPTS, wanted, strict=True)
    return [engine.submit(*pair).result(timeout=120) for pair in pairs]


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_prompts_one_by_one_are_read_by_graphs(family, attention, drafting):
    model = tiny(
        family, experts="batched_mm", max_position_embeddings=512, attn_implementation=attention
    ).cuda()
    torch.manual_seed(0)
    settings = {"draft": Eagle3Draft.from_target(model)} if drafting else {}
    with serving(model, **settings) as engine, serving(model, cuda_graphs=False, **settings) as one:
        for _ in range(3):  # as it is, captured, replayed
            got, expected = one_by_one(engine), one_by_one(one)
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.tokens == theirs.tokens and ours.routing == theirs.routing
                gap = torch.tensor(ours.rollout_logprobs) - torch.tensor(theirs.rollout_logprobs)
                assert float(gap[~gap.isnan()].abs().max()) < 1e-4
        shapes = set(engine._memory._prefills._graphs)
        assert {(1, 1, 32), (1, 1, 64), (1, 1, 96), (1, 1, 384)} == shapes
        if drafting:
            assert engine.acceptance() == one.acceptance()
            steps = engine._speculation._draft._steps._steps
            assert max(shape[2] for step in steps.values() for shape in step._graphs) == 384


def test_graphs_share_memory_and_give_what_the_step_gives():
    held = torch.arange(2.0, device="cuda")

    def step(rows, keys, width):
        values = held[1] * torch.ones(rows, 2**20, device="cuda")
        return values.cumsum(0) * keys, (values[:, ::2] * width)[:, 1:], None

    graphs, shapes = StepGraphs(step), [(rows, 3, 5) for rows in range(30, 0, -1)]
    for shape in shapes:  # as it is
        graphs(*shape)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for shape in shapes:  # captured; those after the largest need no more than it has
        graphs(*shape)
    grown = (torch.cuda.memory_reserved() - before) / 2**20
    print(f"{len(shapes)} graphs hold {grown:.0f} MiB; their results have 2790")
    assert grown < 1000
    for value, (rows, keys, width) in enumerate(reversed(shapes)):  # replayed
        held.fill_(value)
        sums, others, none = graphs(rows, keys, width)
        every = torch.arange(1.0, rows + 1, device="cuda")[:, None].expand(rows, 2**20)
        assert torch.equal(sums, every * value * keys)
        assert others.shape == (rows, 2**19 - 1) and bool((others == value * width).all())
        assert none is None


def test_milliseconds_of_a_prompt():
    """Printed: one prompt of 64 tokens, 30 layers."""
    model = tiny("llama", num_hidden_layers=30, hidden_size=576, intermediate_size=1536).cuda()
    model = model.to(torch.bfloat16)
    prompt = [i % VOCAB for i in range(50)]
    for cuda_graphs in (True, False):
        with serving(model, cuda_graphs=cuda_graphs) as engine:
            for _ in range(5):
                engine.submit(prompt, params(1)).result(timeout=120)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                engine.submit(prompt, params(1)).result(timeout=120)
            taken = (time.perf_counter() - start) / 20 * 1e3
        print(f"graphs {cuda_graphs}: {taken:.2f} ms a prompt")
