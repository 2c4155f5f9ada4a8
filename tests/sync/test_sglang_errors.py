"""What `SGLangSyncer` says of addresses, answers, pauses and disks that are not right."""

import asyncio
import errno
import json
import os
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from miles.errors import SettingError, SyncError
from miles.sync import SGLangSyncer
from tests.sync.test_sglang import VERSIONS, Server, same, weights


@pytest.fixture(params=VERSIONS)
def server(request):
    with Server(request.param) as server:
        yield server


@pytest.mark.parametrize("url", ["127.0.0.1:9", "http://[::1", "ftp://127.0.0.1"])
def test_what_is_no_address_is_called_so(syncer_for, url):
    with pytest.raises(SettingError, match=r"is not an address .*; expected one like http://host"):
        syncer_for(SimpleNamespace(url=url)).push(weights(1).items(), version=1)


def test_proxies_of_the_environment_are_not_used(server, syncer_for, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    syncer_for(server).push(weights(1).items(), version=1)
    assert same(server.loaded, weights(1))


@pytest.mark.parametrize(
    ("path", "answer", "text"),
    [
        ("/server_info", {"tp_size": "many"}, r"/server_info answered tp_size='many'; expected"),
        ("/server_info", {"dp_size": [2]}, r"/server_info answered dp_size=\[2\]; expected"),
        ("/server_info", {"tp_size": -1}, r"/server_info answered tp_size=-1; expected"),
        ("/model_info", {"architectures": [["x"]]}, r"architectures \[\['x'\]\]; expected"),
        ("/model_info", {"architectures": "Llama"}, r"architectures 'Llama'; expected"),
        ("/model_info", {"weight_version": [1]}, r"weight version is \[1\]; expected an integer"),
        ("/model_info", {"weight_version": float("inf")}, r"version is inf; expected an integer"),
    ],
)
def test_nonsense_in_a_field_is_called_so(syncer_for, path, answer, text):
    listener = socket.create_server(("127.0.0.1", 0))

    def talk():
        for _ in range(2):
            connection, _ = listener.accept()
            asked = connection.recv(65536).split()[1].decode()
            plain = {"version": "0.5.17", "weight_version": "0"}
            body = json.dumps(plain | (answer if asked == path else {})).encode()
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % len(body) + body)
            connection.close()

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    server = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(SyncError, match=text):
        syncer_for(server).push(weights(1).items(), version=1)
    listener.close()


@pytest.mark.parametrize("version", ["8", 8.5, True, None])
def test_a_version_is_an_integer(server, syncer_for, version):
    with pytest.raises(SettingError, match=f"version is {version!r}; expected an integer"):
        syncer_for(server).push(weights(1).items(), version=version)
    assert server.calls == []


def test_numpys_integers_are_versions(server, syncer_for):
    report = syncer_for(server).push(weights(1).items(), version=np.int64(3))
    assert server.weight_version == "3" and type(report.version) is int


class Stuck(Server):
    """A pause of somebody else waits for requests that never end."""

    stuck = True

    async def pause_generation(self, body):
        while self.stuck:
            await asyncio.sleep(0.01)
        return await super().pause_generation(body)


IN_PLACE = r"Requests that were paused in place never end.*go on first.*'abort' or 'retract'"
FOR_GOOD = r"by another client .* paused in place waits for them for good, .* started again"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pause_that_never_ends_says_what_may_be_the_reason(syncer_for, version):
    with Stuck(version) as server:
        syncer = syncer_for(server, timeout=0.5)
        with pytest.raises(SyncError, match=rf"serve what they did.*pause_generation.*{FOR_GOOD}"):
            syncer.push(weights(1).items(), version=1)
        assert server.weight_version == "0"
        server.stuck = False
        syncer.push(weights(1).items(), version=1)
        assert same(server.loaded, weights(1))


def test_a_pause_of_ones_own_that_left_requests_says_so(server, syncer_for):
    server.never_idle = True
    with pytest.raises(SyncError, match=rf"serve what they did.*Flush cache failed.*{IN_PLACE}"):
        syncer_for(server, pause=None).push(weights(1).items(), version=1)
    with pytest.raises(SyncError, match="Flush cache failed") as caught:
        syncer_for(server).push(weights(1).items(), version=1)
    assert "in place" not in str(caught.value)


def test_a_closed_syncer_says_so(server, syncer_for):
    syncer = syncer_for(server)
    syncer.close()
    with pytest.raises(SyncError, match="this syncer is closed; make a new one"):
        syncer.push(weights(1).items(), version=1)
    assert server.calls == []


NO_VALUES = torch.empty(3, device="meta")


@pytest.mark.parametrize(
    ("more", "options", "text"),
    [
        ([("embed", torch.ones(2))], {}, "embed came twice"),
        ([("last", NO_VALUES)], {}, "last is on the meta device"),
        ([], {"verify": ["nothing"]}, r"verify names \['nothing'\]"),
        ([("last", torch.ones(1))], {"via": "cuda_ipc"}, "last is no CUDA tensor"),
    ],
)
def test_what_is_wrong_with_weights_that_are_all_there_is_told_before_servers_stand_still(
    server, syncer_for, more, options, text
):
    syncer = syncer_for(server, **options)
    syncer._memory = Picky() if options.get("via") == "cuda_ipc" else None
    with pytest.raises(SyncError, match=rf"servers serve what they did\. {text}"):
        syncer.push([*weights(1).items(), *more], version=1)
    assert server.weight_version == "0" and not server.updates
    assert "/pause_generation" not in server.calls


class Picky:
    """A GPU's memory, to which all weights but one belong."""

    def check(self, name, tensor):
        if name == "last":
            raise SyncError(f"{name} is no CUDA tensor")


FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "of safetensors": safetensors.SafetensorError("I/O error: no space left (os error 28)"),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize("how", FULL)
def test_a_folder_that_cannot_be_written_leaves_nothing_behind(
    server, syncer_for, tmp_path, monkeypatch, how
):
    syncer = syncer_for(server, via="disk", folder=tmp_path)
    syncer.push(weights(1).items(), version=1)
    save = safetensors.torch.save_file

    def full(tensors, path, **options):
        save(tensors, path, **options)
        raise FULL[how]

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SyncError, match=r"serve what they did.*could not be written.*make room"):
        syncer.push(weights(2).items(), version=2)
    assert os.listdir(tmp_path) == ["version-1"]
    monkeypatch.undo()
    syncer.push(weights(2).items(), version=2)
    assert same(server.loaded, weights(2)) and os.listdir(tmp_path) == ["version-2"]


def test_an_error_of_the_trainers_own_leaves_no_folder_either(server, syncer_for, tmp_path):
    def breaking():
        yield "w", torch.zeros(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        syncer_for(server, via="disk", folder=tmp_path).push(breaking(), version=1)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told(server, tmp_path):
    (tmp_path / "file").touch()
    syncer = SGLangSyncer(server.url, via="disk", folder=tmp_path / "file")
    with pytest.raises(SyncError, match="could not be written"):
        syncer.push(weights(1).items(), version=1)
    syncer.close()
