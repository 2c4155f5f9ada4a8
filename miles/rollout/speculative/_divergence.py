"""How far a draft's distributions are from the policy's, a chunk of places at a time.

The policy's side of a chunk is made once for all steps of the draft, and the gradient in the same
pass as the loss, so that a chunk is read once.

Shapes: B x L tokens, R = B * L rows of a step's logits, K steps of the draft (in `TargetLogits`,
rows of logits a sequence), U tokens of its vocabulary, V of the policy's, D hidden size, P places
that are judged, n of them in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from miles.errors import DtypeError, ShapeError

__all__ = ["CHUNK", "Kind", "Settings", "TargetLogits", "Terms", "divergence", "row_before"]

CHUNK = 2**25
"""Numbers of a chunk over the policy's vocabulary: 128 MiB of float32."""

Kind = Literal["kl", "hard", "tv", "lk"]


@dataclass(frozen=True, kw_only=True)
class TargetLogits:
    """The policy's distributions in the form in which they are there, never with a gradient.

    Args:
        values_BKX: `[B, K, V]` logits, or with a head `[B, K, D]` what the head reads.
        positions_K: int64, place in the row of each of the K; None: K is L, every place.
        head_VD: the weight that makes logits of `values_BKX`, a chunk at a time.
        head_bias_V: its bias.

    Raises:
        ShapeError, DtypeError: what does not fit together.

    Example:
        >>> whole = TargetLogits(values_BKX=torch.zeros(2, 5, 7))
        >>> whole.vocab_size, TargetLogits(
        ...     values_BKX=torch.zeros(2, 5, 4), head_VD=torch.zeros(7, 4)).vocab_size
        (7, 7)
    """

    values_BKX: Tensor
    """`[B, K, V]` logits or `[B, K, D]` hidden states."""
    positions_K: Tensor | None = None
    """int64 `[K]`: which places of a row these are; None: all of them, in order."""
    head_VD: Tensor | None = None
    """`[V, D]`: None where `values_BKX` are logits."""
    head_bias_V: Tensor | None = None
    """`[V]`."""

    def __post_init__(self) -> None:
        values = self.values_BKX
        if values.ndim != 3 or values.shape[2] == 0:
            raise ShapeError(f"the policy's logits have shape {tuple(values.shape)}; expected "
                             "[B, L, V]")  # fmt: skip
        if not values.is_floating_point():
            raise DtypeError(f"the policy's logits are {values.dtype}; expected floating point")
        if self.positions_K is not None and self.positions_K.shape != values.shape[1:2]:
            raise ShapeError(
                f"positions_K has shape {tuple(self.positions_K.shape)}; expected "
                f"[{values.shape[1]}], the place of each row of logits"
            )
        head = self.head_VD
        if head is not None and (head.ndim != 2 or head.shape[1] != values.shape[2]):
            raise ShapeError(
                f"head_VD has shape {tuple(head.shape)}; expected [V, {values.shape[2]}], as wide "
                "as the hidden states"
            )

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.values_BKX.shape[2] if self.head_VD is None else self.head_VD.shape[0]

    def rows_of_places(self, num_rows: int, length: int) -> Tensor:
        """int64 `[B, L]`: which of the `B * K` rows each place has, -1 where it has none; where
        `positions_K` is, or without them on the CPU.

        Raises:
            ShapeError: a policy's pass over another batch.
        """
        B, K = self.values_BKX.shape[:2]
        if (B, K if self.positions_K is None else length) != (num_rows, length):
            raise ShapeError(
                f"the policy's logits are of {K} places in {B} rows; expected {length} in "
                f"{num_rows}; for some of the places give TargetLogits(positions_K=...)"
            )
        row_L = torch.arange(K)
        if self.positions_K is not None:
            index_K = torch.arange(K, device=self.positions_K.device)
            row_L = index_K.new_full((length,), -1).index_put((self.positions_K,), index_K)
        starts_B1 = K * torch.arange(B, device=row_L.device)[:, None]
        return torch.where(row_L >= 0, starts_B1 + row_L, -1)

    def rows(self, index_n: Tensor) -> Tensor:
        """`[n, V]` logits of some of the `B * K` rows."""
        values_nX = self.values_BKX.detach().flatten(0, 1)[index_n]
        if self.head_VD is None:
            return values_nX
        head_VD = self.head_VD.detach()
        bias_V = None if self.head_bias_V is None else self.head_bias_V.detach()
        return F.linear(values_nX.to(head_VD.dtype), head_VD, bias_V)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of every term."""

    kind: Kind
    temperature: float
    renormalize: bool
    target_ids_U: Tensor | None
    """int64: the policy's id of each of the draft's tokens; None: one vocabulary."""


class Terms(NamedTuple):
    """0 and False where a term is not valid; only the loss has a gradient."""

    loss_KP: Tensor
    alpha_KP: Tensor
    """Probability that a token of the draft is accepted."""
    agrees_KP: Tensor
    """bool: both have the same most likely token."""
    known_P: Tensor
    """bool: the policy's most likely token is in the draft's vocabulary."""


def divergence(
    logits_KRU: Sequence[Tensor],
    target: TargetLogits,
    *,
    aligned: bool,
    places_P: Tensor,
    target_rows_P: Tensor,
    labels_P: Tensor,
    valid_KP: Tensor,
    settings: Settings,
) -> Terms:
    """Compare what step k of the draft says about a place with what the policy says.

    A place is judged by its `row_before` of step k, or, aligned, by the row that it has among the
    places; and by row `target_rows_P` of the policy. `labels_P` are ids of the draft's vocabulary,
    read by `hard` only.
    """
    learns = torch.is_grad_enabled() and any(rows.requires_grad for rows in logits_KRU)
    plan = _Plan(target, aligned, places_P, target_rows_P, labels_P, valid_KP, settings, learns)
    return Terms(*_Divergence.apply(plan, *logits_KRU))


def row_before(places_P: Tensor, k: int, num_rows: int) -> Tensor:
    """The row of step k that speaks about each place, each another one, valid or not."""
    return (places_P - 1 - k) % num_rows


class _Plan(NamedTuple):
    target: TargetLogits
    aligned: bool
    places_P: Tensor
    target_rows_P: Tensor
    labels_P: Tensor
    valid_KP: Tensor
    settings: Settings
    learns: bool

    def chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK // self.target.vocab_size)
        for start in range(0, self.places_P.shape[0], step):
            yield slice(start, min(start + step, self.places_P.shape[0]))

    def rows(self, k: int, part: slice, num_rows: int) -> Tensor | slice:
        return part if self.aligned else row_before(self.places_P[part], k, num_rows)


class _Divergence(torch.autograd.Function):
    """Makes loss and slopes of a chunk together, and keeps the slopes in the logits' dtype."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *logits_KRU: Tensor) -> tuple[Tensor, ...]:
        first_RU = logits_KRU[0]
        wide, shape = _wide(first_RU), plan.valid_KP.shape
        loss_KP, alpha_KP = (first_RU.new_zeros(shape, dtype=wide) for _ in range(2))
        agrees_KP, known_P = torch.zeros_like(plan.valid_KP), torch.zeros_like(plan.valid_KP[0])
        fresh = torch.empty_like if plan.aligned else torch.zeros_like  # else some rows are unsaid
        slopes = [fresh(logits_RU) for logits_RU in logits_KRU] if plan.learns else []
        with torch.autocast(first_RU.device.type, enabled=False):
            for part in plan.chunks():
                policy = _Policy(plan, part, wide)
                known_P[part] = policy.known_n
                for k, logits_RU in enumerate(logits_KRU):
                    rows_n = plan.rows(k, part, logits_RU.shape[0])
                    pair = _Pair(policy, logits_RU[rows_n], plan.settings)
                    loss_KP[k, part] = pair.loss(plan.labels_P[part])
                    alpha_KP[k, part], agrees_KP[k, part] = pair.alpha_n, pair.agrees_n
                    if plan.learns:
                        slope_nU = pair.slope_(plan.labels_P[part])
                        if not plan.aligned:  # a slice takes another dtype, an index does not
                            slope_nU = slope_nU.to(logits_RU.dtype)
                        slopes[k][rows_n] = slope_nU
                        del slope_nU
                    del pair  # else its numbers live until the next are made
                del policy
        ctx.save_for_backward(*slopes)
        ctx.plan = plan
        for terms_KP in (loss_KP, alpha_KP, agrees_KP):
            terms_KP.masked_fill_(~plan.valid_KP, 0)
        ctx.mark_non_differentiable(alpha_KP, agrees_KP, known_P)
        return loss_KP, alpha_KP, agrees_KP, known_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, out = ctx.plan, []
        # Where the graph is let go of, the slopes become the gradient, and no second one is made.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        weights_KP = grads[0] * plan.valid_KP / plan.settings.temperature
        for k, slopes_RU in enumerate(ctx.saved_tensors):
            weight_R = weights_KP[k]
            if not plan.aligned:
                rows_P = row_before(plan.places_P, k, slopes_RU.shape[0])
                weight_R = weight_R.new_zeros(len(slopes_RU)).index_copy(0, rows_P, weight_R)
            weight_R1 = weight_R[:, None]
            # A term without weight adds nothing, whatever its numbers are.
            factor_R1 = weight_R1.to(slopes_RU.dtype)
            grad_RU = slopes_RU * factor_R1 if kept else slopes_RU.mul_(factor_R1)
            grad_RU.masked_fill_(weight_R1 == 0, 0)
            out.append(grad_RU)
        return None, *out


