"""What shared memory and buckets have in common: how trainer and engine meet, and part."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from miles.errors import SettingError, SyncError
from miles.sync import SharedMemoryReceiver, SharedMemorySyncer
from miles.sync._bucket_receiver import BucketReceiver
from miles.sync._bucket_sender import BucketSender
from miles.sync._memory import FileMemory
from miles.sync._plan import committing
from tests.sync.targets import Target, random_tensors, same


@pytest.fixture
def address(tmp_path):
    return tmp_path / "weights"


@pytest.fixture(params=["shared memory", "direct", "slab"])
def carrier(request):
    return request.param


@pytest.fixture
def receive_for(address, carrier):
    """Starts a receiver; all are closed at the end."""
    receivers = []

    def start(target):
        if carrier == "shared memory":
            receivers.append(SharedMemoryReceiver(target, address))
        else:
            direct = carrier == "direct"
            receivers.append(BucketReceiver(target, address, memory=FileMemory(), direct=direct))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()


@pytest.fixture
def syncer(address, carrier):
    if carrier == "shared memory":
        syncer = SharedMemorySyncer(address, timeout=30)
    else:
        syncer = BucketSender(address, memory=FileMemory(), timeout=30)
    yield syncer
    syncer.close()


def push(syncer, version):
    return syncer.push(random_tensors(version).items(), version=version)


def test_a_commit_waits_for_that_of_another_receiver(receive_for, syncer):
    receive_for(target := Target())
    with ThreadPoolExecutor(1) as pool:
        with committing(target):
            pushed = pool.submit(push, syncer, 1)
            with pytest.raises(TimeoutError):
                pushed.result(0.3)
            target.weight_version = 5
        with pytest.raises(SyncError, match=r"5 is still served: .*version 1 is older than 5"):
            pushed.result(30)
    assert target.weight_version == 5 and not target.seen


class Interruptible(Target):
    """Interrupts the trainer in a commit, which it then finishes."""

    interrupts, served_meanwhile = False, None

    def commit_weights(self, tensors, *, version, alias=False):
        self.served_meanwhile = {name: t.clone() for name, t in self.live.items()}
        if self.interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        super().commit_weights(tensors, version=version, alias=alias)


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_after_ctrl_c_in_a_commit_nothing_that_is_served_is_written(
    receive_for, syncer, interruptible
):
    receive_for(target := Interruptible())
    push(syncer, 1)
    target.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        push(syncer, 2)
    target.interrupts = False
    push(syncer, 3)
    assert same(target.served_meanwhile, random_tensors(2))  # until 3 was committed
    assert target.weight_version == 3 and same(target.live, random_tensors(3))


def test_an_engine_that_was_restarted_gets_the_version_that_the_last_one_served(
    receive_for, syncer
):
    old = receive_for(Target())
    push(syncer, 1)
    old.close()
    with pytest.raises(SyncError, match="no receiver answers"):
        push(syncer, 1)
    receive_for(target := Target())
    assert push(syncer, 1).num_tensors == 5
    assert target.weight_version == 1 and same(target.live, random_tensors(1))
    assert push(syncer, 1).num_tensors == 0


def test_an_engine_that_was_restarted_between_two_pushes_gets_the_same_version(receive_for, syncer):
    old = receive_for(Target())
    push(syncer, 1)
    old.close()
    receive_for(target := Target())
    assert push(syncer, 1).num_tensors == 5
    assert target.weight_version == 1 and same(target.live, random_tensors(1))


class Unhashable(Target):
    __eq__ = object.__eq__


class Slots:
    """Weak references cannot be made to it."""

    __slots__ = ("live", "weight_version")
    weight_tensors, commit_weights = Target.weight_tensors, Target.commit_weights

    commit_seconds, _notes = 0.0, False

    def __init__(self):
        self.live, self.weight_version = random_tensors(0), 0


@pytest.mark.parametrize("kind", [Unhashable, Slots])
def test_a_target_need_not_be_hashable_nor_take_weak_references(receive_for, syncer, kind):
    receive_for(target := kind())
    push(syncer, 1)
    assert target.weight_version == 1 and same(target.live, random_tensors(1))


@pytest.mark.parametrize("kind", [Target, Unhashable, Slots])
def test_all_receivers_of_a_target_share_one_lock_and_others_have_another(kind):
    one, other = kind(), kind()
    assert committing(one) is committing(one) is not committing(other)


# The socket.


def test_a_refused_push_hangs_up_though_a_forked_child_holds_a_copy(receive_for, syncer):
    receive_for(target := Target())
    push(syncer, 1)
    copy = syncer._connection.dup()
    with pytest.raises(SyncError):
        syncer.push([], version=2)
    push(syncer, 2)
    assert target.weight_version == 2
    copy.close()


def test_a_closed_receiver_leaves_the_socket_of_its_successor(address):
    old = SharedMemoryReceiver(Target(), address)
    with closing(SharedMemoryReceiver(target := Target(), address)):
        old.close()
        assert address.is_socket()
        old.close()
        with closing(SharedMemorySyncer(address, timeout=30)) as syncer:
            push(syncer, 1)
    assert target.weight_version == 1 and not address.exists()


def test_a_receiver_that_is_closed_twice_leaves_what_came_after_the_first_time(address):
    old = SharedMemoryReceiver(Target(), address)
    old.close()
    with closing(SharedMemoryReceiver(Target(), address)):  # maybe with the same inode
        old.close()
        assert address.is_socket()


def test_a_file_at_the_address_is_kept_and_an_error(address):
    address.write_text("precious")
    with pytest.raises(SettingError, match=r"cannot listen at .*there is nothing or a socket"):
        SharedMemoryReceiver(Target(), address)
    assert address.read_text() == "precious"


def test_a_socket_that_a_killed_receiver_left_is_replaced(address):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(address))
    receiver = SharedMemoryReceiver(target := Target(), address)
    with closing(receiver), closing(SharedMemorySyncer(address, timeout=30)) as syncer:
        push(syncer, 1)
    assert target.weight_version == 1


def test_a_moment_without_descriptors_does_not_end_a_receiver(address, monkeypatch):
    accept, failed = socket.socket.accept, threading.Event()

    def scarce(listener):
        connection = accept(listener)
        if not failed.is_set():
            failed.set()
            connection[0].close()
            raise OSError(24, "Too many open files")
        return connection

    monkeypatch.setattr(socket.socket, "accept", scarce)
    receiver = SharedMemoryReceiver(target := Target(), address)
    with closing(receiver), closing(SharedMemorySyncer(address, timeout=5)) as syncer:
        with pytest.raises(SyncError):
            push(syncer, 1)
        assert failed.is_set()
        push(syncer, 1)
    assert target.weight_version == 1
