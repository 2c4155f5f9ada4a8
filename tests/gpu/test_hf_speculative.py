"""The embedded engine with a draft on a CUDA device: with graphs and without, as on a CPU."""

import copy
import math

import pytest
import torch
from torch import nn

from miles.losses import token_logprobs
from miles.moe import RoutingReplay
from miles.rollout import Sample
from miles.rollout.speculative import Eagle3Draft, NgramDraft, StandaloneDraft
from tests.models import VOCAB, generate_all, params, serving, tiny
from tests.rollout.test_hf_speculative import chi_square

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3], list(range(20))]
DRAFTS = {
    "eagle3": Eagle3Draft.from_target,
    "eagle3 of fewer tokens": lambda model: Eagle3Draft.from_target(
        model, target_ids=torch.arange(0, VOCAB, 2, device="cuda")
    ),
    "another model": lambda model: StandaloneDraft.from_target(
        model, tiny("llama", seed=5, max_position_embeddings=512).cuda()
    ),
    "n-gram": lambda model: NgramDraft(),
}


def on_cuda(family: str, **changes) -> nn.Module:
    return tiny(family, experts="batched_mm", max_position_embeddings=512, **changes).cuda()


def assert_teacher_forced(model, sample: Sample, temperature: float) -> None:
    ids = torch.tensor([sample.tokens], device="cuda")
    n = sample.num_prompt_tokens
    with torch.no_grad():
        if sample.routing is None:
            logits_LV = model(ids).logits[0]
        else:
            with RoutingReplay(model).record() as tape:
                logits_LV = model(ids).logits[0]
            same = sample.routing.expert_ids == tape[: len(sample.tokens) - 1].expert_ids
            assert float(same.double().mean()) > 0.99  # ties of a router go either way
    expected = token_logprobs(logits_LV[:-1], ids[0, 1:], temperature=temperature or 1.0)[n - 1 :]
    gap = torch.tensor(sample.rollout_logprobs[n:]) - expected.cpu()
    assert float(gap.abs().max()) < 1e-3
    sample.check()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", DRAFTS)
def test_greedy_answers_are_those_without_a_draft(family, kind):
    model = on_cuda(family)
    torch.manual_seed(0)
    draft = DRAFTS[kind](model)
    greedy = params(60, temperature=0.0)
    with serving(model, draft=draft) as engine, serving(model) as plain:
        got, expected = (generate_all(e, PROMPTS, greedy) for e in (engine, plain))
        stats = engine.acceptance()
    assert [s.tokens for s in got] == [s.tokens for s in expected]
    assert sum(stats.proposed) > 0


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", DRAFTS)
def test_graphs_give_what_the_launches_one_by_one_give(family, kind):
    """300 tokens: the memory grows on the way, and graphs with it."""
    model = on_cuda(family)
    torch.manual_seed(0)
    draft = DRAFTS[kind](model)
    wanted = [
        params(300 - 40 * i, seed=i, temperature=[0.8, 0.0, 1.0][i % 3])
        for i in range(len(PROMPTS))
    ]
    with (
        serving(model, draft=draft) as engine,
        serving(model, draft=draft, cuda_graphs=False) as plain,
    ):
        got = generate_all(engine, PROMPTS, wanted)
        expected = generate_all(plain, PROMPTS, wanted)
        widths = {width for _, _, width in engine._memory._graphs._graphs}
        assert max(widths) > 1 and plain._memory._graphs is None
        print("graphs:", sorted(engine._memory._graphs._graphs), engine.acceptance().summary())
        print("costs:", engine.step_costs())
    assert [s.tokens for s in got] == [s.tokens for s in expected]
    for sample, how in zip(got, wanted, strict=True):
        assert_teacher_forced(model, sample, how.temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_come_as_often_as_the_model_says(dtype):
    """By graphs, with a draft that proposes from a distribution of its own."""
    model = on_cuda("llama", vocab_size=5, initializer_range=0.2).to(dtype)
    torch.manual_seed(1)
    draft, prompt, count = Eagle3Draft.from_target(model), [3, 1], 4000
    with serving(model, max_batch=256, draft=draft, draft_steps=2) as engine:
        wanted = [params(4, seed=seed, temperature=0.8) for seed in range(count)]
        answers = [s.response_tokens for s in generate_all(engine, [prompt] * count, wanted)]
        stats = engine.acceptance()
    statistic, freedom = chi_square(copy.deepcopy(model).cpu(), prompt, answers, 0.8)
    score = (statistic - freedom) / math.sqrt(2 * freedom)
    print(f"{dtype}: {score:+.2f} deviations, {stats.summary()}")
    assert freedom > 50 and 0.05 < stats.accept_rate < 0.99 and score < 4, score


@pytest.mark.parametrize("alias", [False, True])
def test_graphs_of_verify_passes_use_the_weights_that_were_committed(alias):
    model, other = on_cuda("llama"), on_cuda("llama", seed=1)
    greedy = params(40, temperature=0.0)
    with serving(other) as plain:
        expected = [s.tokens for s in generate_all(plain, PROMPTS, greedy)]
    with serving(model, draft=NgramDraft()) as engine:
        assert [s.tokens for s in generate_all(engine, PROMPTS, greedy)] != expected
        state = other.state_dict()
        weights = {name: state[name].clone() for name in engine.weight_tensors()}
        engine.commit_weights(weights, version=1, alias=alias)
        assert [s.tokens for s in generate_all(engine, PROMPTS, greedy)] == expected
