"""Linear layers whose GEMMs are block FP8: forward, input gradient and weight gradient.

Shapes: T tokens, N features out, K features in, E experts.

    y  = x W^T    x rounded 1 x 128 along K    W rounded 128 x 128
    dx = dy W     dy rounded 1 x 128 along N   the codes of W again: transposed, not rounded anew
    dW = dy^T x   both rounded 1 x 128 along T, afresh

The backward pass keeps x as it came, not its codes. Rounding those along T would round twice,
which is another number than Transformer Engine's; and x is usually in memory anyway, shared by
every layer that reads it (q, k, v; gate, up), each of which would keep codes of its own.

References:
    DeepSeek-V3, arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError
from miles.precision import _gemm, _gemm_grouped, backends
from miles.precision._gemm import Operand
from miles.precision._operators import operator
from miles.precision.quantize import QTensor
from miles.precision.recipes import BlockFP8

__all__ = ["grouped_linear", "linear"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def linear(
    x: Tensor,
    weight: Tensor,
    recipe: BlockFP8,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    quantized_weight: QTensor | None = None,
    transposed_weight: QTensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, each of its three GEMMs as the recipe says.

    A GEMM is `fp8`: of rounded operands, by the backend; `dequant`: of the same numbers, in x's
    dtype; or `bf16`: of operands that aren't rounded, in x's dtype. The gradient passes through
    the rounding as it is (straight-through), also to `weight` where `quantized_weight` is given.

    Nothing here makes the host wait for the GPU, so NaN and infinity are not looked for: what they
    touch comes out as NaN. A weight is checked when it is quantised by `quantize`.

    Args:
        x: bfloat16, float16 or float32, `[..., K]`; under autocast it is cast first.
        weight: `[N, K]`. What is rounded is its copy in x's dtype. Its gradient has its dtype, and
            reaches a float32 one without being rounded to bfloat16.
        recipe: what to round to, and which GEMMs to do how.
        bias: `[N]`.
        backend: a key of `miles.precision.backends.BACKENDS` for the `fp8` GEMMs, or "auto";
            `miles.precision.backends.explain` tells which.
        quantized_weight: `quantize(weight.to(x.dtype), recipe)`, to round once for many calls.
        transposed_weight: `quantized_weight.t()`, to transpose once for many calls, for the input
            gradient by a fast backend.

    Returns:
        `[..., N]` of x's dtype (autocast's, under autocast).

    Raises:
        ShapeError, DtypeError: tensors that don't fit together.
        SettingError: an unknown backend, one asked for by name that can't run one of the GEMMs
            (raised by that GEMM), tensors on two devices, or a quantised weight of another recipe.

    Example:
        >>> import torch
        >>> from miles.precision import BlockFP8
        >>> from miles.precision.linears import linear
        >>> x, weight = torch.ones(2, 128), torch.full((3, 128), 0.5, requires_grad=True)
        >>> linear(x, weight, BlockFP8(), bias=torch.ones(3))
        tensor([[65., 65., 65.],
                [65., 65., 65.]], grad_fn=<AddBackward0>)
    """
    cached = _check_call(x, weight, recipe, backend, quantized_weight, transposed_weight, 2)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    return apply(x, weight, cached, None, recipe, backend, bias)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    recipe: BlockFP8,
    *,
    backend: str = "auto",
    quantized_weight: QTensor | None = None,
    transposed_weight: QTensor | None = None,
) -> Tensor:
    """`linear` with a weight for each expert and rows sorted by expert.

    The weight's gradient takes PyTorch's grouped GEMM where the recipe says `bf16`; of rounded
    operands (`fp8`, `dequant`), but by `triton`, it is a loop over experts that waits for the GPU.

    Args:
        x: `[T, K]`; the first rows are those of expert 0.
        weight: `[E, N, K]`.
        ends: int32 or int64 `[E]`: where each expert's rows end, `counts.cumsum(0)`; the last is
            T. Values are checked on the CPU only.
        recipe: as for `linear`.
        backend: as for `linear`; `deepgemm` has forward and input gradient, `triton` all three.
        quantized_weight: as for `linear`, `[E, N, K]`.
        transposed_weight: as for `linear`.

    Returns:
        `[T, N]` of x's dtype.

    Raises:
        ShapeError, DtypeError, SettingError: as `linear`.

    Example:
        >>> import torch
        >>> from miles.precision import BlockFP8
        >>> from miles.precision.linears import grouped_linear
        >>> weight = torch.stack([torch.ones(1, 128), torch.full((1, 128), 2.0)])
        >>> grouped_linear(torch.ones(3, 128), weight, torch.tensor([1, 3]), BlockFP8())
        tensor([[128.],
                [256.],
                [256.]])
    """
    cached = _check_call(x, weight, recipe, backend, quantized_weight, transposed_weight, 3)
    if x.ndim != 2 or ends.shape != weight.shape[:1]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and ends {tuple(ends.shape)}; expected [T, K] and "
            f"({weight.shape[0]},), one end an expert"
        )
    if ends.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"ends is {ends.dtype}; expected int32 or int64")
    return apply(x, weight, cached, ends, recipe, backend)


