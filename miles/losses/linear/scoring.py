"""What every backend is called with, and what is checked before.

Shapes: T tokens, D hidden size, V vocabulary entries of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses._vocab import VocabShard
from miles.losses.linear.nucleus import Nucleus

__all__ = ["Scoring", "check_head", "compute_dtype"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which log-probs are asked for: everything that gets no gradient."""

    targets_T: Tensor
    """int64 `[T]`: ids of the whole vocabulary, or -100."""
    temperature_T: Tensor
    """`[T]`, of the dtype that is computed in; 1 where the target is -100."""
    softcap: float | None
    """Logits are `softcap * tanh(logits / softcap)`."""
    entropy: bool
    """Whether the entropy is asked for."""
    keep: Nucleus | None
    """The support to renormalise over."""
    shard: VocabShard
    """Which part of the vocabulary the weight holds."""


def compute_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """float64 if either is, else float32."""
    both = torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
    return torch.float64 if both == torch.float64 else torch.float32


def check_head(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None
) -> None:
    """Refuse an output head whose parts do not fit together."""
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ShapeError(
            f"hidden_TD has shape {tuple(hidden_TD.shape)} and weight_VD "
            f"{tuple(weight_VD.shape)}; expected [T, D] and [V, D]"
        )
    if weight_VD.shape[0] == 0:
        raise ShapeError(f"weight_VD has shape {tuple(weight_VD.shape)}; expected V of 1 or more")
    if not hidden_TD.is_floating_point() or not weight_VD.is_floating_point():
        raise DtypeError(
            f"hidden_TD is {hidden_TD.dtype} and weight_VD {weight_VD.dtype}; expected floating "
            "point for both"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ShapeError(
            f"bias has shape {tuple(bias_V.shape)}; expected [V] = ({weight_VD.shape[0]},)"
        )
    if bias_V is not None and not bias_V.is_floating_point():
        raise DtypeError(f"bias is {bias_V.dtype}; expected floating point")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise SettingError(
            f"softcap is {softcap}; expected a finite number above 0, or None for no cap"
        )
