"""Rounding a tensor to a recipe: `quantize` for what is stored, `fake_quantize` to train through.

Both are one definition: `fake_quantize(w, r)` is bitwise `quantize(w, r).dequantize(w.dtype)`.

NaN and infinity make all of their block NaN, so the scales, a small tensor, tell whether there were
any. `quantize` looks at them, which waits for the device; `fake_quantize` on CUDA doesn't.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from miles.errors import DtypeError, MissingExtraError, NonFiniteError, SettingError, ShapeError
from miles.precision import _fp8, _int4, _micro
from miles.precision._operators import operator
from miles.precision.backends import has_fp8_cores, warn_once
from miles.precision.recipes import MXFP8, NVFP4, BlockFP8, Int4, Recipe, Role

__all__ = ["QTensor", "fake_quantize", "quantize", "quantize_pair"]

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

    def t(self) -> QTensor:
        """The transposed matrices `[..., K, N]`, contiguous, without rounding again.

        Raises:
            SettingError: anything but a block-FP8 weight: the blocks of another don't transpose.

        Example:
            >>> import torch
            >>> from miles.precision import BlockFP8, quantize
            >>> q = quantize(torch.ones(256, 128), BlockFP8()).t()
            >>> q.shape, q.scale.shape
            (torch.Size([128, 256]), torch.Size([1, 2]))
        """
        if not isinstance(self.recipe, BlockFP8) or self.role != "weight":
            raise SettingError(
                f"t() got {type(self.recipe).__name__} of role {self.role!r}; expected a weight of "
                "BlockFP8, whose blocks are square; round anything else with quantize_pair, or "
                "quantize what was transposed"
            )
        codes, scale = (t.transpose(-2, -1).contiguous() for t in (self.codes, self.scale))
        return QTensor(codes, scale, self.recipe, self.role)


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
        backend: "reference", plain PyTorch; "triton", for `BlockFP8` and `Int4` on CUDA, with the
            same bits; "auto", Triton where it applies and is installed.

    Raises:
        NonFiniteError: NaN or infinity, or scales beyond the range of their dtype. On CUDA this
            waits for the device, once.
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
    return _encode(tensor.detach(), recipe, role, backend, check=True, name=name)


def _quantize_weight(weight: Tensor, recipe: Recipe, name: str, largest: Tensor | None) -> QTensor:
    """`quantize` of a weight that may share its global scale with others; see `_encode`."""
    _check(weight, recipe, "weight", name)
    return _encode(weight.detach(), recipe, "weight", check=True, name=name, largest=largest)


def quantize_pair(
    tensor: Tensor,
    recipe: BlockFP8,
    *,
    role: Role,
    name: str | None = None,
    backend: Backend = "auto",
) -> tuple[QTensor, QTensor]:
    """A matrix and its transpose, each rounded in blocks along its own rows; on CUDA in one read.

    What the GEMMs of a linear layer take: an activation and an output gradient along their rows for
    the forward and the input's gradient, and along their columns for the weight's gradient.

    Args:
        tensor: bfloat16, float16 or float32, `[M, K]`; a weight may have more dimensions, and each
            matrix of the last two has its own blocks.
        recipe: what to round to.
        role: an activation, a gradient or a weight.
        name: named in errors.
        backend: as for `quantize`.

    Returns:
        `quantize(tensor)` with codes `[M, K]`, and `quantize` of the contiguous transpose with
        codes `[K, M]`, bit for bit. By Triton, scales of 1 x 128 blocks lie column by column, each
        column of a multiple of four elements, as the GEMMs of Hopper read them.

    Raises:
        NonFiniteError, SettingError, DtypeError: as `quantize`.
        ShapeError: not a matrix, or an empty one.

    Example:
        >>> import torch
        >>> from miles.precision import BlockFP8
        >>> from miles.precision.quantize import quantize_pair
        >>> x = torch.arange(256.0).view(2, 128)
        >>> q, turned = quantize_pair(x, BlockFP8(scale="ue8m0"), role="activation")
        >>> q.scale.shape, turned.shape, turned.scale.shape
        (torch.Size([2, 1]), torch.Size([128, 2]), torch.Size([128, 1]))
    """
    if not isinstance(recipe, BlockFP8):
        raise SettingError(f"quantize_pair got {type(recipe).__name__}; expected BlockFP8")
    recipe.check_role(role)
    _check(tensor, recipe, role, name)
    if not tensor.numel() or tensor.ndim < 2 or (tensor.ndim > 2 and role != "weight"):
        raise ShapeError(
            f"{_what(role, name)} has shape {tuple(tensor.shape)}; expected [M, K], not empty; "
            "flatten what is before the last dimension"
        )
    return _encode_pair(tensor.detach(), recipe, role, backend, check=True, name=name)


def fake_quantize(
    tensor: Tensor, recipe: Recipe, *, role: Role = "weight", name: str | None = None
) -> Tensor:
    """The numbers that a quantised tensor holds, in the tensor's dtype, to train through.

    The gradient passes as it is (straight-through): rounding has none, and a clipped code is the
    nearest one of its block, so nothing is masked.

    On CUDA, NaN and infinity come out as NaN, with all of their block: a check would stall every
    forward pass. Elsewhere they raise.

    Args:
        tensor: as for `quantize`.
        recipe: what to round to.
        role: a weight, an activation or a gradient.
        name: named in errors.

    Raises:
        NonFiniteError: as `quantize`, but not on CUDA.
        SettingError, DtypeError, ShapeError: as `quantize`.

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
    out: Tensor = _StraightThrough.apply(tensor, recipe, role, name)
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, recipe: Recipe, role: Role, name: str | None) -> Tensor:
        rounded, scale = _fake(tensor, recipe, role)
        if not tensor.is_cuda:
            _check_finite(scale, tensor, role, name)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


