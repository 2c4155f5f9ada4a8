"""How a rounded weight lies in a checkpoint, for each recipe.

Names and dtypes, for a weight `X.weight` of `[N, K]`:

- `BlockFP8`: `X.weight` E4M3, `X.weight_scale_inv` float32 (or E8M0) `[ceil(N/128), ceil(K/128)]`,
  which multiplies, whatever its name says. (DeepSeek-V3)
- `Int4`: `X.weight_packed` int32 `[N, K/8]`, `X.weight_scale` `[N, K/group_size]`,
  `X.weight_shape` int64 `[2]`. (compressed-tensors `pack-quantized`; Kimi-K2 has an int32 shape,
  which is read too)
- `MXFP8`: `X.weight` E4M3, `X.weight_scale_inv` uint8 `[N, ceil(K/32)]`, the bits of E8M0. (SGLang)
- `NVFP4`: `X.weight` uint8 `[N, K/2]`, `X.weight_scale` E4M3 `[N, K/16]`, `X.weight_scale_2`
  float32 `[]`, which multiplies. (ModelOpt)

Where recipes are mixed the format is compressed-tensors', in which the scales of `BlockFP8` and
`MXFP8` are called `X.weight_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.errors import CheckpointError, SettingError, ShapeError
from miles.precision import _int4, _micro
from miles.precision._fp8 import E4M3
from miles.precision.quantize import QTensor
from miles.precision.recipes import MXFP8, NVFP4, BlockFP8, Int4, Recipe

__all__ = ["SUFFIXES", "Spec", "check", "mixed", "pack", "stored_as", "unpack"]

SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_shape",
)
"""Of the tensors that a weight may be stored in."""
_SCALES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Spec:
    """What a file's header tells of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_as(recipe: Recipe) -> Recipe:
    """The recipe less what doesn't show in a checkpoint, to tell which are stored alike."""
    if isinstance(recipe, BlockFP8):
        return BlockFP8(scale=recipe.scale, store=recipe.store)
    if isinstance(recipe, Int4):
        return Int4(group_size=recipe.group_size)
    return recipe


def mixed(recipes: Iterable[Recipe]) -> bool:
    """Whether the recipes need the format of compressed-tensors.

    Raises:
        SettingError: NVFP4 among others.
    """
    kinds = {stored_as(recipe) for recipe in recipes}
    if len(kinds) > 1 and any(isinstance(kind, NVFP4) for kind in kinds):
        raise SettingError(
            f"the model mixes {sorted(type(kind).__name__ for kind in kinds)}; expected NVFP4 "
            "alone: a checkpoint of several recipes stores the reciprocal of its global scale, "
            "which is another number; convert all layers to NVFP4 or none"
        )
    return len(kinds) > 1


def pack(q: QTensor, *, mixed: bool) -> dict[str, Tensor]:
    """The tensors of a rounded matrix, by the end of their names.

    Raises:
        ShapeError: a last dimension that NVFP4 blocks don't divide.
    """
    recipe = q.recipe
    if isinstance(recipe, Int4):
        return {
            "weight_packed": _int4.pack(q.codes),
            "weight_scale": q.scale,
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64, device=q.codes.device),
        }
    if isinstance(recipe, NVFP4):
        if q.shape[-1] % NVFP4.block:
            raise ShapeError(
                f"an NVFP4 weight has {q.shape[-1]} columns; expected a multiple of 16; leave it "
                "unquantised"
            )
        assert q.global_scale is not None
        return {
            "weight": _micro.pack_nvfp4(q.codes),
            "weight_scale": q.scale,
            "weight_scale_2": q.global_scale,
        }
    scale = q.scale
    if isinstance(recipe, MXFP8):
        scale = scale.view(torch.uint8)
    elif mixed:
        scale = scale.float()
    return {"weight": q.codes, "weight_scale" if mixed else "weight_scale_inv": scale}


def check(
    name: str, parts: Mapping[str, Spec], shape: tuple[int, ...], dtype: torch.dtype
) -> Recipe | None:
    """The recipe that a weight is stored in, told by its tensors; None if it isn't rounded.

    Args:
        name: of the weight, such as "lm_head.weight".
        parts: what the file holds of it, by the end of their names.
        shape: what the weight has to have.
        dtype: of the parameter; anything that isn't a float has to be stored in its own.

    Raises:
        CheckpointError: a scale that is missing, or one of another recipe; a wrong shape or dtype.
    """
    found = {key: f"{str(s.dtype)[6:]}{list(s.shape)}" for key, s in sorted(parts.items())}

    def wrong(expected: str) -> CheckpointError:
        return CheckpointError(
            f"{name}: got {found or 'nothing'}; expected {expected}, for a weight of "
            f"{list(shape)}; a checkpoint of another model, or incomplete: export it again"
        )

    weight = parts.get("weight")
    plain = _PLAIN if dtype.is_floating_point else (dtype,)
    if weight is not None and weight.dtype in plain and len(parts) == 1:
        if weight.shape != tuple(shape):
            raise wrong(f"shape {list(shape)}")
        return None
    if len(shape) == 2 and (kind := _KINDS.get(_signature(parts))) is not None:
        recipe, expected = kind(parts, shape)
        if all(parts[key].shape == size for key, size in expected.items()):
            return recipe
        raise wrong(f"{ {key: list(size) for key, size in expected.items()} }")
    if weight is not None and weight.dtype == E4M3 and len(parts) == 1:
        raise wrong("its scale beside it (`weight_scale_inv`): FP8 codes alone are not the weight")
    raise wrong("one unrounded tensor, or the tensors of BlockFP8, Int4, MXFP8 or NVFP4")


