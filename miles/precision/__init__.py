"""One quantiser for trainer, exporter and engine: what was trained with is what is loaded."""

from miles.precision._fp8 import PROFILES
from miles.precision.compatibility import check_compatible
from miles.precision.exporting import export, quantization_config
from miles.precision.linears import grouped_linear, linear
from miles.precision.loading import LoadReport, ParityReport, load, verify_parity
from miles.precision.modules import (
    ConversionReport,
    ConvertedModule,
    QuantizedParameter,
    convert_,
    drop_cache,
    high_precision,
    quantized_parameters,
)
from miles.precision.quantize import QTensor, fake_quantize, quantize, quantize_pair
from miles.precision.recipes import (
    MXFP8,
    NVFP4,
    BlockFP8,
    Int4,
    Recipe,
    Role,
    recipe_from_dict,
)
from miles.precision.report import ModuleReading, QuantizationReport, quantization_report
from miles.precision.saving import save

__all__ = [
    "MXFP8",
    "NVFP4",
    "PROFILES",
    "BlockFP8",
    "ConversionReport",
    "ConvertedModule",
    "Int4",
    "LoadReport",
    "ModuleReading",
    "ParityReport",
    "QTensor",
    "QuantizationReport",
    "QuantizedParameter",
    "Recipe",
    "Role",
    "check_compatible",
    "convert_",
    "drop_cache",
    "export",
    "fake_quantize",
    "grouped_linear",
    "high_precision",
    "linear",
    "load",
    "quantization_config",
    "quantization_report",
    "quantize",
    "quantize_pair",
    "quantized_parameters",
    "recipe_from_dict",
    "save",
    "verify_parity",
]
