"""A model as the checkpoint that an engine loads: rounded weights, their scales, and the config.

What is rounded is what the forward pass rounds, cut as it cuts it: fused projections are split into
the tensors of the checkpoint first, so that no block reaches over a border.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from miles.errors import UnsupportedModelError
from miles.precision import _places, _storage
from miles.precision._modules import QuantizedParameter, quantized_parameters, round_parts
from miles.precision.quantize import QTensor
from miles.precision.recipes import MXFP8, NVFP4, BlockFP8, Int4, Recipe

__all__ = ["export", "quantization_config"]


def export(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model's Hugging Face checkpoint, one after the other.

    Those of `save_pretrained`, under its names (experts one by one, tied weights once), but each
    weight that the forward pass rounds comes as the tensors of its recipe:

    - `BlockFP8`: `X.weight` float8_e4m3fn `[N, K]` and `X.weight_scale_inv` float32
      `[ceil(N/128), ceil(K/128)]`;
    - `Int4`: `X.weight_packed` int32 `[N, K/8]`, `X.weight_scale` `[N, K/group_size]` and
      `X.weight_shape` int64 `[2]`;
    - `MXFP8`: `X.weight` float8_e4m3fn and `X.weight_scale_inv` uint8 `[N, K/32]`;
    - `NVFP4`: `X.weight` uint8 `[N, K/2]`, `X.weight_scale` float8_e4m3fn `[N, K/16]` and
      `X.weight_scale_2` float32 `[]`.

    In a model of several recipes the names are those of compressed-tensors, where scales of
    `BlockFP8` and `MXFP8` are called `X.weight_scale`.

    Under FSDP2 every rank has to take all tensors, since each is gathered; with a mixed-precision
    policy, weights are rounded from the dtype that the forward pass gathers.

    Args:
        model: of transformers, or any module, whose own names are kept then.

    Yields:
        (name, tensor); tensors that aren't rounded may share memory with the model.

    Raises:
        NonFiniteError: NaN or infinity in a weight to round, with the parameter's name.
        UnsupportedModelError: a rounded weight that is tied to another, or that the checkpoint
            holds transposed or fused with others.

    Example:
        >>> import torch
        >>> from miles.precision import Int4, convert_, export
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False), torch.nn.ReLU())
        >>> report = convert_(model, [("0", Int4())])
        >>> [(name, tuple(tensor.shape)) for name, tensor in export(model)]
        [('0.weight_packed', (8, 8)), ('0.weight_scale', (8, 2)), ('0.weight_shape', (2,))]
    """
    plan = Plan.of(model)
    mixed = plan.mixed
    for place, source in plan.read():
        if isinstance(source, Tensor):
            yield place.name, source
        else:
            base = place.name.removesuffix("weight")
            for suffix, tensor in _storage.pack(source, mixed=mixed).items():
                yield base + suffix, tensor.contiguous()


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of the tensors of `export`, under "quantization_config".

    A model of one recipe has the config of that recipe's method ("fp8", "compressed-tensors",
    "mxfp8" or "modelopt"); one of several has compressed-tensors' "mixed-precision". Linears,
    routers and experts that aren't rounded are listed, experts as a whole where none of a module
    is. A model without rounded weights has {}.

    Args:
        model: as for `export`.

    Raises:
        UnsupportedModelError: as `export`.
        SettingError: recipes that no format holds together.

    Example:
        >>> import torch
        >>> from miles.precision import BlockFP8, convert_, quantization_config
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
        >>> report = convert_(model, [("0", BlockFP8())])
        >>> config = quantization_config(model)
        >>> config["quant_method"], config["weight_block_size"], config["modules_to_not_convert"]
        ('fp8', [128, 128], ['1'])
    """
    plan = Plan.of(model)
    kinds = {_storage.stored_as(q.recipe): q.recipe for q in plan.rounded.values()}
    if not kinds:
        return {}
    if plan.mixed:
        groups = [(r, _targets(plan, r)) for r in kinds]
        return _compressed_tensors("mixed-precision", groups, plan.ignored(regex=True))
    (recipe,) = kinds
    if isinstance(recipe, Int4):
        ignore = plan.ignored(regex=True)
        return _compressed_tensors(_FORMATS[Int4], [(recipe, ["Linear"])], ignore)
    ignore = plan.ignored(regex=False)
    if isinstance(recipe, NVFP4):
        return {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": _group(recipe, ["Linear"])},
            "ignore": ignore,
        }
    power_of_two = isinstance(recipe, MXFP8) or recipe.scale == "ue8m0"
    return {
        "quant_method": "mxfp8" if isinstance(recipe, MXFP8) else "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, MXFP8.block] if isinstance(recipe, MXFP8) else [128, 128],
        **({"scale_fmt": "ue8m0"} if power_of_two else {}),
        "modules_to_not_convert": ignore,
    }


@dataclass(frozen=True)
class Plan:
    """Where everything is, and what is rounded; of use to `load` and `save` too."""

    layout: _places.Layout
    rounded: Mapping[str, QuantizedParameter]
    """By the name of the parameter in the layout."""
    dtypes: Mapping[str, torch.dtype]
    """What FSDP2's mixed precision gathers rounded weights in, by the parameter's full name."""

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """Of a model, checked."""
        layout = _places.find(model)
        names = {id(p): name for name, p in layout.parameters.items()}
        rounded = {
            names[id(q.parameter)]: q
            for q in quantized_parameters(model)
            if id(q.parameter) in names  # not what a model's checkpoint leaves out
        }
        for alias, name in layout.aliases.items():
            for place in layout.places:
                if place.name == name and place.sources[0] in rounded:
                    raise UnsupportedModelError(
                        f"{name} is rounded and tied to {alias}; expected a weight of its own, "
                        "since a checkpoint holds tied weights once; leave it unquantised"
                    )
        for place in layout.places:
            bad = [name for name in place.sources if name in rounded]
            if bad and (place.rows is None or not _is_matrix(place)):
                raise UnsupportedModelError(
                    f"{bad[0]} is rounded, and the checkpoint holds it in {place.name} of shape "
                    f"{tuple(place.shape)}, in other blocks; expected one matrix of whole rows for "
                    "each projection; leave it unquantised"
                )
        return cls(layout, rounded, _gathered_dtypes(model, rounded))

    @cached_property
    def mixed(self) -> bool:
        """Whether the format is compressed-tensors' for several recipes."""
        return _storage.mixed(q.recipe for q in self.rounded.values())

    def read(self) -> Iterator[tuple[_places.Place, Tensor | QTensor]]:
        """Each tensor of the checkpoint: as it is, or rounded."""
        held: dict[str, Tensor] = {}
        parts: tuple[QTensor, ...] = ()
        for place in self.layout.places:
            if tuple(held) != place.sources:
                held = {n: _places.whole(self.layout.parameters[n]) for n in place.sources}
                q = self.rounded.get(place.sources[0])
                parts = () if q is None else self.round(q, held[place.sources[0]])
            yield place, _cut(place, parts) if parts else place.read(held)

    def round(self, q: QuantizedParameter, weight: Tensor) -> tuple[QTensor, ...]:
        """What `q.parts()` gives, of the gathered weight."""
        weight = weight.to(self.dtypes.get(q.name, weight.dtype))
        weight = weight.to(getattr(q.module, "_dtype", None) or weight.dtype)
        return round_parts(q, weight)

    def ignored(self, *, regex: bool) -> list[str]:
        """Modules whose weights stay, by their names on disk.

        Args:
            regex: whether experts are told by a pattern, else by the name of their module.
        """
        kept, rounded = [], set()
        for place in self.layout.places:
            if place.sources[0] in self.rounded:
                rounded.add(_experts(place, self.layout)[0])
            elif _could_be_rounded(place, self.layout):
                kept.append(place)
        names: dict[str, None] = {}
        for place in kept:
            module = place.name.removesuffix(".weight")
            prefix, pattern = _experts(place, self.layout)
            if pattern is not None:
                module = pattern if regex else module if prefix in rounded else prefix
            names[module] = None
        tied = [alias.removesuffix(".weight") for alias in self.layout.aliases]
        return [*names, *tied]


