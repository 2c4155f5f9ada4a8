"""What the embedded engine returns: tokens, log-probs, routing, endings. Control: the next file."""

import math
import random
import warnings

import pytest
import torch
import transformers

from miles.errors import (
    EmptyBatchError,
    EngineError,
    PromptTooLongError,
    SettingError,
    StopTokenError,
    UnsupportedModelError,
)
from miles.losses import token_logprobs
from miles.moe import RoutingReplay
from miles.rollout import HFEngine, RolloutEngine, Sample, Span, Status
from miles.rollout._sampling import Draws
from tests.models import VOCAB, generate_all, params, serving, tiny, token_batch

kinds = pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
LENGTHS = [1, 17, 5, 9, 3, 16, 2]
# Between two float32 passes over the same tokens: 2e-5 was seen, since weights this large make
# 1e-7 grow from layer to layer. A wrong temperature, mask or position moves log-probs by 0.1 to 5.
ROUNDING = 1e-4
PROMPTS = [token_batch(1, n, seed=n)[0].tolist() for n in LENGTHS]


def answer(engine: HFEngine, prompt, wanted) -> Sample:
    return engine.submit(prompt, wanted).result(timeout=60)


@kinds
def test_greedy_tokens_are_those_of_transformers(name):
    model = tiny(name)
    with serving(model, max_batch=3) as engine:
        samples = generate_all(engine, PROMPTS, params(20, temperature=0.0))
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert sample.tokens == expected[0].tolist()


@kinds
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_and_routing_are_those_of_a_teacher_forced_pass(name, temperature):
    model = tiny(name)
    with serving(model, max_batch=3) as engine:
        samples = generate_all(engine, PROMPTS, params(20, temperature=temperature))
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([sample.tokens])
        if name == "qwen3_moe":
            with RoutingReplay(model).record() as tape:
                logits_LV = model(ids).logits[0].detach()
            rows = len(sample.tokens) - 1
            assert sample.routing == tape[:-1].with_spans([(0, rows, 0)])
        else:
            logits_LV = model(ids).logits[0].detach()
            assert sample.routing is None
        logprobs = token_logprobs(logits_LV[:-1], ids[0, 1:], temperature=temperature or 1.0)
        got = torch.tensor(sample.rollout_logprobs[len(prompt) :])
        torch.testing.assert_close(got, logprobs[len(prompt) - 1 :], rtol=0, atol=ROUNDING)
        assert got.max() < -1e-3


def test_seeds_that_differ_above_32_bits_draw_other_numbers():
    first = [Draws(seed)[0] for seed in (5, 5 + 2**32, 5 + 2**33, 5 + 2**48)]
    assert len(set(first)) == 4
    generator = torch.Generator().manual_seed(5)
    assert first[0] == torch.rand(1, generator=generator, dtype=torch.float64).item()


def test_a_sample_says_what_was_sampled_with_which_weights_and_seed():
    with serving("qwen3_moe", weight_version=7) as engine:
        sample = answer(engine, [5, 6], params(4, seed=11))
        other = engine.submit([5, 6], params(4, seed=None), request_id="mine").result(60)
        again = answer(engine, [5, 6], params(4, seed=other.metadata["seed"]))
    assert (sample.num_prompt_tokens, len(sample.response_tokens)) == (2, 4)
    assert sample.loss_mask == [False] * 2 + [True] * 4
    assert sample.spans == [Span(2, 6, 7)]
    assert (len(sample.routing), sample.routing.num_layers) == (5, 2)
    assert sample.metadata["seed"] == 11 and sample.metadata["finish_reason"] == "length"
    assert other.metadata["request_id"] == "mine"
    assert again.tokens == other.tokens
    sample.check()


