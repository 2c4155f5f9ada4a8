"""Published algorithms as a few lines over the parts. Each returns `(loss, metrics)`.

Denominators are those of the whole step, from `count`. `correction` is this micro-batch's part of a
`Correction` for the gap to the engine. Advantages are the caller's: each docstring names the line
that makes them, `docs/papers.md` has them side by side.

Shapes: T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError
from miles.losses.advantages import distill_advantages
from miles.losses.aggregation import Mode, aggregate
from miles.losses.corrections import Correction
from miles.losses.metrics import Metrics, mean_over
from miles.losses.policy import policy_loss, ratio_metrics
from miles.losses.ratios import Level, log_ratio
from miles.losses.regularizers import kl_penalty, nll, value_loss
from miles.losses.sequence_surrogates import gmpo as gmpo_surrogate
from miles.losses.surrogates import Surrogate, ppo_clip, reinforce
from miles.losses.surrogates import cispo as cispo_surrogate
from miles.losses.surrogates import sapo as sapo_surrogate
from miles.packed import Denominators, Packed

__all__ = [
    "cispo",
    "dapo",
    "decoupled_ppo",
    "dr_grpo",
    "gmpo",
    "grpo",
    "gspo",
    "gspo_token",
    "on_policy_distillation",
    "ppo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "sapo",
    "vapo",
]


def grpo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    correction: Correction | None = None,
    count_rejected: bool = True,
    ref_logprobs_T: Tensor | None = None,
    kl_coef: float = 0.0,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """GRPO: clipped ratio, each sequence's mean, averaged over sequences.

    Args:
        logprobs_T: float `[T]`, with gradient.
        old_logprobs_T: float `[T]`, the trainer's before this step's first update.
        advantages_T: float `[T]`, `packed.per_token(group_advantages(rewards_S, group_ids_S))`.
        packed: this micro-batch.
        denominators: of the whole step.
        ratio_min, ratio_max: absolute bounds of the ratio.
        correction: this micro-batch's part of a `Correction`, for the gap to the engine.
        ref_logprobs_T: float `[T]`, of the reference policy; with `kl_coef`.
        kl_coef: beta of the paper (0.04 there); k3 as in its equation 4.
        count_rejected, averaged_over: see `aggregate`.

    References:
        arXiv 2402.03300, equations 3 and 4.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> logprobs = torch.full((4,), -1.0, requires_grad=True)
        >>> advantages = packed.per_token(torch.tensor([1.0, -1.0]))
        >>> loss, metrics = grpo(logprobs, logprobs.detach(), advantages, packed, count(packed))
        >>> loss.backward()
        >>> loss.item(), logprobs.grad.tolist()
        (0.0, [-0.25, -0.25, 0.5, 0.0])
    """
    return policy_loss(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators,
        mode="seq_mean_token_mean", ratio_min=ratio_min, ratio_max=ratio_max,
        correction=correction,
        count_rejected=count_rejected, ref_logprobs_T=ref_logprobs_T, kl_coef=kl_coef,
        averaged_over=averaged_over,
    )  # fmt: skip


def dr_grpo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    max_tokens: int,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """Dr. GRPO: the sum over tokens, divided by sequences times a constant.

    Args:
        max_tokens: the constant: the generation budget of a sequence, whatever its width here.
            Advantages: `group_advantages(rewards_S, group_ids_S, scale="none")`.
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators: see `grpo`.
        ratio_min, ratio_max, correction, count_rejected, averaged_over: see `grpo`.

    References:
        arXiv 2503.20783, section 3.2.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> old = torch.zeros(2)
        >>> dr_grpo(old, old, torch.ones(2), packed, count(packed), max_tokens=8)[0].item()
        -0.25
    """
    return policy_loss(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators,
        mode="constant", constant=max_tokens, ratio_min=ratio_min, ratio_max=ratio_max,
        correction=correction, count_rejected=count_rejected, averaged_over=averaged_over,
    )  # fmt: skip


def dapo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 0.8,
    ratio_max: float = 1.28,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """DAPO: a higher upper clip, the mean over all tokens of the step, no KL.

    Advantages are GRPO's, of rewards with `soft_overlong_penalty` added; its dynamic sampling is a
    filter on groups before the step.

    References:
        arXiv 2503.14476, equation 8.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> new, old = torch.tensor([0.5, 0.0]), torch.zeros(2)
        >>> round(dapo(new, old, torch.ones(2), packed, count(packed))[0].item(), 4)
        -1.14
    """
    return policy_loss(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators, mode="token_mean",
        ratio_min=ratio_min, ratio_max=ratio_max, correction=correction,
        count_rejected=count_rejected,
        averaged_over=averaged_over,
    )  # fmt: skip


def gspo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 1 - 3e-4,
    ratio_max: float = 1 + 4e-4,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """GSPO: the ratio of a sequence is the geometric mean of its tokens'; clipped as a whole.

    Advantages are GRPO's. The paper's bounds are far narrower than GRPO's.

    References:
        arXiv 2507.18071, equations 5 to 7; bounds from section 5.1.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> new = torch.tensor([0.5, -0.5])
        >>> gspo(new, torch.zeros(2), torch.ones(2), packed, count(packed))[0].item()
        -1.0
    """
    return _clipped(
        "sequence_mean", logprobs_T, old_logprobs_T, advantages_T, packed, denominators, ratio_min,
        ratio_max, _of(correction, count_rejected), averaged_over,
    )  # fmt: skip


def gspo_token(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 1 - 3e-4,
    ratio_max: float = 1 + 4e-4,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """GSPO-token: GSPO's value, each token's own gradient, so advantages may differ by token.

    References:
        arXiv 2507.18071, equations 13 and 14.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> new = torch.zeros(2, requires_grad=True)
        >>> advantages = torch.tensor([1.0, 3.0])
        >>> gspo_token(new, torch.zeros(2), advantages, packed, count(packed))[0].backward()
        >>> new.grad.tolist()
        [-0.5, -1.5]
    """
    return _clipped(
        "sequence_token", logprobs_T, old_logprobs_T, advantages_T, packed, denominators,
        ratio_min, ratio_max, _of(correction, count_rejected), averaged_over,
    )  # fmt: skip


def cispo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 0.0,
    ratio_max: float = 5.0,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """CISPO: REINFORCE weighted by a clipped, detached ratio; the mean over all tokens.

    Advantages are GRPO's. The paper leaves `ratio_max` to tuning; 5 is what TRL's documentation
    takes from the ScaleRL study (arXiv 2510.13786).

    References:
        MiniMax-M1, arXiv 2506.13585, equations 4 and 5.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True]]))
        >>> new, old = torch.tensor([-1.0]), torch.tensor([-9.0])
        >>> cispo(new, old, torch.ones(1), packed, count(packed))[0].item()
        5.0
    """
    ratio_T = log_ratio(logprobs_T, old_logprobs_T, packed)
    surrogate = cispo_surrogate(
        logprobs_T, ratio_T, advantages_T, packed, ratio_min=ratio_min, ratio_max=ratio_max
    )
    return _reduced(
        surrogate,
        ratio_T,
        packed,
        denominators,
        "token_mean",
        _of(correction, count_rejected),
        averaged_over,
    )


def sapo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """SAPO: a sigmoid gate in place of the clip; each sequence's mean, averaged over sequences.

    Advantages are GRPO's.

    References:
        arXiv 2511.20347, equations 5 and 6.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True]]))
        >>> sapo(torch.zeros(1), torch.zeros(1), torch.ones(1), packed, count(packed))[0].item()
        -2.0
    """
    ratio_T = log_ratio(logprobs_T, old_logprobs_T, packed)
    packed.check(advantages_T=advantages_T)
    surrogate = sapo_surrogate(ratio_T, advantages_T, tau_pos=tau_pos, tau_neg=tau_neg)
    return _reduced(
        surrogate,
        ratio_T,
        packed,
        denominators,
        "seq_mean_token_mean",
        _of(correction, count_rejected),
        averaged_over,
    )


def gmpo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    log_min: float = -0.4,
    log_max: float = 0.4,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """GMPO: the geometric mean of a sequence's clipped ratios, averaged over sequences.

    Advantages are GRPO's.

    References:
        arXiv 2507.20673, equation 4; bounds e^-0.4 to e^0.4.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> new = torch.tensor([0.2, -0.2])
        >>> gmpo(new, torch.zeros(2), torch.ones(2), packed, count(packed))[0].item()
        -1.0
    """
    ratio_T = log_ratio(logprobs_T, old_logprobs_T, packed)
    surrogate = gmpo_surrogate(ratio_T, advantages_T, packed, log_min=log_min, log_max=log_max)
    return _reduced(
        surrogate,
        ratio_T,
        packed,
        denominators,
        "seq_mean_token_mean",
        _of(correction, count_rejected),
        averaged_over,
    )


def rloo(
    logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """RLOO: REINFORCE on whole answers, each against the mean reward of its siblings.

    Advantages: `group_advantages(rewards_S, group_ids_S, baseline="leave_one_out", scale="none")`.

    References:
        arXiv 2402.14740, equation 8.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> rloo(torch.tensor([-1.0, -2.0]), torch.ones(2), packed, count(packed))[0].item()
        3.0
    """
    return _reinforce(
        logprobs_T, advantages_T, packed, denominators, "seq_mean_token_sum",
        _of(correction, count_rejected),
        averaged_over,
    )  # fmt: skip


def reinforce_plus_plus(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """REINFORCE++: PPO's clip without a critic, over returns whitened across the whole step.

    Advantages: `whiten(discounted_returns(rewards_T, packed), packed.mask_T)`, with
    `rewards_T = terminal_rewards(rewards_S, packed) - beta * k1`, the KL penalty in the reward.

    References:
        arXiv 2501.03262, equations 4 to 6.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> old = torch.zeros(2)
        >>> reinforce_plus_plus(old, old, torch.ones(2), packed, count(packed))[0].item()
        -1.0
    """
    return policy_loss(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators,
        mode="seq_mean_token_mean", ratio_min=ratio_min, ratio_max=ratio_max,
        correction=correction, count_rejected=count_rejected, averaged_over=averaged_over,
    )  # fmt: skip


def reinforce_plus_plus_baseline(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    correction: Correction | None = None,
    count_rejected: bool = True,
    ref_logprobs_T: Tensor | None = None,
    kl_coef: float = 0.0,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """REINFORCE++ with the group's mean as baseline, and KL as a loss.

    Advantages: `whiten(packed.per_token(group_advantages(r, g, scale="none")), packed.mask_T)`.
    The KL term is k2, whose gradient is the reverse KL's.

    References:
        arXiv 2501.03262, section 3.3.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> old = torch.zeros(2)
        >>> reinforce_plus_plus_baseline(old, old, torch.ones(2), packed, count(packed))[0].item()
        -1.0
    """
    if (ref_logprobs_T is None) != (kl_coef == 0.0):
        raise SettingError("expected both ref_logprobs_T and kl_coef, or neither; got one of them")
    loss, metrics = reinforce_plus_plus(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators, ratio_min=ratio_min,
        ratio_max=ratio_max, correction=correction,
        count_rejected=count_rejected, averaged_over=averaged_over,
    )  # fmt: skip
    if ref_logprobs_T is not None:
        kl_T = kl_penalty(logprobs_T, ref_logprobs_T, packed, value="k2")
        kept = {} if count_rejected else _of(correction, False) | {"weights_T": None}
        loss = loss + kl_coef * aggregate(
            kl_T, packed, denominators, mode="seq_mean_token_mean", averaged_over=averaged_over,
            **kept,
        )  # fmt: skip
        metrics["kl/ref"] = mean_over(kl_T, packed.mask_T)
    return loss, metrics


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
        value_coef: c1 of the paper.
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
        kept = {} if count_rejected else _of(correction, False) | {"weights_T": None}
        loss = loss + value_coef * aggregate(
            value_T, packed, denominators, averaged_over=averaged_over, **kept
        )
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
            has no right answer.
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
    if right_S.dtype != torch.bool:
        raise DtypeError(f"right_S is {right_S.dtype}; expected torch.bool")
    right_T = packed.per_token(right_S) & packed.mask_T
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


def on_policy_distillation(
    logprobs_T: Tensor,
    teacher_logprobs_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    coef: float = 1.0,
    correction: Correction | None = None,
    count_rejected: bool = True,
    averaged_over: int = 1,
) -> tuple[Tensor, Metrics]:
    """On-policy distillation: the policy gradient of the reverse KL to a teacher, by token.

    REINFORCE with `distill_advantages(logprobs_T, teacher_logprobs_T, packed)`; for tokens of an
    older policy give a `correction`. The denominator is the step's tokens.

    Args:
        logprobs_T: float `[T]`, the student's, with gradient.
        teacher_logprobs_T: float `[T]`, the teacher's of the same tokens.
        packed, denominators, correction, count_rejected, averaged_over: see `grpo`.
        coef: factor of the reverse KL.

    References:
        GKD, arXiv 2306.13649; https://thinkingmachines.ai/blog/on-policy-distillation/.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> student = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> teacher = torch.tensor([-2.0, -2.0])
        >>> on_policy_distillation(student, teacher, packed, count(packed))[0].backward()
        >>> student.grad.abs().tolist()
        [0.5, 0.0]
    """
    kl_T = -distill_advantages(logprobs_T, teacher_logprobs_T, packed)
    advantages_T = -coef * kl_T
    loss, metrics = _reinforce(
        logprobs_T,
        advantages_T,
        packed,
        denominators,
        "token_mean",
        _of(correction, count_rejected),
        averaged_over,
    )
    metrics["kl/teacher"] = mean_over(kl_T, packed.mask_T)
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


def _clipped(
    level: Level,
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    ratio_min: float,
    ratio_max: float,
    corrected: dict[str, Any],
    averaged_over: int,
) -> tuple[Tensor, Metrics]:
    packed.check(advantages_T=advantages_T)
    ratio_T = log_ratio(logprobs_T, old_logprobs_T, packed, level=level)
    surrogate = ppo_clip(ratio_T, advantages_T, ratio_min=ratio_min, ratio_max=ratio_max)
    return _reduced(
        surrogate, ratio_T, packed, denominators, "seq_mean_token_mean", corrected, averaged_over
    )


def _reduced(
    surrogate: Surrogate,
    ratio_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    mode: Mode,
    corrected: dict[str, Any],
    averaged_over: int,
) -> tuple[Tensor, Metrics]:
    loss = aggregate(
        surrogate.loss_T, packed, denominators, mode=mode, averaged_over=averaged_over,
        **corrected,
    )  # fmt: skip
    return loss, ratio_metrics(ratio_T, surrogate, packed.mask_T)


def _reinforce(
    logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    mode: Mode,
    corrected: dict[str, Any],
    averaged_over: int,
) -> tuple[Tensor, Metrics]:
    loss_T = reinforce(logprobs_T, advantages_T, packed).loss_T
    loss = aggregate(
        loss_T, packed, denominators, mode=mode, averaged_over=averaged_over, **corrected
    )
    return loss, {"logprob/mean": mean_over(logprobs_T, packed.mask_T)}


def _of(correction: Correction | None, count_rejected: bool) -> dict[str, Any]:
    if correction is None:
        return {"count_rejected": count_rejected}
    return {
        "weights_T": correction.weights_T,
        "keep_T": correction.keep_T,
        "count_rejected": count_rejected,
    }
