"""`SGLangSyncer` against a server that speaks the protocols of 0.5.17 and 0.5.21."""

import base64
import io
import pickle
import socket
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from miles.errors import SettingError, SyncError
from miles.precision import BlockFP8, convert_, export
from miles.protocols import WeightSyncer
from miles.sync import SGLangSyncer
from miles.sync._sglang_client import Client
from tests.rollout.sglang_fake import FakeSGLang, Refusal

VERSIONS = ["0.5.17", "0.5.21"]
GLOBALS = {
    "types.SimpleNamespace", "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
    "torch.multiprocessing.reductions.rebuild_cuda_tensor",
    "torch.storage.TypedStorage", "torch.Tensor",
    "builtins.getattr", "torch._C._VariableFunctionsClass",
}  # fmt: skip
"""A part of what SGLang's unpicklers let through; torch's dtypes come beside."""

DEFAULT_LOADER = ("auto", "safetensors")
"""Formats with which SGLang reads new weights from files; "dummy" and others it refuses."""


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        found = super().find_class(module, name)
        assert f"{module}.{name}" in GLOBALS or isinstance(found, torch.dtype), (module, name)
        return found


def load(payload: str):
    return Unpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()


class Server(FakeSGLang):
    """Keeps the weights that it is sent, as they come: what fails halfway stays halfway."""

    def __init__(self, version: str, **settings) -> None:
        super().__init__(version, **settings)
        self.loaded: dict[str, torch.Tensor] = {}
        self.fail_at: str | None = None
        self.paused_at_update: list[bool] = []
        self.never_idle = False
        self.load_format = "auto"
        self.info: dict[str, str] = {}

    async def server_info(self, body):
        return await super().server_info(body) | self.info

    @property
    def paused(self) -> bool:
        told = [path for path in self.calls if path.endswith("_generation")]
        return told[-1:] == ["/pause_generation"]

    async def flush_cache(self, body):
        if self.never_idle:
            raise Refusal(400, {"message": "Flush cache failed."})
        return await super().flush_cache(body)

    def update(self, name, body):
        super().update(name, body)
        count = sum(called == name for called, _ in self.updates)
        if self.fail_at == f"{name} {count}":
            self.fail_at = None
            raise Refusal(400, {"success": False, "message": "no memory is left"})
        if name == "update_weights_from_tensor":
            self.paused_at_update.append(self.paused)
            assert body["flush_cache"] is False
            content = load(body["serialized_named_tensors"][0])
            assert body["load_format"] == ("flattened_bucket" if type(content) is dict else None)
            if type(content) is dict:
                self.take(content["flattened_tensor"], content["metadata"])
            else:
                self.loaded |= {name: tensor.clone() for name, tensor in content}
        elif name == "update_weights_from_disk":
            load_format = body.get("load_format") or self.load_format
            if load_format not in DEFAULT_LOADER:
                message = f"Failed to get model loader: <{load_format}>."
                raise Refusal(400, {"success": False, "message": message})
            self.load_format = load_format
            for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
                self.loaded |= load_file(file)
        elif name == "init_weights_update_group":
            self.joining = threading.Thread(target=self.join, args=(body,))
            self.joining.start()
        elif name == "update_weights_from_distributed":
            dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
            sizes = [
                dtype.itemsize * torch.Size(shape).numel()
                for dtype, shape in zip(dtypes, body["shapes"], strict=True)
            ]
            flat, at, metadata = torch.empty(sum(sizes), dtype=torch.uint8), 0, []
            for i, size in enumerate(sizes):
                metadata.append(
                    SimpleNamespace(
                        name=body["names"][i], shape=body["shapes"][i], dtype=dtypes[i],
                        start_idx=at, end_idx=at + size,
                    )
                )  # fmt: skip
                at += size
            self.joining.join(30)
            options = dist.BroadcastOptions()
            self.group.broadcast([flat], options).wait()
            self.take(flat, metadata)
        return {"success": True, "message": "Success."}

    def join(self, body) -> None:
        """As SGLang does; a name is taken once in a process, so not by its function here."""
        rank, size, name = body["rank_offset"], body["world_size"], body["group_name"]
        store = dist.TCPStore(body["master_address"], body["master_port"], size, is_master=False)
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self.group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))

    def take(self, flat, metadata) -> None:
        for weight in metadata:
            part = flat[weight.start_idx : weight.end_idx]
            self.loaded[weight.name] = part.view(weight.dtype).reshape(weight.shape)
            self.weights[weight.name] = self.loaded[weight.name].float().tolist()

    def names(self) -> list[str]:
        return [name for name, _ in self.updates]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(100, 8, generator=generator).bfloat16(),
        "odd": torch.randint(256, (3,), generator=generator).to(torch.uint8),
        "norm": torch.randn(8, generator=generator),
        "codes": torch.randn(16, 16, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.randn((), generator=generator),
    }