def in_several_ways(engine, prompts, wanted, ways=("alone", "together", "shuffled")):
    """(tokens, log-probs) of every request, each way."""
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    for way in ways:
        if way == "alone":
            samples = [answer(engine, p, w) for p, w in zip(prompts, wanted, strict=True)]
        elif way == "together":
            samples = generate_all(engine, prompts, wanted)
        else:
            mixed = generate_all(engine, [prompts[i] for i in order], [wanted[i] for i in order])
            samples = [mixed[order.index(i)] for i in range(len(prompts))]
        yield [(s.tokens, s.rollout_logprobs[s.num_prompt_tokens :]) for s in samples]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_in_bfloat16_a_seed_decides_every_bit_whoever_else_is_there(name):
    model, prompts = tiny(name, dtype=torch.bfloat16), PROMPTS + PROMPTS[:3]
    wanted = [params(12, seed=100 + i) for i in range(len(prompts))]
    results = []
    for max_batch in (16, 32):
        with serving(model, max_batch=max_batch) as engine:
            results += in_several_ways(engine, prompts, wanted)
    assert all(result == results[0] for result in results[1:])
    assert results[0][0][0] != results[0][-3][0]  # the same prompt with another seed


@kinds
def test_in_float32_a_seed_decides_the_tokens_and_logprobs_to_rounding(name):
    # BLAS picks kernels by the number of rows, so the last bits may differ.
    model, prompts = tiny(name), PROMPTS + PROMPTS[:3]
    wanted = [params(12, seed=100 + i) for i in range(len(prompts))]
    results = []
    # With one slot all are alone, in whatever order they come.
    ways_of = {1: ["shuffled"], 3: ["together", "shuffled"], 32: ["alone", "together"]}
    for max_batch, ways in ways_of.items():
        with serving(model, max_batch=max_batch) as engine:
            results += in_several_ways(engine, prompts, wanted, ways)
    for result in results[1:]:
        for (tokens, logprobs), (expected_tokens, expected) in zip(result, results[0], strict=True):
            assert tokens == expected_tokens
            assert logprobs == pytest.approx(expected, rel=0, abs=ROUNDING)


def assert_drawn_from(tokens: list[int], logits_V) -> None:
    """Chi-square: mean `freedom`, variance twice that; a wrong distribution gives hundreds."""
    drawn_V = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    expected_V = len(tokens) * logits_V.detach().double().softmax(-1)
    often = expected_V >= 5
    observed = torch.cat([drawn_V[often], drawn_V[~often].sum()[None]])
    expected = torch.cat([expected_V[often], expected_V[~often].sum()[None]])
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert freedom > 5 and chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_come_as_often_as_the_softmax_says(temperature):
    model, prompt, count = tiny("llama"), [3, 9], 3000
    with serving(model, max_batch=500) as engine:
        wanted = [params(2, seed=seed, temperature=temperature) for seed in range(count)]
        answers = [s.response_tokens for s in generate_all(engine, [prompt] * count, wanted)]
    firsts = [first for first, _ in answers]
    assert_drawn_from(firsts, model(torch.tensor([prompt])).logits[0, -1] / temperature)
    # The second draw is another number than the first: it does not depend on it but by the token.
    common = max(set(firsts), key=firsts.count)
    seconds = [second for first, second in answers if first == common]
    after_V = model(torch.tensor([[*prompt, common]])).logits[0, -1] / temperature
    assert_drawn_from(seconds, after_V)


def test_endings():
    model, prompt = tiny("llama"), [5, 6]
    with serving(model) as engine:
        plain = answer(engine, prompt, params(8)).response_tokens
        at = next(i for i in range(2, 8) if plain[i] not in plain[:i])
        stop = plain[at]
        stopped = answer(engine, prompt, params(8, stop_token_ids=(stop, 39)))
    assert stopped.response_tokens == plain[: at + 1]
    assert (stopped.status, stopped.metadata["finish_reason"]) == (Status.COMPLETED, "stop")

    for eos in (stop, [39, stop]):
        model.generation_config.eos_token_id = eos
        with serving(model) as engine:
            ended = answer(engine, prompt, params(8))
            ignored = answer(engine, prompt, params(8, ignore_eos=True))
        assert (ended.response_tokens, ended.status) == (plain[: at + 1], Status.COMPLETED)
        assert (ignored.response_tokens, ignored.status) == (plain, Status.TRUNCATED)
        assert ignored.metadata["finish_reason"] == "length"

    with serving(model, eos_token_ids=[]) as engine:
        assert answer(engine, prompt, params(8)).response_tokens == plain
    with serving(model, max_context=5, eos_token_ids=[]) as engine:
        short = answer(engine, prompt, params(8))
    assert short.response_tokens == plain[:3]
    assert (short.status, short.metadata["finish_reason"]) == (Status.TRUNCATED, "length")


