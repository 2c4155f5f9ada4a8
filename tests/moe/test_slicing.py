"""Each property cuts the tokens themselves the same way and compares what lies at them."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import RoutingError
from miles.moe import RoutingTape
from miles.moe.slicing import for_context_parallel, for_pipeline, for_sequence_parallel
from tests.moe.test_tape import tagged_tape, versions
from tests.steps import quick

LENGTHS = st.lists(st.integers(0, 11), min_size=0, max_size=4)


def lay(tape, tokens):
    """ids and versions at the given tokens, None being padding."""
    known = versions(tape)
    hole = torch.full_like(tape.expert_ids[:1], -1)
    ids = [hole if t is None else tape.expert_ids[t : t + 1] for t in tokens]
    return torch.cat([tape.expert_ids[:0], *ids]), [None if t is None else known[t] for t in tokens]


def padded(tokens, multiple):
    return [*tokens, *[None] * (-len(tokens) % multiple)]


def assert_at(part, tape, tokens):
    ids, known = lay(tape, tokens)
    assert torch.equal(part.expert_ids, ids)
    assert versions(part) == known
    assert part.num_experts == tape.num_experts


@quick
@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(1, 6))
def test_sequence_parallel_is_chunks_of_the_tokens(seed, rows, world_size):
    tape = tagged_tape(seed, rows)
    tokens = padded([*range(rows)], world_size)
    size = len(tokens) // world_size
    for rank in range(world_size):
        held = tokens[rank * size : (rank + 1) * size]
        assert_at(for_sequence_parallel(tape, rank, world_size), tape, held)


def zigzag(lengths, rank, world_size):
    """The tokens of a rank, cut out of lists of tokens."""
    held, start = [], 0
    for length in lengths:
        tokens = padded([*range(start, start + length)], 2 * world_size)
        size = len(tokens) // (2 * world_size)
        chunks = [tokens[i * size : (i + 1) * size] for i in range(2 * world_size)]
        held += chunks[rank] + chunks[-1 - rank]
        start += length
    return held


@quick
@given(st.integers(0, 10_000), LENGTHS, st.integers(2, 4))
def test_context_parallel_is_the_zigzag_of_the_tokens(seed, lengths, world_size):
    tape = tagged_tape(seed, sum(lengths))
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    seen = []
    for rank in range(world_size):
        tokens = zigzag(lengths, rank, world_size)
        assert_at(for_context_parallel(tape, cu_seqlens, rank, world_size), tape, tokens)
        seen += [t for t in tokens if t is not None]
    assert sorted(seen) == [*range(len(tape))]


@quick
@given(st.integers(0, 10_000), LENGTHS)
def test_a_group_of_one_holds_the_tape_as_it_is(seed, lengths):
    tape = tagged_tape(seed, sum(lengths))
    assert for_context_parallel(tape, [0, *accumulate(lengths)], 0, 1) == tape
    assert for_sequence_parallel(tape, 0, 1) == tape


@quick
@given(st.integers(0, 10_000), LENGTHS, st.integers(2, 3), st.integers(2, 3))
def test_context_then_sequence_parallel_is_both_cuts_of_the_tokens(seed, lengths, context, tensor):
    tape = tagged_tape(seed, sum(lengths))
    for rank in range(context):
        part = for_context_parallel(tape, [0, *accumulate(lengths)], rank, context)
        tokens = padded(zigzag(lengths, rank, context), tensor)
        size = len(tokens) // tensor
        for inner in range(tensor):
            held = tokens[inner * size : (inner + 1) * size]
            assert_at(for_sequence_parallel(part, inner, tensor), tape, held)


@quick
@given(st.integers(0, 10_000), st.integers(0, 6), st.lists(st.integers(0, 2), max_size=4))
def test_pipeline_is_an_index_of_the_layers(seed, rows, layers):
    tape = tagged_tape(seed, rows)
    part = for_pipeline(tape, layers)
    assert part.num_layers == len(layers)
    assert torch.equal(part.expert_ids, tape.expert_ids[:, layers])
    assert torch.equal(part.recorded_N, tape.recorded_N) and part.spans == tape.spans


@quick
@given(st.integers(0, 10_000), LENGTHS, st.integers(2, 3))
def test_layers_and_tokens_are_cut_in_any_order(seed, lengths, world_size):
    tape, cu_seqlens = tagged_tape(seed, sum(lengths)), [0, *accumulate(lengths)]
    for rank in range(world_size):
        a = for_pipeline(for_context_parallel(tape, cu_seqlens, rank, world_size), [2, 1])
        b = for_context_parallel(for_pipeline(tape, [2, 1]), cu_seqlens, rank, world_size)
        assert a == b


def test_stages_share_memory_with_the_tape_and_travel_as_bytes():
    tape = tagged_tape(rows=9, num_experts=8)
    stage = for_pipeline(tape, range(1, 3))
    assert stage._ids.untyped_storage().data_ptr() == tape._ids.untyped_storage().data_ptr()
    again = RoutingTape.from_bytes(
        stage.to_bytes(), num_layers=2, topk=4, num_experts=8, spans=stage.spans
    )
    assert again == stage == RoutingTape.cat([stage[:4], stage[4:]])


def test_chunks_without_padding_share_memory_with_the_tape():
    tape = tagged_tape(rows=8, holes=False)
    part = for_sequence_parallel(tape, 1, 4)
    assert part._ids.data_ptr() == tape._ids[2:].data_ptr()


def bad_inputs():
    tape = tagged_tape(rows=4)
    for rank in (-1, 2):
        expected = f"rank is {rank} of world_size 2"
        yield expected, "0..1", lambda rank=rank: for_sequence_parallel(tape, rank, 2)
        yield expected, "0..1", lambda rank=rank: for_context_parallel(tape, [0, 4], rank, 2)
    yield "world_size is 0", "1 or more", lambda: for_sequence_parallel(tape, 0, 0)
    for cu in ([], [0, 3], [1, 4], [0, 3, 2, 4], [[0, 4]]):
        yield f"cu_seqlens is {cu}", "0 to 4", lambda cu=cu: for_context_parallel(tape, cu, 0, 2)
    for layer in (-1, 3):
        yield f"[{layer}]", "0..2", lambda layer=layer: for_pipeline(tape, [0, layer])


@pytest.mark.parametrize(("got", "expected", "call"), list(bad_inputs()))
def test_bad_input_says_what_came_and_what_is_wanted(got, expected, call):
    with pytest.raises(RoutingError) as caught:
        call()
    assert got in str(caught.value) and expected in str(caught.value)
