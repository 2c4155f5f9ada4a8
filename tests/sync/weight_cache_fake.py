"""SGLang's weight-cache daemon and a server that is its client, with a file in place of a GPU.

The daemon speaks the protocol of SGLang 0.5.17, and its handles are pickled as torch pickles those
of CUDA tensors; what would be a CUDA IPC handle is the path of a file, which `Opener` maps.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import socket
import struct
import threading
import time
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions

from miles.sync import SGLangNames, name_map
from miles.sync.weight_cache import SGLangWeightCacheSyncer
from tests.rollout.sglang_fake import FakeSGLang, Refusal
from tests.sync.named import VOCAB

PADDED = VOCAB + 6

CONFIG = {
    "model_path": "fake", "model_arch": "LlamaForCausalLM", "tp_size": 1, "tp_rank": 0,
    "pp_size": 1, "pp_rank": 0, "dp_size": 1, "ep_size": 1, "quant_method": "",
    "quant_config_hash": "", "dtype": "torch.bfloat16", "revision": "",
    "device_capability": "9.0", "torch_version": "2.11.0+cu130",
}  # fmt: skip


class Shared:
    """A tensor in a block, pickled as torch pickles CUDA tensors."""

    def __init__(self, tensor: Tensor, path: Path, place: int) -> None:
        self.tensor, self.path, self.place = tensor, path, place

    def __reduce__(self) -> Any:
        tensor = self.tensor
        return reductions.rebuild_cuda_tensor, (
            torch.Tensor, tensor.size(), tensor.stride(), 0, torch.storage.TypedStorage,
            tensor.dtype, 0, str(self.path).encode(), tensor.nbytes, self.place, False,
            b"/torch_1_2_0", 0, bytes(64), True,
        )  # fmt: skip


def encode(content: Any) -> str:
    """As SGLang's MultiprocessingSerializer does."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(content)
    return base64.b64encode(buffer.getvalue()).decode()


def entry(tensor: Tensor, path: Path, place: int, *, is_param: bool = True) -> dict[str, Any]:
    return {
        "handle": encode(Shared(tensor, path, place)), "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."), "is_param": is_param,
    }  # fmt: skip