@kinds
def test_the_last_token_of_the_context_is_used(name):
    with serving(name) as engine:
        sample = answer(engine, [5] * 60, params(100))
    assert len(sample.tokens) == 64 and sample.status is Status.TRUNCATED


def test_an_answer_that_ends_at_once_frees_its_slot():
    with serving("llama", max_batch=2) as engine:
        samples = generate_all(engine, [[5]] * 5, params(1))
    assert len({tuple(s.tokens) for s in samples}) == 1


@kinds
def test_slots_are_refilled_and_answers_stay_their_own(name):
    # Other lengths end at other times, so requests move between slots.
    wanted = [params(2 + 5 * (i % 4), seed=i) for i in range(len(PROMPTS))]
    with serving(name, max_batch=2) as engine:
        together = generate_all(engine, PROMPTS, wanted)
        alone = [answer(engine, p, w) for p, w in zip(PROMPTS, wanted, strict=True)]
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert [s.routing for s in together] == [s.routing for s in alone]


@kinds
def test_a_request_that_moves_to_a_lower_slot_goes_on_as_before(name):
    with serving(name, max_batch=2) as engine:
        alone = answer(engine, [7, 8, 9], params(30, seed=1))
        engine._set_paused(True)
        engine.submit([5], params(6, seed=0))
        moved = engine.submit([7, 8, 9], params(30, seed=1))
        engine._set_paused(False)
        sample = moved.result(60)
    assert sample.tokens == alone.tokens and sample.routing == alone.routing
    expected = pytest.approx(alone.rollout_logprobs[3:], rel=0, abs=ROUNDING)
    assert sample.rollout_logprobs[3:] == expected


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_cache_grows_with_the_answer_and_keeps_what_it_held(name):
    model = tiny(name, max_position_embeddings=200)
    with serving(model) as engine:
        sample = answer(engine, [5, 6], params(170))
    ids = torch.tensor([sample.tokens])
    expected = token_logprobs(model(ids).logits[0].detach()[:-1], ids[0, 1:])[1:]
    got = torch.tensor(sample.rollout_logprobs[2:])
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)


@kinds
def test_equal_prompts_that_arrive_together_are_processed_once(name):
    model, rows = tiny(name), []
    with serving(model) as engine:
        alone = [answer(engine, [5, 6, 7], params(6, seed=seed)) for seed in range(3)]
        model.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        engine._set_paused(True)
        futures = [engine.submit([5, 6, 7], params(6, seed=seed)) for seed in range(3)]
        engine._set_paused(False)
        samples = [future.result(60) for future in futures]
    assert [s.tokens for s in samples] == [s.tokens for s in alone]
    assert [s.routing for s in samples] == [s.routing for s in alone]
    assert sum(length > 1 for _, length in rows) == 1 and rows[0][0] == 1


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_eager_attention_serves_the_same(name):
    eager = tiny(name)
    eager.set_attn_implementation("eager")
    with serving(name, max_batch=3) as engine:
        expected = generate_all(engine, PROMPTS, params(10))
    with serving(eager, max_batch=3) as engine:
        got = generate_all(engine, PROMPTS, params(10))
    assert [s.tokens for s in got] == [s.tokens for s in expected]


