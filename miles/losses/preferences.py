"""Losses over pairs of a chosen and a rejected answer.

They take one number an answer, from `sequence_logprobs`, and give one loss a pair: add them up
over the micro-batches and divide by the number of pairs of the whole step. When answers are spread
over `packed.seq_group`, every one of its ranks computes the same losses, so divide by their number
too: the sum over ranks is then the loss.

Shapes: T tokens, S sequences, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from miles.errors import SettingError, ShapeError
from miles.packed import Packed, tokens_per_sequence

__all__ = ["Preference", "dpo", "ipo", "orpo", "sequence_logprobs", "simpo"]


class Preference(NamedTuple):
    """A loss for each pair, and by how much the chosen answer's implied reward leads."""

    loss_P: Tensor
    """float `[P]`, to be averaged and minimised."""
    margin_P: Tensor
    """float `[P]`, detached: reward of the chosen answer less that of the rejected one."""


def sequence_logprobs(logprobs_T: Tensor, packed: Packed, *, mean: bool = False) -> Tensor:
    """The log-prob of each sequence's trainable tokens together, or their mean.

    Args:
        logprobs_T: float `[T]`, carries the gradient.
        packed: where the tokens live; sequences may be spread over `packed.seq_group`.
        mean: divide by the number of trainable tokens.

    Returns:
        `[S]`; 0 for a sequence without a trainable token.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> sequence_logprobs(torch.tensor([-1.0, -2.0, -4.0, -9.0]), packed).tolist()
        [-3.0, -4.0]
        >>> sequence_logprobs(torch.tensor([-1.0, -2.0, -4.0, -9.0]), packed, mean=True).tolist()
        [-1.5, -4.0]
    """
    sums_S = packed.sum_per_sequence(logprobs_T)
    return sums_S / tokens_per_sequence(packed).clamp(min=1) if mean else sums_S


