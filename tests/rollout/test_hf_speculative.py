"""The embedded engine with a draft: the same answers, log-probs and routing, in fewer passes."""

import asyncio
import gc
import itertools
import math
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from miles.losses import token_logprobs
from miles.moe import RoutingReplay
from miles.rollout import HFEngine, Sample, Status, _speculation
from miles.rollout._sampling import uniforms
from miles.rollout.speculative import Eagle3Draft, SpeculativeStats
from miles.rollout.speculative.draft import FINAL
from tests.models import VOCAB, generate_all, params, serving, tiny, token_batch
from tests.rollout.drafts import ScriptedDraft, half_right_rows, oracle_rows, random_rows

kinds = pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
LENGTHS = [1, 17, 5, 9, 3]
PROMPTS = [token_batch(1, n, seed=n)[0].tolist() for n in LENGTHS]
ROUNDING = 1e-4  # between two float32 passes, as in test_hf_engine


def answer(engine: HFEngine, prompt, wanted) -> Sample:
    return engine.submit(prompt, wanted).result(timeout=60)


def drafts_for(name: str) -> dict[str, ScriptedDraft]:
    model = tiny(name)
    return {
        "random": ScriptedDraft(random_rows()),
        "oracle": ScriptedDraft(oracle_rows(model)),
        "half right": ScriptedDraft(half_right_rows(model), feature_layers=(0, FINAL)),
        "point": ScriptedDraft(half_right_rows(model), point=True),
    }


def assert_teacher_forced(model, sample: Sample, temperature: float = 1.0) -> None:
    """Its log-probs and routing are those of one pass over its tokens."""
    ids = torch.tensor([sample.tokens])
    n = sample.num_prompt_tokens
    with torch.no_grad():
        if sample.routing is None:
            logits_LV = model(ids).logits[0]
        else:
            with RoutingReplay(model).record() as tape:
                logits_LV = model(ids).logits[0]
            rows = len(sample.tokens) - 1
            assert torch.equal(sample.routing.expert_ids, tape[:rows].expert_ids)
            assert [tuple(span) for span in sample.routing.spans] == [(0, rows, 0)]
    expected = token_logprobs(logits_LV[:-1], ids[0, 1:], temperature=temperature or 1.0)[n - 1 :]
    got = torch.tensor(sample.rollout_logprobs[n:])
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    sample.check()


@kinds
@pytest.mark.parametrize("kind", ["random", "oracle", "half right", "point"])
def test_greedy_answers_are_those_without_a_draft(name, kind):
    greedy = [params(11 + 3 * i, temperature=0.0) for i in range(len(PROMPTS))]
    draft = drafts_for(name)[kind]
    with serving(name, max_batch=3, draft=draft) as engine, serving(name, max_batch=3) as plain:
        got = generate_all(engine, PROMPTS, greedy)
        expected = generate_all(plain, PROMPTS, greedy)
        stats = engine.acceptance()
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tokens == theirs.tokens and ours.routing == theirs.routing
        assert ours.spans == theirs.spans and ours.status is theirs.status
        n = ours.num_prompt_tokens
        gap = torch.tensor(ours.rollout_logprobs[n:]) - torch.tensor(theirs.rollout_logprobs[n:])
        assert float(gap.abs().max()) < ROUNDING
    assert stats.num_tokens == sum(len(s.response_tokens) - 1 for s in got)
    if kind == "oracle":
        assert stats.accept_rate == 1
    else:
        assert 0 < stats.accept_rate < 1 or kind == "random"


@kinds
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_draft_that_is_the_model_is_always_right(name, temperature):
    model = tiny(name)
    draft = ScriptedDraft(oracle_rows(tiny(name)))
    with serving(model, draft=draft, draft_steps=4) as engine:
        samples = generate_all(
            engine, PROMPTS, [params(21, seed=i, temperature=temperature) for i in range(5)]
        )
        stats = engine.acceptance()
    # One token comes with the prompt, then four times five.
    for sample in samples:
        assert sample.metadata["speculative"] == {
            "num_verify_steps": 4, "num_proposed": 16, "num_accepted": 16, "num_tokens": 20,
        }  # fmt: skip
        assert_teacher_forced(model, sample, temperature)
    assert stats.accept_length == 5 and stats.accept_rate_by_position == (1, 1, 1, 1)
    assert stats.num_verify_steps == 20


