"""What is minimised beside or instead of a policy gradient, unreduced, and where.

All of it computes and returns float32 for bf16 and fp16 and float64 for float64; a gradient comes
back in the dtype of its input.

Shapes: T tokens, V vocabulary entries, K entries that a teacher reports.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses._dtypes import as_logprobs, widened
from miles.losses._selection import (
    check_share,
    largest,
    number_in_share,
    ranks_of_step,
    sum_over,
)
from miles.packed import Packed

__all__ = [
    "entropy_quantile_mask",
    "generalized_jsd",
    "kl_penalty",
    "nll",
    "topk_distillation",
    "value_loss",
]


def kl_penalty(
    logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    packed: Packed,
    *,
    value: Literal["k1", "k2", "k3", "abs"] = "k3",
    grad: Literal["pathwise", "reverse_kl"] = "pathwise",
) -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy sampled.

    What is reported and what is differentiated are chosen apart, since the gradient of a good
    estimate of a value need not be a good estimate of the gradient: `k1` differentiated has zero
    expectation, `k3` follows the forward KL.

    Args:
        logprobs_T: float `[T]`, with gradient.
        ref_logprobs_T: float `[T]`, detached here.
        packed: where the tokens live.
        value: with d = logprob - ref: `k1` d, `k2` d^2 / 2, `k3` exp(-d) - 1 + d, `abs` |d|.
        grad: `pathwise` differentiates the value; `reverse_kl` gives each log-prob the gradient d,
            unbiased for the reverse KL on policy.

    Returns:
        `[T]`; 0 at masked positions.

    References:
        k1, k2, k3: http://joschu.net/blog/kl-approx.html. Gradients: arXiv 2510.01555.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> ref = torch.tensor([-1.5, -2.0])
        >>> kl = kl_penalty(logprobs, ref, packed, value="k1", grad="reverse_kl")
        >>> kl.sum().backward()
        >>> kl.tolist(), logprobs.grad.tolist()
        ([0.5, 0.0], [0.5, 0.0])
    """
    packed.check(logprobs_T=logprobs_T, ref_logprobs_T=ref_logprobs_T)
    logprobs_T, ref_logprobs_T = as_logprobs(
        logprobs_T=logprobs_T, ref_logprobs_T=ref_logprobs_T.detach()
    )
    new_T = torch.where(packed.mask_T, logprobs_T, 0)
    d_T = new_T - torch.where(packed.mask_T, ref_logprobs_T, 0)
    if value == "k1":
        value_T = d_T
    elif value == "k2":
        value_T = d_T**2 / 2
    elif value == "k3":
        value_T = torch.expm1(-d_T) + d_T
    elif value == "abs":
        value_T = d_T.abs()
    else:
        raise SettingError(f"value is {value!r}; expected k1, k2, k3 or abs")
    if grad == "pathwise":
        return value_T
    if grad == "reverse_kl":
        return value_T.detach() + d_T.detach() * (new_T - new_T.detach())
    raise SettingError(f"grad is {grad!r}; expected pathwise or reverse_kl")


def value_loss(
    values_T: Tensor,
    old_values_T: Tensor,
    returns_T: Tensor,
    packed: Packed,
    *,
    clip: float | None = 0.2,
) -> Tensor:
    """`0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)`.

    Args:
        values_T: float `[T]`, carries the gradient.
        old_values_T: float `[T]`, those at the start of the step, detached here.
        returns_T: float `[T]`, detached here.
        packed: where the tokens live.
        clip: how far a value may move in one step, above 0; None for the plain square.

    Returns:
        `[T]`; 0 at masked positions.

    References:
        PPO as in https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/, point 9.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True]]))
        >>> values, old, returns = torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([2.0, 0])
        >>> value_loss(values, old, returns, packed, clip=0.5).tolist()
        [1.125, 0.5]
    """
    if clip is not None and not clip > 0:
        raise SettingError(f"clip is {clip}; expected a number above 0, such as 0.2, or None")
    packed.check(values_T=values_T, old_values_T=old_values_T, returns_T=returns_T)
    values_T, old_T, returns_T = (
        torch.where(packed.mask_T, widened(x_T), 0)
        for x_T in (values_T, old_values_T.detach(), returns_T.detach())
    )
    square_T = (values_T - returns_T) ** 2
    if clip is not None:
        near_T = values_T.clamp(old_T - clip, old_T + clip)
        square_T = torch.maximum(square_T, (near_T - returns_T) ** 2)
    return 0.5 * square_T


