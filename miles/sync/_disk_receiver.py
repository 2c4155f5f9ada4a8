"""The engine's side of `miles.sync.disk`."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from miles.errors import SyncError
from miles.protocols import WeightTarget
from miles.sync._checksum import checksum
from miles.sync._plan import check_version, committing, match
from miles.sync._steps import Manifest, Steps, UnreadableError
from miles.sync.delta import Delta, apply_delta

__all__ = ["DiskReceiver"]


class DiskReceiver:
    """An engine's side: loads the newest version of a folder, when told or by looking for it.

    Call `receive_once()` when there is something new, `start()` for a thread that looks, or
    `serve()` to spend this one on it. Nothing is committed before every file and tensor has been
    read and its checksum found right.

    Args:
        target: the engine.
        folder: what a `DiskSyncer` writes to.
        poll_seconds: pause between looks.
    """

    def __init__(
        self, target: WeightTarget, folder: str | Path, *, poll_seconds: float = 1.0
    ) -> None:
        self._target, self._steps = target, Steps(Path(folder))
        self._poll_seconds = poll_seconds
        self._loaded: Manifest | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.error: Exception | None = None
        """Why `serve()` did not load what it last tried to; None when it did."""

    def start(self) -> None:
        """`serve()` in a thread."""
        self._thread = threading.Thread(target=self.serve, name="weight-receiver", daemon=True)
        self._thread.start()

    def serve(self) -> None:
        """Look until `close()`.

        A damaged version is warned of once, and left out. After any other failure, of the file
        system or of the engine, the same version is tried again, after pauses that grow to a
        minute.
        """
        damaged, pause = -1, self._poll_seconds
        while not self._closed.is_set():
            newest = -1
            try:
                newest = max(self._steps.versions(), default=-1)
                if newest not in (-1, damaged):
                    self._receive(newest)
                    self.error = None
                pause = self._poll_seconds
            except Exception as error:  # there is nobody above to see it
                if isinstance(error, SyncError) and not isinstance(error, UnreadableError):
                    damaged, pause = newest, self._poll_seconds
                else:
                    pause = max(self._poll_seconds, min(2 * pause, 60.0))
                if str(error) != str(self.error):
                    warnings.warn(str(error), stacklevel=1)
                self.error = error
            self._closed.wait(pause)

    def close(self) -> None:
        """Look no more; what was committed stays."""
        self._closed.set()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def receive_once(self) -> int:
        """Load the newest version, if it is not served already; the version served then.

        Raises:
            SyncError: names the file or tensor that is damaged or doesn't fit; the target serves
                what it served.
        """
        versions = self._steps.versions()
        return self._receive(versions[-1]) if versions else self._target.weight_version

    def _receive(self, version: int) -> int:
        with self._lock:  # of the thread and of `receive_once`
            return self._load(version)

    def _load(self, version: int) -> int:
        served = self._target.weight_version
        try:
            if not check_version(version, served):
                return served
            manifest = self._steps.manifest(version)
            live = self._target.weight_tensors()
            tensors = self._tensors(manifest, live)
            known = {n: first for n, first in manifest.aliases.items() if first in tensors}
            aliases = {name: tensors[first] for name, first in known.items()}
            wanted = match((tensors | aliases).items(), live)
            wanted = {name: wanted[name].to(tensor.dtype) for name, tensor in live.items()}
            with committing(self._target):
                now = self._target.weight_version
                if now != served:
                    raise SyncError(
                        f"the engine went to version {now} meanwhile; expected one trainer"
                    )
                self._target.commit_weights(wanted, version=version)
        except SyncError as error:
            kind = UnreadableError if isinstance(error, UnreadableError) else SyncError
            raise kind(
                f"version {version} was not taken, {self._target.weight_version} is still served: "
                f"{error}"
            ) from error
        self._loaded = manifest
        return version

    def _tensors(self, manifest: Manifest, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a version, checked. What is served is the base if it can be, else the disk's."""
        chain = [manifest]
        while (base := chain[-1].base) is not None:
            if self._serves(base, chain[-1].base_digest):
                with contextlib.suppress(SyncError):  # someone else wrote to the engine
                    return self._apply(chain, dict(live))
            earlier = self._steps.manifest(base)
            if earlier.digest != chain[-1].base_digest:
                raise SyncError(
                    f"version {chain[-1].version} is a delta of another version {base} than the one"
                    " that is there; push a full one"
                )
            chain.append(earlier)
        return self._apply(chain, {})

    def _serves(self, version: int, digest: str) -> bool:
        loaded = self._loaded
        return (
            loaded is not None
            and loaded.version == version == self._target.weight_version
            and loaded.digest == digest
        )

    def _apply(self, chain: list[Manifest], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for manifest in reversed(chain):
            tensors = self._step(manifest, tensors)
        return tensors

    def _step(self, manifest: Manifest, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one version, from those of its base (none for a full one)."""
        found: dict[str, Tensor] = {}
        files = dict.fromkeys(entry["file"] for entry in manifest.tensors.values())
        for file in files:
            data = self._steps.read(manifest, file) if file else {}
            names = [name for name, entry in manifest.tensors.items() if entry["file"] == file]
            for name in names:
                where = f"{name} of version {manifest.version} ({file or 'unchanged'})"
                entry = manifest.tensors[name]
                try:
                    if "delta" not in entry:  # of a full version, or tied until this one
                        found[name] = _checked(data[name], entry)
                    else:
                        payload = data[name].numpy().tobytes() if file else b""
                        delta = Delta.read(entry["delta"], payload)
                        found[name] = apply_delta(base[name].cpu(), delta)
                except KeyError as error:
                    raise SyncError(f"{where} is missing") from error
                except SyncError as error:
                    raise SyncError(f"{where}: {error}") from error
        return {name: found[name] for name in manifest.tensors}


def _checked(tensor: Tensor, entry: dict[str, Any]) -> Tensor:
    got = [list(tensor.shape), str(tensor.dtype)]
    if got != [entry["shape"], entry["dtype"]]:
        raise SyncError(f"it is {got}; the manifest says {entry['shape']} {entry['dtype']}")
    if checksum(tensor) != entry["checksum"]:
        raise SyncError("another checksum than the manifest's")
    return tensor