@kinds
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("point", [False, True])
def test_logprobs_and_routing_are_the_models_own(name, temperature, point):
    model = tiny(name)
    draft = ScriptedDraft(half_right_rows(tiny(name)), point=point)
    wanted = [params(9 + 4 * i, seed=i, temperature=temperature) for i in range(5)]
    with serving(model, max_batch=3, draft=draft) as engine:
        samples = generate_all(engine, PROMPTS, wanted)
        stats = engine.acceptance()
    for sample in samples:
        assert_teacher_forced(model, sample, temperature)
    assert stats.accepted[0] > 0 and 0.05 < stats.accept_rate < 0.95


def chi_square(model, prompt, answers, temperature: float) -> tuple[float, int]:
    """Of the joint of all tokens after the first, given the first, against the model's own."""
    vocab = model.config.vocab_size
    num = len(answers[0])
    firsts = [a[0] for a in answers]
    statistic, freedom = 0.0, 0
    for first in set(firsts):
        prefixes = torch.tensor(list(itertools.product(range(vocab), repeat=num - 2)))
        prefixes = prefixes.reshape(vocab ** (num - 2), num - 2)
        start = torch.tensor([*prompt, first]).expand(len(prefixes), -1)
        ids = torch.cat([start, prefixes], 1)
        with torch.no_grad():
            logits = model(ids).logits[:, len(prompt) :].double() / temperature
        logp = logits.log_softmax(-1)
        before = logp[:, :-1].gather(-1, prefixes[..., None])[..., 0].sum(1)
        joint = (before[:, None] + logp[:, -1]).exp().flatten()  # index: base `vocab` digits
        torch.testing.assert_close(joint.sum(), torch.tensor(1.0).double())
        rest = [a[1:] for a in answers if a[0] == first]
        cells = [sum(t * vocab**i for i, t in enumerate(reversed(r))) for r in rest]
        observed = torch.bincount(torch.tensor(cells), minlength=len(joint)).double()
        expected = joint * len(rest)
        often = expected >= 5
        observed = torch.cat([observed[often], observed[~often].sum()[None]])
        expected = torch.cat([expected[often], expected[~often].sum()[None]])
        used = expected > 0
        statistic += float(((observed - expected)[used] ** 2 / expected[used]).sum())
        freedom += int(used.sum()) - 1
    return statistic, freedom


def lossy(logits_RKV, tokens_RK, probs_RKV, *, uniforms_RU, **others):
    """Accepts a little too often."""
    return verify(logits_RKV, tokens_RK, probs_RKV, uniforms_RU=uniforms_RU * 0.8, **others)


verify = _speculation.verify_chain


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize(("name", "cheats"), [("llama", 0), ("llama", 1), ("qwen3_moe", 0)])
def test_answers_come_as_often_as_the_model_says(name, point, cheats, monkeypatch):
    """Four tokens of a vocabulary of five; the draft knows nothing. A lossy verdict is seen."""
    if cheats:
        monkeypatch.setattr(_speculation, "verify_chain", lossy)
    model, prompt, count = tiny(name, vocab_size=5, initializer_range=0.2), [3, 1], 2500
    draft = ScriptedDraft(random_rows(seed=1, vocab=5), point=point)
    with serving(model, max_batch=500, draft=draft, draft_steps=2) as engine:
        wanted = [params(4, seed=seed, temperature=0.8) for seed in range(count)]
        answers = [s.response_tokens for s in generate_all(engine, [prompt] * count, wanted)]
        stats = engine.acceptance()
    statistic, freedom = chi_square(model, prompt, answers, 0.8)
    score = (statistic - freedom) / math.sqrt(2 * freedom)
    assert freedom > 50 and 0.05 < stats.accept_rate < 0.9
    assert score > 8 if cheats else score < 4, score  # without a fault, -2 to 2


