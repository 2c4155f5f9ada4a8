"""Which backend multiplies block-FP8 operands, and why the others don't.

`auto` takes the first of `BACKENDS` that can run a GEMM. On CUDA, where it has to take one that
is no faster than bf16, it warns once with the reasons; a backend asked for by name raises instead.

Sources:
    DeepGEMM, README and csrc/apis/gemm.hpp; PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp;
    cuBLAS, "1D and 128x128 2D block scaling for FP8 data types".
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from miles.errors import SettingError
from miles.precision.recipes import BlockFP8

__all__ = ["BACKENDS", "Capability", "Gemm", "choose", "explain", "refusal"]

Kind = Literal["fprop", "dgrad", "wgrad"]


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One multiplication: `[rows, depth]` with `[columns, depth]`, summed over the depth."""

    kind: Kind
    """y = x W^T, dx = dy W or dW = dy^T x."""
    rows: int
    """Of the result; tokens, but for wgrad."""
    columns: int
    """Of the result."""
    depth: int
    """What is summed over; tokens, for wgrad."""
    dtype: torch.dtype
    """Of activations and gradients."""
    device: torch.device
    """Where."""
    experts: bool = False
    """Whether each expert has a weight and rows of its own."""


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a backend can multiply."""

    fast: bool
    """Whether it is faster than a bf16 GEMM."""
    scales: str
    """The layout in which it reads scales; `linear` brings them into it and checks it."""
    sm90: bool = False
    """It needs a Hopper GPU (compute capability 9.0)."""
    sm80: bool = False
    """It needs a CUDA GPU of compute capability 8.0 or later."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    """Of activations and gradients."""
    depth: int = 1
    """What the depth has to be a multiple of; tokens are padded to it."""
    width: int = 1
    """What the result's features have to be a multiple of."""
    experts: tuple[Kind, ...] = ("fprop", "dgrad", "wgrad")
    """Which GEMMs it has for experts."""


BACKENDS: dict[str, Capability] = {
    "deepgemm": Capability(
        fast=True,
        scales="rows: float32 [M, K/128], column by column, each of a multiple of 4; tiles: any",
        sm90=True,
        dtypes=(torch.bfloat16,),
        depth=128,
        width=16,
        experts=("fprop", "dgrad"),
    ),
    "scaled_mm": Capability(
        fast=True,
        scales="rows: float32 [M, K/128] of strides (1, M); tiles: [L, N/128] of strides (1, L), "
        "L = K/128 rounded up to a multiple of 4",
        sm90=True,
        dtypes=(torch.bfloat16,),
        depth=128,
        width=16,
        experts=(),
    ),
    "triton": Capability(
        fast=False,
        scales="rows: float32 [M, K/128]; tiles: [N/128, K/128]; any strides",
        sm80=True,
    ),
    "dequant_bf16": Capability(fast=False, scales="any"),
    "reference": Capability(fast=False, scales="any"),
}
"""Backends in the order in which `auto` tries them on CUDA; elsewhere it is `reference`."""


def refusal(name: str, gemm: Gemm) -> str | None:
    """Why a backend can't run a GEMM; None if it can.

    Example:
        >>> from miles.precision.backends import Gemm, refusal
        >>> gemm = Gemm(kind="fprop", rows=8, columns=256, depth=256, dtype=torch.bfloat16,
        ...             device=torch.device("cpu"))
        >>> refusal("scaled_mm", gemm)
        'the tensors are on cpu; it needs a Hopper GPU'
    """
    able = BACKENDS[name]
    if reason := _unavailable(name, gemm.device):
        return reason
    if gemm.dtype not in able.dtypes:
        return f"x is {gemm.dtype}; it computes in {', '.join(map(str, able.dtypes))}"
    if gemm.experts and gemm.kind not in able.experts:
        return f"it has no {gemm.kind} of experts"
    wgrad = gemm.kind == "wgrad"
    if not wgrad and gemm.depth % able.depth:
        return f"it sums over {gemm.depth} features; expected a multiple of {able.depth}"
    for features in (gemm.rows, gemm.columns) if wgrad else (gemm.columns,):
        if features % able.width:
            return f"the result has {features} features; expected a multiple of {able.width}"
    return None


def _unavailable(name: str, device: torch.device) -> str | None:
    able = BACKENDS[name]
    if (able.sm90 or able.sm80) and device.type != "cuda":
        what = "a Hopper GPU" if able.sm90 else "a CUDA GPU"
        return f"the tensors are on {device.type}; it needs {what}"
    if able.sm90 and (reason := _without_sm90(device)):
        return reason
    if able.sm80 and (reason := _without_sm80(device)):
        return reason
    if name == "deepgemm" and isinstance(reason := deep_gemm(), str):
        return reason
    if name == "scaled_mm":
        return _without_scaled_mm()
    return _without_triton() if name == "triton" else None


