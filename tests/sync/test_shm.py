import os
import signal
import socket
import stat
import threading
import time
from contextlib import closing

import pytest
import torch

from miles.errors import SettingError, SyncError
from miles.protocols import WeightSyncer
from miles.sync import InProcessSyncer, SharedMemoryReceiver, SharedMemorySyncer, _session, shm
from tests.models import params, serving, tiny
from tests.sync import processes
from tests.sync.targets import Target, random_tensors, same, serve, tensors
from tests.sync.test_inprocess import BROKEN


@pytest.fixture
def address(tmp_path):
    return tmp_path / "weights"


@pytest.fixture
def target(address):
    target = Target()
    SharedMemoryReceiver(target, address)
    return target


@pytest.fixture
def syncer(target, address):
    syncer = SharedMemorySyncer(address, timeout=30)
    yield syncer
    syncer.close()


def test_values_arrive_bit_for_bit(target, syncer):
    assert isinstance(syncer, WeightSyncer)
    wanted = random_tensors(1)
    report = syncer.push(wanted.items(), version=1)
    assert same(target.live, wanted) and target.weight_version == 1
    assert (report.version, report.num_tensors, report.num_bytes) == (1, 5, 86)


def test_values_are_cast_to_the_targets_dtype(target, syncer):
    wanted = {name: tensor.double() for name, tensor in random_tensors(1).items()}
    syncer.push(wanted.items(), version=1)
    assert {name: t.dtype for name, t in target.live.items()} == {
        name: t.dtype for name, t in tensors().items()
    }
    assert all(torch.equal(t, wanted[name].to(t.dtype)) for name, t in target.live.items())


def test_what_is_served_is_the_buffer_itself_and_both_take_turns(target, syncer):
    pointers = []
    for version in range(1, 5):
        syncer.push(random_tensors(version).items(), version=version)
        pointers.append(target.live["weight"].data_ptr())
    assert pointers[0] == pointers[2] != pointers[1] == pointers[3]


def test_a_push_never_writes_memory_that_is_served(target, syncer):
    syncer.push(random_tensors(1).items(), version=1)
    held, writes = target.live, []

    def slowly():
        for name, tensor in random_tensors(2).items():
            yield name, tensor
            writes.append(same(held, random_tensors(1)))

    syncer.push(slowly(), version=2)
    assert writes == [True] * 5
    assert same(held, random_tensors(1)) and same(target.live, random_tensors(2))
    # A failed push leaves its half-written buffer out of service too.
    with pytest.raises(SyncError):
        syncer.push([*list(random_tensors(3).items())[:3]], version=3)
    assert same(target.live, random_tensors(2))
    syncer.push(random_tensors(4).items(), version=4)
    assert same(target.live, random_tensors(4))


def test_the_version_that_is_served_is_not_pushed_again(target, syncer):
    syncer.push(random_tensors(1).items(), version=3)
    report = syncer.push(random_tensors(2).items(), version=3)
    assert (report.version, report.num_tensors, report.num_bytes) == (3, 0, 0)
    assert same(target.live, random_tensors(1)) and len(target.seen) == 1


def test_versions_only_grow(target, syncer, address):
    syncer.push(random_tensors(1).items(), version=5)
    for again in (syncer, SharedMemorySyncer(address)):
        with pytest.raises(SyncError, match="version 4 is older than 5"):
            again.push(random_tensors(2).items(), version=4)
        syncer.close()
    assert same(target.live, random_tensors(1)) and target.weight_version == 5


@pytest.mark.parametrize("other", [2, 9])
def test_a_version_that_another_trainer_brought_meanwhile_stays(target, syncer, other):
    syncer.push(random_tensors(1).items(), version=1)

    def while_another_pushes():
        yield from random_tensors(2).items()
        InProcessSyncer(target).push(random_tensors(7).items(), version=other)

    reason = "2 is older than 9" if other == 9 else "the engine got version 2 from another"
    with pytest.raises(SyncError, match=f"2 was not taken, {other} is still served: .*{reason}"):
        syncer.push(while_another_pushes(), version=2)
    assert same(target.live, random_tensors(7)) and target.weight_version == other
    syncer.push(random_tensors(3).items(), version=10)
    assert same(target.live, random_tensors(3))


