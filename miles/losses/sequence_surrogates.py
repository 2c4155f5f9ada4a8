"""Surrogates whose ratio is that of a whole sequence, unreduced.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.errors import SettingError
from miles.losses.surrogates import Surrogate, exp_ratio, trainable, unclipped, weighted
from miles.packed import Packed, tokens_per_sequence

__all__ = ["gmpo", "vespo"]


def gmpo(
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    log_min: float = -0.4,
    log_max: float = 0.4,
) -> Surrogate:
    """`-A exp(mean_t clip(lr_t))`: the geometric mean of a sequence's clipped token ratios.

    A token's log-ratio is at most `log_max` where A > 0 and at least `log_min` where A < 0, as in
    PPO; where A = 0 it counts as 0. The sequence's ratio stands at each of its tokens, so
    `aggregate(mode="seq_mean_token_mean")` gives the paper's loss, with A the mean over tokens.

    Args:
        log_ratio_T: float `[T]`, from `log_ratio` at level "token"; carries the gradient.
        advantages_T: float `[T]`, detached here; the same at all tokens of a sequence in the paper.
        packed: where the tokens live; sequences may be spread over `packed.seq_group`.
        log_min: lower bound of the log-ratio, 0 or less (not of the ratio).
        log_max: upper bound of the log-ratio, 0 or more.

    Returns:
        A loss of 0 at masked positions, and the flags of each token's own clip.

    References:
        GMPO: arXiv 2507.20673; its clip range is (e^-0.4, e^0.4).

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> s = gmpo(torch.tensor([1.0, -0.4]), torch.ones(2), packed)
        >>> s.loss_T.tolist(), s.clipped_high_T.tolist()
        ([-1.0, -1.0], [True, False])
    """
    if not log_min <= 0 <= log_max:
        raise SettingError(
            f"log_min is {log_min} and log_max {log_max}; expected bounds of the log-ratio with "
            "log_min <= 0 <= log_max, such as -0.4 and 0.4"
        )
    log_ratio_T, advantages_T = trainable(
        packed, log_ratio_T=log_ratio_T, advantages_T=advantages_T.detach()
    )
    nothing_T = torch.where(log_ratio_T.isnan(), log_ratio_T, 0)
    clipped_T = torch.where(
        advantages_T > 0,
        log_ratio_T.clamp(max=log_max),
        torch.where(advantages_T < 0, log_ratio_T.clamp(min=log_min), nothing_T),
    )
    mean_S = packed.sum_per_sequence(clipped_T) / tokens_per_sequence(packed).clamp(min=1)
    return Surrogate(
        -weighted(packed.per_token(exp_ratio(mean_S)), advantages_T),
        (advantages_T < 0) & (log_ratio_T < log_min),
        (advantages_T > 0) & (log_ratio_T > log_max),
    )


def vespo(
    logprobs_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
    log_weights_T: Tensor | None = None,
) -> Surrogate:
    """`-sg(phi(w)) A logp` with `phi(w) = e^lam w^k e^(-lam w)`, w the ratio of the sequence.

    phi is 1 at w = 1 and falls to 0 on both sides of its top at w = k / lam.

    Args:
        logprobs_T: float `[T]`, carries the gradient.
        log_ratio_T: float `[T]`, from `log_ratio` at level "token"; log w is its sum over a
            sequence. Its gradient is not used.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens live; sequences may be spread over `packed.seq_group`.
        k_pos, lam_pos: shape and rate where A >= 0, above 0.
        k_neg, lam_neg: the same where A < 0.
        log_weights_T: float `[T]`, log importance weights old - rollout of each token, detached
            here; they go into w, so do not weight the loss with them again.

    Returns:
        A loss of 0 at masked positions; flags that are False everywhere.

    References:
        VESPO: arXiv 2602.10693.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> logprobs, log_ratio = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, -0.5])
        >>> vespo(logprobs, log_ratio, torch.ones(2), packed).loss_T.tolist()
        [1.0, 2.0]
    """
    if not min(k_pos, lam_pos, k_neg, lam_neg) > 0:
        raise SettingError(
            f"k_pos, lam_pos, k_neg and lam_neg are {k_pos}, {lam_pos}, {k_neg} and {lam_neg}; "
            "expected numbers above 0"
        )
    logprobs_T, log_ratio_T, advantages_T = trainable(
        packed, logprobs_T=logprobs_T, log_ratio_T=log_ratio_T, advantages_T=advantages_T.detach()
    )
    log_w_T = log_ratio_T.detach()
    if log_weights_T is not None:
        log_w_T = log_w_T + trainable(packed, log_weights_T=log_weights_T.detach())[0]
    log_w_T = packed.per_token(packed.sum_per_sequence(log_w_T))
    negative_T = advantages_T < 0
    k_T = torch.where(negative_T, log_w_T.new_tensor(k_neg), log_w_T.new_tensor(k_pos))
    lam_T = torch.where(negative_T, log_w_T.new_tensor(lam_neg), log_w_T.new_tensor(lam_pos))
    phi_T = torch.exp(k_T * log_w_T - lam_T * torch.expm1(log_w_T))
    phi_T = torch.where(log_w_T == torch.inf, 0, phi_T)  # its limit, for what would be inf - inf
    nothing_T = (advantages_T == 0) & ~(phi_T + logprobs_T).isnan()
    return unclipped(torch.where(nothing_T, 0, -phi_T * advantages_T * logprobs_T))
