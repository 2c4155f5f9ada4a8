"""Whether a trainer and an engine round the same weights in the same way: asked before step 0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from miles.errors import SettingError
from miles.precision.recipes import MXFP8, NVFP4, BlockFP8, Int4, Recipe

__all__ = ["check_compatible"]


def check_compatible(
    trainer: Recipe | Mapping[str, Any],
    engine_config: Mapping[str, Any],
    *,
    modules: Iterable[str] | None = None,
) -> None:
    """Raise if an engine's config says anything else than the trainer does.

    Compared are the format, bits, block or group size, format of the scales, zero points and how
    activations are rounded, each where both tell; with a whole config from the trainer also which
    modules are left out. An entry of an ignore list that begins with "re:" is a pattern that has to
    match from the start of a name; any other is a module's name, or that of one around it, or the
    end of it. Norms and embeddings are not compared: nobody rounds them.

    Without `modules`, lists are compared entry by entry, which suffices where one of both names
    modules in full, as `quantization_config` does: each name has to match something in the other
    list, and so has an example of what a pattern matches.

    Args:
        trainer: a recipe, or what `quantization_config(model)` returned.
        engine_config: the "quantization_config" of the engine's checkpoint, or its whole
            config.json.
        modules: names of all linears and experts on disk; then lists are compared by which of
            these they leave out, and entries that engines read differently are named.

    Raises:
        SettingError: every difference, named; or a config of a method that isn't known here.

    Example:
        >>> from miles.precision import BlockFP8, Int4, check_compatible
        >>> engine = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        >>> check_compatible(BlockFP8(), engine)
        >>> check_compatible(BlockFP8(scale="ue8m0"), engine)
        Traceback (most recent call last):
        miles.errors.SettingError: trainer and engine don't round alike:
        - scale format: power of two in the trainer, float32 in the engine
        Expected ... the same in both...
    """
    ours = _of_recipe(trainer) if not isinstance(trainer, Mapping) else _read(trainer, "trainer")
    theirs = _read(engine_config, "engine")
    differences = _compare_schemes(ours, theirs)
    if isinstance(trainer, Mapping) and ours.schemes and theirs.schemes:
        if modules is None:
            differences += _compare_entries(ours.ignore, theirs.ignore)
        else:
            names = sorted(set(modules))
            differences += _compare_modules(ours.ignore, theirs.ignore, names)
            differences += _compare_targets(ours, theirs, names)
    if differences:
        lines = "\n".join(f"- {difference}" for difference in differences)
        raise SettingError(
            f"trainer and engine don't round alike:\n{lines}\n"
            "Expected formats, scales and ignored modules the same in both, or log-probs differ "
            "from the first step on: change the rules of convert_, or serve what `save` wrote"
        )


@dataclass(frozen=True)
class _Scheme:
    """How one group of modules is rounded, in the words of the errors."""

    format: str
    bits: int
    block: str
    scale_format: str
    symmetry: str
    activations: str


_LABELS = {
    "format": "format",
    "bits": "bits",
    "block": "block or group size",
    "scale_format": "scale format",
    "symmetry": "zero points",
    "activations": "activations",
}
assert [field.name for field in fields(_Scheme)] == list(_LABELS)


@dataclass(frozen=True)
class _Config:
    schemes: tuple[_Scheme, ...]
    """Each once."""
    ignore: tuple[str, ...] = ()
    targets: tuple[tuple[str, _Scheme], ...] = ()
    """Modules, patterns or classes and how they are rounded, in compressed-tensors' configs."""

    def of(self, name: str) -> _Scheme | None:
        """How a module is rounded; its name goes before a pattern, and that before its class."""
        if any(_matches(entry, name) for entry in self.ignore):
            return None
        for entry, scheme in sorted(self.targets, key=lambda target: target[0].startswith("re:")):
            if _matches(entry, name):
                return scheme
        rest = [scheme for entry, scheme in self.targets if entry == "Linear"]
        return rest[0] if rest else self.schemes[0] if len(self.schemes) == 1 else None


_UNKNOWN = "not told"
_E4M3, _E2M1, _INTEGER = "float e4m3", "float e2m1", "integer"
_NONE, _DYNAMIC = "not rounded", "8 bits, dynamic"


