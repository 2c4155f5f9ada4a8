"""Weights through a folder: for engines that share a file system with the trainer, or none at all.

A version is a folder of safetensors that appears by a rename, complete and on the disk. With
deltas, a version holds only what changed since the one before, and says which one that was; a full
version comes every so often and whenever the chain is broken.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport
from miles.sync._buckets import gathered, whole
from miles.sync._checksum import checksum
from miles.sync._disk_receiver import DiskReceiver
from miles.sync._plan import as_version, check_filled, check_version, memory_of
from miles.sync._progress import bar
from miles.sync._steps import Manifest, Steps, Writer, is_disk_full
from miles.sync._trainers import Trainers
from miles.sync.delta import DeltaReport, encode_delta

__all__ = ["DiskReceiver", "DiskSyncer"]

_EXPECTED = "an integer of 1 or more, since engines start at 0 and folders are named after it"


class DiskSyncer:
    """The trainer's side: `push` returns when the version is on the disk; engines load it later.

    Args:
        folder: where versions go; made if it isn't there. One trainer writes to it.
        delta: write only what changed since the last version, with the last version held in host
            memory. After a failed push and after a restart a full version comes first.
        full_every: with `delta`, so many versions apart full ones are written: a restarted engine
            reads at most so many folders.
        keep: newest versions to keep; those that they are deltas of stay too.
        shard_bytes: a file is written when this much has come together; a larger tensor makes a
            larger file.
        level: of zstd, for deltas.
        trainers: the ranks that hold the weights, if there are several; rank 0 of it writes.
        progress: a bar (of tqdm) when a push takes longer than a second.

    Raises:
        SettingError: numbers out of range.
        SyncError: another trainer writes to this folder, or someone else's `step_*` lie in it.

    Example:
        >>> import tempfile
        >>> from miles.sync import DiskReceiver, DiskSyncer
        >>> class Target:
        ...     weight_version = 0
        ...     def __init__(self): self.w = torch.zeros(1000)
        ...     def weight_tensors(self): return {"w": self.w}
        ...     def commit_weights(self, tensors, *, version, alias=False):
        ...         self.w.copy_(tensors["w"]); self.weight_version = version
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target, w = Target(), torch.randn(1000)
        ...     syncer, receiver = DiskSyncer(folder, delta=True), DiskReceiver(target, folder)
        ...     full = syncer.push([("w", w)], version=1)
        ...     w[7] += 1
        ...     small = syncer.push([("w", w)], version=2)
        ...     receiver.receive_once(), torch.equal(target.w, w), full.copied_bytes >= 4000
        (2, True, True)
        >>> syncer.delta_report.num_changed, syncer.delta_report.delta_bytes < 50
        (1, True)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        delta: bool = False,
        full_every: int = 16,
        keep: int = 2,
        shard_bytes: int = 4 << 30,
        level: int = 3,
        trainers: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> None:
        numbers = {"full_every": full_every, "keep": keep, "shard_bytes": shard_bytes}
        for name, number in numbers.items():
            if number < 1:
                raise SettingError(f"{name} is {number}; expected 1 or more")
        self._steps = Steps(Path(folder))
        self._delta, self._full_every, self._keep = delta, full_every, keep
        self._shard_bytes, self._level, self._progress = shard_bytes, level, progress
        self._trainers = Trainers(trainers)
        self._specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._maybe_tied: dict[str, str] = {}
        self._last: dict[str, Tensor] = {}
        self._published: Manifest | None = None
        self._deltas_since_full = 0
        self.delta_report: DeltaReport | None = None
        """Of the last push, if it was a delta."""
        self._lock: IO[str] | None = None
        self._locked_by = os.getpid()
        self._trainers.agree(self._open)

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`; every rank of the trainer calls it with the same names.

        Raises:
            SettingError: `version` is not an integer of 1 or more.
            SyncError: the disk is full, cannot be written to, or holds a newer version; a tensor
                is missing, unknown or misshapen. What was written of the version is removed.
        """
        start = time.perf_counter()
        version = as_version(version, _EXPECTED)
        with self._trainers.in_step():
            outcome = self._push(weights, version)
        return SyncReport(version=version, seconds=time.perf_counter() - start, **outcome)

    def _push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        """The fields of a report."""
        changed = self._trainers.agree(lambda: self._is_new(version))
        outcome: dict[str, Any] = {"num_tensors": 0, "num_bytes": 0, "copied_bytes": 0}
        if changed:
            tensors = self._expected(weights)

            def write() -> dict[str, Any] | None:
                try:
                    if self._trainers.rank == 0:
                        return self._write(tensors, version)
                finally:  # the gathers of the other ranks need this one, whatever happened
                    for _ in () if self._trainers.alone else tensors:
                        pass
                return None

            outcome = self._trainers.agree(write)
        return outcome

    def close(self) -> None:
        """Let another trainer write to the folder; versions stay."""
        self._last = {}
        if self._lock is not None:
            if self._locked_by == os.getpid():  # a forked child has the file too, and this method
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        if self._trainers.rank != 0:
            return
        self._steps.folder.mkdir(parents=True, exist_ok=True)
        lock = (self._steps.folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends
        except OSError as error:
            lock.close()
            raise SyncError(
                f"another trainer writes to {self._steps.folder} ({error}); expected one; end it, "
                "or take another folder"
            ) from error
        try:
            self._steps.clean()
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    def _is_new(self, version: int) -> bool:
        if self._trainers.rank != 0:
            return False  # rank 0 decides
        if self._lock is None:
            raise SyncError("this syncer is closed; make a new one")
        if version < 1:
            raise SettingError(f"version is {version}; expected {_EXPECTED}")
        versions = self._steps.versions()
        return check_version(version, versions[-1]) if versions else True

    def _expected(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the first push, whole; each push notes which names may be tied."""
        seen: dict[Any, str] = {}
        self._maybe_tied = {}

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                first = seen.setdefault((memory_of(tensor), tuple(tensor.shape)), name)
                if first != name:  # tied, or memory that the trainer writes to again
                    self._maybe_tied[name] = first
                yield name, tensor

        if self._specs:
            yield from gathered(noted(), self._specs)
            return
        specs = {}
        for name, tensor in noted():
            check_filled(name, tensor)
            specs[name] = (tuple(tensor.shape), tensor.dtype)
            yield name, whole(tensor.detach())
        self._specs = specs

    def _write(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        base = self._published if self._last else None
        if self._deltas_since_full >= self._full_every - 1:
            base = None
        if base and base.version not in self._steps.versions()[-1:]:
            base = None  # someone removed it, or wrote another
        start = time.perf_counter()
        writer: Writer | None = None
        kept, self._last = self._last, {}  # stays empty if this fails: a full version comes next
        try:
            writer = Writer(self._steps, version, self._shard_bytes)
            size = sum(torch.Size(s).numel() * d.itemsize for s, d in self._specs.values())
            with bar(self._progress, size or None, version) as moved:
                kept = kept if base else {}
                num_bytes, report = self._add_all(writer, tensors, base, kept, moved)
            written = time.perf_counter()
            manifest = Manifest(
                version=version,
                base=base.version if base else None,
                base_digest=base.digest if base else "",
                files=writer.files,
                tensors=writer.tensors,
                aliases=writer.aliases,
            )
            copied = writer.publish(manifest)
        except BaseException as error:
            if writer is not None:
                writer.discard()
            if is_disk_full(error):
                raise SyncError(
                    f"the disk of {self._steps.folder} is full, so version {version} was not "
                    "written and what there was of it is removed; make room and push again"
                ) from error
            if isinstance(error, OSError):
                raise SyncError(f"version {version} was not written: {error}") from error
            raise
        self._last, self._published, self.delta_report = kept, manifest, report
        self._deltas_since_full = self._deltas_since_full + 1 if base else 0
        self._steps.prune(self._keep)
        phases = {"gather": written - start, "commit": time.perf_counter() - written}
        return {
            "num_tensors": len(writer.tensors),
            "num_bytes": num_bytes,
            "copied_bytes": copied,
            "num_buckets": len(writer.files),
            "phases": phases,
        }

    def _add_all(
        self,
        writer: Writer,
        tensors: Iterator[tuple[str, Tensor]],
        base: Manifest | None,
        kept: dict[str, Tensor],
        moved: Any,
    ) -> tuple[int, DeltaReport | None]:
        """Every tensor, whole or as what changed in it; `kept` becomes the new version."""
        num_bytes, deltas = 0, []
        for name, tensor in tensors:
            dtype = self._specs[name][1] if self._specs else tensor.dtype
            new = tensor.detach().to("cpu", dtype).contiguous()
            entry: dict[str, Any] = {"shape": list(new.shape), "dtype": str(new.dtype)}
            if base is None or name not in kept:
                entry["checksum"] = checksum(new)
                first = self._maybe_tied.get(name, "")
                owner = writer.tensors.get(first, {})
                if all(owner.get(key) == value for key, value in entry.items()):
                    writer.aliases[name] = first  # of this version; the next one looks again
                    continue
                new = new.clone() if new.data_ptr() == tensor.data_ptr() else new
                writer.add(name, new, entry)
                if self._delta:
                    kept[name] = new
            else:
                delta = encode_delta(kept[name], new, level=self._level)
                deltas.append(delta)
                entry |= {"checksum": delta.result, "delta": delta.header()}
                data = bytearray(delta.payload)
                packed = torch.frombuffer(data, dtype=torch.uint8) if data else None
                writer.add(name, packed, entry)
                if delta.num_changed:
                    kept[name].copy_(new)
            num_bytes += new.nbytes
            moved(new.nbytes)
        return num_bytes, DeltaReport.of(deltas) if base else None
