"""Log importance ratios, at the level where an algorithm wants them.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from miles.errors import SettingError
from miles.losses._dtypes import as_logprobs
from miles.packed import Packed, tokens_per_sequence

__all__ = ["log_ratio"]

Level = Literal["token", "sequence_mean", "sequence_sum", "sequence_token"]


def log_ratio(new_T: Tensor, old_T: Tensor, packed: Packed, *, level: Level = "token") -> Tensor:
    """`new - old`, of each token or of its whole sequence.

    Args:
        new_T: float `[T]`, log-probs that carry the gradient.
        old_T: float `[T]`, log-probs to compare with, detached here.
        packed: where the tokens live; sequences may be spread over `packed.seq_group`.
        level: `token` (PPO, GRPO); `sequence_mean`, the mean over the sequence's trainable tokens
            with the gradient through that mean (GSPO); `sequence_sum`; `sequence_token`, the value
            of `sequence_mean` with the gradient of the token's own log-prob (GSPO-token).

    Returns:
        `[T]`; 0 at masked positions; float32 of lower precision, whose rounding exceeds a clip.

    References:
        GSPO: arXiv 2507.18071, equations 7 and 14.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, False]]))
        >>> new = torch.tensor([-1.0, -3.0, float("nan")])
        >>> log_ratio(new, torch.zeros(3), packed, level="sequence_mean").tolist()
        [-2.0, -2.0, 0.0]
    """
    packed.check(new_T=new_T, old_T=old_T)
    new_T, old_T = as_logprobs(new_T=new_T, old_T=old_T.detach())
    mask_T = packed.mask_T
    token_T = torch.where(mask_T, new_T, 0) - torch.where(mask_T, old_T, 0)
    if level == "token":
        return token_T
    if level not in ("sequence_mean", "sequence_sum", "sequence_token"):
        raise SettingError(
            f"level is {level!r}; expected token, sequence_mean, sequence_sum or sequence_token"
        )
    sequence_S = packed.sum_per_sequence(token_T)
    if level != "sequence_sum":
        sequence_S = sequence_S / tokens_per_sequence(packed).clamp(min=1)
    sequence_T = torch.where(mask_T, packed.per_token(sequence_S), 0)
    if level == "sequence_token":
        return sequence_T.detach() + (token_T - token_T.detach())
    return sequence_T
