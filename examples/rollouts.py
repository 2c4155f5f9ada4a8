"""The engine of an example's run, and the way of the weights to it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runlog import RunLog
from transformers import AutoModelForCausalLM

from miles.errors import EngineDiedError, SyncError
from miles.rollout import EngineProcess, HFEngine, Sample, SamplingParams
from miles.sync import InProcessSyncer, SharedMemoryReceiver, SharedMemorySyncer, SyncReport

Request = tuple[list[int], SamplingParams]
Prepare = Callable[[Any], object]


def start_engine(
    model_dir: str, address: str | None, device: str, max_batch: int, prepare: Prepare | None
) -> HFEngine:
    """A bf16 engine; with an address, weights can be pushed to it there."""
    if address is not None:  # a process of our own; one thread leaves the other core to the trainer
        torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device)
    if prepare is not None:
        prepare(model)
    engine = HFEngine(model, max_batch=max_batch)
    if address is not None:
        SharedMemoryReceiver(engine, address)
    return engine


def local_engine(
    config: Any, model_dir: Path, folder: str, *, prepare: Prepare | None = None
) -> tuple[Any, Any]:
    """An engine in this process or its own, and what pushes weights to it.

    Args:
        config: the run's; `engine_process` decides where the engine lives.
        model_dir: where the engine finds the architecture, and weights of version 0.
        folder: a private one, for the way between the processes.
        prepare: changes the engine's model before it is served; to be pickled for a process.
    """
    address = f"{folder}/weights" if config.engine_process else None
    arguments = (str(model_dir), address, config.device, config.max_batch, prepare)
    if address is None:
        engine = start_engine(*arguments)
        return engine, InProcessSyncer(engine)
    return EngineProcess(start_engine, *arguments), SharedMemorySyncer(address)


class Rollouts:
    """Samples and syncs; when the engine's process dies, starts another and goes on.

    Args:
        model: the trainer's model, whose weights the engine gets.
        start: makes the engine and its syncer, as `local_engine` does, from the next two and a
            private folder.
        config: the run's.
        model_dir: where the engine finds the architecture, and weights of version 0.
        log: told of starts and of every answer.
    """

    def __init__(
        self,
        model: Any,
        start: Callable[[Any, Path, str], tuple[Any, Any]],
        config: Any,
        model_dir: Path,
        log: RunLog,
    ) -> None:
        self._model, self._log = model, log
        self._folder = tempfile.TemporaryDirectory(prefix="miles-")  # mode 0700
        self._engine, self._syncer = start(config, model_dir, self._folder.name)
        self._say_that_it_is_up()

    def sync(self, version: int) -> SyncReport:
        """Bring the model's weights to the engine."""
        for attempt in range(3):
            try:
                report: SyncReport = self._syncer.push(
                    self._model.state_dict().items(), version=version
                )
                return report
            except SyncError as error:
                if attempt == 2 or not self._engine_died():
                    raise
                self._restart(error)
        raise AssertionError("unreachable")

    def generate(self, requests: list[Request], version: int) -> list[Sample]:
        """All answers, in order; of a dying engine's, those it had finished are kept."""
        samples: list[Sample | None] = [None] * len(requests)
        # In ours all start together: what runs beside what, so how it rounds, can be repeated.
        ours = isinstance(self._engine, HFEngine | EngineProcess)

        async def one(index: int) -> None:
            samples[index] = await self._engine.generate(*requests[index])
            self._log.advance()

        async def missing() -> list[BaseException]:
            try:
                if ours:
                    await self._engine.pause()
                todo = [one(index) for index, sample in enumerate(samples) if sample is None]
                answers = asyncio.gather(*todo, return_exceptions=True)
                await asyncio.sleep(0)  # each is in the engine's queue
                if ours:
                    await self._engine.resume()
            except EngineDiedError as error:
                return [error]
            return [error for error in await answers if error is not None]

        for attempt in range(3):
            errors = asyncio.run(missing())
            if not errors:
                break
            if attempt == 2 or not isinstance(errors[0], EngineDiedError):
                raise errors[0]
            self._restart(errors[0])
            self.sync(version)
        return [sample for sample in samples if sample is not None]

    def close(self) -> None:
        """End the engine."""
        self._syncer.close()
        self._engine.close()
        self._folder.cleanup()

    def _engine_died(self) -> bool:
        try:
            return self._engine.weight_version < 0
        except EngineDiedError:
            return True

    def _restart(self, error: BaseException) -> None:
        self._log.say(f"{error}\nstarting a new engine; what was finished is kept")
        self._syncer.close()
        self._engine.restart()
        self._say_that_it_is_up()

    def _say_that_it_is_up(self) -> None:
        if (pid := getattr(self._engine, "pid", None)) is not None:  # one in this process has none
            self._log.say(f"engine process {pid} is up")
