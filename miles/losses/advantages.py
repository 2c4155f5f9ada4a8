"""Advantages from rewards: no gradient, float64 inside.

Shapes: S sequences, G groups, R rewards of one sequence, T tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses._groups import Groups
from miles.losses._selection import ranks_of_step, refused_together, sum_over
from miles.losses.returns import check_spread, moments
from miles.packed import Packed, check_tensors

__all__ = [
    "distill_advantages",
    "group_advantages",
    "multi_reward_advantages",
    "passk_advantages",
    "soft_overlong_penalty",
]

Baseline = Literal["mean", "leave_one_out", "length_weighted", "max_two", "none"]
Scale = Literal["group_std", "batch_std", "group_mean", "none"]
Singleton = Literal["zero", "raw", "error"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    lengths_S: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`(reward - baseline) / (std + eps)` within prompt groups.

    GRPO is the default; Dr. GRPO has `scale="none"`; RLOO `baseline="leave_one_out",
    scale="none"`; OPO `baseline="length_weighted", scale="none"`; MaxRL `scale="group_mean"`.
    Statistics are two-pass.

    A group of equal rewards gives exactly 0, whatever divides. With `baseline="none"`, which
    subtracts nothing, that holds where `scale` divides by a spread of the group (`group_std`,
    `group_mean`) or of a batch that is equal throughout; else the raw rewards stay.

    Args:
        rewards_S: float `[S]`. NaN means "not scored": left out of the statistics, advantage 0.
        group_ids_S: integer `[S]`, 0 or more, however large; equal ids are one group. A group lies
            on one rank. (As `Packed.group_ids_S` they have to be below 2^24, see `count`.)
        baseline: the group's mean; the mean of a sample's siblings; the mean weighted by
            `lengths_S`; the second-best reward, where only the best sample gets an advantage and
            two equal best ones get 0 (`max_two`); or nothing.
        scale: divide by `std + eps` of the group, or of all scored rewards of the batch, on every
            rank of `group`; by `mean + eps` of the group, with 0 where the mean is not above 0;
            or by 1.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to the standard deviation or the mean.
        singleton: what a group with one scored sample gives when `baseline` or a `scale` of the
            group needs siblings: 0, the raw reward, or a `SettingError`.
        lengths_S: `[S]`, for `baseline="length_weighted"` alone: tokens of each response.
        group: data-parallel ranks. A rank without sequences passes empty tensors. What one rank
            refuses, all refuse.

    Returns:
        `[S]`, in the dtype of the rewards.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together, or what is no tensor.
        NonFiniteError: an infinite reward.
        SettingError: a negative id.
        EmptyBatchError: no sequence at all, and no `group`.

    References:
        GRPO: arXiv 2402.03300, section 4.1.2. Dr. GRPO: arXiv 2503.20783. RLOO: arXiv 2402.14740.
        OPO: arXiv 2505.23585. `max_two`: arXiv 2503.19595. MaxRL: arXiv 2602.02710.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
        >>> group_advantages(rewards, torch.tensor([0, 0, 1, 1]), scale="none").tolist()
        [0.5, -0.5, 0.0, 0.0]
    """
    _check_choices(baseline, scale, singleton)
    check_spread(ddof, eps)
    check_tensors(rewards_S=rewards_S, group_ids_S=group_ids_S)
    with refused_together([] if group is None else [group], rewards_S.device):
        low, high, finite = _check_rewards(rewards_S, group_ids_S, group)
        _check_lengths(lengths_S, rewards_S, baseline)
    settings = (baseline, scale, ddof, eps, singleton, group)
    if finite:
        groups = Groups(group_ids_S, low, high)
        return _advantages(rewards_S, groups, lengths_S, *settings).to(rewards_S.dtype)
    scored_N = (~rewards_S.isnan()).nonzero()[:, 0]
    lengths_N = None if lengths_S is None else lengths_S[scored_N]
    groups = Groups(group_ids_S[scored_N], low, high)
    advantages_N = _advantages(rewards_S[scored_N], groups, lengths_N, *settings)
    return torch.zeros_like(rewards_S).index_copy_(0, scored_N, advantages_N.to(rewards_S.dtype))