def same(held, expected) -> bool:
    return held.keys() == expected.keys() and all(
        held[n].dtype == t.dtype
        and held[n].shape == t.shape
        and torch.equal(held[n].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))
        for n, t in expected.items()
    )


@pytest.fixture(params=VERSIONS)
def server(request):
    with Server(request.param) as server:
        yield server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_weights_arrive_bit_for_bit_while_the_server_is_paused(server, syncer_for):
    syncer = syncer_for(server)
    assert isinstance(syncer, WeightSyncer)
    for version in (1, 2):
        report = syncer.push(weights(version).items(), version=version)
        assert same(server.loaded, weights(version)) and server.weight_version == str(version)
    assert (report.num_tensors, report.num_bytes, report.num_buckets) == (5, 1895, 3)
    assert set(report.phases) == {"gather", "load", "commit", "pause"}
    assert all(server.paused_at_update) and not server.paused


def test_the_calls_are_those_of_the_servers_version(server, syncer_for):
    syncer_for(server).push(weights(1).items(), version=1)
    session = ["begin_weight_update"], ["end_weight_update"]
    begin, end = session if server.strict else ([], [])
    version = ["update_weight_version"]
    updates = ["update_weights_from_tensor"] * 3
    assert server.names() == version + begin + updates + end + version
    said = [body for name, body in server.updates if name == "update_weight_version"]
    assert [max(int(body["new_version"]), -1) for body in said] == [-1, 1]
    assert not any(body["abort_all_requests"] for body in said)
    calls = [path for path in server.calls if "info" not in path]
    assert calls[:3] == ["/continue_generation", "/pause_generation", "/flush_cache"]
    assert calls[-1] == "/continue_generation"


def test_the_served_version_is_not_pushed_again_and_versions_only_grow(server, syncer_for):
    syncer = syncer_for(server)
    syncer.push(weights(1).items(), version=3)
    before = len(server.calls)
    assert syncer.push(weights(2).items(), version=3).num_tensors == 0
    assert server.calls[before:] == ["/model_info"]
    with pytest.raises(SyncError, match="version 2 is older than 3"):
        syncer_for(server).push(weights(2).items(), version=2)
    assert same(server.loaded, weights(1))


def test_by_disk_the_folder_is_whole_and_the_last_one_only(server, syncer_for, tmp_path):
    syncer = syncer_for(server, via="disk", folder=tmp_path / "weights")
    for version in (1, 2):
        syncer.push(weights(version).items(), version=version)
        assert same(server.loaded, weights(version)) and server.weight_version == str(version)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-2"]
    assert "begin_weight_update" not in server.names()


@pytest.mark.parametrize("started_with", ["auto", "dummy", "sharded_state"])
def test_by_disk_the_format_is_not_the_one_the_server_was_started_with(
    server, syncer_for, tmp_path, started_with
):
    server.load_format = started_with
    syncer_for(server, via="disk", folder=tmp_path).push(weights(1).items(), version=1)
    assert same(server.loaded, weights(1)) and server.weight_version == "1"
    body = next(body for name, body in server.updates if name == "update_weights_from_disk")
    assert body["load_format"] == "safetensors"
    assert body["model_path"] == str(tmp_path / "version-1") and body["flush_cache"] is False


