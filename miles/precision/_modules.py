"""Modules that compute with rounded weights, and keep their parameters as they are.

A converted module has a class of its own, derived from the one it had; names, shapes, dtypes and
values of its parameters stay, so optimizers, `state_dict` and FSDP2 see what they saw.

Shapes: T tokens, D features, K experts a token, E experts; linears `[N, K]`; fused experts
`[E, N, K]`, where the N of `gate_up_proj` are gate and up.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.errors import SettingError
from miles.precision._kept import Kept, Look, count_steps
from miles.precision.linears import NOTHING, Cached, apply
from miles.precision.quantize import (
    QTensor,
    _encode,
    _encode_pair,
    _fake,
    _quantize_weight,
)
from miles.precision.recipes import NVFP4, BlockFP8, Recipe

__all__ = [
    "Quantized",
    "QuantizedParameter",
    "convert_module",
    "drop_cache",
    "high_precision",
    "join_fused",
    "parts_of",
    "quantized_parameters",
    "round_parts",
    "weights_of",
]

_Made = TypeVar("_Made")
EXPERTS = ("gate_up_proj", "up_proj", "down_proj")
FUSED_HALVES = "gate_up_proj"


@dataclass(frozen=True)
class QuantizedParameter:
    """A weight of a converted module."""

    name: str
    """Of the parameter in the model."""
    parameter: nn.Parameter
    """The master weight."""
    module: nn.Module
    """Whose it is."""
    recipe: Recipe
    """What it is rounded to."""
    dtype: torch.dtype
    """What it is rounded from: its own, or that of its copy in the forward pass."""

    def parts(self) -> tuple[QTensor, ...]:
        """What the forward pass computes with: one tensor, or gate and up of fused experts.

        Raises:
            NonFiniteError: NaN or infinity, with the parameter's name.
        """
        return round_parts(self, self.parameter.detach().to(self.dtype))


def round_parts(q: QuantizedParameter, seen: Tensor) -> tuple[QTensor, ...]:
    """`q.parts()`, of the parameter's numbers as a forward pass sees them."""
    largest = None
    if isinstance(q.module, Quantized):
        largest = q.module._largest(seen, q.module._others())
    parts = parts_of(q.name.rpartition(".")[2], seen)
    return tuple(_quantize_weight(part, q.recipe, q.name, largest) for part in parts)


def quantized_parameters(model: nn.Module) -> Iterator[QuantizedParameter]:
    """The weights that a model rounds, with their names."""
    for prefix, module in model.named_modules():
        if isinstance(module, Quantized):
            for name in weights_of(module):
                parameter = module._parameters[name]
                assert parameter is not None
                full = f"{prefix}.{name}" if prefix else name
                dtype = module._dtype or parameter.dtype
                yield QuantizedParameter(full, parameter, module, module.recipe, dtype)


def drop_cache(model: nn.Module) -> None:
    """Forget rounded weights, after a change that torch does not count (through `.data`)."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.weights_changed()


@contextlib.contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Compute with the master weights inside, as if nothing had been converted."""
    modules = [module for module in model.modules() if isinstance(module, Quantized)]
    before = [module._rounding for module in modules]
    try:
        for module in modules:
            module._rounding = False
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module._rounding = was


