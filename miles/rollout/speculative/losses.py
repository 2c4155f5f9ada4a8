"""What a draft learns from the policy's forward pass.

A sequence is x_0, x_1, ...; row t of step i of a draft predicts x_{t+2+i}, which the policy
predicts at place t + 1 + i. Masks are laid out by prediction, as `miles.rollout.collate` does it:
position t is True where token t + 1 is trained on.

Shapes: B x L tokens, V of the policy's vocabulary, U of the draft's, K steps, P places that are
judged, T = B * L tokens laid end to end, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses import Mean, Metrics, linear_logprobs, mean_over, token_logprobs
from miles.packed import Packed, check_tensors
from miles.rollout.speculative._divergence import (
    Kind,
    Settings,
    TargetLogits,
    divergence,
    row_before,
)
from miles.rollout.speculative._host import upload
from miles.rollout.speculative._shift import shift_tokens

__all__ = [
    "Kind",
    "MaskPolicy",
    "TargetLogits",
    "check_batch",
    "check_loss_settings",
    "draft_loss",
    "loss_of_rows",
    "mtp_loss",
    "shift_tokens",
]

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class MaskPolicy:
    """Which places a draft learns from. Readings cover those of `tokens`, dropped or not."""

    tokens: Literal["response", "all"] = "response"
    """`response`: where the mask is True, which is what the draft will have to propose. `all`:
    every place of a sequence, prompts too."""
    outside: Literal["drop", "keep"] = "drop"
    """Of a draft with a reduced vocabulary: what to do where the policy's most likely token is not
    in it. `drop`, as EAGLE-3's training does, or `keep` what is left of the distribution. Under
    `hard` it is the sampled token that counts, and one outside is always dropped."""

    def __post_init__(self) -> None:
        if self.tokens not in ("response", "all"):
            raise SettingError(f"tokens is {self.tokens!r}; expected response or all")
        if self.outside not in ("drop", "keep"):
            raise SettingError(f"outside is {self.outside!r}; expected drop or keep")


def draft_loss(
    logits_list: Sequence[Tensor],
    target_logits_BLV: Tensor | TargetLogits,
    input_ids_BL: Tensor,
    mask_BL: Tensor,
    *,
    denominator: Tensor | float,
    kind: Kind = "kl",
    decay: float = 0.8,
    target_ids: Tensor | None = None,
    temperature: float = 1.0,
    seq_ids_BL: Tensor | None = None,
    mask_policy: MaskPolicy | None = None,
    renormalize: bool = True,
) -> tuple[Tensor, Metrics]:
    """`sum_i decay^i sum_t loss(p_{t+1+i}, q_{i,t}) / denominator` over the steps of a draft.

    With p the policy's distribution and q the draft's, both tempered, a place costs

    - `kl`: KL(p || q), the default. Of a reduced vocabulary p is renormalised within it.
    - `hard`: -log q of the token that was sampled.
    - `tv`: 1 - sum min(p, q), the probability that the draft's token is rejected.
    - `lk`: -log sum min(p, q), with steeper slopes where acceptance is low.

    `tv` and `lk` take p as it is, since they are acceptance itself.

    Memory: the logits stay as they came, and their gradients are made once, in their dtype (twice
    under `retain_graph`); float32 copies live for 2^25 numbers at a time, of which about six are
    held at once (0.8 GiB).

    Metrics, all of which merge exactly (`miles.losses.reduce_metrics`): `draft/loss` the sum over
    steps for each place of step 0 that is learnt from; and for each step `draft/loss/step_i`,
    `draft/acceptance/step_i` the mean of sum min(p, q), `draft/agreement/step_i` how often both
    have the same most likely token; `draft/accept_length`, tokens a verification would yield, the
    bonus token included, `1 + a_0 + a_0 a_1 + ...` over starts that have all steps;
    `draft/dropped`, the share of places of step 0 that `mask_policy` leaves out for the vocabulary.

    Args:
        logits_list: K tensors of floating point `[B, L, U]`, from `draft.unroll`.
        target_logits_BLV: the policy's `[B, L, V]`, detached here; `TargetLogits` for some of the
            places only, or for hidden states and a head.
        input_ids_BL: int64 `[B, L]`.
        mask_BL: bool `[B, L]`, by prediction. It and `seq_ids_BL` may be on the CPU; on a GPU the
            host waits for them.
        denominator: above 0; what the whole optimizer step divides by, such as
            `count(packed).num_tokens`. The losses of micro-batches and ranks are then summed.
        kind: see above.
        decay: weight of a step over that of the one before, above 0 and at most 1.
        target_ids: int64 `[U]`, the policy's id of each of the draft's tokens (`draft.target_ids`);
            None for one vocabulary.
        temperature: above 0, what rollouts are sampled with.
        seq_ids_BL: int64 `[B, L]`, for rows that hold several sequences, each in one piece; -1 is
            padding. None: a row is a sequence, and padding is what `mask_BL` leaves out (give ids
            for `MaskPolicy(tokens="all")` over padded rows).
        mask_policy: `MaskPolicy()`: responses, without places whose top token is outside.
        renormalize: False multiplies KL by the mass that p has within the draft's vocabulary.

    Returns:
        The loss, 0-d, float64 for float64 logits and float32 for all others, and the metrics.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
        SettingError: settings out of range, or ids outside the policy's vocabulary (looked for on
            CPU tensors only, to spare the GPU a stall).

    References:
        EAGLE-3: arXiv 2503.01840. Acceptance is sum min(p, q): arXiv 2211.17192, theorem 3.5.

    Example:
        >>> from miles.rollout.speculative.losses import draft_loss
        >>> policy = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
        >>> draft = torch.tensor([[[1.0, 3.0], [0.0, 0.0], [0.0, 0.0]]]).log()
        >>> ids, mask = torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]])
        >>> loss, metrics = draft_loss([draft], policy, ids, mask, denominator=1)
        >>> round(loss.item(), 4), float(metrics["draft/acceptance/step_0"])
        (0.1438, 0.75)
    """
    target = target_logits_BLV
    if not isinstance(target, TargetLogits):
        target = TargetLogits(values_BKX=target)
    check_batch(input_ids_BL, mask_BL, seq_ids_BL)
    _check_logits(logits_list, input_ids_BL, target, target_ids)
    return loss_of_rows(
        [logits_BLU.flatten(0, 1) for logits_BLU in logits_list],
        None,
        target,
        upload(target.rows_of_places(*input_ids_BL.shape), mask_BL.device),
        input_ids_BL,
        mask_BL,
        denominator=denominator,
        kind=kind,
        decay=decay,
        target_ids=target_ids,
        temperature=temperature,
        seq_ids_BL=seq_ids_BL,
        mask_policy=mask_policy,
        renormalize=renormalize,
    )


def loss_of_rows(
    rows_KR: Sequence[Tensor],
    head: Callable[[Tensor], Tensor] | None,
    target: TargetLogits,
    target_rows_BL: Tensor,
    input_ids_BL: Tensor,
    mask_BL: Tensor,
    *,
    denominator: Tensor | float,
    kind: Kind,
    decay: float,
    target_ids: Tensor | None,
    temperature: float,
    seq_ids_BL: Tensor | None,
    mask_policy: MaskPolicy | None,
    renormalize: bool,
) -> tuple[Tensor, Metrics]:
    """`draft_loss` of `[B * L, ...]` rows: logits, or with a head the states that it makes logits
    of, at judged places only. `target_rows_BL` are the policy's rows, -1 where there is none; they,
    mask and sequences may be on the CPU, and then nothing waits for the rows' device."""
    check_loss_settings(kind=kind, decay=decay, temperature=temperature)
    policy = mask_policy or MaskPolicy()
    K = len(rows_KR)
    valid_KR = _valid(mask_BL, seq_ids_BL, target_rows_BL, kind, policy, K)
    places_P = valid_KR.any(0).nonzero()[:, 0]
    target_rows_P, valid_KP, places_P = (
        upload(tensor, rows_KR[0].device)
        for tensor in (target_rows_BL.flatten()[places_P], valid_KR[:, places_P], places_P)
    )
    labels_P = input_ids_BL.flatten()[(places_P + 1) % input_ids_BL.numel()]
    labels_P, has_label_P = _draft_ids(labels_P, target_ids, target.vocab_size)
    if head is not None:
        rows_KR = [head(rows_RH[row_before(places_P, k, len(rows_RH))])
                   for k, rows_RH in enumerate(rows_KR)]  # fmt: skip
    terms = divergence(
        rows_KR,
        target,
        aligned=head is not None,
        places_P=places_P,
        target_rows_P=target_rows_P,
        labels_P=labels_P,
        valid_KP=valid_KP,
        settings=Settings(
            kind=kind, temperature=temperature, renormalize=renormalize, target_ids_U=target_ids
        ),
    )
    inside_P = has_label_P if kind == "hard" else terms.known_P
    if kind != "hard" and policy.outside == "keep":
        inside_P = torch.ones_like(inside_P)
    learnt_KP = valid_KP & inside_P
    loss_KP = torch.where(learnt_KP, terms.loss_KP, 0)
    weights_K = decay ** torch.arange(K, dtype=torch.float64, device=places_P.device)
    loss_K = loss_KP.sum(1, dtype=torch.float64)
    total = (loss_K * weights_K).sum()
    wide = torch.float64
    learnt_K, judged_K = (which_KP.sum(1, dtype=wide) for which_KP in (learnt_KP, valid_KP))
    metrics: Metrics = {
        "draft/loss": Mean(total.detach(), learnt_K[0]),
        "draft/dropped": mean_over((~inside_P).to(wide), valid_KP[0]),
        "draft/accept_length": _accept_length(terms.alpha_KP, valid_KP, places_P),
    }
    readings = {
        "loss": (loss_K.detach(), learnt_K),
        "acceptance": (terms.alpha_KP.sum(1, dtype=wide), judged_K),
        "agreement": (terms.agrees_KP.sum(1, dtype=wide), judged_K),
    }
    for name, (totals_K, counts_K) in readings.items():
        for i in range(K):
            metrics[f"draft/{name}/step_{i}"] = Mean(totals_K[i], counts_K[i])
    return (total / denominator).to(loss_KP.dtype), metrics


