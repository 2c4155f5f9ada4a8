"""One quantiser for trainer, exporter and engine: what was trained with is what is loaded."""

from miles.precision._fp8 import PROFILES
from miles.precision.quantize import QTensor, fake_quantize, quantize
from miles.precision.recipes import (
    MXFP8,
    NVFP4,
    BlockFP8,
    Int4,
    Recipe,
    Role,
    recipe_from_dict,
)

__all__ = [
    "MXFP8",
    "NVFP4",
    "PROFILES",
    "BlockFP8",
    "Int4",
    "QTensor",
    "Recipe",
    "Role",
    "fake_quantize",
    "quantize",
    "recipe_from_dict",
]