Cached = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""A weight's codes and scales, and those of its transpose."""
NOTHING: Cached = (None, None, None, None)


def apply(
    x: Tensor,
    weight: Tensor,
    cached: Cached,
    ends_E: Tensor | None,
    recipe: BlockFP8,
    backend: str = "auto",
    bias: Tensor | None = None,
) -> Tensor:
    """`linear`, or `grouped_linear` with `ends_E`, of what has been checked but for x."""
    _check_x(x, weight)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    ends_E = None if ends_E is None else ends_E.to(torch.int32)
    y: Tensor = _Linear.apply(x, weight, *cached, ends_E, recipe, backend)
    return y if bias is None else y + bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        codes: Tensor | None,
        scale: Tensor | None,
        turned_codes: Tensor | None,
        turned_scale: Tensor | None,
        ends_E: Tensor | None,
        recipe: BlockFP8,
        backend: str,
    ) -> Tensor:
        need_x, need_weight, *_ = ctx.needs_input_grad
        rounded_dgrad = need_x and recipe.dgrad != "bf16"
        if codes is None and rounded_dgrad:
            low = weight.to(x.dtype)
            codes, scale, turned_codes, turned_scale = _encode_weights(low, recipe.scale)
        elif codes is None and recipe.fprop != "bf16":
            codes, scale = _encode_weight(weight.to(x.dtype), recipe.scale)
        elif turned_codes is None and codes is not None and scale is not None:
            turned_codes, turned_scale = codes.mT, scale.mT
        ctx.save_for_backward(
            x if need_weight else None,
            weight if need_x and not rounded_dgrad else None,
            *((turned_codes, turned_scale) if rounded_dgrad else (None, None)),
            ends_E,
        )
        ctx.recipe, ctx.backend, ctx.weight_dtype = recipe, backend, weight.dtype
        x_TK = _rows(x)
        if recipe.fprop == "bf16":
            return _unrows(_plain(x_TK, weight.to(x.dtype), ends_E), x)
        assert codes is not None and scale is not None
        name = backend if recipe.fprop == "fp8" else "dequant_bf16"
        y = _matmul(x_TK, codes, scale, ends_E, "fprop", recipe.scale, recipe.profile, name)
        return _unrows(y, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        if torch.is_grad_enabled() and dy.requires_grad:
            raise SettingError(
                "block-FP8 layers have no second derivatives; expected create_graph=False, or "
                "`high_precision(model)` around that pass"
            )
        x, weight, codes, scale, ends = ctx.saved_tensors
        recipe: BlockFP8 = ctx.recipe
        need_x, need_weight, *_ = ctx.needs_input_grad
        dy_TN = _rows(dy)
        dx = dw = None
        if need_x and recipe.dgrad == "bf16":
            dx = _unrows(_plain(dy_TN, weight.to(dy.dtype).mT, ends), dy)
        elif need_x:
            name = ctx.backend if recipe.dgrad == "fp8" else "dequant_bf16"
            dx = _matmul(dy_TN, codes, scale, ends, "dgrad", recipe.scale, "te", name)
            dx = _unrows(dx, dy)
        if need_weight:
            dw = _weight_gradient(ctx, dy_TN, _rows(x), ends)
        return dx, dw, *(None,) * 7


def _weight_gradient(ctx: Any, dy_TN: Tensor, x_TK: Tensor, ends_E: Tensor | None) -> Tensor:
    recipe, dtype = ctx.recipe, ctx.weight_dtype
    plain = recipe.wgrad == "bf16" and ends_E is None and x_TK.dtype == dtype
    if plain and not torch.is_autocast_enabled(x_TK.device.type):
        return dy_TN.t() @ x_TK  # one that the compiler can read
    modes = (recipe.wgrad, recipe.scale, recipe.profile)
    return _wgrad(dy_TN, x_TK, ends_E, *modes, ctx.backend, dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _unrows(y_TD: Tensor, like: Tensor) -> Tensor:
    """With the leading dimensions of `like`; not a view, which could not be changed in place."""
    if like.ndim == 2:
        return y_TD
    out: Tensor = torch.ops.aten._unsafe_view.default(y_TD, [*like.shape[:-1], y_TD.shape[1]])
    return out


def _plain(x_TD: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
    return x_TD @ weight.t() if ends_E is None else _grouped_plain(x_TD, weight, ends_E)


# Results of operators are new and contiguous, whatever the backend.


def _weight_like(weight: Tensor) -> tuple[Tensor, Tensor]:
    *batch, n, k = weight.shape
    blocks = [*batch, -(-n // _gemm.BLOCK), -(-k // _gemm.BLOCK)]
    codes = weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn)
    return codes, weight.new_empty(blocks, dtype=torch.float32)


def _rows_like(x_TD: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight.shape[-2])


def _gradient_like(dy_TN: Tensor, x_TK: Tensor, ends_E: Tensor | None, *args: Any) -> Tensor:
    experts = () if ends_E is None else ends_E.shape
    return dy_TN.new_empty(*experts, dy_TN.shape[1], x_TK.shape[1], dtype=args[-1])


@operator("fp8_encode_weight", lambda weight, _: _weight_like(weight))
def _encode_weight(weight: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    operand = _gemm.encode(weight.contiguous(), scale, "weight")
    return operand.codes, operand.scale.contiguous()


@operator("fp8_encode_weights", lambda weight, _: (*_weight_like(weight), *_weight_like(weight.mT)))
def _encode_weights(weight: Tensor, scale: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, turned = _gemm.encode_weights(weight.contiguous(), scale)
    # The transpose of a single row is a view, which an op may not return beside the row.
    turned_codes, turned_scale = (
        after.clone() if after.data_ptr() == before.data_ptr() else after.contiguous()
        for before, after in ((one.codes, turned.codes), (one.scale, turned.scale))
    )
    return one.codes, one.scale.contiguous(), turned_codes, turned_scale


@functools.cache
def _choice(
    backend: str,
    kind: Literal["fprop", "dgrad", "wgrad"],
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    experts: bool,
) -> str:
    """`backends.choose`, once for each kind of GEMM: it does not depend on tokens, which are 0."""
    gemm = backends.Gemm(
        kind=kind,
        rows=rows,
        columns=columns,
        depth=depth,
        dtype=dtype,
        device=device,
        experts=experts,
    )
    return backends.choose(backend, gemm)


@operator("fp8_matmul", _rows_like)
def _matmul(
    x_TD: Tensor,
    codes: Tensor,
    scale: Tensor,
    ends_E: Tensor | None,
    kind: str,
    scale_format: str,
    profile: str,
    backend: str,
) -> Tensor:
    (tokens, depth), columns, dtype = x_TD.shape, codes.shape[-2], x_TD.dtype
    _check_ends(ends_E, tokens)
    known = cast(Literal["fprop", "dgrad"], kind)
    experts = ends_E is not None
    name = _choice(backend, known, 0, columns, depth, dtype, x_TD.device, experts)
    if tokens == 0:
        return x_TD.new_empty(0, columns)
    role: Literal["activation", "gradient"] = "activation" if kind == "fprop" else "gradient"
    left = _gemm.encode(x_TD.contiguous(), scale_format, role, profile)
    right = Operand(codes.contiguous(), scale.float(), True, dtype)
    if ends_E is None:
        return _gemm.dense(name, left, right, dtype)
    return _gemm_grouped.grouped(name, left, right, ends_E, dtype)


@operator("fp8_wgrad", _gradient_like)
def _wgrad(
    dy_TN: Tensor,
    x_TK: Tensor,
    ends_E: Tensor | None,
    mode: str,
    scale_format: str,
    profile: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    (tokens, rows), columns = dy_TN.shape, x_TK.shape[1]
    _check_ends(ends_E, tokens)
    name = "dequant_bf16"
    if mode == "fp8":
        experts = ends_E is not None
        name = _choice(backend, "wgrad", rows, columns, 0, x_TK.dtype, x_TK.device, experts)
    if tokens == 0:
        experts_E = () if ends_E is None else ends_E.shape
        return dy_TN.new_zeros(*experts_E, rows, columns, dtype=dtype)
    if ends_E is None:
        if mode == "bf16":
            return _gemm.product(dy_TN.t(), x_TK, dtype)
        dy = _gemm.encode_transposed(dy_TN, scale_format, "gradient")
        x = _gemm.encode_transposed(x_TK, scale_format, "activation", profile)
        return _gemm.dense(name, dy, x, dtype)
    dy_TN, x_TK = dy_TN.contiguous(), x_TK.contiguous()
    if mode == "bf16":
        return _gemm_grouped.plain_weight(dy_TN, x_TK, ends_E, dtype)
    return _gemm_grouped.grouped_weight(name, dy_TN, x_TK, ends_E, scale_format, profile, dtype)


@operator("grouped_matmul", _rows_like)
def _grouped_plain(x_TD: Tensor, weight_ECD: Tensor, ends_E: Tensor) -> Tensor:
    _check_ends(ends_E, x_TD.shape[0])
    if x_TD.shape[0] == 0:
        return x_TD.new_empty(0, weight_ECD.shape[1])
    return _gemm_grouped.plain(x_TD.contiguous(), weight_ECD, ends_E)


def _check_ends(ends_E: Tensor | None, num_rows: int) -> None:
    if ends_E is None or ends_E.device.type != "cpu":
        return
    values = ends_E.tolist()
    if values != sorted(values) or values[0] < 0 or values[-1] != num_rows:
        raise ShapeError(
            f"ends is {values} for {num_rows} rows; expected numbers that don't fall, the last "
            f"{num_rows}: `counts.cumsum(0)`"
        )


def _check_call(
    x: Tensor,
    weight: Tensor,
    recipe: BlockFP8,
    backend: str,
    quantized: QTensor | None,
    transposed: QTensor | None,
    ndim: int,
) -> Cached:
    if not isinstance(recipe, BlockFP8):
        raise SettingError(f"recipe is {type(recipe).__name__}; expected BlockFP8")
    backends.check_name(backend)
    if weight.dtype not in _FLOATS:
        raise DtypeError(f"weight is {weight.dtype}; expected bfloat16, float16 or float32")
    if weight.ndim != ndim or 0 in weight.shape:
        _refuse(x, weight, ndim)
    if quantized is not None:
        _check_quantized("quantized_weight", quantized, weight, recipe)
    if transposed is not None:
        if quantized is None:
            raise SettingError("transposed_weight came without quantized_weight; expected both")
        _check_quantized("transposed_weight", transposed, weight.mT, recipe)
    if quantized is None:
        return NOTHING
    turned = (None, None) if transposed is None else (transposed.codes, transposed.scale)
    return (quantized.codes, quantized.scale, *turned)


def _check_x(x: Tensor, weight: Tensor) -> None:
    """Raise unless a weight that is all right can be multiplied with x."""
    if x.dtype not in _FLOATS:
        raise DtypeError(f"x is {x.dtype}; expected bfloat16, float16 or float32")
    if x.ndim == 0 or weight.shape[-1] != x.shape[-1]:
        _refuse(x, weight, weight.ndim)
    if x.device != weight.device:
        raise SettingError(f"x is on {x.device} and weight on {weight.device}; expected one device")


def _refuse(x: Tensor, weight: Tensor, ndim: int) -> NoReturn:
    letters = "[N, K]" if ndim == 2 else "[E, N, K]"
    raise ShapeError(
        f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [..., K] "
        f"and {letters}, none of N and K zero"
    )


def _check_quantized(name: str, given: QTensor, weight: Tensor, recipe: BlockFP8) -> None:
    same = isinstance(given.recipe, BlockFP8) and given.recipe.scale == recipe.scale
    if not same or given.role != "weight":
        raise SettingError(
            f"{name} is of role {given.role!r}, rounded to {given.recipe}; expected a weight "
            f'rounded to BlockFP8(scale="{recipe.scale}")'
        )
    if given.shape != weight.shape or given.codes.device != weight.device:
        raise ShapeError(
            f"{name} is {tuple(given.shape)} on {given.codes.device}; expected "
            f"{tuple(weight.shape)} on {weight.device}"
        )
