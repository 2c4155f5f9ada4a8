"""Tensors of drafts on disk: found by name, checked, and copied into live ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from miles.errors import CheckpointError, NonFiniteError

__all__ = ["check_finite", "fill", "find_tensors", "read_config"]

INDEX, SINGLE, PICKLED = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; expected the folder of a checkpoint")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def find_tensors(folder: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors whose names begin with the prefix, on the CPU; the others are not read.

    From safetensors, in one file or several, or from `pytorch_model.bin`, which torch reads without
    running code.
    """
    folder = Path(folder)
    if (index := folder / INDEX).is_file():
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted({file for name, file in where.items() if name.startswith(prefix)})
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / PICKLED).is_file():
        state = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
        return {name: state[name] for name in state if name.startswith(prefix)}
    else:
        raise CheckpointError(f"{folder} has none of {INDEX}, {SINGLE} and {PICKLED}")
    found: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing, but the index names it")
        with safe_open(folder / file, framework="pt") as tensors:
            found |= {n: tensors.get_tensor(n) for n in tensors.keys() if n.startswith(prefix)}  # noqa: SIM118  # no dict
    return found


@torch.no_grad()
def fill(
    live: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    folder: str | Path,
    *,
    ignore: Iterable[str] = (),
) -> None:
    """Copy what was found into the live tensors, once every name, shape and number is right.

    `ignore`: parts of names that do not matter.
    """
    quantised = [name for name in found if "weight_scale" in name or "weight_packed" in name]
    if quantised:
        raise CheckpointError(
            f"{folder} holds quantised weights ({quantised[0]}); dequantise them first, a draft is "
            "trained in floating point"
        )
    missing = sorted(live.keys() - found.keys())
    extra = sorted(n for n in found.keys() - live.keys() if not any(i in n for i in ignore))
    if missing or extra:
        raise CheckpointError(
            f"{folder} is not a checkpoint of this draft: missing {missing[:5]}, unknown "
            f"{extra[:5]} (of {len(missing)} and {len(extra)})"
        )
    for name, tensor in live.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} in {folder} has shape {tuple(found[name].shape)}; this draft's is "
                f"{tuple(tensor.shape)}"
            )
    check_finite({name: found[name] for name in live})
    for name, tensor in live.items():
        tensor.copy_(found[name])


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError with the first name that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(
                f"{name} holds NaN or infinity ({tensor.dtype}); the draft's training has "
                "diverged, the file is damaged, or weights are beyond that dtype's range: go back "
                "to an earlier checkpoint, or take another dtype"
            )
