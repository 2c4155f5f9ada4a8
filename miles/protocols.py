"""The small protocols that hold the blocks together.

An engine, a weight carrier or a reward of yours fits wherever ours does if it has these methods;
nothing needs to be subclassed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["RolloutEngine", "SyncReport", "WeightSyncer", "WeightTarget"]


@runtime_checkable
class RolloutEngine(Protocol):
    """What produces samples. All methods may be called from any asyncio event loop."""

    @property
    def weight_version(self) -> int:
        """The version of the weights that the next token will be sampled with."""
        ...

    async def generate(self, prompt: Any, params: Any, *, request_id: str | None = None) -> Any:
        """Continue `prompt` (token ids, or a `Sample` to resume) and return a new `Sample`."""
        ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all); their `generate` returns what there is so far."""
        ...

    async def pause(self) -> None:
        """Sample no further token until `resume`; requests and their caches stay."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...


@runtime_checkable
class WeightTarget(Protocol):
    """What receives weights: an engine, or anything else that serves a model."""

    @property
    def weight_version(self) -> int:
        """The version that is being served."""
        ...

    def weight_tensors(self) -> Mapping[str, Tensor]:
        """The live tensors by name, each storage once (of tied tensors, the first name)."""
        ...

    def commit_weights(
        self, tensors: Mapping[str, Tensor], *, version: int, alias: bool = False
    ) -> None:
        """Serve `tensors` as `version`, between two steps and all at once.

        Called with exactly the names, shapes and dtypes of `weight_tensors()`. With `alias` the
        target keeps the tensors themselves; without, it copies.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one push moved."""

    version: int
    """The version that the target serves now."""
    num_tensors: int
    """Tensors pushed."""
    num_bytes: int
    """Their size in bytes, in the target's dtypes."""
    copied_bytes: int
    """Bytes that were written anywhere on the way; 0 when trainer and engine share storage."""
    seconds: float
    """Wall time from the call to the commit."""


@runtime_checkable
class WeightSyncer(Protocol):
    """A carrier: brings weights to a `WeightTarget`, all of them or none."""

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """Make the target serve `weights` as `version`.

        Versions only grow; pushing the one that is served already does nothing. After an error the
        target serves what it served before.
        """
        ...

    def close(self) -> None:
        """Release buffers and connections."""
        ...
