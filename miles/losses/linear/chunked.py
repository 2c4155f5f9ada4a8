"""Tiles over tokens and vocabulary, recomputed in the backward pass: `[T, V]` never exists.

The vocabulary is the outer loop, so that the weight's gradient is summed in float32 one tile at a
time and kept in the weight's dtype; that of the hidden states is summed in float32 as a whole.

Shapes: T tokens, N selected tokens, n of them in a tile, D hidden size, V vocabulary entries of
this rank, v of them in a tile.

References:
    Recomputation with an online softmax: Cut Your Losses, arXiv 2411.09009.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.losses._vocab import IGNORED, out_of_range
from miles.losses.linear.scoring import Scoring
from miles.losses.linear.tiles import (
    LogSumExp,
    Rows,
    Tile,
    matmul,
    operand_dtype,
    slices,
    tile_of,
)

__all__ = ["TOKENS_PER_TILE", "VOCAB_PER_TILE", "chunked_logprobs"]

TOKENS_PER_TILE = 2048
VOCAB_PER_TILE = 8192
"""A tile of these is 64 MiB of float32, and a handful of such are in use at a time."""


def chunked_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy, `[T]` each."""
    out: tuple[Tensor, Tensor | None] = _Chunked.apply(hidden_TD, weight_VD, bias_V, scoring)
    return out


class _Chunked(torch.autograd.Function):
    """Keeps what it was given and one or two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scoring: Scoring
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        lse_T, logprobs_T, entropy_T = _forward(hidden_TD, weight_VD, bias_V, scoring)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, lse_T, entropy_T)
        ctx.scoring = scoring
        return logprobs_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            grads = (grad_logprobs_T, grad_entropy_T)
            return *_backward(ctx.saved_tensors, ctx.scoring, grads, ctx.needs_input_grad), None


def _forward(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log-sum-exp, log-probs and entropy, `[T]` each and 0 where the target is ignored."""
    targets_T, shard = scoring.targets_T, scoring.shard
    dtype = operand_dtype(hidden_TD, weight_VD)
    rows = Rows(targets_T != IGNORED, hidden_TD, scoring, dtype, TOKENS_PER_TILE)
    stats = LogSumExp(rows.temperature_N, entropy=scoring.entropy)
    target_N = torch.zeros_like(rows.temperature_N)
    for ids in slices(shard.size, VOCAB_PER_TILE):
        weight_vD = weight_VD[ids].to(dtype)
        bias_v = None if bias_V is None else bias_V[ids]
        for i, where in enumerate(rows.tiles):
            tile = tile_of(rows, i, weight_vD, bias_v, ids.start, scoring)
            chosen_n1 = tile.logits_nv.gather(-1, tile.index_n1)
            target_N[where] += torch.where(tile.inside_n1, chosen_n1, 0)[:, 0]
            stats.add(where, tile.logits_nv)
    stats.over_ranks(shard)
    wrong_N = out_of_range(rows.targets_N, shard.total)
    lse_N = stats.value_N.masked_fill(wrong_N, torch.nan)
    # Subtracting the largest logit first keeps the digits that a large log-sum-exp would cost.
    logprobs_N = (shard.sum_(target_N) - stats.max_N) - stats.sum_N.log()
    logprobs_N = logprobs_N.masked_fill(wrong_N, torch.nan)

    def spread(values_N: Tensor) -> Tensor:
        return torch.zeros_like(scoring.temperature_T).index_copy_(0, rows.index_N, values_N)

    entropy_N = stats.entropy_N
    return spread(lse_N), spread(logprobs_N), None if entropy_N is None else spread(entropy_N)


