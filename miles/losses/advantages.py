"""Advantages from rewards: no gradient, float64 inside.

Shapes: S sequences, G groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError

__all__ = ["group_advantages"]

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group_std", "batch_std", "none"]
Singleton = Literal["zero", "raw", "error"]


@torch.no_grad()
def group_advantages(
    rewards_S: Tensor,
    group_ids_S: Tensor,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group_std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: Singleton = "zero",
) -> Tensor:
    """`(reward - baseline) / (std + eps)` within prompt groups.

    GRPO is the default; Dr. GRPO has `scale="none"`; RLOO `baseline="leave_one_out",
    scale="none"`. A group of equal rewards gives exactly 0. Statistics are two-pass.

    Args:
        rewards_S: float `[S]`. NaN means "not scored": left out of the statistics, advantage 0.
        group_ids_S: int64 `[S]`, any non-negative numbers; equal ids are one group.
        baseline: the group's mean; the mean of a sample's siblings; or nothing.
        scale: divide by `std + eps` of the group, of all scored rewards of the batch, or by 1.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to the standard deviation.
        singleton: what a group with one scored sample gives when `baseline` or
            `scale="group_std"` needs siblings: 0, the raw reward, or a `SettingError`.

    Returns:
        `[S]`, in the dtype of the rewards.

    Raises:
        NonFiniteError: an infinite reward.
        EmptyBatchError: no sequence at all.

    References:
        GRPO: arXiv 2402.03300, section 4.1.2. Dr. GRPO: arXiv 2503.20783. RLOO: arXiv 2402.14740.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
        >>> group_advantages(rewards, torch.tensor([0, 0, 1, 1]), scale="none").tolist()
        [0.5, -0.5, 0.0, 0.0]
    """
    _check(rewards_S, group_ids_S, baseline, scale, singleton)
    groups, index_S = torch.unique(group_ids_S, return_inverse=True)
    scored_S = ~rewards_S.isnan()
    reward_S = torch.where(scored_S, rewards_S, 0).to(torch.float64)

    def group_sum(values_S: Tensor) -> Tensor:
        zeros_G = values_S.new_zeros(groups.shape[0])
        return zeros_G.index_add(0, index_S, torch.where(scored_S, values_S, 0))[index_S]

    n_S = group_sum(torch.ones_like(reward_S))
    mean_S = group_sum(reward_S) / n_S.clamp(min=1)
    centred_S = reward_S - mean_S
    if baseline == "mean":
        advantages_S = centred_S
    elif baseline == "leave_one_out":
        advantages_S = centred_S * n_S / (n_S - 1).clamp(min=1)
    else:
        advantages_S = reward_S

    if scale == "group_std":
        std_S = (group_sum(centred_S**2) / (n_S - ddof).clamp(min=1)).sqrt()
        advantages_S = advantages_S / (std_S + eps)
    elif scale == "batch_std":
        advantages_S = advantages_S / (_std(reward_S[scored_S], ddof) + eps)

    if baseline != "none" or scale == "group_std":
        advantages_S = torch.where(_equal_in_group(rewards_S, scored_S, index_S), 0, advantages_S)
        alone_S = scored_S & (n_S == 1)
        if singleton == "error" and bool(alone_S.any()):
            ids = group_ids_S[alone_S].tolist()
            raise SettingError(
                f"groups {ids[:8]} have one scored sample; expected siblings, since "
                'singleton="error"; sample more per prompt, or choose singleton="zero" or "raw"'
            )
        advantages_S = torch.where(alone_S, reward_S if singleton == "raw" else 0, advantages_S)
    return torch.where(scored_S, advantages_S, 0).to(rewards_S.dtype)


def _equal_in_group(rewards_S: Tensor, scored_S: Tensor, index_S: Tensor) -> Tensor:
    """Bool `[S]`: the group's largest and smallest scored rewards are the same."""
    num_groups = int(index_S.max()) + 1
    inf = float("inf")
    high_G = rewards_S.new_full((num_groups,), -inf)
    low_G = rewards_S.new_full((num_groups,), inf)
    high_G.scatter_reduce_(0, index_S, torch.where(scored_S, rewards_S, -inf), "amax")
    low_G.scatter_reduce_(0, index_S, torch.where(scored_S, rewards_S, inf), "amin")
    return (high_G == low_G)[index_S]


def _std(values: Tensor, ddof: int) -> Tensor:
    squares = ((values - values.mean()) ** 2).sum() if values.numel() else values.sum()
    return (squares / max(values.numel() - ddof, 1)).sqrt()


def _check(
    rewards_S: Tensor, group_ids_S: Tensor, baseline: str, scale: str, singleton: str
) -> None:
    choices = {
        "baseline": (baseline, ("mean", "leave_one_out", "none")),
        "scale": (scale, ("group_std", "batch_std", "none")),
        "singleton": (singleton, ("zero", "raw", "error")),
    }
    for name, (got, allowed) in choices.items():
        if got not in allowed:
            raise SettingError(f"{name} is {got!r}; expected one of {allowed}")
    if rewards_S.ndim != 1 or rewards_S.shape != group_ids_S.shape:
        raise ShapeError(
            f"rewards_S has shape {tuple(rewards_S.shape)} and group_ids_S "
            f"{tuple(group_ids_S.shape)}; expected [S] for both"
        )
    if not rewards_S.is_floating_point() or group_ids_S.is_floating_point():
        raise DtypeError(
            f"rewards_S is {rewards_S.dtype} and group_ids_S {group_ids_S.dtype}; "
            "expected floating point and int64"
        )
    if rewards_S.numel() == 0:
        raise EmptyBatchError("group_advantages got no reward; expected at least one sequence")
    if bool(rewards_S.isinf().any()):
        where = rewards_S.isinf().nonzero().flatten().tolist()
        raise NonFiniteError(
            f"rewards_S is infinite at {where[:8]}; expected finite numbers, or NaN for a sample "
            "that was not scored"
        )
