"""The folders that the disk carrier writes: one for each version, complete or not there.

step_12.partial/    being written
step_12/            complete: renamed when everything is on the disk
    model-00001.safetensors ...          tensors (of a delta: its compressed bytes, as uint8)
    model.safetensors.index.json         of a full version, for whoever else reads checkpoints
    manifest.json                        written last
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._manifest import FILE, FORMAT, Manifest, parse

__all__ = ["Manifest", "Steps", "UnreadableError", "Writer"]

_NAME = re.compile(r"step_([1-9]\d*)")
_LEFT = re.compile(r"step_[1-9]\d*\.(partial|deleted)")
_INDEX = "model.safetensors.index.json"


class UnreadableError(SyncError):
    """The file system failed; nothing is known of what the file holds."""


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
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("no regular file")
            return parse(json.loads(path.read_bytes()), version)
        except FileNotFoundError as error:
            raise SyncError(f"version {version} is not in {self.folder}: no {path.name}") from error
        except OSError as error:
            raise UnreadableError(f"cannot read {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SyncError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def read(self, manifest: Manifest, file: str) -> dict[str, Tensor]:
        """The tensors of one file, checked for size.

        Raises:
            SyncError: it is missing, truncated or no safetensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(manifest.version) / file
        size = manifest.files.get(file)
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise SyncError(f"{path} is no regular file")
            data = path.read_bytes() if found.st_size == size else b""
        except FileNotFoundError as error:
            raise SyncError(f"cannot read {path}: {error}") from error
        except OSError as error:
            raise UnreadableError(f"cannot read {path}: {error}") from error
        if found.st_size != size or len(data) != size:
            raise SyncError(f"{path} has {found.st_size} bytes; the manifest says {size}")
        try:
            return load(data)
        except (SafetensorError, KeyError, ValueError) as error:
            raise SyncError(f"{path} is damaged: {error}") from error

    def clean(self) -> None:
        """Remove what a killed writer left.

        Raises:
            SyncError: something in the folder is named like ours and isn't.
        """
        for path in sorted(self.folder.glob("step_*")):
            if _LEFT.fullmatch(path.name) or _NAME.fullmatch(path.name):
                if not is_ours(path):
                    raise SyncError(_foreign(path))
                if _LEFT.fullmatch(path.name):
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
            if not is_ours(self.path(version)):
                continue
            gone = self.path(version).with_suffix(".deleted")  # never half of it under its name
            try:
                self.path(version).rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                warnings.warn(f"an old version stays on the disk: {error}", stacklevel=1)


def is_ours(path: Path) -> bool:
    """Whether a folder holds what a `Writer` makes and nothing else: what we may remove."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = os.listdir(path)
    if not all(FILE.fullmatch(name) or name in (_INDEX, "manifest.json") for name in names):
        return False
    return _LEFT.fullmatch(path.name) is not None or "manifest.json" in names


def _foreign(path: Path) -> str:
    return (
        f"{path} is there and no version that a DiskSyncer wrote; expected a folder of versions "
        "alone, since old ones are removed; take another folder, or move it away"
    )


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
        self.aliases: dict[str, str] = {}
        if self._path.exists() and not is_ours(self._path):
            raise SyncError(_foreign(self._path))
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
            write_json(self._path / _INDEX, index)
        write_json(self._path / "manifest.json", {"format": FORMAT, **vars(manifest)})
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