@pytest.mark.parametrize(("text", "weights"), BROKEN)
def test_what_does_not_fit_is_named_and_the_old_version_serves_on(target, syncer, text, weights):
    syncer.push(random_tensors(1).items(), version=1)
    with pytest.raises(SyncError, match=text):
        syncer.push(weights, version=2)
    assert same(target.live, random_tensors(1)) and target.weight_version == 1
    syncer.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(2)) and target.weight_version == 2


@pytest.mark.parametrize("shape", [(64, 64), (300, 500)])
def test_an_unknown_tensor_is_not_taken_for_a_tied_one_when_memory_is_reused(address, shape):
    live = {f"w{i}": torch.zeros(shape) for i in range(4)}
    SharedMemoryReceiver(Target(live), address)

    def passing_by():
        for name in [*live, "bias"]:
            yield name, torch.randn(shape)

    with pytest.raises(SyncError, match=r"unknown tensors \['bias'\]"):
        SharedMemorySyncer(address).push(passing_by(), version=1)


def test_a_flipped_byte_is_found_before_anything_is_served(target, syncer, monkeypatch):
    syncer.push(random_tensors(1).items(), version=1)
    send = shm._send

    def flipping(connection, message, fds=()):
        if "written" in message:
            half = syncer._session._buffers[syncer._session._next]["half"]
            half.view(torch.uint8)[3] ^= 1
        send(connection, message, fds)

    monkeypatch.setattr(shm, "_send", flipping)
    with pytest.raises(SyncError, match=r"version 2 was not taken, 1 is still.*half arrived"):
        syncer.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(1)) and target.weight_version == 1
    monkeypatch.undo()
    syncer.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(2)) and target.weight_version == 2


@pytest.mark.parametrize("change", [lambda w: w[:-1], lambda w: [[a, b - 1] for a, b in w]])
def test_a_part_that_was_never_announced_is_not_served(target, syncer, monkeypatch, change):
    syncer.push(random_tensors(1).items(), version=1)
    send = shm._send

    def silent(connection, message, fds=()):
        if "written" in message:
            message = {"written": change(message["written"])}
        send(connection, message, fds)

    monkeypatch.setattr(shm, "_send", silent)
    with pytest.raises(SyncError, match=r"1 is still.*version 2 did not arrive whole; push it"):
        syncer.push(random_tensors(2).items(), version=2)
    monkeypatch.undo()
    assert same(target.live, random_tensors(1))
    syncer.push(random_tensors(3).items(), version=3)
    assert same(target.live, random_tensors(3))


@pytest.mark.parametrize("told", [1, 50_000])
def test_weights_of_many_announcements_arrive(address, monkeypatch, told):
    monkeypatch.setattr(shm, "_TOLD", told)
    live = {f"w{i}": torch.zeros(3000, i) for i in range(6)}
    with closing(SharedMemoryReceiver(target := Target(live), address)):
        for version in (1, 2, 3):
            order = sorted(live, key=lambda name: (int(name[1:]) % 2, name))  # with gaps
            given = {name: torch.randn(live[name].shape) for name in order}
            syncer = SharedMemorySyncer(address)
            syncer.push(given.items(), version=version)
            syncer.close()
            assert same(target.live, given)


