import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import (
    EmptyBatchError,
    MilesError,
    MissingLogprobError,
    RoutingError,
    SettingError,
    ShapeError,
)
from miles.moe import RoutingTape
from miles.rollout import Sample, collate
from tests.steps import quick


def answered(prompt: list[int], answer: list[int], routing: list[int] | None = None) -> Sample:
    sample = Sample(tokens=prompt)
    sample.append(answer, logprobs=[-float(token) / 8 for token in answer], weight_version=0)
    if routing is not None:
        sample.routing = RoutingTape(torch.tensor(routing).long()[:, None, None], num_experts=8)
    return sample


def test_everything_is_laid_out_by_prediction():
    batch = collate([answered([1, 2], [3, 4]), answered([5], [6])], group_ids=[3, 1])
    assert batch.input_ids_BL.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets_T.tolist() == [-100, 3, 4, -100, 6, -100, -100, -100]
    assert batch.packed.mask_T.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert batch.packed.seq_ids_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.packed.group_ids_S.tolist() == [3, 1]
    trained = batch.packed.mask_T
    assert batch.rollout_logprobs_T[trained].tolist() == [-3 / 8, -4 / 8, -6 / 8]
    assert batch.rollout_logprobs_T[~trained].isnan().all()
    assert batch.routing is None
    assert batch.routing_required_T.tolist() == [1, 1, 1, 0, 1, 0, 0, 0]


def test_tokens_in_the_middle_that_are_not_trained_on_are_left_out():
    sample = answered([1], [2])
    sample.append([3], loss_mask=False)
    sample.append([4], logprobs=[-0.5], weight_version=0)
    batch = collate([sample])
    assert batch.targets_T.tolist() == [2, -100, 4, -100]
    assert batch.routing_required_T.tolist() == [1, 1, 1, 0]


def test_a_trainable_first_token_has_no_position_to_be_predicted_from():
    sample = Sample(tokens=[1, 2], loss_mask=[True, False], rollout_logprobs=[-1.0, math.nan])
    batch = collate([sample])
    assert not batch.packed.mask_T.any()


def test_a_sample_of_one_token_takes_part():
    batch = collate([Sample(tokens=[1]), answered([1], [2])])
    assert batch.targets_T.tolist() == [-100, -100, 2, -100]
    assert batch.packed.num_seqs == 2 and batch.packed.group_ids_S is None


def test_padding_is_the_callers_token_up_to_a_multiple():
    batch = collate([answered([1, 2], [3])], pad_token_id=9, pad_to_multiple_of=4)
    assert batch.input_ids_BL.tolist() == [[1, 2, 3, 9]]
    assert collate([answered([1, 2], [3])], pad_to_multiple_of=3).input_ids_BL.shape == (1, 3)


def test_dtypes():
    batch = collate([answered([1], [2], [4])], group_ids=[0])
    assert batch.input_ids_BL.dtype == batch.targets_T.dtype == torch.int64
    assert batch.attention_mask_BL.dtype == batch.packed.group_ids_S.dtype == torch.int64
    assert batch.rollout_logprobs_T.dtype == torch.float32
    assert batch.routing_required_T.dtype == torch.bool


def test_routing_is_padded_with_rows_that_say_not_recorded():
    # The last token of an answer is not processed by the engine; a row for it is kept if there.
    samples = [answered([1, 2], [3, 4], [5, 6, 7]), answered([5], [6], [3, 4])]
    batch = collate(samples, pad_to_multiple_of=5)
    ids = batch.routing.expert_ids.flatten().tolist()
    assert ids == [5, 6, 7, -1, -1, 3, 4, -1, -1, -1]
    assert (batch.routing.num_layers, batch.routing.topk, batch.routing.num_experts) == (1, 1, 8)
    assert (batch.routing.recorded_N | ~batch.routing_required_T).all()


samples = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=5)


@quick
@given(samples, st.integers(1, 6))
def test_a_batch_is_its_samples_one_by_one(lengths, multiple):
    made = [
        answered(list(range(1, p + 1)), list(range(7, 7 + a)), [3] * (p + a - 1))
        for p, a in lengths
    ]
    batch = collate(made, pad_to_multiple_of=multiple)
    rows, width = batch.input_ids_BL.shape
    assert rows == len(made) and width % multiple == 0
    for row, sample in enumerate(made):
        alone, n = collate([sample]), len(sample.tokens)
        assert torch.equal(batch.input_ids_BL[row, :n], alone.input_ids_BL[0])
        here = slice(row * width, row * width + n)
        rest = slice(row * width + n, (row + 1) * width)
        assert torch.equal(batch.targets_T[here], alone.targets_T)
        assert (batch.targets_T[rest] == -100).all()
        torch.testing.assert_close(
            batch.rollout_logprobs_T[here], alone.rollout_logprobs_T, rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(batch.routing_required_T[here], alone.routing_required_T)
        assert batch.routing[here] == alone.routing
        assert not batch.routing[rest].recorded_N.any()


def test_to_moves_the_tensors():
    moved = collate([answered([1], [2])]).to("meta")
    tensors = (
        moved.input_ids_BL,
        moved.attention_mask_BL,
        moved.targets_T,
        moved.rollout_logprobs_T,
        moved.packed.mask_T,
    )
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def bad_inputs():
    good = answered([1], [2])
    yield EmptyBatchError, "no sample", "at least one", lambda: collate([])
    yield ShapeError, "2 group_ids for 1", "one each", lambda: collate([good], group_ids=[0, 1])
    yield SettingError, "0", "1 or more", lambda: collate([good], pad_to_multiple_of=0)
    mixed = [answered([1], [2], [3]), good]
    yield RoutingError, "[1]", "all or none", lambda: collate(mixed)
    two_layers = answered([1], [2])
    two_layers.routing = RoutingTape(torch.tensor([[[1], [1]]]), num_experts=8)
    others = [answered([1], [2], [3]), two_layers]
    yield RoutingError, "(2, 1, 8)", "(1, 1, 8)", lambda: collate(others)
    broken = answered([1], [2])
    broken.rollout_logprobs[1] = math.nan
    yield MissingLogprobError, "token 1", "sampled with", lambda: collate([broken])
    longer = answered([1], [2])
    longer.tokens.append(3)
    yield ShapeError, "'tokens': 3", "one length", lambda: collate([longer])


@pytest.mark.parametrize(("error", "got", "expected", "call"), list(bad_inputs()))
def test_bad_input_says_what_came_and_what_is_wanted(error, got, expected, call):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, MilesError)
    assert got in str(caught.value) and expected in str(caught.value)
