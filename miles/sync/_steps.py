"""The folders that the disk carrier writes: one for each version, complete or not there.

step_12.partial/    being written
step_12/            complete: renamed when everything is on the disk
    model-00001.safetensors ...          tensors (of a delta: its compressed bytes, as uint8)
    model.safetensors.index.json         of a full version, for whoever else reads checkpoints
    manifest.json                        written last
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError

__all__ = ["Manifest", "Steps", "Writer"]

_NAME = re.compile(r"step_(\d+)")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a version holds."""

    version: int
    base: int | None
    """The version that this one is a delta of; None for a full one."""
    base_digest: str
    """That version's digest."""
    files: dict[str, int]
    """Sizes."""
    tensors: dict[str, dict[str, Any]]
    """By name: shape, dtype, checksum, file; of a delta, its header too."""
    aliases: dict[str, str]
    """Further names of tied tensors."""

    @property
    def digest(self) -> str:
        """SHA-256 of names, shapes, dtypes and checksums."""
        rows = [[n, t["shape"], t["dtype"], t["checksum"]] for n, t in self.tensors.items()]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


class Steps:
    """A folder of versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def versions(self) -> list[int]:
        """Complete ones, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(m[1]) for name in names if (m := _NAME.fullmatch(name)))

    def path(self, version: int) -> Path:
        """Where a version is, or would be."""
        return self.folder / f"step_{version}"

    def manifest(self, version: int) -> Manifest:
        """Of a complete version.

        Raises:
            SyncError: it is not there, or damaged.
        """
        path = self.path(version) / "manifest.json"
        try:
            read = json.loads(path.read_bytes())
            if read.pop("format") != _FORMAT or read["version"] != version:
                raise ValueError(f"version {read['version']}, format other than {_FORMAT}, or both")
            manifest = Manifest(**read)
            if not all(isinstance(read[key], dict) for key in ("files", "tensors", "aliases")):
                raise ValueError("files, tensors and aliases are not all objects")
            for tensor in manifest.tensors.values():
                tensor["shape"], tensor["dtype"], tensor["checksum"], tensor["file"]
        except FileNotFoundError as error:
            raise SyncError(f"version {version} is not in {self.folder}: no {path.name}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SyncError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return manifest

    def read(self, manifest: Manifest, file: str) -> dict[str, Tensor]:
        """The tensors of one file, checked for size.

        Raises:
            SyncError: it is missing, truncated or no safetensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(manifest.version) / file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SyncError(f"cannot read {path}: {error}") from error
        if len(data) != manifest.files.get(file):
            raise SyncError(
                f"{path} has {len(data)} bytes; the manifest says {manifest.files.get(file)}"
            )
        try:
            return load(data)
        except (SafetensorError, KeyError, ValueError) as error:
            raise SyncError(f"{path} is damaged: {error}") from error

    def clean(self) -> None:
        """Remove what a killed writer left."""
        for path in [*self.folder.glob("step_*.partial"), *self.folder.glob("step_*.deleted")]:
            shutil.rmtree(path, ignore_errors=True)

    def prune(self, keep: int) -> None:
        """Remove all but the newest versions and those they are deltas of."""
        versions = self.versions()
        needed: set[int] = set()
        for version in versions[-keep:]:
            base: int | None = version
            while base is not None and base not in needed and self.path(base).is_dir():
                needed.add(base)
                try:
                    base = self.manifest(base).base
                except SyncError:  # of a damaged one nothing is known; readers will say so
                    base = None
        for version in set(versions) - needed:
            gone = self.path(version).with_suffix(".deleted")  # never half of it under its name
            try:
                self.path(version).rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                warnings.warn(f"an old version stays on the disk: {error}", stacklevel=1)


class Writer:
    """Writes one version; nothing of it is visible before `publish`.

    Args:
        steps: where to.
        version: what.
        shard_bytes: a file is written when this much has come together.
    """

    def __init__(self, steps: Steps, version: int, shard_bytes: int) -> None:
        self._steps, self._version, self._shard_bytes = steps, version, shard_bytes
        self._path = steps.path(version).with_suffix(".partial")
        self._held: dict[str, Tensor] = {}
        self.files: dict[str, int] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)

    def add(self, name: str, data: Tensor | None, entry: Mapping[str, Any]) -> None:
        """A tensor, or nothing if the base has it; memory is held until the file is written."""
        if data is None:
            self.tensors[name] = {**entry, "file": None}
            return
        self.tensors[name] = {**entry, "file": f"model-{len(self.files) + 1:05d}.safetensors"}
        self._held[name] = data
        if sum(tensor.nbytes for tensor in self._held.values()) >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the file that is being collected."""
        if self._held:
            file = f"model-{len(self.files) + 1:05d}.safetensors"
            write_tensors(self._path / file, self._held)
            self.files[file] = (self._path / file).stat().st_size
            self._held = {}

    def publish(self, manifest: Manifest) -> int:
        """Make the version visible, for good; its size in bytes."""
        self.flush()
        if manifest.base is None:
            shapes = [(t["shape"], getattr(torch, t["dtype"][6:])) for t in self.tensors.values()]
            size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
            index = {
                "metadata": {"total_size": size},
                "weight_map": {name: t["file"] for name, t in self.tensors.items()},
            }
            write_json(self._path / "model.safetensors.index.json", index)
        write_json(self._path / "manifest.json", {"format": _FORMAT, **vars(manifest)})
        sync_folder(self._path)
        self._path.rename(self._steps.path(self._version))
        sync_folder(self._steps.folder)
        return sum(self.files.values())

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._path, ignore_errors=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, on the disk for good."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """A JSON file, on the disk for good."""
    with path.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put a folder's names on the disk for good."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room; safetensors has errors of its own."""
    full = {errno.ENOSPC, errno.EDQUOT}
    if isinstance(error, OSError) and error.errno in full:
        return True
    return any(f"(os error {number})" in str(error) for number in full)