def test_a_commit_that_fails_is_reported_with_its_reason(target, syncer, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(target, "commit_weights", fail)
    with pytest.raises(SyncError, match="ZeroDivisionError: boom"):
        syncer.push(random_tensors(1).items(), version=1)
    monkeypatch.undo()
    syncer.push(random_tensors(1).items(), version=1)
    assert same(target.live, random_tensors(1))


def test_a_sender_that_goes_away_makes_room_for_the_next(target, syncer, address):
    syncer.push(random_tensors(1).items(), version=1)
    served = target.live
    syncer.close()
    other = SharedMemorySyncer(address)
    other.push(random_tensors(2).items(), version=2)
    assert same(served, random_tensors(1)) and same(target.live, random_tensors(2))
    other.close()
    syncer.push(random_tensors(3).items(), version=3)
    assert same(target.live, random_tensors(3))


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x01", b"\x05\x00\x00\x00{", b"\x02\x00\x00\x00xx", b"\x02\x00\x00\x00{}" * 2],
)
@pytest.mark.filterwarnings("ignore:a weight sender was dropped")
def test_a_stranger_that_hangs_up_or_talks_nonsense_does_no_harm(target, syncer, address, garbage):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(address))
        stranger.recv(65536)
        stranger.sendall(garbage)
        stranger.shutdown(socket.SHUT_WR)
        stranger.recv(1)
    syncer.push(random_tensors(1).items(), version=1)
    assert same(target.live, random_tensors(1))


def test_only_this_user_reaches_the_socket(target, address):
    assert stat.S_IMODE(os.stat(address).st_mode) == 0o600


def test_nobody_at_the_address_is_an_error_that_says_so(address):
    with pytest.raises(SyncError, match=r"no receiver answers at .*weights.*push again"):
        SharedMemorySyncer(address).push(random_tensors(1).items(), version=1)


def test_a_closed_receiver_listens_no_more(target, address):
    receiver = SharedMemoryReceiver(target, address.with_name("other"))
    receiver.close()
    assert not address.with_name("other").exists()
    with pytest.raises(SyncError, match="no receiver answers"):
        SharedMemorySyncer(address.with_name("other")).push([], version=1)


def test_a_closed_receiver_takes_nothing_more_of_a_trainer_that_is_connected(address):
    receiver, syncer = (
        SharedMemoryReceiver(target := Target(), address),
        SharedMemorySyncer(address),
    )
    syncer.push(random_tensors(1).items(), version=1)
    receiver.close()
    for _ in range(2):
        with pytest.raises(SyncError, match=r"(went away|no receiver answers) at .*weights"):
            syncer.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(1)) and target.weight_version == 1


def test_a_trainer_that_comes_while_the_receiver_is_closed_is_hung_up_on(address, monkeypatch):
    check = _session._check_peer

    def closing(connection, who):
        check(connection, who)
        if who == "a weight sender":
            receiver.close()

    receiver, syncer = (
        SharedMemoryReceiver(target := Target(), address),
        SharedMemorySyncer(address),
    )
    monkeypatch.setattr(_session, "_check_peer", closing)
    with pytest.raises(SyncError, match="version 1 was not pushed"):
        syncer.push(random_tensors(1).items(), version=1)
    assert target.weight_version == 0


def test_a_receiver_that_does_not_answer_in_time_is_an_error(address):
    target = Target(commit_seconds=0.5)
    SharedMemoryReceiver(target, address)
    syncer = SharedMemorySyncer(address, timeout=0.1)
    with pytest.raises(SyncError, match="version 1 was not pushed"):
        syncer.push(random_tensors(1).items(), version=1)
    patient = SharedMemorySyncer(address, timeout=30)
    patient.push(random_tensors(1).items(), version=1)
    patient.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(2))


