"""Drafts that are copied: from the request itself, and from earlier answers."""

import itertools
import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import EmptyBatchError, SettingError, ShapeError
from miles.rollout import Sample
from miles.rollout.speculative import Draft, NgramDraft

tokens_of = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def begun(draft: NgramDraft, *runs, num_slots: int = 4):
    memory = draft.memory(num_slots=num_slots, max_context=64)
    memory.extend(range(len(runs)), runs, [0] * len(runs), None)
    return memory


def proposed(memory, *slots, num_steps: int = 3) -> list[list[int]]:
    """Without the filling."""
    proposal = memory.propose(
        slots, num_steps=num_steps, temperatures=[1.0] * len(slots),
        uniforms_RK=torch.zeros(len(slots), num_steps, dtype=torch.float64),
    )  # fmt: skip
    assert proposal.probs_RKV is None and proposal.tokens_RK.dtype == torch.int64
    assert proposal.tokens_RK.shape == (len(slots), num_steps)
    rows = proposal.tokens_RK.tolist()
    return [row[:n] for row, n in zip(rows, proposal.lengths, strict=True)]


def answered(prompt, answer) -> Sample:
    sample = Sample(tokens=list(prompt))
    sample.append(answer, logprobs=[-1.0] * len(answer), weight_version=0)
    return sample


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),  # the run (1, 2) stood before
        ([1, 2, 9, 5, 2, 8, 1, 2], [9, 5, 2]),  # the longer run, not the later place
        ([7, 1, 7, 2, 7], [2, 7, 2]),  # of equal runs the latest; on into the copy
        ([5, 6, 5, 6, 5], [6, 5, 6]),  # a period goes on
        ([4, 4], [4, 4, 4]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_literals(tokens, expected):
    assert proposed(begun(NgramDraft(), tokens), 0) == [expected]


def naive(tokens, num_steps, longest, shortest):
    for n in range(min(longest, len(tokens)), shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                out = list(tokens)
                for _ in range(num_steps):
                    out.append(out[end + len(out) - len(tokens)])
                return out[len(tokens) :]
    return []


@given(tokens_of, st.integers(1, 6), st.integers(1, 4), st.data())
def test_it_finds_what_a_search_of_all_places_finds(tokens, num_steps, longest, data):
    shortest = data.draw(st.integers(1, longest))
    draft = NgramDraft(max_ngram=longest, min_ngram=shortest)
    expected = naive(tokens, num_steps, longest, shortest)
    assert proposed(begun(draft, tokens), 0, num_steps=num_steps) == [expected]


@given(tokens_of, st.data())
def test_settled_bit_by_bit_is_as_good_as_at_once(tokens, data):
    once, parts = begun(NgramDraft(), tokens), None
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)))) | {len(tokens)})
    parts = begun(NgramDraft(), tokens[: cuts[0]])
    for start, end in itertools.pairwise(cuts):
        parts.extend([0], [tokens[start - 1 : end]], [start - 1], None)
    assert proposed(once, 0) == proposed(parts, 0)


def test_requests_do_not_see_each_other_and_keep_their_slots_apart():
    memory = begun(NgramDraft(), [1, 2, 1], [2, 3, 2], [4, 5])
    assert proposed(memory, 2, 1, 0) == [[], [3, 2, 3], [2, 1, 2]]
    memory.free(0)
    memory.move(1, 0)
    assert proposed(memory, 0) == [[3, 2, 3]]
    memory.extend([1, 0], [[6, 6], [2, 9, 2]], [0, 2], None)
    assert proposed(memory, 1, 0) == [[6, 6, 6], [9, 2, 9]]
    memory.extend([0], [[8]], [0], None)  # begins anew
    assert proposed(memory, 0) == [[]]


def test_rows_without_a_match_are_filled_and_say_so():
    memory = begun(NgramDraft(), [1, 2], [3, 3])
    proposal = memory.propose(
        [0, 1], num_steps=2, temperatures=[0.0, 1.0],
        uniforms_RK=torch.zeros(2, 2, dtype=torch.float64),
    )  # fmt: skip
    assert proposal.tokens_RK.tolist() == [[0, 0], [3, 3]] and proposal.lengths == (0, 2)
    assert proposed(memory, num_steps=2) == [] and proposed(memory, 1, num_steps=0) == [[]]


def test_earlier_answers_to_the_prompt_are_copied_from_their_first_token():
    draft = NgramDraft()
    draft.remember(answered([1, 2, 3], [9, 8, 7, 6]))
    memory = begun(draft, [1, 2, 3, 9], [1, 2, 4, 9])
    assert proposed(memory, 0, 1) == [[8, 7, 6], []]  # another prompt has no answers
    assert proposed(memory, 0, num_steps=5) == [[8, 7, 6]]  # an answer ends where it ends
    memory.extend([0], [[9, 5]], [3], None)
    assert proposed(memory, 0) == [[]]  # off the earlier answer
    memory.extend([0], [[5, 7]], [4], None)
    assert proposed(memory, 0) == [[6]]  # and on it again