class Quantized(nn.Module):
    """What converted modules have in common."""

    recipe: Recipe
    _path: str
    _dtype: torch.dtype | None
    _rounded: Kept
    _rounding: bool
    _above: tuple[weakref.ref[nn.Module], ...]
    _together: tuple[QuantizedLinear, ...]

    def weights_changed(self) -> None:
        """Forget what was made of the weights; for who writes them without PyTorch's knowing."""
        self._rounded.clear()

    def _keep(
        self, weight: Tensor, name: str, new: Callable[[Look], _Made], *others: Tensor
    ) -> _Made:
        """What `new` makes of a weight and others, once for each version of them."""
        made: _Made | None = self._rounded.of(name, (weight, *others))
        if made is None:
            full = f"{self._path}.{name}" if self._path else name
            root = (self._above[0]() if self._above else None) or self
            made = self._rounded.keep(name, (weight, *others), full, root, new)
        return made

    def _codes(self, weight: Tensor, name: str) -> Cached:
        """What the GEMMs of block FP8 need not make in every call, if anything is kept."""
        recipe = self.recipe
        assert isinstance(recipe, BlockFP8)
        if self._keeps_nothing(weight):
            return NOTHING
        backward = weight.is_cuda and recipe.dgrad == "fp8" and torch.is_grad_enabled()

        def new(look: Look) -> list[Cached]:
            seen = weight.detach().to(self._dtype or weight.dtype)
            if backward:
                one, turned = _encode_pair(seen, recipe, "weight")
                made: Cached = (one.codes, one.scale, turned.codes, turned.scale)
            else:
                one = _encode(seen, recipe, "weight")
                made = (one.codes, one.scale, None, None)
            look(one.scale, seen)
            return [made]

        kept = self._keep(weight, name, new)
        codes, scale, turned_codes, _ = kept[0]
        if backward and turned_codes is None and codes is not None and scale is not None:
            kept[0] = (codes, scale, codes.mT.contiguous(), scale.mT.contiguous())
        return kept[0]

    def _keeps_nothing(self, *weights: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return True
        for weight in weights:
            if not isinstance(weight, nn.Parameter) or weight.is_inference():
                return True
        # A rank that keeps a gathered weight, rounded, has not sharded it.
        for ref in self._above:
            kind: Any = type(ref())  # a class, which has a hash, whatever its objects have
            if _shards(kind):
                return True
        return False

    def _check_dtype(self, weight: Tensor, given: Tensor | None) -> None:
        """Raise unless what is rounded here is what the exporter rounds."""
        dtype, kind = self._dtype or weight.dtype, weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        if autocast and torch.get_autocast_dtype(kind) != dtype:
            raise SettingError(
                f"{self._path} runs under autocast to {torch.get_autocast_dtype(kind)} and rounds "
                f"{dtype}, other numbers; expected convert_(..., dtype=torch.bfloat16), say"
            )
        if given is not None and not autocast and given.dtype != dtype:
            raise SettingError(
                f"{self._path} got {given.dtype} and rounds weights of {dtype}, other numbers; "
                f"expected {dtype}, or convert_(..., dtype={given.dtype})"
            )

    def _fake(self, name: str, weight: Tensor) -> Tensor:
        """The rounded weight, with the master weight's gradient."""
        self._check_dtype(weight, None)
        others = self._others()

        def new(look: Look) -> Tensor:
            seen = weight.detach().to(self._dtype or weight.dtype)
            largest = self._largest(seen, others)
            parts = []
            for part in parts_of(name, seen):
                rounded, scale = _fake(part, self.recipe, "weight", largest)
                look(scale, part)
                parts.append(rounded)
            return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

        # Where nothing is kept, NaN is not looked for: it comes out of the forward pass.
        nothing = self._keeps_nothing(weight, *others)
        rounded = new(lambda *_: None) if nothing else self._keep(weight, name, new, *others)
        out: Tensor = _Through.apply(weight, rounded)
        return out

    def _others(self) -> tuple[Tensor, ...]:
        """Weights of other modules that are under one global scale with this one's."""
        return tuple(module.weight for module in self._together if module is not self)

    def _largest(self, seen: Tensor, others: tuple[Tensor, ...]) -> Tensor | None:
        """The largest magnitude under the global scale of `NVFP4`, of numbers as they are seen."""
        if not isinstance(self.recipe, NVFP4):
            return None
        found = [seen.abs().amax()]
        for other in others:
            amax: Any = other.detach().abs().amax()
            amax = amax.full_tensor() if hasattr(amax, "full_tensor") else amax  # under FSDP2
            found.append(amax.to(seen))
        return torch.stack(found).amax()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_rounded": Kept(), "_above": ()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes of converted modules are made when they are needed, in a loading process too.
        return _empty, (_base_of(type(self)),), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        above = [one for one in (ref() for ref in self._above) if one is not None]
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._above = tuple(weakref.ref(memo[id(one)]) for one in above if id(one) in memo)
        return copied


class _Through(torch.autograd.Function):
    """The second tensor, with the gradient going to the first, in its dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class QuantizedLinear(Quantized, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self._rounding and isinstance(self.recipe, BlockFP8):
            self._check_dtype(weight, input)
            cached = self._codes(weight, "weight")
            return apply(input, weight, cached, None, self.recipe, bias=self.bias)
        weight = self._fake("weight", weight) if self._rounding else weight
        out: Tensor = F.linear(input, weight, self.bias)
        return out


class QuantizedExperts(Quantized):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._rounding:
            return super().forward(*args, **kwargs)
        if isinstance(self.recipe, BlockFP8):
            return self._in_fp8(*args, **kwargs)
        names = list(weights_of(self))
        # An engine's thread and a trainer's may be here at once.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _HIDING:
            try:
                for name in names:
                    # An attribute of the instance hides the parameter of that name.
                    vars(self)[name] = self._fake(name, getattr(self, name))
                return super().forward(*args, **kwargs)
            finally:
                for name in names:
                    vars(self).pop(name, None)

    def _in_fp8(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Rows sorted by expert, two grouped GEMMs, and a weighted sum over a token's experts."""
        module: Any = self
        topk = ids_TK.shape[-1]
        sorted_ids, order = ids_TK.flatten().sort(stable=True)
        experts = torch.arange(module.num_experts, device=ids_TK.device)
        ends_E = torch.searchsorted(sorted_ids, experts, right=True)
        rows = self._grouped(
            "gate_up_proj" if module.has_gate else "up_proj", hidden_TD[order // topk], ends_E
        )
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        rows = self._grouped("down_proj", rows, ends_E)
        rows = rows * weights_TK.flatten()[order, None]
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        out: Tensor = rows[back].unflatten(0, ids_TK.shape).sum(1).to(hidden_TD.dtype)
        return out

    def _grouped(self, name: str, rows: Tensor, ends_E: Tensor) -> Tensor:
        assert isinstance(self.recipe, BlockFP8)
        weight = getattr(self, name)
        self._check_dtype(weight, rows)
        return apply(rows, weight, self._codes(weight, name), ends_E, self.recipe)


_HIDING = threading.RLock()
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
"""By the class that a module had."""


def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        kind = QuantizedLinear if issubclass(base, nn.Linear) else QuantizedExperts
        _CLASSES[base] = type(f"Quantized{base.__name__}", (kind, base), {})
    return _CLASSES[base]


def _base_of(kind: type[nn.Module]) -> type[nn.Module]:
    return next(base for base, made in _CLASSES.items() if made in kind.__mro__)


def _empty(base: type[nn.Module]) -> nn.Module:
    """A converted module without its state, for `pickle`."""
    count_steps()
    kind = _class_of(base)
    return kind.__new__(kind)


@functools.cache
def _shards(kind: type) -> bool:
    names = {one.__name__ for one in kind.__mro__}
    return not names.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))