def test_a_receiver_killed_during_a_push_is_an_error_and_its_successor_is_served(address):
    context = processes.CONTEXT

    def start(commit_seconds: float):
        ready = context.Event()
        child = context.Process(target=serve, args=(str(address), ready, commit_seconds))
        child.start()
        assert ready.wait(60)
        return child

    child = start(commit_seconds=60)
    syncer = SharedMemorySyncer(address, timeout=30)
    timer = threading.Timer(0.3, os.kill, (child.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(SyncError, match=r"receiver went away at .*version 1 was not pushed"):
        syncer.push(random_tensors(1).items(), version=1)
    child.join()
    child = start(commit_seconds=0)
    assert syncer.push(random_tensors(1).items(), version=1).version == 1
    child.kill()
    child.join()


def test_a_closed_session_leaves_no_descriptor_open(target, syncer):
    before = len(os.listdir("/proc/self/fd"))
    for version in range(1, 4):
        syncer.push(random_tensors(version).items(), version=version)
        syncer.close()
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_an_engine_answers_with_the_trainers_weights(address):
    with serving(tiny("qwen3_moe", tie_word_embeddings=True)) as engine:
        SharedMemoryReceiver(engine, address)
        tied = tiny("qwen3_moe", seed=1, tie_word_embeddings=True)
        syncer = SharedMemorySyncer(address)
        for version in (1, 2, 3):
            syncer.push(tied.state_dict().items(), version=version)
        got = engine.submit([5, 6], params(20)).result(60)
        syncer.close()
    assert got.weight_versions == [3]
    with serving(tied) as engine:
        assert engine.submit([5, 6], params(20)).result(60).tokens == got.tokens


@pytest.mark.parametrize("name", ["nowhere/weights", "x" * 120])
def test_an_address_that_cannot_be_is_refused_with_what_to_do(tmp_path, name):
    with pytest.raises(SettingError, match="a folder that exists"):
        SharedMemoryReceiver(Target(), tmp_path / name)


def test_what_a_failed_commit_left_in_service_is_not_written_to(address):
    target = Target()
    whole = target.commit_weights

    def half(tensors, *, version, alias=False):
        target.live = dict(target.live) | {"weight": tensors["weight"]}
        raise RuntimeError("no memory")

    def breaking():
        yield "weight", random_tensors(3)["weight"]
        raise ZeroDivisionError

    receiver, syncer = SharedMemoryReceiver(target, address), SharedMemorySyncer(address)
    syncer.push(random_tensors(1).items(), version=1)
    target.commit_weights = half
    with pytest.raises(SyncError, match="version 2 was not taken, 1 is still served"):
        syncer.push(random_tensors(2).items(), version=2)
    target.commit_weights = whole
    before = {name: tensor.clone() for name, tensor in target.live.items()}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            syncer.push(breaking(), version=3)
    assert same(target.live, before)
    syncer.push(random_tensors(4).items(), version=4)
    assert same(target.live, random_tensors(4))
    syncer.close()
    receiver.close()


def test_a_second_name_in_a_stream_may_be_another_tensor_in_the_same_memory(address):
    receiver, syncer = SharedMemoryReceiver(Target(), address), SharedMemorySyncer(address)
    known = random_tensors(1)

    def stream():
        yield from known.items()
        yield "head", known["weight"].mul_(2)

    with pytest.raises(SyncError, match=r"unknown tensors \['head'\]"):
        syncer.push(stream(), version=1)
    tied = [*known.items(), ("head", known["weight"])]
    assert syncer.push(tied, version=1).num_tensors == len(known)
    syncer.close()
    receiver.close()


class Slow(Target):
    """Commits one after the other, as an engine does between its steps."""

    def __init__(self):
        super().__init__()
        self.lock, self.begun = threading.Lock(), threading.Event()

    def commit_weights(self, tensors, *, version, alias=False):
        self.begun.set()
        with self.lock:
            super().commit_weights(tensors, version=version, alias=alias)


def test_a_commit_that_waited_for_another_does_not_take_it_back(tmp_path):
    target, results = Slow(), {}
    receivers = [SharedMemoryReceiver(target, tmp_path / name) for name in "ab"]
    newer, older = (SharedMemorySyncer(tmp_path / name, timeout=30) for name in "ab")

    def push(syncer, version):
        try:
            syncer.push(random_tensors(version).items(), version=version)
            results[version] = "served"
        except SyncError as error:
            results[version] = str(error)

    with target.lock:
        threads = [threading.Thread(target=push, args=(newer, 8))]
        threads[0].start()
        assert target.begun.wait(30)
        threads.append(threading.Thread(target=push, args=(older, 7)))
        threads[1].start()
        time.sleep(0.3)  # for the second to come as far as it gets
    for thread in threads:
        thread.join(30)
    assert results[8] == "served" and "version 7 is older than 8" in results[7]
    assert target.weight_version == 8 and same(target.live, random_tensors(8))
    for end in (newer, older, *receivers):
        end.close()
