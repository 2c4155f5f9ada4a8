"""No copy at all: the trainer's parameters are the memory that an SGLang server computes with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport
from miles.sync import _weight_cache_daemon
from miles.sync._plan import as_version, check_version, match
from miles.sync._sglang_client import MIXED, Client
from miles.sync._sglang_push import pause_by
from miles.sync._weight_cache_daemon import Daemon
from miles.sync._weight_cache_views import engine_views

__all__ = ["SGLangWeightCacheSyncer"]

SOCKET = "/tmp/sglang_weight_cache_rank0.sock"  # part of SGLang's protocol, the same everywhere
"""Where SGLang 0.5.17's daemon of rank 0 listens (its `weight_cache/protocol.py`); it has no option
for another path."""
FLUSH_SECONDS = 30.0
PROBE = "model.norm.weight"
"""A small parameter that every family has under the same name on both sides."""


class SGLangWeightCacheSyncer:
    """Attaches to the weight-cache daemon that holds the weights of an SGLang server on this GPU.

    The daemon loads the model; the server (`--weight-cache-mode client`) and this class map the
    same memory. Every parameter of a transformers module is then a view of whole rows in it, so one
    write serves both: the optimizer's own, within `updating`, on a module whose parameters
    `alias_` has replaced; or `push`, which casts master weights straight into place, one copy.

    Run against SGLang 0.5.17 on an H200 with a small Qwen3; any other answer of the daemon is
    refused. Unquantised Llama, Qwen2, Qwen3 and Qwen3-MoE, on one GPU without tensor, pipeline,
    data or expert parallelism, and without speculative decoding, which SGLang refuses here.

    While weights change, the server is paused and emptied of cached prefixes and says that its
    weight version is below 0. What fails in between leaves it so, and the trainer's parameters,
    being the same memory, as half written: write all of them again, with `push` or in `updating`.

    Args:
        url: address of the server.
        config: the model's, of transformers.
        socket: path of the daemon's socket.
        device: this process's number of the daemon's GPU; None: the same as the daemon's.
        api_key: what the server was started with (`--api-key`).
        admin_key: likewise (`--admin-api-key`), for control endpoints.
        pause: how the server is paused. `"abort"` ends requests, which callers resume; `"retract"`
            starts them over on the new weights (0.5.21 and later); None: you have paused it, and
            will let it go on.
        prove: make sure that the server sees what is written here: flip the last bit of one weight
            for a moment, while the server is paused, and compare SGLang's checksums. A server that
            was started before the daemon has loaded weights of its own, without an error.
        timeout: seconds for a call.
        assume_version: treat an unknown version of SGLang as this one.

    Raises:
        SyncError: no daemon, no server, or two that don't share memory.
        UnsupportedModelError: a family that SGLang holds in another form.

    Example:
        >>> from types import SimpleNamespace
        >>> from miles.sync.weight_cache import SGLangWeightCacheSyncer
        >>> SGLangWeightCacheSyncer("http://127.0.0.1:1", SimpleNamespace(), socket="/no.sock")
        Traceback (most recent call last):
        miles.errors.SyncError: no weight-cache daemon answers at /no.sock (FileNotFoundError: ...
    """

    def __init__(
        self,
        url: str,
        config: Any,
        *,
        socket: str | Path = SOCKET,
        device: int | None = None,
        api_key: str | None = None,
        admin_key: str | None = None,
        pause: Literal["abort", "retract"] | None = "abort",
        prove: bool = True,
        timeout: float = 600.0,
        assume_version: str | None = None,
    ) -> None:
        self._pause, self._prove = pause, prove
        self._aliased: dict[str, nn.Parameter] = {}
        self._served: int | None = None
        self.last_report: SyncReport | None = None
        """Of the last `updating` or `push` that went through."""
        self._daemon = Daemon(socket, timeout=min(timeout, 30.0))
        try:
            _check_daemon(self._daemon.config)
            self._views = engine_views(
                config,
                {
                    name: _weight_cache_daemon.open_tensor(shared, device)
                    for name, shared in self._daemon.tensors.items()
                    if shared.is_param
                },
            )
            self._server = _Server(
                url, api_key=api_key, admin_key=admin_key, timeout=timeout,
                assume_version=assume_version,
            )  # fmt: skip
            try:
                self._meet()
            except BaseException:
                self._server.close()
                raise
        except BaseException:
            self._daemon.close()
            raise

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The engine's memory under the names of `named_parameters()`; write it in `updating`."""
        return MappingProxyType(self._views)

    def alias_(self, model: nn.Module) -> None:
        """Make a module's parameters views of the engine's memory; they take the engine's values.

        Parameter objects stay, so an optimizer made before goes on. Parameters may be on the CPU:
        `model.to(device)` afterwards moves what is left, the buffers. To keep a trainer's values,
        `push` them first.

        Args:
            model: a transformers module in the engine's dtype, not wrapped or sharded.

        Raises:
            SyncError: names, shapes or dtypes that are not the engine's; nothing has changed.
        """
        found = dict(model.named_parameters())
        missing = sorted(self._views.keys() - found.keys())
        unknown = sorted(found.keys() - self._views.keys())
        if missing or unknown:
            raise SyncError(
                f"the module has no {missing[:8]}, and the engine no {unknown[:8]}; expected the "
                "module of the daemon's checkpoint, neither wrapped nor with adapters"
            )
        for name, parameter in found.items():
            view = self._views[name]
            got = tuple(parameter.shape), parameter.dtype
            if got != (tuple(view.shape), view.dtype):
                raise SyncError(
                    f"{name} is {got[1]} {got[0]}; the engine's is {view.dtype} "
                    f"{tuple(view.shape)}: cast the module first, and keep fp32 master weights "
                    "beside it"
                )
            if hasattr(parameter, "full_tensor") or parameter.is_meta:
                raise SyncError(f"{name} is sharded or on meta; expected a plain parameter")
            if parameter.grad is not None:
                raise SyncError(f"{name} has a gradient; call zero_grad(set_to_none=True) first")
        for name, parameter in found.items():
            parameter.data = self._views[name]
        self._aliased = found

    def detach_(self) -> None:
        """Give the aliased parameters memory of their own again, with the values they have."""
        for parameter in self._aliased.values():
            parameter.data = parameter.data.clone()
        self._aliased = {}

    @contextlib.contextmanager
    def updating(self, version: int) -> Iterator[None]:
        """Write weights in here: `with syncer.updating(version=3): optimizer.step()`.

        The server stands still from before the first write until the GPU has done the last.

        Raises:
            SyncError: a version that is served already, parameters that have left the engine's
                memory, or a daemon or a server that is gone.
        """
        start = time.perf_counter()
        version = as_version(version)
        if not self._is_new(version):
            raise SyncError(f"version {version} is served already; expected a larger number")
        for name, parameter in self._aliased.items():
            view = self._views[name]
            if parameter.data_ptr() != view.data_ptr() or parameter.shape != view.shape:
                raise SyncError(
                    f"{name} is no longer in the engine's memory, after .to(), .data = or a "
                    "wrapper; call alias_ again, after that"
                )
        with self._standing_still(version, start, copied=0):
            yield

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`; one copy of each weight, cast to the engine's dtype on the way.

        Args:
            weights: names of `named_parameters()`, and tensors of any dtype and device.
            version: theirs.

        Raises:
            SyncError: names or shapes that are not the engine's, or the engine's own memory, which
                can only have been written while the server computed with it; nothing has changed.
                A server or a daemon that went away in between: it may hold a part.
        """
        start = time.perf_counter()
        version = as_version(version)
        if not self._is_new(version):
            return self._report(version, start, copied=0)
        matched = match(weights, self._views)
        for name, view in self._views.items():
            if hasattr(matched[name], "full_tensor"):
                raise SyncError(f"{name} is sharded; expected it gathered: .full_tensor()")
            if matched[name].device == view.device and matched[name].data_ptr() == view.data_ptr():
                raise SyncError(
                    f"{name} is the engine's own memory; write it in `updating`, when the server "
                    "stands still, and push only what lies elsewhere"
                )
        copied = sum(view.nbytes for view in self._views.values())
        with self._standing_still(version, start, copied), torch.no_grad():
            for name, view in self._views.items():
                view.copy_(matched[name], non_blocking=True)
        assert self.last_report is not None
        return self.last_report

    def close(self) -> None:
        """Let go of server and daemon; aliased parameters stay what they are."""
        self._server.close()
        self._daemon.close()

    def _is_new(self, version: int) -> bool:
        """Whether the server, which may be another than last time, serves an older one."""
        self._daemon.check()
        served = self._server.weight_version()
        if served != self._served:
            self._meet()
        return check_version(version, served)

    @contextlib.contextmanager
    def _standing_still(self, version: int, start: float, copied: int) -> Iterator[None]:
        stopped = touched = False
        try:
            begun, stopped = time.perf_counter(), True
            self._stop()
            self._server.post("/flush_cache", timeout=FLUSH_SECONDS)
            self._daemon.check()
            touched = True
            self._served = MIXED
            self._server.say(MIXED)
            ready = time.perf_counter()
            yield
            self._settle()
            written = time.perf_counter()
            self._daemon.check()
            self._server.say(version)
            self._served = version
            self._go_on()
            done = time.perf_counter()
        except BaseException as error:
            where = "the server serves what it did"
            if not touched and self._server.mixed:
                where = (
                    "the server still holds a part of an earlier one, and stands still; write all "
                    "weights again"
                )
            elif touched:
                with contextlib.suppress(SyncError):  # it may have the version already
                    self._server.say(MIXED)
                self._served = MIXED
                where = (
                    "the server holds a part of it: a weight version below 0"
                    f"{', still paused' if self._pause else ''}; write all weights again"
                )
            elif stopped:
                with contextlib.suppress(SyncError):
                    self._go_on()
            error.add_note(f"version {version} was not finished, {where}")
            raise
        phases = {"load": written - ready, "commit": done - written, "pause": done - begun}
        self.last_report = self._report(version, start, copied, phases)

    def _report(
        self, version: int, start: float, copied: int, phases: Mapping[str, float] | None = None
    ) -> SyncReport:
        changed = self._views.values() if phases else ()
        return SyncReport(
            version=version,
            num_tensors=len(changed),
            num_bytes=sum(view.nbytes for view in changed),
            copied_bytes=copied,
            seconds=time.perf_counter() - start,
            phases=phases or {},
        )

    def _meet(self) -> None:
        """Make sure that this server computes with the daemon's memory."""
        served = self._server.weight_version()
        if self._pause == "retract" and not self._server.sessions:
            raise SettingError("pause='retract' needs SGLang 0.5.21; expected 'abort' or None")
        self._server.check(self._daemon.config)
        if self._prove:
            self._stop()
            try:
                self._check_shared()
            finally:
                if served != MIXED:  # half written weights are not to be served
                    self._go_on()
        self._served = served

    def _check_shared(self) -> None:
        byte = self._views[PROBE].view(torch.uint8)[0]
        before = self._server.checksum(PROBE)
        byte.bitwise_xor_(1)
        try:
            self._settle()
            after = self._server.checksum(PROBE)
        finally:
            byte.bitwise_xor_(1)
            self._settle()
        if before == after:
            raise SyncError(
                f"{self._server.url} does not see what is written to the daemon's memory, since it "
                "loaded weights of its own; start the daemon, wait for its .ready file, and only "
                "then the server with --weight-cache-mode client"
            )

    def _settle(self) -> None:
        """Wait until the GPU has done all that this process asked of it."""
        device = self._views[PROBE].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _stop(self) -> None:
        if self._pause is not None:
            pause_by(self._server, self._pause)

    def _go_on(self) -> None:
        if self._pause is not None:
            self._server.post("/continue_generation")


class _Server(Client):
    """What else is asked of a server here."""

    def check(self, daemon: Mapping[str, Any]) -> None:
        """Raise unless it says that it is a client of such a daemon."""
        info = self._get("/server_info")
        if info.get("weight_cache_mode") not in ("client", "daemon"):
            raise SyncError(
                f"{self.url} has weight_cache_mode={info.get('weight_cache_mode')!r}; expected a "
                "server started with --weight-cache-mode client, after the daemon"
            )
        if info.get("model_path") != daemon.get("model_path"):
            raise SyncError(
                f"{self.url} serves {info.get('model_path')!r} and the daemon holds "
                f"{daemon.get('model_path')!r}; expected one --model-path, letter for letter"
            )
        runner = info.get("moe_runner_backend") or "auto"
        if runner not in ("auto", "triton"):
            raise SyncError(
                f"{self.url} has moe_runner_backend={runner!r}, which lays experts out in another "
                "way than the daemon; expected 'triton'"
            )

    def checksum(self, name: str) -> str:
        """SGLang's own, of the parameter that it computes with."""
        answer = self.post("/weights_checker", {"action": "checksum"})
        try:
            return str(answer["ranks"][0]["checksums"][name])
        except (KeyError, IndexError, TypeError) as error:
            raise SyncError(
                f"{self.url}/weights_checker tells no checksum of {name}: {answer!r:.300}; pass "
                "prove=False, and compare log-probs after the first update (miles.sync.probe)"
            ) from error

    def say(self, version: int) -> None:
        """Label what it serves; by default this call would abort every request."""
        body = {"new_version": str(version), "abort_all_requests": False}
        self.post("/update_weight_version", body)


def _check_daemon(config: Mapping[str, Any]) -> None:
    """What a trainer's whole tensors cannot be views of."""
    split = {key: config.get(f"{key}_size") for key in ("tp", "pp", "dp", "ep")}
    if any(size != 1 for size in split.values()):
        raise SyncError(f"the daemon holds a part of the model: sizes {split}; expected 1 of each")
    if config.get("quant_method"):
        raise SyncError(
            f"the daemon holds weights quantised by {config['quant_method']!r}; expected "
            "unquantised ones, which an optimizer can write"
        )