class Steps:
    """A controller that goes through these numbers again and again."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.batches, self.seen = itertools.cycle(numbers), [], []

    def choose(self, batch: int, remaining: Sequence[int] | None = None) -> int:
        self.batches.append(batch)
        return next(self.numbers)

    def observe(self, stats) -> None:
        self.seen.append(stats)


def hidden_states(model, tokens: list[int]) -> list[torch.Tensor]:
    """Outputs of layers 1 and 0 and of the final norm, `[N, D]` each."""
    outputs: dict[nn.Module, torch.Tensor] = {}
    modules = [model.model.layers[1], model.model.layers[0], model.model.norm]
    handles = [m.register_forward_hook(lambda m, _, out: outputs.update({m: out})) for m in modules]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return [outputs[module][0] for module in modules]


@kinds
def test_the_draft_gets_the_features_of_every_token_whatever_the_steps(name):
    """Prompts that share a pass, plain steps, verify passes of every length, requests that move."""
    model = tiny(name)
    draft = ScriptedDraft(half_right_rows(tiny(name)), feature_layers=(1, 0, FINAL))
    prompts = [*PROMPTS, PROMPTS[2], PROMPTS[2]]
    wanted = [params(6 + 4 * (i % 4), seed=i) for i in range(len(prompts))]
    steps = Steps(3, 0, 1, 0, 0, 2)
    with serving(model, max_batch=4, row_tile=1, draft=draft, controller=steps) as engine:
        samples = generate_all(engine, prompts, wanted)
        stats = engine.acceptance()
    called = [what for what, _ in draft.used.calls]
    assert {"extend", "propose", "move", "free"} == set(called) and not draft.used.tokens
    assert max(steps.batches) == 4 and sum(steps.seen, type(stats)()) == stats
    first, *others = (SpeculativeStats(**s.metadata["speculative"]) for s in samples)
    assert sum(others, first) == stats.summary()
    assert {k for what, (_, *more) in draft.used.calls for k in more} == {1, 2, 3}
    assert len(draft.used.ended) == len(samples)
    texts = {tuple(s.tokens): s for s in samples}
    for tokens, features_NF in draft.used.ended:
        [sample] = [s for text, s in texts.items() if list(text[: len(tokens)]) == tokens]
        assert len(tokens) >= len(sample.tokens) - 10
        expected = torch.cat(hidden_states(model, tokens), -1)[:-1]
        torch.testing.assert_close(features_NF, expected, rtol=0, atol=ROUNDING)
        assert_teacher_forced(model, sample)


def test_a_draft_without_features_is_given_none():
    draft = ScriptedDraft(random_rows())
    with serving("llama", draft=draft) as engine:
        answer(engine, [5, 6], params(8))
        assert engine._memory.features is None
    assert draft.used.ended[0][1] is None


@kinds
def test_a_draft_that_is_off_is_not_called_and_answers_have_the_bits_of_an_engine_without_one(name):
    """Requests come while it is off, move, and leave, two of them at the end of the context, one
    with its first token."""
    draft = ScriptedDraft(random_rows(), feature_layers=(0, FINAL))
    prompts = [*PROMPTS, PROMPTS[1]]
    news = [11, 200, 1, 200, 16, 11]
    wanted = [params(new, seed=i, temperature=i % 2) for i, new in enumerate(news)]
    sizes = {"max_batch": 4, "row_tile": 1, "max_context": 45}
    with (
        serving(name, draft=draft, controller=Steps(0), **sizes) as engine,
        serving(name, **sizes) as plain,
    ):
        results = []
        for one in (engine, plain):  # with the same company in each step
            asyncio.run(one.pause())
            futures = [one.submit(p, w) for p, w in zip(prompts, wanted, strict=True)]
            asyncio.run(one.resume())
            results.append([future.result(60) for future in futures])
        got, expected = results
        stats = engine.acceptance()
    assert [s.tokens for s in got] == [s.tokens for s in expected]
    for ours, theirs in zip(got, expected, strict=True):
        start = ours.num_prompt_tokens
        assert ours.rollout_logprobs[start:] == theirs.rollout_logprobs[start:]
    assert [s.routing for s in got] == [s.routing for s in expected]
    assert [s.spans for s in got] == [s.spans for s in expected]
    assert stats.num_verify_steps == stats.num_tokens and not stats.proposed
    assert stats.num_tokens == sum(len(s.response_tokens) - 1 for s in got)
    for sample in got:
        counts = sample.metadata["speculative"]
        assert counts["num_verify_steps"] == counts["num_tokens"] == len(sample.response_tokens) - 1
    assert draft.used.calls == []  # it was never asked, so it was never told


def test_answers_of_a_draft_that_was_off_are_not_held():
    draft = ScriptedDraft(random_rows(), feature_layers=(0, FINAL))
    steps = Steps(*[0] * 4, *[1] * 20)
    with serving("llama", max_batch=4, draft=draft, controller=steps) as engine:
        asyncio.run(engine.pause())
        futures = [engine.submit([5, 6], params(5, seed=seed)) for seed in range(4)]
        asyncio.run(engine.resume())
        given_away = [weakref.ref(future.result(60)) for future in futures]
        del futures
        observe, held = steps.observe, []
        steps.observe = lambda stats: (
            gc.collect(), held.append(sum(one() is not None for one in given_away)), observe(stats)
        )  # fmt: skip
        answer(engine, [5, 6], params(9))
    assert steps.seen[3].num_tokens == 4 and steps.seen[3].proposed == ()
    assert steps.seen[5].proposed == (1,)
    assert held[1] <= 1  # the engine's loop has the last that ended, until another does


@kinds
@pytest.mark.parametrize("most", [8192, 12])
def test_a_draft_that_is_on_again_knows_all_or_begins_anew_after_a_gap(name, most, monkeypatch):
    """Of what was kept of three requests, of which one came while it was off."""
    monkeypatch.setattr(_speculation, "MAX_WAITING", most)
    model = tiny(name)
    draft = ScriptedDraft(half_right_rows(tiny(name)), feature_layers=(1, 0, FINAL))
    steps = Steps(2, *[0] * 20, 2, 1)
    sizes: list[int] = []
    with serving(model, max_batch=2, draft=draft, controller=steps) as engine:
        observe = steps.observe
        steps.observe = lambda stats: (
            sizes.append(sum(one.size for one in engine._speculation._untold._passes[1:])),
            observe(stats),
        )
        samples = generate_all(engine, [[5] * 9, [6], [7, 8]], [params(40), params(17), params(38)])
    for sample in samples:
        assert_teacher_forced(model, sample)
    if most == 12:
        assert 0 < max(sizes[3:18]) < 12  # and the pass that the last 12 begin in
    told = {tuple(tokens[-6:]): (tokens, features) for tokens, features in draft.used.ended}
    gaps = 0
    for sample in samples:
        # What it was told last of: all of the answer, but what the last step settled.
        ends = [n for n in range(len(sample.tokens) + 1) if tuple(sample.tokens[:n][-6:]) in told]
        for end in ends:
            tokens, features = told[tuple(sample.tokens[:end][-6:])]
            assert sample.tokens[end - len(tokens) : end] == tokens
            expected = torch.cat(hidden_states(tiny(name), sample.tokens), -1)
            kept = expected[end - len(tokens) : end - 1]
            torch.testing.assert_close(features[-len(kept) :], kept, rtol=0, atol=ROUNDING)
            gaps += len(tokens) < end
    assert gaps == 0 if most == 8192 else gaps > 0


def test_a_draft_that_is_on_again_proposes_what_one_that_was_always_on_proposes():
    """Greedy answers are the same whatever the draft, so places can be compared."""
    model = tiny("llama")
    torch.manual_seed(3)
    draft = Eagle3Draft.from_target(model)
    proposed: list[dict[tuple[int, ...], int]] = []
    for numbers in ([1], [0] * 25 + [1] * 40):
        with serving(model, max_batch=2, draft=draft, controller=Steps(*numbers)) as engine:
            memory, seen = engine._speculation._draft, {}
            propose = memory.propose

            def noted(slots, propose=propose, engine=engine, seen=seen, **settings):
                proposal = propose(slots, **settings)
                for row, slot in enumerate(slots):
                    tokens = tuple(engine._active[slot].sample.tokens)
                    seen[tokens] = int(proposal.tokens_RK[row, 0])
                return proposal

            memory.propose = noted
            wanted = [params(45, temperature=0.0), params(45, temperature=0.0)]
            generate_all(engine, [PROMPTS[1], PROMPTS[2]], wanted)
        proposed.append(seen)
    always, again = proposed
    common = always.keys() & again.keys()
    assert len(common) >= 25 and all(always[tokens] == again[tokens] for tokens in common)
    assert min(map(len, again)) > 25 and len(set(again.values())) > 5


@kinds
def test_a_seed_decides_the_answer_whoever_else_is_there(name):
    draft = ScriptedDraft(half_right_rows(tiny(name)))
    wanted = [params(14, seed=i) for i in range(len(PROMPTS))]
    results = []
    for max_batch in (1, 2, 8):
        with serving(name, max_batch=max_batch, draft=draft) as engine:
            results.append([s.tokens for s in generate_all(engine, PROMPTS, wanted)])
            results.append(
                [s.tokens for s in generate_all(engine, PROMPTS[::-1], wanted[::-1])][::-1]
            )
    assert all(result == results[0] for result in results)
    with serving(name, draft=draft) as engine:
        others = [params(14, seed=10 + i) for i in range(len(PROMPTS))]
        assert [s.tokens for s in generate_all(engine, PROMPTS, others)] != results[0]


@pytest.mark.parametrize("limit", range(1, 9))
def test_max_new_tokens_cuts_inside_what_was_accepted(limit):
    model = tiny("qwen3_moe")
    draft = ScriptedDraft(oracle_rows(tiny("qwen3_moe")))
    with serving(model, draft=draft) as engine:
        sample = answer(engine, [5, 6], params(limit))
    assert len(sample.response_tokens) == limit and sample.status is Status.TRUNCATED
    assert_teacher_forced(model, sample)
    stats = sample.metadata["speculative"]
    assert stats["num_tokens"] == limit - 1
    # Nothing is proposed that could not be kept.
    assert stats["num_proposed"] == stats["num_accepted"]


@kinds
def test_a_stop_token_cuts_inside_what_was_accepted(name):
    model = tiny(name)
    draft = ScriptedDraft(oracle_rows(tiny(name)))
    with serving(model, draft=draft, draft_steps=5) as engine:
        whole = answer(engine, [5, 6], params(12))
        plain = whole.response_tokens
        at = [i for i in range(12) if plain[i] not in plain[:i]]
        for i in at:
            stopped = answer(engine, [5, 6], params(12, stop_token_ids=(plain[i],)))
            assert stopped.response_tokens == plain[: i + 1]
            assert (stopped.status, stopped.metadata["finish_reason"]) == (Status.COMPLETED, "stop")
            assert_teacher_forced(model, stopped)
    assert len(at) > 6


@kinds
@pytest.mark.parametrize("kind", ["random", "oracle", "point"])
def test_the_whole_context_is_used_and_not_more(name, kind):
    model, draft = tiny(name), drafts_for(name)[kind]
    with serving(model, max_batch=4, draft=draft, max_context=30) as engine:
        samples = generate_all(
            engine, [[5] * n for n in (29, 28, 27, 26, 25, 12)], params(100, temperature=0.0)
        )
        assert draft.used.max_context == 30
    for sample in samples:
        assert len(sample.tokens) == 30 and sample.status is Status.TRUNCATED
        assert_teacher_forced(model, sample, 0.0)


def test_positions_that_are_learned_are_never_read_beyond_their_table():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    draft = ScriptedDraft(random_rows())
    with serving(model, max_batch=2, draft=draft, draft_steps=6) as engine:
        # The long one is at the end while the pass is as wide as the short one needs.
        samples = generate_all(engine, [[5], [6] * 17], params(100))
    assert [len(s.tokens) for s in samples] == [24, 24]
    for sample in samples:
        assert_teacher_forced(model, sample)


@kinds
def test_the_eager_attention_serves_the_same(name):
    eager = tiny(name)
    eager.set_attn_implementation("eager")
    results = []
    for model in (tiny(name), eager):
        draft = ScriptedDraft(half_right_rows(tiny(name)))
        with serving(model, max_batch=3, draft=draft) as engine:
            results.append([s.tokens for s in generate_all(engine, PROMPTS, params(10))])
    assert results[0] == results[1]


@given(
    seeds=st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=3),
    step=st.integers(0, 2**20),
    count=st.integers(1, 17),
)
def test_uniforms_are_numbers_of_the_place_alone(seeds, step, count):
    numbers = uniforms(seeds, [step] * len(seeds), count)
    assert set(numbers.flatten()).isdisjoint(uniforms(seeds, [step], count, salt=-5).flatten())
    assert numbers.shape == (len(seeds), count) and numbers.dtype == "float64"
    assert ((numbers >= 0) & (numbers < 1)).all()
    for row, seed in zip(numbers, seeds, strict=True):
        assert (uniforms([seed], [step], count)[0] == row).all()
        for other in (1, count, count + 2):  # an engine with fewer or more draft tokens goes on
            later = uniforms([seed] * 3, [step + 1, step + 2, step + other], other)
            assert set(row).isdisjoint(later.flatten())


def test_uniforms_are_uniform_and_know_nothing_of_each_other():
    numbers = torch.from_numpy(uniforms(range(400), range(400), 100)).double()
    deviation = (numbers.flatten().sort().values - torch.linspace(0, 1, 40000)).abs().max()
    assert float(deviation) < 1.63 / 200  # Kolmogorov-Smirnov, 1 %
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(7, 1)):
        assert abs(float((centred * other).mean())) * 12 < 4 / 200