def _of_recipe(recipe: Recipe) -> _Config:
    if isinstance(recipe, Int4):
        group = f"groups of {recipe.group_size}"
        scheme = _Scheme(_INTEGER, 4, group, _UNKNOWN, "symmetric", _NONE)
    elif isinstance(recipe, BlockFP8):
        power = "power of two" if recipe.scale == "ue8m0" else "float32"
        scheme = _Scheme(_E4M3, 8, _block([128, 128]), power, "symmetric", _DYNAMIC)
    elif isinstance(recipe, MXFP8):
        scheme = _Scheme(_E4M3, 8, "groups of 32", "power of two", "symmetric", _DYNAMIC)
    else:
        assert isinstance(recipe, NVFP4)
        scheme = _Scheme(_E2M1, 4, "groups of 16", "e4m3", "symmetric", _UNKNOWN)
    return _Config((scheme,))


def _read(config: Mapping[str, Any], whose: str) -> _Config:
    """Of a quantization_config, or a config.json with one."""
    if "quant_method" not in config:
        inner = config.get("quantization_config") or config.get("compression_config") or {}
        config = inner if isinstance(inner, Mapping) else {}
    method = config.get("quant_method")
    if method is None:
        return _Config(())
    ignore: list[str] = []
    targets: tuple[tuple[str, _Scheme], ...] = ()
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        ignore += config.get(key) or []
    if method in ("fp8", "mxfp8"):
        schemes: tuple[_Scheme, ...] = (_read_fp8(config, method),)
    elif method == "compressed-tensors":
        groups = config.get("config_groups") or {}
        read = [(group, _read_group(group, whose)) for group in groups.values()]
        schemes = tuple(dict.fromkeys(scheme for _, scheme in read))
        targets = tuple((t, scheme) for group, scheme in read for t in group.get("targets") or [])
    elif method in ("modelopt", "modelopt_fp4") and config.get("quant_algo") == "NVFP4":
        schemes = _of_recipe(NVFP4()).schemes
    else:
        raise SettingError(
            f"the {whose}'s quant_method is {method!r} ({config.get('quant_algo')}); expected "
            "'fp8', 'mxfp8', 'compressed-tensors', or 'modelopt' with NVFP4; export the weights "
            "in one of these"
        )
    return _Config(schemes, tuple(dict.fromkeys(ignore)), targets)


def _read_fp8(config: Mapping[str, Any], method: str) -> _Scheme:
    block = config.get("weight_block_size") or ([1, 32] if method == "mxfp8" else None)
    power = method == "mxfp8" or config.get("scale_fmt") == "ue8m0"
    scheme = config.get("activation_scheme") or "dynamic"
    return _Scheme(
        format=f"float {config.get('fmt') or 'e4m3'}",
        bits=8,
        block=_block(block),
        scale_format="power of two" if power else "float32",
        symmetry="symmetric",
        activations=f"8 bits, {scheme}",
    )


def _block(block: Sequence[int] | None) -> str:
    if block is None:
        return "one scale a tensor"
    rows, columns = block
    return f"groups of {columns}" if rows == 1 else f"blocks of {rows} x {columns}"


def _read_group(group: Any, whose: str) -> _Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise SettingError(
            f"the {whose}'s config_groups hold {group!r}; expected the weights' settings, spelled "
            "out, in each; write them out"
        )
    bits, kind = int(weights.get("num_bits", 8)), weights.get("type", "int")
    strategy = weights.get("strategy")
    size = weights.get("group_size")
    if strategy == "block":
        block = _block(weights.get("block_structure"))
    else:
        fixed = {"channel": "one scale a row", "tensor": "one scale a tensor"}
        block = fixed.get(str(strategy), f"groups of {size}")
    if kind == "int":
        name, scale = _INTEGER, _UNKNOWN
    elif bits == 4:
        name, scale = _E2M1, "e4m3" if size == 16 else "power of two"
    else:
        power = "uint8" in str(weights.get("scale_dtype")) or (strategy == "group" and size == 32)
        name, scale = _E4M3, "power of two" if power else _UNKNOWN
    inputs = group.get("input_activations")
    if inputs is None:
        activations = _UNKNOWN if name == _E2M1 else _NONE
    else:
        dynamic = "static" if inputs.get("dynamic") is False else "dynamic"
        activations = _UNKNOWN if name == _E2M1 else f"{inputs.get('num_bits', 8)} bits, {dynamic}"
    symmetry = "symmetric" if weights.get("symmetric", True) else "asymmetric"
    return _Scheme(name, bits, block, scale, symmetry, activations)


