"""What an engine is asked for, on its way to a server and back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.errors import EngineDiedError, EngineError
from miles.rollout._sglang_answer import RoutingLayout, complete
from miles.rollout._sglang_api import version_number
from miles.rollout._sglang_http import (
    Aborted,
    Busy,
    ConnectionLost,
    NotReached,
    PauseMode,
    Refused,
    Server,
)
from miles.rollout._sglang_servers import Servers
from miles.rollout.sample import Sample, SamplingParams, Status

__all__ = ["Calls", "How"]

MAX_BACKOFF = 10.0
ABORT_REPEAT_SECONDS = 0.5
UPDATE_POLL_SECONDS = 0.1
"""Between two looks at servers whose weights are being updated."""
MAX_ABORTS = 64
"""Sent at once, beside what is in flight."""


@dataclass(frozen=True, kw_only=True)
class How:
    """What is the same for every call; see `SGLangEngine`."""

    routing: RoutingLayout | None
    sampling: Mapping[str, Any]
    sampling_mask: bool
    max_in_flight: int
    retries: int
    backoff: float
    abort_timeout: float


@dataclass(eq=False)
class Call:
    """A `generate` on its way."""

    request_id: str
    sample: Sample
    params: SamplingParams
    task: asyncio.Task[Any]
    rid: str | None = None
    """Its name at the server; None while it is not there."""
    server: Server | None = None
    aborted: bool = False
    retries: int = 0
    busy: set[Server] = field(default_factory=set)
    """Who sent it away; others are asked first."""


class Calls:
    """All calls of one engine; used from one event loop only.

    Args:
        servers: who answers.
        how: see there.
    """

    def __init__(self, servers: Servers, how: How) -> None:
        self._servers, self._how = servers, how
        self._calls: set[Call] = set()
        self._beside: set[asyncio.Task[Any]] = set()
        self._slots = asyncio.Semaphore(how.max_in_flight)
        self._aborting = asyncio.Semaphore(MAX_ABORTS)
        self._gate = asyncio.Event()
        self._gate.set()
        self._pausing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._calls)

    def keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let something run beside; the loop itself holds tasks only weakly."""
        task = asyncio.get_running_loop().create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        return task

    async def close(self, seconds: float) -> None:
        """End every call."""
        calls = list(self._calls)
        try:
            if calls:
                await self.abort([call.request_id for call in calls], seconds=seconds)
        except EngineError:  # a server that does not let us
            await _end(calls)

    async def end_beside(self) -> None:
        """End what runs beside; nothing may start any more."""
        tasks = list(self._beside)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def generate(self, name: str, sample: Sample, params: SamplingParams) -> Sample:
        """Complete `sample`, which is nobody else's."""
        task = asyncio.current_task()
        assert task is not None
        call = Call(name, sample, params, task)
        self._calls.add(call)
        try:
            return await self._until_answered(call)
        except asyncio.CancelledError:
            if not call.aborted:  # the caller gave up
                raise
            task.uncancel()
            sample.status = Status.ABORTED
            sample.metadata["finish_reason"] = "abort"
            return sample
        finally:
            self._calls.discard(call)

    async def _until_answered(self, call: Call) -> Sample:
        problem: EngineError = EngineDiedError("no server")
        while True:
            if call.retries > self._how.retries:
                raise problem
            if call.retries:
                wait = min(self._how.backoff * 2 ** (call.retries - 1), MAX_BACKOFF)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            await self._gate.wait()
            async with self._slots:
                server = await self._pick(call)
                if server is None:
                    problem = self._servers.none_left()
                    call.retries += 1
                    continue
                try:
                    return await self._ask(call, server)
                except Busy as error:
                    problem = error
                    call.busy.add(server)
                    if call.busy.issuperset(s for s in self._servers if s.alive):
                        call.busy = {server}  # all did: in turn
                except NotReached as error:
                    problem = error
                    await self._servers.suspect(server, error)
                except ConnectionLost as error:
                    problem = error
                    if await self._servers.suspect(server, error):
                        # It may be at work on this; that answer would reach nobody.
                        await _abort_one(call.rid, server)
                except asyncio.CancelledError:
                    self.keep(_abort_one(call.rid, server))  # nobody wants the rest
                    raise
                finally:
                    call.rid = None
            if call.aborted:
                raise asyncio.CancelledError
            call.retries += 1

    async def _pick(self, call: Call) -> Server | None:
        """A server, when no pause and no update is under way; None: none is left."""
        while True:
            await self._gate.wait()
            server = await self._servers.pick(call.sample, call.busy)
            if server is None and self._servers.updating:
                await asyncio.sleep(UPDATE_POLL_SECONDS)
            elif self._gate.is_set():  # no pause came while servers were looked at
                return server

    async def _ask(self, call: Call, server: Server) -> Sample:
        sample, params = call.sample, call.params
        # Servers take an id for the beginning of others; of two that begin with 32 different hex
        # digits neither is the beginning of the other, whatever name follows.
        rid = f"{uuid.uuid4().hex}-{call.request_id}"
        version = server.weight_version
        start = self._routing_start(sample)
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": sample.tokens,
            "sampling_params": self._sampling_params(sample, params, server),
            "return_logprob": True,
            "extra_key": f"v{version}",  # no cache of other weights
        }
        if self._how.routing is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": start}
        if self._how.sampling_mask:
            body["return_sampling_mask"] = True
        call.rid, call.server = rid, server
        try:
            answer = await server.generate(body)
        except Aborted as error:  # while it waited at a paused server
            call.aborted = True
            raise asyncio.CancelledError from error
        said = answer.meta_info.weight_version
        if 0 <= version_number(said, url=server.url) < version:  # it was started again, say
            await self._servers.suspect(server, Refused(f"{server.url} went back to {said}"))
        complete(
            sample, answer, sent_version=version, routing=self._how.routing, routing_start=start,
            sampling_mask=self._how.sampling_mask,
            max_new_tokens=body["sampling_params"]["max_new_tokens"],
            who=f"request {call.request_id!r}", url=server.url,
        )  # fmt: skip
        if call.retries:
            sample.metadata["retries"] = call.retries
        self._servers.heard(server, said)
        return sample

    def _routing_start(self, sample: Sample) -> int:
        """The first row of routing that is still to be recorded."""
        if sample.routing is not None:
            return len(sample.routing)
        # What a sample sampled earlier went through other experts than a pass today would tell.
        return len(sample.tokens) - 1 if sample.spans else 0

    def _sampling_params(
        self, sample: Sample, params: SamplingParams, server: Server
    ) -> dict[str, Any]:
        wanted = params.max_new_tokens - sample.num_generated_tokens
        longest = server.info.longest_answer(len(sample.tokens))
        sampling: dict[str, Any] = {
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            **self._how.sampling,
            "temperature": params.temperature,
            "max_new_tokens": wanted if longest is None else min(wanted, longest),
            "ignore_eos": params.ignore_eos,
        }  # fmt: skip
        if params.stop_token_ids:
            sampling["stop_token_ids"] = list(params.stop_token_ids)
        seed = sample.metadata["seed"]
        if seed is not None and server.info.enable_deterministic_inference:
            sampling["sampling_seed"] = seed
        return sampling

    async def abort(
        self, request_ids: Sequence[str] | None, *, seconds: float | None = None
    ) -> None:
        """End calls, and wait until they have returned."""
        calls = [call for call in self._calls if _named(call.request_id, request_ids)]
        for call in calls:
            call.aborted = True
            if call.rid is None:
                call.task.cancel()
        try:
            async with asyncio.timeout(self._how.abort_timeout if seconds is None else seconds):
                await self._abort_at_servers(calls, everything=request_ids is None)
        except TimeoutError:
            await _end(calls)
        except EngineError:
            for call in calls:
                call.aborted = call.rid is None  # those that are at a server go on there
            raise

    async def _abort_at_servers(self, calls: list[Call], *, everything: bool) -> None:
        if any(call.rid is not None for call in calls):
            await self._retract()
        # One that is on its way to the server is not there yet to be aborted: repeat.
        while True:
            if everything:
                await self._servers.everywhere(lambda server: server.abort(None))
            else:
                sent = [call for call in calls if call.rid is not None and not call.task.done()]
                await asyncio.gather(*(self._abort_in_turn(call) for call in sent))
            tasks = [call.task for call in calls if not call.task.done()]
            if tasks:
                await asyncio.wait(tasks, timeout=ABORT_REPEAT_SECONDS)
            if all(task.done() for task in tasks):
                return

    async def _abort_in_turn(self, call: Call) -> None:
        async with self._aborting:
            if call.rid is None or call.server is None:
                return
            try:
                await call.server.abort(call.rid)
            except Refused:
                raise
            except EngineError:  # it did not get there: the next turn tries again
                return

    async def _retract(self) -> None:
        """Under a pause "in_place" nothing ends."""
        if self._servers.paused != "in_place":
            return
        async with self._pausing:
            if self._servers.paused == "in_place":
                with self._telling("retract"):
                    await self._servers.everywhere(lambda server: server.pause("retract"))

    @contextlib.contextmanager
    def _telling(self, mode: PauseMode | None) -> Iterator[None]:
        """Say first what all are about to be told, for a server that comes back meanwhile."""
        before, self._servers.paused = self._servers.paused, mode
        try:
            yield
        except BaseException:
            self._servers.paused = before
            raise

    async def pause(self, mode: PauseMode) -> None:
        """Let the servers, and what is not sent yet, wait; given up or failing, it is undone."""
        async with self._pausing:
            self._gate.clear()
            held, self._servers.paused = self._servers.paused == "in_place", mode
            telling = self.keep(self._tell_of_pause(mode, retract=held and mode == "abort"))
            try:
                await asyncio.shield(telling)
            except BaseException:  # some may be paused, some not: all go on
                await asyncio.wait([telling])  # a pause on its way would take hold after its end
                self._servers.paused = None
                with contextlib.suppress(EngineError):
                    await self._servers.everywhere(lambda server: server.resume())
                self._gate.set()
                raise

    async def _tell_of_pause(self, mode: PauseMode, *, retract: bool) -> None:
        if retract:  # they would never end, and servers wait for them
            await self._servers.everywhere(lambda server: server.pause("retract"))
        await self._servers.everywhere(lambda server: server.pause(mode))

    async def resume(self) -> None:
        """Go on after `pause`; if a server does not, all is as before, to be tried again."""
        async with self._pausing:
            if self._gate.is_set():
                return
            with self._telling(None):
                await self._servers.everywhere(lambda server: server.resume())
            try:
                await self._servers.refresh()
            finally:  # the servers run: what waits here may go
                self._gate.set()


def _named(name: str, wanted: Sequence[str] | None) -> bool:
    if wanted is None:
        return True
    return any(name == w or (w.endswith("/") and name.startswith(w)) for w in wanted)


async def _end(calls: list[Call]) -> None:
    """Let calls return what there is, whatever the servers do."""
    tasks = [call.task for call in calls if not call.task.done()]
    for call in calls:
        call.aborted = True
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def _abort_one(rid: str | None, server: Server | None) -> None:
    """Spare a server the work, if it can be."""
    if rid is not None and server is not None:
        with contextlib.suppress(EngineError):
            await server.abort(rid)
