"""One SGLang server as seen over HTTP; used from one event loop only."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles.errors import (
    EngineDiedError,
    EngineError,
    MissingExtraError,
    PromptTooLongError,
    SettingError,
)
from miles.rollout._sglang_api import (
    Answer,
    Features,
    ModelInfo,
    ServerInfo,
    decode,
    encode,
    features_of,
    version_number,
    vocab_size_of,
)

try:
    import httpx
except ImportError as error:
    raise MissingExtraError("httpx", "sglang") from error

__all__ = [
    "Aborted",
    "Busy",
    "ConnectionLost",
    "NotReached",
    "PauseMode",
    "Refused",
    "Server",
    "ServerState",
    "Updating",
]

PauseMode = Literal["abort", "retract", "in_place"]

POOLS = 64
"""httpx looks through all connections of a pool for each request; several pools keep that short."""
KEEPALIVE_SECONDS = 3.0
"""Less than the 5 s after which a server closes an idle connection, so that none is reused then."""
PAUSE_SECONDS = 300.0
"""`mode="abort"` answers when everything that ran has ended."""


class NotReached(EngineDiedError):
    """No connection: the request was not sent."""


class ConnectionLost(EngineDiedError):
    """The connection ended before the answer: nobody knows what the server did."""


class Aborted(EngineError):
    """The request was aborted before it began."""


class Busy(EngineError):
    """The server took nothing on; ask again later."""


class Refused(EngineError):
    """The server answered, and does not do it."""


class Updating(EngineError):
    """The server is in the middle of an update of its weights; it will have others soon."""


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """One of the servers behind an engine."""

    url: str
    """Its address."""
    alive: bool
    """Whether it gets requests."""
    version: str
    """SGLang's version."""
    weight_version: int
    """Version of the weights, as last heard."""
    in_flight: int
    """Requests that it has not answered."""
    reason: str
    """Why it gets none."""


