"""An engine whose draft copies from earlier answers: their seeds may come again."""

import asyncio

import pytest

from miles.rollout import Sample
from miles.rollout.speculative import NgramDraft
from tests.models import generate_all, params, serving, tiny
from tests.rollout.test_hf_speculative import Steps, answer

V = 8


def even_model():
    """Every token is as likely as every other."""
    model = tiny("llama", vocab_size=V, num_hidden_layers=1)
    model.lm_head.weight.data.zero_()
    return model


def answers_of_seeds(count: int, prompt, length: int = 4) -> list[Sample]:
    """By an engine without a draft."""
    with serving(even_model(), max_batch=64) as plain:
        wanted = [params(length, seed=seed) for seed in range(count)]
        return generate_all(plain, [prompt] * count, wanted)


def test_an_answer_whose_seed_made_what_is_copied_is_as_the_model_says():
    """Whether a step is plain depends on the earlier answer, and so on the numbers that made it."""
    prompt, count, draft, repeated = [7, 7], 400, NgramDraft(min_ngram=1), 0
    earlier = answers_of_seeds(count, prompt)
    with serving(even_model(), max_batch=1, row_tile=1, draft=draft, draft_steps=1) as engine:
        for seed, before in enumerate(earlier):
            draft.forget()
            draft.remember(before)
            tokens = answer(engine, prompt, params(4, seed=seed)).response_tokens
            repeated += tokens[2] == tokens[1]
    deviation = (count / V * (1 - 1 / V)) ** 0.5
    assert abs(repeated - count / V) < 3 * deviation, repeated  # with the same numbers, 20 of 400


def test_plain_steps_and_a_prompts_end_draw_other_numbers_once_anything_is_remembered():
    prompt, count, draft = [1, 2], 64, NgramDraft()
    earlier = [sample.response_tokens for sample in answers_of_seeds(count, prompt)]
    wanted = [params(4, seed=seed) for seed in range(count)]
    with serving(even_model(), max_batch=64, draft=draft, controller=Steps(0)) as engine:
        prompts = [prompt] * count
        assert [s.response_tokens for s in generate_all(engine, prompts, wanted)] == earlier
        draft.remember(answer(engine, [3, 4], params(2)))
        again = [s.response_tokens for s in generate_all(engine, prompts, wanted)]
        assert [s.response_tokens for s in generate_all(engine, prompts, wanted)] == again
        draft.remember(answer(engine, [3, 4], params(2)))
        later = [s.response_tokens for s in generate_all(engine, prompts, wanted)]
    for others in (earlier, later):
        for place in range(4):  # of 64, an eighth are the same by chance
            same = sum(a[place] == b[place] for a, b in zip(again, others, strict=True))
            assert same < 20


@pytest.mark.parametrize("remembers", [False, True])
def test_a_seed_decides_the_answer_of_a_request_without_a_match_whoever_else_is_there(remembers):
    matched, other, found = [7, 6, 5, 4, 3], [1, 2, 3, 4], []
    for company in (False, True):
        draft = NgramDraft(min_ngram=4)
        with serving(even_model(), max_batch=4, draft=draft, draft_steps=2) as engine:
            greedy = params(8, temperature=0.0)
            if remembers:
                draft.remember(answer(engine, matched, greedy))
            asyncio.run(engine.pause())
            futures = [engine.submit(other, params(6, seed=3))]
            if company:
                futures.append(engine.submit(matched, greedy))
            asyncio.run(engine.resume())
            results = [future.result(60) for future in futures]
        found.append(results[0].response_tokens)
        if company and remembers:
            assert results[1].metadata["speculative"]["num_accepted"] > 0
    assert found[0] == found[1]


def test_what_is_remembered_while_the_draft_proposes_changes_the_numbers_of_that_step():
    draft, events = NgramDraft(), []
    with serving("llama", draft=draft) as engine:
        first = answer(engine, [5, 6], params(6))
        speculation = engine._speculation
        inputs, propose = speculation._inputs, speculation._draft.propose

        def noted(requests, salt):
            events.append(salt)
            return inputs(requests, salt)

        def late(slots, **settings):
            if len(events) == 1:
                draft.remember(first)
            events.append("proposed")
            return propose(slots, **settings)

        speculation._inputs, speculation._draft.propose = noted, late
        answer(engine, [5, 6], params(6))
    salt = draft._salt
    assert salt and events[:5] == [0, "proposed", salt, salt, "proposed"]
