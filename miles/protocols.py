"""The small protocols that hold the blocks together.

An engine, a weight carrier or a reward of yours fits wherever ours does if it has these methods;
nothing needs to be subclassed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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

        All or nothing: if it raises, the target serves what it served, under the old version, or
        nothing until a whole commit.
        Carriers report that, and push the version whole again; they do not undo half a commit,
        but never write to memory that such a target may have kept.
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
    num_buckets: int = 0
    """Messages that the bytes were cut into; 0 for carriers that don't cut."""
    phases: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Seconds by phase, on the host, of those the carrier tells apart.

    `gather`: filling buckets, with the gathers of sharded tensors; `send`: waiting for the wire;
    `load`: the slowest receiver's checks; `commit`: the slowest receiver's commit; `pause`: how
    long an engine served nothing.
    """

    def summary(self) -> str:
        """One line of totals and one of phases, for people.

        Example:
            >>> SyncReport(version=3, num_tensors=2, num_bytes=4 << 30, copied_bytes=4 << 30,
            ...            seconds=2.0, phases={"gather": 0.5, "send": 1.5}).summary()
            'version 3: 2 tensors, 4.29 GB in 2.00 s (2.15 GB/s)\\n  gather 0.50 s, send 1.50 s'
        """
        rate = self.num_bytes / max(self.seconds, 1e-9)
        text = (
            f"version {self.version}: {self.num_tensors} tensors, {_readable(self.num_bytes)} in "
            f"{self.seconds:.2f} s ({_readable(rate)}/s)"
        )
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases.items())
        return f"{text}\n  {parts}" if parts else text


def _readable(num_bytes: float) -> str:
    """A size in the largest unit of which it has one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


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