def test_answers_remembered_while_a_request_runs_are_used():
    draft = NgramDraft()
    memory = begun(draft, [1, 2, 9])
    assert proposed(memory, 0) == [[]]
    draft.remember(answered([1, 2], [9, 8]))
    assert proposed(memory, 0) == [[8]]
    draft.remember(answered([1, 2], [9, 7]))
    assert proposed(memory, 0) == [[7]]  # the newest first
    draft.forget()
    assert proposed(memory, 0) == [[]]


def test_the_longer_match_wins_over_where_it_stands():
    draft = NgramDraft()
    draft.remember(answered([1, 2], [9, 8, 5]))
    memory = begun(draft, [1, 2, 8, 4, 9, 8])
    assert proposed(memory, 0, num_steps=1) == [[5]]  # (9, 8) there, only (8,) here
    memory = begun(draft, [1, 2, 9, 8, 4, 9, 8])
    assert proposed(memory, 0, num_steps=1) == [[4]]  # (9, 8) in both: the request's own


def test_old_answers_and_prompts_go():
    draft = NgramDraft(answers_per_prompt=2, max_prompts=2)
    for last in (4, 5, 6):
        draft.remember(answered([1, 2], [last, last + 10]))
    memory = begun(draft, [1, 2, 4], [1, 2, 5], [1, 2, 6])
    assert proposed(memory, 0, 1, 2) == [[], [15], [16]]
    draft.remember(answered([3], [4, 5]))
    draft.remember(answered([8], [4, 6]))  # the third prompt
    memory = begun(draft, [1, 2, 6], [3, 4], [8, 4])
    assert proposed(memory, 0, 1, 2) == [[], [5], [6]]


def test_the_longest_prompt_that_fits_is_the_request_s():
    draft = NgramDraft()
    draft.remember(answered([1], [2, 3, 9, 9]))
    draft.remember(answered([1, 2], [3, 4]))
    assert proposed(begun(draft, [1, 2, 3]), 0) == [[4]]


def test_answers_may_come_from_another_thread():
    draft = NgramDraft(max_prompts=8)
    memory = begun(draft, [1, 2, 3])
    errors = []

    def feed():
        rng = random.Random(0)
        try:
            for _ in range(300):
                draft.remember(answered([1, rng.randrange(12)], [3, rng.randrange(9)]))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=feed)
    thread.start()
    while thread.is_alive():
        memory.extend([1], [[1, 2, 3]], [0], None)
        proposed(memory, 0, 1)
    thread.join()
    assert not errors


def test_it_is_a_draft_that_reads_tokens_only():
    assert isinstance(NgramDraft(), Draft) and NgramDraft().feature_layers == ()


def test_bad_settings_are_refused():
    with pytest.raises(SettingError, match="min_ngram is 3 and max_ngram 2"):
        NgramDraft(max_ngram=2, min_ngram=3)
    with pytest.raises(SettingError, match="min_ngram is 0"):
        NgramDraft(min_ngram=0)
    with pytest.raises(SettingError, match="answers_per_prompt is 0"):
        NgramDraft(answers_per_prompt=0)
    with pytest.raises(SettingError, match="num_slots is 0"):
        NgramDraft().memory(num_slots=0, max_context=4)
    with pytest.raises(EmptyBatchError, match="nothing to remember"):
        NgramDraft().remember(Sample(tokens=[1, 2]))


def test_bad_calls_are_refused():
    memory = NgramDraft().memory(num_slots=2, max_context=4)
    memory.extend([0], [[1, 2]], [0], None)
    with pytest.raises(SettingError, match="slot 1 holds no request"):
        proposed(memory, 1)
    with pytest.raises(SettingError, match="slot 2 does not exist"):
        memory.extend([2], [[1]], [0], None)
    with pytest.raises(ShapeError, match=r"from position 2 on; expected .* last one, 2 at 1"):
        memory.extend([0], [[3]], [2], None)
    with pytest.raises(ShapeError, match="last one, 2 at 1"):
        memory.extend([0], [[7, 3]], [1], None)
    with pytest.raises(SettingError, match="holds 5 tokens; expected at most max_context, 4"):
        memory.extend([0], [[2, 3, 4, 5]], [1], None)
    with pytest.raises(ShapeError, match="1 slots, 2 runs"):
        memory.extend([0], [[1], [2]], [0], None)
    memory.extend([1], [[1]], [0], None)
    with pytest.raises(SettingError, match="slot 1 holds a request; expected a free"):
        memory.move(0, 1)
    with pytest.raises(SettingError, match="slot 5 does not exist"):
        memory.move(0, 5)