def test_the_stand_in_refuses_a_format_of_its_start_as_sglang_does(server, tmp_path):
    server.load_format = "dummy"
    client = Client(server.url, api_key=None, admin_key=None, timeout=30, assume_version=None)
    with pytest.raises(SyncError, match=r"400 Failed to get model loader: <dummy>"):
        client.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    client.close()


@pytest.mark.parametrize("via", ["value", "disk", "distributed"])
@pytest.mark.parametrize("mode", ["client", "daemon"])
def test_a_server_of_a_weight_cache_is_refused_before_it_ends_itself(
    server, syncer_for, tmp_path, mode, via
):
    options = {"disk": {"folder": tmp_path}, "distributed": {"master": ("127.0.0.1", 1)}}
    syncer = syncer_for(server, via=via, **options.get(via, {}))
    server.info = {"weight_cache_mode": mode}
    with pytest.raises(SyncError, match=r"use SGLangWeightCacheSyncer.*--weight-cache-mode off"):
        syncer.push(weights(1).items(), version=1)
    assert server.calls == ["/server_info", "/model_info"]
    server.info = {"weight_cache_mode": "off"}
    syncer_for(server).push(weights(1).items(), version=1)
    assert same(server.loaded, weights(1))


def test_by_broadcast(server, syncer_for):
    syncer = syncer_for(server, via="distributed", master=("127.0.0.1", free_port()),
                        backend="gloo")  # fmt: skip
    for version in (1, 2):
        syncer.push(weights(version).items(), version=version)
        assert same(server.loaded, weights(version)) and server.weight_version == str(version)
    assert server.names().count("init_weights_update_group") == 1


def test_a_server_that_refuses_never_joins_a_broadcast_and_nobody_waits_for_it(server, syncer_for):
    server.fail_at = "update_weights_from_distributed 1"
    master = "127.0.0.1", free_port()
    syncer = syncer_for(server, via="distributed", master=master, backend="gloo", timeout=3)
    with pytest.raises(SyncError, match=r"version 1 was not pushed.*no memory is left"):
        syncer.push(weights(1).items(), version=1)
    assert int(server.weight_version) < 0


@pytest.mark.parametrize(
    "step", ["update_weights_from_tensor 1", "update_weights_from_tensor 2", "last version"]
)
def test_a_failure_halfway_is_told_and_the_next_push_is_whole(server, syncer_for, step):
    syncer = syncer_for(server)
    syncer.push(weights(1).items(), version=1)
    server.updates.clear()
    server.fail_at = step.replace("last version", "update_weight_version 2")
    with pytest.raises(
        SyncError,
        match=r"version 2 was not pushed, servers hold a part of it: a weight version below 0, "
        r"still paused; push again.*no memory is left",
    ):
        syncer.push(weights(2).items(), version=2)
    assert int(server.weight_version) < 0 and server.paused
    other = syncer_for(server)  # whoever pushes next, even an older version
    other.push(weights(1).items(), version=1)
    assert same(server.loaded, weights(1)) and server.weight_version == "1" and not server.paused


def test_a_failure_names_the_bucket(server, syncer_for):
    server.fail_at = "update_weights_from_tensor 2"
    with pytest.raises(SyncError, match=r"the bucket of odd to norm was not loaded"):
        syncer_for(server).push(weights(1).items(), version=1)


def test_what_fails_before_anything_is_written_changes_nothing(server, syncer_for):
    syncer = syncer_for(server)
    syncer.push(weights(1).items(), version=1)

    server.never_idle = True
    with pytest.raises(SyncError, match=r"servers serve what they did.*Flush cache failed"):
        syncer.push(weights(2).items(), version=2)
    assert server.weight_version == "1" and not server.paused and same(server.loaded, weights(1))


