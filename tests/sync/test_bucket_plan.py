"""How a collection of tensors is cut into buckets, and how pieces are told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import SyncError
from miles.sync._bucket_plan import Layout, runs, shares, unpack
from miles.sync._checksum import BLOCK


def where(**sizes: int) -> Layout:
    return Layout({name: ((size,), torch.uint8) for name, size in sizes.items()})


def test_neighbours_in_the_layout_are_one_run():
    layout = where(a=5, b=BLOCK + 1, c=0)
    pieces = [(0, 0, 5), (1, 0, BLOCK + 1), (2, 0, 0)]
    assert list(runs(pieces, layout)) == [(0, 3 * BLOCK)]
    assert list(runs(pieces[::-1], layout)) == [(BLOCK, 3 * BLOCK), (0, BLOCK)]


def test_a_collection_is_cut_into_buckets_and_told_in_runs():
    layout = where(a=5, b=0, c=3 * BLOCK, d=7)
    cut = shares([0, 1, 2, 3], layout, 2 * BLOCK)
    assert [(share.first, share.pieces) for share in cut] == [
        (0, [(0, 0, 5), (1, 0, 0), (2, 0, BLOCK)]),
        (2, [(2, BLOCK, 2 * BLOCK)]),
        (3, [(3, 0, 7)]),
    ]
    assert [share.packed for share in cut] == [
        [[0, 0, 3, BLOCK]],
        [[2, BLOCK, 1, 3 * BLOCK]],
        [[3, 0, 1, 7]],
    ]
    assert [share.in_place.block_N.tolist() for share in cut] == [[0, 1, 1], [2], [4]]
    assert [share.in_slab.block_N.tolist() for share in cut] == [[0, 1, 1], [0], [0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=8), st.randoms(), st.integers(1, 4))
def test_every_byte_travels_once_in_any_order(sizes, random, blocks):
    layout = where(**{f"t{i}": size for i, size in enumerate(sizes)})
    order = list(range(len(sizes)))
    random.shuffle(order)
    seen = {number: [] for number in order}
    for share in shares(order, layout, blocks * BLOCK):
        assert list(unpack(share.packed, layout)) == share.pieces
        assert sum(-(-count // BLOCK) for _, _, count in share.pieces) <= blocks
        for number, start, count in share.pieces:
            seen[number] += range(start, start + count)
    assert seen == {number: list(range(sizes[number])) for number in order}


@pytest.mark.parametrize("run", [[3, 0, 1, 5], [-1, 0, 1, 5], [0, 0, 0, 5], [1, 0, 3, 5]])
def test_tensors_that_the_engine_has_not_are_refused(run):
    with pytest.raises(SyncError, match="the engine has no such tensor: it has 3"):
        list(unpack([run], where(a=5, b=6, c=7)))
