"""Buckets through memory that two processes share, on the CPU; `cuda_ipc` is the same on a GPU."""

import os
import signal
import socket
import threading
import time

import pytest
import torch

from miles.errors import SettingError, SyncError
from miles.protocols import WeightSyncer
from miles.sync import InProcessSyncer, SharedMemorySyncer, _bucket_receiver, _bucket_sender
from miles.sync._bucket_plan import unpack
from miles.sync._bucket_receiver import BucketReceiver
from miles.sync._bucket_sender import BucketSender, slot_bytes
from miles.sync._checksum import BLOCK
from miles.sync._memory import FileMemory
from tests.models import params, serving, tiny
from tests.sync import processes
from tests.sync.targets import Target, random_tensors, same
from tests.sync.test_inprocess import BROKEN

BIG = {"big": torch.zeros(5000), "small": torch.zeros(3), "wide": torch.zeros(2, 3000).bfloat16()}
SIZE = 2 * BLOCK
NUM_BUCKETS = 5


def big(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in BIG.items()}


def zeros() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in BIG.items()}


@pytest.fixture
def address(tmp_path):
    return tmp_path / "weights"


@pytest.fixture(params=["direct", "slab"])
def direct(request):
    return request.param == "direct"


@pytest.fixture
def receive_for(address, direct):
    """Starts a receiver for a target; all are closed at the end."""
    receivers = []

    def start(target, **options):
        options = {"direct": direct, "memory": FileMemory()} | options
        receivers.append(BucketReceiver(target, address, **options))
        return target

    yield start
    for receiver in receivers:
        receiver.close()


@pytest.fixture
def target(receive_for):
    return receive_for(Target(zeros()))


def sender(address, timeout: float = 30) -> BucketSender:
    return BucketSender(address, memory=FileMemory(), bucket_bytes=SIZE, timeout=timeout)


@pytest.fixture
def syncer(address):
    syncer = sender(address)
    yield syncer
    syncer.close()


@pytest.mark.parametrize("as_pairs", [dict.items, lambda d: iter(d.items())])
def test_values_arrive_bit_for_bit_over_many_buckets(target, syncer, direct, as_pairs):
    assert isinstance(syncer, WeightSyncer)
    for version in range(1, 6):
        report = syncer.push(as_pairs(big(version)), version=version)
        assert same(target.live, big(version)) and target.weight_version == version
    assert (report.version, report.num_tensors, report.num_bytes) == (5, 3, 32012)
    assert report.copied_bytes == report.num_bytes * (1 if direct else 2)
    assert report.num_buckets == NUM_BUCKETS
    assert set(report.phases) == {"gather", "send", "load", "commit", "pause"}


@pytest.mark.parametrize("alias", [True, False])
def test_every_kind_of_tensor_in_any_order_cast_and_strided(receive_for, syncer, alias):
    target = receive_for(Target(), alias=alias)
    wanted = random_tensors(1)
    given = {name: wanted[name].double() for name in reversed(wanted)}
    given["weight"] = given["weight"].T.contiguous().T
    served = target.live["weight"].data_ptr()
    syncer.push(given.items(), version=1)
    syncer.push(given.items(), version=2)
    assert same(target.live, wanted)
    assert (target.live["weight"].data_ptr() == served) == (not alias)


def test_a_tensor_of_several_buckets_may_be_cast_and_strided(target, syncer):
    wide = torch.randn(3000, 2, dtype=torch.float64)
    syncer.push((big(1) | {"wide": wide.T}).items(), version=1)
    assert torch.equal(target.live["wide"], wide.T.bfloat16())


def test_the_order_may_change_from_push_to_push(target, syncer):
    for version, order in enumerate((list, reversed, sorted, list), 1):
        given = {name: big(version)[name] for name in order(BIG)}
        syncer.push(given.items(), version=version)
        assert same(target.live, big(version))


def test_a_trainer_may_yield_one_scratch_tensor_again_and_again(receive_for, syncer):
    target = receive_for(Target({f"w{i}": torch.zeros(10) for i in range(4)}))
    scratch = torch.zeros(10)

    def gathering():
        for i, name in enumerate(target.live):
            yield name, scratch.fill_(i)

    syncer.push(gathering(), version=1)
    assert [int(t[0]) for t in target.live.values()] == [0, 1, 2, 3]


def test_a_push_never_writes_memory_that_is_served(target, syncer):
    syncer.push(big(1).items(), version=1)
    held, seen = target.live, []

    def slowly():
        for name, tensor in big(2).items():
            yield name, tensor
            seen.append(same(held, big(1)))

    syncer.push(slowly(), version=2)
    assert seen == [True] * 3 and same(held, big(1)) and same(target.live, big(2))