def _backward(
    saved: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    scoring: Scoring,
    grads_T: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, from the rows that one arrives at."""
    hidden_TD, weight_VD, bias_V, lse_T, entropy_T = saved
    live_T = torch.zeros_like(scoring.targets_T, dtype=torch.bool)
    for grad_T in grads_T:
        if grad_T is not None:
            live_T |= grad_T != 0
    live_T &= scoring.targets_T != IGNORED
    dtype = operand_dtype(hidden_TD, weight_VD, backward=True)
    rows = Rows(live_T, hidden_TD, scoring, dtype, TOKENS_PER_TILE)
    slopes = _Slopes(rows, grads_T, lse_T, entropy_T)

    sum_dtype = scoring.temperature_T.dtype
    grad_ND = torch.zeros_like(rows.hidden_ND, dtype=sum_dtype) if needed[0] else None
    grad_VD = torch.empty_like(weight_VD) if needed[1] else None
    grad_V = torch.empty_like(bias_V) if bias_V is not None and needed[2] else None
    for ids in slices(scoring.shard.size, VOCAB_PER_TILE):
        weight_vD = weight_VD[ids].to(dtype)
        bias_v = None if bias_V is None else bias_V[ids]
        grad_vD = torch.zeros_like(weight_vD, dtype=sum_dtype) if needed[1] else None
        grad_v = weight_vD.new_zeros(len(weight_vD), dtype=sum_dtype)
        for i, where in enumerate(rows.tiles):
            tile = tile_of(rows, i, weight_vD, bias_v, ids.start, scoring)
            grad_nv = slopes.of(where, tile)
            if grad_ND is not None:
                grad_ND[where] += matmul(grad_nv, weight_vD, sum_dtype)
            if grad_vD is not None:
                grad_vD += matmul(grad_nv.T, rows.hidden_ND[where], sum_dtype)
            if grad_V is not None:
                grad_v += grad_nv.sum(0)
        if grad_VD is not None and grad_vD is not None:
            grad_VD[ids] = grad_vD
        if grad_V is not None:
            grad_V[ids] = grad_v
    if grad_ND is None:
        return None, grad_VD, grad_V
    group = scoring.shard.group
    grad_TD = torch.zeros_like(hidden_TD, dtype=hidden_TD.dtype if group is None else sum_dtype)
    grad_TD.index_copy_(0, rows.index_N, grad_ND.to(grad_TD.dtype))
    # Summed at full length: a row that is dead on one rank only would make the lengths differ.
    return scoring.shard.sum_(grad_TD).to(hidden_TD.dtype), grad_VD, grad_V


class _Slopes:
    """The gradient of the logits, tile by tile.

    For a log-prob it is `onehot - p`, for the entropy H it is `-p (log p + H)`.
    """

    def __init__(
        self,
        rows: Rows,
        grads_T: tuple[Tensor | None, Tensor | None],
        lse_T: Tensor,
        entropy_T: Tensor | None,
    ) -> None:
        self.rows = rows
        self.lse_N = lse_T[rows.index_N]
        self.entropy_N = None if entropy_T is None else entropy_T[rows.index_N]
        of_logprobs_T, of_entropy_T = grads_T
        self.logprob_N = torch.zeros_like(self.lse_N)
        if of_logprobs_T is not None:
            self.logprob_N = of_logprobs_T[rows.index_N]
        self.for_entropy_N = None if of_entropy_T is None else of_entropy_T[rows.index_N]

    def of(self, where: slice, tile: Tile) -> Tensor:
        """`[n, v]`: the gradient of the logits before cap and temperature."""
        logp_nv = tile.logits_nv.sub_(self.lse_N[where, None])
        p_nv = logp_nv.exp()
        factor_nv = -self.logprob_N[where, None]
        if self.for_entropy_N is not None and self.entropy_N is not None:
            # p log p is 0 where p is 0.
            logp_nv.masked_fill_(logp_nv == -torch.inf, 0).add_(self.entropy_N[where, None])
            factor_nv = logp_nv.mul_(-self.for_entropy_N[where, None]).add_(factor_nv)
        grad_nv = p_nv.mul_(factor_nv)
        onehot_n1 = torch.where(tile.inside_n1, self.logprob_N[where, None], 0)
        grad_nv.scatter_add_(-1, tile.index_n1, onehot_n1)
        if tile.slope_nv is not None:
            grad_nv.mul_(tile.slope_nv)
        return grad_nv.div_(self.rows.temperature_N[where, None])
