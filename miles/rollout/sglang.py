"""A rollout engine over SGLang servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import threading
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, TypeVar

from miles.errors import EngineError, SettingError
from miles.rollout._requests import check_ids, new_sample, seed_of
from miles.rollout._sglang_answer import RoutingLayout, SpeculativeStats
from miles.rollout._sglang_api import check_sampling, check_tokens
from miles.rollout._sglang_calls import Calls, How
from miles.rollout._sglang_http import PauseMode, Server, ServerState
from miles.rollout._sglang_servers import Servers
from miles.rollout.sample import Sample, SamplingParams

__all__ = ["RoutingLayout", "SGLangEngine", "ServerState", "SpeculativeStats"]

MAX_IN_FLIGHT = 4096
SPARE_FILES = 128
"""Open files that are left to everything else in this process."""
CLOSE_SECONDS = 2.0
"""How long `close` waits for what the servers have of each request."""

T = TypeVar("T")


class SGLangEngine:
    """A `RolloutEngine` that speaks to one or several running SGLang servers.

    Token ids go in and come out, each with its log-prob under `softmax(logits / temperature)` and
    the version of the weights. What is asked again after a failure is what no server can still
    answer: a request whose connection was refused, that the server sent away (429, 502, 503), or
    whose server is gone. Connections live in a thread of the engine's own, so any event loop, or
    none, can wait.

    With several servers the requests of one prompt go to one server, whose cache has it, unless it
    is much busier than another, and prompts take turns. A server that is gone gets no request until
    it answers again and has the version that the others have; if there are no others, a newer one
    will do. Of a server whose version is negative, as while `SGLangSyncer` pushes, the new weights
    are waited for.

    Args:
        urls: addresses like `http://host:30000`. All must answer when the engine is made.
        routing: how to read expert ids; without it they are not asked for. The server needs
            `--enable-return-routed-experts`.
        sampling: further sampling parameters of SGLang, for every request. Those that change the
            distribution are refused, since log-probs would be another policy's.
        return_sampling_mask: have the server renormalise log-probs after `top_p`, `top_k` and
            `min_p`, which are then allowed; `sample.metadata["sampling_mask"]` holds, for each
            token, which ones it was drawn from.
        vocab_size: token ids there are. A prompt with another one is refused, because SGLang lets
            it through to the GPU, which ends the server. None: what `config.json` in the server's
            model folder says, if that folder can be read from here; otherwise it is not known, and
            only negative ids are refused.
        pause_mode: what `pause` does with running requests: "in_place" keeps their caches,
            "retract" computes them anew after `resume`, "abort" ends them. May be set any time.
            `SGLangSyncer(pause=None)` pushes in a pause "abort", from SGLang 0.5.21 on "retract".
        api_key: what the servers were started with.
        admin_api_key: likewise; for aborting and pausing.
        max_in_flight: most requests that are sent at once; others wait here. By default 4096, or
            what the limit on open files leaves.
        retries: how often one request is sent again.
        backoff: seconds before the first repetition; doubles each time, and is spread by chance.
        timeout: seconds to connect, and for everything but generating.
        request_timeout: seconds for one answer; None: no limit.
        abort_timeout: seconds that `abort` waits for a server to hand over what it has.
        recheck_seconds: how often a server that is gone is looked at again.
        assume_version: treat a server of an unknown version as one of this version.

    Raises:
        EngineDiedError: a server is not there.
        EngineError: it is of an unknown version, wants a key, or is no SGLang server.
        SettingError: an argument out of range, or something the server was not started with.

    Example:
        >>> from miles.rollout import SGLangEngine
        >>> SGLangEngine("http://127.0.0.1:9", retries=0)
        Traceback (most recent call last):
        ...
        miles.rollout._sglang_http.NotReached: no SGLang server answers at http://127.0.0.1:9 ...
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        routing: RoutingLayout | None = None,
        sampling: Mapping[str, Any] = MappingProxyType({}),
        return_sampling_mask: bool = False,
        vocab_size: int | None = None,
        pause_mode: PauseMode = "in_place",
        api_key: str | None = None,
        admin_api_key: str | None = None,
        max_in_flight: int | None = None,
        retries: int = 5,
        backoff: float = 0.25,
        timeout: float = 30.0,
        request_timeout: float | None = None,
        abort_timeout: float = 60.0,
        recheck_seconds: float = 2.0,
        assume_version: str | None = None,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls or len(set(urls)) < len(urls):
            raise SettingError(f"urls is {urls}; expected one address or several different ones")
        if retries < 0:
            raise SettingError(f"retries is {retries}; expected 0 or more")
        if vocab_size is not None and vocab_size < 1:
            raise SettingError(f"vocab_size is {vocab_size}; expected 1 or more, or None")
        check_sampling(sampling, sampling_mask=return_sampling_mask)
        self.pause_mode: PauseMode = pause_mode
        how = How(
            routing=routing, sampling=dict(sampling), sampling_mask=return_sampling_mask,
            max_in_flight=_max_in_flight(max_in_flight), retries=retries, backoff=backoff,
            abort_timeout=abort_timeout,
        )  # fmt: skip
        servers = [
            Server(
                url, api_key=api_key, admin_api_key=admin_api_key, timeout=timeout,
                request_timeout=request_timeout,
            )
            for url in urls
        ]  # fmt: skip
        self._servers = Servers(servers, assume_version=assume_version)
        self._calls = Calls(self._servers, how)
        self._vocab_size = vocab_size
        self._ids = itertools.count()
        self._closed = self._warned_of_seed = False
        self._starting = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="SGLangEngine", daemon=True)
        self._thread.start()
        try:
            self._start(self._connect(routing is not None, recheck_seconds)).result()
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> int:
        """The newest version that a server which gets requests was heard to have."""
        return self._servers.weight_version

    @property
    def servers(self) -> tuple[ServerState, ...]:
        """What is known of each server."""
        return tuple(server.state for server in self._servers)

    @property
    def num_in_flight(self) -> int:
        """Calls of `generate` that have not returned."""
        return len(self._calls)

    async def generate(
        self,
        prompt: Sequence[int] | Sample,
        params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> Sample:
        """Continue a prompt and return a new `Sample`; what was passed in stays as it was.

        Args:
            prompt: token ids, or an aborted `Sample`, whose tokens, log-probs, spans and routing
                are kept and whose answer goes on.
            params: how to sample. `seed` needs a server with `--enable-deterministic-inference`.
            request_id: name for `abort`; one is made up by default.

        Raises:
            PromptTooLongError, SettingError, EmptyBatchError: see the text.
            EngineDiedError: no server was left, or a connection could not be made in `retries`.
            EngineError, NonFiniteError, RoutingError: what came is no answer to this request.
        """
        return await asyncio.wrap_future(self.submit(prompt, params, request_id=request_id))

    def submit(
        self,
        prompt: Sequence[int] | Sample,
        params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> Future[Sample]:
        """`generate` for code without an event loop: a `concurrent.futures.Future`."""
        sample = prompt.copy() if isinstance(prompt, Sample) else new_sample(prompt)
        if sample.num_generated_tokens >= params.max_new_tokens:
            raise SettingError(
                f"the sample to resume has {sample.num_generated_tokens} generated tokens and "
                f"max_new_tokens is {params.max_new_tokens}; expected room for at least one more"
            )
        check_tokens(sample.tokens, self._vocab_size or self._servers.vocab_size)
        seed = seed_of(sample, params)
        if seed is not None and not self._warned_of_seed and not self._servers.deterministic:
            self._warned_of_seed = True
            warnings.warn(
                "a seed has no effect: the server was started without "
                "--enable-deterministic-inference",
                stacklevel=3,
            )
        name = f"request-{next(self._ids)}" if request_id is None else request_id
        sample.metadata.update(request_id=name, seed=seed)
        return self._start(self._calls.generate(name, sample, params))

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests; their `generate` returns what there is, ABORTED.

        Args:
            request_ids: names; one that ends in "/" stands for all that begin with it, so a group
                whose requests are `"7/0"`, `"7/1"` ends with `"7/"`. None: everything that the
                servers run, other clients' requests too.

        A request that the server had put back to wait hands over the tokens up to its last report
        (every 50). Under a pause "in_place" nothing would ever end, so running requests are
        retracted first.
        """
        check_ids(request_ids)
        await asyncio.wrap_future(self._start(self._calls.abort(request_ids)))

    async def pause(self) -> None:
        """Sample no further token until `resume`, as `pause_mode` says; new requests wait here.

        If it raises or is cancelled, all go on, as soon as the servers have answered.
        """
        await asyncio.wrap_future(self._start(self._calls.pause(self.pause_mode)))

    async def resume(self) -> None:
        """Go on after `pause`, with whatever weights the servers have now."""
        await asyncio.wrap_future(self._start(self._calls.resume()))

    async def refresh(self) -> int:
        """Ask every server for the version of its weights; call it after new ones were pushed.

        Returns:
            The newest among servers that get requests, which is `weight_version` from now on. Those
            that have another get no request until they are seen to have it.
        """
        return await asyncio.wrap_future(self._start(self._servers.refresh()))

    async def readmit(self, url: str) -> None:
        """Look at a server that was taken out, and send it requests again.

        Raises:
            EngineDiedError: it does not answer.
            EngineError: it answers, and has other weights than those that get requests, or older
                ones than the engine has seen.
            SettingError: no server of this engine.
        """
        await asyncio.wrap_future(self._start(self._servers.readmit(url)))

    def close(self) -> None:
        """Abort everything of this engine and end its connections; servers keep running.

        Requests return what there is; every other call that still waits raises `EngineError`.
        """
        with self._starting:
            if self._closed:
                return
            self._closed = True
        done = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        if self._thread is threading.current_thread():  # a callback of one of the futures
            done.add_done_callback(lambda _: self._loop.stop())
            return
        with contextlib.suppress(Exception):
            done.result(2 * CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._starting:  # what starts before `close` is ended by it
            if self._closed:
                work.close()
                raise EngineError("the engine is closed; make a new one")
            return asyncio.run_coroutine_threadsafe(self._unless_closed(work), self._loop)

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _connect(self, routing: bool, recheck_seconds: float) -> None:
        await self._servers.connect(routing=routing)
        self._calls.keep(self._watch(recheck_seconds))

    async def _watch(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._servers.recheck()

    async def _unless_closed(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed before this was done") from None
            raise
        finally:
            self._tasks.discard(task)

    async def _shut_down(self) -> None:
        await self._calls.close(CLOSE_SECONDS)
        tasks = set(self._tasks)
        while tasks:  # one that undoes a pause gets a while for it
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=CLOSE_SECONDS / 2)
        await self._calls.end_beside()
        await self._servers.close()


def _max_in_flight(wanted: int | None) -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = max(1, files - SPARE_FILES) if files != resource.RLIM_INFINITY else MAX_IN_FLIGHT
    if wanted is None:
        return min(MAX_IN_FLIGHT, room)
    if not 1 <= wanted <= room:
        raise SettingError(
            f"max_in_flight is {wanted}; expected 1..{room}: each takes an open file, of which "
            f"this process may have {files} (ulimit -n)"
        )
    return wanted