def test_an_error_of_the_trainers_own_keeps_its_type(server, syncer_for):
    def breaking():
        yield from weights(1).items()
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom") as caught:
        syncer_for(server, bucket_bytes=1).push(breaking(), version=1)
    assert "hold a part of it" in caught.value.__notes__[0] and int(server.weight_version) < 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "no weights were given"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "a came twice"),
    ],
)
def test_weights_that_make_no_sense_are_refused(server, syncer_for, given, text):
    with pytest.raises(SyncError, match=text):
        syncer_for(server).push(given, version=1)
    assert server.weight_version == "0"
    assert not [path for path in server.calls if "generation" in path]


def test_several_servers_get_the_same_and_one_that_lags_is_caught_up(syncer_for):
    with Server("0.5.17") as a, Server("0.5.21") as b:
        syncer_for(a).push(weights(1).items(), version=1)
        syncer = syncer_for(a, b)
        syncer.push(weights(1).items(), version=1)
        assert same(b.loaded, weights(1)) and a.names().count("update_weights_from_tensor") == 3
        syncer.push(weights(2).items(), version=2)
        assert same(a.loaded, weights(2)) and same(b.loaded, weights(2))
        b.fail_at = "update_weights_from_tensor 7"
        with pytest.raises(SyncError, match=b.url):
            syncer.push(weights(3).items(), version=3)
        assert int(a.weight_version) < 0 and int(b.weight_version) < 0
        syncer.push(weights(3).items(), version=3)
        assert same(a.loaded, weights(3)) and same(b.loaded, weights(3))


class Stubborn(Server):
    refuses = False

    async def continue_generation(self, body):
        if self.refuses and self.held:
            self.refuses = False
            self.calls.pop()  # it is still paused
            raise Refusal(500, {"message": "it cannot"})
        return await super().continue_generation(body)


@pytest.mark.parametrize("last", ["update_weight_version 2", "continue_generation"])
def test_a_server_that_fails_last_leaves_no_other_one_paused(syncer_for, last):
    with Server("0.5.17") as a, Stubborn("0.5.17") as b:
        syncer = syncer_for(a, b)
        b.fail_at, b.refuses = last, last == "continue_generation"
        with pytest.raises(SyncError, match="push again"):
            syncer.push(weights(1).items(), version=1)
        assert int(a.weight_version) < 0 and int(b.weight_version) < 0
        assert syncer.push(weights(1).items(), version=1).num_tensors == 5
        assert not a.paused and not b.paused
        assert a.weight_version == b.weight_version == "1" and same(a.loaded, weights(1))


def test_weights_are_read_back_on_request(server, syncer_for):
    syncer_for(server, verify=["embed", "norm"]).push(weights(1).items(), version=1)
    server.take = lambda flat, metadata: None  # loads nothing, and says that all is well
    with pytest.raises(SyncError, match=f"{server.url} holds other values of embed"):
        syncer_for(server, verify=["embed"]).push(weights(2).items(), version=2)
    server.weights.clear()
    with pytest.raises(SyncError, match=r"does not tell what it holds of norm.*leave verify="):
        syncer_for(server, verify=["norm"]).push(weights(2).items(), version=2)
    with pytest.raises(SyncError, match=r"verify names \['nothing'\]"):
        syncer_for(server, verify=["nothing"]).push(weights(2).items(), version=2)


def test_quantised_pairs_pass_unchanged(server, syncer_for):
    model = nn.Sequential(nn.Linear(128, 128, bias=False)).bfloat16()
    convert_(model, [("*", BlockFP8())])
    expected = dict(export(model))
    syncer_for(server).push(export(model), version=1)
    assert same(server.loaded, expected)
    assert "0.weight_scale_inv" in server.loaded


@pytest.mark.parametrize("selector", ["target", "draft", "all"])
def test_the_selector_is_spelt_as_each_version_does(server, syncer_for, selector):
    server.info, syncer = {"speculative_algorithm": "EAGLE"}, syncer_for(server, selector=selector)
    if selector == "draft" and not server.strict:
        with pytest.raises(SyncError, match=r"older than 0.5.21.*draft.*with export_draft"):
            syncer.push(weights(1).items(), version=1)
        assert server.updates == []
        return
    syncer.push(weights(1).items(), version=1)
    body = next(body for name, body in server.updates if name == "update_weights_from_tensor")
    if server.strict:
        assert body["selector"] == selector
    else:
        assert body["disable_draft_model"] == (selector == "target")


