"""Several SGLang servers: which one gets a request, and which ones get none."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Literal

from miles.errors import EngineDiedError, EngineError, SettingError
from miles.rollout._sglang_api import version_number
from miles.rollout._sglang_http import ConnectionLost, NotReached, PauseMode, Server, Updating
from miles.rollout.sample import Sample

__all__ = ["Servers"]

BLOCK = 128
"""Prefixes are told apart in blocks of so many tokens."""
MAX_PREFIXES = 65_536
SLACK = 16
"""Requests that a server may have beyond 5/4 of the least busy one's: a group of so many stays
together even where nothing else runs."""
PROBE_SECONDS = 0.2
"""A server that answered so recently is taken to be alive."""


class Servers:
    """Used from one event loop only.

    Args:
        servers: all of them.
        assume_version: treat a server of an unknown version as one of this version.
    """

    def __init__(self, servers: list[Server], *, assume_version: str | None) -> None:
        self._servers = servers
        self._assume_version = assume_version
        self._homes: OrderedDict[int, Server] = OrderedDict()
        self._turn = 0
        self._probed: dict[Server, float] = {}
        self._looked = 0.0
        self.weight_version = 0
        self.paused: PauseMode | None = None
        """What those that get requests were told, or are being told."""

    def __iter__(self) -> Iterator[Server]:
        return iter(self._servers)

    @property
    def deterministic(self) -> bool:
        """Whether a seed means something to all of them."""
        return all(server.info.enable_deterministic_inference for server in self._servers)

    @property
    def vocab_size(self) -> int | None:
        """Token ids that all of them know, as far as they tell."""
        return min((s.vocab_size for s in self if s.vocab_size is not None), default=None)

    @property
    def updating(self) -> bool:
        """Whether one gets no requests only until its new weights are there."""
        return any(server.updating for server in self)

    async def connect(self, *, routing: bool) -> None:
        """Find out what is there, all of which must be."""
        await asyncio.gather(
            *(self._look(s, s.connect(assume_version=self._assume_version)) for s in self)
        )
        for server in self:
            if routing and not server.info.enable_return_routed_experts:
                raise SettingError(
                    f"routing was asked for and {server.url} does not record it; start it with "
                    "--enable-return-routed-experts, or leave routing= out"
                )
        self._settle()

    async def close(self) -> None:
        """End all connections."""
        await asyncio.gather(*(server.close() for server in self))

    async def pick(self, sample: Sample, busy: Collection[Server] = ()) -> Server | None:
        """The server for this sample: the one that has its prompt, else the next in turn.

        One that is much busier than another gets none, or a prefix of many prompts, such as
        examples that all begin with, would bring everything to one server. Those that were `busy`
        get none as long as another is there.
        """
        alive = [server for server in self if server.alive]
        if not alive:
            # All that wait for new weights come here again and again: one look serves them.
            since = asyncio.get_running_loop().time() - self._looked
            if not self.updating or since > PROBE_SECONDS:
                await self.recheck()
            alive = [server for server in self if server.alive]
        if len(alive) < 2:
            return alive[0] if alive else None
        alive = [server for server in alive if server not in busy] or alive
        least = min(server.in_flight for server in alive)
        limit = least + least // 4 + SLACK
        free = [server for server in alive if server.in_flight <= limit]
        prefixes = _prefixes(sample.tokens[: sample.num_prompt_tokens])
        server = next((home for key in prefixes if (home := self._homes.get(key)) in free), None)
        if server is None:
            server = free[self._turn % len(free)]
            self._turn += 1
        for key in prefixes:
            self._homes[key] = server
            self._homes.move_to_end(key)
        while len(self._homes) > MAX_PREFIXES:
            self._homes.popitem(last=False)
        return server

    async def suspect(self, server: Server, error: EngineError) -> bool:
        """Whether a server that failed a request is still there; if not, it gets no more."""
        now = asyncio.get_running_loop().time
        async with server.probing:  # once for all the requests that failed together
            if not server.alive or now() - self._probed.get(server, -1.0) < PROBE_SECONDS:
                return server.alive
            try:
                await server.refresh()
            except Updating as under_way:
                self._take_out(server, under_way)
            except EngineError:
                self._take_out(server, error)
            else:
                self._probed[server] = now()
                if server.weight_version < self.weight_version:
                    self._take_out(server, self._behind(server))
                self.weight_version = max(self.weight_version, server.weight_version)
            return server.alive

    async def recheck(self) -> None:
        """Look at those that were taken out."""
        self._looked = asyncio.get_running_loop().time()
        for server in self:
            if not server.alive:
                try:
                    await self.readmit(server.url)
                except EngineError as error:
                    self._take_out(server, error)

    async def readmit(self, url: str) -> None:
        """Send this server requests again, if it has the weights of those that get some.

        Newer ones would make all others old: they are refused, unless there are no others.
        """
        server = next((s for s in self if s.url == url.rstrip("/")), None)
        if server is None:
            known = ", ".join(s.url for s in self)
            raise SettingError(f"{url} is no server of this engine; expected one of {known}")
        async with server.probing:
            if server.alive:
                return
            await server.connect(assume_version=self._assume_version)
            self._check_version(server)
            # It may have missed a pause, or have been paused when it was last heard; and another
            # pause or its end may come while it is told.
            told: PauseMode | Literal["nothing"] | None = "nothing"
            while told != self.paused:
                told = self.paused
                if told == "abort":  # it may hold requests in place, which never end
                    await server.pause("retract")
                await (server.resume() if told is None else server.pause(told))
            self._check_version(server)
            self.weight_version = server.weight_version
            server.alive, server.updating, server.reason = True, False, ""

    async def refresh(self) -> int:
        """Ask all for their weight version, and take back those that have the newest."""
        await self.everywhere(lambda server: self._look(server, server.refresh()))
        self._settle()
        await self.recheck()
        return self.weight_version

    async def everywhere(self, act: Callable[[Server], Awaitable[object]]) -> None:
        """Do something wherever requests are or may go; a server that is gone is no failure.

        An error is raised when all have answered, so that nothing is still on its way then.
        """

        async def one(server: Server) -> None:
            try:
                await act(server)
            except (NotReached, ConnectionLost) as error:
                if await self.suspect(server, error):
                    await act(server)

        servers = [s for s in self if s.alive or s.in_flight]
        for outcome in await asyncio.gather(*map(one, servers), return_exceptions=True):
            if outcome is not None:
                raise outcome

    def heard(self, server: Server, text: str | int | None) -> None:
        """An answer tells of new weights; an old answer may arrive late and tells nothing."""
        version = version_number(text, url=server.url)
        server.weight_version = max(server.weight_version, version)
        self.weight_version = max(self.weight_version, version)

    def none_left(self) -> EngineDiedError:
        """What is wrong with each."""
        reasons = "; ".join(f"{server.url}: {server.reason}" for server in self)
        return EngineDiedError(
            f"no server is left ({reasons}). Start one, push the weights to it, and ask again: "
            "no sample was changed"
        )

    async def _look(self, server: Server, look: Awaitable[object]) -> None:
        """A server whose weights are being updated is waited for."""
        try:
            await look
        except Updating as error:
            self._take_out(server, error)

    def _settle(self) -> None:
        """Versions only grow; a server that is behind waits until it has the newest."""
        versions = [server.weight_version for server in self if server.alive]
        self.weight_version = max([self.weight_version, *versions])
        for server in self:
            if server.alive and server.weight_version < self.weight_version:
                self._take_out(server, self._behind(server))

    def _check_version(self, server: Server) -> None:
        if server.weight_version < self.weight_version:
            raise self._behind(server)
        if server.weight_version > self.weight_version and any(s.alive for s in self):
            raise EngineError(
                f"{server.url} has weights of version {server.weight_version}; expected "
                f"{self.weight_version}, as the servers that get requests; push the newer ones to "
                "those, and call refresh()"
            )

    def _behind(self, server: Server) -> EngineError:
        return EngineError(
            f"{server.url} has weights of version {server.weight_version}; expected "
            f"{self.weight_version}; push them to it"
        )

    @staticmethod
    def _take_out(server: Server, error: EngineError) -> None:
        server.alive, server.reason = False, str(error)
        server.updating = isinstance(error, Updating)


def _prefixes(prompt: list[int]) -> list[int]:
    """Hashes of a prompt and of its beginnings down to half of it, longest first.

    Shorter ones, such as a system prompt, are common to requests that should be spread.
    """
    chain = 0
    keys = []
    for start in range(0, len(prompt), BLOCK):
        end = min(start + BLOCK, len(prompt))
        chain = hash((chain, tuple(prompt[start:end])))
        if 2 * end >= len(prompt):
            keys.append(chain)
    return keys[::-1]
