"""Weights for SGLang servers, over the endpoints that they ship with."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport
from miles.sync._buckets import whole
from miles.sync._plan import as_version, at_once, check_version
from miles.sync._progress import bar
from miles.sync._sglang_client import MIXED, ClashError, Client
from miles.sync._sglang_folder import load_folder, remove_others, write_folder
from miles.sync._sglang_group import Broadcasts
from miles.sync._sglang_in_place import PER_CALL, split
from miles.sync._sglang_payload import FlatBucket, InPlace, by_handle, by_value, flat_buckets
from miles.sync._sglang_push import (
    Model,
    Queue,
    Sent,
    check_able,
    check_together,
    ended,
    noted,
    on_all,
    stop,
)
from miles.sync._sglang_slabs import DEPTH, CudaMemory, Memory, Slabs
from miles.sync._trainers import Trainers

__all__ = ["SGLangSyncer"]

Via = Literal["cuda_ipc", "value", "distributed", "disk"]
Selector = Literal["target", "draft", "all"]
T = TypeVar("T")
AFTER_SECONDS = 10.0
"""For a call to servers after a failure; one that hangs has made all wait for `timeout` already."""


class SGLangSyncer:
    """Brings weights to SGLang servers (0.5.17 to 0.5.23), which all of a version or none serve.

    SGLang writes new weights over the old ones, so an update that fails halfway cannot be undone.
    Before it begins, servers are paused, emptied of cached prefixes, and marked by a weight version
    below 0; if it fails, they stay so until a push goes through; the error says so, and that push
    is always a whole one. What fails earlier leaves their weights and version alone, but the pause
    may have ended requests.

    Names are those of a checkpoint; quantised pairs of `miles.precision.export` pass unchanged. The
    names and shapes of a syncer's first push are those of all that follow: servers would skip what
    they do not know and keep what does not come. Buckets are filled while servers load those
    before. `"cuda_ipc"` makes none of weights that lie in allocations of a sixteenth of a bucket or
    more, such as a Megatron trainer's parameter buffers or what `pack_parameters_` makes: servers
    read those where they are, in one call.

    Args:
        urls: addresses of the servers, one for each replica.
        via: how bytes get there. `"cuda_ipc"`: a handle of GPU memory, for servers on this GPU;
            `"value"`: in the request itself, for small models and any network; `"distributed"`:
            NCCL broadcast, for servers on other GPUs; `"disk"`: a folder that servers can read.
        bucket_bytes: most bytes of a bucket, but for a weight that has more. Larger ones are fewer
            calls, and faster. `"cuda_ipc"` keeps three from push to push, others have one.
        in_place: for `"cuda_ipc"`: whether servers read weights where they are. None: where the
            loader of their model only reads, which is known of Llama, Mistral, Qwen 2 and 3,
            DeepSeek 2 and 3 and GLM 4 MoE. True: you know it of another one; those of Gemma and
            gpt-oss would write to your weights. Only from a trainer of one process to servers of
            one rank each, and a list, a tuple or the items of a dict, which stay until then.
        api_key: what the servers were started with (`--api-key`).
        admin_key: likewise (`--admin-api-key`), for control endpoints.
        pause: how servers are paused. `"abort"` ends requests, which callers resume; `"retract"`
            starts them over on the new weights (0.5.21 and later); None: you have paused them, not
            in place while requests ran, which never end then, and will let them go on.
        selector: which model of a server with a draft one. `"draft"` alone needs 0.5.21; its
            versions are counted by this syncer, from 0, and the servers' stay the policy's.
        verify: names of weights whose first rows are read back and compared. Few of SGLang's model
            classes can do that; Llama's can.
        folder: for `"disk"`: a folder that servers see under the same path.
        master: for `"distributed"`: this host's address as servers reach it, and a free port.
        backend: for `"distributed"`. With NCCL start servers with `NCCL_CUMEM_ENABLE=1`: SGLang
            sets 0 where there is none, which this process then should have too.
        timeout: seconds for a call.
        assume_version: treat an unknown version of SGLang as this one.
        trainers: the ranks that hold the weights, if there are several; all push the same names,
            and rank 0 of it talks to the servers. With `"cuda_ipc"` each gathers weights into
            buckets of its own, and where servers have as many ranks, rank by rank in the order of
            `urls`, each reads those of its own; else all read those of rank 0.
        progress: a bar (of tqdm, on rank 0 of `trainers`) when a push takes longer than a second.

    Example:
        >>> import torch
        >>> from miles.sync import SGLangSyncer
        >>> syncer = SGLangSyncer("http://127.0.0.1:1", via="value")
        >>> syncer.push([("w", torch.zeros(2))], version=1)
        Traceback (most recent call last):
        miles.errors.SyncError: no answer of http://127.0.0.1:1/server_info (ConnectError: ...
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        via: Via = "cuda_ipc",
        bucket_bytes: int = 1 << 29,
        in_place: bool | None = None,
        api_key: str | None = None,
        admin_key: str | None = None,
        pause: Literal["abort", "retract"] | None = "abort",
        selector: Selector | None = None,
        verify: Sequence[str] = (),
        folder: str | Path | None = None,
        master: tuple[str, int] | None = None,
        backend: str = "nccl",
        timeout: float = 600.0,
        assume_version: str | None = None,
        trainers: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> None:
        if via not in ("cuda_ipc", "value", "distributed", "disk"):
            raise SettingError(f"via is {via!r}; expected cuda_ipc, value, distributed or disk")
        if (folder is None, master is None) != (via != "disk", via != "distributed"):
            raise SettingError(
                f"via={via!r} with folder={folder!r} and master={master!r}; expected folder= with "
                "disk, master= with distributed, and neither with the others"
            )
        if via == "disk" and selector is not None:
            raise SettingError(
                f"selector is {selector!r} with via='disk', where SGLang knows none; expected None"
            )
        if verify and selector == "draft":
            raise SettingError(
                f"verify is {list(verify)} with selector='draft', and SGLang reads the policy's "
                "weights back; expected none"
            )
        if bucket_bytes < 1:
            raise SettingError(f"bucket_bytes is {bucket_bytes}; expected 1 or more")
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls or len(set(urls)) < len(urls):
            raise SettingError(f"urls are {urls}; expected one or more, each once")
        self._clients = [
            Client(url, api_key=api_key, admin_key=admin_key, timeout=timeout,
                   assume_version=assume_version)
            for url in urls
        ]  # fmt: skip
        self._via, self._bucket_bytes, self._pause = via, bucket_bytes, pause
        self._selector, self._verify = selector, tuple(verify)
        self._folder = None if folder is None else Path(folder)
        # A server's weight version is the policy's, so a draft model has one of its own, kept here.
        self._drafts, self._drafted = selector == "draft", 0
        self._broken = self._closed = False
        self._in_place, self._trainers = in_place, Trainers(trainers)
        self._model, self._progress = Model(), progress and not self._trainers.rank
        self._memory: Memory = CudaMemory()
        self._slabs = Slabs(bucket_bytes, self._memory, self._trainers)
        self._pool = ThreadPoolExecutor(len(urls) * DEPTH, thread_name_prefix="sglang-sync")
        self._on_gpu = via == "distributed" and backend == "nccl"
        self._broadcasts: Broadcasts | None = None
        if master is not None:
            self._broadcasts = Broadcasts(
                self._clients, self._pool, master=master, backend=backend, timeout=timeout
            )

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`.

        Raises:
            SettingError: `version` is no integer, or a url no address.
            SyncError: what went wrong, at which server; whether it still serves what it did, or
                holds a part of a version and is left paused. What goes wrong on rank 0 of
                `trainers` is raised on all of them; what does on another, there, and on the rest
                when the group times out. Also after `close`.
        """
        start = time.perf_counter()
        version = as_version(version)
        if self._closed:
            raise SyncError("this syncer is closed; make a new one to push")

        def ask() -> list[int]:
            if self._trainers.rank:
                return []
            versions = self._on_all(Client.weight_version, self._clients)
            found = self._behind(version, versions)
            check_able(found, via=self._via, selector=self._selector, pause=self._pause)
            if self._broken and not found:  # the last push failed when all had its version
                self._resume(self._clients)
                self._broken = False
            return [self._clients.index(client) for client in found]

        sent = Sent()
        with self._trainers.in_step():
            behind = [self._clients[i] for i in self._trainers.agree(ask)]
            if behind:
                self._update(weights, behind, version, sent)
                self._model.note(sent)
        return SyncReport(
            version=version,
            num_tensors=sent.tensors,
            num_bytes=sent.bytes,
            copied_bytes=sent.bytes * (1 + len(behind)) - sent.in_place,
            seconds=time.perf_counter() - start,
            num_buckets=sent.buckets,
            phases=sent.phases,
        )

    def close(self) -> None:
        """Close connections, leave the process group, and free the buckets."""
        self._closed = True
        self._slabs.clear()
        if self._broadcasts is not None:
            self._broadcasts.leave()
        self._pool.shutdown(wait=False)
        for client in self._clients:
            client.close()

    def _behind(self, version: int, versions: list[int]) -> list[Client]:
        """Who does not have this version."""
        if self._drafts:
            half = [c.url for c, had in zip(self._clients, versions, strict=True) if had == MIXED]
            if half:
                raise SyncError(
                    f"{', '.join(half)} hold a part of a version of the policy and stand still; "
                    "expected a whole one: push the policy first"
                )
            return self._clients if check_version(version, self._drafted) else []
        for client, had in zip(self._clients, versions, strict=True):
            client.meet(had)
        check_version(version, max(versions))
        behind = [c for c, had in zip(self._clients, versions, strict=True) if had < version]
        return self._clients if self._via == "distributed" and behind else behind

    def _update(
        self, weights: Iterable[tuple[str, Tensor]], to: list[Client], version: int, sent: Sent
    ) -> None:
        stopped = touched = False
        begun = paused = ready = time.perf_counter()
        prepared: list[Callable[[], None]] = []
        shown = contextlib.ExitStack()

        def begin() -> None:
            nonlocal stopped, touched, paused, ready
            if self._progress:
                size = sum(t.nbytes for _, t in weights) if at_once(weights) else self._model.nbytes
                sent.moved = shown.enter_context(bar(True, size, version))
            # What can go wrong with the weights themselves mostly does so here already.
            prepared.append(self._prepared(weights, to, version, sent))
            if self._trainers.rank:
                return
            paused = time.perf_counter()
            stopped = self._broken = True
            self._on_all(lambda c: stop(c, self._pause), to)
            if self._broadcasts is not None:
                self._broadcasts.join()
            ready = time.perf_counter()
            touched = True
            if not self._drafts:
                self._on_all(lambda c: c.say(MIXED), to)
            self._session("/begin_weight_update", to)

        def end() -> int:
            if self._trainers.rank:
                return 0
            self._session("/end_weight_update", to)
            self._on_all(lambda c: sent.compare(c), to)
            if not self._drafts:
                self._on_all(Client.check_mark, to)
                self._on_all(lambda c: c.say(version), to)
            self._resume(to)
            self._drafted = version
            return sent.buckets

        try:
            self._trainers.agree(begin)
            prepared[0]()
            ended = time.perf_counter()
            sent.buckets = self._trainers.agree(end)
            done = time.perf_counter()
            sent.phases = {
                "gather": paused - begun + ended - ready - sent.waited,
                "load": sent.waited,
                "commit": done - ended,
                "pause": done - paused,
            }
            self._broken = False
        except BaseException as error:
            told = self._trainers.told(error)
            if self._trainers.rank:
                self._slabs.clear()
                raise told from (None if told is error else error)
            where = self._after_failure(to, stopped, touched, isinstance(told, ClashError))
            if isinstance(told, SyncError):
                raise SyncError(f"version {version} was not pushed, {where}. {told}") from error
            error.add_note(f"version {version} was not pushed, {where}")
            raise
        finally:
            shown.close()

    def _after_failure(self, to: list[Client], stopped: bool, touched: bool, clash: bool) -> str:
        """Tidy up; what servers hold and do now."""
        self._slabs.clear()  # a server that did not answer in time may read them yet
        with contextlib.ExitStack() as hurry:
            for client in to:
                hurry.enter_context(client.hurrying(AFTER_SECONDS))
            if touched:
                with contextlib.suppress(SyncError):  # an open session would refuse the next one
                    self._session("/end_weight_update", to)
                if self._drafts:
                    self._drafted = MIXED
                else:  # some may have their new version already, and would be left out, and paused
                    with contextlib.suppress(SyncError):
                        self._on_all(lambda c: c.say(MIXED), to)
                if self._broadcasts is not None:
                    self._broadcasts.leave(by_force=True)
            else:  # what waits at one that stays paused is to know why
                with contextlib.suppress(SyncError):
                    self._on_all(Client.mark_again, to)
            if stopped:
                with contextlib.suppress(SyncError):
                    self._resume([client for client in to if not client.mixed])
        paused = ", still paused" if self._pause else ""
        if not touched:
            if half := [client.url for client in to if client.mixed]:
                return (
                    f"{', '.join(half)} hold a part of an earlier push: a weight version below 0"
                    f"{paused}; any others serve what they did; push again"
                )
            return "servers serve what they did"
        if clash:
            return (
                "servers may hold and serve a mixture of two versions; end the other trainer, if "
                "there is one, and push again, which is a whole push"
            )
        if self._drafts:
            return "draft models hold a part of it, and the policy is served as before; push again"
        return (
            f"servers hold a part of it: a weight version below 0{paused}; push again, which is a "
            "whole push"
        )

    def _resume(self, to: list[Client]) -> None:
        if self._pause is not None:
            self._on_all(lambda c: c.post("/continue_generation"), to)

    def _session(self, path: str, to: list[Client]) -> None:
        """Begin or end an update, where there is such a thing."""
        if self._via == "disk":
            return
        begins = path.startswith("/begin") and self._selector is not None
        body = {"selector": self._selector} if begins else {}
        self._on_all(lambda c: c.post(path, body), [c for c in to if c.sessions])

    def _prepared(
        self, weights: Iterable[tuple[str, Tensor]], to: list[Client], version: int, sent: Sent
    ) -> Callable[[], None]:
        """All that can be done while servers still serve; what does the rest."""
        if at_once(weights):
            fits = self._memory.check if self._via == "cuda_ipc" else lambda name, tensor: None
            check_together(weights, self._model, self._verify, fits)
        named: Iterable[tuple[str, Tensor]] = noted(weights, sent, self._verify, self._model)
        if self._via == "disk":
            pairs = ((name, whole(tensor.detach())) for name, tensor in named)
            try:
                if self._folder is not None and not self._trainers.rank:
                    path = self._folder / f"version-{version}"
                    sent.buckets = write_folder(pairs, path, self._bucket_bytes)
                    return lambda: self._trainers.agree(partial(self._by_disk, path, to, sent))
            finally:  # the gathers of the other ranks need this one, whatever happened
                for _ in () if self._trainers.alone else pairs:
                    pass
            return lambda: self._trainers.agree(lambda: None)
        buckets: Iterator[FlatBucket | InPlace]
        if self._via == "cuda_ipc":
            together, here = at_once(weights), None
            if together and self._may_read(to):
                here, named = split(named, self._memory, self._bucket_bytes / PER_CALL)
            buckets = self._slabs.buckets(named, together=together)
            if here is not None:
                sent.in_place = here.nbytes
                # The first bucket is filled while servers still serve.
                buckets = itertools.chain([here], list(itertools.islice(buckets, 1)), buckets)
        else:
            buckets = flat_buckets(
                named,
                bucket_bytes=self._bucket_bytes,
                device="cuda" if self._on_gpu else "cpu",
                tight=self._via == "distributed",
            )
        first = next(buckets, None)
        if first is None:
            raise SyncError("no weights were given; expected those of the whole model")
        return lambda: self._by_buckets(itertools.chain([first], buckets), to, sent)

    def _may_read(self, servers: list[Client]) -> bool:
        """Whether weights may be read in place; a rank on another GPU would copy all at once."""
        if self._in_place is False or not self._trainers.alone:
            return False
        known = [c.only_reads and (self._selector == "target" or not c.draft) for c in servers]
        return all(c.tp_size == 1 for c in servers) and (all(known) or self._in_place is True)

    def _by_buckets(
        self, buckets: Iterable[FlatBucket | InPlace], to: list[Client], sent: Sent
    ) -> None:
        queue = Queue(DEPTH if self._via == "cuda_ipc" else 1, sent)
        try:
            for bucket in buckets:
                payloads = self._payloads(bucket)
                # A rank fills its next bucket when rank 0 has given this one to the servers.
                self._trainers.agree(partial(self._start, bucket, payloads, to, queue))
                sent.buckets += 1
            self._trainers.agree(queue.end)
        finally:
            queue.abandon()

    def _payloads(self, bucket: FlatBucket | InPlace) -> list[str]:
        """What servers unpack: each rank's, or that of rank 0."""
        if self._via == "distributed" or (self._via == "value" and self._trainers.rank):
            return []
        if isinstance(bucket, InPlace):
            return self._trainers.gather(bucket.payload)
        if self._via == "value":
            return [by_value(bucket)]
        return self._trainers.gather(by_handle(bucket))

    def _start(
        self, bucket: FlatBucket | InPlace, payloads: list[str], to: list[Client], queue: Queue
    ) -> None:
        if self._trainers.rank:
            return
        queue.make_room()
        if isinstance(bucket, FlatBucket) and self._broadcasts is not None:
            queue.add(self._broadcasts.start(bucket, to, self._choice_of_broadcast))
        else:
            queue.add(self._deliver(bucket, payloads, to))

    def _deliver(
        self, bucket: FlatBucket | InPlace, payloads: list[str], to: list[Client]
    ) -> Callable[[], None]:
        """Start to hand over a bucket; what ends it."""
        calls, ranks = [], 0
        own = len(payloads) == sum(client.tp_size for client in self._clients)
        for client in self._clients:
            first, ranks = ranks, ranks + client.tp_size
            if client not in to:
                continue
            body: dict[str, Any] = {
                "serialized_named_tensors": payloads[first:ranks]
                if own
                else payloads[:1] * client.tp_size,
                "load_format": None if isinstance(bucket, InPlace) else "flattened_bucket",
                "flush_cache": False,
            }
            path = "/update_weights_from_tensor"
            calls.append(self._pool.submit(client.post, path, body | self._choice(client)))
        return lambda: ended(calls, bucket)

    def _choice(self, client: Client) -> dict[str, Any]:
        if self._selector is None:
            return {}
        if client.sessions:
            return {"selector": self._selector}
        return {"disable_draft_model": self._selector == "target"}

    def _choice_of_broadcast(self, client: Client) -> dict[str, Any]:
        return self._choice(client) if client.sessions else {}

    def _by_disk(self, path: Path, to: list[Client], sent: Sent) -> None:
        sent.wait(lambda: self._on_all(partial(load_folder, path=path), to))
        remove_others(path)

    def _on_all(self, call: Callable[[Client], T], clients: list[Client]) -> list[T]:
        return on_all(self._pool, call, clients)
