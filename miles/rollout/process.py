"""An engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from typing import Any

from miles.errors import EngineDiedError, EngineError
from miles.rollout import _wire
from miles.rollout._requests import check_ids, new_sample
from miles.rollout._wire import Message
from miles.rollout.hf import HFEngine
from miles.rollout.sample import Sample, SamplingParams

__all__ = ["EngineProcess"]

CLOSE_SECONDS = 5.0
_REAPING = threading.Lock()
"""Of two threads that ask at the same moment how a child ended, one would be told that it runs."""


class EngineProcess:
    """A `RolloutEngine` whose model lives in a child process.

    Args:
        factory: called in the child; returns the `HFEngine`. It must be importable there (a
            function of a module, not a lambda), as `multiprocessing` demands. Start a weight
            receiver in it, if weights are to be synced.
        args: for the factory.
        start_timeout: seconds that the factory may take.

    Raises:
        EngineError: the factory failed; the text carries its traceback.

    When the child dies, every call that waits for it raises `EngineDiedError`, and `restart`
    starts a new one.
    """

    def __init__(
        self, factory: Callable[..., HFEngine], *args: Any, start_timeout: float = 300.0
    ) -> None:
        self._factory, self._args, self._start_timeout = factory, args, start_timeout
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Message]] = {}
        self._process: Any = None
        self._reader: threading.Thread | None = None
        self.restart()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        pid = self._process.pid
        assert isinstance(pid, int)
        return pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        with _REAPING:
            return bool(self._process.is_alive())

    @property
    def weight_version(self) -> int:
        """The version of the weights that the next token will be sampled with."""
        return self._call(Message(next(self._ids), "version")).result().weight_version

    def restart(self) -> None:
        """Start a fresh child, with the weights that the factory gives it."""
        if self._process is not None:
            self.close()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._factory, self._args),
            name="miles-engine",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._pipe: Connection = ours
        ready = Message(-1, "no answer")
        try:
            if ours.poll(self._start_timeout):
                ready = _wire.decode(ours.recv_bytes())
        except (EOFError, OSError):
            ready = Message(-1, "the process ended")
        if ready.op != "ready":
            self._process.kill()
            _join(self._process)
            ours.close()
            detail = ready.error[1] if ready.error else f"{ready.op} within {self._start_timeout} s"
            raise EngineError(f"the engine did not start: {detail}")
        reader = threading.Thread(target=self._read, args=(ours, self._process), daemon=True)
        self._reader = reader
        reader.start()

    async def generate(
        self,
        prompt: Sequence[int] | Sample,
        params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> Sample:
        """As `HFEngine.generate`.

        Raises:
            EngineDiedError: the child ended before the answer was complete.
        """
        sample = prompt if isinstance(prompt, Sample) else new_sample(prompt)
        number = next(self._ids)
        name = f"request-{number}" if request_id is None else request_id
        # Metadata stays here, whatever it holds; the engine needs these to go on with.
        needed = {k: v for k, v in sample.metadata.items() if k in ("seed", "speculative")}
        request = Message(
            number,
            "generate",
            sample=_wire.sample_to_wire(sample) | {"metadata": needed},
            params=_wire.params_to_wire(params),
            request_id=name,
        )
        try:
            answer = await asyncio.wrap_future(self._call(request))
        except asyncio.CancelledError:
            self._call(Message(next(self._ids), "abort", request_ids=[name]))
            raise
        assert answer.sample is not None
        finished = _wire.sample_from_wire(answer.sample)
        finished.metadata = sample.metadata | finished.metadata
        return finished

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """As `HFEngine.abort`."""
        check_ids(request_ids)
        ids = None if request_ids is None else list(request_ids)
        await asyncio.wrap_future(self._call(Message(next(self._ids), "abort", request_ids=ids)))

    async def pause(self) -> None:
        """As `HFEngine.pause`."""
        await asyncio.wrap_future(self._call(Message(next(self._ids), "pause")))

    async def resume(self) -> None:
        """As `HFEngine.resume`."""
        await asyncio.wrap_future(self._call(Message(next(self._ids), "resume")))

    def close(self) -> None:
        """Abort everything and end the child; one that does not react is killed."""
        if self.alive:
            # In a thread: a child that no longer reads lets the pipe fill up, and sending wait.
            message = Message(next(self._ids), "close")
            asking = threading.Thread(target=self._call, args=(message,), daemon=True)
            asking.start()
            _join(self._process, CLOSE_SECONDS)
            self._process.kill()
            asking.join()
        _join(self._process)
        if self._reader not in (None, threading.current_thread()):
            self._reader.join(CLOSE_SECONDS)  # it hands over what the child has sent
        self._pipe.close()

    def _call(self, message: Message) -> Future[Message]:
        future: Future[Message] = Future()
        data = _wire.encode(message)
        try:
            with self._lock:
                if not self.alive:
                    raise BrokenPipeError
                self._waiting[message.id] = future
                self._pipe.send_bytes(data)
        except OSError:
            self._waiting.pop(message.id, None)
            future.set_exception(self._death(self._process, 1))
        return future

    def _read(self, pipe: Connection, process: Any) -> None:
        while True:
            try:
                answer = _wire.decode(pipe.recv_bytes())
                future = self._waiting.pop(answer.id)
            except (EOFError, OSError):
                break
            except Exception:  # not our protocol: the child cannot be trusted any more
                process.kill()
                break
            if not future.set_running_or_notify_cancel():
                continue
            if answer.error is not None:
                future.set_exception(_wire.error_from_wire(answer.error))
            else:
                future.set_result(answer)
        _join(process)
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for future in lost:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._death(process, len(lost)))

    @staticmethod
    def _death(process: Any, lost: int) -> EngineDiedError:
        return EngineDiedError(
            f"the engine process {process.pid} ended with exit code {process.exitcode}; {lost} "
            "calls were in flight and got no answer. restart() starts a new one; push the weights "
            "and sample those requests again"
        )


def _join(process: Any, timeout: float | None = None) -> None:
    """Wait for a child's end, in any number of threads."""
    if wait([process.sentinel], timeout):
        with _REAPING:
            process.join()