def test_versions_only_grow_and_the_served_one_is_not_pushed_again(target, syncer, address):
    syncer.push(big(1).items(), version=5)
    report = syncer.push(big(2).items(), version=5)
    assert (report.version, report.num_tensors, report.num_bytes) == (5, 0, 0)
    for again in (syncer, sender(address)):
        with pytest.raises(SyncError, match="version 4 is older than 5"):
            again.push(big(2).items(), version=4)
        again.close()
    syncer.push(big(2).items(), version=6)
    target.weight_version = 9  # by another carrier
    with pytest.raises(SyncError, match="version 7 is older than 9"):
        syncer.push(big(3).items(), version=7)
    assert syncer.push(big(3).items(), version=9).num_tensors == 0
    assert same(target.live, big(2))


@pytest.mark.parametrize("other", [2, 9])
def test_a_version_that_another_trainer_brought_meanwhile_stays(target, syncer, other):
    def while_another_pushes():
        yield from big(2).items()
        InProcessSyncer(target).push(big(7).items(), version=other)

    reason = "2 is older than 9" if other == 9 else "the engine got version 2 from another"
    with pytest.raises(SyncError, match=f"2 was not taken, {other} is still served: .*{reason}"):
        syncer.push(while_another_pushes(), version=2)
    assert same(target.live, big(7)) and target.weight_version == other
    syncer.push(big(3).items(), version=10)
    assert same(target.live, big(3))


def test_what_a_failed_commit_left_in_service_is_not_written_to(target, syncer, monkeypatch):
    syncer.push(big(1).items(), version=1)

    def half(tensors, *, version, alias=False):
        target.live = dict(target.live) | {"wide": tensors["wide"]}
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(target, "commit_weights", half)
    with pytest.raises(SyncError, match="1 is still served: ZeroDivisionError: boom"):
        syncer.push(big(2).items(), version=2)
    monkeypatch.undo()
    with pytest.raises(SyncError, match="a commit failed halfway, so no memory is free"):
        syncer.push(big(3).items(), version=3)
    assert same(target.live, big(1) | {"wide": big(2)["wide"]})


@pytest.mark.parametrize(("text", "weights"), BROKEN)
def test_what_does_not_fit_is_named_and_the_old_version_serves_on(
    receive_for, syncer, text, weights
):
    target = receive_for(Target())
    syncer.push(random_tensors(1).items(), version=1)
    with pytest.raises(SyncError, match=text):
        syncer.push(weights, version=2)
    assert same(target.live, random_tensors(1)) and target.weight_version == 1
    syncer.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(2))


def fails_and_serves_on(target, syncer, text, monkeypatch):
    """Version 2 fails with this text, 1 serves on, and the next push is whole."""
    with pytest.raises(SyncError, match=text):
        syncer.push(big(2).items(), version=2)
    assert same(target.live, big(1)) and target.weight_version == 1
    monkeypatch.undo()
    syncer.push(big(2).items(), version=2)
    assert same(target.live, big(2)) and target.weight_version == 2


