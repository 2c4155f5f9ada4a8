"""What the folder carrier believes: not memory, not names, not manifests."""

import errno
import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch

from miles.errors import SettingError, SyncError
from miles.sync import DiskReceiver, DiskSyncer, _steps
from miles.sync._manifest import Manifest
from tests.sync.targets import Target
from tests.sync.test_disk import push, sparse, sparse_target, step, wait_for


@pytest.mark.parametrize("delta", [False, True])
def test_names_that_shared_a_buffer_once_are_not_tied_for_ever(tmp_path, delta):
    values = {"a": torch.ones(4), "b": torch.ones(4)}
    buffer = torch.empty(4)

    def stream():
        for name, value in values.items():
            yield name, buffer.copy_(value)

    syncer = DiskSyncer(tmp_path, delta=delta)
    target = Target({name: torch.zeros(4) for name in values})
    follower = DiskReceiver(target, tmp_path)
    for version in (1, 2, 3, 4):
        syncer.push(stream(), version=version)
        late = Target({name: torch.zeros(4) for name in values})
        DiskReceiver(late, tmp_path).receive_once()
        follower.receive_once()
        for served in (target, late):
            assert all(torch.equal(served.live[name], values[name]) for name in values)
        values["b"] += version % 2
    syncer.close()


@pytest.mark.parametrize("delta", [False, True])
def test_tied_names_that_part_are_both_written(tmp_path, delta):
    syncer = DiskSyncer(tmp_path, delta=delta)
    w = torch.ones(4)
    assert syncer.push([("a", w), ("b", w)], version=1).num_tensors == 1
    assert syncer.push([("a", w), ("b", w + 1)], version=2).num_tensors == 2
    target = Target({"a": torch.zeros(4), "b": torch.zeros(4)})
    DiskReceiver(target, tmp_path).receive_once()
    assert (target.live["a"] == 1).all() and (target.live["b"] == 2).all()


@pytest.mark.parametrize("name", ["step_10", "step_10.partial", "step_10.deleted"])
def test_folders_of_others_are_refused_and_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    precious = tmp_path / name / "optimizer.pt"
    precious.write_text("precious")
    with pytest.raises(SyncError, match=f"{name} is there and no version .*another folder"):
        DiskSyncer(tmp_path)
    assert precious.read_text() == "precious"
    precious.unlink()
    precious.parent.rmdir()
    DiskSyncer(tmp_path).close()


def test_a_folder_that_comes_later_is_not_pruned(tmp_path):
    syncer = DiskSyncer(tmp_path, keep=1)
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "optimizer.pt").touch()
    for version in (2, 3):
        push(syncer, version)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_1", "step_3"]


@pytest.mark.parametrize("version", [-1, 0, True, 1.0, "1"])
def test_versions_are_integers_of_one_or_more(tmp_path, version):
    syncer = DiskSyncer(tmp_path)
    with pytest.raises(SettingError, match="expected an integer of 1 or more"):
        push_as(syncer, version)
    assert not list(tmp_path.glob("step_*"))


def push_as(syncer, version):
    return syncer.push([("w", torch.ones(3))], version=version)


def entry(key, value):
    return lambda read: read["tensors"]["w"].__setitem__(key, value)


def header(key, value):
    return lambda read: read["tensors"]["w"]["delta"].__setitem__(key, value)


def own_base(read):
    read["base"] = 2
    fields = {key: value for key, value in read.items() if key != "format"}
    read["base_digest"] = Manifest(**fields).digest


MANIFESTS = {
    "absolute file": lambda read: read["files"].__setitem__("/etc/passwd", 1),
    "file above": entry("file", "../x"),
    "file not listed": entry("file", "model-00009.safetensors"),
    "file a list": entry("file", ["a"]),
    "shape null": entry("shape", None),
    "dtype of none": entry("dtype", "torch.nn"),
    "checksum a text": entry("checksum", "1"),
    "alias a list": lambda read: read["aliases"].__setitem__("x", ["w"]),
    "alias of nothing": lambda read: read["aliases"].__setitem__("x", "y"),
    "size negative": lambda read: read["files"].__setitem__("model-00001.safetensors", -1),
    "num_changed a text": header("num_changed", "1"),
    "num_changed zero": header("num_changed", 0),
    "encoding a list": header("encoding", ["x"]),
    "delta shape a number": header("shape", 5),
    "no delta": lambda read: read["tensors"]["w"].pop("delta"),
    "its own base": own_base,
    "base of a later one": lambda read: read.__setitem__("base", 7),
    "version a truth": lambda read: read.__setitem__("version", True),
    "one key more": lambda read: read.__setitem__("more", 1),
}


@pytest.mark.parametrize("edit", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_not_of_our_form_is_refused(tmp_path, edit):
    syncer = DiskSyncer(tmp_path, delta=True)
    for version in (1, 2):
        syncer.push(sparse(version).items(), version=version)
    path = step(tmp_path, 2) / "manifest.json"
    read = json.loads(path.read_text())
    edit(read)
    path.write_text(json.dumps(read))
    target = sparse_target()
    with pytest.raises(SyncError, match=r"version 2 was not taken, 0 is still served: .*(json|w)"):
        DiskReceiver(target, tmp_path).receive_once()
    assert target.weight_version == 0


@pytest.mark.parametrize("older", [1, 3, "x"])
def test_a_manifest_of_another_format_says_so(tmp_path, older):
    push(DiskSyncer(tmp_path), 1)
    path = step(tmp_path, 1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": older}))
    text = f"version 1 is of format {older!r}; expected 2, with another checksum: push again"
    with pytest.raises(SyncError, match=text):
        DiskReceiver(Target(), tmp_path).receive_once()
    assert not (tmp_path / "step_2").exists()


@pytest.mark.parametrize("name", ["manifest.json", "model-00001.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    push(DiskSyncer(tmp_path), 1)
    path = step(tmp_path, 1) / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SyncError, match=f"{name}.* no regular file"):
        DiskReceiver(Target(), tmp_path).receive_once()


def test_a_thread_outlives_errors_of_the_file_system_and_tries_the_version_again(
    tmp_path, monkeypatch
):
    push(DiskSyncer(tmp_path), 1)
    target = Target()
    receiver = DiskReceiver(target, tmp_path, poll_seconds=0.01)
    real, failing = Path.read_bytes, [True]

    def listing(*_):
        raise OSError(errno.ESTALE, "stale")

    def reading(path):
        if failing:
            raise OSError(errno.EIO, "once")
        return real(path)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with monkeypatch.context() as patch:
            patch.setattr(_steps.Steps, "versions", listing)
            receiver.start()
            wait_for(lambda: receiver.error is not None)
        assert "stale" in str(receiver.error)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", reading)
            wait_for(lambda: "once" in str(receiver.error))
            time.sleep(0.05)
            assert target.weight_version == 0
            failing.clear()
            wait_for(lambda: target.weight_version == 1)
        wait_for(lambda: receiver.error is None)
        receiver.close()
    assert len([w for w in caught if w.category is UserWarning]) == 2