def _serve(pipe: Connection, factory: Callable[..., HFEngine], args: tuple[Any, ...]) -> None:
    """The child: read requests, answer each when it is done, end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        engine = factory(*args)
    except BaseException:
        failed = Message(-1, "failed", error=("EngineError", traceback.format_exc()))
        pipe.send_bytes(_wire.encode(failed))
        return
    lock = threading.Lock()

    def answer(message: Message) -> None:
        with lock, contextlib.suppress(BrokenPipeError):  # then nobody waits for it
            pipe.send_bytes(_wire.encode(message))

    answer(Message(-1, "ready"))
    while True:
        try:
            request = _wire.decode(pipe.recv_bytes())
        except EOFError:
            return
        if request.op == "close":
            return  # and the engine is closed as Python ends
        try:
            _handle(engine, request, answer)
        except Exception as error:
            answer(Message(request.id, request.op, error=_wire.error_to_wire(error)))


def _handle(engine: HFEngine, request: Message, answer: Callable[[Message], None]) -> None:
    if request.op == "generate":
        assert request.sample is not None and request.params is not None
        future = engine.submit(
            _wire.sample_from_wire(request.sample),
            _wire.params_from_wire(request.params),
            request_id=request.request_id,
        )

        def done(finished: Future[Sample]) -> None:
            error = finished.exception()
            if error is None:
                wire = _wire.sample_to_wire(finished.result())
                answer(Message(request.id, request.op, sample=wire))
            else:
                answer(Message(request.id, request.op, error=_wire.error_to_wire(error)))

        future.add_done_callback(done)
        return
    if request.op == "abort":
        engine.abort_now(request.request_ids)
    elif request.op in ("pause", "resume"):
        asyncio.run(getattr(engine, request.op)())
    answer(Message(request.id, request.op, weight_version=engine.weight_version))
