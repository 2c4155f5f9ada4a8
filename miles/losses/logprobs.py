"""Log-probabilities of chosen tokens.

Shapes: T tokens, V vocabulary entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError

__all__ = ["token_logprobs"]

IGNORED = -100


def token_logprobs(logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)[target]` of every token.

    This is the distribution that an engine samples from at `temperature`, before any top-k or
    top-p. What a row with target -100 holds, NaN included, changes nothing anywhere.

    Args:
        logits_TV: bf16, fp16, float32 or float64 `[T, V]`.
        targets_T: int64 `[T]`, in `0..V-1`, or -100 for a position without a target.
        temperature: above 0.

    Returns:
        `[T]`, float64 for float64 logits and float32 for all others; 0 where the target is -100.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> token_logprobs(logits, torch.tensor([1, -100])).exp().tolist()
        [0.5, 1.0]
    """
    if logits_TV.ndim != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ShapeError(
            f"logits_TV has shape {tuple(logits_TV.shape)} and targets_T "
            f"{tuple(targets_T.shape)}; expected [T, V] and [T]"
        )
    if not logits_TV.is_floating_point() or targets_T.dtype != torch.int64:
        raise DtypeError(
            f"logits_TV is {logits_TV.dtype} and targets_T {targets_T.dtype}; expected floating "
            "point and int64"
        )
    if not temperature > 0:
        raise SettingError(
            f"temperature is {temperature}; expected a number above 0 (score greedy samples at 1.0)"
        )
    if targets_T.device.type == "cpu" and targets_T.numel():
        outside = (targets_T != IGNORED) & ((targets_T < 0) | (targets_T >= logits_TV.shape[1]))
        if bool(outside.any()):
            bad = targets_T[outside][:8].tolist()
            raise SettingError(
                f"targets_T holds {bad}; expected 0..{logits_TV.shape[1] - 1}, or -100 to ignore"
            )
    return _TokenLogprobs.apply(logits_TV, targets_T, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the logits as they came and one number a row; backward rebuilds the softmax."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, temperature: float) -> Tensor:
        scaled_TV = _widen(logits_TV) / temperature
        lse_T = scaled_TV.logsumexp(-1)
        index_T1 = targets_T.clamp(min=0)[:, None]
        logprobs_T = scaled_TV.gather(-1, index_T1)[:, 0] - lse_T
        ctx.save_for_backward(logits_TV, targets_T, lse_T)
        ctx.temperature = temperature
        return torch.where(targets_T == IGNORED, 0, logprobs_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, targets_T, lse_T = ctx.saved_tensors
        grad_TV = -torch.exp(_widen(logits_TV) / ctx.temperature - lse_T[:, None])
        index_T1 = targets_T.clamp(min=0)[:, None]
        grad_TV.scatter_add_(-1, index_T1, torch.ones_like(lse_T)[:, None])
        grad_TV.mul_(grad_T[:, None] / ctx.temperature)
        grad_TV.masked_fill_((targets_T == IGNORED)[:, None], 0)
        return grad_TV.to(logits_TV.dtype), None, None


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
