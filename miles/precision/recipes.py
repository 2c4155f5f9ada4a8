"""What a tensor is rounded to: one frozen description for trainer, exporter and engine.

References:
    Block FP8: DeepSeek-V3, arXiv 2412.19437, section 3.3.
    MXFP8: OCP Microscaling Formats v1.0. NVFP4: NVIDIA Transformer Engine 2, NVFP4BlockScaling.
    INT4: Kimi-K2-Thinking's checkpoints, compressed-tensors `pack-quantized`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch

from miles.errors import SettingError

__all__ = [
    "MXFP8",
    "NVFP4",
    "BlockFP8",
    "Int4",
    "Recipe",
    "Role",
    "recipe_from_dict",
    "stored_bytes",
]

Role = Literal["weight", "activation", "gradient"]
Gemm = Literal["fp8", "bf16", "dequant"]


def _check(recipe: str, field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SettingError(f"{recipe}.{field} is {value!r}; expected one of {allowed}")


@dataclass(frozen=True, kw_only=True)
class _Serialisable:
    roles: ClassVar[tuple[Role, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `recipe_from_dict` reads them."""
        return {"recipe": type(self).__name__, **dataclasses.asdict(self)}

    def check_role(self, role: str) -> None:
        """Raise if tensors of this role are not what the recipe is for.

        Raises:
            SettingError: an unknown role, or one that the recipe doesn't round.
        """
        _check("the call", "role", role, get_args(Role))
        if role not in self.roles:
            raise SettingError(
                f"{type(self).__name__} got a tensor of role {role!r}; it rounds {self.roles} only"
            )


@dataclass(frozen=True, kw_only=True)
class BlockFP8(_Serialisable):
    """E4M3 codes with one scale for each 128 x 128 of a weight, or 1 x 128 of anything else.

    Example:
        >>> from miles.precision import BlockFP8
        >>> BlockFP8(scale="ue8m0").to_dict()["scale"]
        'ue8m0'
    """

    scale: Literal["fp32", "ue8m0"] = "fp32"
    """Any float32, or the power of two at or above it. Has to be that of the engine, or every block
    is rounded to another grid."""
    store: Literal["float32", "float8_e8m0fnu"] = "float32"
    """How power-of-two scales are stored. DeepSeek-V3.1 stores them as float32."""
    profile: Literal["te", "deepgemm", "sglang", "vllm", "hf"] = "te"
    """Whose arithmetic rounds activations; see `miles.precision.PROFILES`. Weights and gradients
    are always those of "te", Transformer Engine's, which floors nothing."""
    fprop: Gemm = "fp8"
    """The forward GEMM: in FP8, in bf16 without rounding, or in bf16 of the rounded operands."""
    dgrad: Gemm = "fp8"
    """The GEMM of the input's gradient."""
    wgrad: Gemm = "bf16"
    """The GEMM of the weight's gradient; in FP8 it is slower than bf16 for experts on Hopper."""

    roles: ClassVar[tuple[Role, ...]] = ("weight", "activation", "gradient")
    block: ClassVar[int] = 128

    def __post_init__(self) -> None:
        _check("BlockFP8", "scale", self.scale, ("fp32", "ue8m0"))
        _check("BlockFP8", "store", self.store, ("float32", "float8_e8m0fnu"))
        _check("BlockFP8", "profile", self.profile, ("te", "deepgemm", "sglang", "vllm", "hf"))
        for field in ("fprop", "dgrad", "wgrad"):
            _check("BlockFP8", field, getattr(self, field), get_args(Gemm))
        if self.store != "float32" and self.scale != "ue8m0":
            raise SettingError(
                f'BlockFP8 got store={self.store!r} with scale="fp32"; an E8M0 number holds powers '
                'of two only; expected scale="ue8m0", or store="float32"'
            )

    @classmethod
    def from_hf(cls, quantization_config: Mapping[str, Any], **changes: Any) -> Self:
        """The recipe of a checkpoint, from the `quantization_config` of its config.json.

        Args:
            quantization_config: with `quant_method: "fp8"`.
            **changes: fields that the file doesn't tell, such as `profile`.

        Raises:
            SettingError: another method, block size, format or activation scheme.

        Example:
            >>> from miles.precision import BlockFP8
            >>> config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
            >>> BlockFP8.from_hf(config | {"scale_fmt": "ue8m0"}).scale
            'ue8m0'
        """
        expected = {
            "quant_method": ("fp8",),
            "fmt": ("e4m3", None),
            "activation_scheme": ("dynamic", None),
        }
        for key, allowed in expected.items():
            _check("quantization_config", key, quantization_config.get(key), allowed)
        block = quantization_config.get("weight_block_size")
        if block is None or list(block) != [cls.block, cls.block]:
            raise SettingError(
                f"quantization_config.weight_block_size is {block}; expected [128, 128]; a scale "
                "for each tensor or channel is another recipe"
            )
        fmt = quantization_config.get("scale_fmt")
        _check("quantization_config", "scale_fmt", fmt, (None, "float", "ue8m0"))
        return cls(**{"scale": "ue8m0" if fmt == "ue8m0" else "fp32", **changes})


