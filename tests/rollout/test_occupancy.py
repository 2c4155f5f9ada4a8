"""What a controller is told where rows that end leave the batch to shrink."""

import asyncio
import contextlib
import queue
from collections.abc import Iterator, Sequence

import pytest

from miles.errors import SettingError
from miles.rollout import HFEngine, Status, _occupancy
from miles.rollout._occupancy import Occupancy
from tests.models import params, serving, tiny
from tests.rollout.drafts import ScriptedDraft, random_rows


class Resting:
    """A controller that notes what it is told."""

    max_steps = 1

    def __init__(self) -> None:
        self.told: list[tuple[int, list[int] | None]] = []

    def choose(self, batch: int, remaining: Sequence[int] | None = None) -> int:
        self.told.append((batch, None if remaining is None else list(remaining)))
        return 0

    def observe(self, stats) -> None:
        pass


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@contextlib.contextmanager
def resting(model, **more) -> Iterator[tuple[HFEngine, Resting]]:
    controller, draft = Resting(), ScriptedDraft(random_rows())
    with serving(model, draft=draft, controller=controller, draft_steps=1, **more) as engine:
        yield engine, controller


def answer_all(engine: HFEngine, prompts, lengths: Sequence[int]) -> None:
    """Requests that are all there before the first step."""
    asyncio.run(engine.pause())
    each = zip(prompts, lengths, strict=True)
    futures = [engine.submit(prompt, params(n, seed=n)) for prompt, n in each]
    asyncio.run(engine.resume())
    assert all(future.result(60).status is Status.TRUNCATED for future in futures)


def test_where_all_are_there_the_rest_of_each_is_told(model):
    with resting(model, max_batch=3, max_context=12) as (engine, controller):
        answer_all(engine, [[1], [2], [3, 4, 5, 6, 7, 8, 9]], [3, 6, 9])
    assert controller.told[0] == (3, [2, 5, 4])  # the context has no room for more
    assert controller.told[2:] == [(2, [3, 2]), (2, [2, 1]), (1, [1])]


def test_where_requests_wait_nothing_is_told_until_none_does(model):
    with resting(model, max_batch=2) as (engine, controller):
        answer_all(engine, [[1], [2], [3], [4]], [3, 5, 8, 40])
    told = [remaining for _, remaining in controller.told]
    # The first and the second place were refilled, after 2 and 4 steps. The third is left after 9;
    # it is seen in 8 steps that nobody comes.
    last = 9 + _occupancy.PATIENCE - 1
    assert told[:last] == [None] * last
    assert told[last:] == [[n] for n in range(43 - last, 0, -1)]


def test_who_sends_a_request_as_an_answer_comes_keeps_the_engine_full(model):
    lengths = iter([11, 16, 21, 26, 31, 36, 41])
    with resting(model, max_batch=2) as (engine, controller):
        last = queue.SimpleQueue()

        def send(_=None):
            if (length := next(lengths, None)) is None:
                last.put(True)
            else:
                engine.submit([1], params(length)).add_done_callback(send)

        asyncio.run(engine.pause())
        send(), send()
        asyncio.run(engine.resume())
        assert last.get(timeout=60) and last.get(timeout=60)
        told = [remaining for _, remaining in controller.told]
        assert told[:10] == [[n, n + 5] for n in range(10, 0, -1)]
        assert told[10:73] == [None] * 63  # until the fifth answer, and 8 steps of the next
        assert told[-1] == [1]
        answer_all(engine, [[1], [2]], [40, 40])  # none is left of those, so it begins anew
    assert controller.told[-39:] == [(2, [n, n]) for n in range(39, 0, -1)]


class Ending:
    """As much of a request as is looked at."""

    def __init__(self, status: Status = Status.PENDING, stop: Sequence[int] = ()) -> None:
        self.ending, self.stop = (status, ""), frozenset(stop)

    def remaining(self, max_context: int) -> int:
        return 7


def test_requests_that_may_stop_are_told_once_most_run_into_their_length():
    occupancy, own = Occupancy(), Ending(stop=[0])

    def told(*requests):
        return occupancy.remaining(requests, 99, waiting=False)

    assert told(Ending(), Ending()) == [7, 7] and told(Ending(), own) is None
    for status in (Status.ABORTED, Status.FAILED, Status.COMPLETED):
        occupancy.left(Ending(status, stop=[0]), company=False)
    for _ in range(200):  # those without stop tokens tell nothing of the others
        occupancy.left(Ending(Status.TRUNCATED), company=False)
    assert told(own) is None
    for _ in range(_occupancy.ENDINGS):
        occupancy.left(Ending(Status.TRUNCATED, stop=[0]), company=False)
    assert told(own) == [7]
    for _ in range(_occupancy.ENDINGS):
        for status in (Status.ABORTED, Status.FAILED):
            occupancy.left(Ending(status, stop=[0]), company=False)
    assert told(own) == [7]
    for _ in range(_occupancy.ENDINGS):
        occupancy.left(Ending(Status.COMPLETED, stop=[0]), company=False)
    assert told(own) is None


def test_a_batch_that_begins_is_not_one_that_is_refilled():
    occupancy = Occupancy()
    occupancy.came()
    occupancy.came()
    assert occupancy.remaining([Ending()], 99, waiting=False) == [7]
    occupancy.left(Ending(), company=False)
    occupancy.came()
    assert occupancy.remaining([Ending()], 99, waiting=False) == [7]
    occupancy.left(Ending(), company=True)
    occupancy.came()
    assert occupancy.remaining([Ending()], 99, waiting=False) is None
    occupancy.left(Ending(), company=False)
    occupancy.came()
    assert occupancy.remaining([Ending()], 99, waiting=False) == [7]


def test_places_that_are_left_one_after_the_other_do_not_hide_that_nobody_comes():
    occupancy, told = Occupancy(), []
    for _ in range(2):
        occupancy.left(Ending(), company=True)
        occupancy.came()  # so it was refilled
    for step in range(30):
        if step % 3 == 0:
            occupancy.left(Ending(), company=True)
        told.append(occupancy.remaining([Ending()], 99, waiting=False) is not None)
    assert told.index(True) == _occupancy.PATIENCE - 1 and all(told[_occupancy.PATIENCE :])


def test_a_controller_that_cannot_be_told_is_refused(model):
    class Old:
        def choose(self, batch):
            return 0

    with pytest.raises(SettingError, match=r"Old.choose cannot be called as choose\(batch, rem"):
        HFEngine(model, draft=ScriptedDraft(random_rows()), controller=Old(), draft_steps=1)