def nll(logprobs_T: Tensor, packed: Packed) -> Tensor:
    """`-logp` of tokens to imitate: supervised fine-tuning, or VAPO's term on positive samples.

    Args:
        logprobs_T: float `[T]`, carries the gradient.
        packed: where the tokens live; mask what is not to be imitated.

    Returns:
        `[T]`; 0 at masked positions.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, False]]))
        >>> nll(torch.tensor([-1.5, float("nan")]), packed).tolist()
        [1.5, 0.0]
    """
    packed.check(logprobs_T=logprobs_T)
    return torch.where(packed.mask_T, -widened(logprobs_T), 0)


def generalized_jsd(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    packed: Packed,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """`beta KL(P || M) + (1 - beta) KL(Q || M)`, `M = beta P + (1 - beta) Q`, P the teacher.

    At the ends, where this is 0, it is instead its limit divided by beta or by 1 - beta: beta = 0
    is the forward KL(P || Q) and beta = 1 the reverse KL(Q || P), as in TRL. It is not multiplied
    by the square of the temperature.

    Args:
        student_logits_TV: float `[T, V]`, carries the gradient; Q.
        teacher_logits_TV: float `[T, V]`, detached here; P. -inf is a token that cannot come.
        packed: where the tokens live.
        beta: from 0 to 1.
        temperature: divides both logits, above 0.

    Returns:
        `[T]`, float64 for float64 logits and float32 for all others; 0 at masked positions.

    References:
        GKD: arXiv 2306.13649, equation 1.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True]]))
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
        >>> [round(generalized_jsd(student, teacher, packed, beta=b).item(), 4) for b in (0, 0.5)]
        [0.6931, 0.2158]
    """
    _check_logits(student_logits_TV, packed)
    if teacher_logits_TV.shape != student_logits_TV.shape:
        raise ShapeError(
            f"teacher_logits_TV has shape {tuple(teacher_logits_TV.shape)}; expected "
            f"{tuple(student_logits_TV.shape)}, that of the student over the same vocabulary"
        )
    if not 0 <= beta <= 1:
        raise SettingError(f"beta is {beta}; expected a number from 0 to 1")
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise SettingError(f"temperature is {temperature!r}; expected a finite number above 0")
    student_TV = _log_softmax(student_logits_TV, packed, temperature)
    teacher_TV = _log_softmax(teacher_logits_TV.detach(), packed, temperature)
    if beta == 0:
        loss_T = _kl(teacher_TV, student_TV)
    elif beta == 1:
        loss_T = _kl(student_TV, teacher_TV)
    else:
        # Where both have -inf, no sum of theirs has a derivative; anything else counts 0 as well.
        neither_TV = (teacher_TV == -torch.inf) & (student_TV == -torch.inf)
        mixture_TV = torch.logaddexp(
            teacher_TV.masked_fill(neither_TV, 0) + math.log(beta),
            student_TV.masked_fill(neither_TV, 0) + math.log1p(-beta),
        )
        loss_T = beta * _kl(teacher_TV, mixture_TV) + (1 - beta) * _kl(student_TV, mixture_TV)
    return torch.where(packed.mask_T, loss_T, 0)


def topk_distillation(
    student_logits_TV: Tensor,
    teacher_logprobs_TK: Tensor,
    teacher_ids_TK: Tensor,
    packed: Packed,
    *,
    kind: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    tail: bool = True,
) -> Tensor:
    """KL between teacher P and student Q over the K tokens that the teacher reports.

    `forward_kl` is KL(P || Q), `reverse_kl` KL(Q || P). With `tail` all other tokens together are
    one more event, so both distributions stay whole; without, both are renormalised over the K.

    Args:
        student_logits_TV: float `[T, V]`, carries the gradient.
        teacher_logprobs_TK: float `[T, K]`, over the teacher's whole vocabulary, detached here.
            What they leave of 1 is taken to be at least the rounding of their dtype, or nothing
            where that is all and the student has -inf for every other token.
        teacher_ids_TK: int64 `[T, K]`, distinct within a row, in `0..V-1`.
        packed: where the tokens live.
        kind: `forward_kl` or `reverse_kl`.
        tail: keep the rest as one event.

    Returns:
        `[T]`, float64 for float64 logits and float32 for all others; 0 at masked positions.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
        SettingError: an unknown kind, or ids out of range or repeated within a row (looked for on
            CPU tensors only, to spare the GPU a stall; there a row that repeats an id is NaN).

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True]]))
        >>> student, ids = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[2]])
        >>> teacher = torch.tensor([[0.5]]).log()
        >>> round(topk_distillation(student, teacher, ids, packed).item(), 4)  # of (1/4, 3/4)
        0.1438
        >>> topk_distillation(student, teacher, ids, packed, tail=False).item()
        0.0
    """
    _check_logits(student_logits_TV, packed)
    if kind not in ("forward_kl", "reverse_kl"):
        raise SettingError(f"kind is {kind!r}; expected forward_kl or reverse_kl")
    ids_TK = _check_ids(teacher_ids_TK, teacher_logprobs_TK, student_logits_TV, packed)
    repeated_T = _repeats(ids_TK)
    student_TV = _log_softmax(student_logits_TV, packed, 1.0)
    student_TK = student_TV.gather(-1, ids_TK)
    teacher_TK = torch.where(packed.mask_T[:, None], teacher_logprobs_TK.detach(), -1.0)
    teacher_TK = teacher_TK.to(student_TV.dtype)
    if not tail:
        student_TK = student_TK - student_TK.logsumexp(-1, keepdim=True)
        teacher_TK = teacher_TK - teacher_TK.logsumexp(-1, keepdim=True)
    elif ids_TK.shape[1] < student_TV.shape[1]:
        student_rest_T1, whole_T1 = _rest_of(student_TV, ids_TK)
        covered_T1 = teacher_TK.logsumexp(-1, keepdim=True)
        rounding = torch.finfo(teacher_logprobs_TK.dtype).eps
        teacher_rest_T1 = torch.log(-torch.expm1(covered_T1.clamp(max=-rounding)))
        # What the teacher leaves by its rounding alone is nothing if the student leaves nothing.
        few = rounding * (2 + math.log(ids_TK.shape[1]))
        nothing_T1 = whole_T1 & (covered_T1 >= -few)
        student_TK = torch.cat([student_TK, student_rest_T1], -1)
        teacher_TK = torch.cat(
            [teacher_TK, teacher_rest_T1.masked_fill(nothing_T1, -torch.inf)], -1
        )
    forward = kind == "forward_kl"
    kl_T = _kl(teacher_TK, student_TK) if forward else _kl(student_TK, teacher_TK)
    return torch.where(packed.mask_T, torch.where(repeated_T, torch.nan, kl_T), 0)


@torch.no_grad()
def entropy_quantile_mask(
    entropy_T: Tensor, packed: Packed, *, share: float = 0.2, group: ProcessGroup | None = None
) -> Tensor:
    """The tokens of the highest entropy, for `aggregate(..., keep_T=)`.

    `max(1, floor(share * N))` of the N trainable tokens of the whole step, on all ranks; those
    that tie with the last of them stay too. Call it once with `Packed.cat` of the micro-batches.

    Args:
        entropy_T: float `[T]`.
        packed: the whole step of this rank.
        share: fraction to keep, above 0 and at most 1.
        group: data-parallel ranks. Ranks that share sequences are `packed.seq_group`.

    Returns:
        bool `[T]`, False at masked positions.

    Raises:
        NonFiniteError: NaN or infinity at a trainable token, on every rank if any has one.
        EmptyBatchError: no trainable token on any rank.

    References:
        Beyond the 80/20 rule: arXiv 2506.01939.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, True, True, False]]))
        >>> entropy = torch.tensor([0.1, 2.0, 0.5, 1.0, float("nan")])
        >>> entropy_quantile_mask(entropy, packed, share=0.5).tolist()
        [False, True, False, True, False]
    """
    check_share(share)
    packed.check(entropy_T=entropy_T)
    mask_T = packed.mask_T
    groups = ranks_of_step(packed, group)
    bad_T = mask_T & ~entropy_T.isfinite()
    num_tokens, num_bad = sum_over(torch.stack([mask_T.sum(), bad_T.sum()]), groups).tolist()
    if num_bad:
        raise NonFiniteError(
            f"entropy_T is NaN or infinite at {num_bad} trainable tokens of the step; expected "
            "numbers; mask the tokens, or look at the logits"
        )
    if num_tokens == 0:
        raise EmptyBatchError("the step has no trainable token on any rank; skip it")
    top = largest(entropy_T[mask_T], number_in_share(share, num_tokens), groups)
    return mask_T & (entropy_T >= top[-1])


def _log_softmax(logits_TV: Tensor, packed: Packed, temperature: float) -> Tensor:
    """At least float32; masked rows are uniform and pass no gradient."""
    logits_TV = torch.where(packed.mask_T[:, None], logits_TV, 0)
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_TV.to(wide) / temperature, dim=-1)