def _fake(
    tensor: Tensor, recipe: Recipe, role: Role, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`fake_quantize` without its gradient and check, and the scales; `largest` as in `_encode`."""
    if isinstance(recipe, Int4):
        scale = (recipe.scale_dtype, recipe.divisor, recipe.lowest)
        return _fake_int4(tensor, recipe.group_size, *scale)
    q = _encode(tensor, recipe, role, largest=largest)
    return q.dequantize(tensor.dtype), q.scale


def _int4_like(weight: Tensor, group_size: int, scale_dtype: str, *_: Any) -> tuple[Tensor, Tensor]:
    groups = (*weight.shape[:-1], weight.shape[-1] // group_size)
    return weight.new_empty(weight.shape), weight.new_empty(
        groups, dtype=getattr(torch, scale_dtype)
    )


@operator("int4_fake_quantize", _int4_like)
def _fake_int4(
    weight: Tensor, group_size: int, scale_dtype: str, divisor: float, lowest: int
) -> tuple[Tensor, Tensor]:
    kind: Any = scale_dtype  # one of the names that Int4 takes
    recipe = Int4(group_size=group_size, scale_dtype=kind, divisor=divisor, lowest=lowest)
    if not _use_triton(weight, recipe, "auto"):
        codes, scale = _int4.encode(weight, recipe)
        return _int4.decode(codes, scale, recipe, weight.dtype), scale
    from miles.precision import _int4_triton  # imports triton

    return _int4_triton.fake_quantize(weight, recipe)


def _encode(
    tensor: Tensor,
    recipe: Recipe,
    role: Role,
    backend: Backend = "auto",
    *,
    check: bool = False,
    name: str | None = None,
    largest: Tensor | None = None,
) -> QTensor:
    """`quantize`; without `check`, NaN and infinity make their block NaN and nothing waits.

    `largest` is for the global scale of `NVFP4`: the largest magnitude of all that share it.
    """
    codes, scale, whole = _round(tensor, recipe, role, backend, largest)
    if check:
        _check_finite(scale, tensor, role, name)
    return QTensor(codes, scale, recipe, role, whole)


def _round(
    tensor: Tensor,
    recipe: Recipe,
    role: Role,
    backend: Backend = "auto",
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and `NVFP4`'s global scale, as `_encode` has them."""
    triton = _use_triton(tensor, recipe, backend)
    if isinstance(recipe, BlockFP8):
        if not triton:
            return *_fp8.encode(tensor, recipe, role), None
        from miles.precision import _fp8_triton  # imports triton

        return *_fp8_triton.encode(tensor, recipe, role), None
    if isinstance(recipe, Int4):
        if not triton:
            return *_int4.encode(tensor, recipe), None
        from miles.precision import _int4_triton

        return *_int4_triton.encode(tensor, recipe), None
    if isinstance(recipe, MXFP8):
        return *_micro.encode_mxfp8(tensor), None
    assert isinstance(recipe, NVFP4)
    return _micro.encode_nvfp4(tensor, largest)


def _encode_pair(
    tensor: Tensor,
    recipe: BlockFP8,
    role: Role,
    backend: Backend = "auto",
    *,
    check: bool = False,
    name: str | None = None,
) -> tuple[QTensor, QTensor]:
    """`quantize_pair`, with `check` as in `_encode`."""
    if _use_triton(tensor, recipe, backend):
        from miles.precision import _fp8_triton  # imports triton

        pair = _fp8_triton.encode_pair(tensor, recipe, role)
        q, turned = (QTensor(codes, scale, recipe, role) for codes, scale in pair)
    else:
        q = _encode(tensor, recipe, role, backend)
        columns = tensor.transpose(-2, -1).contiguous()
        turned = q.t() if role == "weight" else _encode(columns, recipe, role, backend)
    if check:
        _check_finite(q.scale, tensor, role, name)
    return q, turned


def _use_triton(tensor: Tensor, recipe: Recipe, backend: Backend) -> bool:
    if backend == "auto" and not tensor.is_cuda:
        return False
    kind: Any = type(recipe)  # a class, which has a hash, whatever one of its objects has
    return _triton_for(kind, tensor.device, backend)


@functools.cache
def _triton_for(kind: type[Recipe], device: torch.device, backend: Backend) -> bool:
    if backend not in ("auto", "reference", "triton"):
        raise SettingError(f"backend is {backend!r}; expected 'auto', 'reference' or 'triton'")
    applies = kind in (BlockFP8, Int4) and device.type == "cuda"
    if backend == "triton" and not applies:
        raise SettingError(
            f'backend="triton" got {kind.__name__} on {device.type}; expected '
            'BlockFP8 or Int4 on CUDA; or backend="auto"'
        )
    if backend == "reference" or not applies:
        return False
    if kind is BlockFP8 and not has_fp8_cores(device):
        why = f"{device} is older than compute capability 8.9, where Triton has no FP8"
        if backend == "triton":
            raise SettingError(f'{why}; expected backend="auto", which rounds in plain PyTorch')
        warn_once(f"block FP8 is rounded in plain PyTorch, which is slow: {why}")
        return False
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise MissingExtraError("triton", "kernels")
    return installed


def _what(role: Role, name: str | None) -> str:
    return f"the {role}" if name is None else f"{name} ({role})"


def _check(tensor: Tensor, recipe: Recipe, role: Role, name: str | None) -> None:
    what = _what(role, name)
    if tensor.dtype not in _FLOATS:
        raise DtypeError(f"{what} is {tensor.dtype}; expected bfloat16, float16 or float32")
    least = 2 if isinstance(recipe, BlockFP8) and role == "weight" else 1
    if tensor.ndim < least or tensor.shape[-1] == 0:
        raise ShapeError(
            f"{what} has shape {tuple(tensor.shape)}; expected {least} dimensions or more, the "
            "last one not empty"
        )


def _check_finite(scale: Tensor, tensor: Tensor, role: Role, name: str | None) -> None:
    """Raise if a scale isn't finite: that of a block with NaN or infinity never is."""
    if not scale.numel() or math.isfinite(scale.float().amax().item()):
        return
    what, bad = _what(role, name), (~torch.isfinite(tensor)).nonzero()
    if not len(bad):
        raise NonFiniteError(
            f"{what} is finite, but its scales are beyond the range of {scale.dtype}, or a weight "
            "under the same global scale is not; expected smaller numbers, or scales of float32"
        )
    raise NonFiniteError(
        f"{what} holds {len(bad)} NaN or infinite of {tensor.numel()} values, the first at "
        f"{tuple(bad[0].tolist())}; expected finite numbers; a step with a gradient of NaN?"
    )