def convert_module(
    module: nn.Module,
    recipe: Recipe,
    path: str,
    dtype: torch.dtype | None,
    above: tuple[nn.Module, ...],
) -> None:
    count_steps()
    module.__class__ = _class_of(type(module))
    vars(module).update(
        recipe=recipe,
        _path=path,
        _dtype=dtype,
        _rounded=Kept(),
        _rounding=True,
        _above=tuple(weakref.ref(one) for one in (*above, module)),
        _together=(),
    )


_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears of one module that engines load as one, with one global scale."""


def join_fused(model: nn.Module) -> None:
    """Have NVFP4 linears that engines fuse share a global scale."""
    for module in model.modules():
        for names in _FUSED:
            found = [module._modules.get(name) for name in names]
            members = tuple(
                one
                for one in found
                if isinstance(one, QuantizedLinear) and isinstance(one.recipe, NVFP4)
            )
            for member in members:
                member._together = members


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a linear, or of fused experts: parameters of three dimensions."""
    if isinstance(module, nn.Linear):
        return {"weight": module.weight}
    found: dict[str, Tensor] = {}
    for name in EXPERTS:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.ndim == 3:
            found[name] = parameter
    return found


def parts_of(name: str, weight: Tensor) -> tuple[Tensor, ...]:
    """A weight as checkpoints have it: gate and up apart, so that blocks begin with each."""
    return weight.chunk(2, -2) if name == FUSED_HALVES else (weight,)
