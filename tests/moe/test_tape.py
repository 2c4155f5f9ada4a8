from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import EmptyBatchError, MilesError, RoutingError
from miles.moe import RoutingTape, routing_agreement
from tests.steps import quick

IDS = torch.tensor([[[0, 1], [2, 3]], [[-1, -1], [-1, -1]], [[3, 0], [1, 2]]])


def random_tape(seed: int = 0, rows: int = 6, num_experts: int = 300, holes: bool = True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, 3, num_experts, generator=generator).argsort(-1)[..., :4]
    if holes:
        ids[torch.rand(rows, generator=generator) < 0.3] = -1
    return RoutingTape(ids, num_experts=num_experts)


def test_one_byte_an_index_up_to_256_experts_and_two_above():
    ids = torch.zeros(5, 2, 3, dtype=torch.int64)
    assert RoutingTape(ids, num_experts=256).nbytes == 5 * 2 * 3
    assert RoutingTape(ids, num_experts=257).nbytes == 2 * 5 * 2 * 3


def test_holes_cost_one_byte_a_row_and_only_where_there_are_some():
    tape = RoutingTape(IDS, num_experts=4)
    assert tape.nbytes == 3 * 2 * 2 + 3
    assert RoutingTape(IDS[::2], num_experts=4).nbytes == 2 * 2 * 2


@pytest.mark.parametrize(("largest", "num_experts"), [(255, 256), (300, 301), (32767, 32768)])
def test_the_largest_id_survives(largest, num_experts):
    tape = RoutingTape(torch.tensor([[[largest, 0]], [[-1, -1]]]), num_experts=num_experts)
    assert tape.expert_ids.tolist() == [[[largest, 0]], [[-1, -1]]]
    assert tape.expert_ids.dtype == torch.int16


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_gives_the_same_tape(dtype):
    whole = IDS[::2]
    assert RoutingTape(whole.to(dtype), num_experts=4) == RoutingTape(whole, num_experts=4)


def test_a_tape_keeps_its_ids_when_the_tensor_it_came_from_changes():
    ids = torch.zeros(2, 1, 1, dtype=torch.uint8)
    tape = RoutingTape(ids, num_experts=4)
    ids.fill_(3)
    assert tape.expert_ids.tolist() == [[[0]], [[0]]]


def test_holes_are_told_apart_from_expert_zero():
    tape = RoutingTape(IDS, num_experts=4)
    assert tape.recorded_N.tolist() == [True, False, True]
    assert torch.equal(tape.expert_ids, IDS.to(torch.int16))
    assert tape != RoutingTape(IDS.clamp(min=0), num_experts=4)


def test_slices_keep_ids_and_holes():
    tape = RoutingTape(IDS, num_experts=4)
    assert torch.equal(tape[1:].expert_ids, IDS[1:].to(torch.int16))
    assert tape[1:].recorded_N.tolist() == [False, True]
    assert tape[:1].recorded_N.tolist() == [True]
    assert len(tape[5:]) == 0
    assert (tape[1:].num_layers, tape[1:].topk, tape[1:].num_experts) == (2, 2, 4)


def test_rows_picks_tokens_in_any_order():
    picked = RoutingTape(IDS, num_experts=4).rows(torch.tensor([2, 1, 2]))
    assert torch.equal(picked.expert_ids, IDS[[2, 1, 2]].to(torch.int16))
    assert picked.recorded_N.tolist() == [True, False, True]


def test_unrecorded_is_all_holes():
    tape = RoutingTape.unrecorded(2, num_layers=3, topk=1, num_experts=8)
    assert tape.expert_ids.tolist() == [[[-1]] * 3] * 2
    assert not tape.recorded_N.any()
    assert len(RoutingTape.unrecorded(0, num_layers=3, topk=1, num_experts=8)) == 0


@quick
@given(st.integers(0, 10_000), st.lists(st.integers(0, 6), max_size=3))
def test_cat_of_slices_is_the_whole(seed, cuts):
    tape = random_tape(seed)
    bounds = [0, *sorted(cuts), len(tape)]
    parts = [tape[low:high] for low, high in pairwise(bounds)]
    assert RoutingTape.cat(parts) == tape


def test_equality_looks_at_ids_order_and_number_of_experts():
    tape = RoutingTape(IDS, num_experts=4)
    assert tape == RoutingTape(IDS.clone(), num_experts=4)
    assert tape != RoutingTape(IDS.flip(-1), num_experts=4)
    assert tape != RoutingTape(IDS, num_experts=5)
    assert tape != tape[1:]
    assert tape != "tape"


@quick
@given(st.integers(0, 10_000))
def test_agreement_ignores_the_order_of_experts(seed):
    tape = random_tape(seed, holes=False)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    shuffled = RoutingTape(tape.expert_ids[..., order], num_experts=300)
    assert routing_agreement(tape, shuffled) == routing_agreement(shuffled, tape) == 1.0


def test_agreement_counts_token_layer_pairs_that_both_recorded():
    other = torch.tensor([[[1, 0], [2, 1]], [[0, 1], [0, 1]], [[3, 0], [2, 1]]])
    a, b = RoutingTape(IDS, num_experts=4), RoutingTape(other, num_experts=4)
    assert routing_agreement(a, b) == 0.75
    holes = RoutingTape.unrecorded(3, num_layers=2, topk=2, num_experts=4)
    with pytest.raises(RoutingError, match="no row is recorded in both"):
        routing_agreement(a, holes)


def test_repr_says_the_sizes():
    assert repr(RoutingTape(IDS, num_experts=4)) == (
        "RoutingTape(tokens=3, layers=2, topk=2, num_experts=4, not_recorded=1)"
    )


def bad_inputs():
    def tape(ids, num_experts=4):
        return RoutingTape(torch.tensor(ids), num_experts=num_experts)

    good = tape([[[0, 1]]])
    yield RoutingError, "(2,)", "[num_tokens, num_moe_layers, topk]", lambda: tape([0, 1])
    yield RoutingError, "float32", "integers", lambda: tape([[[0.0]]])
    yield RoutingError, "bool", "integers", lambda: tape([[[True]]])
    yield RoutingError, "num_experts is 0", "1 to 32768", lambda: tape([[[0]]], 0)
    yield RoutingError, "num_experts is 40000", "1 to 32768", lambda: tape([[[0]]], 40000)
    yield RoutingError, "token 1, layer 0: expert ids [4]", "0..3", lambda: tape([[[0]], [[4]]])
    yield RoutingError, "[-2]", "0..3", lambda: tape([[[-2]]])
    yield RoutingError, "token 0, layer 1", "whole row", lambda: tape([[[0, 1], [-1, -1]]])
    yield RoutingError, "[1, -1]", "whole row", lambda: tape([[[1, -1]]])
    yield EmptyBatchError, "no tape", "at least one", lambda: RoutingTape.cat([])
    for other in (tape([[[0]]]), tape([[[0, 1], [0, 1]]]), tape([[[0, 1]]], 5)):
        pair = [good, other]
        yield RoutingError, "tape 1", "(1, 2, 4)", lambda pair=pair: RoutingTape.cat(pair)
    yield RoutingError, "(1, 1, 2)", "same tokens", lambda: routing_agreement(good, good[1:])


@pytest.mark.parametrize(("error", "got", "expected", "call"), list(bad_inputs()))
def test_bad_input_says_what_came_and_what_is_wanted(error, got, expected, call):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, MilesError)
    assert got in str(caught.value) and expected in str(caught.value)
