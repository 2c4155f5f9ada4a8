"""Attention of an unrolled step: causal over step 0, and over its own place in the later steps.

Shapes: B rows, L positions, N sequences, M the longest of them, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.rollout.speculative._host import upload

__all__ = ["SequenceRows", "can_chain", "chain_attention"]

Keys = tuple[Tensor, Tensor]
MOST_PADDING = 2
"""Times as many places as tokens that `SequenceRows` may take."""


def can_chain(query_BHLD: Tensor) -> bool:
    """Whether `chain_attention` runs: on a CPU, and where torch has its flash kernel."""
    if query_BHLD.device.type == "cpu":
        return True
    if query_BHLD.device.type != "cuda" or query_BHLD.shape[-1] % 8:
        return False
    params = torch.backends.cuda.SDPAParams(
        query_BHLD, query_BHLD, query_BHLD, None, 0.0, True, False
    )
    return bool(torch.backends.cuda.can_use_flash_attention(params))


def chain_attention(query_BHLD: Tensor, steps: Sequence[Keys]) -> Tensor:
    """What a step's queries read of the keys and values of all steps, `[B, H, L, D]` each.

    Position t sees step 0 up to t, and of the later steps t alone. The flash kernel reads step 0;
    the later keys join it by its log-sum-exp, so that no mask and no scores are ever written.

    >>> query, key, later = torch.randn(3, 1, 1, 2, 8).unbind(0)
    >>> out = chain_attention(query, [(key, key), (later, later)])
    >>> seen = torch.stack([key[0, 0, 0], later[0, 0, 0]])  # by the first place
    >>> by_hand = (seen @ query[0, 0, 0] / 8**0.5).softmax(-1) @ seen
    >>> torch.allclose(out[0, 0, 0], by_hand, atol=1e-5)
    True
    """
    if len(steps) == 1:
        return F.scaled_dot_product_attention(query_BHLD, *steps[0], is_causal=True)
    flat = [tensor for step in steps for tensor in step]
    out: Tensor = _Chain.apply(query_BHLD, *flat)
    return out


class _Chain(torch.autograd.Function):
    """The kernel's backward pass takes the merged output and log-sum-exp, as in ring attention:
    its probabilities are then those of the whole."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, *flat: Tensor) -> Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        first, lse, ctx.kernel = _flash(query, flat[0], flat[1])
        scale = query.shape[-1] ** -0.5
        scores = [_dot(query, key, wide) * scale for key in flat[2::2]]
        total = lse
        for score in scores:
            total = torch.logaddexp(total, score)
        out = first * (lse - total).exp()[..., None]
        for score, value in zip(scores, flat[3::2], strict=True):
            out = torch.addcmul(out, value.to(wide), (score - total).exp()[..., None])
        out = out.to(query.dtype)
        ctx.save_for_backward(query, *flat, out, total, *scores)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, first_key, first_value, *saved = ctx.saved_tensors
        num_later = (len(saved) - 2) // 3
        later, (out, total), scores = (
            saved[: 2 * num_later], saved[2 * num_later : -num_later], saved[-num_later:]
        )  # fmt: skip
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        scale, wide = query.shape[-1] ** -0.5, total.dtype
        grads = _flash_backward(ctx.kernel, grad, query, first_key, first_value, out, total)
        grad_query, inner = grads[0].to(wide), _dot(grad, out, wide)
        of_later: list[Tensor] = []
        for key, value, score in zip(later[::2], later[1::2], scores, strict=True):
            weight = (score - total).exp()
            slope = (weight * (_dot(grad, value, wide) - inner) * scale)[..., None]
            grad_query = torch.addcmul(grad_query, slope, key.to(wide))
            of_later.append((slope * query).to(key.dtype))
            of_later.append((weight[..., None] * grad).to(value.dtype))
        return (grad_query.to(query.dtype), *grads[1:], *of_later)


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * b).sum(-1)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output, log-sum-exp `[B, H, L]`, and what else the backward pass takes."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        return out, lse, ()
    out, lse, *kernel = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)
    return out, lse, tuple(kernel[:6])


def _flash_backward(
    kernel: tuple[Any, ...],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    aten = torch.ops.aten
    grads: tuple[Tensor, Tensor, Tensor]
    if query.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, True
        )
        return grads
    cum_q, cum_k, max_q, max_k, seed, offset = kernel
    grads = aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, True,
        seed, offset,
    )  # fmt: skip
    return grads


class SequenceRows:
    """Rows `[N, H, M, D]` of one sequence each, its padding behind, made of `[B, H, L, D]`.

    Build it by `of`. Where rows are like that already, nothing is moved.
    """

    def __init__(self, index_NM: Tensor | None = None, back_BL: Tensor | None = None) -> None:
        self._index_NM, self._back_BL = index_NM, back_BL

    @classmethod
    def of(
        cls, seq_ids_BL: Tensor | None, device: torch.device | None = None
    ) -> SequenceRows | None:
        """For these sequences, -1 at padding; None where one is so long that others would be mostly
        padding beside it. It waits for a GPU that the ids are on; the rows may be on another
        `device`."""
        if seq_ids_BL is None:
            return cls()
        ids_BL = seq_ids_BL
        same_BL = F.pad(ids_BL[:, 1:] == ids_BL[:, :-1], (1, 0), value=False)
        if bool((same_BL | (ids_BL < 0))[:, 1:].all()):
            return cls()
        places_T = (ids_BL >= 0).flatten().nonzero()[:, 0]
        starts_T = (~same_BL).flatten()[places_T]
        number_T = starts_T.cumsum(0) - 1
        first_N = starts_T.nonzero()[:, 0]
        offset_T = torch.arange(len(places_T), device=ids_BL.device) - first_N[number_T]
        N, M = len(first_N), int(offset_T.max()) + 1
        if MOST_PADDING * ids_BL.numel() < N * M:
            return None
        index_NM = places_T.new_full((N, M), ids_BL.numel())  # one beyond: `_Moved` has 0 there
        index_NM[number_T, offset_T] = places_T
        back_BL = torch.full_like(ids_BL, N * M)
        back_BL.view(-1)[places_T] = number_T * M + offset_T
        device = device or ids_BL.device
        return cls(upload(index_NM, device), upload(back_BL, device))

    def lay_out(self, tensor_BHLD: Tensor) -> Tensor:
        """`[N, H, M, D]`, 0 at padding."""
        return self._moved(tensor_BHLD, self._index_NM, self._back_BL)

    def put_back(self, tensor_NHMD: Tensor) -> Tensor:
        """`[B, H, L, D]`, 0 at padding."""
        return self._moved(tensor_NHMD, self._back_BL, self._index_NM)

    def _moved(self, tensor: Tensor, index: Tensor | None, back: Tensor | None) -> Tensor:
        if index is None:
            return tensor
        moved: Tensor = _Moved.apply(tensor.transpose(1, 2), index, back)
        return moved.transpose(1, 2)


class _Moved(torch.autograd.Function):
    """Gathers both ways: scattering with repeated places is slow and not deterministic."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _picked(tensor, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _picked(grad, ctx.saved_tensors[0]), None, None


def _picked(tensor: Tensor, index: Tensor) -> Tensor:
    flat = tensor.flatten(0, 1)
    return F.pad(flat, (0, 0, 0, 0, 0, 1))[index]
