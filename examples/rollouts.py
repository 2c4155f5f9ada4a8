"""The engine of an example's run, in this process or its own, and the way of the weights to it."""

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
from miles.sync import InProcessSyncer, SharedMemoryReceiver, SharedMemorySyncer

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


class Rollouts:
    """Samples and syncs; when the engine's process dies, starts another and goes on.

    Args:
        model: the trainer's model, whose weights the engine gets.
        model_dir: where the engine finds the architecture, and weights of version 0.
        prepare: changes the engine's model before it is served; to be pickled for a process.
    """

    def __init__(
        self,
        model: Any,
        model_dir: Path,
        log: RunLog,
        *,
        device: str,
        max_batch: int,
        own_process: bool,
        prepare: Prepare | None = None,
    ) -> None:
        self._model, self._log = model, log
        self._folder = tempfile.TemporaryDirectory(prefix="miles-")  # mode 0700
        address = f"{self._folder.name}/weights" if own_process else None
        arguments = (str(model_dir), address, device, max_batch, prepare)
        self._engine: Any
        self._syncer: Any
        if address is not None:
            self._engine = EngineProcess(start_engine, *arguments)
            self._syncer = SharedMemorySyncer(address)
            log.say(f"engine process {self._engine.pid} is up")
        else:
            self._engine = start_engine(*arguments)
            self._syncer = InProcessSyncer(self._engine)

    def sync(self, version: int) -> float:
        """Bring the model's weights to the engine; returns the seconds it took."""
        for attempt in range(3):
            try:
                return self._syncer.push(self._model.state_dict().items(), version=version).seconds
            except SyncError as error:
                if attempt == 2 or not self._engine_died():
                    raise
                self._restart(error)
        raise AssertionError("unreachable")

    def generate(self, requests: list[Request], version: int) -> list[Sample]:
        """All answers, in order; of a dying engine's, those it had finished are kept."""
        samples: list[Sample | None] = [None] * len(requests)

        async def one(index: int) -> None:
            samples[index] = await self._engine.generate(*requests[index])
            self._log.advance()

        async def missing() -> list[BaseException | None]:
            todo = [one(index) for index, sample in enumerate(samples) if sample is None]
            return await asyncio.gather(*todo, return_exceptions=True)

        for attempt in range(3):
            errors = [error for error in asyncio.run(missing()) if error is not None]
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
        self._log.say(f"engine process {self._engine.pid} is up")
