"""Log-probabilities of chosen tokens.

Shapes: T tokens, V vocabulary entries (of this rank, where the vocabulary is sharded).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, ShapeError
from miles.losses._vocab import (
    IGNORED,
    VocabShard,
    check_targets,
    out_of_range,
    temperature_of_rows,
    widen,
)
from miles.packed import check_tensors

__all__ = ["token_logprobs"]


def token_logprobs(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_group: ProcessGroup | None = None,
) -> Tensor:
    """`log softmax(logits / temperature)[target]` of every token.

    This is the distribution that an engine samples from at `temperature`, before any top-k or
    top-p. What a row with target -100 holds, NaN included, changes nothing anywhere.

    With `vocab_group`, rank r holds the logits of the ids `r * V .. (r + 1) * V - 1` and targets
    are ids of the whole vocabulary. Every rank gets the same result and, when all send back the
    same gradient, as they do when all compute the same loss, the gradient of its own logits.

    Args:
        logits_TV: bf16, fp16, float32 or float64 `[T, V]`.
        targets_T: int64 `[T]`, in `0..V-1`, or -100 for a position without a target.
        temperature: above 0, one for all or floating point `[T]`; it gets no gradient.
        vocab_group: the ranks that hold the vocabulary together, an equal part each.

    Returns:
        `[T]`, float64 for float64 logits and float32 for all others; 0 where the target is -100.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
        SettingError: a target or temperature out of range (looked for in CPU tensors only, to
            spare the GPU a stall; there such a row is NaN).

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> token_logprobs(logits, torch.tensor([1, -100])).exp().tolist()
        [0.5, 1.0]
    """
    check_tensors(logits_TV=logits_TV, targets_T=targets_T)
    if logits_TV.ndim != 2 or logits_TV.shape[1] == 0 or targets_T.shape != logits_TV.shape[:1]:
        raise ShapeError(
            f"logits_TV has shape {tuple(logits_TV.shape)} and targets_T "
            f"{tuple(targets_T.shape)}; expected [T, V] and [T], V of 1 or more"
        )
    if not logits_TV.is_floating_point() or targets_T.dtype != torch.int64:
        raise DtypeError(
            f"logits_TV is {logits_TV.dtype} and targets_T {targets_T.dtype}; expected floating "
            "point and int64"
        )
    shard = VocabShard.here(logits_TV.shape[1], vocab_group)
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    temperature_T = temperature_of_rows(temperature, targets_T, dtype)
    check_targets(targets_T, logits_TV.shape[0], shard.total)
    out: Tensor = _TokenLogprobs.apply(logits_TV, targets_T, temperature_T, shard)
    return out


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the logits as they came and a few numbers a row; backward rebuilds the softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, temperature_T: Tensor, shard: VocabShard
    ) -> Tensor:
        scaled_TV = widen(logits_TV) / temperature_T[:, None]
        lse_T = _over_ranks(scaled_TV.logsumexp(-1), shard)
        lse_T = torch.where(out_of_range(targets_T, shard.total), torch.nan, lse_T)
        index_T, inside_T = shard.locate(targets_T)
        chosen_T = torch.where(inside_T, scaled_TV.gather(-1, index_T[:, None])[:, 0], 0)
        ctx.save_for_backward(logits_TV, targets_T, temperature_T, lse_T)
        ctx.shard = shard
        return torch.where(targets_T == IGNORED, 0, shard.sum_(chosen_T) - lse_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, targets_T, temperature_T, lse_T = ctx.saved_tensors
        grad_TV = -torch.exp(widen(logits_TV) / temperature_T[:, None] - lse_T[:, None])
        index_T, inside_T = ctx.shard.locate(targets_T)
        grad_TV.scatter_add_(-1, index_T[:, None], inside_T[:, None].to(grad_TV.dtype))
        grad_TV.mul_((grad_T / temperature_T)[:, None])
        grad_TV.masked_fill_((targets_T == IGNORED)[:, None], 0)
        return grad_TV.to(logits_TV.dtype), None, None, None


def _over_ranks(lse_T: Tensor, shard: VocabShard) -> Tensor:
    """log-sum-exp over all ranks of what each has over its own entries."""
    if shard.group is None:
        return lse_T
    largest_T = shard.max_(lse_T.clone())
    return largest_T + shard.sum_((lse_T - largest_T).exp()).log()