def _advantages(
    rewards_S: Tensor,
    groups: Groups,
    lengths_S: Tensor | None,
    baseline: Baseline,
    scale: Scale,
    ddof: int,
    eps: float,
    singleton: Singleton,
    group: ProcessGroup | None,
) -> Tensor:
    """`group_advantages` of finite rewards, float64."""
    reward_S = rewards_S.to(torch.float64)
    n_G = groups.sum(torch.ones_like(reward_S))
    # Below the best reward of their group, equal rewards are 0 exactly, and so is their mean.
    below_S = reward_S - groups.spread(groups.max(reward_S))
    below_G = groups.sum(below_S)
    centred_S = below_S - groups.spread(below_G / n_G.clamp(min=1))

    if baseline == "mean":
        advantages_S = centred_S
    elif baseline == "leave_one_out":
        advantages_S = centred_S * groups.spread(n_G / (n_G - 1).clamp(min=1))
    elif baseline == "length_weighted" and lengths_S is not None:
        weights_S = lengths_S.to(torch.float64)
        total_G = groups.sum(weights_S)
        shift_G = groups.sum(weights_S * centred_S) / torch.where(total_G > 0, total_G, 1)
        advantages_S = centred_S - groups.spread(shift_G)
    elif baseline == "max_two":
        advantages_S = _lead_of_the_best(below_S, groups)
    else:
        advantages_S = reward_S

    of_group = scale in ("group_std", "group_mean")
    if of_group:
        if scale == "group_std":
            std_G = (groups.sum(centred_S.square()) / (n_G - ddof).clamp(min=1)).sqrt()
            inverse_G = 1 / (std_G + eps)
        else:
            mean_G = groups.sum(reward_S) / n_G.clamp(min=1)
            inverse_G = torch.where(mean_G > 0, 1 / (mean_G + eps), 0)
        # Nothing is above 0 here, so the sum is 0 where all are.
        advantages_S = advantages_S * groups.spread(torch.where(below_G == 0, 0, inverse_G))
    elif scale == "batch_std":
        scored_S = torch.ones_like(reward_S, dtype=torch.bool)
        _, _, variance = moments(reward_S, scored_S, group=group, ddof=ddof)
        # Equal rewards have no spread to divide by, and 0 / eps is all that is left of them.
        advantages_S = torch.where(variance > 0, advantages_S / (variance.sqrt() + eps), 0)

    if singleton != "zero" and (baseline != "none" or of_group):
        alone_S = groups.spread(n_G == 1)
        if singleton == "error":
            _refuse_singletons(groups.ids_S[alone_S])
        else:
            advantages_S = torch.where(alone_S, reward_S, advantages_S)
    return advantages_S


@torch.no_grad()
def passk_advantages(
    rewards_S: Tensor, group_ids_S: Tensor, *, k: int, threshold: float = 0.5
) -> Tensor:
    """The expected advantage of a sample over all subgroups of k, with pass@k as their reward.

    With n scored samples of which c are right, a subgroup passes with the probability
    `R = 1 - C(n-c, k) / C(n, k)`, and `sigma = sqrt(R (1 - R))`. A right sample gets
    `(1 - R) / sigma`, a wrong one `(1 - R - C(n-c-1, k-1) / C(n-1, k-1)) / sigma`. Where every
    subgroup passes, or none, all get exactly 0.

    Args:
        rewards_S: float `[S]`; right is what exceeds `threshold`. NaN means "not scored": not
            counted, advantage 0.
        group_ids_S: int64 `[S]`; equal ids are one group.
        k: samples a subgroup, 1 or more.
        threshold: rewards above it are right.

    Returns:
        `[S]`, in the dtype of the rewards.

    Raises:
        SettingError: a group with fewer than k scored samples (and more than none).

    References:
        Pass@k Training: arXiv 2508.10751, section 2.4.

    Example:
        >>> passk_advantages(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 7, 7]), k=2).tolist()
        [0.7071067690849304, -0.3535533845424652, -0.3535533845424652]
    """
    check_tensors(rewards_S=rewards_S, group_ids_S=group_ids_S)
    low, high, _ = _check_rewards(rewards_S, group_ids_S, None)
    if not isinstance(k, int) or k < 1:
        raise SettingError(f"k is {k!r}; expected 1 or more, a whole number")
    scored_S = ~rewards_S.isnan()
    right_S = scored_S & (rewards_S > threshold)
    groups = Groups(group_ids_S, low, high)
    n_G = groups.sum(scored_S.to(torch.float64))
    wrong_G = n_G - groups.sum(right_S.to(torch.float64))
    short_S = scored_S & groups.spread(n_G < k)
    if bool(short_S.any()):
        ids = torch.unique(group_ids_S[short_S]).tolist()
        raise SettingError(
            f"groups {ids[:8]} have fewer scored samples than k={k}; expected k or more in each; "
            "sample more per prompt, or lower k"
        )
    fail_G = _share_of_subsets(wrong_G, n_G, k)
    fail_if_wrong_G = _share_of_subsets(wrong_G - 1, n_G - 1, k - 1)
    sigma_G = (fail_G * (1 - fail_G)).sqrt()
    inverse_G = torch.where(sigma_G > 0, 1 / sigma_G, 0)
    right_G, wrong_G = fail_G * inverse_G, (fail_G - fail_if_wrong_G) * inverse_G
    advantages_S = torch.where(right_S, groups.spread(right_G), groups.spread(wrong_G))
    return torch.where(scored_S, advantages_S, 0).to(rewards_S.dtype)


