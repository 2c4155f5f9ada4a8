"""Files damaged, disks full and writers killed; the engine serves on."""

import errno
import os
import shutil

import pytest

from miles.errors import SettingError, SyncError
from miles.sync import DiskReceiver, DiskSyncer, _steps
from tests.sync.processes import die, start
from tests.sync.targets import Target, random_tensors, same
from tests.sync.test_disk import (
    push,
    shard,
    sparse,
    sparse_target,
    step,
    truncate,
)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


FAULTS = {
    "shard truncated": (lambda p, v: truncate(shard(p, v)), "model-00001.* bytes; the manifest"),
    "shard gone": (lambda p, v: shard(p, v).unlink(), "cannot read .*model-00001"),
    "value flipped": (
        lambda p, v: flip(shard(p, v), -1),
        "of version 2 .*(checksum|damaged|bytes)",
    ),
    "header flipped": (lambda p, v: flip(shard(p, v), 12), "(is damaged|is missing)"),
    "manifest gone": (lambda p, v: (step(p, v) / "manifest.json").unlink(), "no manifest.json"),
    "manifest cut": (lambda p, v: truncate(step(p, v) / "manifest.json"), "manifest.json is dam"),
    "manifest of another": (
        lambda p, v: shutil.copy(step(p, 1) / "manifest.json", step(p, v)),
        "manifest.json is damaged: ValueError: it says version 1",
    ),
    "folder empty": (
        lambda p, v: (shutil.rmtree(step(p, v)), step(p, v).mkdir()),
        "no manifest.json",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_named_and_the_old_version_serves_on(
    syncer, receiver, target, tmp_path, fault
):
    damage, text = FAULTS[fault]
    push(syncer, 1)
    receiver.receive_once()
    push(syncer, 2)
    damage(tmp_path, 2)
    with pytest.raises(SyncError, match="version 2 was not taken, 1 is still served: .*" + text):
        receiver.receive_once()
    assert same(target.live, random_tensors(1)) and target.weight_version == 1
    push(syncer, 3)
    if "manifest" in fault or fault == "folder empty" or syncer._delta:
        syncer._last = {}  # what a chain needs is gone: a full one helps
        push(syncer, 4)
    assert receiver.receive_once() in (3, 4)
    assert same(target.live, random_tensors(target.weight_version))


@pytest.mark.parametrize("delta", [False, True])
def test_a_flipped_byte_of_a_manifest_never_gives_wrong_weights(tmp_path, delta):
    syncer = DiskSyncer(tmp_path, delta=delta)
    for version in (1, 2):
        syncer.push(sparse(version).items(), version=version)
    path = step(tmp_path, 2) / "manifest.json"
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole)
        flip(path, place)
        target = sparse_target()
        try:
            DiskReceiver(target, tmp_path).receive_once()
        except SyncError:
            refused += 1
            assert target.weight_version == 0 and same(target.live, sparse_target().live)
        else:  # what nobody reads, such as the digest of no base
            assert same(target.live, sparse(2))
    assert refused > 0.8 * len(whole) / 3


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["write_tensors", "write_json", "sync_folder"])
def test_a_full_disk_is_said_so_and_leaves_nothing(syncer, tmp_path, monkeypatch, what):
    push(syncer, 1)
    monkeypatch.setattr(_steps, what, no_room)
    with pytest.raises(SyncError, match=r"disk of .* is full, so version 2 was not written"):
        push(syncer, 2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_1"]
    monkeypatch.undo()
    push(syncer, 2)
    target = Target()
    DiskReceiver(target, tmp_path).receive_once()
    assert same(target.live, random_tensors(2))


def test_an_error_of_safetensors_that_means_a_full_disk_is_known():
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert _steps.is_disk_full(RuntimeError(text))
    assert not _steps.is_disk_full(RuntimeError("I/O error: no such file (os error 2)"))


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path, monkeypatch):
    syncer = DiskSyncer(tmp_path)

    def denied(*_):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(_steps, "write_tensors", denied)
    with pytest.raises(SyncError, match=r"version 1 was not written: .*no"):
        push(syncer, 1)


def test_two_trainers_of_one_folder_are_refused(tmp_path):
    syncer = DiskSyncer(tmp_path)
    with pytest.raises(SyncError, match="another trainer writes to"):
        DiskSyncer(tmp_path)
    syncer.close()
    DiskSyncer(tmp_path).close()
    with pytest.raises(SyncError, match="closed"):
        push(syncer, 1)


def test_a_closed_trainer_lets_go_of_the_folder_that_a_forked_child_holds_too(tmp_path):
    syncer = DiskSyncer(tmp_path)
    held = os.dup(syncer._lock.fileno())  # what a child has, a worker of a DataLoader for one
    try:
        with pytest.raises(SyncError, match="another trainer writes to"):
            DiskSyncer(tmp_path)
        syncer.close()
        DiskSyncer(tmp_path).close()
    finally:
        os.close(held)


def test_a_forked_child_that_closes_its_copy_leaves_the_folder_to_the_trainer(tmp_path):
    syncer = DiskSyncer(tmp_path)
    if (child := os.fork()) == 0:
        try:
            syncer.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(SyncError, match="another trainer writes to"):
        DiskSyncer(tmp_path)
    syncer.close()


@pytest.mark.parametrize("setting", ["full_every", "keep", "shard_bytes"])
def test_numbers_out_of_range(tmp_path, setting):
    with pytest.raises(SettingError, match=f"{setting} is 0; expected 1 or more"):
        DiskSyncer(tmp_path, **{setting: 0})


PHASES = ["first file", "second file", "index", "manifest", "rename", "renamed"]


def dying_writer(folder, phase, delta):
    syncer = DiskSyncer(folder, delta=delta, shard_bytes=20, keep=5)
    push(syncer, 1)
    write, write_json, rename = _steps.write_tensors, _steps.write_json, _steps.Path.rename

    def counting(path, held):
        if phase == "first file" or (phase == "second file" and "00002" in path.name):
            path.write_bytes(b"half")
            die()
        write(path, held)

    def dying_json(path, value):
        if phase in path.name:
            path.write_text("{")
            die()
        write_json(path, value)

    def dying_rename(path, to):
        if phase == "rename":
            die()
        rename(path, to)
        die()

    _steps.write_tensors, _steps.write_json = counting, dying_json
    _steps.Path.rename = dying_rename
    push(syncer, 2)


@pytest.mark.parametrize(
    ("phase", "delta"), [(p, d) for p in PHASES for d in (False, True) if not d or p != "index"]
)
def test_a_trainer_killed_while_it_writes_leaves_whole_versions_only(tmp_path, phase, delta):
    child = start(dying_writer, str(tmp_path), phase, delta)
    child.join(40)
    assert child.exitcode == 9
    target = Target()
    receiver = DiskReceiver(target, tmp_path)
    version = receiver.receive_once()
    assert version == (2 if phase == "renamed" else 1)
    assert same(target.live, random_tensors(version))
    syncer = DiskSyncer(tmp_path, delta=delta)  # the restarted trainer
    assert not list(tmp_path.glob("*.partial"))
    push(syncer, 3)
    assert receiver.receive_once() == 3 and same(target.live, random_tensors(3))
