"""The formula as it is read, with all logits in memory: the oracle of the other backends.

Shapes: T tokens, D hidden size, V vocabulary entries of this rank, W those of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.losses._vocab import IGNORED, VocabShard, out_of_range
from miles.losses.linear.scoring import Scoring

__all__ = ["reference_logprobs"]


def reference_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy, `[T]` each."""
    targets_T, shard = scoring.targets_T, scoring.shard
    dtype = scoring.temperature_T.dtype
    ignored_T = targets_T == IGNORED
    hidden_TD = torch.where(ignored_T[:, None], 0, hidden_TD.to(dtype))

    logits_TV = _SumOfGrads.apply(hidden_TD, shard) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.to(dtype)
    if scoring.softcap is not None:
        logits_TV = scoring.softcap * torch.tanh(logits_TV / scoring.softcap)
    logits_TW = _WholeVocab.apply(logits_TV, shard) / scoring.temperature_T[:, None]
    if scoring.keep is not None:
        logits_TW = logits_TW.masked_fill(~scoring.keep.mask(shard.total), -torch.inf)

    # torch's log_softmax is off by 1e-5 in float32 at V = 150,000 on a CPU; its sum is not.
    below_TW = logits_TW - logits_TW.detach().amax(-1, keepdim=True)
    logprobs_TW = below_TW - below_TW.exp().sum(-1, keepdim=True).log()
    index_T1 = targets_T.clamp(0, shard.total - 1)[:, None]
    logprobs_T = logprobs_TW.gather(-1, index_T1)[:, 0]
    logprobs_T = logprobs_T.masked_fill(out_of_range(targets_T, shard.total), torch.nan)
    logprobs_T = torch.where(ignored_T, 0, logprobs_T)
    if not scoring.entropy:
        return logprobs_T, None
    # p log p is 0 where p is 0.
    surprisal_TW = -logprobs_TW.masked_fill(logits_TW == -torch.inf, 0)
    entropy_T = (logprobs_TW.exp() * surprisal_TW).sum(-1)
    return logprobs_T, torch.where(ignored_T, 0, entropy_T)


class _SumOfGrads(torch.autograd.Function):
    """What is the same on all ranks and used by each; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.sum_(grad.clone(memory_format=torch.contiguous_format)), None


class _WholeVocab(torch.autograd.Function):
    """All ranks' logits side by side; the gradient of a rank's own is its part."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        if shard.group is None:
            return logits_TV.view_as(logits_TV)
        logits_TV = logits_TV.contiguous()
        parts = [torch.empty_like(logits_TV) for _ in range(shard.total // shard.size)]
        dist.all_gather(parts, logits_TV, group=shard.group)
        return torch.cat(parts, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> tuple[Tensor, None]:
        shard = ctx.shard
        return grad_TW[:, shard.start : shard.start + shard.size], None
