"""`policy_loss` in plain PyTorch with its gradient written out: what one kernel does, by blocks.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["closed_form", "compiled", "in_blocks", "scaled_"]

TOKENS_PER_THREAD = 2**16
"""Half of it is the least that torch gives to a CPU thread of its own."""


def in_blocks(logprobs_T: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`closed_form`, a block of tokens after the other, whose temporaries stay in the cache."""
    per_token = {name: x for name, x in inputs.items() if name.endswith("_T") and x is not None}
    gradient_T = torch.empty_like(logprobs_T)
    rows = []
    blocks = range(0, logprobs_T.shape[0], TOKENS_PER_THREAD * torch.get_num_threads())
    for start in blocks:
        at = slice(start, start + blocks.step)
        block = inputs | {name: x[at] for name, x in per_token.items()}
        loss, gradient_T[at], totals = closed_form(logprobs_T[at], **block, in_cache=True)
        rows.append(totals)
    rows_N7 = torch.stack(rows)
    totals = torch.cat([rows_N7[:, :6].sum(0), rows_N7[:, 6:].amax(0)])
    return totals[0].to(loss.dtype), gradient_T, totals


@functools.cache
def compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`closed_form` as torch.compile makes it."""
    return torch.compile(closed_form, dynamic=True)


def scaled_(gradient_T: Tensor, factor: Tensor) -> Tensor:
    """`gradient_T *= factor`, which is 1 nearly always; a CPU can look."""
    if factor.device.type == "cpu" and factor == 1:
        return gradient_T
    return gradient_T.mul_(factor)


def closed_form(
    logprobs_T: Tensor,
    *,
    old_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    seq_ids_T: Tensor,
    factor: float,
    divisor: Tensor,
    per_sequence_S: Tensor | None,
    weights_T: Tensor | None,
    keep_T: Tensor | None,
    ref_T: Tensor | None,
    kl_coef: float,
    kl_rejected: bool,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float | None,
    in_cache: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient `[T]`, totals: loss, tokens, ratio, clipped low, high, KL, largest ratio.

    What is masked has the ratio 0 and the advantage 0. `in_cache`: for a block of tokens
    in plain PyTorch, where masks clear bits and sums keep the dtype.
    """
    dtype = torch.promote_types(logprobs_T.dtype, old_T.dtype)
    dtype = torch.promote_types(dtype, advantages_T.dtype)
    if ref_T is not None:
        dtype = torch.promote_types(dtype, ref_T.dtype)
    trained_T = _as_bits(mask_T, dtype) if in_cache else mask_T
    ratio_T = _only(trained_T, (logprobs_T - old_T).to(dtype).exp())
    minus_A_T = _only(trained_T, -advantages_T.to(dtype))
    negative_T = minus_A_T > 0
    low_T, high_T = negative_T & (ratio_T < ratio_min), (minus_A_T < 0) & (ratio_T > ratio_max)
    clipped_T = low_T | high_T
    bounded_T = ratio_T.masked_fill(low_T, ratio_min).masked_fill_(high_T, ratio_max)
    if dual_clip is not None:
        dual_T = negative_T & (ratio_T > dual_clip)
        bounded_T.masked_fill_(dual_T, dual_clip)
        clipped_T |= dual_T
    # Even an infinite ratio times an advantage of 0 is 0, but a NaN stays one.
    nothing_T = (minus_A_T == 0) & (ratio_T == ratio_T)
    loss_T = (bounded_T * minus_A_T).masked_fill_(nothing_T, 0)

    active_T = trained_T
    if keep_T is not None:
        active_T = active_T & (_as_bits(keep_T, dtype) if in_cache else keep_T)
    share_T = None if per_sequence_S is None else per_sequence_S[seq_ids_T].to(dtype)
    loss_T = _times(_times(loss_T, weights_T), share_T)
    if weights_T is not None or keep_T is not None:
        loss_T = _only(active_T, loss_T)

    def total(values_T: Tensor) -> Tensor:
        return values_T.sum(dtype=dtype if in_cache else torch.float64).to(torch.float64)

    scale = factor / divisor.to(torch.float64)
    loss = total(loss_T)
    free_T = ~clipped_T
    gradient_T = _only(_as_bits(free_T, dtype) if in_cache else free_T, loss_T) * scale

    kl = torch.zeros_like(scale)
    if ref_T is not None:
        d_T = _only(trained_T, (ref_T - logprobs_T).to(dtype))
        shrink_T = torch.expm1(d_T)
        kl_T = shrink_T - d_T
        kl = penalty = total(kl_T)
        if not kl_rejected:
            kl_T, shrink_T = _only(active_T, kl_T), _only(active_T, shrink_T)
        if share_T is not None or not kl_rejected:
            penalty = total(_times(kl_T, share_T))
        loss = loss + kl_coef * penalty
        gradient_T = gradient_T - _times(shrink_T, share_T) * (kl_coef * scale)
    loss = loss * scale

    tokens = mask_T.count_nonzero()
    largest = torch.where(tokens > 0, ratio_T.amax(), -torch.inf)
    readings = [tokens, total(ratio_T), low_T.count_nonzero(), high_T.count_nonzero(), kl, largest]
    totals = torch.stack([loss, *(x.to(torch.float64) for x in readings)])
    return loss.to(dtype), gradient_T.to(logprobs_T.dtype), totals


def _as_bits(mask_T: Tensor, dtype: torch.dtype) -> Tensor:
    """All bits of a number of `dtype` where the mask is set, else none."""
    return mask_T.to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


def _only(mask_T: Tensor, values_T: Tensor) -> Tensor:
    """`torch.where(mask_T, values_T, 0)`, or the same by bits, which a CPU does many at once."""
    if mask_T.dtype == torch.bool:
        return torch.where(mask_T, values_T, 0)
    return (values_T.view(mask_T.dtype) & mask_T).view(values_T.dtype)


def _times(values_T: Tensor, factors_T: Tensor | None) -> Tensor:
    return values_T if factors_T is None else values_T * factors_T.to(values_T.dtype)
