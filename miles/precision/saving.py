"""A directory like that of `save_pretrained`: there whole, or not at all."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from miles.errors import CheckpointError, SettingError
from miles.precision.exporting import export, quantization_config

__all__ = ["save"]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 2**30,
    write: bool = True,
) -> None:
    """Write the tensors of `export` and config.json into a new directory.

    Everything is written into a hidden directory beside it, flushed, and then renamed, so that a
    full disk or a killed process leaves no half checkpoint under `path`. The tokenizer and the
    generation config are the caller's to save, into the directory that is then there.

    Args:
        model: as for `export`.
        path: a directory that doesn't exist yet, or is empty.
        max_shard_bytes: a file of weights holds no more, unless one tensor alone is larger.
        write: False on the ranks of FSDP2 that only take part in gathering; one has to write.

    Raises:
        CheckpointError: there is something at `path`, or the disk is full or fails.
        SettingError: a `max_shard_bytes` below 1.
        NonFiniteError, UnsupportedModelError: as `export`.

    Example:
        >>> import os, tempfile, torch
        >>> from miles.precision import Int4, convert_, save
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> report = convert_(model, [("0", Int4())])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/step_1")
        ...     sorted(os.listdir(f"{folder}/step_1"))
        ['config.json', 'model.safetensors']
    """
    if max_shard_bytes < 1:
        raise SettingError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    if not write:
        for _ in export(model):
            pass
        return
    path = Path(os.path.abspath(path))
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(
            f"{path} is there and not empty; expected a new directory: what an engine may be "
            "loading is not replaced; choose another name or remove it"
        )
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    tensors = export(model)
    try:
        partial.mkdir(parents=True)
        _write_shards(tensors, partial, max_shard_bytes)
        _write_json(partial / "config.json", _config(model))
        _sync(partial)
        os.rename(partial, path)
        _sync(path.parent)
    except OSError as error:
        for _ in tensors:  # other ranks gather with this one, to the last tensor
            pass
        raise CheckpointError(
            f"{path} could not be written: {error}; nothing is left there; make room or choose "
            "another place, and save again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_bytes: int) -> None:
    where: dict[str, int] = {}
    size = count = 0
    for count, shard in enumerate(_shards(tensors, max_bytes), 1):
        where |= dict.fromkeys(shard, count)
        size += sum(tensor.nbytes for tensor in shard.values())
        _write_shard(folder / f"{count}.safetensors", shard)
    if count <= 1:
        if count == 0:
            _write_shard(folder / "1.safetensors", {})
        os.rename(folder / "1.safetensors", folder / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for number, name in names.items():
        os.rename(folder / f"{number}.safetensors", folder / name)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: names[number] for name, number in sorted(where.items())},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        # Views share memory, which the file format refuses, and would follow the training.
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    _sync(path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Have the disk hold it before anything is renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(PermissionError):  # some systems don't flush directories
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _config(model: nn.Module) -> dict[str, Any]:
    """What `save_pretrained` writes, and how the weights are rounded."""
    model = getattr(model, "_orig_mod", model)
    values: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):  # of the checkpoint that it was loaded from
            del config.quantization_config
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        values = json.loads(config.to_json_string())
        # FSDP2 derives its own class from the model's.
        values["architectures"] = [type(model).__name__.removeprefix("FSDP")]
        if dtype is not None:
            values["dtype"] = str(dtype).removeprefix("torch.")
    if rounded := quantization_config(model):
        values["quantization_config"] = rounded
    return values