class Opener:
    """In place of `open_tensor`; maps a block once, as torch does."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Tensor] = {}

    def __call__(self, shared: Any, device: int | None = None) -> Tensor:
        return self.open(shared.arguments)

    def open(self, arguments: tuple[Any, ...]) -> Tensor:
        shape, stride, offset, dtype = (arguments[i] for i in (1, 2, 3, 5))
        path, nbytes, place = (arguments[i] for i in (7, 8, 9))
        if path not in self.blocks:
            name = path.decode()
            size = Path(name).stat().st_size
            self.blocks[path] = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        part = self.blocks[path][place : place + nbytes].view(dtype)
        return part.as_strided(shape, stride, part.storage_offset() + offset)


class Block:
    """What the daemon holds: tensors in one file, as those of one cudaMalloc."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.entries = path, dict[str, dict[str, Any]]()
        # As on the engine: tied tensors are one, and have an entry for each name.
        places: dict[int, int] = {}
        end = 0
        for name, tensor in tensors.items():
            if tensor.data_ptr() not in places:
                places[tensor.data_ptr()] = end
                end += -(-tensor.nbytes // 512) * 512
            self.entries[name] = entry(tensor, path, places[tensor.data_ptr()])
        cache = torch.zeros(4, 2)
        path.write_bytes(bytes(end + cache.nbytes))
        own = Opener()
        self.held = {
            name: own.open(pickle_arguments(about["handle"]))
            for name, about in self.entries.items()
        }
        """A mapping of its own, as the server has one."""
        for name, tensor in tensors.items():
            self.held[name].copy_(tensor)
        name = "model.layers.0.self_attn.rotary_emb.cos_sin_cache"
        self.entries[name] = entry(cache, path, end, is_param=False)


def pickle_arguments(handle: str) -> tuple[Any, ...]:
    """By a plain unpickler, which would open CUDA memory: so without the function."""

    class Plain(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = super().find_class(module, name)
            return (lambda *a: a) if name == "rebuild_cuda_tensor" else found

    return Plain(io.BytesIO(base64.b64decode(handle))).load()


def serve(path: str, config: dict[str, Any], entries: Any, *, raw: bytes | None = None) -> None:
    """The daemon's loop. `raw` is sent in place of every answer, if given."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(8)
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    request = pickle.loads(_read(connection))
                except (EOFError, struct.error):
                    continue
                if request["type"] == "stop":
                    return
                answer = raw if raw is not None else pickle.dumps(_answer(request, config, entries))
                connection.sendall(struct.pack("!I", len(answer)) + answer)


def _answer(request: dict[str, Any], config: dict[str, Any], entries: Any) -> dict[str, Any]:
    if request["type"] == "query_config":
        return {"status": "ok", "config": config}
    if request["type"] == "fetch_state" and request["config"] == config:
        return {"status": "ok", "config": config, "entries": entries, "pid": 1}
    if request["type"] == "fetch_state":
        return {"status": "mismatch", "daemon_config": config}
    return {"status": "error", "message": f"Unknown request type: {request['type']}"}


def stop(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        body = pickle.dumps({"type": "stop"})
        connection.sendall(struct.pack("!I", len(body)) + body)


def wait_for(path: str) -> None:
    """Until somebody listens there."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            if connection.connect_ex(path) == 0:
                return
        time.sleep(0.01)


def _read(connection: socket.socket) -> bytes:
    (length,) = struct.unpack("!I", connection.recv(4))
    data = b""
    while len(data) < length:
        data += connection.recv(length - len(data))
    return data


class CachedServer(FakeSGLang):
    """A server with `--weight-cache-mode client`; `parameters` are what it computes with."""

    def __init__(self, held: Mapping[str, Tensor], **settings: Any) -> None:
        super().__init__("0.5.17", **settings)
        self.parameters = held
        self.refuse_flush = False
        self.info: dict[str, Any] = {"weight_cache_mode": "client", "moe_runner_backend": "auto"}

    async def server_info(self, body: Any) -> Any:
        return await super().server_info(body) | self.info

    async def flush_cache(self, body: Any) -> Any:
        if self.refuse_flush:
            raise Refusal(400, {"message": "Flush cache failed."})
        return await super().flush_cache(body)

    async def weights_checker(self, body: Any) -> Any:
        answer = await super().weights_checker(body)
        sums = {
            name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, t in self.parameters.items()
        }
        return answer | {"ranks": [{"checksums": sums, "per_gpu_checksum": "0"}]}


def in_engine(model: nn.Module) -> dict[str, Tensor]:
    """The module's weights as SGLang holds them, of tied embeddings both names."""
    names = name_map(
        model.config, source="hf_module", target="sglang",
        sglang=SGLangNames(padded_vocab_size=PADDED),
    )  # fmt: skip
    held = dict(names.forward(model.state_dict().items()))
    if model.config.tie_word_embeddings:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    return held


class World:
    """A daemon, a server and what they hold."""

    def __init__(self, folder, model, **settings) -> None:
        self.model = model
        self.path = str(folder / "rank0.sock")
        self.block = Block(folder / "block", in_engine(model))
        self.config = dict(CONFIG)
        self.server = CachedServer(self.block.held, **settings).start()
        self.thread = None

    @property
    def held(self):
        return self.block.held

    def daemon(self, **changes) -> None:
        arguments = (self.path, self.config | changes, self.block.entries)
        self.thread = threading.Thread(target=serve, args=arguments, daemon=True)
        self.thread.start()
        wait_for(self.path)

    def syncer(self, **settings) -> SGLangWeightCacheSyncer:
        if self.thread is None:
            self.daemon()
        settings = {"socket": self.path, "timeout": 20.0} | settings
        return SGLangWeightCacheSyncer(self.server.url, self.model.config, **settings)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.stop()
        if self.thread is not None:
            stop(self.path)
            self.thread.join()
