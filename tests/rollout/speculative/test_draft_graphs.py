"""How drafts settle many tokens by graphs, with stand-ins for these."""

import pytest

from tests.rollout.graphs import pretend_graphs
from tests.rollout.speculative.targets import (
    K,
    cached_draft,
    propose,
    random_features,
    tokens,
)


def test_rows_too_long_for_a_graph_are_settled_in_pieces_of_few_shapes(monkeypatch) -> None:
    pretend_graphs(monkeypatch)
    draft, passes = cached_draft("eagle3"), 0
    memory = draft.memory(num_slots=64, max_context=4096)
    settle = memory._steps._settle_graphed

    def counted(*args):
        nonlocal passes
        passes += 1
        return settle(*args)

    monkeypatch.setattr(memory._steps, "_settle_graphed", counted)
    long = [20] * 63 + [4000]  # makes the room
    for several in (long, [3000], [40, 900], [150 + i % 7 for i in range(64)], [70] * 33):
        slots = range(len(several))
        features = [random_features(draft, n - 1) for n in several]
        memory.extend(slots, [tokens(n).tolist() for n in several], [0] * len(slots), features)
    shapes = {(r, w) for step in memory._steps._steps.values() for r, _, w in step.outputs}
    # Of the long ones 32, and of one that is left alone 2,048 and 1,919. 2,999 are 2,048 and 951;
    # 149 to 155 are pieces of 32, up to 27 left; 69 are two of them, 5 left.
    assert shapes == {(1, 2048), (1, 1024), (2, 1024), (64, 32), (48, 8)}
    assert passes == 3 + 2 + 1 + 5 + 3


def test_pieces_of_which_the_last_needs_more_room_are_not_captured_twice(monkeypatch) -> None:
    pretend_graphs(monkeypatch)
    draft = cached_draft("eagle3")
    memory = draft.memory(num_slots=1, max_context=4096)
    memory.extend([0], [tokens(3000).tolist()], [0], [random_features(draft, 2999)])
    [step] = memory._steps._steps.values()
    assert {width for _, _, width in step.outputs} == {2048, 1024}


@pytest.mark.parametrize("num_slots", [1, 15, 33, 48, 80])
def test_graphs_have_room_for_every_slot_at_once(num_slots: int, monkeypatch) -> None:
    pretend_graphs(monkeypatch)
    draft = cached_draft("eagle3")
    memory = draft.memory(num_slots=num_slots, max_context=64)
    for length in (60, 16, 2):
        features = [random_features(draft, length - 1)] * num_slots
        rows = [tokens(length).tolist()] * num_slots
        memory.extend(range(num_slots), rows, [0] * num_slots, features)
    assert propose(memory, range(num_slots)).tokens_RK.shape == (num_slots, K)
