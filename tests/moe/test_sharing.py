from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import EmptyBatchError, RoutingError
from miles.moe import RoutingTape, share_prefix, storage_bytes
from miles.moe.slicing import for_pipeline
from tests.moe.test_tape import random_tape, tagged_tape, versions
from tests.steps import quick

ROW = 3 * 4 * 2  # bytes of a row of `random_tape`: three layers, four experts, two bytes an index


def group(prompt: RoutingTape, *rows: int) -> list[RoutingTape]:
    """Tapes with the same first rows, each in memory of its own."""
    return [
        RoutingTape.cat([prompt, random_tape(seed, n, holes=False)]) for seed, n in enumerate(rows)
    ]


def test_rows_of_the_prompt_are_kept_once():
    tapes = group(random_tape(7, 20, holes=False), 5, 0, 9)
    assert storage_bytes(tapes) == (3 * 20 + 14) * ROW == sum(tape.nbytes for tape in tapes)
    shared = share_prefix(tapes, 20)
    assert storage_bytes(shared) == (20 + 14) * ROW
    assert [tape.nbytes for tape in shared] == [25 * ROW, 20 * ROW, 29 * ROW]
    assert shared == tapes


def test_the_tapes_that_were_shared_need_not_live_on():
    tapes = group(random_tape(7, 20, holes=False), 5, 9)
    before = {part[0].untyped_storage().data_ptr() for tape in tapes for part in tape._parts}
    after = {
        part[0].untyped_storage().data_ptr()
        for tape in share_prefix(tapes, 20)
        for part in tape._parts
    }
    assert not before & after


def test_rows_that_differ_stay_with_their_own_answer():
    prompt, other = random_tape(7, 6, holes=False), random_tape(8, 6, holes=False)
    ids = prompt.expert_ids
    ids[2, 1] = ids[2, 1].flip(-1)  # the same set in another order is another row
    flipped = RoutingTape(ids, num_experts=300)
    tapes = [*group(prompt, 1), *group(other, 2), *group(prompt, 3), *group(flipped, 1)]
    shared = share_prefix(tapes, 6)
    assert shared == tapes
    assert storage_bytes(shared) == (3 * 6 + 7) * ROW


@quick
@given(st.integers(0, 10_000), st.integers(0, 6))
def test_holes_and_spans_stay_those_of_each(seed, num_rows):
    prompt = tagged_tape(seed)
    tapes = [
        RoutingTape.cat([prompt, tagged_tape(seed + 1)]),
        RoutingTape.cat([prompt.with_spans([(0, 6, 9)]), tagged_tape(seed + 2)]),
        tagged_tape(seed + 3),
    ]
    assert share_prefix(tapes, num_rows) == tapes


def test_storage_bytes_counts_what_a_slice_keeps_alive():
    tape = random_tape(rows=10, holes=False)
    assert storage_bytes([tape[:1]]) == storage_bytes([tape, tape[3:]]) == 10 * ROW
    assert storage_bytes([tape[:1].copy()]) == ROW and storage_bytes([]) == 0
    assert storage_bytes([random_tape(rows=10)]) == 10 * ROW + 10


def test_a_prompt_longer_than_a_tape_is_refused():
    with pytest.raises(RoutingError, match="tape 1 has 3 rows; expected at least num_rows=4"):
        share_prefix([random_tape(rows=5), random_tape(rows=3)], 4)
    with pytest.raises(RoutingError, match="num_rows=-1"):
        share_prefix([random_tape(rows=5)], -1)
    assert share_prefix([], 3) == []


def in_parts(seed: int, cuts: list[int]) -> tuple[RoutingTape, RoutingTape]:
    """A tape, and the same in parts that were cut at `cuts`."""
    tape = tagged_tape(seed)
    bounds = [0, *sorted(cuts), len(tape)]
    parts = [tape[low:high].copy() for low, high in pairwise(bounds)]
    return tape, RoutingTape.cat(parts, copy=False)


CUTS = st.lists(st.integers(0, 6), max_size=3)


@quick
@given(st.integers(0, 10_000), CUTS, st.slices(6).filter(lambda cut: (cut.step or 1) > 0))
def test_a_tape_in_parts_is_the_tape(seed, cuts, cut):
    tape, parts = in_parts(seed, cuts)
    assert parts == tape and len(parts) == 6 and versions(parts) == versions(tape)
    assert torch.equal(parts.recorded_N, tape.recorded_N)
    assert parts[cut] == tape[cut] and parts.to_bytes() == tape.to_bytes()
    index = torch.tensor([5, 0, 3])
    assert parts.rows(index) == tape.rows(index)
    assert for_pipeline(parts, [2, 0]) == for_pipeline(tape, [2, 0])
    assert RoutingTape.pad([parts, tape], 7) == RoutingTape.pad([tape, parts], 7)
    assert RoutingTape.cat([parts, parts[2:]]) == RoutingTape.cat([tape, tape[2:]])
    assert parts.with_num_experts(400) == tape.with_num_experts(400)


@quick
@given(st.integers(0, 10_000), CUTS)
def test_a_tape_in_parts_is_saved_as_one(tmp_path_factory, seed, cuts):
    tape, parts = in_parts(seed, cuts)
    parts.save(path := tmp_path_factory.mktemp("tape") / "tape.safetensors")
    assert RoutingTape.load(path) == tape


def test_cat_copies_unless_told_not_to():
    a, b = random_tape(0, 4, holes=False), random_tape(1, 5, holes=False)
    assert storage_bytes([a, b, RoutingTape.cat([a, b], copy=False)]) == 9 * ROW
    assert storage_bytes([a, b, RoutingTape.cat([a, b])]) == 18 * ROW
    slices = RoutingTape.cat([a, b], copy=False)[3:5]
    assert slices == RoutingTape.cat([a, b])[3:5] and storage_bytes([a, b, slices]) == 9 * ROW
    with pytest.raises(EmptyBatchError, match="no tape"):
        RoutingTape.cat([], copy=False)