def test_a_model_with_other_state_than_full_attention_says_that_it_is_slow():
    reason = r"Gemma3ForCausalLM runs one request at a time.*DynamicSlidingWindowLayer.*same"
    with pytest.warns(UserWarning, match=reason):
        HFEngine(tiny("gemma3")).close()


def assert_logprobs_of_a_full_pass(model, sample: Sample) -> None:
    ids = torch.tensor([sample.tokens])
    with torch.no_grad():
        expected_T = token_logprobs(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:])
    n = sample.num_prompt_tokens
    got_T = torch.tensor(sample.rollout_logprobs[n:])
    torch.testing.assert_close(got_T, expected_T[n - 1 :], atol=1e-4, rtol=0)


def test_a_model_that_counts_positions_by_its_cache_is_served_right():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=2, encoder_layers=2, decoder_ffn_dim=32,
        decoder_attention_heads=4, max_position_embeddings=64, init_std=0.25,
    )  # fmt: skip
    model = transformers.BartForCausalLM(config)
    with (
        pytest.warns(UserWarning, match="takes no position_ids"),
        serving(model, eos_token_ids=[]) as engine,
    ):
        for sample in generate_all(engine, [[5, 6, 7], [3]], params(8)):
            assert_logprobs_of_a_full_pass(model, sample)


def test_a_long_row_does_not_turn_the_keys_of_the_others():
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "factor": 4.0,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        original_max_position_embeddings=32, rope_parameters=rope, initializer_range=0.3,
        eos_token_id=None, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    prompts = [[5, 6, 7], [1 + i % 20 for i in range(40)]]
    with pytest.warns(UserWarning, match="longrope"), serving(model) as engine:
        for sample in generate_all(engine, prompts, params(8)):
            assert_logprobs_of_a_full_pass(model, sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with serving(model, max_context=32) as engine:  # short factors for all
            assert_logprobs_of_a_full_pass(model, generate_all(engine, prompts[:1], params(8))[0])


def test_routing_is_recorded_on_request():
    with serving("qwen3_moe", record_routing=False) as engine:
        assert not engine.records_routing and answer(engine, [5], params(2)).routing is None
    with serving("qwen3_moe") as engine:
        assert engine.records_routing
    with serving("llama") as engine:
        assert not engine.records_routing
    with pytest.raises(UnsupportedModelError, match="no router"):
        HFEngine(tiny("llama"), record_routing=True)


def test_it_is_a_rollout_engine():
    with serving("llama") as engine:
        assert isinstance(engine, RolloutEngine)


def bad_requests():
    yield PromptTooLongError, "64 tokens and the context 64", [5] * 64, params(1)
    yield StopTokenError, r"\[-1, 40\].*0\.\.39", [5], params(1, stop_token_ids=(40, 3, -1))
    yield EmptyBatchError, "no token", [], params(1)
    yield SettingError, r"\[40, -3\].*0\.\.39", [5, 40, -3], params(1)
    done = Sample(tokens=[5])
    done.append([6, 7], logprobs=[-1.0, -1.0], weight_version=0)
    yield SettingError, "2 generated tokens and max_new_tokens is 2", done, params(2)


@pytest.mark.parametrize(("error", "text", "prompt", "wanted"), list(bad_requests()))
def test_a_bad_request_is_refused_and_the_engine_goes_on(error, text, prompt, wanted):
    with serving("llama") as engine:
        with pytest.raises(error, match=text):
            generate_all(engine, [prompt], wanted)
        assert len(answer(engine, [5], params(2)).response_tokens) == 2


def test_bad_settings_are_refused():
    with pytest.raises(SettingError, match="max_batch is 0"):
        HFEngine(tiny("llama"), max_batch=0)
    with pytest.raises(StopTokenError, match=r"\[99\]"):
        HFEngine(tiny("llama"), eos_token_ids=[99])
    with serving("llama") as engine:
        pass
    with pytest.raises(EngineError, match="closed"):
        engine.submit([5], params(1))
