"""The trainer's side of a broadcast to servers, where NCCL itself would wait for ever."""

import socket
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from miles.errors import SyncError
from miles.sync import SGLangSyncer, _sglang_group
from miles.sync._sglang_group import Group
from miles.sync._sglang_push import Queue, Sent
from tests.sync.test_sglang import Server, free_port, same, weights


class Standstill:
    """A group whose first broadcast returns when all have called, as NCCL's does."""

    def __init__(self):
        self.all_came = threading.Event()
        self.aborted = False

    def broadcast(self, tensors, options):
        self.all_came.wait(10)
        raise RuntimeError("the network is down")

    def abort(self):
        self.aborted = True


@pytest.fixture
def standstill():
    made = Standstill()
    yield made
    made.all_came.set()


@pytest.fixture
def group(monkeypatch, standstill):
    monkeypatch.setattr(_sglang_group, "join", lambda *args, **options: standstill)
    return Group(dist.HashStore(), size=2, name="weights", backend="gloo", timeout=0.2)


def test_servers_that_never_come_are_an_error_in_time(group, standstill):
    with pytest.raises(SyncError, match=r"took more than 0\.2 s.*NCCL_CUMEM_ENABLE"):
        group.finish(group.broadcast(torch.zeros(4, dtype=torch.uint8)), [Future()])
    group.close()  # waits for nobody
    assert not standstill.aborted  # it would wait for the thread


def test_a_refusal_comes_at_once(group, monkeypatch):
    def sleep(seconds):
        raise AssertionError("it waits")

    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep)  # the time is never over
    monkeypatch.setattr(_sglang_group, "time", clock)
    refused = Future()
    refused.set_exception(SyncError("400 no memory is left"))
    with pytest.raises(SyncError, match="no memory is left"):
        group.finish(group.broadcast(torch.zeros(4, dtype=torch.uint8)), [refused])


def test_what_the_thread_raises_is_raised_here(group, standstill):
    sent = group.broadcast(torch.zeros(4, dtype=torch.uint8))
    standstill.all_came.set()
    with pytest.raises(RuntimeError, match="the network is down"):
        group.finish(sent, [Future()])


def test_an_end_that_other_ranks_do_not_come_to_is_left_to_itself(monkeypatch, group):
    begun, over = threading.Event(), threading.Event()
    monkeypatch.setattr(_sglang_group, "LEAVE_SECONDS", 0.2)
    monkeypatch.setattr(
        _sglang_group.dist, "destroy_process_group", lambda group: (begun.set(), over.wait(10))
    )
    group.close()
    assert begun.is_set()
    over.set()


def test_servers_are_told_to_leave_with_the_trainer():
    with Server("0.5.17") as server:
        master = "127.0.0.1", free_port()
        syncer = SGLangSyncer(server.url, via="distributed", master=master, backend="gloo")
        syncer.push(weights(1).items(), version=1)
        syncer.close()
        joined, left = (
            [body["group_name"] for name, body in server.updates if name.startswith(what)]
            for what in ("init_weights", "destroy_weights")
        )
    assert joined == left and len(left) == 1


@pytest.mark.parametrize("elastic", ["False", "True"])
def test_a_port_that_is_taken_is_told_before_servers_try_to_join(syncer_for, monkeypatch, elastic):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", elastic)  # as torchrun does
    with Server("0.5.17") as server, socket.create_server(("127.0.0.1", 0)) as taken:
        master = taken.getsockname()
        syncer = syncer_for(server, via="distributed", master=master, backend="gloo", timeout=3)
        with pytest.raises(SyncError, match=r"serve what they did\. no process group .* free port"):
            syncer.push(weights(1).items(), version=1)
        assert server.updates == [] and not server.paused


def test_under_torchrun_the_trainer_listens_itself(syncer_for, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with Server("0.5.17") as server:
        master = "127.0.0.1", free_port()
        syncer = syncer_for(server, via="distributed", master=master, backend="gloo", timeout=5)
        syncer.push(weights(1).items(), version=1)
        assert same(server.loaded, weights(1))


@pytest.mark.parametrize("waiting", [lambda queue: queue.make_room(), lambda queue: queue.end()])
def test_a_failure_is_told_when_no_bucket_is_read_any_more(waiting):
    """Other ranks free theirs as soon as they hear of it."""
    ended, queue = [], Queue(2, Sent())

    def refused():
        raise SyncError("no memory is left")

    queue.add(refused)
    queue.add(lambda: ended.append(2))
    with pytest.raises(SyncError, match="no memory is left"):
        waiting(queue)
    assert ended == [2]


@pytest.mark.parametrize("waiting", [lambda queue: queue.make_room(), lambda queue: queue.end()])
def test_a_bucket_that_ctrl_c_came_upon_is_waited_for_too(waiting):
    waits, queue = [], Queue(1, Sent())

    def interrupted_once():
        waits.append("begun")
        if len(waits) == 1:
            raise KeyboardInterrupt
        waits.append("over")

    queue.add(interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        waiting(queue)
    assert waits == ["begun", "begun", "over"]


def test_a_bucket_that_failed_is_not_waited_for_again():
    waits, queue = [], Queue(1, Sent())

    def late():
        waits.append("late")
        raise SyncError("a broadcast took more than 600 s")

    queue.add(late)
    with pytest.raises(SyncError):
        queue.end()
    queue.abandon()
    assert waits == ["late"]
