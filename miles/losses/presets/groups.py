"""Presets whose advantages compare the answers to one prompt, and whose ratio is held near 1.

Shapes: T tokens.
"""

from __future__ import annotations

from torch import Tensor

from miles.losses.corrections import Correction, for_policy_term
from miles.losses.metrics import Metrics
from miles.losses.policy import policy_loss
from miles.losses.presets._parts import clipped, reduced
from miles.losses.ratios import log_ratio
from miles.losses.sequence_surrogates import gmpo as gmpo_surrogate
from miles.losses.surrogates import cispo as cispo_surrogate
from miles.losses.surrogates import sapo as sapo_surrogate
from miles.packed import Denominators, Packed

__all__ = ["cispo", "dapo", "dr_grpo", "gmpo", "grpo", "gspo", "gspo_token", "sapo"]


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
        ref_logprobs_T: float `[T]`, of the reference policy; with `kl_coef`, or for the reading.
        kl_coef: beta of the paper (0.04 there); k3 as in its equation 4.
        count_rejected, averaged_over: see `aggregate`; with False, rejected tokens leave the KL
            term too.

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
    return clipped(
        "sequence_mean", logprobs_T, old_logprobs_T, advantages_T, packed, denominators, ratio_min,
        ratio_max, for_policy_term(correction, count_rejected), averaged_over,
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
    return clipped(
        "sequence_token", logprobs_T, old_logprobs_T, advantages_T, packed, denominators,
        ratio_min, ratio_max, for_policy_term(correction, count_rejected), averaged_over,
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
    return reduced(
        surrogate,
        ratio_T,
        packed,
        denominators,
        "token_mean",
        for_policy_term(correction, count_rejected),
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
    return reduced(
        surrogate,
        ratio_T,
        packed,
        denominators,
        "seq_mean_token_mean",
        for_policy_term(correction, count_rejected),
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
    return reduced(
        surrogate,
        ratio_T,
        packed,
        denominators,
        "seq_mean_token_mean",
        for_policy_term(correction, count_rejected),
        averaged_over,
    )
