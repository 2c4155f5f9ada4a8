"""Something small that serves weights, and a child process that does."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miles.sync import SharedMemoryReceiver


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    """Every kind of tensor that a model may have."""
    return {
        "weight": torch.full((3, 5), value),
        "half": torch.full((7,), value, dtype=torch.bfloat16),
        "scalar": torch.tensor(value),
        "empty": torch.empty(0, 4),
        "count": torch.tensor([int(value)]),
    }


def random_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(t.shape, generator=generator) * 100).to(t.dtype)
        for name, t in tensors().items()
    }


class Target:
    """Serves `tensors(0)` as version 0; `seen` keeps copies of what it served, if it is to note."""

    def __init__(
        self,
        live: dict[str, Tensor] | None = None,
        commit_seconds: float = 0.0,
        *,
        notes: bool = True,
    ) -> None:
        self.live = tensors() if live is None else live
        self.weight_version = 0
        self.commit_seconds, self._notes = commit_seconds, notes
        self.seen: list[dict[str, Tensor]] = []

    def weight_tensors(self) -> Mapping[str, Tensor]:
        return self.live

    def commit_weights(
        self, tensors: Mapping[str, Tensor], *, version: int, alias: bool = False
    ) -> None:
        time.sleep(self.commit_seconds)
        if alias:
            self.live = dict(tensors)
        else:
            for name, tensor in self.live.items():
                tensor.copy_(tensors[name])
        self.weight_version = version
        if self._notes:
            self.seen.append({name: tensor.clone() for name, tensor in self.live.items()})

    def values(self) -> dict[str, list[Any]]:
        return {name: tensor.tolist() for name, tensor in self.live.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def serve(address: str, ready: Any, commit_seconds: float) -> None:
    """The child: commits slowly, until it is killed."""
    SharedMemoryReceiver(Target(commit_seconds=commit_seconds), address)
    ready.set()
    threading.Event().wait()