class _Policy:
    """p, tempered, over the draft's vocabulary; the same for all steps of the draft."""

    def __init__(self, plan: _Plan, part: slice, dtype: torch.dtype) -> None:
        ids_U = plan.settings.target_ids_U
        logits_nV = plan.target.rows(plan.target_rows_P[part])
        self.top_n = logits_nV.argmax(-1)
        logits_nV = _tempered(logits_nV, plan.settings.temperature, dtype)
        logp_nV = logits_nV.log_softmax(-1)
        if ids_U is None:
            self.logp_nU = logp_nV
            self.p_nU = self.within_nU = logp_nV.exp()
            self.mass_n = torch.ones_like(self.p_nU[:, 0])
            self.known_n = torch.ones_like(self.top_n, dtype=torch.bool)
        else:
            top_n1 = self.top_n[:, None]
            lse_n1 = logits_nV.gather(-1, top_n1) - logp_nV.gather(-1, top_n1)
            kept_nU = logits_nV.index_select(-1, ids_U)
            self.logp_nU = kept_nU.log_softmax(-1)
            self.within_nU = self.logp_nU.exp()
            self.p_nU = kept_nU.sub_(lse_n1).exp_()
            self.mass_n = self.p_nU.sum(-1)
            known_V = torch.zeros(logp_nV.shape[1], dtype=torch.bool, device=ids_U.device)
            self.known_n = known_V.index_fill(0, ids_U, True)[self.top_n]
        self.never_nU = self.within_nU == 0

    logp_nU: Tensor
    """log of `within_nU`: p renormalised over the draft's vocabulary."""
    p_nU: Tensor
    """p itself there, whose sum is `mass_n`."""
    never_nU: Tensor
    """Where p is 0, and so its part of KL, whatever q is."""


