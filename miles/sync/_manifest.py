"""What the manifest of a version says, believed only where it is of the form that we write."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from miles.errors import SyncError

__all__ = ["FILE", "FORMAT", "Manifest", "parse"]

FORMAT = 2
"""1 had another checksum."""
FILE = re.compile(r"model-\d{5,}\.safetensors")


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
    """By name: shape, dtype, checksum, file; if it is a delta, its header too."""
    aliases: dict[str, str]
    """Further names of tied tensors."""

    @property
    def digest(self) -> str:
        """SHA-256 of names, shapes, dtypes and checksums."""
        rows = [[n, t["shape"], t["dtype"], t["checksum"]] for n, t in self.tensors.items()]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def parse(read: Any, version: int) -> Manifest:
    """The manifest of `version`, from its JSON.

    Raises:
        SyncError: it is of an older or newer format.
        ValueError: says what is not of our form.
    """
    keys = {"format", "version", "base", "base_digest", "files", "tensors", "aliases"}
    if not isinstance(read, dict) or read.keys() != keys:
        raise ValueError(f"it is no object of {sorted(keys)}")
    if read["format"] != FORMAT:
        raise SyncError(
            f"the manifest of version {version} is of format {read['format']!r:.20}; expected "
            f"{FORMAT}, with another checksum: push again, or read it with the release of miles "
            "that wrote it"
        )
    if not _is_count(read["version"]) or read["version"] != version:
        raise ValueError(f"it says version {read['version']!r}")
    base = read["base"]
    if base is not None and not (_is_count(base) and base < version):
        raise ValueError(f"its base is {base!r}; expected a version before {version}")
    if not all(isinstance(read[key], dict) for key in ("files", "tensors", "aliases")):
        raise ValueError("files, tensors and aliases are not all objects")
    if not isinstance(read["base_digest"], str):
        raise ValueError("its base_digest is no text")
    _check_entries(read, full=base is None)
    return Manifest(**{key: value for key, value in read.items() if key != "format"})


def _check_entries(read: dict[str, Any], *, full: bool) -> None:
    for file, size in read["files"].items():
        if not FILE.fullmatch(file) or not _is_count(size):
            raise ValueError(f"file {file!r} of {size!r} bytes; expected model-00001.safetensors")
    for name, entry in read["tensors"].items():
        if not _is_entry(entry, read["files"], full=full):
            raise ValueError(f"the entry of {name} makes no sense: {entry!r:.200}")
    for name, first in read["aliases"].items():
        if not isinstance(first, str) or first not in read["tensors"] or name in read["tensors"]:
            raise ValueError(f"{name} is another name of {first!r:.200}, which is no tensor")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_entry(entry: Any, files: dict[str, int], *, full: bool) -> bool:
    if not isinstance(entry, dict) or not {"shape", "dtype", "checksum", "file"} <= entry.keys():
        return False
    if not _is_shaped(entry) or type(entry["checksum"]) is not int:
        return False
    file, delta = entry["file"], entry.get("delta")
    if delta is None:
        return isinstance(file, str) and file in files
    if full or not isinstance(delta, dict) or not _is_shaped(delta):
        return False
    if not all(type(delta.get(key)) is int for key in ("num_changed", "base", "result")):
        return False
    if not isinstance(delta.get("encoding"), str):
        return False
    return file is None or (isinstance(file, str) and file in files)


def _is_shaped(entry: dict[str, Any]) -> bool:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        return False
    kind = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    return isinstance(getattr(torch, kind, None), torch.dtype)