def dpo(
    chosen_logprobs_P: Tensor,
    rejected_logprobs_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Preference:
    """`-(1 - e) log sigmoid(m) - e log sigmoid(-m)`, `m = beta ((c - ref_c) - (r - ref_r))`.

    Args:
        chosen_logprobs_P, rejected_logprobs_P: float `[P]`, sums over tokens, with gradient.
        ref_chosen_P, ref_rejected_P: float `[P]`, the reference's, detached here.
        beta: above 0; smaller lets the policy go further from the reference.
        label_smoothing: e, the share of labels that are wrong, from 0 to below 0.5.

    References:
        DPO: arXiv 2305.18290, equation 7. Label smoothing (conservative DPO):
        https://ericmitchell.ai/cdpo.pdf, equation 3.

    Example:
        >>> pair = dpo(*(torch.tensor([x]) for x in (-10.0, -30.0, -12.0, -22.0)), beta=0.1)
        >>> round(pair.loss_P.item(), 4), round(pair.margin_P.item(), 4)
        (0.3133, 1.0)
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise SettingError(
            f"label_smoothing is {label_smoothing}; expected a share from 0 to below 0.5"
        )
    lead_P = _lead(chosen_logprobs_P, rejected_logprobs_P, ref_chosen_P, ref_rejected_P)
    margin_P = beta * lead_P
    loss_P = -logsigmoid(margin_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * logsigmoid(-margin_P)
    return Preference(loss_P, margin_P.detach())


def ipo(
    chosen_logprobs_P: Tensor,
    rejected_logprobs_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    *,
    beta: float = 0.1,
) -> Preference:
    """`((c - ref_c) - (r - ref_r) - 1 / (2 beta))^2`: a lead to reach, not one to grow for ever.

    Args:
        chosen_logprobs_P, rejected_logprobs_P: float `[P]`, with gradient: sums over tokens in the
            paper, means in TRL.
        ref_chosen_P, ref_rejected_P: float `[P]`, the reference's, detached here.
        beta: tau of the paper, above 0.

    Returns:
        The margin is beta times the lead, and 1/2 where the loss is 0.

    References:
        IPO: arXiv 2310.12036, equation 17.

    Example:
        >>> pair = ipo(*(torch.tensor([x]) for x in (-10.0, -30.0, -12.0, -22.0)), beta=0.1)
        >>> pair.loss_P.item(), pair.margin_P.item()
        (25.0, 1.0)
    """
    _check_beta(beta)
    lead_P = _lead(chosen_logprobs_P, rejected_logprobs_P, ref_chosen_P, ref_rejected_P)
    return Preference((lead_P - 1 / (2 * beta)) ** 2, (beta * lead_P).detach())


def simpo(
    chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Preference:
    """`-log sigmoid(beta (c - r) - gamma)` of mean log-probs; no reference.

    Args:
        chosen_mean_P, rejected_mean_P: float `[P]`, means over tokens, with gradient.
        beta: above 0.
        gamma: lead that the chosen answer's reward is asked for, 0 or more.

    Returns:
        The margin is `beta (c - r)`, before gamma.

    References:
        SimPO: arXiv 2405.14734.

    Example:
        >>> pair = simpo(torch.tensor([-1.0]), torch.tensor([-1.5]))
        >>> round(pair.loss_P.item(), 4), pair.margin_P.item()
        (0.6931, 1.0)
    """
    _check_beta(beta)
    if not gamma >= 0:
        raise SettingError(f"gamma is {gamma}; expected 0 or more, such as 1.0")
    _check_pairs(chosen_mean_P=chosen_mean_P, rejected_mean_P=rejected_mean_P)
    margin_P = beta * (chosen_mean_P - rejected_mean_P)
    return Preference(-logsigmoid(margin_P - gamma), margin_P.detach())


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, lam: float = 0.1) -> Preference:
    """`-c - lam log sigmoid(log odds(c) - log odds(r))`, `odds(x) = e^x / (1 - e^x)`.

    The first term is the NLL of the chosen answer, so this is a whole training loss; no reference.

    Args:
        chosen_mean_P, rejected_mean_P: float `[P]`, means over tokens, at most 0, with gradient.
        lam: weight of the odds ratio, 0 or more.

    Returns:
        The margin is the log odds ratio.

    References:
        ORPO: arXiv 2403.07691, equations 4 (odds), 6 and 7.

    Example:
        >>> pair = orpo(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
        >>> round(pair.loss_P.item(), 4), round(pair.margin_P.exp().item(), 4)
        (0.7219, 3.0)
    """
    if not lam >= 0:
        raise SettingError(f"lam is {lam}; expected 0 or more, such as 0.1")
    _check_pairs(chosen_mean_P=chosen_mean_P, rejected_mean_P=rejected_mean_P)
    margin_P = _log_odds(chosen_mean_P) - _log_odds(rejected_mean_P)
    return Preference(-chosen_mean_P - lam * logsigmoid(margin_P), margin_P.detach())


def _log_odds(mean_P: Tensor) -> Tensor:
    """Finite, without gradient, at a probability that rounds to 1."""
    mean_P = mean_P.clamp(max=-torch.finfo(mean_P.dtype).eps)
    return mean_P - torch.log(-torch.expm1(mean_P))


def _lead(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_r_P: Tensor) -> Tensor:
    _check_pairs(
        chosen_logprobs_P=chosen_P,
        rejected_logprobs_P=rejected_P,
        ref_chosen_P=ref_chosen_P,
        ref_rejected_P=ref_r_P,
    )
    return (chosen_P - ref_chosen_P.detach()) - (rejected_P - ref_r_P.detach())


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise SettingError(f"beta is {beta}; expected a number above 0, such as 0.1")


def _check_pairs(**tensors: Tensor) -> None:
    shapes = {name: tuple(values_P.shape) for name, values_P in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or len(set(shapes.values())) != 1:
        raise ShapeError(f"got shapes {shapes}; expected [P] for all, one value for each pair")
