"""Weights over a gloo group of real processes."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from miles.errors import MissingExtraError, SettingError, SyncError
from miles.protocols import WeightSyncer
from miles.rollout import HFEngine
from miles.sync import CollectiveReceiver, CollectiveSyncer
from miles.sync._collective import Sender
from miles.sync._inbox import Inbox
from miles.sync._link import Link
from miles.sync._progress import bar
from tests.models import tiny
from tests.sync.processes import die, launch
from tests.sync.targets import Target, random_tensors, same, tensors

TIMEOUT = 5.0


def attempt(function):
    """What it returned, or the text of its error."""
    try:
        return function()
    except (SyncError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def weights(version, change=lambda weights: None):
    chosen = random_tensors(version)
    change(chosen)
    return list(chosen.items())


def failing():
    yield from weights(1)[:3]
    raise ZeroDivisionError("the trainer's own")


# Faults of the wire. Buckets are of 4096 bytes here, one tensor in each but the small ones.


def skip_second(sender, bucket, real):
    if bucket.index != 1:
        real(sender, bucket)


def repeat_second(sender, bucket, real):
    real(sender, bucket)
    if bucket.index == 1:
        real(sender, bucket)


def reorder(sender, bucket, real):
    held = sender.__dict__.setdefault("held", [])
    held.append(bucket)
    if len(held) == 2:
        for one in reversed(held):
            real(sender, one)
        held.clear()


def renumber_a_piece(sender, bucket, real):
    if bucket.first == "half":
        bucket.packed = [[7, *bucket.packed[0][1:]]]
    real(sender, bucket)


STEPS = {  # version: (weights, fault of the sender, what both sides say)
    1: (weights(1), None, None),
    2: (weights(2, lambda w: w.pop("scalar")), None, r"missing tensors \['scalar'\]"),
    3: (weights(3, lambda w: w.update(bias=torch.zeros(2))), None, r"unknown tensors \['bias'\]"),
    4: (weights(4, lambda w: w.update(weight=w["weight"].T)), None, r"weight has shape \(5, 3\)"),
    5: ([], None, "missing tensors"),
    6: (failing, None, "the trainer's own"),
    7: (weights(7), skip_second, r"rank 1: SyncError: bucket 1 was dropped"),
    8: (weights(8), repeat_second, "rank 1: SyncError: bucket 1 came again, or out of order"),
    9: (weights(9), reorder, "rank 1: SyncError: bucket 0 was dropped: expected 0, got 1"),
    10: (
        weights(10),
        "flip",
        r"rank 1: SyncError: half arrived with another checksum, in bucket 1",
    ),
    11: (
        weights(11),
        renumber_a_piece,
        "rank 1: SyncError: bucket 1: tensors 7 to 7 are announced",
    ),
    12: (weights(12), "commit fails", "rank 1 did not commit: ZeroDivisionError: boom"),
    13: (weights(13), "meanwhile", "rank 1: SyncError: the engine went from version 1 to 2"),
    14: (weights(14), "after the vote", "rank 1 did not commit: SyncError: version 14 is older"),
}


def one_session():
    """Rank 0 pushes all STEPS, the other receives them; what both saw, step by step."""
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        assert isinstance(syncer, WeightSyncer)
        real = Sender._send_bucket
        seen = {}
        for version, (given, fault, _) in STEPS.items():
            if callable(fault):
                Sender._send_bucket = lambda sender, bucket, f=fault: f(sender, bucket, real)
            given = given() if callable(given) else given
            seen[version] = attempt(lambda v=version, g=given: syncer.push(g, version=v))
            Sender._send_bucket = real
            seen[f"after {version}"] = attempt(lambda: syncer.push(weights(1), version=1))
        seen["back"] = attempt(lambda: syncer.push(weights(0), version=0))
        seen["last"] = syncer.push(weights(20), version=20)
        syncer.close()
        seen["closed"] = attempt(lambda: syncer.push(weights(21), version=21))
        return seen

    target = Target()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT)
    arrived, commit, send = Inbox.arrived, target.commit_weights, receiver._link.send
    seen = {}

    def flip(inbox, index, data):
        if index == 1:
            data[3] ^= 1
        arrived(inbox, index, data)

    def change_meanwhile(inbox, index, data):
        target.weight_version = 2
        arrived(inbox, index, data)

    def another_commits(rank, message):
        send(rank, message)
        if message == {}:  # the vote; rank 0 has not decided yet
            target.weight_version = 15

    def boom(*_, **__):
        raise ZeroDivisionError("boom")

    for version, (_, fault, _) in STEPS.items():
        Inbox.arrived = {"flip": flip, "meanwhile": change_meanwhile}.get(fault, arrived)
        target.commit_weights = boom if fault == "commit fails" else commit
        receiver._link.send = another_commits if fault == "after the vote" else send
        seen[version] = attempt(receiver.receive_once)
        Inbox.arrived, target.commit_weights = arrived, commit
        target.weight_version = 1
        seen[f"serves after {version}"] = same(target.live, random_tensors(1))
        receiver.receive_once()
    seen["back"] = receiver.receive_once()
    seen["last"] = receiver.receive_once(), same(target.live, random_tensors(20))
    seen["closed"] = receiver.receive_once()
    seen["commits"] = len(target.seen)
    return seen


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    sent, received = launch(one_session, 2, tmp_path_factory.mktemp("session"))
    assert isinstance(sent, dict), sent
    assert isinstance(received, dict), received
    return sent, received


def matches(text, pattern):
    assert isinstance(text, str) and re.search(pattern, text), text


def test_values_arrive_bit_for_bit(session):
    sent, received = session
    report = sent[1]
    assert received[1] == 1 and received["serves after 1"]
    assert (report.version, report.num_tensors, report.num_bytes) == (1, 5, 86)
    assert report.num_buckets == 4  # the empty tensor shares one
    assert {"gather", "send", "load", "commit", "pause"} == set(report.phases)
    assert "version 1: 5 tensors" in report.summary()


@pytest.mark.parametrize("version", [v for v, step in STEPS.items() if step[2]])
def test_after_a_fault_the_engine_serves_on_and_both_sides_are_told(session, version):
    sent, received = session
    matches(sent[version], STEPS[version][2])
    assert {12: "boom", 13: "2 is still served", 14: "is older than 15"}.get(
        version, "still served"
    ) in received[version]
    assert received[f"serves after {version}"]
    # Both are still in step: the version that is served is not sent again.
    assert sent[f"after {version}"].num_tensors == 0


def without_elements(given):
    """A tensor without elements has a bucket of its own if those before fill theirs."""
    live = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        report = syncer.push(given.items(), version=1)
        syncer.close()
        return report.num_tensors
    target = Target(live)
    CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT).serve()
    return target.weight_version, same(target.live, given)


@pytest.mark.parametrize(
    "given", [{"a": torch.ones(1024), "b": torch.empty(0)}, {"b": torch.empty(0)}]
)
def test_a_bucket_may_have_no_bytes(tmp_path, given):
    assert launch(without_elements, 2, tmp_path, given) == [len(given), (1, True)]


def test_versions_only_grow_and_a_closed_syncer_says_so(session):
    sent, received = session
    matches(sent["back"], "rank 1: version 0 is older than 1")
    assert received["back"] == 1
    assert received["last"] == (20, True) and sent["last"].num_tensors == 5
    assert received["closed"] is None and received["commits"] == 2
    matches(sent["closed"], "closed")


# More receivers.


def three_receivers():
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        return [attempt(lambda v=v: syncer.push(weights(v), version=v)) for v in (1, 2, 3)]
    target = Target()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT)
    arrived, seen = Inbox.arrived, []

    def flip(inbox, index, data):
        data[0] ^= 1
        arrived(inbox, index, data)

    for version in (1, 2, 3):
        if version == 2 and dist.get_rank() == 2:
            Inbox.arrived = flip
        seen.append(attempt(receiver.receive_once))
        Inbox.arrived = arrived
    return seen, target.weight_version, [list(s) == list(tensors()) for s in target.seen]


def test_one_receiver_that_refuses_keeps_all_from_committing(tmp_path):
    sent, *received = launch(three_receivers, 4, tmp_path)
    matches(sent[1], r"version 2 was not taken, .*rank 2: SyncError: weight arrived")
    assert "rank 1" not in sent[1] and sent[2].version == 3
    assert sent[2].copied_bytes == 4 * 86
    for seen, version, committed in received:
        assert (seen[0], seen[2], version, committed) == (1, 3, 3, [True, True])
        matches(seen[1], "version 2 was not taken, 1 is still served")


def different_models():
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, timeout=TIMEOUT)
        return attempt(lambda: syncer.push(weights(1), version=1))
    live = tensors() | ({"half": torch.zeros(7)} if dist.get_rank() == 2 else {})
    target = Target(live)
    return attempt(CollectiveReceiver(target, dist.group.WORLD).receive_once)


def test_receivers_of_different_models_are_refused(tmp_path):
    sent, *received = launch(different_models, 3, tmp_path)
    matches(sent, r"rank 2 expects half as \[\[7\], 'torch.float32'\], rank 1 as .*bfloat16")
    assert received == [0, 0]


def another_trainer():
    group = dist.group.WORLD
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(group, timeout=TIMEOUT)
        syncer.push(weights(1), version=1)
        return attempt(lambda: syncer.push(weights(6), version=6))
    target = Target()
    receiver = CollectiveReceiver(target, group)
    receiver.receive_once()
    target.commit_weights(random_tensors(5), version=5)  # what the other's receiver does
    return receiver.receive_once()


def test_two_trainers_of_one_engine_are_told(tmp_path):
    sent, received = launch(another_trainer, 2, tmp_path)
    matches(sent, "rank 1 serves version 5; this trainer's last push was 1, so another one syncs")
    assert received == 5


# Sharded trainers.


def sharded(fault):
    """Ranks 0 and 1 train with FSDP2, rank 2 serves."""
    trainers = dist.new_group([0, 1])
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 2:
        model = tiny("llama", dtype=torch.bfloat16)
        engine = HFEngine(model)
        if fault == "dead":
            receive = Link.receive
            Link.receive = lambda link, source, **options: (
                die() if (m := receive(link, source, **options)).get("index") == 3 else m
            )
        receiver = CollectiveReceiver(engine, pair, timeout=TIMEOUT)
        seen = [attempt(receiver.receive_once)]
        seen.append(receiver.receive_once())
        wanted = tiny("llama", seed=1).bfloat16().state_dict()
        return seen, [bool(torch.equal(t, wanted[n])) for n, t in engine.weight_tensors().items()]
    model = tiny("llama", seed=1)
    fully_shard(model, mesh=DeviceMesh.from_group(trainers, "cpu"))
    syncer = CollectiveSyncer(pair, trainers=trainers, bucket_bytes=4096, timeout=TIMEOUT)
    state = model.state_dict()
    if fault == "missing":
        del state["model.norm.weight"]
    first = attempt(lambda: syncer.push(state.items(), version=1))
    if fault == "dead":
        return first
    syncer.push(model.state_dict().items(), version=2)
    sender = syncer._sender
    held = sum(buffer.numel() for buffer in sender._outbox.buffers) if sender else 0
    return first, held


def test_a_sharded_trainer_pushes_and_only_the_sender_holds_buckets(tmp_path):
    one, other, (seen, equal) = launch(sharded, 3, tmp_path, None)
    assert one[0].num_tensors == other[0].num_tensors > 5
    assert one[0].num_buckets == other[0].num_buckets > 5
    assert (one[1], other[1]) == (8192, 0)
    assert seen == [1, 2] and all(equal)


def test_ranks_of_a_sharded_trainer_fail_together(tmp_path):
    one, other, (seen, equal) = launch(sharded, 3, tmp_path, "missing")
    for rank in (one, other):
        matches(rank[0], r"missing tensors \['model.norm.weight'\]")
    matches(seen[0], "version 1 was not taken, 0 is still served")
    assert seen[1] == 2 and all(equal)


def test_ranks_of_a_sharded_trainer_hear_together_of_an_engine_that_died(tmp_path):
    one, other, gone = launch(sharded, 3, tmp_path, "dead")
    assert gone is None
    for rank in (one, other):
        matches(rank, r"rank 1 is gone .*at bucket \d \(tensors model.*make a new process group")


def taking_turns():
    if dist.get_rank() == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        for version in range(1, 6):
            syncer.push(weights(version), version=version)
        return syncer.close()
    target, pointers, commit = Target(), [], Target.commit_weights

    def noting(self, given, **options):
        pointers.append(given["weight"].data_ptr())
        commit(self, given, **options)

    Target.commit_weights = noting
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT)
    receiver.start()
    receiver.join()
    return receiver.error, pointers, same(target.live, random_tensors(5))


def test_two_buffers_take_turns_and_a_thread_serves_until_the_sender_closes(tmp_path):
    _, (error, pointers, right) = launch(taking_turns, 2, tmp_path)
    assert error is None and right
    assert pointers[0] == pointers[2] == pointers[4] != pointers[1] == pointers[3]


def staying():
    if dist.get_rank() == 0:
        first = CollectiveSyncer(dist.group.WORLD, bucket_bytes=4096, timeout=TIMEOUT)
        first.push(weights(1), version=1)
        first.push(weights(2), version=2)
        # Another one does not know yet what is expected.
        second = CollectiveSyncer(dist.group.WORLD, bucket_bytes=8192, timeout=TIMEOUT)
        return second.push(weights(3), version=3).num_buckets
    target = Target()
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=TIMEOUT, alias=False)
    before = {name: tensor.data_ptr() for name, tensor in target.live.items()}
    send, said = Link.send, []

    def noting(link, rank, message):
        said.append("tensors" in message)
        send(link, rank, message)

    Link.send = noting
    for _ in range(3):
        receiver.receive_once()
    hellos = said[::3]  # hello, vote, done
    stayed = before == {name: tensor.data_ptr() for name, tensor in target.live.items()}
    return hellos, stayed, same(target.live, random_tensors(3))


def test_what_is_expected_is_said_once_and_tensors_stay_where_they_are_told_to(tmp_path):
    buckets, received = launch(staying, 2, tmp_path)
    assert buckets == 2 and received == ([True, False, True], True, True)


@pytest.mark.parametrize("size", [100, 0])
def test_bucket_sizes_and_groups_that_cannot_be(size, tmp_path):
    with pytest.raises(SettingError, match="multiple of 4096"):
        CollectiveSyncer(None, bucket_bytes=size)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(SettingError, match="rank 0 of 1 in the group; expected rank 0 of 2"):
            CollectiveSyncer(dist.group.WORLD)
        with pytest.raises(SettingError, match="expected the trainer there"):
            CollectiveReceiver(Target(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("version", ["3", 3.0, True])
def test_a_version_is_an_integer_on_every_rank(version):
    of_two = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    with pytest.raises(SettingError, match=f"version is {version!r}; expected an integer"):
        CollectiveSyncer(None, trainers=of_two).push([], version=version)


def test_a_bar_is_shown_to_those_who_ask(capsys):
    with bar(True, 100, 3) as moved:
        moved(100)
    assert capsys.readouterr().err == ""  # it was fast
    with bar(False, 100, 3) as moved:
        moved(100)


def test_a_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingExtraError, match="tqdm"), bar(True, 100, 3):
        pass