def _compare_schemes(ours: _Config, theirs: _Config) -> list[str]:
    if not ours.schemes or not theirs.schemes:
        who = [name for name, c in (("trainer", ours), ("engine", theirs)) if not c.schemes]
        return [] if len(who) == 2 else [f"the {who[0]} rounds nothing, the other does"]
    if len(ours.schemes) == 1:
        pairs = [(ours.schemes[0], scheme) for scheme in theirs.schemes]
        return list(dict.fromkeys(line for pair in pairs for line in _differ(*pair)))
    found: list[str] = []
    for mine, others, me, other in (
        (ours.schemes, theirs.schemes, "trainer", "engine"),
        (theirs.schemes, ours.schemes, "engine", "trainer"),
    ):
        found += [
            f"the {me} has {_describe(scheme)}, nothing like it in the {other}"
            for scheme in mine
            if all(_differ(scheme, candidate) for candidate in others)
        ]
    return found


def _differ(ours: _Scheme, theirs: _Scheme) -> list[str]:
    found = []
    for field, label in _LABELS.items():
        a, b = getattr(ours, field), getattr(theirs, field)
        if a != b and _UNKNOWN not in (a, b):
            found.append(f"{label}: {a} in the trainer, {b} in the engine")
    return found


def _describe(scheme: _Scheme) -> str:
    return f"{scheme.format} of {scheme.bits} bits in {scheme.block}"


def _matches(entry: str, name: str) -> bool:
    """Whether an ignore list's entry covers a module."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), name) is not None
    return name == entry or name.startswith(entry + ".") or name.endswith("." + entry)


def _never_rounded(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "norm" in last or "embed" in last


def _compare_entries(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    return [
        *_unmatched(ours, theirs, "trainer", "engine"),
        *_unmatched(theirs, ours, "engine", "trainer"),
    ]


def _unmatched(entries: Sequence[str], others: Sequence[str], who: str, whom: str) -> list[str]:
    examples = [_example(other) for other in others]
    missing = []
    for entry in entries:
        name = _example(entry)
        covered = any(_matches(other, name) for other in others)
        covered |= any(_matches(entry, example) for example in examples)
        if not covered and not _never_rounded(name):
            missing.append(entry)
    if not missing:
        return []
    return [f"ignored modules: the {who} leaves out {_some(missing)}, the {whom} doesn't"]


def _example(entry: str) -> str:
    """A name that an entry covers, as far as that can be told of a pattern."""
    if not entry.startswith("re:"):
        return entry
    plain = entry.removeprefix("re:").replace(r"\d+", "0").strip("^$")
    return re.sub(r"\\(.)", r"\1", plain)


def _compare_modules(
    ours: Sequence[str], theirs: Sequence[str], modules: Sequence[str]
) -> list[str]:
    found = []
    kept = [{n for n in modules if any(_matches(e, n) for e in es)} for es in (ours, theirs)]
    for only, who, whom in (
        (kept[0] - kept[1], "trainer", "engine"),
        (kept[1] - kept[0], "engine", "trainer"),
    ):
        names = sorted(name for name in only if not _never_rounded(name))
        if names:
            found.append(
                f"ignored modules: the {who} leaves out {_some(names)}, the {whom} doesn't"
            )
    for entry in theirs:
        # Some engines compare the beginning of names, without regard to where a module's ends.
        also = [n for n in modules if n.startswith(entry) and n not in kept[1]]
        if also:
            found.append(
                f"ignored modules: {entry!r} of the engine is also the beginning of {_some(also)}, "
                "which some engines leave out then"
            )
    return found


def _compare_targets(ours: _Config, theirs: _Config, modules: Sequence[str]) -> list[str]:
    """Modules that both round, in different ways."""
    if len(ours.schemes) == 1 == len(theirs.schemes):
        return []  # said already
    found: dict[str, list[str]] = {}
    for name in modules:
        a, b = ours.of(name), theirs.of(name)
        if a is not None and b is not None and _differ(a, b):
            line = f"{_describe(a)} in the trainer and {_describe(b)} in the engine"
            found.setdefault(line, []).append(name)
    return [f"{_some(names)}: {line}" for line, names in found.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
