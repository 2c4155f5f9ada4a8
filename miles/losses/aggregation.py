"""From a loss per token to this micro-batch's share of the step's loss.

The one rule: the sum of what `aggregate` returns, over micro-batches, data-parallel and
context-parallel ranks, is the loss of the step. Sum gradients; do not average them (or say with
`averaged_over` how many ranks the wrapper averages).

Shapes: T tokens, S sequences, G groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from miles.errors import DenominatorError, DtypeError, SettingError, ShapeError
from miles.packed import Denominators, Packed, check_tensors, tokens_per_sequence

__all__ = ["aggregate", "keep_untruncated", "token_weights"]

Mode = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "group_mean", "sum"
]


def aggregate(
    loss_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    mode: Mode = "token_mean",
    weights_T: Tensor | None = None,
    keep_T: Tensor | None = None,
    count_rejected: bool = True,
    constant: float | None = None,
    averaged_over: int = 1,
) -> Tensor:
    """This call's trainable tokens, summed and divided by what the whole step holds.

    Args:
        loss_T: float `[T]`.
        packed: where the tokens live.
        denominators: from `count` over the whole step.
        mode: `token_mean` sum / num_tokens (DAPO); `seq_mean_token_mean` each sequence's mean,
            averaged over sequences (GRPO); `seq_mean_token_sum` sum / num_seqs; `constant`
            sum / (num_seqs * constant) (Dr. GRPO); `group_mean` each group's token mean, averaged
            over groups; `sum`.
        weights_T: float `[T]`, importance weights (`Correction.weights_T`).
        keep_T: bool `[T]`; a rejected token adds nothing to the sum.
        count_rejected: rejected tokens stay in the denominator. False needs denominators counted
            with the same `keep_T`.
        constant: tokens a sequence is taken to have, for `mode="constant"`.
        averaged_over: number of ranks over which the wrapper (DDP, FSDP) averages gradients.

    Returns:
        0-d, float32 (float64 for a float64 loss), differentiable.

    Raises:
        DenominatorError: denominators counted another way than `mode` or `count_rejected` needs,
            or without any of these tokens, or on another device.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> loss = torch.tensor([1.0, 3.0, 5.0, float("nan")])
        >>> aggregate(loss, packed, count(packed)).item()
        3.0
        >>> aggregate(loss, packed, count(packed), mode="seq_mean_token_mean").item()
        3.5
    """
    packed.check(loss_T=loss_T)
    coefficients_T = token_weights(
        packed,
        denominators,
        mode=mode,
        weights_T=weights_T,
        keep_T=keep_T,
        count_rejected=count_rejected,
        constant=constant,
        averaged_over=averaged_over,
    )
    active_T = packed.mask_T if keep_T is None else packed.mask_T & keep_T
    total = (torch.where(active_T, loss_T, 0).to(torch.float64) * coefficients_T).sum()
    return total.to(torch.float64 if loss_T.dtype == torch.float64 else torch.float32)


@torch.no_grad()
def token_weights(
    packed: Packed,
    denominators: Denominators,
    *,
    mode: Mode = "token_mean",
    weights_T: Tensor | None = None,
    keep_T: Tensor | None = None,
    count_rejected: bool = True,
    constant: float | None = None,
    averaged_over: int = 1,
) -> Tensor:
    """The coefficients of `aggregate`, for fused kernels and losses of your own.

    Returns:
        float64 `[T]`; `(coefficients_T * loss_T).sum()` is `aggregate(loss_T, ...)`.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> token_weights(packed, count(packed), mode="seq_mean_token_mean").tolist()
        [0.25, 0.25, 0.5, 0.0]
    """
    factor, divisor, per_sequence_S = factors(
        packed, denominators, mode=mode, keep_T=keep_T, count_rejected=count_rejected,
        constant=constant, averaged_over=averaged_over,
    )  # fmt: skip
    active_T = packed.mask_T if keep_T is None else packed.mask_T & keep_T
    coefficients_T = torch.where(active_T, factor / divisor.to(torch.float64), 0)
    if per_sequence_S is not None:
        coefficients_T = coefficients_T * packed.per_token(per_sequence_S)
    if weights_T is not None:
        packed.check(weights_T=weights_T)
        coefficients_T = coefficients_T * torch.where(active_T, weights_T, 0)
    return coefficients_T


def keep_untruncated(truncated_S: Tensor, packed: Packed) -> Tensor:
    """Leaves sequences that ran out of room out of the loss: DAPO's overlong filtering.

    For `keep_T` of `count` and `aggregate`; `&` joins it with the `keep_T` of a correction, and
    `Correction.only` makes one of it for a preset. With `count_rejected=False` and denominators
    counted with the same `keep_T`, loss and gradient are those of a step without these sequences.
    With True the rest keeps the weight that it has among all of them, and only the policy term
    leaves the sequences out: KL, NLL and critic terms still train on them. Their rewards still
    count in their groups' advantages; NaN takes them out there.

    Args:
        truncated_S: bool `[S]`, the same on every rank of `packed.seq_group`. Of samples as
            `collate` got them: `torch.tensor([s.status == Status.TRUNCATED for s in samples])`.
        packed: where the tokens live.

    Returns:
        bool `[T]`: trainable and of a sequence that ended by itself. No rank needs another's.

    Raises:
        ShapeError, DtypeError: not one bool for each sequence.

    References:
        DAPO: arXiv 2503.14476, overlong filtering.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> keep = keep_untruncated(torch.tensor([False, True]), packed)
        >>> keep.tolist()
        [True, True, False, False]
        >>> loss, kept = torch.tensor([1.0, 3.0, 5.0, 0.0]), count(packed, keep_T=keep)
        >>> aggregate(loss, packed, kept, keep_T=keep, count_rejected=False).item()
        2.0
        >>> round(aggregate(loss, packed, count(packed), keep_T=keep).item(), 4)  # of 3 tokens
        1.3333
    """
    check_tensors(truncated_S=truncated_S)
    if truncated_S.shape != (packed.num_seqs,):
        raise ShapeError(
            f"truncated_S has shape {tuple(truncated_S.shape)}; expected [{packed.num_seqs}], "
            "one bool for each sequence"
        )
    if truncated_S.dtype != torch.bool:
        raise DtypeError(
            f"truncated_S is {truncated_S.dtype}; expected torch.bool, True where a sequence was "
            "cut off; compare statuses or lengths"
        )
    return packed.mask_T & ~packed.per_token(truncated_S)


@torch.no_grad()
def factors(
    packed: Packed,
    denominators: Denominators,
    *,
    mode: Mode,
    keep_T: Tensor | None,
    count_rejected: bool,
    constant: float | None,
    averaged_over: int,
) -> tuple[float, Tensor, Tensor | None]:
    """A token's coefficient is `factor / divisor`, an int64 0-d, times, in some modes, an `[S]`."""
    _check(denominators, mode, keep_T, count_rejected, constant, averaged_over)
    if denominators.num_tokens.device != packed.mask_T.device:
        raise DenominatorError(
            f"the denominators are on {denominators.num_tokens.device}; expected "
            f'{packed.mask_T.device}; move them with denominators.to("{packed.mask_T.device}")'
        )
    if keep_T is not None:
        packed.check(keep_T=keep_T)
        if keep_T.dtype != torch.bool:
            raise DtypeError(f"keep_T is {keep_T.dtype}; expected torch.bool")
    if mode == "group_mean" and (packed.group_ids_S is None or denominators.group_tokens_G is None):
        raise DenominatorError(
            'mode="group_mean" needs group_ids_S in the Packed and in what count() saw; got none'
        )
    if mode == "sum":
        divisor = torch.ones_like(denominators.num_tokens)
    elif mode == "token_mean":
        divisor = denominators.num_tokens
    elif mode == "group_mean":
        assert denominators.num_groups is not None
        divisor = denominators.num_groups
    else:
        divisor = denominators.num_seqs
    if denominators.counted_keep:
        divisor = _of_what_is_left(divisor, packed, keep_T)
    factor = averaged_over / (constant or 1.0)
    if mode == "seq_mean_token_mean":
        tokens_S = tokens_per_sequence(packed, None if count_rejected else keep_T)
    elif mode == "group_mean":
        assert packed.group_ids_S is not None and denominators.group_tokens_G is not None
        ids_S, num_groups = packed.group_ids_S, len(denominators.group_tokens_G)
        if ids_S.device.type == "cpu" and ids_S.numel() and int(ids_S.max()) >= num_groups:
            raise DenominatorError(
                f"group id {int(ids_S.max())} is not among the {num_groups} groups that count() "
                "saw; expected denominators of the whole step, these micro-batches among them"
            )
        tokens_S = denominators.group_tokens_G[ids_S]
    else:
        return factor, divisor, None
    return factor, divisor, 1 / tokens_S.clamp(min=1).to(torch.float64)


