"""Choosing which modules of a model compute with rounded weights.

Shapes: linears `[N, K]`; fused experts `[E, N, K]`, where the N of `gate_up_proj` are gate and up.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from miles.errors import SettingError
from miles.precision._modules import (
    FUSED_HALVES,
    Quantized,
    QuantizedParameter,
    convert_module,
    drop_cache,
    high_precision,
    join_fused,
    parts_of,
    quantized_parameters,
    weights_of,
)
from miles.precision.recipes import BlockFP8, Int4, Recipe, stored_bytes

__all__ = [
    "ConversionReport",
    "ConvertedModule",
    "QuantizedParameter",
    "convert_",
    "drop_cache",
    "high_precision",
    "quantized_parameters",
]


@dataclass(frozen=True, kw_only=True)
class ConvertedModule:
    """One line of a report: a linear or the fused experts of a layer."""

    name: str
    """Of the module."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its weights."""
    recipe: Recipe | None
    """What its weights are rounded to; None if they stay."""
    reason: str
    """Why they stay; empty if they don't."""
    bytes_before: int
    """Of its weights in their dtype."""
    bytes_after: int
    """Of what an engine loads for them."""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_` did with every linear and every experts module."""

    modules: tuple[ConvertedModule, ...] = field(default_factory=tuple)

    @property
    def converted(self) -> tuple[ConvertedModule, ...]:
        """Those that were converted."""
        return tuple(module for module in self.modules if module.recipe is not None)

    def table(self) -> str:
        """One line a module: recipe, shapes, bytes, or why it stays."""
        lines = []
        for module in self.modules:
            what = module.reason if module.recipe is None else str(module.recipe)
            shapes = " ".join("x".join(map(str, shape)) for shape in module.shapes)
            before, after = module.bytes_before / 2**20, module.bytes_after / 2**20
            lines.append(f"{module.name:40} {shapes:24} {before:9.2f} -> {after:9.2f} MiB  {what}")
        before = sum(module.bytes_before for module in self.modules) / 2**20
        after = sum(module.bytes_after for module in self.modules) / 2**20
        lines.append(
            f"{len(self.converted)} of {len(self.modules)} modules, {before:.2f} -> {after:.2f} MiB"
        )
        return "\n".join(lines)


def convert_(
    model: nn.Module,
    rules: Sequence[tuple[str, Recipe | None]],
    *,
    dtype: torch.dtype | None = None,
    ragged: bool = False,
) -> ConversionReport:
    """Have the linears and fused experts of a model compute with rounded weights, in place.

    `Int4`, `MXFP8` and `NVFP4` round the weight alone; `BlockFP8` also activations and gradients,
    as its GEMMs say (`miles.precision.linear`). The gradient of a weight passes straight through.
    A weight is rounded once for each version of it, not once a micro-batch. `NVFP4` linears that
    engines fuse (q, k and v; gate and up) are under one global scale.

    Args:
        model: changed in place.
        rules: (glob, recipe), matched against names of modules in turn; the first that matches
            counts, and a recipe of None keeps the module as it is. The head, embeddings and what
            a router computes with stay high-precision unless a rule names the module in full.
        dtype: what forward passes compute in, where that is not the parameters' own: bfloat16 for
            float32 parameters under autocast. Copies of this dtype are what is rounded, by the
            forward pass and the exporter alike; float32 rounds to other codes.
        ragged: also convert weights whose sizes block FP8 does not divide. Off by default: some
            loaders read the block size off the grid of scales.

    Returns:
        Every linear and experts module with its recipe, or the reason that it has none.

    Raises:
        SettingError: a module that is converted already, or one named in full that can't be.

    Example:
        >>> from miles.precision import Int4, convert_
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 2))
        >>> report = convert_(model, [("0", Int4())])
        >>> [(m.name, m.recipe is not None, m.reason) for m in report.modules]
        [('0', True, ''), ('1', False, 'no rule matches')]
    """
    used: set[int] = set()
    protected = _protected(model)
    lines = []
    for name, module in model.named_modules():
        weights = weights_of(module)
        if not weights:
            continue
        if isinstance(module, Quantized):
            raise SettingError(
                f"{name or 'the model'} is converted already, to {module.recipe}; expected a "
                "model as it was loaded; make one rule list of both"
            )
        recipe, reason, literal = _match(name, rules, used, protected)
        if recipe is not None:
            reason = _why_not(module, weights, recipe, ragged)
            if reason and literal:
                raise SettingError(f"{name} can't be {type(recipe).__name__}: {reason}")
            if reason:
                recipe = None
        if recipe is not None:
            convert_module(module, recipe, name, dtype, _ancestors(model, name))
        before = sum(weight.numel() * weight.element_size() for weight in weights.values())
        after = (
            before
            if recipe is None
            else sum(round(stored_bytes(w.shape, recipe)) for w in weights.values())
        )
        lines.append(
            ConvertedModule(
                name=name,
                shapes=tuple(tuple(weight.shape) for weight in weights.values()),
                recipe=recipe,
                reason=reason,
                bytes_before=before,
                bytes_after=after,
            )
        )
    join_fused(model)
    for number, (pattern, _) in enumerate(rules):
        if number not in used:
            warnings.warn(
                f"rule {pattern!r} matches no module with weights to round (or earlier rules took "
                "them); expected globs of module names such as '*.mlp.*'",
                stacklevel=2,
            )
    return ConversionReport(tuple(lines))


def _ancestors(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    parts = name.split(".")
    return tuple(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))


def _protected(model: nn.Module) -> dict[str, str]:
    """Linears that stay as they are unless named in full, and why."""
    reasons: dict[int, str] = {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        reasons[id(head)] = "the head stays high-precision unless a rule names it in full"
    why = "a router stays high-precision unless a rule names it in full"
    found = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if id(module) in reasons:
            found[name] = reasons[id(module)]
        elif last in ("gate", "router", "shared_expert_gate") or any(
            word in type(module).__name__ for word in ("Router", "TopkGate", "TopKGat")
        ):
            found |= {
                f"{name}.{inner}" if inner else name: why for inner, _ in module.named_modules()
            }
    return found


def _match(
    name: str,
    rules: Sequence[tuple[str, Recipe | None]],
    used: set[int],
    protected: dict[str, str],
) -> tuple[Recipe | None, str, bool]:
    """The recipe, why there is none, and whether a rule names the module in full."""
    for number, (pattern, recipe) in enumerate(rules):
        if not fnmatch.fnmatchcase(name, pattern):
            continue
        used.add(number)
        literal = name == pattern
        if name in protected and not literal:
            return None, protected[name], False
        return recipe, "" if recipe is not None else f"rule {pattern!r} keeps it", literal
    return None, "no rule matches", False


def _why_not(module: nn.Module, weights: dict[str, Tensor], recipe: Recipe, ragged: bool) -> str:
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} computes in its own way"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the module above reads its weight and does not call it"
    if any(module._parameters.get(name) is None for name in weights):
        return "its weight is computed from other parameters"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "its experts are stored transposed or interleaved, with blocks across projections"
    if isinstance(recipe, BlockFP8) and not isinstance(module, nn.Linear):
        unusual = [
            what
            for what in ("has_bias", "has_post_expert_norm", "_is_expert_parallel")
            if getattr(module, what, False)
        ]
        if not hasattr(module, "_apply_gate") or unusual:
            return f"its experts are not plain projections ({', '.join(unusual) or 'another form'})"
    for name, weight in weights.items():
        rows, columns = parts_of(name, weight)[0].shape[-2:]
        if isinstance(recipe, Int4) and columns % recipe.group_size:
            return f"{name} has {columns} columns, no multiple of group_size {recipe.group_size}"
        if isinstance(recipe, BlockFP8) and (rows % 128 or columns % 128):
            if not ragged:
                return f"{name} has {rows} x {columns}, no multiples of 128 (ragged=True rounds it)"
            if name == FUSED_HALVES and rows % 128:
                return f"{name} has halves of {rows} rows, and blocks of 128 would hold both"
    return ""