def choose(backend: str, gemm: Gemm) -> str:
    """The backend that runs a GEMM.

    Raises:
        SettingError: an unknown name, or a backend asked for by name that can't run this GEMM.
    """
    check_name(backend)
    if backend != "auto":
        if reason := refusal(backend, gemm):
            raise SettingError(f"backend={backend!r} can't run {_sizes(gemm)}: {reason}")
        return backend
    if gemm.device.type != "cuda":
        return "reference"
    name, _, refused = _automatic(gemm)
    if not BACKENDS[name].fast:
        reasons = "; ".join(f"{other}: {reason}" for other, reason in refused.items())
        warn_once(f"FP8 {_sizes(gemm)} runs as {name}, no faster than bf16. {reasons}")
    return name


def explain(
    recipe: BlockFP8,
    M: int,
    N: int,
    K: int,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    experts: bool = False,
) -> str:
    """Which backend `auto` takes for each of the three GEMMs, and why not the others.

    Args:
        recipe: of the layer.
        M: tokens.
        N: features out.
        K: features in.
        device: where.
        dtype: of activations and gradients.
        experts: for `grouped_linear`.

    Example:
        >>> from miles.precision import BlockFP8
        >>> from miles.precision.backends import explain
        >>> print(explain(BlockFP8(), 8, 256, 256, "cpu").splitlines()[0])
        fprop fp8: reference, the backend of the CPU
    """
    where = torch.device(device)
    sizes: dict[Kind, tuple[int, int, int]] = {
        "fprop": (M, N, K),
        "dgrad": (M, K, N),
        "wgrad": (N, K, M),
    }
    lines = []
    for kind, (rows, columns, depth) in sizes.items():
        mode = getattr(recipe, kind)
        if mode != "fp8":
            what = "unrounded" if mode == "bf16" else "dequantised"
            lines.append(f"{kind} {mode}: a plain GEMM of {what} operands, in x's dtype")
            continue
        gemm = Gemm(
            kind=kind,
            rows=rows,
            columns=columns,
            depth=depth,
            dtype=dtype,
            device=where,
            experts=experts,
        )
        name, why, refused = _automatic(gemm)
        lines.append(f"{kind} fp8: {name}, {why}")
        lines += [f"  not {other}: {reason}" for other, reason in refused.items()]
    return "\n".join(lines)


def _automatic(gemm: Gemm) -> tuple[str, str, dict[str, str]]:
    """What `auto` takes, why, and why not the backends before it."""
    refused = {}
    for name in BACKENDS:
        reason = refusal(name, gemm)
        if reason is None:
            break
        refused[name] = reason
    if gemm.device.type != "cuda":
        return "reference", f"the backend of the {gemm.device.type.upper()}", refused
    why = "the first that can run it"
    return name, why if BACKENDS[name].fast else f"{why}; no faster than bf16", refused


def check_name(backend: str) -> None:
    """Raise SettingError unless `backend` is `auto` or a key of `BACKENDS`."""
    if backend != "auto" and backend not in BACKENDS:
        raise SettingError(f"backend is {backend!r}; expected 'auto' or one of {list(BACKENDS)}")


@functools.cache
def deep_gemm() -> Any:
    """The package, or why it can't be had."""
    if importlib.util.find_spec("deep_gemm") is None:
        return "the package deep_gemm is not installed (pip install sgl-deep-gemm)"
    try:
        return importlib.import_module("deep_gemm")
    except Exception as error:  # it looks for a compiler and a driver when it is imported
        return f"importing deep_gemm failed: {type(error).__name__}: {error}"


def has_fp8_cores(device: torch.device) -> bool:
    """Whether it is a CUDA GPU that multiplies FP8: Ada, Hopper and later."""
    return device.type == "cuda" and _capability(device) >= (8, 9)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where there is no CUDA."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def _without_sm80(device: torch.device) -> str | None:
    capability = _capability(device)
    if capability >= (8, 0):
        return None
    if capability == (0, 0):
        return "there is no CUDA device; it needs one"
    found = ".".join(map(str, capability))
    return f"{device} has compute capability {found}; it needs 8.0, an Ampere GPU, or later"


@functools.cache
def _without_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with torch for CUDA)"
    return None


@functools.cache
def _without_sm90(device: torch.device) -> str | None:
    capability = _capability(device)
    if capability == (0, 0):
        return "there is no CUDA device; it needs a Hopper GPU"
    if capability == (9, 0):
        return None
    found = ".".join(map(str, capability))
    return f"{device} has compute capability {found}; it needs 9.0, a Hopper GPU"


@functools.cache
def _without_scaled_mm() -> str | None:
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; 2.10 and later do"
    version = torch.version.cuda or "0.0"
    if tuple(int(part) for part in version.split(".")[:2]) < (12, 9):
        return f"torch was built for CUDA {version}; it needs 12.9"
    return None


def _sizes(gemm: Gemm) -> str:
    """T stands for tokens, which change from call to call: a warning comes once a layer size."""
    of = " of experts" if gemm.experts else ""
    wgrad = gemm.kind == "wgrad"
    rows, depth = (gemm.rows, "T") if wgrad else ("T", gemm.depth)
    return f"{gemm.kind}{of} [{rows}, {depth}] x [{gemm.columns}, {depth}]^T"


@functools.cache
def warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)
