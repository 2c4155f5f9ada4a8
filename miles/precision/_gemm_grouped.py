"""GEMMs of block-FP8 operands of experts.

Shapes: T tokens sorted by expert, E experts, N features out, K features in. `ends_E` says where
each expert's rows end, int32: the form of `torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.precision import _gemm, backends
from miles.precision._gemm import Operand

__all__ = ["grouped", "grouped_weight", "padded_layout", "plain", "plain_weight"]

ROWS = 128
"""Rows of a block of DeepGEMM's grouped kernel, all of one expert."""


def spans(ends_E: Tensor) -> Iterator[tuple[int, int]]:
    """First row and end of each expert; waits for the GPU."""
    return itertools.pairwise([0, *ends_E.tolist()])


def grouped(name: str, a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's rows of `a` `[T, D]` with its own `b` `[E, C, D]`: `[T, C]`."""
    if name == "deepgemm":
        return _deepgemm(a, b, ends_E).to(dtype)
    if name == "triton":
        from miles.precision import _gemm_triton  # imports triton

        return _gemm_triton.grouped(a, b, ends_E, dtype)
    if name == "dequant_bf16":
        return plain(a.dequantize(a.dtype), b.dequantize(a.dtype), ends_E).to(dtype)
    out = [
        _gemm.reference(
            a._replace(codes=a.codes[start:end], scale=a.scale[start:end]),
            b._replace(codes=b.codes[expert], scale=b.scale[expert]),
            dtype,
        )
        for expert, (start, end) in enumerate(spans(ends_E))
    ]
    return torch.cat(out)


def plain(a_TD: Tensor, b_ECD: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows with its own matrix, unrounded: `[T, C]`."""
    if _has_grouped_mm(a_TD, *a_TD.shape[1:], b_ECD.shape[1]):
        return F.grouped_mm(a_TD, b_ECD.mT, offs=ends_E)
    return torch.cat(
        [a_TD[start:end] @ b_ECD[expert].t() for expert, (start, end) in enumerate(spans(ends_E))]
    )


def plain_weight(dy_TN: Tensor, x_TK: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's `dy.T @ x`, unrounded: `[E, N, K]`.

    PyTorch's grouped GEMM has no float32 result of bf16 operands: a float32 weight gets each
    call's gradient rounded to bf16 once, and sums calls in float32.
    """
    if _has_grouped_mm(dy_TN, dy_TN.shape[1], x_TK.shape[1]):
        return F.grouped_mm(dy_TN.t(), x_TK, offs=ends_E).to(dtype)
    return _each(ends_E, lambda s, e: _gemm.product(dy_TN[s:e].t(), x_TK[s:e], dtype))


def grouped_weight(
    name: str,
    dy_TN: Tensor,
    x_TK: Tensor,
    ends_E: Tensor,
    scale: str,
    profile: str,
    dtype: torch.dtype,
) -> Tensor:
    """Each expert's gradient of operands rounded along its own tokens: `[E, N, K]`.

    All but `triton` wait for the GPU.
    """
    if name == "triton":
        from miles.precision import _gemm_triton  # imports triton

        at, layout = padded_layout(ends_E, x_TK.shape[0])
        dy, x = (_spread(t, at, len(layout)) for t in (dy_TN, x_TK))
        return _gemm_triton.grouped_weight(
            _gemm.encode_transposed(dy, scale, "gradient"),
            _gemm.encode_transposed(x, scale, "activation", profile),
            _padded_ends(ends_E).int(),
            dtype,
        )

    def one(start: int, end: int) -> Tensor:
        if start == end:
            return x_TK.new_zeros(dy_TN.shape[1], x_TK.shape[1], dtype=dtype)
        dy = _gemm.encode_transposed(dy_TN[start:end], scale, "gradient")
        x = _gemm.encode_transposed(x_TK[start:end], scale, "activation", profile)
        return _gemm.dense(name, dy, x, dtype)

    return _each(ends_E, one)


def _each(ends_E: Tensor, one: Callable[[int, int], Tensor]) -> Tensor:
    return torch.stack([one(start, end) for start, end in spans(ends_E)])


def _has_grouped_mm(like: Tensor, *features: int) -> bool:
    aligned = not any(size % 8 for size in features)  # rows of 16 bytes
    return hasattr(F, "grouped_mm") and like.dtype == torch.bfloat16 and aligned


def padded_layout(ends_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where rows go so that each expert starts at a multiple of 128; nothing waits for the GPU.

    Returns:
        `[T]`, int64: the padded row of each row; int32, one a padded row: its expert, -1 in gaps.

    Example:
        >>> at, experts = padded_layout(torch.tensor([2, 2, 3], dtype=torch.int32), 3)
        >>> at.tolist(), experts.shape, experts[[0, 1, 2, 128, 129]].tolist()
        ([0, 1, 128], torch.Size([384]), [0, 0, -1, 2, -1])
    """
    ends = ends_E.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    padded_ends = _padded_ends(ends)
    row = torch.arange(num_rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
    # An expert's own shift: how far its padded end, less its gap, is beyond its end.
    at = row + ((padded_ends - (-counts) % ROWS) - ends)[expert]
    full = num_rows + len(ends) * (ROWS - 1)
    layout = torch.full((-(-full // ROWS) * ROWS,), -1, dtype=torch.int32, device=ends.device)
    layout[at] = expert.int()
    return at, layout


def _padded_ends(ends_E: Tensor) -> Tensor:
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    return ((counts + ROWS - 1) // ROWS * ROWS).cumsum(0)


def _spread(x_TF: Tensor, at: Tensor, num_rows: int) -> Tensor:
    """Rows where `padded_layout` puts them, zeros in the gaps."""
    return x_TF.new_zeros(num_rows, x_TF.shape[1]).index_copy_(0, at, x_TF)


def _deepgemm(a: Operand, b: Operand, ends_E: Tensor) -> Tensor:
    at, layout = padded_layout(ends_E, a.codes.shape[0])
    rows = len(layout)
    # Rows move in words of 8 bytes, whatever is in them.
    words = a.codes.view(torch.int64)
    codes = words.new_zeros(rows, words.shape[1]).index_copy_(0, at, words).view(a.codes.dtype)
    scale = a.scale.new_ones(a.scale.shape[1], rows).t()  # column by column: rows % 4 == 0
    scale.index_copy_(0, at, a.scale)
    out = codes.new_empty(rows, b.codes.shape[1], dtype=torch.bfloat16)
    with torch.cuda.device_of(codes):
        backends.deep_gemm().m_grouped_fp8_gemm_nt_contiguous(
            (codes, scale), (b.codes, b.scale.contiguous()), out, layout
        )
    return out.view(torch.int64).index_select(0, at).view(out.dtype)