class _Pair:
    """The policy's p and a step's q."""

    def __init__(self, policy: _Policy, logits_nU: Tensor, settings: Settings) -> None:
        self.policy, self.settings = policy, settings
        top_n, ids_U = logits_nU.argmax(-1), settings.target_ids_U
        self.agrees_n = (top_n if ids_U is None else ids_U[top_n]) == policy.top_n
        dtype = policy.p_nU.dtype
        self.logq_nU = _tempered(logits_nU, settings.temperature, dtype).log_softmax(-1)
        self.q_nU = self.logq_nU.exp()
        self.alpha_n = torch.minimum(policy.p_nU, self.q_nU).sum(-1)

    def loss(self, labels_n: Tensor) -> Tensor:
        kind, policy = self.settings.kind, self.policy
        if kind == "hard":
            return -self.logq_nU.gather(-1, labels_n[:, None])[:, 0]
        if kind == "tv":
            return 1 - self.alpha_n
        if kind == "lk":
            return -self._floored().log()
        gap_nU = (policy.logp_nU - self.logq_nU).masked_fill_(policy.never_nU, 0)
        kl_n = gap_nU.mul_(policy.within_nU).sum(-1)
        return kl_n if self.settings.renormalize else kl_n * policy.mass_n

    def slope_(self, labels_n: Tensor) -> Tensor:
        """`[n, U]`: of the loss by the tempered logits of the draft. It uses up `q_nU`."""
        kind, policy = self.settings.kind, self.policy
        if kind == "hard":
            minus_one_n1 = torch.full_like(self.q_nU[:, :1], -1)
            return self.q_nU.scatter_add_(-1, labels_n[:, None], minus_one_n1)
        if kind == "kl":
            slope_nU = self.q_nU.sub_(policy.within_nU)
            return slope_nU if self.settings.renormalize else slope_nU.mul_(policy.mass_n[:, None])
        # Where q < p, more q is more acceptance; the softmax takes it from all tokens.
        below_nU = self.q_nU * (self.q_nU < policy.p_nU)
        slope_nU = self.q_nU.mul_(below_nU.sum(-1, keepdim=True)).sub_(below_nU)
        return slope_nU if kind == "tv" else slope_nU.div_(self._floored()[:, None])

    def _floored(self) -> Tensor:
        return self.alpha_n.clamp(min=torch.finfo(self.alpha_n.dtype).tiny)


def _tempered(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    wide = logits.to(dtype)
    return wide if temperature == 1 else wide / temperature


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
