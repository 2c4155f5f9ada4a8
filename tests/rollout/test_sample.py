import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import (
    EmptyBatchError,
    MilesError,
    MissingLogprobError,
    NonFiniteError,
    RewardError,
    RoutingError,
    SettingError,
    ShapeError,
)
from miles.moe import RoutingTape
from miles.rollout import Sample, SamplingParams, Span, Status
from tests.steps import quick


def answered(**changes) -> Sample:
    fields = {
        "tokens": [5, 6, 7],
        "loss_mask": [False, True, True],
        "rollout_logprobs": [math.nan, -0.5, -1.5],
        "spans": [Span(1, 3, 2)],
    }
    return Sample(**(fields | changes))


def tape(rows: int) -> RoutingTape:
    return RoutingTape.unrecorded(rows, num_layers=1, topk=1, num_experts=4)


def test_a_prompt_alone_trains_on_nothing():
    sample = Sample(tokens=[5, 6])
    assert sample.loss_mask == [False, False]
    assert all(math.isnan(x) for x in sample.rollout_logprobs)
    assert (sample.num_prompt_tokens, sample.response_tokens) == (2, [])
    assert (sample.status, sample.reward, sample.weight_versions) == (Status.PENDING, None, [])


def test_append_keeps_every_list_aligned():
    sample = Sample(tokens=[5, 6])
    sample.append([7, 8], logprobs=[-0.1, -2.0], loss_mask=[True, False], weight_version=3)
    sample.append([9], loss_mask=False)
    assert sample.tokens == [5, 6, 7, 8, 9]
    assert sample.loss_mask == [False, False, True, False, False]
    assert sample.rollout_logprobs[2:4] == [-0.1, -2.0] and math.isnan(sample.rollout_logprobs[4])
    assert (sample.num_prompt_tokens, sample.response_tokens) == (2, [7, 8, 9])
    sample.check()


def test_spans_of_one_version_merge_and_split_where_it_changes():
    sample = Sample(tokens=[5])
    for version in (3, 3, 4, 3):
        sample.append([1], logprobs=[-1.0], weight_version=version)
    assert sample.spans == [Span(1, 3, 3), Span(3, 4, 4), Span(4, 5, 3)]
    assert sample.weight_versions == [3, 4]


def test_tokens_that_no_policy_generated_break_a_span():
    sample = Sample(tokens=[5])
    sample.append([1], logprobs=[-1.0], weight_version=3)
    sample.append([2, 2], loss_mask=False)
    sample.append([1], logprobs=[-1.0], weight_version=3)
    assert sample.spans == [Span(1, 2, 3), Span(4, 5, 3)]


def test_appending_nothing_changes_nothing():
    sample = answered()
    sample.append([], logprobs=[], weight_version=9)
    assert sample.tokens == [5, 6, 7] and sample.spans == [Span(1, 3, 2)]


chunks = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.floats(-9, 0)), max_size=4),
        st.none() | st.integers(0, 2),
    ),
    max_size=6,
)


@quick
@given(chunks)
def test_append_in_any_pieces_is_the_whole_and_spans_cover_what_was_generated(chunks):
    sample, rows, versions = Sample(tokens=[5]), [], []
    for chunk, version in chunks:
        tokens, mask, logprobs = zip(*chunk, strict=True) if chunk else ((), (), ())
        sample.append(tokens, logprobs=logprobs, loss_mask=mask, weight_version=version)
        rows += chunk
        versions += [version] * len(chunk)
    sample.check()
    lists = (sample.tokens[1:], sample.loss_mask[1:], sample.rollout_logprobs[1:])
    assert list(zip(*lists, strict=True)) == rows
    covered = [None] * len(rows)
    for span in sample.spans:
        covered[span.start - 1 : span.end - 1] = [span.weight_version] * (span.end - span.start)
    assert covered == versions
    pairs = zip(sample.spans[:-1], sample.spans[1:], strict=True)
    assert all(a.end < b.start or a.weight_version != b.weight_version for a, b in pairs)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (MissingLogprobError, {}),
        (MissingLogprobError, {"logprobs": [-1.0, math.nan]}),
        (NonFiniteError, {"logprobs": [-1.0, -math.inf]}),
        (ShapeError, {"logprobs": [-1.0]}),
        (ShapeError, {"logprobs": [-1.0, -1.0], "loss_mask": [True]}),
    ],
)
def test_append_refuses_what_is_incomplete_and_adds_none_of_it(error, arguments):
    sample = answered()
    with pytest.raises(error):
        sample.append([8, 9], **arguments)
    assert (sample.tokens, len(sample.loss_mask)) == ([5, 6, 7], 3)
    assert (len(sample.rollout_logprobs), sample.spans) == (3, [Span(1, 3, 2)])


