"""Presets of PPO: with a critic, and around a proximal policy.

Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError
from miles.losses.aggregation import aggregate
from miles.losses.corrections import Correction, for_other_terms
from miles.losses.metrics import Metrics, mean_over
from miles.losses.policy import policy_loss
from miles.losses.presets.groups import dapo
from miles.losses.regularizers import nll, value_loss
from miles.packed import Denominators, Packed, check_tensors

__all__ = ["decoupled_ppo", "ppo", "vapo"]


def ppo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    values_T: Tensor | None = None,
    old_values_T: Tensor | None = None,
    returns_T: Tensor | None = None,
    value_coef: float = 1.0,
    value_clip: float | None = 0.2,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    dual_clip: float | None = None,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """PPO: clipped ratio over GAE's advantages, and the critic's loss if its values are given.

    Args:
        values_T: float `[T]`, the critic's, with gradient; with `old_values_T` and `returns_T`.
            Advantages and returns: `gae(terminal_rewards(rewards_S, packed), old_values_T,
            packed, lam=0.95)`, the advantages whitened.
        old_values_T: float `[T]`, the critic's at the start of the step.
        returns_T: float `[T]`, from `gae`.
        value_coef: c1 of the paper. The critic also learns from rejected tokens, unless
            `count_rejected` is False.
        value_clip: see `value_loss`.
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators: see `grpo`.
        ratio_min, ratio_max, dual_clip: see `ppo_clip`.
        correction, count_rejected, averaged_over: see `grpo`.

    References:
        arXiv 1707.06347, equations 7 and 9.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> zero = torch.zeros(2)
        >>> values = {"values_T": zero, "old_values_T": zero, "returns_T": torch.ones(2)}
        >>> ppo(zero, zero, torch.ones(2), packed, count(packed), **values)[0].item()
        -0.5
    """
    loss, metrics = policy_loss(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators, mode="token_mean",
        ratio_min=ratio_min, ratio_max=ratio_max, dual_clip=dual_clip, correction=correction,
        count_rejected=count_rejected,
        averaged_over=averaged_over,
    )  # fmt: skip
    given = [x for x in (values_T, old_values_T, returns_T) if x is not None]
    if len(given) not in (0, 3):
        raise SettingError(
            f"got {len(given)} of values_T, old_values_T and returns_T; expected all or none"
        )
    if values_T is not None and old_values_T is not None and returns_T is not None:
        value_T = value_loss(values_T, old_values_T, returns_T, packed, clip=value_clip)
        loss = loss + value_coef * aggregate(
            value_T, packed, denominators, averaged_over=averaged_over,
            **for_other_terms(correction, count_rejected),
        )  # fmt: skip
        metrics["value/loss"] = mean_over(value_T, packed.mask_T)
    return loss, metrics


def vapo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    right_S: Tensor,
    right_denominators: Denominators | None,
    nll_coef: float = 0.1,
    ratio_min: float = 0.8,
    ratio_max: float = 1.28,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """VAPO's policy loss: clip-higher, the mean over all tokens, and NLL on the right answers.

    Advantages: `gae(rewards_T, values_T, packed, lam=length_adaptive_lambda(packed), lam_value=1)`.

    Args:
        right_S: bool `[S]`, answers that are right.
        right_denominators: `count(..., keep_T=packed.per_token(right_S))` over the whole step, so
            that the NLL is a mean over its tokens however the step is split; None when the step
            has no right answer. With `count_rejected=False` the NLL leaves rejected tokens out too:
            count with `keep_T=packed.per_token(right_S) & correction.keep_T`.
        nll_coef: mu of the paper.
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators: see `grpo`.
        ratio_min, ratio_max, correction, count_rejected, averaged_over: see `grpo`.

    References:
        arXiv 2504.05118, sections 4.2 and 4.3.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True], [True]]))
        >>> old, right = torch.tensor([-1.0, -3.0]), torch.tensor([True, False])
        >>> positives = count(packed, keep_T=packed.per_token(right))
        >>> loss, _ = vapo(old, old, torch.tensor([1.0, -1.0]), packed, count(packed),
        ...                right_S=right, right_denominators=positives)
        >>> round(loss.item(), 4)
        0.1
    """
    loss, metrics = dapo(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators, ratio_min=ratio_min,
        ratio_max=ratio_max, correction=correction,
        count_rejected=count_rejected, averaged_over=averaged_over,
    )  # fmt: skip
    check_tensors(right_S=right_S)
    if right_S.dtype != torch.bool:
        raise DtypeError(f"right_S is {right_S.dtype}; expected torch.bool")
    right_T = packed.per_token(right_S) & packed.mask_T
    if correction is not None and not count_rejected:
        right_T = right_T & correction.keep_T
    if right_denominators is None and right_T.device.type == "cpu" and bool(right_T.any()):
        raise SettingError(
            "got right answers and no right_denominators, so their NLL would be left out; expected "
            "count(..., keep_T=packed.per_token(right_S)) over the whole step"
        )
    nll_T = nll(logprobs_T, packed)
    metrics["nll/right"] = mean_over(nll_T, right_T)
    if right_denominators is not None:
        loss = loss + nll_coef * aggregate(
            nll_T, packed, right_denominators, keep_T=right_T, count_rejected=False,
            averaged_over=averaged_over,
        )  # fmt: skip
    return loss, metrics


def decoupled_ppo(
    logprobs_T: Tensor,
    proximal_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    correction: Correction,
    count_rejected: bool = True,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """Decoupled PPO: the clip is around a proximal policy, weights correct for the one that acted.

    Args:
        logprobs_T: float `[T]`, with gradient.
        proximal_logprobs_T: float `[T]`: a forward pass at the start of the step, or
            `interpolate_proximal`, which needs none.
        advantages_T, packed, denominators, averaged_over: see `grpo`.
        correction: `importance_weights(proximal, behaviour, ...)`, this micro-batch's part.
        ratio_min, ratio_max: absolute bounds of policy / proximal.

    References:
        arXiv 2110.00641, equation 9; AReaL, arXiv 2505.24298, equation 5.

    Example:
        >>> from miles.losses import truncated_is
        >>> packed = Packed.from_padded(torch.tensor([[True]]))
        >>> proximal, behaviour = torch.tensor([-1.0]), torch.tensor([-1.5])
        >>> weights = truncated_is(proximal, behaviour, packed)
        >>> loss, _ = decoupled_ppo(proximal, proximal, torch.ones(1), packed, count(packed),
        ...                         correction=weights)
        >>> round(loss.item(), 4)
        -1.6487
    """
    return policy_loss(
        logprobs_T, proximal_logprobs_T, advantages_T, packed, denominators, mode="token_mean",
        ratio_min=ratio_min, ratio_max=ratio_max, correction=correction,
        count_rejected=count_rejected,
        averaged_over=averaged_over,
    )  # fmt: skip