class Server:
    """A server's address, what is known of it, and connections to it.

    Args:
        url: its address.
        api_key: what the server was started with, or None.
        admin_api_key: likewise, for control endpoints.
        timeout: seconds for everything but generating.
        request_timeout: seconds for generating one answer; None: no limit.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        admin_api_key: str | None,
        timeout: float,
        request_timeout: float | None,
    ) -> None:
        self.url = url.rstrip("/")
        self.alive = True
        self.updating = False
        self.reason = ""
        self.weight_version = 0
        self.in_flight = 0
        self.info = ServerInfo(version="unknown")
        self.vocab_size: int | None = None
        self.features: Features | None = None
        self.probing = asyncio.Lock()
        self._api_key, self._admin_api_key = api_key, admin_api_key
        self._timeout, self._request_timeout = timeout, request_timeout
        # Reading the certificates takes a while: once, and only if they are needed.
        verify = ssl.create_default_context() if self.url.startswith("https:") else False
        self._clients = [_client(verify) for _ in range(POOLS)]
        self._turn = itertools.cycle(self._clients)

    @property
    def state(self) -> ServerState:
        """What is known of it."""
        return ServerState(
            url=self.url, alive=self.alive, version=self.info.version,
            weight_version=self.weight_version, in_flight=self.in_flight, reason=self.reason,
        )  # fmt: skip

    async def close(self) -> None:
        """End its connections."""
        for client in self._clients:
            await client.aclose()

    async def connect(self, *, assume_version: str | None) -> None:
        """Find out what is there.

        Raises:
            EngineDiedError: nothing is there.
            EngineError: it is no SGLang server, or one of an unknown version.
        """
        try:
            body = await self.call("GET", "/server_info")
        except EngineError as error:
            if "404" not in str(error):
                raise
            body = await self.call("GET", "/get_server_info")
        self.info = decode(body, ServerInfo, what=f"{self.url}/server_info")
        self.features = features_of(self.info.version, assume=assume_version, url=self.url)
        await self.refresh()

    async def refresh(self) -> int:
        """Ask for the version of its weights.

        Raises:
            Updating: it is negative, as `SGLangSyncer` leaves it until all weights are there.
        """
        body = await self.call("GET", "/model_info")
        info = decode(body, ModelInfo, what=f"{self.url}/model_info")
        version = version_number(info.weight_version, url=self.url)
        if version < 0:
            raise Updating(
                f"{self.url} has weights of version {version}, so an update is under way, or one "
                "failed; expected 0 or more; wait for it, or push again"
            )
        self.weight_version = version
        if self.vocab_size is None:  # weights that came from a folder later may be without one
            self.vocab_size = vocab_size_of(info.model_path)
        return version

    async def generate(self, body: Mapping[str, Any]) -> Answer:
        """One answer."""
        self.in_flight += 1
        try:
            data = await self.call("POST", "/generate", body, seconds=self._request_timeout)
        finally:
            self.in_flight -= 1
        return decode(data, Answer, what=f"{self.url}/generate")

    async def abort(self, rid: str | None) -> None:
        """End the request with this id; None: all of them."""
        body = {"abort_all": True} if rid is None else {"rid": rid, "abort_all": False}
        await self.call("POST", "/abort_request", body, admin=True)

    async def pause(self, mode: PauseMode) -> None:
        """Generate nothing until `resume`."""
        body = {"mode": mode}
        seconds = max(PAUSE_SECONDS, self._timeout)
        await self.call("POST", "/pause_generation", body, admin=True, seconds=seconds)

    async def resume(self) -> None:
        """Go on."""
        await self.call("POST", "/continue_generation", {}, admin=True)

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        admin: bool = False,
        seconds: float | None = -1.0,
    ) -> bytes:
        """The body of an answer with status 200.

        Raises:
            NotReached, ConnectionLost, Busy, EngineError: see there.
        """
        key = (self._admin_api_key or self._api_key) if admin else self._api_key
        limit = self._timeout if seconds == -1.0 else seconds
        headers = {"content-type": "application/json"} if body is not None else {}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        timeout = httpx.Timeout(limit, connect=self._timeout)
        try:
            answer = await next(self._turn).request(
                method, self.url + path, headers=headers, timeout=timeout,
                content=None if body is None else encode(body),
            )  # fmt: skip
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _not_reached(self.url, error) from error
        except httpx.InvalidURL as error:
            raise SettingError(
                f"{self.url!r} is not an address ({error}); expected one like http://host:30000"
            ) from error
        except httpx.ReadTimeout as error:
            raise EngineError(
                f"{self.url}{path} did not answer within {limit} s; expected it to. It hangs, or "
                "the limit is too short (timeout=, request_timeout=)"
            ) from error
        except httpx.UnsupportedProtocol as error:
            raise SettingError(
                f"{self.url!r} is not an address; expected one like http://host:30000"
            ) from error
        except httpx.DecodingError as error:
            raise EngineError(
                f"{self.url}{path} answered with bytes that are not what their content-encoding "
                f"says ({error}); expected JSON as SGLang sends it; look at what is between this "
                "process and the server"
            ) from error
        except httpx.TransportError as error:
            raise ConnectionLost(
                f"the connection to {self.url} ended during {path} "
                f"({type(error).__name__}: {error}); expected an answer; look at the end of the "
                "server's log, and start it again if it has died"
            ) from error
        if answer.status_code in (401, 403):
            raise self._wants_a_key(path, answer.status_code, admin=admin)
        if answer.status_code != 200:
            raise _refusal(self.url, path, answer)
        return answer.content

    def _wants_a_key(self, path: str, status: int, *, admin: bool) -> Refused:
        name = "admin_api_key" if admin else "api_key"
        if self._admin_api_key if admin else self._api_key:
            got = f"refused the {name} it got"
        elif admin and self._api_key:
            got = f"refused the api_key, which it got since {name} is None"
        else:
            got = f"asks for a key, and {name} is None"
        return Refused(
            f"{self.url}{path} answered {status}: it {got}; expected {name}= to be what the "
            f"server was started with (--{name.replace('_', '-')})"
        )


def _client(verify: ssl.SSLContext | bool) -> httpx.AsyncClient:
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS
    )
    # Proxies of the environment are not for a server in one's own cluster.
    return httpx.AsyncClient(limits=limits, verify=verify, trust_env=False)


def _not_reached(url: str, error: Exception) -> EngineError:
    if "Too many open files" in str(error):
        return EngineError(
            f"no connection to {url}: {error}. Raise the limit (ulimit -n), or lower max_in_flight"
        )
    return NotReached(
        f"no SGLang server answers at {url} ({str(error) or type(error).__name__}); expected one "
        "there; look at its log, start it if it does not run, or give the address it has"
    )


def _refusal(url: str, path: str, answer: httpx.Response) -> Exception:
    status, text = answer.status_code, answer.text[:2000]
    if status in (429, 502, 503):
        return Busy(
            f"{url}{path} answered {status}: {text}; expected it to take requests; lower "
            "max_in_flight, raise retries or backoff, or look at the server's log"
        )
    if status == 499:
        return Aborted(f"{url}{path} answered {status}: {text}")
    if status == 400 and path == "/generate":
        if "context length" in text or "allowed length" in text:
            return PromptTooLongError(f"{url} refused the request: {text}")
        return SettingError(f"{url} refused the request: {text}")
    return Refused(
        f"{url}{path} answered {status}: {text}; expected 200; look at the end of the server's log"
    )