def _is_matrix(place: _places.Place) -> bool:
    return len(place.shape) == 2 and place.name.endswith("weight")


def _gathered_dtypes(
    model: nn.Module, rounded: Mapping[str, QuantizedParameter]
) -> dict[str, torch.dtype]:
    """What FSDP2's mixed precision casts parameters to: the policy of the nearest one above."""
    found = {}
    states = {
        name: module._get_fsdp_state()
        for name, module in model.named_modules()
        if hasattr(module, "_get_fsdp_state")
    }
    for q in rounded.values() if states else ():
        path = q.name
        while path and path not in states:
            path = path.rpartition(".")[0]
        policy = getattr(states.get(path), "_mp_policy", None)
        if policy is not None and policy.param_dtype is not None:
            found[q.name] = policy.param_dtype
    return found


def _cut(place: _places.Place, parts: tuple[QTensor, ...]) -> QTensor:
    """One matrix of a rounded parameter `[N, K]` or `[E, N, K]`, whose parts share the N."""
    assert place.rows is not None
    start, stop = place.rows
    counts = [part.shape[-2] for part in parts]
    expert, start = divmod(start, sum(counts))
    stop -= expert * sum(counts)
    for part, count in zip(parts, counts, strict=True):
        step = part.recipe.block if isinstance(part.recipe, BlockFP8) else 1
        inside = 0 <= start < stop <= count
        if inside and start % step == 0 and (stop % step == 0 or stop == count):
            index = (expert,) if len(part.shape) == 3 else ()
            codes, scale = part.codes[index], part.scale[index]
            blocks = slice(start // step, -(-stop // step))
            return QTensor(
                codes[start:stop], scale[blocks], part.recipe, part.role, part.global_scale
            )
        start, stop = start - count, stop - count
    raise UnsupportedModelError(
        f"{place.sources[0]} is rounded, and {place.name} holds rows {place.rows} of it, across "
        "blocks; expected whole blocks; leave it unquantised"
    )


def _could_be_rounded(place: _places.Place, layout: _places.Layout) -> bool:
    """Whether an engine might take the tensor for that of a linear or of experts."""
    owner = layout.owners.get(place.sources[0])
    matrix = _is_matrix(place) and not isinstance(owner, nn.Embedding)
    return matrix or _fused_on_disk(place)


def _fused_on_disk(place: _places.Place) -> bool:
    """Whether the checkpoint holds the experts of a layer in one tensor."""
    return len(place.shape) == 3 and not place.name.endswith("weight")


def _experts(place: _places.Place, layout: _places.Layout) -> tuple[str, str | None]:
    """The module on disk that holds an expert, and a pattern of the same weight of all."""
    source = layout.parameters[place.sources[0]]
    module = place.name.removesuffix(".weight")
    if _fused_on_disk(place):
        module = module.rpartition(".")[0]
        return module, rf"re:{re.escape(module)}\b"
    if source.ndim != 3 or place.rows is None:
        return module, None
    expert = place.rows[0] // source.shape[1]
    prefix, dot, rest = module.rpartition(f".{expert}.")
    if not dot:
        return module, None
    return prefix, rf"re:{re.escape(prefix)}\.\d+\.{re.escape(rest)}$"


def _targets(plan: Plan, recipe: Recipe) -> list[str]:
    """Modules rounded to a recipe, experts of a module by a pattern."""
    names: dict[str, None] = {}
    for place in plan.layout.places:
        q = plan.rounded.get(place.sources[0])
        if q is not None and _storage.stored_as(q.recipe) == recipe:
            pattern = _experts(place, plan.layout)[1]
            names[pattern or place.name.removesuffix(".weight")] = None
    return list(names)


_FORMATS: dict[type[Recipe], str] = {
    BlockFP8: "float-quantized",
    Int4: "pack-quantized",
    MXFP8: "mxfp8-quantized",
    NVFP4: "nvfp4-pack-quantized",
}


def _compressed_tensors(
    format: str, groups: list[tuple[Recipe, list[str]]], ignore: list[str]
) -> dict[str, Any]:
    named = {f"group_{i}": _group(recipe, targets) for i, (recipe, targets) in enumerate(groups)}
    if len(groups) > 1:
        for group, (recipe, _) in zip(named.values(), groups, strict=True):
            group["format"] = _FORMATS[type(recipe)]
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": named,
        "ignore": ignore,
    }


def _group(recipe: Recipe, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None
    if isinstance(recipe, Int4):
        weights = {"num_bits": 4, "type": "int", "strategy": "group"}
        weights["group_size"] = recipe.group_size
    elif isinstance(recipe, BlockFP8):
        weights = {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
        activations = {"num_bits": 8, "strategy": "group", "group_size": recipe.block}
    elif isinstance(recipe, MXFP8):
        weights = {"num_bits": 8, "strategy": "group", "group_size": recipe.block}
        weights["scale_dtype"] = "torch.uint8"
        activations = dict(weights)
    else:
        weights = {"num_bits": 4, "strategy": "tensor_group", "group_size": recipe.block}
    rest = {"type": "float", "symmetric": True}
    return {
        "targets": targets,
        "weights": rest | {"dynamic": False} | weights,
        "input_activations": activations and rest | {"dynamic": True} | activations,
        "output_activations": None,
    }
