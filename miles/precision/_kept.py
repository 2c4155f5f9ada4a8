"""What is made of a weight once for each version of it, and the search for NaN on the way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from miles.errors import NonFiniteError
from miles.precision.quantize import _check_finite

__all__ = ["Kept", "Look", "count_steps"]

Look = Callable[[Tensor, Tensor], None]
"""Takes the scales of rounded numbers, and the numbers."""


class _Steps:
    """Counts the steps of all optimizers, from the first conversion on."""

    def __init__(self) -> None:
        self.count = 0
        self._counting = False

    def start(self) -> None:
        if not self._counting:
            register_optimizer_step_post_hook(self._step)
            self._counting = True

    def _step(self, *_: Any) -> None:
        self.count += 1


_STEPS = _Steps()
count_steps = _STEPS.start


class _Entry(NamedTuple):
    weights: tuple[weakref.ref[Tensor], ...]
    version: list[tuple[int, ...]]
    made: Any


class Kept:
    """What one module keeps of its weights; only of parameters: a temporary's address comes again.

    A version is told by what PyTorch counts, and, since an optimizer of one's own kernels may not
    count, by the steps of optimizers.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def of(self, name: str, weights: tuple[Tensor, ...]) -> Any:
        """What was made of these weights, if they are of the same version; else None.

        Args:
            name: of the first, in the module.
            weights: parameters; the first and those that its numbers depend on.
        """
        entry = self._entries.get(name)
        if entry is None or entry.version != _version(weights):
            return None
        same = len(entry.weights) == len(weights)
        for ref, weight in zip(entry.weights, weights, strict=False):
            same = same and ref() is weight
        return entry.made if same else None

    def keep(
        self,
        name: str,
        weights: tuple[Tensor, ...],
        full: str,
        root: nn.Module,
        make: Callable[[Look], Any],
    ) -> Any:
        """What `make` makes of weights; NaN raises, on a GPU at the version after the next.

        Args:
            name: as for `of`.
            weights: as for `of`.
            full: name of the first in the root, which no other has.
            root: the model; its weights on a GPU are looked at together, with one wait for all.
            make: calls `Look` for each part.
        """
        version, first = _version(weights), name not in self._entries
        scales = []

        def look(scale: Tensor, of: Tensor) -> None:
            if scale.is_cuda and not first:
                scales.append(scale)
            else:
                _check_finite(scale, of, "weight", full)

        # Also in an evaluation in inference mode, whose tensors could not be trained with.
        with torch.inference_mode(False), torch.no_grad():
            made = make(look)
        if scales:
            _unseen(root).add(full, scales)
        self._entries[name] = _Entry(tuple(map(weakref.ref, weights)), version, made)
        return made

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()


def _version(weights: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return [
        (_STEPS.count if one.requires_grad else 0, one._version, one.data_ptr()) for one in weights
    ]


class _Unseen:
    """Scales that nobody has looked at yet: looking at each makes the host wait for the GPU."""

    def __init__(self) -> None:
        self._scales: dict[str, list[Tensor]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, scales: list[Tensor]) -> None:
        """Remember scales until those of a next version come; then one wait is for all.

        Raises:
            NonFiniteError: NaN or infinity in a version before.
        """
        with self._lock:
            seen = {}
            if name in self._scales:
                seen, self._scales = self._scales, {}
            self._scales[name] = scales
        if not seen:
            return
        # One reduction; names are found when something is wrong.
        first = next(iter(seen.values()))[0]
        every = [
            scale.flatten().float().to(first.device) for found in seen.values() for scale in found
        ]
        if torch.cat(every).isfinite().all():
            return
        bad = [
            other
            for other, found in seen.items()
            if not all(scale.float().isfinite().all() for scale in found)
        ]
        raise NonFiniteError(
            f"{', '.join(bad[:5])} held NaN or infinity in the version before, {len(bad)} of "
            f"{len(seen)} rounded weights; expected finite numbers; a gradient of NaN?"
        )


_UNSEEN: weakref.WeakKeyDictionary[nn.Module, _Unseen] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _unseen(root: nn.Module) -> _Unseen:
    with _LOCK:
        return _UNSEEN.setdefault(root, _Unseen())