def unpack(recipe: Recipe, parts: Mapping[str, Tensor]) -> QTensor:
    """The inverse of `pack`, of what `check` let pass."""
    if isinstance(recipe, Int4):
        return QTensor(
            _int4.unpack(parts["weight_packed"]), parts["weight_scale"], recipe, "weight"
        )
    if isinstance(recipe, NVFP4):
        codes = _micro.unpack_nvfp4(parts["weight"])
        whole = parts["weight_scale_2"].reshape(())
        return QTensor(codes, parts["weight_scale"], recipe, "weight", whole)
    scale = parts["weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"]
    if isinstance(recipe, MXFP8):
        scale = scale.view(torch.float8_e8m0fnu)
    return QTensor(parts["weight"], scale, recipe, "weight")


Shape = tuple[int, ...]
Kind = Callable[[Mapping[str, Spec], Shape], tuple[Recipe, dict[str, Shape]]]


def _signature(parts: Mapping[str, Spec]) -> tuple[str, ...]:
    return tuple(sorted(f"{key} {_CLASSES.get(s.dtype, 'other')}" for key, s in parts.items()))


_CLASSES = {
    E4M3: "e4m3",
    torch.uint8: "uint8",
    torch.float8_e8m0fnu: "e8m0",
    torch.int32: "int32",
    torch.int64: "int64",
    **dict.fromkeys(_SCALES, "float"),
}


def _block_fp8(parts: Mapping[str, Spec], shape: Shape) -> tuple[Recipe, dict[str, Shape]]:
    scale = next(key for key in parts if key != "weight")
    blocks = tuple(-(-size // BlockFP8.block) for size in shape)
    power_of_two = parts[scale].dtype == torch.float8_e8m0fnu
    recipe = BlockFP8(scale="ue8m0", store="float8_e8m0fnu") if power_of_two else BlockFP8()
    # E8M0 bits may also be those of MXFP8, and then there are more of them.
    rows = (shape[0], -(-shape[1] // MXFP8.block))
    if power_of_two and parts[scale].shape == rows and rows != blocks:
        return MXFP8(), {"weight": shape, scale: rows}
    return recipe, {"weight": shape, scale: blocks}


def _mxfp8(parts: Mapping[str, Spec], shape: Shape) -> tuple[Recipe, dict[str, Shape]]:
    scale = next(key for key in parts if key != "weight")
    return MXFP8(), {"weight": shape, scale: (shape[0], -(-shape[1] // MXFP8.block))}


def _int4_kind(parts: Mapping[str, Spec], shape: Shape) -> tuple[Recipe, dict[str, Shape]]:
    scale = parts["weight_scale"]
    groups = scale.shape[-1] if len(scale.shape) == 2 else 0
    size = shape[1] // groups if groups and shape[1] % groups == 0 else 0
    size = size if size and size % 8 == 0 else 32
    dtype: Any = _SCALES[scale.dtype]  # one of the names that Int4 takes
    recipe = Int4(group_size=size, scale_dtype=dtype)
    return recipe, {
        "weight_packed": (shape[0], shape[1] // 8),
        "weight_scale": (shape[0], shape[1] // size),
        "weight_shape": (2,),
    }


def _nvfp4(parts: Mapping[str, Spec], shape: Shape) -> tuple[Recipe, dict[str, Shape]]:
    whole = parts["weight_scale_2"].shape
    return NVFP4(), {
        "weight": (shape[0], shape[1] // 2),
        "weight_scale": (shape[0], shape[1] // NVFP4.block),
        "weight_scale_2": whole if whole in ((), (1,)) else (),
    }


_KINDS: dict[tuple[str, ...], Kind] = {
    ("weight e4m3", "weight_scale_inv float"): _block_fp8,
    ("weight e4m3", "weight_scale float"): _block_fp8,
    ("weight e4m3", "weight_scale_inv e8m0"): _block_fp8,
    ("weight e4m3", "weight_scale_inv uint8"): _mxfp8,
    ("weight e4m3", "weight_scale uint8"): _mxfp8,
    ("weight_packed int32", "weight_scale float", "weight_shape int32"): _int4_kind,
    ("weight_packed int32", "weight_scale float", "weight_shape int64"): _int4_kind,
    ("weight uint8", "weight_scale e4m3", "weight_scale_2 float"): _nvfp4,
}