def test_a_pause_of_ones_own_is_left_alone(server, syncer_for):
    syncer_for(server, pause=None).push(weights(1).items(), version=1)
    assert "/pause_generation" not in server.calls and "/continue_generation" not in server.calls


def test_keys_are_asked_for_and_sent(syncer_for):
    with Server("0.5.17", api_key="open", admin_api_key="sesame") as server:
        with pytest.raises(SyncError, match="wants a key and got none; pass admin_key="):
            syncer_for(server).push(weights(1).items(), version=1)
        with pytest.raises(SyncError, match="wants a key and got the given one"):
            syncer_for(server, api_key="open").push(weights(1).items(), version=1)
        syncer_for(server, api_key="open", admin_key="sesame").push(weights(1).items(), version=1)
        assert same(server.loaded, weights(1))


def test_a_server_that_is_not_there_or_unknown_or_none_is_told(syncer_for):
    nobody = SimpleNamespace(url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SyncError, match=r"no answer of http.*expected an SGLang server there"):
        syncer_for(nobody).push(weights(1).items(), version=1)
    with Server("0.5.99") as server:
        with pytest.raises(SyncError, match=r"runs SGLang '0.5.99'; expected one of 0.5.17"):
            syncer_for(server).push(weights(1).items(), version=1)
        syncer_for(server, assume_version="0.5.23").push(weights(1).items(), version=1)
        assert "begin_weight_update" in server.names()
        server.weight_version = "step-7"
        with pytest.raises(SyncError, match="weight version is 'step-7'; expected an integer"):
            syncer_for(server, assume_version="0.5.23").push(weights(1).items(), version=1)


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"[1, 2]", b'{"version": 3}'])
def test_nonsense_is_called_so(syncer_for, answer):
    listener = socket.create_server(("127.0.0.1", 0))

    def talk():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(65536)
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % len(answer) + answer)
            connection.close()

    threading.Thread(target=talk, daemon=True).start()
    server = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(SyncError, match=r"is this the address of an SGLang server|runs SGLang '3'"):
        syncer_for(server).push(weights(1).items(), version=1)
    listener.close()


@pytest.mark.parametrize(
    "options",
    [
        {"via": "carrier pigeon"},
        {"via": "disk"},
        {"folder": "x"},
        {"via": "distributed"},
        {"bucket_bytes": 0},
        {"assume_version": "0.4"},
    ],
)
def test_settings_that_do_not_go_together_are_refused(options):
    with pytest.raises(SettingError):
        SGLangSyncer("http://127.0.0.1:1", **options)


def test_urls_are_one_or_more_each_once():
    for urls in ([], ["http://a", "http://a"]):
        with pytest.raises(SettingError, match="each once"):
            SGLangSyncer(urls)


def test_cpu_weights_for_a_gpu_carrier_are_refused(server, syncer_for):
    with pytest.raises(SyncError, match=r'embed is on cpu.*via="value"'):
        syncer_for(server, via="cuda_ipc").push(weights(1).items(), version=1)
    assert server.weight_version == "0"
    assert not [path for path in server.calls if "generation" in path]


def test_what_a_server_is_is_asked_again_after_a_restart(syncer_for):
    with Server("0.5.17") as server:
        syncer = syncer_for(server)
        for version in (1, 2, 3):
            syncer.push(weights(version).items(), version=version)
        assert server.calls.count("/server_info") == 1
        server.weight_version, server.info = "default", {"tp_size": 2}
        syncer.push(weights(4).items(), version=4)
        assert server.calls.count("/server_info") == 2
        payloads = server.updates[-2][1]["serialized_named_tensors"]
        assert len(payloads) == 2 and same(server.loaded, weights(4))
