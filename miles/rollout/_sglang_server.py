"""An SGLang server as a child process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from miles.errors import EngineDiedError, EngineError, MissingExtraError, SettingError

try:
    import httpx
except ImportError as error:
    raise MissingExtraError("httpx", "sglang") from error

__all__ = ["SGLangServer"]

LOG_LINES = 40
"""How much of the log an error shows."""
POLL_SECONDS = 0.2
WATCHDOG = """
import os, select, signal, sys
# The pipe ends when the parent does, however that ends, unless a child that it forked holds it too.
while os.getppid() == int(sys.argv[2]) and not select.select([0], [], [], 0.5)[0]:
    pass
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""


class SGLangServer:
    """Starts `sglang.launch_server` in a process group of its own, and ends all of it.

    `start` returns when the server has answered a request; until then `/health` says 503. If this
    process ends, even by SIGKILL, the server is ended too.

    Without `log=` its output goes to a temporary folder, which `stop` removes if the server ran
    until then. If it had died or did not start, or an exception ends the `with` block, the folder
    stays, and an error, a note of the exception or a warning says where it is.

    Args:
        model_path: what to serve.
        args: further flags of `sglang.launch_server`.
        host: IPv4 address that it listens on, or a name that has one.
        port: its port; None takes a free one.
        env: environment variables for it alone, beside those of this process: `PYTHONPATH`, if it
            needs other packages than the trainer.
        cwd: folder that it runs in; `python -m` looks for modules there first.
        python: the interpreter that has SGLang.
        module: what to run instead of `sglang.launch_server`.
        log: file for its output; None takes a temporary one, see above.
        on_line: called with each line of it, in a thread. The first time that it raises is a
            warning; it gets the next lines all the same.
        start_timeout: seconds until the first answer.
        stop_timeout: seconds between SIGTERM and SIGKILL, and for `on_line` to return after that.
        api_key: passed on, and used for the first request.

    Raises:
        SettingError: a host at which nothing can listen here.

    Example:
        >>> from miles.rollout import SGLangServer
        >>> server = SGLangServer("Qwen/Qwen3-0.6B", args=["--skip-tokenizer-init"], port=30000)
        >>> server.url, server.alive
        ('http://127.0.0.1:30000', False)
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        args: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        python: str = sys.executable,
        module: str = "sglang.launch_server",
        log: str | os.PathLike[str] | None = None,
        on_line: Callable[[str], None] | None = None,
        start_timeout: float = 900.0,
        stop_timeout: float = 20.0,
        api_key: str | None = None,
    ) -> None:
        self._host = host
        self.port = _bind(host, 0) if port is None else port
        self.url = f"http://{host}:{self.port}"
        self._own_log = log is None
        folder = f"sglang-{uuid.uuid4().hex}"
        self.log = Path(tempfile.gettempdir(), folder, "server.log") if log is None else Path(log)
        key = [] if api_key is None else ["--api-key", api_key]
        self.command = [
            *(["env", *(f"{k}={v}" for k, v in env.items())] if env else []),
            python, "-m", module, "--model-path", os.fspath(model_path),
            "--host", host, "--port", str(self.port), *key, *args,
        ]  # fmt: skip
        self._cwd, self._on_line = cwd, on_line
        self._start_timeout, self._stop_timeout = start_timeout, stop_timeout
        self._api_key = api_key
        self._process: subprocess.Popen[bytes] | None = None
        self._group: int | None = None  # until it is cleaned up: later the number may be another's
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._started = self._told = False  # it has answered; an error told of its death
        self._stopped = False  # by us

    @property
    def pid(self) -> int | None:
        """Process id, which is the group's id too; None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Nothing, as long as it runs, or if it was stopped.

        Raises:
            EngineDiedError: it ended by itself; the text holds the end of its log.
        """
        if self._process is None or self._stopped:
            return
        if (code := self._process.poll()) is not None:
            self._told = True
            raise EngineDiedError(
                f"the server {self._process.pid} ended with exit code {code}. The end of "
                f"{self.log}:\n{self.last_lines()}"
            )

    def last_lines(self, count: int = LOG_LINES) -> str:
        """The end of its log."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.log.read_bytes().splitlines()[-count:]
            return b"\n".join(lines).decode(errors="replace")
        return ""

    def start(self) -> Self:
        """Start it and wait until it has answered.

        Raises:
            EngineDiedError: it ended before that.
            EngineError: it did not answer in `start_timeout`, or refused the first request; it is
                ended.
            SettingError: there is no such interpreter, the port is taken, or the log cannot be
                written.
        """
        if self.alive:
            return self
        self._clean_up()
        _bind(self._host, self.port)  # a server of someone else would answer in the place of ours
        self._process, self._stopped = self._spawned(), False
        self._group = self._process.pid
        try:
            # Its own group, so that neither Ctrl-C nor the end of the server's ends it.
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", WATCHDOG, str(self._process.pid),
                 str(os.getpid())],
                stdin=subprocess.PIPE, process_group=0,
            )  # fmt: skip
            if self._on_line is not None:
                self._reader = threading.Thread(
                    target=self._read, args=(self._process, self._on_line), daemon=True
                )
                self._reader.start()
            self._wait()
        except BaseException:
            self._end(keep_log=True)
            raise
        self._started, self._told = True, False
        return self

    def stop(self) -> None:
        """End it and all its children: SIGTERM, then SIGKILL."""
        self._end(keep_log=False)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failed = isinstance(error, Exception)
        if failed and self._own_log and error is not None:
            error.add_note(f"the log of the SGLang server at {self.url} is {self.log}")
        self._end(keep_log=failed)

    def _spawned(self) -> subprocess.Popen[bytes]:
        mode = 0o700 if self._own_log else 0o777
        try:
            self.log.parent.mkdir(mode=mode, parents=True, exist_ok=True)
            self.log.write_bytes(b"")
        except OSError as error:
            raise SettingError(
                f"the log {self.log} cannot be written ({error}); expected a file that this "
                "process can make; give another one as log="
            ) from error
        try:
            with self.log.open("wb") as file:
                return subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    process_group=0, cwd=self._cwd,
                )  # fmt: skip
        except OSError as error:
            self._remove_own_log()
            raise SettingError(
                f"{self.command[0]!r} cannot be started ({error}); expected an interpreter that "
                "has sglang"
            ) from error

    def _end(self, *, keep_log: bool) -> None:
        started, ran = self._started, self.alive
        self._started = False
        if self._process is not None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._stop_timeout)
        self._clean_up()
        if not started or keep_log:
            return
        if ran:
            self._stopped = True
            self._remove_own_log()
        elif not self._told:
            warnings.warn(
                f"the server {self.pid} had ended before it was stopped; its log is {self.log}",
                stacklevel=3,
            )

    def _remove_own_log(self) -> None:
        if self._own_log:
            shutil.rmtree(self.log.parent, ignore_errors=True)

    def _clean_up(self) -> None:
        """Make sure that nothing is left of the group, then that nobody watches it."""
        self._signal(signal.SIGKILL)  # children too, which outlive a parent that was killed
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
            self._watchdog = None
        if self._process is not None:
            self._process.wait()
        self._group = None
        reader, self._reader = self._reader, None
        if reader not in (None, threading.current_thread()):  # `on_line` may stop it
            reader.join(self._stop_timeout)
            if reader.is_alive():
                warnings.warn(
                    f"on_line= did not return within {self._stop_timeout} s (stop_timeout) of the "
                    "server's end; expected it to read lines as they come; its thread is left "
                    "behind, and hands it the rest if it ever returns",
                    stacklevel=4,
                )

    def _signal(self, number: int) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, number)

    def _wait(self) -> None:
        """Until it has answered: that it listens means nothing yet."""
        end = time.monotonic() + self._start_timeout
        headers = {} if self._api_key is None else {"authorization": f"Bearer {self._api_key}"}
        body: dict[str, Any] = {
            "input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        }  # fmt: skip
        said = "nothing"
        with httpx.Client(base_url=self.url, headers=headers, trust_env=False) as client:
            for method, path, content in (
                ("GET", "/server_info", None),
                ("POST", "/generate", body),
            ):
                while True:
                    self.check()
                    left = end - time.monotonic()
                    if left <= 0:
                        raise EngineError(
                            f"the server did not answer {path} within {self._start_timeout:.0f} s "
                            f"(it said: {said}); raise start_timeout, or look at the end of "
                            f"{self.log}:\n{self.last_lines()}"
                        )
                    # A server that dies while it computes resets the connection.
                    with contextlib.suppress(httpx.TransportError):
                        answer = client.request(method, path, json=content, timeout=left)
                        if answer.status_code == 200:
                            break
                        self._check_refusal(path, answer)
                        said = f"{answer.status_code} {answer.text[:500]}"
                    time.sleep(POLL_SECONDS)

    def _check_refusal(self, path: str, answer: httpx.Response) -> None:
        """What it refuses now it will refuse for ever."""
        status, text = answer.status_code, answer.text[:500]
        if status in (401, 403):
            got = "no key" if self._api_key is None else "another key"
            raise EngineError(
                f"the server answered {path} with {status}, since it got {got}; expected api_key= "
                f"to be what it was started with: {text} (its log is {self.log})"
            )
        if status == 400 and path == "/generate":
            raise EngineError(
                f"the server refused a request for one token: {text}; look at its flags, and at "
                f"the end of {self.log}:\n{self.last_lines()}"
            )

    def _read(self, process: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> None:
        """Hand on lines until the process is gone and all are read."""
        failed = False

        def hand_on(line: bytes) -> None:
            nonlocal failed
            text = line.decode(errors="replace")
            try:
                on_line(text)
            except Exception as error:  # the user's own; the next lines must still be read
                if not failed:
                    failed = True
                    warnings.warn(
                        f"on_line= raised {type(error).__name__} ({error}) at the line {text!r}; "
                        "expected it to take any; it gets those that follow, and what else it "
                        "raises is not told",
                        stacklevel=2,
                    )

        with self.log.open("rb") as file:
            rest = b""
            while True:
                gone = process.poll() is not None
                rest += file.read()
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    hand_on(line)
                if gone:
                    if rest:
                        hand_on(rest)
                    return
                time.sleep(POLL_SECONDS)


def _bind(host: str, port: int) -> int:
    """Try whether a server can listen there; the port, a free one for 0."""
    with socket.socket() as probe:
        if port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise SettingError(
                f"no server can listen at {host}, port {port or 'any'} ({error}); expected an IPv4 "
                "address or a name of this machine as host=, and a port that nothing else uses; "
                "leave port= out for a free one"
            ) from error
        found: int = probe.getsockname()[1]
        return found