def _of_what_is_left(divisor: Tensor, packed: Packed, keep_T: Tensor | None) -> Tensor:
    """At least 1: a step whose tokens were all rejected gives 0 / 1."""
    on_cpu = divisor.device.type == "cpu"
    if on_cpu and keep_T is not None and divisor == 0 and bool((packed.mask_T & keep_T).any()):
        raise DenominatorError(
            "the denominators are 0, but keep_T keeps tokens here; expected those that "
            "count(packed, keep_T=...) gave for the same keep_T"
        )
    return divisor.clamp(min=1)


def _check(
    denominators: Denominators,
    mode: str,
    keep_T: Tensor | None,
    count_rejected: bool,
    constant: float | None,
    averaged_over: int,
) -> None:
    modes = (
        "token_mean",
        "seq_mean_token_mean",
        "seq_mean_token_sum",
        "constant",
        "group_mean",
        "sum",
    )
    if mode not in modes:
        raise SettingError(f"mode is {mode!r}; expected one of {modes}")
    if (constant is not None) != (mode == "constant") or (
        constant is not None and not 0 < constant < float("inf")
    ):
        raise SettingError(
            f'got mode={mode!r} and constant={constant}; expected constant > 0 with "constant" '
            "and none otherwise"
        )
    if averaged_over < 1:
        raise SettingError(
            f"averaged_over is {averaged_over}; expected a number of ranks, 1 or more"
        )
    if not count_rejected and keep_T is None:
        raise SettingError("count_rejected=False has no effect without keep_T; give it")
    if count_rejected == denominators.counted_keep:
        how = "with" if denominators.counted_keep else "without"
        raise DenominatorError(
            f"count_rejected={count_rejected}, but the denominators were counted {how} keep_T; "
            "use count(packed, keep_T=...) together with aggregate(..., count_rejected=False), "
            "or neither"
        )