def test_the_token_without_a_logprob_is_named():
    with pytest.raises(MissingLogprobError, match="token 4 is trainable and has no log-prob"):
        answered().append([8, 9], logprobs=[-1.0, math.nan])


def test_what_is_not_trained_on_may_hold_any_logprob():
    sample = answered()
    sample.append([8, 9], logprobs=[math.nan, -math.inf], loss_mask=False)
    assert sample.rollout_logprobs[4] == -math.inf


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused_at_any_time(reward):
    sample = answered(reward=1.0)
    with pytest.raises(RewardError, match="expected a finite number, or None"):
        sample.reward = reward
    assert sample.reward == 1.0
    with pytest.raises(RewardError):
        answered(reward=reward)
    sample.reward = None


def test_a_copy_is_independent():
    sample = answered(reward=0.5, status=Status.ABORTED, routing=tape(2), metadata={"a": 1})
    copy = sample.copy()
    assert copy.tokens == sample.tokens and copy.spans == sample.spans
    assert (copy.reward, copy.status, copy.routing) == (0.5, Status.ABORTED, sample.routing)
    copy.append([9], logprobs=[-1.0], weight_version=5)
    copy.metadata["a"] = 2
    copy.reward = None
    assert sample.tokens == [5, 6, 7] and sample.loss_mask == [False, True, True]
    assert len(sample.rollout_logprobs) == 3 and sample.spans == [Span(1, 3, 2)]
    assert (sample.metadata, sample.reward) == ({"a": 1}, 0.5)


def test_the_lists_that_were_passed_in_stay_the_callers():
    tokens = [5, 6]
    Sample(tokens=tokens).append([7], loss_mask=False)
    assert tokens == [5, 6]


def test_statuses_are_their_names_in_lower_case():
    assert [str(status) for status in Status] == [
        "pending",
        "completed",
        "truncated",
        "aborted",
        "failed",
    ]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_routing_has_at_most_a_row_a_token(rows):
    assert len(answered(routing=tape(rows)).routing) == rows


def bad_inputs():
    yield EmptyBatchError, "no token", "at least one", lambda: Sample(tokens=[])
    yield ShapeError, "'loss_mask': 1", "one length", lambda: answered(loss_mask=[False])
    yield ShapeError, "'rollout_logprobs': 1", "one length", lambda: answered(rollout_logprobs=[0])
    mask = [True, True, True]
    yield MissingLogprobError, "token 0", "loss_mask=False", lambda: answered(loss_mask=mask)
    infinite = [math.nan, -0.5, math.inf]
    yield NonFiniteError, "inf", "finite", lambda: answered(rollout_logprobs=infinite)
    for spans in ([Span(1, 4, 0)], [Span(2, 2, 0)], [Span(-1, 2, 0)], [Span(1, 3, 0)] * 2):
        yield ShapeError, str(spans[0]), "in order", lambda spans=spans: answered(spans=spans)
    routing = tape(4)
    yield RoutingError, "4 rows", "at most one a token", lambda: answered(routing=routing)
    yield SettingError, "0", "1 or more", lambda: SamplingParams(max_new_tokens=0)
    for bad in (-1.0, math.nan, math.inf):
        yield (
            SettingError,
            str(bad),
            "positive",
            lambda bad=bad: SamplingParams(max_new_tokens=1, temperature=bad),
        )


@pytest.mark.parametrize(("error", "got", "expected", "call"), list(bad_inputs()))
def test_bad_input_says_what_came_and_what_is_wanted(error, got, expected, call):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, MilesError)
    assert got in str(caught.value) and expected in str(caught.value)


def test_check_finds_what_was_broken_from_outside():
    sample = answered(routing=tape(2))
    sample.tokens.append(1)
    with pytest.raises(ShapeError, match="'tokens': 4"):
        sample.check()
    sample = answered(routing=tape(3))
    for values in (sample.tokens, sample.loss_mask, sample.rollout_logprobs):
        del values[-1]
    sample.spans.clear()
    with pytest.raises(RoutingError, match="3 rows for 2 tokens"):
        sample.check()
