"""Checkpoints back into master weights, all of them or none; and whether they are the trainer's."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miles.errors import CheckpointError
from miles.precision import _places, _storage
from miles.precision._modules import drop_cache
from miles.precision.exporting import Plan
from miles.precision.quantize import QTensor
from miles.precision.recipes import Recipe

__all__ = ["LoadReport", "ParityReport", "load", "verify_parity"]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load` read."""

    num_parameters: int
    """Parameters and buffers that were set, tied ones once."""
    recipes: Mapping[str, int] = field(default_factory=dict)
    """How many tensors were stored in each recipe; "none" counts those that weren't rounded."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What `verify_parity` compared, all of it equal."""

    num_rounded: int
    """Rounded matrices (experts one by one)."""
    num_plain: int
    """Tensors that aren't rounded."""
    num_values: int
    """Numbers in all of them."""


def load(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Set a model's weights to those of a checkpoint, rounded or not.

    Rounded weights are dequantised into the dtype of their parameters. Names, shapes, dtypes,
    scales and the values of every tensor are checked before the first parameter changes.

    Args:
        model: of transformers, or any module saved by `save`; converted or not. Its recipes need
            not be the checkpoint's: it rounds the loaded weights again, to its own
            (`verify_parity` tells whether that changed anything).
        path: a directory with config.json and model.safetensors or its index.

    Raises:
        CheckpointError: a tensor that is missing, unexpected, damaged, or of a wrong shape; codes
            without their scale or of a recipe that isn't known here; NaN or infinity. The model
            is as it was.

    Example:
        >>> import tempfile, torch
        >>> from miles.precision import Int4, convert_, load, save
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> report = convert_(model, [("0", Int4())])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/step_1")
        ...     load(model, f"{folder}/step_1").recipes
        {'Int4': 1, 'none': 1}
    """
    plan = Plan.of(model)
    with _Checkpoint.open(Path(path)) as checkpoint:
        recipes = checkpoint.check(model, plan.layout)
        for place in plan.layout.places:
            checkpoint.read(place, recipes[place.name])
        for group in _groups(plan.layout.places):
            _set(group, plan.layout, checkpoint, recipes)
    drop_cache(model)
    counts: dict[str, int] = {}
    for recipe in recipes.values():
        name = "none" if recipe is None else type(recipe).__name__
        counts[name] = counts.get(name, 0) + 1
    return LoadReport(
        num_parameters=len(plan.layout.parameters), recipes=dict(sorted(counts.items()))
    )


def verify_parity(model: nn.Module, path: str | os.PathLike[str]) -> ParityReport:
    """Whether what a checkpoint holds is bit for bit what the model computes with.

    Every rounded weight is rounded as in the forward pass and compared with what the files
    dequantise to, both in float32, so also after any further rounding; the others are compared as
    they are.

    Args:
        model: converted.
        path: what `save` wrote, or anything that is to be served instead.

    Raises:
        CheckpointError: the first tensor that differs, with the number of values that do and the
            largest difference; or as `load`.

    Example:
        >>> import tempfile, torch
        >>> from miles.precision import Int4, convert_, save, verify_parity
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> report = convert_(model, [("0", Int4())])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/step_1")
        ...     verify_parity(model, f"{folder}/step_1")
        ParityReport(num_rounded=1, num_plain=1, num_values=520)
    """
    plan = Plan.of(model)
    counts = {True: 0, False: 0}
    values = 0
    with _Checkpoint.open(Path(path)) as checkpoint:
        recipes = checkpoint.check(model, plan.layout)
        for place, ours in _forward(plan):
            theirs = checkpoint.read(place, recipes[place.name])
            rounded = place.sources[0] in plan.rounded
            if rounded is not isinstance(theirs, QTensor):
                raise CheckpointError(
                    f"{place.name} is {_kind(recipes[place.name])} in {path} and "
                    f"{_kind(plan.rounded[place.sources[0]].recipe if rounded else None)} in the "
                    "model; expected the same in both; convert the model as the checkpoint, or "
                    "save it again"
                )
            stored = theirs.dequantize() if isinstance(theirs, QTensor) else theirs
            _compare(place.name, ours, stored, Path(path))
            counts[rounded] += 1
            values += ours.numel()
    return ParityReport(num_rounded=counts[True], num_plain=counts[False], num_values=values)


def _forward(plan: Plan) -> Iterator[tuple[_places.Place, Tensor]]:
    """What the forward pass computes with, cut into the checkpoint's tensors after rounding."""
    held: dict[str, Tensor] = {}
    for place in plan.layout.places:
        if tuple(held) != place.sources:
            held = {n: _places.whole(plan.layout.parameters[n]) for n in place.sources}
            q = plan.rounded.get(place.sources[0])
            if q is not None:
                parts = [part.dequantize() for part in plan.round(q, held[place.sources[0]])]
                held = {place.sources[0]: torch.cat(parts, -2)}
        yield place, place.read(held)


def _kind(recipe: Recipe | None) -> str:
    return "not rounded" if recipe is None else type(recipe).__name__


def _compare(name: str, ours: Tensor, stored: Tensor, path: Path) -> None:
    ours = ours.cpu()
    if ours.dtype != stored.dtype:
        raise CheckpointError(
            f"{name} is {stored.dtype} in {path} and {ours.dtype} in the model; expected the same "
            "bits; save it again"
        )
    different = ours != stored
    if bool(different.any()):
        gap = (ours.double() - stored.double()).abs().max().item()
        first = tuple(different.nonzero()[0].tolist()) if ours.ndim else ()
        raise CheckpointError(
            f"{name} differs from what the model computes with in {int(different.sum())} of "
            f"{ours.numel()} values, by {gap:.3g} at most, first at {first}: {stored[first]:.9g} "
            f"in {path}, {ours[first]:.9g} in the model; expected the same bits: another recipe, "
            "another step, or another quantiser wrote it; save it again"
        )


def _groups(places: tuple[_places.Place, ...]) -> Iterator[list[_places.Place]]:
    """Places by what has to be set together: most often one parameter."""
    groups: dict[str, list[_places.Place]] = {}
    for place in places:
        members = [place]
        for source in place.sources:
            known = groups.get(source, [])
            members += [other for other in known if other not in members]
        for source in {name for member in members for name in member.sources}:
            groups[source] = members
    seen: set[int] = set()
    for members in groups.values():
        if id(members) not in seen:
            seen.add(id(members))
            yield members


def _set(
    group: list[_places.Place],
    layout: _places.Layout,
    checkpoint: _Checkpoint,
    recipes: Mapping[str, Recipe | None],
) -> None:
    names = {name for place in group for name in place.sources}
    fresh = {
        name: torch.empty(layout.parameters[name].shape, dtype=layout.parameters[name].dtype)
        for name in names
    }
    for place in group:
        value = checkpoint.read(place, recipes[place.name])
        if isinstance(value, QTensor):
            value = value.dequantize(fresh[place.sources[0]].dtype)
        place.write(value, fresh)
    with torch.no_grad():
        for name, value in fresh.items():
            parameter = layout.parameters[name]
            if hasattr(parameter, "full_tensor"):
                from torch.distributed.tensor import DTensor, distribute_tensor

                assert isinstance(parameter, DTensor)
                mesh = parameter.device_mesh
                # Every rank reads the files itself.
                value = distribute_tensor(
                    value.to(parameter.device), mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(value)


class _Checkpoint:
    """The tensors of a directory, by name."""

    def __init__(self, path: Path, files: Mapping[str, Any]) -> None:
        self._path = path
        self._files = files
        """Open files by the name of each tensor."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[_Checkpoint]:
        from safetensors import SafetensorError, safe_open

        weight_map = _weight_map(path)
        with contextlib.ExitStack() as stack:
            by_file: dict[str, Any] = {}
            files: dict[str, Any] = {}
            for file in dict.fromkeys(weight_map.values()):
                try:
                    by_file[file] = stack.enter_context(safe_open(path / file, "pt"))
                    names = set(by_file[file].keys())
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(
                        f"{path / file} can't be read: {error}; expected a whole safetensors "
                        "file; copy or export the checkpoint again"
                    ) from error
                if weight_map == {"": file}:
                    files = dict.fromkeys(names, by_file[file])
                    break
                listed = {name for name, where in weight_map.items() if where == file}
                if names != listed:
                    raise CheckpointError(
                        f"{path / file} and the index disagree on {sorted(names ^ listed)[:4]}; "
                        "expected the same tensors in both; export the checkpoint again"
                    )
                files |= dict.fromkeys(names, by_file[file])
            yield cls(path, files)

    def check(self, model: nn.Module, layout: _places.Layout) -> dict[str, Recipe | None]:
        """The recipe that each tensor of the layout is stored in; nothing is missing or left."""
        _check_config(self._path)
        left = set(self._files)
        recipes: dict[str, Recipe | None] = {}
        missing = []
        for place in layout.places:
            names = self._names(place.name)
            left -= set(names.values())
            if not names:
                missing.append(place.name)
                continue
            specs = {end: self._spec(name) for end, name in names.items()}
            dtype = layout.parameters[place.sources[0]].dtype
            recipes[place.name] = _storage.check(place.name, specs, tuple(place.shape), dtype)
        left -= layout.aliases.keys()
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        left = {name for name in left if not any(re.search(p, name) for p in ignored)}
        if missing or left:
            raise CheckpointError(
                f"{self._path} lacks {_some(missing)} and holds {_some(sorted(left))} that the "
                f"model doesn't have; expected its {len(layout.places)} weights, each once, and "
                "the tensors that they are stored in; load the checkpoint of this model"
            )
        for alias, name in layout.aliases.items():
            same = alias not in self._files or recipes[name] is not None
            if not same and not torch.equal(self._get(alias), self._get(name)):
                raise CheckpointError(
                    f"{alias} and {name} differ in {self._path}; expected the same, since the "
                    "model ties them; load it into a model with tie_word_embeddings=False"
                )
        return recipes

    def read(self, place: _places.Place, recipe: Recipe | None) -> Tensor | QTensor:
        """A tensor of the layout, which `check` let pass.

        Raises:
            CheckpointError: NaN or infinity, or another shape than it says.
        """
        parts = {end: self._get(name) for end, name in self._names(place.name).items()}
        for end, tensor in parts.items():
            if tensor.dtype == torch.uint8 and end.startswith("weight_scale"):
                tensor = tensor.view(torch.float8_e8m0fnu)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise CheckpointError(
                    f"{place.name.removesuffix('weight')}{end} holds NaN or infinity in "
                    f"{self._path}; expected finite numbers; the file is damaged or the training "
                    "had failed; take an earlier checkpoint"
                )
        said = parts.get("weight_shape")
        if said is not None and said.tolist() != list(place.shape):
            raise CheckpointError(
                f"{place.name} has weight_shape {said.tolist()} in {self._path}; expected "
                f"{list(place.shape)}; load the checkpoint of this model"
            )
        return next(iter(parts.values())) if recipe is None else _storage.unpack(recipe, parts)

    def _names(self, name: str) -> dict[str, str]:
        """The tensors that a weight is stored in, by the end of their names."""
        if not name.endswith("weight"):
            return {"weight": name} if name in self._files else {}
        base = name.removesuffix("weight")
        names = {end: base + end for end in _storage.SUFFIXES}
        return {end: name for end, name in names.items() if name in self._files}

    def _spec(self, name: str) -> _storage.Spec:
        header = self._files[name].get_slice(name)
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{name} is {header.get_dtype()} in {self._path}; expected one of "
                f"{sorted(_DTYPES)}; export the checkpoint again"
            )
        return _storage.Spec(dtype, tuple(header.get_shape()))

    def _get(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{name} in {self._path} can't be read: {error}; expected a whole safetensors "
                "file; copy or export the checkpoint again"
            ) from error
        return tensor


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "") or "nothing"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read: {error}; expected JSON; copy or export the checkpoint again"
        ) from error


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor, or {"": file} for a single one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{index} has no weight_map; expected the file of each tensor; export it again"
            )
        return weight_map
    if (path / "model.safetensors").exists():
        return {"": "model.safetensors"}
    raise CheckpointError(
        f"{path} has neither model.safetensors nor its index; expected what `save` or "
        "save_pretrained writes; check the path, or convert older formats with transformers"
    )


def _check_config(path: Path) -> None:
    """Refuse what the tensors themselves don't tell: another size of FP8 blocks."""
    config = _json(path / "config.json") if (path / "config.json").exists() else {}
    rounded = config.get("quantization_config") or {}
    block = rounded.get("weight_block_size")
    if block is not None and list(block) not in ([128, 128], [1, 32]):
        raise CheckpointError(
            f"{path}/config.json has weight_block_size {block}; expected [128, 128] or [1, 32]; "
            "dequantise the checkpoint with transformers"
        )
