"""Passes of a model as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = [
    "GRAPH_TOKENS", "Outputs", "StepGraphs", "coarse", "each", "graphs_run_on", "power_of_two",
    "round_up",
]  # fmt: skip

Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Shape = tuple[int, int, int]

MAX_GRAPHS = 256
GRAPH_TOKENS = 1024
"""Up to so many, padding included, a pass over prompts is worth a graph."""


class StepGraphs:
    """Runs `step(*shape)`, and from a shape's second time on replays what it launched.

    The step must read and write the same memory every time; `forget` when that has moved. What a
    call returns is overwritten by the next one, whatever its shape: all share a pool of memory.
    """

    def __init__(self, step: Callable[[int, int, int], Outputs]) -> None:
        self._step = step
        self.usable = True
        """Whether a capture has not failed."""
        self.forget()

    def forget(self) -> None:
        """Capture anew: memory that the step uses has moved."""
        self._seen: set[Shape] = set()
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all, since no two run at a time

    def __call__(self, num_rows: int, num_keys: int, width: int) -> Outputs:
        shape = (num_rows, num_keys, width)
        if shape not in self._graphs:
            if not self.usable or shape not in self._seen or len(self._graphs) >= MAX_GRAPHS:
                outputs = self._step(*shape)  # makes what it needs, or fails
                self._seen.add(shape)
                return outputs
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads (a trainer's) may go on with their own CUDA calls meanwhile.
                with (
                    _without_collection(),
                    torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"),
                ):
                    outputs = self._step(*shape)
            except Exception as error:  # whatever a capture forbids; the step shows its own errors
                self.usable = False
                warnings.warn(
                    "a pass of this model cannot be captured as a CUDA graph, so its kernels are "
                    f"launched one by one, which is slower: {error}",
                    stacklevel=2,
                )
                torch.cuda.synchronize()
                return self._step(*shape)
            self._graphs[shape] = graph, each(_lent, outputs)
        graph, outputs = self._graphs[shape]
        graph.replay()
        return outputs


def graphs_run_on(device: torch.device) -> bool:
    """Whether CUDA graphs do."""
    return device.type == "cuda"


def round_up(value: int, tile: int) -> int:
    """The least multiple of `tile` that is no less."""
    return -(-value // tile) * tile


def power_of_two(value: int) -> int:
    """The least one that is no less."""
    return 1 << (value - 1).bit_length()


def coarse(length: int) -> int:
    """One of few lengths that is no less: of multiples of 32, two from a power to the next."""
    return round_up(length, max(32, power_of_two(length) // 4))


def each(do: Callable[[Tensor], Tensor], outputs: Outputs) -> Outputs:
    """`do` to every tensor."""
    first, second, third = outputs
    return do(first), None if second is None else do(second), None if third is None else do(third)


class _Borrowed:
    """Memory as torch takes it, without owning it."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 2,
        }  # fmt: skip


def _lent(tensor: Tensor) -> Tensor:
    """The same place in a graph's pool, which the pool may also use for its other graphs.

    A pool stays as long as one of its graphs, whoever holds its tensors.
    """
    memory = tensor.untyped_storage()
    with torch.cuda.device(tensor.device):
        lent = torch.as_tensor(_Borrowed(memory.data_ptr(), memory.nbytes()), device=tensor.device)
    place = tensor.shape, tensor.stride(), tensor.storage_offset()
    return lent.view(tensor.dtype).as_strided(*place)


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