@torch.no_grad()
def multi_reward_advantages(
    rewards_SR: Tensor,
    group_ids_S: Tensor,
    *,
    weights_R: Tensor | None = None,
    how: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum",
    final: Literal["batch", "none"] = "batch",
    ddof: int = 1,
    eps: float = 1e-6,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Advantages from several rewards (GDPO): each normalised in its group, then summed.

    A sum that is normalised afterwards (GRPO) gives the rewards (0, 2) and (1, 1) one advantage;
    normalised first, a reward counts by how it tells the samples of a group apart.

    Args:
        rewards_SR: float `[S, R]`. NaN means "not scored": that reward then adds nothing
            (`normalize_then_sum`), or the whole sample is not scored (`sum_then_normalize`).
        group_ids_S: int64 `[S]`; equal ids are one group, which lies on one rank.
        weights_R: `[R]`; None for 1 each.
        how: group-normalise each reward and sum, or sum and group-normalise.
        final: "batch" divides by the standard deviation (plus eps) of the advantages of all
            scored responses on every rank; long responses count no more than short ones. Nothing
            is subtracted, since advantages sum to 0 in each group.
        ddof: 1 for unbiased standard deviations, 0 for the population's.
        eps: added to each standard deviation.
        group: data-parallel ranks. A rank without sequences passes empty tensors.

    Returns:
        `[S]`, in the dtype of the rewards. A group of equal rewards gives exactly 0.

    References:
        GDPO: arXiv 2601.05242, section 3.

    Example:
        >>> rewards = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        >>> advantages = multi_reward_advantages(rewards, torch.tensor([0, 0, 0]))
        >>> [round(a, 3) for a in advantages.tolist()]
        [0.299, 0.816, -1.115]
    """
    check_tensors(rewards_SR=rewards_SR, group_ids_S=group_ids_S)
    if rewards_SR.ndim != 2 or rewards_SR.shape[1] == 0:
        raise ShapeError(f"rewards_SR has shape {tuple(rewards_SR.shape)}; expected [S, R]")
    if how not in ("normalize_then_sum", "sum_then_normalize"):
        raise SettingError(f"how is {how!r}; expected normalize_then_sum or sum_then_normalize")
    if final not in ("batch", "none"):
        raise SettingError(f"final is {final!r}; expected batch or none")
    if not rewards_SR.is_floating_point():
        raise DtypeError(f"rewards_SR is {rewards_SR.dtype}; expected floating point")
    columns = rewards_SR.to(torch.float64).unbind(1)
    if weights_R is None:
        weights_R = torch.ones(len(columns))
    if weights_R.shape != (len(columns),):
        raise ShapeError(
            f"weights_R has shape {tuple(weights_R.shape)}; expected [{len(columns)}], one for "
            "each reward"
        )

    def normalize(rewards_S: Tensor) -> Tensor:
        return group_advantages(rewards_S, group_ids_S, ddof=ddof, eps=eps, group=group)

    weights = weights_R.to(torch.float64).unbind()
    if how == "normalize_then_sum":
        scored_S = ~rewards_SR.isnan().all(1)
        columns = tuple(normalize(column_S) for column_S in columns)
    terms = [weight * column_S for weight, column_S in zip(weights, columns, strict=True)]
    advantages_S = sum(terms[1:], terms[0])
    if how == "sum_then_normalize":
        scored_S = ~advantages_S.isnan()
        advantages_S = normalize(advantages_S)
    if final == "batch":
        totals = torch.stack([advantages_S.square().sum(), scored_S.sum().to(torch.float64)])
        if group is not None:
            dist.all_reduce(totals, group=group)
        squares, number = totals
        advantages_S = advantages_S / ((squares / (number - ddof).clamp(min=1)).sqrt() + eps)
    return advantages_S.to(rewards_SR.dtype)


@torch.no_grad()
def distill_advantages(
    student_logprobs_T: Tensor,
    teacher_logprobs_T: Tensor,
    packed: Packed,
    *,
    coef: float = 1.0,
    base_advantages_T: Tensor | None = None,
    center: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`-coef (student - teacher)` at each token: on-policy distillation as an advantage.

    Its policy gradient is that of the reverse KL to the teacher, token by token.

    Args:
        student_logprobs_T: float `[T]`, of the sampled tokens, under the policy that drew them.
        teacher_logprobs_T: float `[T]`, of the same tokens.
        packed: where the tokens live.
        coef: scale of this term.
        base_advantages_T: `[T]`, added as they are.
        center: subtract the mean of this term over the trainable tokens, so that only
            differences between tokens count.
        group: data-parallel ranks, for the mean.

    Returns:
        `[T]`, no gradient, 0 at masked positions, in the dtype of the student's log-probs. NaN at
        a trainable token stays NaN.

    References:
        Thinking Machines, "On-Policy Distillation", 2025.
        https://thinkingmachines.ai/blog/on-policy-distillation/

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, False]]))
        >>> student, teacher = torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([-2.0, -1.0, 0.0])
        >>> distill_advantages(student, teacher, packed, coef=0.5).tolist()
        [-0.5, 1.0, 0.0]
    """
    packed.check(student_logprobs_T=student_logprobs_T, teacher_logprobs_T=teacher_logprobs_T)
    if group is not None and not center:
        raise SettingError("group has no effect without center=True; leave it out, or center")
    mask_T = packed.mask_T
    student_T, teacher_T = (
        torch.where(mask_T, x_T, 0).to(torch.float64)
        for x_T in (student_logprobs_T, teacher_logprobs_T)
    )
    advantages_T = coef * (teacher_T - student_T)
    if center:
        totals = torch.stack([advantages_T.sum(), mask_T.sum().to(torch.float64)])
        totals = sum_over(totals, ranks_of_step(packed, group))
        advantages_T = advantages_T - totals[0] / totals[1].clamp(min=1)
    if base_advantages_T is not None:
        packed.check(base_advantages_T=base_advantages_T)
        advantages_T = advantages_T + torch.where(mask_T, base_advantages_T, 0)
    return torch.where(mask_T, advantages_T, 0).to(student_logprobs_T.dtype)


@torch.no_grad()
def soft_overlong_penalty(
    lengths_S: Tensor, *, max_length: int, buffer: int, factor: float = 1.0
) -> Tensor:
    """A penalty to add to the reward of a response that nears the length limit, or passes it.

    0 up to `max_length - buffer`, then linear to `-factor` at `max_length`, and `-factor` beyond.

    Args:
        lengths_S: `[S]`, tokens of each response.
        max_length: where the whole penalty is reached.
        buffer: tokens before it over which the penalty grows, in `1..max_length`.
        factor: the whole penalty, 0 or more.

    Returns:
        `[S]`; float32 for integer lengths, else in their dtype.

    References:
        DAPO: arXiv 2503.14476, equation 13.

    Example:
        >>> lengths = torch.tensor([50, 80, 90, 100, 120])
        >>> soft_overlong_penalty(lengths, max_length=100, buffer=20).tolist()
        [0.0, 0.0, -0.5, -1.0, -1.0]
    """
    if lengths_S.ndim != 1:
        raise ShapeError(f"lengths_S has shape {tuple(lengths_S.shape)}; expected [S]")
    if not 0 < buffer <= max_length:
        raise SettingError(
            f"got buffer={buffer} and max_length={max_length}; expected 0 < buffer <= max_length"
        )
    if not factor >= 0:
        raise SettingError(f"factor is {factor}; expected 0 or more, since it is subtracted")
    left_S = max_length - buffer - lengths_S.to(torch.float64)
    penalties_S = factor * (left_S / buffer).clamp(-1, 0)
    return penalties_S.to(lengths_S.dtype if lengths_S.is_floating_point() else torch.float32)


def _lead_of_the_best(below_S: Tensor, groups: Groups) -> Tensor:
    """The best reward of a group less the second best, at the best sample; 0 at the others.

    `below_S` is 0 at the best. Two best ones lead by 0, and so does one that is alone.
    """
    is_best_S = below_S == 0
    second_G = groups.max(torch.where(is_best_S, -torch.inf, below_S))
    alone_G = groups.sum(is_best_S.to(torch.float64)) == 1
    lead_G = torch.where(alone_G & second_G.isfinite(), -second_G, 0)
    return torch.where(is_best_S, groups.spread(lead_G), 0)


def _share_of_subsets(part_G: Tensor, whole_G: Tensor, k: int) -> Tensor:
    """`C(part, k) / C(whole, k)` as a product, which is exactly 0 or 1 where it should be."""
    taken_K = torch.arange(k, device=part_G.device)
    left_GK = (part_G[:, None] - taken_K).clamp(min=0)
    return (left_GK / (whole_G[:, None] - taken_K).clamp(min=1)).prod(1)


def _refuse_singletons(ids: Tensor) -> None:
    if ids.numel():
        raise SettingError(
            f"groups {ids.tolist()[:8]} have one scored sample; expected siblings, since "
            'singleton="error"; sample more per prompt, or choose singleton="zero" or "raw"'
        )


def _check_choices(baseline: str, scale: str, singleton: str) -> None:
    baselines = ("mean", "leave_one_out", "length_weighted", "max_two", "none")
    choices = {
        "baseline": (baseline, baselines),
        "scale": (scale, ("group_std", "batch_std", "group_mean", "none")),
        "singleton": (singleton, ("zero", "raw", "error")),
    }
    for name, (got, allowed) in choices.items():
        if got not in allowed:
            raise SettingError(f"{name} is {got!r}; expected one of {allowed}")


def _check_lengths(lengths_S: Tensor | None, rewards_S: Tensor, baseline: str) -> None:
    if lengths_S is None:
        if baseline == "length_weighted":
            raise SettingError('baseline="length_weighted" needs lengths_S; expected [S] lengths')
        return
    if baseline != "length_weighted":
        raise SettingError(
            f'lengths_S has no effect with baseline={baseline!r}; expected "length_weighted"; '
            "leave one of them out"
        )
    if lengths_S.shape != rewards_S.shape:
        raise ShapeError(
            f"lengths_S has shape {tuple(lengths_S.shape)}; expected {tuple(rewards_S.shape)}, "
            "one for each reward"
        )
    if not bool(((lengths_S >= 0) & (lengths_S < torch.inf)).all()):
        raise SettingError("lengths_S holds negative or infinite lengths or NaN; expected counts")


def _check_rewards(
    rewards_S: Tensor, group_ids_S: Tensor, group: ProcessGroup | None
) -> tuple[int, int, bool]:
    """The smallest and the largest id, and whether every reward is finite (they may be NaN)."""
    if rewards_S.ndim != 1 or rewards_S.shape != group_ids_S.shape:
        raise ShapeError(
            f"rewards_S has shape {tuple(rewards_S.shape)} and group_ids_S "
            f"{tuple(group_ids_S.shape)}; expected [S] for both"
        )
    if not rewards_S.is_floating_point() or group_ids_S.dtype not in _INTEGERS:
        raise DtypeError(
            f"rewards_S is {rewards_S.dtype} and group_ids_S {group_ids_S.dtype}; "
            "expected floating point and int64"
        )
    if rewards_S.device != group_ids_S.device:
        raise SettingError(
            f"group_ids_S is on {group_ids_S.device}; expected {rewards_S.device}, where the "
            f'rewards are; move it with .to("{rewards_S.device}")'
        )
    if rewards_S.numel() == 0:
        if group is None:
            raise EmptyBatchError("got no reward; expected at least one sequence")
        return 0, -1, True
    # All in one wait for a GPU. A float64 holds every id that could pass for dense.
    ends = [end.to(torch.float64) for end in torch.aminmax(group_ids_S)]
    low, high, total = torch.stack([*ends, rewards_S.sum(dtype=torch.float64)]).tolist()
    if low < 0:
        raise SettingError(f"group_ids_S holds {int(low)}; expected ids of 0 or more")
    if math.isfinite(total):
        return int(low), int(high), True
    infinite_S = rewards_S.isinf()
    if bool(infinite_S.any()):
        raise NonFiniteError(
            f"rewards_S is infinite at {infinite_S.nonzero().flatten().tolist()[:8]}; expected "
            "finite numbers, or NaN for a sample that was not scored"
        )
    return int(low), int(high), False
