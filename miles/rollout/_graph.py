"""Decoding steps as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["DecodeGraphs", "Outputs"]

Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Shape = tuple[int, int, int]

MAX_GRAPHS = 256


class DecodeGraphs:
    """Runs `step(*shape)`, and from a shape's second time on replays what it launched.

    The step must read and write the same memory every time; `forget` when that has moved. What a
    replay returns is overwritten by the next one.
    """

    def __init__(self, step: Callable[[int, int, int], Outputs]) -> None:
        self._step = step
        self._usable = True
        self.forget()

    def forget(self) -> None:
        """Capture anew: memory that the step uses has moved."""
        self._seen: set[Shape] = set()
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all, since no two run at a time

    def __call__(self, num_rows: int, num_keys: int, width: int) -> Outputs:
        shape = (num_rows, num_keys, width)
        if shape not in self._graphs:
            if not self._usable or shape not in self._seen or len(self._graphs) >= MAX_GRAPHS:
                self._seen.add(shape)
                return self._step(*shape)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads (a trainer's) may go on with their own CUDA calls meanwhile.
                with (
                    _without_collection(),
                    torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"),
                ):
                    outputs = self._step(*shape)
            except Exception as error:  # whatever a capture forbids; the step shows its own errors
                self._usable = False
                warnings.warn(
                    "this model's decoding step cannot be captured as a CUDA graph, so every step "
                    f"launches its kernels one by one, which is slower: {error}",
                    stacklevel=2,
                )
                torch.cuda.synchronize()
                return self._step(*shape)
            self._graphs[shape] = graph, outputs
        graph, outputs = self._graphs[shape]
        graph.replay()
        return outputs


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """A graph of an engine that is gone, collected during a capture, would spoil the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
