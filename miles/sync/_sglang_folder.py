"""Folders that `SGLangSyncer(via="disk")` writes for servers: one for each version.

version-12/     complete: renamed when all of it is there
    model-00001.safetensors ...
    model.safetensors.index.json
.version-12.part/   being written
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from miles.errors import SyncError
from miles.sync._sglang_client import Client
from miles.sync._sglang_payload import flat_buckets
from miles.sync._steps import is_disk_full

__all__ = ["load_folder", "remove_others", "write_folder"]

_INDEX = "model.safetensors.index.json"
_WHOLE = re.compile(r"version-\d+")
_LEFT = re.compile(r"\.version-\d+\.part")
_FILE = re.compile(r"model-\d{5,}\.safetensors|\.tmp\w+")  # the latter of a killed `save_file`


def write_folder(weights: Iterable[tuple[str, Tensor]], path: Path, bucket_bytes: int) -> int:
    """A folder of safetensors, there as a whole or not at all; returns the number of files.

    What a killed trainer left is removed.

    Raises:
        SyncError: no weights were given, the disk does not take them, or something else is there
            under this name.
    """
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.part")
    places: dict[str, str] = {}
    number = 0
    for there in (path, part):
        if os.path.lexists(there) and not _is_ours(there):
            raise SyncError(
                f"{there} is there, and not as a syncer writes it, or cannot be listed; expected a "
                "folder= for versions alone, since old ones are removed: take another, or move it "
                "away"
            )
    try:
        for left in path.parent.glob(".version-*.part"):
            if _LEFT.fullmatch(left.name) and _is_ours(left):
                shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        for bucket in flat_buckets(weights, bucket_bytes=bucket_bytes, device="cpu"):
            number += 1
            file = f"model-{number:05}.safetensors"
            tensors = {
                w.name: bucket.flat[w.start_idx : w.end_idx].view(w.dtype).view(w.shape)
                for w in bucket.metadata
            }
            save_file(tensors, part / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        if not number:
            raise SyncError("no weights were given; expected those of the whole model")
        index = {"metadata": {}, "weight_map": places}
        (part / _INDEX).write_text(json.dumps(index))
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) or is_disk_full(error):
            raise SyncError(
                f"{path} could not be written ({error}), and what there was of it is removed; make "
                "room, or take a folder that this process may write to"
            ) from error
        raise
    return number


def remove_others(path: Path) -> None:
    """Remove all versions but this one; what no syncer wrote stays."""
    for old in path.parent.glob("version-*"):
        if old != path and _WHOLE.fullmatch(old.name) and _is_ours(old):
            try:
                shutil.rmtree(old)
            except OSError as error:
                warnings.warn(f"{old} is no longer used, and stays: {error}", stacklevel=2)


def _is_ours(path: Path) -> bool:
    """Whether a folder holds what `write_folder` makes and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        return all(name == _INDEX or _FILE.fullmatch(name) for name in os.listdir(path))
    except OSError:  # of somebody else, or just gone
        return False


def load_folder(client: Client, path: Path) -> None:
    """Have a server load a folder."""
    # Without a format the server takes the one that it was started with, such as "dummy".
    body = {
        "model_path": str(path.absolute()), "load_format": "safetensors", "flush_cache": False,
    }  # fmt: skip
    client.post("/update_weights_from_disk", body)
