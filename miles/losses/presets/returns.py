"""Presets of REINFORCE: by siblings, by whitened returns, by a teacher.

Shapes: T tokens.
"""

from __future__ import annotations

from torch import Tensor

from miles.losses.advantages import distill_advantages
from miles.losses.aggregation import aggregate
from miles.losses.corrections import Correction, for_other_terms, for_policy_term
from miles.losses.metrics import Metrics, mean_over
from miles.losses.policy import check_kl, policy_loss
from miles.losses.presets._parts import reinforced
from miles.losses.regularizers import kl_penalty
from miles.packed import Denominators, Packed

__all__ = ["on_policy_distillation", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo"]


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
    return reinforced(
        logprobs_T, advantages_T, packed, denominators, "seq_mean_token_sum",
        for_policy_term(correction, count_rejected),
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
    check_kl(ref_logprobs_T, kl_coef)
    loss, metrics = reinforce_plus_plus(
        logprobs_T, old_logprobs_T, advantages_T, packed, denominators, ratio_min=ratio_min,
        ratio_max=ratio_max, correction=correction,
        count_rejected=count_rejected, averaged_over=averaged_over,
    )  # fmt: skip
    if ref_logprobs_T is not None:
        kl_T = kl_penalty(logprobs_T, ref_logprobs_T, packed, value="k2")
        if kl_coef:
            loss = loss + kl_coef * aggregate(
                kl_T, packed, denominators, mode="seq_mean_token_mean",
                averaged_over=averaged_over, **for_other_terms(correction, count_rejected),
            )  # fmt: skip
        metrics["kl/ref"] = mean_over(kl_T, packed.mask_T)
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
    loss, metrics = reinforced(
        logprobs_T,
        advantages_T,
        packed,
        denominators,
        "token_mean",
        for_policy_term(correction, count_rejected),
        averaged_over,
    )
    metrics["kl/teacher"] = mean_over(kl_T, packed.mask_T)
    return loss, metrics
