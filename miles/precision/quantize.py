"""Rounding a tensor to a recipe: `quantize` for what is stored, `fake_quantize` to train through.

Both are one definition: `fake_quantize(w, r)` is bitwise `quantize(w, r).dequantize(w.dtype)`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from miles.errors import DtypeError, MissingExtraError, NonFiniteError, SettingError, ShapeError
from miles.precision import _fp8, _int4, _micro
from miles.precision.recipes import MXFP8, NVFP4, BlockFP8, Int4, Recipe, Role

__all__ = ["QTensor", "fake_quantize", "quantize"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Backend = Literal["auto", "reference", "triton"]


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor rounded to a recipe."""

    codes: Tensor
    """In the shape of the tensor: float8_e4m3fn, int8 (`Int4`) or uint8 from 0 to 15 (`NVFP4`)."""
    scale: Tensor
    """What codes are multiplied by, one number a block."""
    recipe: Recipe
    """What the tensor was rounded to."""
    role: Role
    """What kind of tensor it is, on which the shape of a block depends."""
    global_scale: Tensor | None = None
    """`NVFP4`: one float32 that multiplies all scales; else None."""

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for, rounded once to `dtype`.

        Example:
            >>> import torch
            >>> from miles.precision import Int4, quantize
            >>> quantize(torch.tensor([[3.5, -7.0] * 4]), Int4(group_size=8)).dequantize()[0, :2]
            tensor([ 4., -7.])
        """
        if isinstance(self.recipe, Int4):
            return _int4.decode(self.codes, self.scale, self.recipe, dtype)
        if isinstance(self.recipe, BlockFP8):
            return _fp8.decode(self.codes, self.scale, self.recipe, self.role).to(dtype)
        if isinstance(self.recipe, MXFP8):
            return _micro.decode_mxfp8(self.codes, self.scale).to(dtype)
        assert self.global_scale is not None
        return _micro.decode_nvfp4(self.codes, self.scale, self.global_scale).to(dtype)


def quantize(
    tensor: Tensor,
    recipe: Recipe,
    *,
    role: Role = "weight",
    name: str | None = None,
    backend: Backend = "auto",
) -> QTensor:
    """Round a tensor to a recipe.

    Args:
        tensor: bfloat16, float16 or float32, `[..., K]`; a block-FP8 weight has two dimensions or
            more, and each matrix of the last two has its own blocks (fused experts).
        recipe: what to round to.
        role: a weight, an activation or a gradient.
        name: named in errors.
        backend: "reference", plain PyTorch; "triton", for `BlockFP8` on CUDA, with the same bits;
            "auto", Triton where it applies and is installed.

    Raises:
        NonFiniteError: NaN or infinity.
        SettingError: the recipe doesn't round tensors of this role, or Triton was asked for where
            it doesn't apply.
        DtypeError: another dtype.
        ShapeError: too few dimensions, or a last one that `Int4` groups don't divide.

    Example:
        >>> import torch
        >>> from miles.precision import BlockFP8, quantize
        >>> q = quantize(torch.full((256, 130), 2.0), BlockFP8())
        >>> q.scale.shape, bool((q.dequantize() == 2).all())
        (torch.Size([2, 2]), True)
    """
    recipe.check_role(role)
    _check(tensor, recipe, role, name)
    return _encode(tensor.detach(), recipe, role, backend)


def fake_quantize(
    tensor: Tensor, recipe: Recipe, *, role: Role = "weight", name: str | None = None
) -> Tensor:
    """The numbers that a quantised tensor holds, in the tensor's dtype, to train through.

    The gradient passes as it is (straight-through): rounding has none, and a clipped code is the
    nearest one of its block, so nothing is masked.

    Args:
        tensor: as for `quantize`.
        recipe: what to round to.
        role: a weight, an activation or a gradient.
        name: named in errors.

    Raises:
        NonFiniteError, SettingError, DtypeError, ShapeError: as `quantize`.

    Example:
        >>> import torch
        >>> from miles.precision import Int4, fake_quantize
        >>> weight = torch.linspace(-1, 1, 8).view(1, 8).requires_grad_()
        >>> fake_quantize(weight, Int4(group_size=8)).sum().backward()
        >>> weight.grad
        tensor([[1., 1., 1., 1., 1., 1., 1., 1.]])
    """
    recipe.check_role(role)
    _check(tensor, recipe, role, name)
    out: Tensor = _StraightThrough.apply(tensor, recipe, role)
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, recipe: Recipe, role: Role) -> Tensor:
        return _encode(tensor, recipe, role, "auto").dequantize(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _encode(tensor: Tensor, recipe: Recipe, role: Role, backend: Backend) -> QTensor:
    whole = None
    triton = _use_triton(tensor, recipe, backend)
    if isinstance(recipe, Int4):
        codes, scale = _int4.encode(tensor, recipe)
    elif isinstance(recipe, BlockFP8) and triton:
        from miles.precision import _fp8_triton  # imports triton

        codes, scale = _fp8_triton.encode(tensor, recipe, role)
    elif isinstance(recipe, BlockFP8):
        codes, scale = _fp8.encode(tensor, recipe, role)
    elif isinstance(recipe, MXFP8):
        codes, scale = _micro.encode_mxfp8(tensor)
    else:
        assert isinstance(recipe, NVFP4)
        codes, scale, whole = _micro.encode_nvfp4(tensor)
    return QTensor(codes, scale, recipe, role, whole)


def _use_triton(tensor: Tensor, recipe: Recipe, backend: Backend) -> bool:
    if backend not in ("auto", "reference", "triton"):
        raise SettingError(f"backend is {backend!r}; expected 'auto', 'reference' or 'triton'")
    applies = isinstance(recipe, BlockFP8) and tensor.is_cuda
    if backend == "triton" and not applies:
        raise SettingError(
            f'backend="triton" got {type(recipe).__name__} on {tensor.device.type}; expected '
            'BlockFP8 on CUDA; or backend="auto"'
        )
    if backend == "reference" or not applies:
        return False
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise MissingExtraError("triton", "kernels")
    return installed


def _check(tensor: Tensor, recipe: Recipe, role: Role, name: str | None) -> None:
    what = f"the {role}" if name is None else f"{name} ({role})"
    if tensor.dtype not in _FLOATS:
        raise DtypeError(f"{what} is {tensor.dtype}; expected bfloat16, float16 or float32")
    least = 2 if isinstance(recipe, BlockFP8) and role == "weight" else 1
    if tensor.ndim < least or tensor.shape[-1] == 0:
        raise ShapeError(
            f"{what} has shape {tuple(tensor.shape)}; expected {least} dimensions or more, the "
            "last one not empty"
        )
    if not bool(torch.isfinite(tensor).all()):
        bad = (~torch.isfinite(tensor)).nonzero()
        raise NonFiniteError(
            f"{what} holds {len(bad)} NaN or infinite of {tensor.numel()} values, the first at "
            f"{tuple(bad[0].tolist())}; expected finite numbers; a step with a gradient of NaN?"
        )
