"""The client of SGLang's weight-cache daemon: whom it talks to, and what it refuses to unpickle."""

import base64
import contextlib
import os
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import SyncError
from miles.sync import _weight_cache_daemon
from miles.sync._weight_cache_daemon import Daemon, read_handle, read_message
from tests.sync import processes, weight_cache_fake
from tests.sync.named import tiny
from tests.sync.weight_cache_fake import Shared, World, encode, entry, wait_for


@pytest.fixture
def world(tmp_path):
    with World(tmp_path, tiny("qwen3").bfloat16()) as made:
        yield made


def test_a_daemon_that_is_killed_is_noticed(world, monkeypatch):
    monkeypatch.setattr(_weight_cache_daemon, "open_tensor", weight_cache_fake.Opener())
    process = processes.start(
        weight_cache_fake.serve, world.path, world.config, world.block.entries
    )
    wait_for(world.path)
    world.thread = SimpleNamespace(join=lambda: None)
    syncer = world.syncer()
    with syncer.updating(version=1):
        pass
    with pytest.raises(SyncError, match="the memory of the weights with it") as caught:  # noqa: SIM117
        with syncer.updating(version=2):
            process.kill()
            process.join()
    assert "write all weights again" in caught.value.__notes__[0]
    with pytest.raises(SyncError, match="from a checkpoint"):
        syncer.push([], version=2)
    syncer.close()
    world.thread = None
    with pytest.raises(SyncError, match="no weight-cache daemon answers"):
        Daemon(world.path)


def test_paths_that_are_no_socket_of_ours_are_refused(tmp_path, world):
    world.daemon()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(world.path)
    for name in ("file", "link"):
        with pytest.raises(SyncError, match="is not a socket of this user"):
            Daemon(tmp_path / name)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def foreign(folder) -> list:
    mark = str(folder / "mark")
    return [
        Evil(os.mkdir, mark),
        Evil(eval, f"__import__('os').mkdir({mark!r})"),
        Evil(getattr, "", "join"),
        SimpleNamespace(handle="x"),
        torch.zeros(1),
        slice(1),
        {1, 2},
    ]


def test_foreign_pickles_are_refused_and_not_run(tmp_path):
    for content in foreign(tmp_path):
        with pytest.raises(SyncError, match="the daemon sent a pickle"):
            read_message(pickle.dumps({"status": "ok", "config": content}))
        with pytest.raises(SyncError, match=r"a handle is|the daemon sent a"):
            read_handle(encode(content))
    with pytest.raises(SyncError, match=r"names posix\.mkdir"):
        read_handle(encode(foreign(tmp_path)[0]))
    assert not (tmp_path / "mark").exists()


def test_foreign_answers_of_a_daemon_are_refused(tmp_path, world):
    shared = Shared(torch.zeros(2), tmp_path / "block", 0)
    good = {"status": "ok", "config": {"tp_size": 1}, "entries": {}}
    for number, (raw, text) in enumerate(
        (
            (pickle.dumps(good | {"config": Evil(os.mkdir, "x")}), "with STACK_GLOBAL"),
            (pickle.dumps(shared), "with STACK_GLOBAL"),
            (pickle.dumps(good), "entries={}"),
            (pickle.dumps(good | {"entries": {"w": {"handle": 3}}}), "entry of 'w'"),
            (pickle.dumps({"status": "mismatch", "daemon_config": {}}), "mismatch"),
            (pickle.dumps([1]), r"answered \[1\]"),
            (b"GET / HTTP/1.1", "with BINFLOAT"),
            (b"", "broken pickle"),
        )
    ):
        path = str(tmp_path / f"{number}.sock")
        arguments = {"target": weight_cache_fake.serve, "args": (path, {}, {})}
        thread = threading.Thread(**arguments, kwargs={"raw": raw}, daemon=True)
        thread.start()
        wait_for(path)
        with pytest.raises(SyncError, match=text):
            Daemon(path)
        weight_cache_fake.stop(path)
    assert world.server.calls == []


def test_an_entry_has_to_be_what_it_says(tmp_path, world):
    tensor = torch.zeros(4, 3, dtype=torch.bfloat16)
    right = entry(tensor, tmp_path / "block", 0)
    outside = Shared(tensor, tmp_path / "block", 0)
    function, arguments = outside.__reduce__()
    for wrong in (
        right | {"shape": [3, 4]},
        right | {"dtype": "float32"},
        right | {"handle": encode(Evil(function, *arguments[:3], 1, *arguments[4:]))},
        right | {"handle": encode(Evil(function, *arguments[:2], (9, 1), *arguments[3:]))},
        right | {"handle": encode(Evil(function, *arguments[:2], (-3, 1), *arguments[3:]))},
        right | {"handle": encode(Evil(function, *arguments[:-1]))},
        right | {"handle": encode(Evil(function, *arguments[:1], ("4", 3), *arguments[2:]))},
        right | {"handle": "%%%"},
    ):
        world.block.entries["model.norm.weight"] = wrong
        world.daemon()
        with pytest.raises(SyncError, match="handle"):
            Daemon(world.path)
        weight_cache_fake.stop(world.path)
        world.thread.join()
        os.unlink(world.path)
    world.thread = None


HANDLE = base64.b64decode(encode(Shared(torch.zeros(2, 3), "/block", 512)))
MESSAGE = pickle.dumps({"status": "ok", "entries": {"w": {"shape": [2, 3], "is_param": True}}})


def test_handles_are_read_as_torch_writes_them():
    found = read_handle(base64.b64encode(HANDLE).decode())
    assert found[:7] == ("Tensor", (2, 3), (3, 1), 0, "TypedStorage", torch.float32, 0)
    assert found[7:11] == (b"/block", 24, 512, False)


def test_memory_that_cannot_be_opened_is_an_error_of_ours(world):
    if torch.cuda.is_available():
        pytest.skip("needs a torch without CUDA")
    with pytest.raises(SyncError, match="cannot be opened on cuda:0"):
        world.syncer()


@given(st.data())
def test_damaged_pickles_raise_sync_errors_only(data):
    whole = data.draw(st.sampled_from([HANDLE, MESSAGE]))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SyncError):
        assert isinstance(read_handle(base64.b64encode(damaged).decode()), tuple)
    with contextlib.suppress(SyncError):
        read_message(bytes(damaged))


@given(st.binary(max_size=60))
def test_random_bytes_raise_sync_errors_only(noise):
    with pytest.raises(SyncError):
        read_handle(base64.b64encode(noise).decode())
