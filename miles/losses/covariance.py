"""Surrogates that hold back the few tokens which make the entropy of a policy collapse.

A token's covariance is `(A - mean A) (logp - mean logp)`. The means, and which covariances are
the largest, belong to the whole step: `covariance_statistics` finds them once, before the
micro-batches, and the surrogates take them as data.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses._selection import (
    check_share,
    largest,
    number_in_share,
    ranks_of_step,
    sum_over,
)
from miles.losses.surrogates import (
    Surrogate,
    exp_ratio,
    nan_where,
    ppo_clip,
    trainable,
    unclipped,
    weighted,
    without,
)
from miles.packed import Packed

__all__ = ["CovarianceStatistics", "clip_cov", "covariance_statistics", "kl_cov", "token_ids"]


@dataclass(frozen=True, kw_only=True)
class CovarianceStatistics:
    """What `clip_cov` and `kl_cov` need to know of the whole step. See `covariance_statistics`."""

    mean_advantage: Tensor
    """0-d float64, over the trainable tokens of the step."""
    mean_logprob: Tensor
    """0-d float64."""
    threshold: Tensor
    """0-d float64: `kl_cov` takes the tokens whose covariance is above it,"""
    tie_limit: Tensor
    """0-d int64: and those exactly at it whose hash is at most this."""
    draw_limit: Tensor
    """0-d int64: `clip_cov` takes the candidates whose hash is at most this."""
    cov_min: float
    """Smallest covariance of a candidate of `clip_cov`."""
    cov_max: float
    """Largest covariance of a candidate of `clip_cov`."""
    seed: int
    """Goes into the hash."""


def token_ids(packed: Packed, sequence_ids_S: Tensor) -> Tensor:
    """A number for each token that is its own in the whole step, however the step is split.

    Args:
        packed: where the tokens live, with `positions_T`.
        sequence_ids_S: int64 `[S]`, in `0..2^31 - 1`: which sample of the whole step each sequence
            is, over all micro-batches and ranks.

    Returns:
        int64 `[T]`: `sequence id * 2^32 + position`.

    Raises:
        ShapeError, DtypeError: not one int64 for each sequence.
        SettingError: no `positions_T`, or ids out of range (looked for on CPU tensors only, to
            spare the GPU a stall).

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> (token_ids(packed, torch.tensor([3])) - 3 * 2**32).tolist()
        [0, 1]
    """
    if packed.positions_T is None:
        raise SettingError("token_ids needs positions_T; build the Packed with it")
    if sequence_ids_S.dtype != torch.int64:
        raise DtypeError(
            f"sequence_ids_S is {sequence_ids_S.dtype}; expected torch.int64; convert it with "
            ".to(torch.int64)"
        )
    if sequence_ids_S.shape != (packed.num_seqs,):
        raise ShapeError(
            f"sequence_ids_S has shape {tuple(sequence_ids_S.shape)}; expected "
            f"[{packed.num_seqs}], one id for each sequence"
        )
    if sequence_ids_S.device.type == "cpu" and sequence_ids_S.numel():
        low, high = int(sequence_ids_S.min()), int(sequence_ids_S.max())
        if low < 0 or high >= 2**31:
            raise SettingError(
                f"sequence_ids_S holds values from {low} to {high}; expected 0..2^31 - 1; number "
                "the samples of the step"
            )
    return packed.per_token(sequence_ids_S) * 2**32 + packed.positions_T


@torch.no_grad()
def covariance_statistics(
    logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    token_ids_T: Tensor,
    share: float = 2e-4,
    cov_min: float = 1.0,
    cov_max: float = 5.0,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> CovarianceStatistics:
    """Means, threshold and draw of one optimizer step, before its first micro-batch.

    Both methods choose `max(1, floor(share * N))` of the step's N trainable tokens. `kl_cov` takes
    those of the largest covariance; `clip_cov` draws among those with a covariance in
    `[cov_min, cov_max]`. A draw, like a tie (log-probs of exactly 0 are many), goes to the smallest
    hashes of (seed, token id), so it depends neither on the split nor on a generator's state.

    Args:
        logprobs_T: float `[T]`, at the start of the step.
        advantages_T: float `[T]`.
        packed: the whole step of this rank (`Packed.cat` of its micro-batches).
        token_ids_T: int64 `[T]`, from `token_ids`, over the whole step.
        share: fraction of the step's trainable tokens to choose (2e-4 in the paper).
        cov_min, cov_max: range of the candidates of `clip_cov`.
        seed: changes the draw; give the number of the step.
        group: data-parallel ranks. Ranks that share sequences are `packed.seq_group`.

    Raises:
        NonFiniteError: NaN or infinity at a trainable token, on every rank if any has one.
        EmptyBatchError: no trainable token on any rank.

    References:
        Clip-Cov and KL-Cov: arXiv 2505.22617.

    Example:
        >>> packed = Packed.from_padded(torch.ones(1, 4).bool())
        >>> logprobs, advantages = torch.tensor([0.0, -1, -1, -2]), torch.tensor([3.0, 0, 0, 1])
        >>> ids = token_ids(packed, torch.tensor([0]))
        >>> stats = covariance_statistics(logprobs, advantages, packed, token_ids_T=ids)
        >>> stats.mean_advantage.item(), stats.mean_logprob.item(), stats.threshold.item()
        (1.0, -1.0, 1.0)
    """
    check_share(share)
    if not cov_min < cov_max:
        raise SettingError(
            f"cov_min is {cov_min} and cov_max {cov_max}; expected cov_min < cov_max"
        )
    logprobs_T, advantages_T = trainable(packed, logprobs_T=logprobs_T, advantages_T=advantages_T)
    groups = ranks_of_step(packed, group)
    bad_T = ~(logprobs_T.isfinite() & advantages_T.isfinite())
    sums = [packed.mask_T, bad_T, advantages_T, logprobs_T]
    totals = sum_over(torch.stack([x.to(torch.float64).sum() for x in sums]), groups)
    num_tokens = int(totals[0])
    if totals[1] > 0:
        raise NonFiniteError(
            f"logprobs_T or advantages_T is NaN or infinite at {int(totals[1])} trainable tokens "
            "of the step; expected numbers; mask the tokens, or look at what produced them"
        )
    if num_tokens == 0:
        raise EmptyBatchError("the step has no trainable token on any rank; skip it")
    mean_advantage, mean_logprob = totals[2] / num_tokens, totals[3] / num_tokens
    cov_T = _covariance(logprobs_T, advantages_T, mean_logprob, mean_advantage)
    hash_T = _hash(token_ids_T, seed, packed)
    k = number_in_share(share, num_tokens)
    top = largest(cov_T[packed.mask_T], k + 1, groups)
    threshold, none = top[k - 1], hash_T.new_tensor(-1)
    tie_limit = none
    if num_tokens == k:
        threshold = top.new_tensor(-torch.inf)
    elif top[k] < threshold:
        threshold = (threshold + top[k]) / 2  # so that rounding moves no token over the edge
    else:
        ties_T = packed.mask_T & (cov_T == threshold)
        tie_limit = -largest(-hash_T[ties_T], int((top[:k] == threshold).sum()), groups)[-1]
    candidates_T = packed.mask_T & (cov_T >= cov_min) & (cov_T <= cov_max)
    drawn = -largest(-hash_T[candidates_T], k, groups)
    return CovarianceStatistics(
        mean_advantage=mean_advantage,
        mean_logprob=mean_logprob,
        threshold=threshold,
        tie_limit=tie_limit,
        draw_limit=drawn[-1] if drawn.numel() else none,
        cov_min=cov_min,
        cov_max=cov_max,
        seed=seed,
    )


def clip_cov(
    logprobs_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    statistics: CovarianceStatistics,
    token_ids_T: Tensor,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
) -> Surrogate:
    """`ppo_clip`, and 0 for a drawn few of the tokens with a high covariance.

    Args:
        logprobs_T: float `[T]`, for the covariance only, detached here: those that `statistics`
            saw, or the current ones, which are the same at the first update of a step.
        log_ratio_T: float `[T]`, from `log_ratio`; carries the gradient.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens of this micro-batch live.
        statistics: from `covariance_statistics` over the whole step.
        token_ids_T: int64 `[T]`, the same ids for these tokens.
        ratio_min, ratio_max: absolute bounds of the ratio, as in `ppo_clip`.

    Returns:
        A loss of 0 at masked positions, and the flags of `ppo_clip`.

    References:
        Clip-Cov: arXiv 2505.22617.

    Example:
        >>> packed = Packed.from_padded(torch.ones(1, 4).bool())
        >>> logprobs, advantages = torch.tensor([0.0, -1, -1, -2]), torch.tensor([3.0, 0, 0, 1])
        >>> ids = token_ids(packed, torch.tensor([0]))
        >>> stats = covariance_statistics(logprobs, advantages, packed, token_ids_T=ids)
        >>> args = (logprobs, torch.zeros(4), advantages, packed)
        >>> clip_cov(*args, statistics=stats, token_ids_T=ids).loss_T.abs().tolist()
        [0.0, 0.0, 0.0, 1.0]
    """
    logprobs_T, log_ratio_T, advantages_T = trainable(
        packed,
        logprobs_T=logprobs_T.detach(),
        log_ratio_T=log_ratio_T,
        advantages_T=advantages_T.detach(),
    )
    cov_T = _covariance_from(statistics, logprobs_T, advantages_T)
    drawn_T = _hash(token_ids_T, statistics.seed, packed) <= statistics.draw_limit
    drawn_T &= (cov_T >= statistics.cov_min) & (cov_T <= statistics.cov_max)
    loss_T, low_T, high_T = ppo_clip(
        log_ratio_T, advantages_T, ratio_min=ratio_min, ratio_max=ratio_max
    )
    return Surrogate(without(nan_where(cov_T.isnan(), loss_T), drawn_T), low_T, high_T)


def kl_cov(
    logprobs_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    *,
    statistics: CovarianceStatistics,
    token_ids_T: Tensor,
    kl_coef: float = 1.0,
) -> Surrogate:
    """`-r A`, plus `kl_coef |lr|` for the tokens of the largest covariance.

    Args:
        logprobs_T: float `[T]`, for the covariance only, detached here, as in `clip_cov`.
        log_ratio_T: float `[T]`, lr, from `log_ratio`; carries the gradient.
        advantages_T: float `[T]`, detached here.
        packed: where the tokens of this micro-batch live.
        statistics: from `covariance_statistics` over the whole step.
        token_ids_T: int64 `[T]`, the same ids for these tokens.
        kl_coef: weight of the penalty, 0 or more.

    Returns:
        A loss of 0 at masked positions; flags that are False everywhere.

    References:
        KL-Cov: arXiv 2505.22617; `|lr|` as in its code.

    Example:
        >>> packed = Packed.from_padded(torch.ones(1, 4).bool())
        >>> logprobs, advantages = torch.tensor([0.0, -1, -1, -2]), torch.tensor([3.0, 0, 0, 1])
        >>> ids = token_ids(packed, torch.tensor([0]))
        >>> stats = covariance_statistics(logprobs, advantages, packed, token_ids_T=ids)
        >>> args = (logprobs, torch.full((4,), 2.0).log(), advantages, packed)
        >>> loss_T = kl_cov(*args, statistics=stats, token_ids_T=ids).loss_T
        >>> [round(x, 4) for x in loss_T.tolist()]
        [-5.3069, 0.0, 0.0, -2.0]
    """
    if not kl_coef >= 0:
        raise SettingError(f"kl_coef is {kl_coef}; expected 0 or more, such as 1.0")
    logprobs_T, log_ratio_T, advantages_T = trainable(
        packed,
        logprobs_T=logprobs_T.detach(),
        log_ratio_T=log_ratio_T,
        advantages_T=advantages_T.detach(),
    )
    cov_T = _covariance_from(statistics, logprobs_T, advantages_T)
    tied_T = cov_T == statistics.threshold
    tied_T &= _hash(token_ids_T, statistics.seed, packed) <= statistics.tie_limit
    chosen_T = packed.mask_T & (tied_T | (cov_T > statistics.threshold))
    penalty_T = torch.where(chosen_T, kl_coef * log_ratio_T.abs(), 0)
    loss_T = penalty_T - weighted(exp_ratio(log_ratio_T), advantages_T)
    return unclipped(nan_where(cov_T.isnan(), loss_T))


def _covariance(
    logprobs_T: Tensor, advantages_T: Tensor, mean_logprob: Tensor, mean_advantage: Tensor
) -> Tensor:
    """float64 `[T]`."""
    return (advantages_T.to(torch.float64) - mean_advantage) * (
        logprobs_T.to(torch.float64) - mean_logprob
    )


def _covariance_from(
    statistics: CovarianceStatistics, logprobs_T: Tensor, advantages_T: Tensor
) -> Tensor:
    return _covariance(logprobs_T, advantages_T, statistics.mean_logprob, statistics.mean_advantage)


def _hash(token_ids_T: Tensor, seed: int, packed: Packed) -> Tensor:
    """int64 `[T]`, in `0..2^63 - 1`."""
    packed.check(token_ids_T=token_ids_T)
    if token_ids_T.dtype != torch.int64:
        raise DtypeError(f"token_ids_T is {token_ids_T.dtype}; expected torch.int64; use token_ids")
    seed_0 = torch.tensor(seed, dtype=torch.int64, device=token_ids_T.device)
    return _splitmix64(token_ids_T ^ _splitmix64(seed_0)) & (2**63 - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of https://prng.di.unimi.it/splitmix64.c; int64 wraps as uint64 does."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """As for an unsigned number: zeros come in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
