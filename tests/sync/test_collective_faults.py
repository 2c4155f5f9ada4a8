"""Ranks of a gloo group that die, say nothing or talk nonsense; the engines serve on."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from miles.sync import CollectiveReceiver, CollectiveSyncer
from miles.sync._link import Link, PeerLostError
from miles.sync._plan import committing
from tests.sync.processes import die, launch
from tests.sync.targets import Target, random_tensors, same
from tests.sync.test_collective import TIMEOUT, attempt, matches, weights

# Ranks that die: rank 0 sends, 1 and 2 receive.

PHASES = ["hello", "begin", "bucket", "sums", "end", "commit"]


def dying(who, phase):
    rank = dist.get_rank()
    send, receive = Link.send, Link.receive

    def dying_send(link, to, message):
        if rank == who == 0 and message.get("op") == phase and armed:
            die()
        send(link, to, message)

    def dying_receive(link, source, **options):
        message = receive(link, source, **options)
        if rank == who != 0 and message.get("op") == phase and armed:
            die()
        return message

    armed = []
    Link.send, Link.receive = dying_send, dying_receive
    if rank == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        syncer.push(weights(1), version=1)
        armed.append(True)
        first = attempt(lambda: syncer.push(weights(2), version=2))
        return first, attempt(lambda: syncer.push(weights(2), version=2))
    target = Target()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT)
    receiver.receive_once()
    armed.append(True)
    second = attempt(receiver.receive_once)
    return second, target.weight_version, same(target.live, random_tensors(target.weight_version))


@pytest.mark.parametrize("phase", PHASES)
def test_a_sender_that_dies_leaves_every_engine_serving(tmp_path, phase):
    sent, *received = launch(dying, 3, tmp_path, 0, phase)
    assert sent is None
    for text, version, right in received:
        # A slow one may still be in the broadcast before, which does not say whose end it was.
        matches(text, "(rank 0|a peer) is gone .*version 1 is still served; make a new process")
        assert (version, right) == (1, True)


@pytest.mark.parametrize("phase", PHASES)
def test_a_receiver_that_dies_is_named_and_the_other_goes_on(tmp_path, phase):
    (first, second), other, gone = launch(dying, 3, tmp_path, 2, phase)
    assert gone is None
    matches(first, "rank 2 (is gone|did not answer)")
    assert "rank 1 is gone" not in first
    if phase == "bucket":
        matches(first, r"bucket \d \(tensors ")
    matches(second, "make a new process group")
    text, version, right = other
    assert right and version == (2 if phase == "commit" else 1)
    if phase != "commit":
        assert isinstance(text, str) and "1 is still served" in text
    else:
        matches(first, r"ranks \[1\] serve it, but rank 2 did not commit")


def silent(who):
    """Rank `who` stops answering in the middle."""
    rank, send, receive = dist.get_rank(), Link.send, Link.receive

    def sleepy_send(link, to, message):
        if rank == who == 0 and message.get("op") == "end":
            time.sleep(2)
        send(link, to, message)

    def sleepy_receive(link, source, **options):
        message = receive(link, source, **options)
        if rank == who == 1 and message.get("op") == "end":
            time.sleep(2)
        return message

    Link.send, Link.receive = sleepy_send, sleepy_receive
    if rank == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, timeout=1)
        result = attempt(lambda: syncer.push(weights(1), version=1))
        time.sleep(1.5 * who)  # be there when the other wakes up
        return result
    target = Target()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=1)
    return attempt(receiver.receive_once), target.weight_version


def test_a_receiver_that_is_silent_for_too_long_is_named(tmp_path):
    sent, (_, version) = launch(silent, 2, tmp_path, 1)
    matches(sent, "rank 1 did not answer within 1 s")
    assert version == 0


def test_a_sender_that_is_silent_for_too_long_leaves_the_engine_serving(tmp_path):
    _, (text, version) = launch(silent, 2, tmp_path, 0)
    matches(text, "rank 0 did not answer within 1 s.*version 0 is still served")
    assert version == 0


NONSENSE = [b"{", b"[]", b"{}", b'{"op": "bucket"}', b'{"op": "begin"}', b"\xff"]


def talking_nonsense(body, folder):
    group = dist.group.WORLD
    if dist.get_rank() == 0:
        data = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        link = Link(group, TIMEOUT, None)
        if b"op" in body:
            link.send(1, {"op": "hello"})
            link.receive(1)
        group.send([torch.tensor([len(body)])], 1, 0).wait()
        group.send([data], 1, 0).wait()
        while not (folder / "read").exists():
            time.sleep(0.01)
        return None
    target = Target()
    try:
        text = attempt(CollectiveReceiver(target, group, timeout=TIMEOUT).receive_once)
    finally:
        (folder / "read").touch()
    return text, target.weight_version


@pytest.mark.parametrize("body", NONSENSE)
def test_a_sender_that_talks_nonsense_does_no_harm(tmp_path, body):
    _, (text, version) = launch(talking_nonsense, 2, tmp_path, body, tmp_path)
    matches(text, "SyncError|PeerLostError")
    matches(text, "nonsense")
    assert version == 0


class HalfCommits(Target):
    """Takes one tensor and fails, whenever it is told to."""

    fails = False

    def commit_weights(self, tensors, *, version, alias=False):
        if self.fails:
            self.live = dict(self.live) | {"weight": tensors["weight"]}
            raise RuntimeError("no memory")
        super().commit_weights(tensors, version=version, alias=alias)


def breaking(version):
    yield "weight", random_tensors(version)["weight"]
    raise ZeroDivisionError


def committing_halfway():
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        syncer.push(weights(1), version=1)
        attempt(lambda: syncer.push(weights(2), version=2))
        for version in (3, 4):
            attempt(lambda version=version: syncer.push(breaking(version), version=version))
        return attempt(lambda: syncer.push(weights(5), version=5))
    target = HalfCommits()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT)
    receiver.receive_once()
    target.fails = True
    attempt(receiver.receive_once)
    before = {name: tensor.clone() for name, tensor in target.live.items()}
    for _ in range(2):
        attempt(receiver.receive_once)
    kept = same(target.live, before)
    target.fails = False
    receiver.receive_once()
    return kept, target.weight_version, same(target.live, random_tensors(5))


def test_what_a_failed_commit_left_in_service_is_not_written_to(tmp_path):
    _, received = launch(committing_halfway, 2, tmp_path)
    assert received == (True, 5, True)


def while_another_commits():
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, timeout=TIMEOUT)
        return attempt(lambda: syncer.push(weights(1), version=1))
    receiver = CollectiveReceiver(target := Target(), dist.group.WORLD, timeout=TIMEOUT)
    with ThreadPoolExecutor(1) as pool:
        with committing(target):
            received = pool.submit(attempt, receiver.receive_once)
            time.sleep(1)
            waited = not received.done()
            target.weight_version = 5
        return waited, received.result(30), len(target.seen)


def test_a_commit_waits_for_that_of_another_receiver(tmp_path):
    sent, (waited, text, commits) = launch(while_another_commits, 2, tmp_path)
    matches(sent, "rank 1 did not commit: SyncError: version 1 is older than 5")
    matches(text, "version 1 was not committed: version 1 is older than 5")
    assert waited and commits == 0


def silent_after_the_commit():
    send = Link.send
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, timeout=1)
        return attempt(lambda: syncer.push(weights(1), version=1))

    def failing_send(link, to, message):
        if "seconds" in message:
            raise PeerLostError("rank 0 is gone")
        send(link, to, message)

    Link.send = failing_send
    receiver = CollectiveReceiver(target := Target(), dist.group.WORLD, timeout=1)
    return attempt(receiver.receive_once), target.weight_version


def test_a_receiver_that_has_committed_says_that_it_serves_the_new_version(tmp_path):
    _, (text, version) = launch(silent_after_the_commit, 2, tmp_path)
    matches(text, "rank 0 is gone; version 1 is still served")
    assert version == 1


def interrupted(who, phase):
    """Ctrl-C between two messages of a push; then a new group."""
    rank, again = dist.get_rank(), dist.new_group([0, 1])
    name = "receive" if who else "send"
    real = getattr(Link, name)

    def interrupting(link, other, message=None, **options):
        given = () if message is None else (message,)
        told = real(link, other, *given, **options)
        if armed and (message or told).get("op") == phase:
            armed.clear()
            raise KeyboardInterrupt
        return told

    armed = []
    setattr(Link, name, interrupting)
    if rank == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=1)
        syncer.push(weights(1), version=1)
        armed += [True] * (who == 0)
        first, second = (ended(lambda: syncer.push(weights(2), version=2)) for _ in range(2))
        syncer.close()
        CollectiveSyncer(again, timeout=TIMEOUT).push(weights(3), version=3)
        return first, second
    target = Target()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=1)
    receiver.receive_once()
    armed += [True] * (who == 1)
    first = ended(receiver.receive_once)
    served = target.weight_version
    right = same(target.live, random_tensors(served))
    second = ended(receiver.receive_once) if who else None
    CollectiveReceiver(target, again, timeout=TIMEOUT).receive_once()
    return first, served, right, target.weight_version, second


def ended(function):
    try:
        return attempt(function)
    except KeyboardInterrupt:
        return "KeyboardInterrupt"


@pytest.mark.parametrize("phase", PHASES)
def test_after_ctrl_c_in_a_push_new_groups_are_asked_for(tmp_path, phase):
    (first, second), (_, served, right, after, _) = launch(interrupted, 2, tmp_path, 0, phase)
    assert first == "KeyboardInterrupt"
    matches(second, "^SyncError: a push was interrupted; make a new process group")
    assert (served, right, after) == (2 if phase == "commit" else 1, True, 3)


@pytest.mark.parametrize("phase", PHASES)
def test_after_ctrl_c_in_a_receiver_a_new_group_is_asked_for(tmp_path, phase):
    sent, (first, served, right, after, second) = launch(interrupted, 2, tmp_path, 1, phase)
    assert first == "KeyboardInterrupt"
    matches(second, "PeerLostError: receiving was interrupted; make a new process group")
    matches(sent[1], "make a new process group")
    assert phase != "hello" or "bucket" not in sent[0]  # of the push before
    assert (served, right, after) == (1, True, 3)
