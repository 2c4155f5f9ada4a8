"""Bytes of a model under each recipe, from its config alone: for an engine and for a trainer.

    python -m miles.precision.memory qwen3-235b-a22b --trainer
    python -m miles.precision.memory path/to/config.json --recipe bf16 int4

Parameters are counted on the meta device, so a model of a trillion takes a second and no memory.
Kinds: weights of linear layers and experts can be packed; embedding, head, routers, norms and the
rest stay in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from miles.errors import MissingExtraError, SettingError, UnsupportedModelError
from miles.precision._configs import BUILT_IN
from miles.precision.recipes import MXFP8, NVFP4, BlockFP8, Int4, Recipe, stored_bytes

__all__ = [
    "RECIPES",
    "Weight",
    "engine_bytes",
    "is_packed",
    "main",
    "stored_bytes",
    "table",
    "trainer_bytes",
    "weights_of",
    "weights_of_model",
]

Kind = Literal["linear", "experts", "embedding", "head", "router", "vector", "other"]
Scope = Literal["all", "experts"]
Float = Literal["float32", "bfloat16"]

RECIPES: dict[str, Recipe | None] = {
    "bf16": None,
    "fp8": BlockFP8(),
    "int4": Int4(group_size=32),
    "int4-128": Int4(group_size=128),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
}
"""Names on the command line."""

_ROUTERS = {"gate", "router", "shared_expert_gate"}
# Checkpoints whose architecture transformers has under another name.
_SAME_AS = {"kimi_k2": "deepseek_v3"}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter's name, shape and kind."""

    name: str
    """As in `named_parameters()`."""
    shape: tuple[int, ...]
    """Its shape; matrices of experts are the last two dimensions."""
    kind: Kind
    """What it is; "linear" and "experts" can be packed. "vector" is a norm or a bias."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def weights_of(config: str | Path | Mapping[str, Any]) -> list[Weight]:
    """Every parameter of a causal language model, by its config.

    Args:
        config: a config.json, a directory with one, the name of a built-in config, or its values.

    Raises:
        MissingExtraError: transformers is not installed.
        SettingError: neither a file nor a built-in name.
        UnsupportedModelError: transformers has no causal language model for the config.

    Example:
        >>> tiny = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 1}
        >>> weights = weights_of({**tiny, "vocab_size": 100, "tie_word_embeddings": True})
        >>> weights[0]
        Weight(name='model.embed_tokens.weight', shape=(100, 64), kind='embedding')
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error

    values = dict(_read(config))
    values.pop("quantization_config", None)
    values.pop("auto_map", None)
    model_type = str(values.pop("model_type", None))
    try:
        settings = AutoConfig.for_model(_SAME_AS.get(model_type, model_type), **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"the config has model_type {model_type!r}; expected a causal language model that "
            "transformers can build without remote code; or give the model itself to "
            "weights_of_model"
        ) from error
    return weights_of_model(model)


def weights_of_model(model: nn.Module) -> list[Weight]:
    """Every parameter of a model, once; a tied head is its embedding.

    Example:
        >>> from torch import nn
        >>> [(weight.name, weight.kind) for weight in weights_of_model(nn.Linear(2, 3))]
        [('weight', 'linear'), ('bias', 'vector')]
    """
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head, seen, found = find_head(), set(), []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            kind = "head" if module is head else _kind(prefix, module, parameter)
            found.append(Weight(name=full, shape=tuple(parameter.shape), kind=kind))
    return found


def _kind(prefix: str, module: nn.Module, parameter: nn.Parameter) -> Kind:
    where = f"{prefix} {type(module).__name__}".lower()
    if parameter.ndim < 2:
        return "vector"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if prefix.rpartition(".")[2] in _ROUTERS or "router" in type(module).__name__.lower():
        return "router"
    linear = isinstance(module, nn.Linear)
    if "experts" in where and "shared_expert" not in where and (linear or parameter.ndim == 3):
        return "experts"
    return "linear" if linear else "other"