def mtp_loss(
    outputs: Sequence[Tensor],
    input_ids_T: Tensor,
    packed: Packed,
    *,
    denominator: Tensor | float,
    head_VD: Tensor | None = None,
    scaling: float = 0.2,
    temperature: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """`scaling / K * sum_k CE(h_k, x_{t+k+1}) / denominator`, to add to the policy's loss.

    h_k, of k = 1..K, is made of the trunk at t and of x_{t+1}..x_{t+k}; labels and mask are rolled
    with it, within a sequence and over the ranks of `packed.seq_group`, in whatever order these
    hold its tokens. Build `outputs` from `trunk.detach()` and `embedding(ids).detach()`, and give
    the head here: it is detached, so only what lies between gets a gradient, the same whatever the
    policy's loss is. The ids come from `shift_tokens(input_ids_T, packed, by=k)`.

    Args:
        outputs: for each k, hidden states `[T, D]` that the head reads, or logits `[T, V]`.
        input_ids_T: int64 `[T]`, of this rank.
        packed: where the tokens live, `positions_T` included. Ranks of `seq_group` call together.
        denominator: of the whole step: `count(packed).num_tokens` over all micro-batches and ranks.
        head_VD: weight of the output head; None where `outputs` are logits.
        scaling: weight of the whole against the policy's loss.
        temperature: divides the logits.

    Returns:
        The loss, 0-d, and `mtp/loss`, the mean over depths, and `mtp/loss/depth_k`, k from 1, means
        over labels of the cross-entropy in nats, unscaled.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
        SettingError: no depth, settings out of range, or a `packed` without positions.

    References:
        DeepSeek-V3: arXiv 2412.19437, equations 21 to 25.

    Example:
        >>> from miles.rollout.speculative.losses import mtp_loss
        >>> packed = Packed.from_padded(torch.tensor([[True, True, True, False]]))
        >>> logits = torch.zeros(4, 2)
        >>> loss, metrics = mtp_loss([logits], torch.tensor([0, 1, 1, 0]), packed, denominator=2)
        >>> round(loss.item(), 4), round(float(metrics["mtp/loss"]), 4)  # 0.2 ln 2, ln 2
        (0.1386, 0.6931)
    """
    if not outputs:
        raise SettingError("outputs is empty; expected one tensor for each depth of the MTP")
    if not scaling >= 0:
        raise SettingError(f"scaling is {scaling}; expected a number of 0 or more")
    packed.check(input_ids_T=input_ids_T)
    parts, metrics = [], Metrics()
    for depth, output in enumerate(outputs, 1):
        labels_T = shift_tokens(input_ids_T, packed, by=depth + 1, fill=IGNORED)
        mask_T = shift_tokens(packed.mask_T, packed, by=depth, fill=False)
        labels_T = torch.where(mask_T, labels_T, IGNORED)
        if head_VD is None:
            logprobs_T = token_logprobs(output, labels_T, temperature=temperature)
        else:
            head = head_VD.detach()
            logprobs_T = linear_logprobs(output, head, labels_T, temperature=temperature).logprobs
        nll_T = -logprobs_T
        metrics[f"mtp/loss/depth_{depth}"] = mean_over(nll_T, labels_T != IGNORED)
        parts.append(nll_T.sum(dtype=torch.float64))
    means = [metric for metric in metrics.values() if isinstance(metric, Mean)]
    metrics["mtp/loss"] = Mean.merge(torch.stack([torch.stack(m.numbers()) for m in means]))
    total = torch.stack(parts).sum() * (scaling / len(outputs)) / denominator
    return total.to(nll_T.dtype), metrics


def check_loss_settings(*, kind: str, decay: float, temperature: float) -> None:
    """Raise `SettingError` unless `draft_loss` takes these."""
    if kind not in get_args(Kind):
        raise SettingError(f"kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    if not 0 < decay <= 1:
        raise SettingError(f"decay is {decay}; expected a number above 0 and at most 1")
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise SettingError(
            f"temperature is {temperature!r}; expected a finite number above 0 (for rollouts at "
            "temperature 0 train the draft at 1)"
        )


def _valid(
    mask_BL: Tensor,
    seq_ids_BL: Tensor | None,
    target_rows_BL: Tensor,
    kind: Kind,
    policy: MaskPolicy,
    num_steps: int,
) -> Tensor:
    """bool `[K, B * L]`: places that step k says something about, and that are to be judged."""
    if seq_ids_BL is None:
        seq_ids_BL = torch.zeros_like(mask_BL, dtype=torch.int64)
    judged_BL = (seq_ids_BL >= 0) & (target_rows_BL >= 0)
    if policy.tokens == "response":
        judged_BL = judged_BL & mask_BL
    if kind == "hard":
        judged_BL = judged_BL & (seq_ids_BL == _moved(seq_ids_BL, -1))
    return torch.stack(
        [(judged_BL & (seq_ids_BL == _moved(seq_ids_BL, k + 1))).flatten()
         for k in range(num_steps)]
    )  # fmt: skip


def _moved(ids_BL: Tensor, by: int) -> Tensor:
    """What stands `by` places before, in the same row; -2 where that is outside."""
    outside_BL = torch.full_like(ids_BL, -2)
    if by > 0:
        outside_BL[:, by:] = ids_BL[:, :-by]
    else:
        outside_BL[:, :by] = ids_BL[:, -by:]
    return outside_BL


def _draft_ids(
    labels_P: Tensor, target_ids: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The draft's id of each label, 0 where it has none, and whether it has one."""
    if target_ids is None:
        return labels_P, torch.ones_like(labels_P, dtype=torch.bool)
    inverse_V = target_ids.new_full((vocab_size,), -1)
    inverse_V[target_ids] = torch.arange(target_ids.shape[0], device=target_ids.device)
    found_P = inverse_V[labels_P]
    return found_P.clamp(min=0), found_P >= 0


def _accept_length(alpha_KP: Tensor, valid_KP: Tensor, places_P: Tensor) -> Mean:
    """Over starts whose K steps are all judged; `step k` of start t stands at place t + 1 + k."""
    K, P = alpha_KP.shape
    if P == 0:
        return mean_over(alpha_KP.sum(0), valid_KP.any(0))
    # Places are sorted, and those of one start follow each other, so k places on is k columns on.
    k_K1 = torch.arange(K, device=places_P.device)[:, None]
    column_KP = (torch.arange(P, device=places_P.device) + k_K1).clamp(max=P - 1)
    follows_KP = places_P[column_KP] == places_P + k_K1
    all_P = (follows_KP & valid_KP.gather(1, column_KP)).all(0)
    chain_KP = alpha_KP.gather(1, column_KP).to(torch.float64).cumprod(0)
    return mean_over(1 + chain_KP.sum(0), all_P)


def check_batch(input_ids_BL: Tensor, mask_BL: Tensor, seq_ids_BL: Tensor | None) -> None:
    """Raise `ShapeError` or `DtypeError` unless these are `[B, L]` and what they should be."""
    check_tensors(input_ids_BL=input_ids_BL, mask_BL=mask_BL)
    shape = input_ids_BL.shape
    if input_ids_BL.ndim != 2:
        raise ShapeError(f"input_ids_BL has shape {tuple(shape)}; expected [B, L]")
    for name, tensor, dtype in (
        ("input_ids_BL", input_ids_BL, torch.int64),
        ("mask_BL", mask_BL, torch.bool),
        ("seq_ids_BL", seq_ids_BL, torch.int64),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
        if tensor.dtype != dtype:
            raise DtypeError(f"{name} is {tensor.dtype}; expected {dtype}")


def _check_logits(
    logits_list: Sequence[Tensor],
    input_ids_BL: Tensor,
    target: TargetLogits,
    target_ids: Tensor | None,
) -> None:
    if not logits_list:
        raise ShapeError("logits_list is empty; expected one [B, L, U] for each step of the draft")
    if target_ids is not None:
        _check_target_ids(target_ids, target.vocab_size)
    U = target.vocab_size if target_ids is None else target_ids.shape[0]
    for i, logits_BLU in enumerate(logits_list):
        if logits_BLU.shape != (*input_ids_BL.shape, U):
            raise ShapeError(
                f"logits_list[{i}] has shape {tuple(logits_BLU.shape)}; expected "
                f"{(*input_ids_BL.shape, U)}, the draft's vocabulary; a reduced one needs "
                "target_ids"
            )
        if logits_BLU.dtype != logits_list[0].dtype or not logits_BLU.is_floating_point():
            raise DtypeError(
                f"logits_list[{i}] is {logits_BLU.dtype}; expected floating point, one dtype"
            )


def _check_target_ids(target_ids: Tensor, vocab_size: int) -> None:
    if target_ids.ndim != 1 or not target_ids.numel():
        raise ShapeError(f"target_ids has shape {tuple(target_ids.shape)}; expected [U]")
    if target_ids.dtype != torch.int64:
        raise DtypeError(f"target_ids is {target_ids.dtype}; expected torch.int64")
    if target_ids.device.type != "cpu":
        return
    low, high = int(target_ids.min()), int(target_ids.max())
    if low < 0 or high >= vocab_size or len(target_ids.unique()) != len(target_ids):
        raise SettingError(
            f"target_ids holds {len(target_ids)} ids from {low} to {high}; expected distinct ones "
            f"in 0..{vocab_size - 1}, the policy's vocabulary"
        )