FAULTS = {
    "dropped": ([0, 2, 3, 4], r"bucket 1 was dropped: expected 1, got 2"),
    "last dropped": ([0, 1, 2, 3], r"4 of 5 buckets came.*'wide'"),
    "repeated": ([0, 1, 1, 2, 3, 4], r"bucket 1 came twice, or too late: expected 2, got 1"),
    "reordered": ([0, 2, 1, 3, 4], r"bucket 1 was dropped: expected 1, got 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bucket_dropped_repeated_or_reordered_is_named(target, syncer, monkeypatch, fault):
    syncer.push(big(1).items(), version=1)
    order, text = FAULTS[fault]
    take, taken = _bucket_receiver._Arriving.take, {}

    def taking(self, number, pieces):
        taken[number] = pieces
        for which in order if number == NUM_BUCKETS - 1 else ():
            take(self, which, taken[which])

    monkeypatch.setattr(_bucket_receiver._Arriving, "take", taking)
    fails_and_serves_on(target, syncer, text, monkeypatch)


HEADERS = {
    "an unknown tensor": (lambda p: [[3, *p[0][1:]]], "bucket 4: tensors 3 to 3 .*no such tensor"),
    "a tensor too long": (lambda p: [[*p[0][:3], 1 << 40]], "of wide; expected byte .* next"),
    "bytes twice": (lambda p: [p[0], p[0]], "of wide; expected byte .* of .* next"),
    "bytes left out": (
        lambda p: [[2, p[0][1] + BLOCK, 1, p[0][3]]],
        "of wide; expected byte .* next",
    ),
    "a piece left out": (lambda p: p[1:], r"1 tensors are not whole: \['wide'\]"),
    "more than fits": (lambda p: [*p, [1, 12, 1, 12]], "of small; expected byte 12 of 12"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_does_not_fit_names_tensor_and_bucket(target, syncer, monkeypatch, fault):
    change, text = HEADERS[fault]
    syncer.push(big(1).items(), version=1)
    take = _bucket_receiver._Arriving.take
    monkeypatch.setattr(
        _bucket_receiver._Arriving,
        "take",
        lambda self, number, pieces: take(self, number, change(pieces) if number == 4 else pieces),
    )
    fails_and_serves_on(target, syncer, text, monkeypatch)


@pytest.mark.parametrize("bucket", range(NUM_BUCKETS))
def test_a_flipped_byte_names_tensor_and_bucket(target, syncer, monkeypatch, bucket, direct):
    syncer.push(big(1).items(), version=1)
    send = _bucket_sender.send

    def flipping(connection, message, fds=()):
        if message.get("bucket") == bucket:
            session = syncer._session
            *others, (number, start, count) = unpack(message["pieces"], session._layout)
            if direct:
                at = session._layout.offsets[number] + start + count - 1
                session._staging[session._buffer][at] ^= 1
            else:
                used = sum(-(-c // BLOCK) * BLOCK for _, _, c in others)
                session._slab[bucket % 2 * slot_bytes(SIZE) + used + count - 1] ^= 1
        send(connection, message, fds)

    monkeypatch.setattr(_bucket_sender, "send", flipping)
    name = ["big", "big", "small", "wide", "wide"][bucket]
    text = f"version 2 was not taken, 1 is still.*{name} arrived.*bucket {bucket} "
    fails_and_serves_on(target, syncer, text, monkeypatch)


def test_what_an_earlier_version_left_behind_is_not_taken_for_this_one(target, syncer, monkeypatch):
    for version in (1, 2):  # so that both buffers hold whole versions
        syncer.push(big(version).items(), version=version)
    written = _bucket_sender._Buckets.written

    def written_too_late(self, packed):
        session = self._session
        memory = session._slab if session._slab is not None else session._staging[session._buffer]
        if self.number == 2:
            memory.copy_(before)
        written(self, packed)

    syncer.push(big(3).items(), version=3)
    session = syncer._session
    before = (session._slab if session._slab is not None else session._staging[0]).clone()
    monkeypatch.setattr(_bucket_sender._Buckets, "written", written_too_late)
    with pytest.raises(SyncError, match="another checksum"):
        syncer.push(big(4).items(), version=4)
    assert same(target.live, big(3))


def test_a_commit_that_fails_is_reported_with_its_reason(target, syncer, monkeypatch):
    syncer.push(big(1).items(), version=1)

    def fail(*args, **kwargs):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(target, "commit_weights", fail)
    fails_and_serves_on(target, syncer, "ZeroDivisionError: boom", monkeypatch)


@pytest.mark.parametrize("step", range(1, NUM_BUCKETS + 3))  # begin, the buckets, commit
def test_a_sender_killed_at_any_step_leaves_the_old_version_and_makes_room(
    target, syncer, monkeypatch, address, step
):
    syncer.push(big(1).items(), version=1)
    send, sent = _bucket_sender.send, []

    def dying(connection, message, fds=()):
        sent.append(message)
        if len(sent) == step:
            connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed process
            raise BrokenPipeError("killed")
        send(connection, message, fds)

    monkeypatch.setattr(_bucket_sender, "send", dying)
    with pytest.raises(SyncError, match="receiver went away"):
        syncer.push(big(2).items(), version=2)
    monkeypatch.undo()
    assert same(target.live, big(1)) and target.weight_version == 1
    other = sender(address)
    other.push(big(3).items(), version=3)
    assert same(target.live, big(3)) and target.weight_version == 3
    other.close()


@pytest.mark.parametrize("step", range(1, NUM_BUCKETS + 3))
def test_a_receiver_killed_at_any_step_is_an_error_and_its_successor_is_served(
    target, receive_for, syncer, monkeypatch, step
):
    syncer.push(big(1).items(), version=1)
    receive, got = _bucket_receiver.receive, []

    def dying(connection):
        message, fds = receive(connection)
        if message != {"begin": 2}:  # which it may already wait for
            got.append(message)
        if got and len(got) == step:
            connection.shutdown(socket.SHUT_RDWR)
            return None, []
        return message, fds

    monkeypatch.setattr(_bucket_receiver, "receive", dying)
    lost = 2 if step <= NUM_BUCKETS + 1 else 3
    with pytest.raises(SyncError, match=f"version {lost} was not pushed"):
        for version in (2, 3):
            syncer.push(big(version).items(), version=version)
    monkeypatch.undo()
    assert target.weight_version == lost - 1 and same(target.live, big(lost - 1))
    successor = receive_for(Target(zeros()))
    syncer.push(big(4).items(), version=4)
    assert same(successor.live, big(4))


def test_a_second_sender_is_refused_while_the_first_is_connected(target, syncer, address):
    syncer.push(big(1).items(), version=1)
    second = sender(address)
    with pytest.raises(SyncError, match=rf"another sender \(process {os.getpid()}\) is connected"):
        second.push(big(2).items(), version=2)
    syncer.push(big(2).items(), version=2)
    syncer.close()
    second.push(big(3).items(), version=3)
    assert same(target.live, big(3))
    second.close()


def test_a_syncer_of_another_carrier_is_told_so(target, address):
    class Other(FileMemory):
        carrier = "other"

    with pytest.raises(SyncError, match="carrier is file; expected other"):
        BucketSender(address, memory=Other()).push(big(1).items(), version=1)


@pytest.mark.filterwarnings("ignore:a weight sender was dropped")
def test_shared_memory_and_buckets_do_not_mix(target, address):
    with pytest.raises(SyncError):
        SharedMemorySyncer(address, timeout=5).push(big(1).items(), version=1)


@pytest.mark.parametrize("garbage", [b"", b"\x01", b"\x02\x00\x00\x00xx", b"\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore:a weight sender was dropped")
def test_a_stranger_that_talks_nonsense_does_no_harm(target, syncer, address, garbage):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(address))
        stranger.recv(65536)
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        stranger.recv(1)
    syncer.push(big(1).items(), version=1)
    assert same(target.live, big(1))


@pytest.mark.filterwarnings("ignore:a weight sender is process 7")
def test_a_process_of_another_user_is_turned_away(target, syncer, monkeypatch):
    monkeypatch.setattr("miles.sync._session._peer", lambda connection: (7, os.getuid() + 1))
    with pytest.raises(SyncError, match=r"process 7 of user \d+; expected one of this user"):
        syncer.push(big(1).items(), version=1)


def serve(address: str, ready, commit_seconds: float) -> None:
    BucketReceiver(Target(zeros(), commit_seconds), address, memory=FileMemory())
    ready.set()
    threading.Event().wait()


def push_slowly(address: str, begun) -> None:
    def slowly():
        for name, tensor in big(2).items():
            yield name, tensor
            begun.set()
            time.sleep(0.2 if name == "big" else 60)

    sender(address).push(slowly(), version=2)


def test_a_receiver_process_killed_during_a_commit_is_an_error(address):
    context = processes.CONTEXT
    ready = context.Event()
    child = context.Process(target=serve, args=(str(address), ready, 60))
    child.start()
    assert ready.wait(60)
    timer = threading.Timer(0.5, os.kill, (child.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(SyncError, match=r"receiver went away at .*version 1 was not pushed"):
        sender(address).push(big(1).items(), version=1)
    child.join()


def test_a_sender_process_killed_during_a_push_makes_room(target, syncer, address):
    context = processes.CONTEXT
    begun = context.Event()
    child = context.Process(target=push_slowly, args=(str(address), begun))
    child.start()
    assert begun.wait(60)
    time.sleep(0.5)
    child.kill()
    child.join()
    assert target.weight_version == 0 and same(target.live, zeros())
    syncer.push(big(3).items(), version=3)
    assert same(target.live, big(3))


def test_nothing_is_left_behind_after_many_syncs(target, syncer):
    syncer.push(big(1).items(), version=1)
    before = len(os.listdir("/proc/self/fd"))
    for version in range(2, 62):
        syncer.push(big(version).items(), version=version)
        syncer.close()
    time.sleep(0.1)
    assert same(target.live, big(61))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_an_engine_answers_with_the_trainers_weights(receive_for, syncer):
    with serving(tiny("qwen3_moe", tie_word_embeddings=True)) as engine:
        receive_for(engine)
        tied = tiny("qwen3_moe", seed=1, tie_word_embeddings=True)
        for version in (1, 2, 3):
            syncer.push(tied.state_dict().items(), version=version)
        got = engine.submit([5, 6], params(20)).result(60)
        syncer.close()
    assert got.weight_versions == [3]
    with serving(tied) as engine:
        assert engine.submit([5, 6], params(20)).result(60).tokens == got.tokens


def test_a_bucket_has_whole_blocks(address):
    with pytest.raises(SettingError, match="multiple of 4096"):
        BucketSender(address, memory=FileMemory(), bucket_bytes=1000)
