"""Weights for a target in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable

from torch import Tensor

from miles.protocols import SyncReport, WeightTarget
from miles.sync._buckets import whole
from miles.sync._plan import as_version, check_commit, check_version, committing, match

__all__ = ["InProcessSyncer"]


class InProcessSyncer:
    """Hands the trainer's tensors to an engine in the same process.

    Where the engine holds the very same tensors (one model object for both), nothing moves and
    only the version changes; elsewhere they are copied, cast to the engine's dtype. Sharded ones
    (`DTensor`) are gathered before that, all of them: every rank pushes, to an engine of its own.

    Args:
        target: the engine.

    Example:
        >>> from miles.sync import InProcessSyncer
        >>> class Target:
        ...     weight_version = 0
        ...     def __init__(self): self.w = torch.zeros(2)
        ...     def weight_tensors(self): return {"w": self.w}
        ...     def commit_weights(self, tensors, *, version, alias=False):
        ...         self.w.copy_(tensors["w"]); self.weight_version = version
        >>> target = Target()
        >>> report = InProcessSyncer(target).push([("w", torch.ones(2))], version=1)
        >>> target.w.tolist(), report.version, report.num_bytes
        ([1.0, 1.0], 1, 8)
    """

    def __init__(self, target: WeightTarget) -> None:
        self._target = target

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`."""
        start = time.perf_counter()
        version = as_version(version)
        live = self._target.weight_tensors()
        changed = check_version(version, self._target.weight_version)
        matched = match(weights, live) if changed else {}
        for name, tensor in matched.items():
            if not hasattr(live[name], "full_tensor"):
                matched[name] = whole(tensor, live[name].dtype)
        copied = sum(
            t.nbytes
            for name, t in live.items()
            if name in matched and t.data_ptr() != matched[name].data_ptr()
        )
        phases = {}
        if changed:
            gathered = time.perf_counter()
            with committing(self._target):
                check_commit(version, self._target.weight_version)
                self._target.commit_weights(matched, version=version)
            commit = time.perf_counter() - gathered
            phases = {"gather": gathered - start, "commit": commit, "pause": commit}
        return SyncReport(
            version=version,
            num_tensors=len(matched),
            num_bytes=sum(live[name].nbytes for name in matched),
            copied_bytes=copied,
            seconds=time.perf_counter() - start,
            phases=phases,
        )

    def close(self) -> None:
        """Nothing is held."""
