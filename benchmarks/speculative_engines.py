"""The engines of `speculative.py` in this process, and what chooses their draft tokens."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miles.rollout import HFEngine, Sample, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from speculative_rl import answers_to  # examples are no package

ROW_TILE = 16
"""Numbers of rows that an engine has a shape of a step for are multiples of it."""

Asked = tuple[list[int], SamplingParams]
Ask = Callable[[Sequence[Asked]], list[Sample]]
"""Prompts, each with how to sample, to the answers."""


class InTurn:
    """A stand-in for a controller that takes every number of draft tokens in turn."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers, self.max_steps = itertools.cycle(numbers), max(numbers)

    def choose(self, batch: int, remaining: Sequence[int] | None = None) -> int:
        return next(self._numbers)

    def observe(self, stats: Any) -> None:
        pass


class WarmedUp:
    """A controller after every number has been taken in turn, of which it learns nothing."""

    def __init__(self, controller: Any, numbers: Sequence[int]) -> None:
        self.max_steps, self._controller = max(numbers), controller
        self.current: Any = InTurn(numbers)

    def choose(self, batch: int, remaining: Sequence[int] | None = None) -> int:
        return int(self.current.choose(batch, remaining))

    def observe(self, stats: Any) -> None:
        self.current.observe(stats)

    def begin(self) -> None:
        """The controller's turn."""
        self.current = self._controller


@contextlib.contextmanager
def engines(
    model: Any,
    options: Mapping[str, Mapping[str, Any]],
    *,
    batch: int,
    warm: Callable[[HFEngine, int], None],
) -> Iterator[dict[str, Ask]]:
    """An engine for each variant, with room for `batch` requests; others wait in it.

    Those that a `WarmedUp` chooses for have it begin after `warm`.
    """
    made = [HFEngine(model, max_batch=batch, **more) for more in options.values()]
    pairs = zip(options, made, strict=True)
    asks = {name: partial(answers_together, engine) for name, engine in pairs}
    try:
        for index in range(len(made)):  # no name here holds an engine
            warm(made[index], batch)
        for more in options.values():
            if isinstance(controller := more.get("controller"), WarmedUp):
                controller.begin()
        yield asks
    finally:
        while made:
            made.pop().close()
        asks.clear()  # who was given it would hold the engines until those of the next batch
        release()


def meet_shapes(
    prompts: Iterator[list[int]], params: SamplingParams, engine: HFEngine, batch: int
) -> None:
    """Twice those of passes over 1, 2, 4, ... prompts and of steps of every number of rows, since
    the second time they become graphs."""
    few = [2**n for n in range(min(batch, ROW_TILE).bit_length()) if 2**n <= batch]
    tiles = [min(batch, rows) for rows in range(ROW_TILE, batch + ROW_TILE, ROW_TILE)]
    for rows in (*few, *few, *tiles):
        answers_to(engine, list(itertools.islice(prompts, rows)), params, range(rows))


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answers_together(engine: HFEngine, asked: Sequence[Asked]) -> list[Sample]:
    """Of requests that are all there before the first step: the engine has room, or a queue."""
    asyncio.run(engine.pause())
    try:
        futures = [engine.submit(prompt, params) for prompt, params in asked]
    finally:
        asyncio.run(engine.resume())
    return [future.result() for future in futures]


def answers(engine: Any, at_once: int, asked: Sequence[Asked]) -> list[Sample]:
    """Of an engine that never has more than `at_once` requests to answer."""
    room, futures = threading.Semaphore(at_once), []
    for prompt, params in asked:
        room.acquire()
        futures.append(engine.submit(prompt, params))
        futures[-1].add_done_callback(lambda _: room.release())
    return [future.result() for future in futures]