def _read(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if str(config) in BUILT_IN:
        return BUILT_IN[str(config)]
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise SettingError(
            f"got {str(config)!r}; expected a config.json, a directory with one, or one of "
            f"{', '.join(BUILT_IN)}"
        )
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def is_packed(weight: Weight, recipe: Recipe | None, scope: Scope = "all") -> bool:
    """Whether the recipe rounds this weight: not if its last dimension is no multiple of a group.

    Example:
        >>> head = Weight(name="lm_head.weight", shape=(100, 64), kind="head")
        >>> is_packed(head, RECIPES["fp8"])
        False
    """
    kinds = ("experts",) if scope == "experts" else ("linear", "experts")
    if recipe is None or weight.kind not in kinds:
        return False
    return not isinstance(recipe, Int4) or weight.shape[-1] % recipe.group_size == 0


def engine_bytes(
    weights: Iterable[Weight], recipe: Recipe | None, *, scope: Scope = "all"
) -> dict[str, float]:
    """Weights as an engine holds them. The KV cache and buffers come on top.

    Args:
        weights: from `weights_of`.
        recipe: what is packed; None, nothing is.
        scope: "all" packs every linear layer and expert, "experts" experts only, which is how
            INT4 checkpoints of mixture-of-experts models are made.

    Returns:
        Bytes of "packed" and of "bf16" weights.

    Example:
        >>> weights = [Weight(name="up.weight", shape=(128, 128), kind="linear")]
        >>> engine_bytes(weights, RECIPES["fp8"])
        {'packed': 16388.0, 'bf16': 0.0}
    """
    out = {"packed": 0.0, "bf16": 0.0}
    for weight in weights:
        if recipe is not None and is_packed(weight, recipe, scope):
            out["packed"] += stored_bytes(weight.shape, recipe)
        else:
            out["bf16"] += 2.0 * weight.numel
    return out


def trainer_bytes(
    weights: Iterable[Weight],
    recipe: Recipe | None,
    *,
    scope: Scope = "all",
    master: Float = "float32",
    gradients: Float = "float32",
    moments: Float = "float32",
) -> dict[str, float]:
    """Weights, gradients and Adam's moments of a trainer, over all its ranks; no activations.

    Quantised copies are kept from one optimizer step to the next, beside the master weights: for
    FP8 and the micro formats one of rows for the forward pass and one of columns for the input's
    gradient, as `BlockFP8.fprop` and `.dgrad` say; for INT4 the bfloat16 values of the codes. So a
    recipe adds to a trainer's memory.

    Args:
        weights: from `weights_of`.
        recipe: what the forward pass computes with; None, bfloat16.
        scope: as for `engine_bytes`.
        master: what the optimizer updates. With "float32" there is a bfloat16 copy beside it, which
            FSDP holds for one layer at a time only.
        gradients: what gradients are accumulated in.
        moments: what both of Adam's moments are held in.

    Returns:
        Bytes of each part.

    Example:
        >>> weights = [Weight(name="up.weight", shape=(128, 128), kind="linear")]
        >>> sum(trainer_bytes(weights, None).values()) / 128**2
        18.0
        >>> trainer_bytes(weights, RECIPES["fp8"])["transposed copy"]
        16388.0
    """
    for name, value in (("master", master), ("gradients", gradients), ("moments", moments)):
        if value not in get_args(Float):
            raise SettingError(f"{name} is {value!r}; expected one of {get_args(Float)}")
    weights = list(weights)
    elements = float(sum(weight.numel for weight in weights))
    size = {name: getattr(torch, name).itemsize for name in get_args(Float)}
    out = {
        "master weights": elements * size[master],
        "bf16 copy": elements * 2 * (master != "bfloat16"),
        "gradients": elements * size[gradients],
        "Adam moments": elements * 2 * size[moments],
        "quantised copy": 0.0,
        "transposed copy": 0.0,
    }
    for weight in weights:
        if recipe is not None and is_packed(weight, recipe, scope):
            for part, more in _working_copies(weight, recipe).items():
                out[part] += more
    return out


def _working_copies(weight: Weight, recipe: Recipe) -> dict[str, float]:
    values = 2.0 * weight.numel
    if isinstance(recipe, Int4):
        return {"quantised copy": values}
    stored = stored_bytes(weight.shape, recipe)
    if not isinstance(recipe, BlockFP8):
        return {"quantised copy": stored, "transposed copy": stored}
    rounded = values * ("dequant" in (recipe.fprop, recipe.dgrad))
    return {
        "quantised copy": stored * (recipe.fprop == "fp8") + rounded,
        "transposed copy": stored * (recipe.dgrad == "fp8"),
    }


def table(
    weights: Collection[Weight],
    recipes: Sequence[str],
    *,
    parts: Literal["engine", "trainer"],
    **settings: Any,
) -> str:
    """Gigabytes (10^9 bytes) of each part, one line a recipe.

    Example:
        >>> weights = [Weight(name="up.weight", shape=(128_000, 128_000), kind="linear")]
        >>> print(table(weights, ["bf16", "int4"], parts="engine"))
        recipe  packed  bf16  total GB  times bf16
        bf16       0.0  32.8      32.8        1.00
        int4       9.2   0.0       9.2        0.28
    """
    count = engine_bytes if parts == "engine" else trainer_bytes
    base = sum(count(weights, None, **settings).values())
    lines: list[list[str]] = []
    for name in recipes:
        found = count(weights, RECIPES[name], **settings)
        total = sum(found.values())
        if not lines:
            lines.append(["recipe", *found, "total GB", "times bf16"])
        cells = [f"{value / 1e9:.1f}" for value in (*found.values(), total)]
        lines.append([name, *cells, f"{total / base:.2f}"])
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _counts(weights: Collection[Weight]) -> str:
    total = sum(weight.numel for weight in weights)
    lines = [["kind", "parameters", "share"]]
    for kind in get_args(Kind):
        elements = sum(weight.numel for weight in weights if weight.kind == kind)
        lines.append([kind, f"{elements:,}", f"{elements / total:.2%}"])
    return columns([*lines, ["total", f"{total:,}", "100.00%"]])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: prints parameters by kind and the tables that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m miles.precision.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL_CONFIG",
        default=list(BUILT_IN),
        help="a config.json, a directory with one, or one of "
        f"{', '.join(BUILT_IN)} (default: all of these)",
    )
    every = [name for name in RECIPES if name not in ("mxfp8", "nvfp4")]
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=every)
    parser.add_argument("--trainer", action="store_true", help="the trainer only")
    parser.add_argument("--engine", action="store_true", help="the engine only")
    parser.add_argument(
        "--scope",
        choices=get_args(Scope),
        default="all",
        help="what is packed: linear layers and experts, or experts only",
    )
    for name in ("master", "gradients", "moments"):
        parser.add_argument(f"--{name}", choices=get_args(Float), default="float32")
    options = parser.parse_args(arguments)
    both = options.trainer == options.engine
    for model in options.models:
        weights = weights_of(model)
        blocks = [f"{model}\n\n{_counts(weights)}"]
        if options.engine or both:
            found = table(weights, options.recipe, parts="engine", scope=options.scope)
            blocks.append(f"engine, weights only\n{found}")
        if options.trainer or both:
            settings = {name: getattr(options, name) for name in ("master", "gradients", "moments")}
            found = table(weights, options.recipe, parts="trainer", scope=options.scope, **settings)
            blocks.append(f"trainer, all ranks together, no activations\n{found}")
        sys.stdout.write("\n\n".join(blocks) + "\n\n")


if __name__ == "__main__":
    main()
