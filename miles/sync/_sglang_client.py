"""The endpoints of one SGLang server that a weight sync uses."""

from __future__ import annotations

import contextlib
import re
import secrets
import ssl
from collections.abc import Iterator
from typing import Any

from miles.errors import MissingExtraError, SettingError, SyncError

__all__ = ["ClashError", "Client", "KNOWN_VERSIONS", "LateError", "MIXED"]

KNOWN_VERSIONS = ("0.5.17", "0.5.18", "0.5.19", "0.5.21", "0.5.22", "0.5.23")
SESSIONS_SINCE = 21
MIXED = -1
"""What a server has that got a part of an update: its version is a mark, some number below 0."""


READING = {
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "LlamaForCausalLM",
    "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
}  # fmt: skip
"""Models of SGLang whose loaders were seen to only read what they are given. Gemma's adds 1 to it,
and gpt-oss's sets some of it to 0 (0.5.17)."""


class ClashError(SyncError):
    """Somebody else gave a server weights during a push."""


class LateError(SyncError):
    """A server did not answer in time."""


class Client:
    """A server's address, its version, and calls to it that fail with what to do.

    Args:
        url: its address.
        api_key: what the server was started with, or None.
        admin_key: likewise `--admin-api-key`, for control endpoints.
        timeout: seconds for a call.
        assume_version: treat an unknown version of SGLang as this one.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        admin_key: str | None,
        timeout: float,
        assume_version: str | None,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "sglang") from error
        if assume_version not in (None, *KNOWN_VERSIONS):
            raise SettingError(
                f"assume_version is {assume_version!r}; expected one of {', '.join(KNOWN_VERSIONS)}"
            )
        self.url = url.rstrip("/")
        self.tp_size = 1
        self.sessions = False
        self.weight_cache = False
        self.draft = False
        self.only_reads = False
        self.mixed = False
        """Whether it holds a part of an update, as far as is known."""
        self._key, self._admin_key = api_key, admin_key or api_key
        self._assumed = assume_version
        self._told: str | None = None  # the version that it was given last
        self._given: int | None = None  # likewise, but for marks
        self._mark = -2 - secrets.randbelow(1 << 30)  # this trainer's own
        self._marked = False  # or may be
        self._lapsed = False  # marked, and it says a version, as after it was started again
        self._errors = httpx.HTTPError, httpx.InvalidURL
        self._no_address = httpx.InvalidURL, httpx.UnsupportedProtocol
        self._late = httpx.TimeoutException
        limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        verify = ssl.create_default_context() if self.url.startswith("https:") else False
        self._http = httpx.Client(timeout=limits, verify=verify, trust_env=False)  # no proxy

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @contextlib.contextmanager
    def hurrying(self, seconds: float) -> Iterator[None]:
        """Calls that begin in here wait no longer than that."""
        patient = self._http.timeout
        self._http.timeout = min(seconds, patient.read or seconds)
        try:
            yield
        finally:
            self._http.timeout = patient

    def weight_version(self) -> int:
        """Ask for the weights' version, and what the server is.

        The latter takes some milliseconds, so it is asked at first, and again when the version is
        not what the server was given last, as after a restart.

        Raises:
            SyncError: no server, one that is not known, weights whose version is no number, or is
                above the one that this trainer gave last, and so another trainer's.
            SettingError: the address is none.
        """
        known = self._told
        if known is None:
            self._learn(self._get("/server_info"))
        model = self._get("/model_info")
        said = model.get("weight_version")
        made = model.get("architectures") or ["unknown"]
        if not isinstance(made, list) or not all(isinstance(name, str) for name in made):
            raise self._nonsense("/model_info", f"architectures {made!r:.100}")
        self.only_reads = READING.issuperset(made)
        if known is not None and said != known:
            self._learn(self._get("/server_info"))
        if said in (None, "default"):
            self.mixed = self._lapsed = False
            return 0
        try:
            version = int(said)
        except (TypeError, ValueError, OverflowError) as error:
            raise SyncError(
                f"{self.url} says that its weight version is {said!r}; expected an integer: start "
                "it with --weight-version 0, or send one to /update_weight_version"
            ) from error
        if self._given is not None and version > self._given:
            raise SyncError(
                f"{self.url} has weights of version {version}; expected {self._given}, the last "
                "that this syncer saw or gave: another trainer pushes to it, which has to end, or "
                "it was started again with a later --weight-version; make a new syncer to go on"
            )
        self.mixed = self._marked or version < 0
        self._lapsed = self._marked and version >= 0
        return MIXED if self.mixed else version

    def meet(self, version: int) -> None:
        """What the server had when this trainer first came counts as given."""
        if self._given is None and version != MIXED:
            self._given = version

    def check_mark(self) -> None:
        """Raise `ClashError` where somebody else gave a version or a mark since `say(MIXED)`."""
        said = self._get("/model_info").get("weight_version")
        if said != str(self._mark):
            raise ClashError(
                f"{self.url} went to version {said!r} in the middle of this push; expected this "
                f"trainer's mark, {self._mark}, until its end: another trainer pushes to it, or it "
                "was started again"
            )

    def say(self, version: int) -> None:
        """Give the weights a version, or this trainer's mark."""
        if version == MIXED:
            self.mixed = self._marked = True  # before, as below: the call or its answer may be lost
        else:
            self._given = version
        told = str(self._mark if version == MIXED else version)
        # By default this call aborts every request.
        self.post("/update_weight_version", {"new_version": told, "abort_all_requests": False})
        self._told = told
        self.mixed = self._marked = version == MIXED

    def mark_again(self) -> None:
        """Have one that may hold a part say so, where it was heard to say something else."""
        if self._lapsed:
            self.say(MIXED)

    def post(self, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        """Call a control endpoint; its answer, where it says that it succeeded.

        Raises:
            SyncError: the call failed, or the answer says `success: false`.
        """
        answer = self._call("POST", path, self._admin_key, body or {}, query)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise self._refused(path, answer.get("message", answer))
        return answer

    def _get(self, path: str) -> dict[str, Any]:
        answer = self._call("GET", path, self._key, None, {})
        if not isinstance(answer, dict):
            raise self._nonsense(path, repr(answer))
        return answer

    def _learn(self, info: dict[str, Any]) -> None:
        version = str(info.get("version"))
        match = re.match(r"v?(\d+\.\d+\.\d+)(?![\d.]*(?:dev|rc|a|b))", version)
        release = match.group(1) if match else ""
        if release not in KNOWN_VERSIONS:
            if self._assumed is None:
                raise SyncError(
                    f"{self.url} runs SGLang {version!r}; expected one of "
                    f"{', '.join(KNOWN_VERSIONS)}: install one of these, or pass assume_version= "
                    "with the one whose interface it has"
                )
            release = self._assumed
        self.sessions = int(release.split(".")[2]) >= SESSIONS_SINCE
        self.weight_cache = info.get("weight_cache_mode") not in (None, "off")
        self.draft = info.get("speculative_algorithm") not in (None, "NGRAM")
        sizes = {key: info.get(key) or 1 for key in ("tp_size", "dp_size")}
        for key, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise self._nonsense("/server_info", f"{key}={size!r:.100}")
        self.tp_size = sizes["tp_size"]
        if sizes["dp_size"] > 1 and not info.get("enable_dp_attention"):
            raise SyncError(
                f"{self.url} has dp_size={sizes['dp_size']}, which SGLang cannot update; expected "
                "1: start one server for each replica and give their urls"
            )

    def _call(
        self,
        method: str,
        path: str,
        key: str | None,
        body: dict[str, Any] | None,
        query: dict[str, Any],
    ) -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            answer = self._http.request(
                method, self.url + path, json=body, params=query, headers=headers
            )
        except self._no_address as error:
            raise SettingError(
                f"{self.url!r} is not an address ({error}); expected one like http://host:30000"
            ) from error
        except self._errors as error:
            kind = LateError if isinstance(error, self._late) else SyncError
            raise kind(
                f"no answer of {self.url}{path} ({type(error).__name__}: {error}); expected an "
                "SGLang server there: look at its log, start it again if it is gone"
            ) from error
        if answer.status_code in (401, 403):
            given = "the given one" if key else "none"
            raise SyncError(
                f"{self.url}{path} wants a key and got {given}; pass admin_key= with what the "
                "server was started with (--admin-api-key), api_key= if it has only --api-key"
            )
        if answer.status_code == 404:
            raise self._nonsense(path, "404 Not Found")
        try:
            content = answer.json()
        except ValueError as error:
            if path == "/flush_cache" and answer.is_success:
                return None  # the one that answers in plain text
            if answer.is_success:
                raise self._nonsense(path, repr(answer.text[:200])) from error
            content = answer.text[:200]
        if not answer.is_success:
            raise self._refused(path, f"{answer.status_code} {_message(content)}")
        return content

    def _refused(self, path: str, message: Any) -> SyncError:
        return SyncError(f"{self.url}{path} failed: {message}")

    def _nonsense(self, path: str, what: str) -> SyncError:
        return SyncError(
            f"{self.url}{path} answered {what}; expected what SGLang {KNOWN_VERSIONS[0]} to "
            f"{KNOWN_VERSIONS[-1]} send: is this the address of an SGLang server?"
        )


def _message(content: Any) -> Any:
    """The text in an answer that is an error."""
    for key in ("message", "error", "detail"):
        if isinstance(content, dict) and key in content:
            return _message(content[key])
    return content
