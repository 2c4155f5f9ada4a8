"""What is kept for a draft that is not asked, beside a list for each owner."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout._features import UntoldFeatures

OWNERS = "abcd"
some = st.lists(st.sampled_from(OWNERS), unique=True)
events = st.one_of(
    st.tuples(st.just("again"), st.integers(1, 6)),
    st.tuples(st.just("pass"), st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(1, 3)))),
    st.tuples(st.just("take"), some),
    st.tuples(st.just("leave"), some),
)


class Lists:
    """The same, by the book: the tokens that each owner has not taken."""

    def __init__(self) -> None:
        self.kept = UntoldFeatures()
        self.untold: dict[str, list[int]] = {}
        self.next = 0

    def add(self, owners: dict[str, tuple[int, int]]) -> None:
        width = max(count for _, count in owners.values())
        rows = len(owners)
        features_BLF = self.next + torch.arange(rows * width).reshape(rows, width, 1)
        self.next += rows * width
        self.kept.add(features_BLF, owners)
        for owner, (row, count) in owners.items():
            self.untold.setdefault(owner, []).extend(features_BLF[row, :count, 0].tolist())

    def take(self, owners: list[str]) -> list[list[int]]:
        return [part[:, 0].tolist() for part in self.kept.take(owners)]


def check(lists: Lists, events, most: int) -> None:
    owners = {"a": (0, 1), "b": (1, 1)}
    lists.add(owners)
    for what, given_ in events:
        there = [owner for owner in lists.untold if owner in given_] if what != "again" else []
        if what == "again":
            for _ in range(given_):
                if owners.keys() <= lists.untold.keys():  # an engine's rows are of who is there
                    lists.add(owners)
        elif what == "pass" and given_:
            counts = dict(given_)
            owners = {owner: (row, counts[owner]) for row, owner in enumerate(counts)}
            lists.add(owners)
            owners = {owner: (row, 1) for owner, (row, _) in owners.items()}
        elif what == "take" and there and lists.kept._passes:
            for owner, got in zip(there, lists.take(there), strict=True):
                untold = lists.untold[owner]
                recent = [token for token in untold if token >= lists.next - most]
                assert got == untold[len(untold) - len(got) :]
                assert got[len(got) - len(recent) :] == recent
                lists.untold[owner] = []
        elif what == "leave":
            for owner in there:
                lists.kept.forget(owner)
                del lists.untold[owner]
        lists.kept.drop_beyond(most)
        assert lists.kept.size == sum(one.size for one in lists.kept._passes)
        assert lists.kept.size == 0 or any(lists.untold.values())
        assert lists.kept.size < most + max([0, *(one.size for one in lists.kept._passes)])


@settings(max_examples=300)
@given(st.lists(events, max_size=30))
def test_every_owner_gets_each_of_its_tokens_once_and_in_order(events):
    check(Lists(), events, most=10**9)


@settings(max_examples=300)
@given(st.lists(events, max_size=30), st.integers(1, 20))
def test_of_what_is_dropped_the_last_tokens_stay(events, most):
    check(Lists(), events, most)


def test_an_owner_without_any_gets_none_and_one_that_was_never_told_of_too():
    lists = Lists()
    lists.add({"a": (0, 2), "b": (1, 1)})
    assert lists.take(["a"]) == [[0, 1]]
    assert lists.take(["a", "z", "b"]) == [[], [], [2]]


@pytest.mark.parametrize("leaves", ["a", "b"])
def test_a_pass_stays_while_an_owner_of_an_earlier_one_waits(leaves):
    lists = Lists()
    lists.add({"a": (0, 1), "b": (1, 1)})
    lists.add({"a": (0, 1)})
    lists.kept.forget(leaves)
    assert lists.kept.size == 3
    lists.kept.forget("b" if leaves == "a" else "a")
    assert lists.kept.size == 0
