"""Folders of `SGLangSyncer(via="disk")`: only what a syncer wrote is ever removed."""

import os
import shutil

import pytest

from miles.errors import SyncError
from tests.sync.test_sglang import Server, same, weights


@pytest.fixture
def server():
    with Server("0.5.17") as server:
        yield server


def test_what_no_syncer_wrote_stays(server, syncer_for, tmp_path):
    (tmp_path / "version-of-mine").mkdir()
    (tmp_path / "version-7").mkdir()
    (tmp_path / "version-7" / "optimizer.pt").write_text("precious")
    (tmp_path / "version-8").write_text("a file")
    (tmp_path / "version-9").symlink_to(tmp_path / "version-of-mine")
    (tmp_path / ".version-7.part").mkdir()
    (tmp_path / ".version-7.part" / "notes").touch()
    before = set(os.listdir(tmp_path))
    syncer = syncer_for(server, via="disk", folder=tmp_path)
    for version in (1, 2):
        syncer.push(weights(version).items(), version=version)
    assert set(os.listdir(tmp_path)) == before | {"version-2"}
    assert (tmp_path / "version-7" / "optimizer.pt").read_text() == "precious"
    for version in (7, 8, 9):
        with pytest.raises(SyncError, match=rf"version-{version}(.part)? is there, and not as"):
            syncer.push(weights(3).items(), version=version)
    assert set(os.listdir(tmp_path)) == before | {"version-2"}
    assert server.weight_version == "2" and not server.paused


def test_what_a_killed_trainer_left_is_removed(server, syncer_for, tmp_path):
    syncer = syncer_for(server, via="disk", folder=tmp_path)
    syncer.push(weights(1).items(), version=1)
    for left in (".version-3.part", ".version-40.part", "version-2"):
        shutil.copytree(tmp_path / "version-1", tmp_path / left)
    (tmp_path / ".version-2.part").mkdir()
    (tmp_path / ".version-2.part" / ".tmp1cjaDg").touch()  # as safetensors writes
    syncer.push(weights(2).items(), version=2)  # over the one that is there
    assert os.listdir(tmp_path) == ["version-2"] and same(server.loaded, weights(2))


def test_an_old_folder_that_cannot_go_is_warned_of(server, syncer_for, tmp_path, monkeypatch):
    syncer = syncer_for(server, via="disk", folder=tmp_path)
    syncer.push(weights(1).items(), version=1)
    remove = shutil.rmtree

    def refuse(path, **options):
        if path.name == "version-1":
            raise PermissionError("it is in use")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="version-1 is no longer used, and stays: it is in use"):
        syncer.push(weights(2).items(), version=2)
    assert same(server.loaded, weights(2))
