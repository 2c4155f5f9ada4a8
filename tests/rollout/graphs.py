"""What stands for CUDA graphs on a machine without a GPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miles.rollout import _kv
from miles.rollout.speculative import _draft_steps

__all__ = ["Replays", "pretend_graphs"]


class NothingWaits(TorchDispatchMode):
    """Refuses what a capture would: reading the device, and new tensors of host values."""

    ops = torch.ops.aten
    refused = (ops._local_scalar_dense, ops.nonzero, ops.masked_select, ops.lift_fresh)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.refused, func
        return func(*args, **(kwargs or {}))


class Replays:
    """Stands for CUDA graphs: the same memory comes back every time, with the next results, and
    what another shape had there is gone."""

    watch: Callable[[], AbstractContextManager[Any]] = NothingWaits
    usable = True

    def __init__(self, step: Any) -> None:
        self.step, self.outputs = step, {}

    def __call__(self, *shape: int) -> Any:
        with self.watch():
            new = self.step(*shape)
        for old, value in zip(self.outputs.setdefault(shape, new), new, strict=True):
            if old is not None:
                old.copy_(value)
        for tensor in chain(*(held for key, held in self.outputs.items() if key != shape)):
            if tensor is not None:
                exact = not tensor.is_floating_point()
                tensor.fill_(torch.iinfo(tensor.dtype).min if exact else torch.nan)
        return self.outputs[shape]

    def forget(self) -> None:
        self.outputs = {}


class EngineReplays(Replays):
    """For whole models, whose routing is recorded by numbers that stay on the host."""

    watch = nullcontext


def pretend_graphs(patch: pytest.MonkeyPatch) -> None:
    """Engines and drafts that are made from here on go the way of a GPU."""
    for module, graphs in ((_kv, EngineReplays), (_draft_steps, Replays)):
        patch.setattr(module, "graphs_run_on", lambda device: True)
        patch.setattr(module, "StepGraphs", graphs)