def _rest_of(logprobs_TV: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mass outside the ids, `[T, 1]`, and whether that is nothing: then -inf, no gradient."""
    # not 1 - sum: that leaves nothing of a small rest, and the KL would be infinite
    outside_TV = logprobs_TV.scatter(-1, ids_TK, -torch.inf)
    whole_T1 = (outside_TV == -torch.inf).all(-1, keepdim=True)
    rest_T1 = outside_TV.masked_fill(whole_T1, 0).logsumexp(-1, keepdim=True)
    return rest_T1.masked_fill(whole_T1, -torch.inf), whole_T1


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; an event without probability adds nothing."""
    p = log_p.exp()
    return (p * torch.where(p == 0, 0, log_p - log_q)).sum(-1)


def _check_logits(student_logits_TV: Tensor, packed: Packed) -> None:
    if student_logits_TV.ndim != 2 or student_logits_TV.shape[0] != packed.num_positions:
        raise ShapeError(
            f"student_logits_TV has shape {tuple(student_logits_TV.shape)}; expected "
            f"[{packed.num_positions}, V], one row for each position of the packed batch"
        )


def _check_ids(ids_TK: Tensor, logprobs_TK: Tensor, logits_TV: Tensor, packed: Packed) -> Tensor:
    """The ids, 0..K-1 in masked rows."""
    T, V = logits_TV.shape
    if ids_TK.ndim != 2 or ids_TK.shape[0] != T or logprobs_TK.shape != ids_TK.shape:
        raise ShapeError(
            f"teacher_ids_TK has shape {tuple(ids_TK.shape)} and teacher_logprobs_TK "
            f"{tuple(logprobs_TK.shape)}; expected [{T}, K] for both"
        )
    K = ids_TK.shape[1]
    if not 1 <= K <= V:
        raise ShapeError(f"the teacher reports {K} tokens; expected 1 to {V}, the vocabulary")
    if ids_TK.dtype != torch.int64:
        raise DtypeError(
            f"teacher_ids_TK is {ids_TK.dtype}; expected torch.int64; convert it with "
            ".to(torch.int64)"
        )
    ids_TK = torch.where(packed.mask_T[:, None], ids_TK, torch.arange(K, device=ids_TK.device))
    if ids_TK.device.type == "cpu" and bool(((ids_TK < 0) | (ids_TK >= V)).any()):
        raise SettingError(
            f"teacher_ids_TK holds values from {int(ids_TK.min())} to {int(ids_TK.max())}; "
            f"expected 0..{V - 1}"
        )
    return ids_TK


def _repeats(ids_TK: Tensor) -> Tensor:
    """bool `[T]`: rows that hold an id twice, whose mass would count twice; refused on the CPU."""
    repeated_T = (ids_TK.sort(-1).values.diff(dim=-1) == 0).any(-1)
    if ids_TK.device.type == "cpu" and bool(repeated_T.any()):
        row = int(repeated_T.nonzero()[0])
        raise SettingError(
            f"teacher_ids_TK repeats an id in {int(repeated_T.sum())} rows, the first of them row "
            f"{row}: {ids_TK[row].tolist()}; expected distinct ids; add up the mass of a repeated "
            "one, or mask the row"
        )
    return repeated_T