@dataclass(frozen=True, kw_only=True)
class Int4(_Serialisable):
    """Integers from -7 to 7 with one scale for each group along the last dimension of a weight.

    The scale is rounded to the dtype it is stored in before anything is divided by it, so what a
    trainer computes with is what the packed checkpoint holds; and rounding a rounded weight again
    changes nothing.

    Example:
        >>> from miles.precision import Int4
        >>> Int4(group_size=32).bits_per_weight
        4.5
    """

    group_size: int = 32
    """Weights that share a scale. Kimi-K2 has 32."""
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the scale is stored as, also that of a float32 weight."""
    divisor: float = 7.0
    """The scale is the largest magnitude divided by this."""
    lowest: int = -7
    """The smallest code."""

    roles: ClassVar[tuple[Role, ...]] = ("weight",)

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.group_size % 8:
            raise SettingError(
                f"Int4.group_size is {self.group_size}; expected a positive multiple of 8, the "
                "codes of an int32 (engines serve 32, 64 and 128)"
            )
        _check("Int4", "scale_dtype", self.scale_dtype, ("bfloat16", "float16", "float32"))
        _check("Int4", "(divisor, lowest)", (self.divisor, self.lowest), ((7.0, -7), (7.5, -8)))

    @classmethod
    def compressed_tensors(cls, group_size: int = 32) -> Self:
        """The rules of compressed-tensors and llm-compressor: divide by 7.5, codes from -8.

        They are a little more exact and not idempotent: about 86 % of the weights change when what
        was rounded is rounded again, so a model loaded from such a checkpoint and trained with
        `fake_quantize` starts from other weights than it was saved with.
        """
        return cls(group_size=group_size, divisor=7.5, lowest=-8)

    @property
    def idempotent(self) -> bool:
        """Whether rounding twice is rounding once."""
        return self.lowest == -7

    @property
    def bits_per_weight(self) -> float:
        """Storage, scales included."""
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        return 4 + 8 * dtype.itemsize / self.group_size


@dataclass(frozen=True, kw_only=True)
class MXFP8(_Serialisable):
    """E4M3 codes with a power-of-two scale for each 1 x 32, rounded up so that nothing clips."""

    roles: ClassVar[tuple[Role, ...]] = ("weight", "activation", "gradient")
    block: ClassVar[int] = 32


@dataclass(frozen=True, kw_only=True)
class NVFP4(_Serialisable):
    """E2M1 codes with an E4M3 scale for each 1 x 16, and one float32 scale for the whole tensor."""

    roles: ClassVar[tuple[Role, ...]] = ("weight", "activation", "gradient")
    block: ClassVar[int] = 16


Recipe = BlockFP8 | Int4 | MXFP8 | NVFP4
_BY_NAME: dict[str, type[Recipe]] = {c.__name__: c for c in (BlockFP8, Int4, MXFP8, NVFP4)}


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The inverse of a recipe's `to_dict`.

    Raises:
        SettingError: another recipe, or fields that it doesn't have.

    Example:
        >>> from miles.precision import Int4, recipe_from_dict
        >>> recipe_from_dict(Int4(group_size=128).to_dict())
        Int4(group_size=128, scale_dtype='bfloat16', divisor=7.0, lowest=-7)
    """
    fields = dict(values)
    name = fields.pop("recipe", None)
    _check("the dict", "recipe", name, tuple(_BY_NAME))
    recipe = _BY_NAME[str(name)]
    unknown = fields.keys() - {field.name for field in dataclasses.fields(recipe)}
    if unknown:
        raise SettingError(f"{name} has no field {sorted(unknown)}; from a newer version?")
    return recipe(**fields)


def stored_bytes(shape: Sequence[int], recipe: Recipe) -> float:
    """Codes and scales of a weight, as a checkpoint holds them.

    Args:
        shape: of two dimensions or more, the matrices last.
        recipe: what it is rounded to. Tails of a block have a scale of their own; INT4's tensors
            of two numbers that hold a shape aren't counted.

    Example:
        >>> from miles.precision import BlockFP8, Int4
        >>> stored_bytes((128, 256), BlockFP8()), stored_bytes((128, 256), Int4())
        (32776.0, 18432.0)
    """
    *batch, rows, columns = shape
    count, elements = math.prod(batch), math.prod(shape)
    if isinstance(recipe, Int4):
        return elements * recipe.bits_per_weight / 8
    if isinstance(recipe, BlockFP8):
        scales = math.ceil(rows / recipe.block) * math.ceil(columns / recipe.block)
        itemsize = getattr(torch, recipe.store).itemsize
        return float(elements + count * scales * itemsize)
    scales = count * rows * math.ceil(columns / recipe.block)
    return elements + scales if isinstance(recipe, MXFP8) else elements / 2 + scales + 4
