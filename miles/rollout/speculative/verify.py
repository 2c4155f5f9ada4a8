"""What the target keeps of a draft. Whatever the draft, what comes out is the target's own.

A token x that was drawn from q is kept with probability min(1, p(x) / q(x)), p the target's
distribution at its place; where one is refused, the next token is drawn from (p - q)+ normalised,
and where all are kept, one more from p. There is no threshold, and no "typical" acceptance: they
would be another policy's samples.

Shapes: R rows (requests), K draft tokens of a row, N nodes of a draft tree, P places, V vocabulary
entries, U uniform numbers of a row. Place 0 follows the last settled token; place k follows draft
token (node) k - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from miles.errors import DtypeError, NonFiniteError, ShapeError
from miles.rollout.speculative import _verify_checks as checks
from miles.rollout.speculative._target import (
    at,
    invert,
    read_temperatures,
    residual,
    sampling_probs,
    target_logprobs,
    tempered,
    without,
)

__all__ = ["Verified", "tempered", "verify_chain", "verify_tree"]

CHUNK = 1 << 25
"""Numbers of logits that are turned into float64 at a time: 256 MiB."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What came out of a verify pass: kept draft tokens, then one token of the target's own."""

    tokens_RK: Tensor
    """int64 `[R, K + 1]`, padded with -1."""
    num_tokens_R: Tensor
    """int64 `[R]`: real tokens of each row, 1 to K + 1; one less are the draft's."""
    logprobs_RK: Tensor
    """float32 `[R, K + 1]`: the target's log-probs, after temperature, top-k and top-p, whether the
    draft or the target proposed the token; NaN at padding. At temperature 0 those of temperature 1,
    as the engines report them."""
    nodes_RK: Tensor | None = None
    """int64 `[R, K]`: which nodes of the tree were kept, from the root down, padded with -1; None
    for a chain, where they are the first ones."""


@torch.no_grad()
def verify_chain(
    logits_RKV: Tensor,
    tokens_RK: Tensor,
    probs_RKV: Tensor | None,
    *,
    temperatures_R: Tensor | Sequence[float],
    uniforms_RU: Tensor,
    lengths_R: Tensor | Sequence[int] | None = None,
    top_k: int = -1,
    top_p: float = 1.0,
    check: bool = True,
) -> Verified:
    """Judge one run of draft tokens a row; what comes out is distributed as the target's own.

    Nothing here waits for the device once `check` is off and all tensors are on it. A NaN of the
    target then shows as the log-prob NaN of the token that it touched.

    Args:
        logits_RKV: `[R, K + 1, V]`, the target's, at the places after the last settled token and
            after each draft token; any float dtype.
        tokens_RK: int64 `[R, K]`, draft tokens; anything beyond a row's length.
        probs_RKV: `[R, K, V]`, float32 or float64: what each of them was drawn from, after the
            draft's own temperature and truncation. None: the draft had no choice (its most likely
            token, a copied run), and a token x is kept with probability p(x).
        temperatures_R: one a row; 0 keeps a draft token if it is the most likely one.
        uniforms_RU: float64 `[R, K + 1]` in [0, 1), independent of each other and of those that
            the draft drew with: one for each draft token, and the last for the target's own.
        lengths_R: how many of a row's tokens are proposals, 0 to K; None: K. 0 is plain decoding.
        top_k: as in `tempered`.
        top_p: as in `tempered`.
        check: look at the values too, which waits for the device.

    Returns:
        The tokens and their log-probs.

    Raises:
        ShapeError: tensors that do not fit each other.
        DtypeError: a tensor of the wrong dtype.
        SettingError: `top_k` or `top_p` outside its range. With `check` also a temperature, length,
            uniform number or token outside its range; a distribution that does not sum to 1 or
            under which its token is impossible; temperature 0 with a distribution that leaves a
            choice.
        NonFiniteError: with `check`, logits or a distribution that are not numbers where they
            matter.

    References:
        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", algorithm 1,
        https://arxiv.org/abs/2211.17192

    Example:
        >>> import torch
        >>> from miles.rollout.speculative import verify_chain
        >>> p = torch.tensor([0.25, 0.75])
        >>> out = verify_chain(
        ...     p.log().expand(2, 2, 2), torch.tensor([[0], [0]]), None, temperatures_R=[1.0, 1.0],
        ...     uniforms_RU=torch.tensor([[0.2, 0.5], [0.3, 0.5]], dtype=torch.float64))
        >>> out.tokens_RK.tolist(), out.num_tokens_R.tolist()
        ([[0, 1], [1, -1]], [2, 1])
    """
    num_rows, num_draft = checks.check_chain_shapes(logits_RKV, tokens_RK, probs_RKV, uniforms_RU)
    checks.check_cut(top_k, top_p)
    temperatures_R = read_temperatures(temperatures_R, logits_RKV)
    lengths_R = _lengths(lengths_R, tokens_RK)
    uniforms_RU = uniforms_RU.to(logits_RKV.device)
    if check:
        checks.check_common(tokens_RK, temperatures_R, uniforms_RU, lengths_R, logits_RKV.shape[-1])
        if probs_RKV is not None:
            checks.check_chain_probs(probs_RKV, tokens_RK, temperatures_R, lengths_R)
    tokens_RK = tokens_RK.clamp(0, logits_RKV.shape[-1] - 1)

    logprobs_RK, target_RK = _judged(logits_RKV, tokens_RK, temperatures_R, top_k, top_p)
    drafted_RK = torch.ones_like(target_RK)
    if probs_RKV is not None:
        drafted_RK = probs_RKV.gather(-1, tokens_RK[..., None])[..., 0].double()
    accepted_RK = uniforms_RU[:, :-1] * drafted_RK < target_RK
    accepted_RK &= torch.arange(num_draft, device=tokens_RK.device) < lengths_R[:, None]
    place_R = accepted_RK.cumprod(1).sum(1)

    rows_R = torch.arange(num_rows, device=tokens_RK.device)
    logits_RV = logits_RKV[rows_R, place_R]
    logprobs_RV = target_logprobs(logits_RV, temperatures_R[:, None], top_k, top_p)
    weights_RV = sampling_probs(logprobs_RV, logits_RV, temperatures_R[:, None])
    if num_draft:
        at_R = place_R.clamp(max=num_draft - 1)
        draft_RV = None if probs_RKV is None else probs_RKV[rows_R, at_R].double()
        rest_RV = residual(weights_RV, draft_RV, tokens_RK[rows_R, at_R])
        weights_RV = torch.where((place_R < lengths_R)[:, None], rest_RV, weights_RV)
    own_R = invert(weights_RV, uniforms_RU[:, -1])

    kept_RK = torch.arange(num_draft + 1, device=tokens_RK.device) < place_R[:, None]
    tokens_RK = torch.where(kept_RK, pad(tokens_RK, (0, 1)), -1)
    tokens_RK.scatter_(1, place_R[:, None], own_R[:, None])
    logprobs_RK = torch.where(kept_RK, pad(logprobs_RK, (0, 1)), torch.nan)
    logprobs_RK.scatter_(1, place_R[:, None], logprobs_RV.gather(1, own_R[:, None]))
    verified = Verified(
        tokens_RK=tokens_RK, num_tokens_R=place_R + 1, logprobs_RK=logprobs_RK.float()
    )
    if check:
        _check_finite(verified)
    return verified


@torch.no_grad()
def verify_tree(
    logits_RNV: Tensor,
    tokens_RN: Tensor,
    parents_RN: Tensor,
    probs_RNV: Tensor | None,
    *,
    temperatures_R: Tensor | Sequence[float],
    uniforms_RU: Tensor,
    replacement: bool | None = None,
    lengths_R: Tensor | Sequence[int] | None = None,
    top_k: int = -1,
    top_p: float = 1.0,
    check: bool = True,
) -> Verified:
    """Judge a tree of draft tokens a row; what comes out is distributed as the target's own.

    The children of a node are judged in the order of their index. After each refusal the target's
    distribution loses what that child's distribution covered, so that the next child, and in the
    end the token drawn instead, make up for it exactly. How children were come by decides which
    that is:

    - `probs_RNV=None`: chosen without chance, such as the k most likely of a draft, and trees of
      EAGLE-2, which ranks and prunes by the draft's confidence. Child x is kept with the
      probability that what is left of p has at x, and x is taken out when it is refused.
    - `replacement=True`: each drawn from the same q, so that one token may be drawn twice.
    - `replacement=False`: each drawn from q without those before it, renormalised. Children must
      stand in the order in which they were drawn.

    Whether a sampled child is in the tree must not depend on its own token: pruning by the
    probability of what was drawn is not lossless, whoever verifies it.

    Args:
        logits_RNV: `[R, N + 1, V]`, the target's: place 0 after the root (the last settled token),
            place n + 1 after node n.
        tokens_RN: int64 `[R, N]`; anything beyond a row's length.
        parents_RN: int64 `[R, N]`: the index of each node's parent, below its own; -1: the root.
        probs_RNV: `[R, N + 1, V]`, float32 or float64: what the children at each place were drawn
            from (that of the first one, without replacement); anything at places without children.
            At temperature 0 all of it lies on the draft's most likely token, and further children
            may be any. None: no chance was involved.
        temperatures_R: one a row; 0 keeps a child if it is the most likely token.
        uniforms_RU: float64 `[R, N + 1]` in [0, 1): one a node, and the last for the target's own
            token.
        replacement: how children were drawn; needed with `probs_RNV`, refused without.
        lengths_R: how many of a row's nodes are real, 0 to N; None: N.
        top_k: as in `tempered`.
        top_p: as in `tempered`.
        check: look at the values too, which waits for the device.

    Returns:
        The tokens of the kept path and the target's own after it, with the nodes of the path.

    Raises:
        ShapeError: tensors that do not fit each other.
        DtypeError: a tensor of the wrong dtype.
        SettingError: as in `verify_chain`; `replacement` missing or without effect; with `check`
            also a parent that does not come before its child, and a token that stands twice among
            siblings drawn without replacement.
        NonFiniteError: as in `verify_chain`.

    References:
        Miao et al., "SpecInfer", algorithm 2 (with replacement), https://arxiv.org/abs/2305.09781;
        Jeon et al., "Recursive Speculative Decoding", section 3.1 (without),
        https://arxiv.org/abs/2402.14160

    Example:
        >>> import torch
        >>> from miles.rollout.speculative import verify_tree
        >>> p = torch.tensor([0.2, 0.3, 0.5])
        >>> out = verify_tree(  # 0 is refused (0.2), then 1 is kept (0.3 of the 0.8 that is left)
        ...     p.log().expand(1, 3, 3), torch.tensor([[0, 1]]), torch.tensor([[-1, -1]]), None,
        ...     temperatures_R=[1.0],
        ...     uniforms_RU=torch.tensor([[0.21, 0.37, 0.1]], dtype=torch.float64))
        >>> out.tokens_RK.tolist(), out.nodes_RK.tolist()
        ([[1, 0, -1]], [[1, -1]])
    """
    num_nodes = checks.check_tree_shapes(
        logits_RNV, tokens_RN, parents_RN, probs_RNV, uniforms_RU, replacement
    )
    checks.check_cut(top_k, top_p)
    temperatures_R = read_temperatures(temperatures_R, logits_RNV)
    lengths_R = _lengths(lengths_R, tokens_RN)
    uniforms_RU = uniforms_RU.to(logits_RNV.device)
    if check:
        checks.check_common(tokens_RN, temperatures_R, uniforms_RU, lengths_R, logits_RNV.shape[-1])
        checks.check_parents(parents_RN, lengths_R)
        if probs_RNV is not None:
            checks.check_tree_probs(
                probs_RNV, tokens_RN, parents_RN, temperatures_R, lengths_R, replacement
            )
    tokens_RN = tokens_RN.clamp(0, logits_RNV.shape[-1] - 1)

    def target(place: int) -> tuple[Tensor, Tensor]:
        logits_RV = logits_RNV[:, place]
        logprobs_RV = target_logprobs(logits_RV, temperatures_R[:, None], top_k, top_p)
        return logprobs_RV, sampling_probs(logprobs_RV, logits_RV, temperatures_R[:, None])

    # Of the place that each row has come to: the target's log-probs, what refusals left of its
    # distribution, and of the draft's. A parent stands before its children, so one pass will do.
    logprobs_RV, left_RV = target(0)
    draft_RV = None if probs_RNV is None else probs_RNV[:, 0].double()
    at_R = torch.zeros_like(lengths_R)
    accepted_RN = torch.zeros_like(tokens_RN, dtype=torch.bool)
    logprobs_RN = torch.zeros_like(tokens_RN, dtype=torch.float64)
    for node in range(num_nodes):
        token_R = tokens_RN[:, node]
        drafted_R: Tensor | float = 1.0 if draft_RV is None else at(draft_RV, token_R)
        tried_R = (parents_RN[:, node] + 1 == at_R) & (node < lengths_R)
        kept_R = tried_R & (uniforms_RU[:, node] * drafted_R < at(left_RV, token_R))
        accepted_RN[:, node], logprobs_RN[:, node] = kept_R, at(logprobs_RV, token_R)
        at_R = torch.where(kept_R, node + 1, at_R)

        refused_R1, kept_R1 = (tried_R & ~kept_R)[:, None], kept_R[:, None]
        left_RV = torch.where(refused_R1, residual(left_RV, draft_RV, token_R), left_RV)
        next_logprobs_RV, next_RV = target(node + 1)
        logprobs_RV = torch.where(kept_R1, next_logprobs_RV, logprobs_RV)
        left_RV = torch.where(kept_R1, next_RV, left_RV)
        if draft_RV is not None and probs_RNV is not None:
            if not replacement:
                draft_RV = torch.where(refused_R1, without(draft_RV, token_R), draft_RV)
            draft_RV = torch.where(kept_R1, probs_RNV[:, node + 1].double(), draft_RV)
    own_R = invert(left_RV, uniforms_RU[:, -1])
    verified = _path(
        accepted_RN, tokens_RN, logprobs_RN, own_R=own_R, own_logprobs_R=at(logprobs_RV, own_R)
    )
    if check:
        _check_finite(verified)
    return verified


def _path(
    accepted_RN: Tensor,
    tokens_RN: Tensor,
    logprobs_RN: Tensor,
    *,
    own_R: Tensor,
    own_logprobs_R: Tensor,
) -> Verified:
    """The accepted nodes side by side, then the target's own token."""
    num_rows, num_nodes = tokens_RN.shape
    num_kept_R = accepted_RN.sum(1)
    beyond = num_nodes + 1  # a column that is cut off again
    column_RN = torch.where(accepted_RN, accepted_RN.cumsum(1) - 1, beyond)
    nodes_RN = torch.arange(num_nodes, device=tokens_RN.device).expand_as(tokens_RN)

    def gathered(values_RN: Tensor, own_R: Tensor, padding: float) -> Tensor:
        out = values_RN.new_full((num_rows, num_nodes + 2), padding)
        out.scatter_(1, column_RN, values_RN)
        return out.scatter_(1, num_kept_R[:, None], own_R[:, None])[:, :beyond]

    return Verified(
        tokens_RK=gathered(tokens_RN, own_R, -1),
        num_tokens_R=num_kept_R + 1,
        logprobs_RK=gathered(logprobs_RN, own_logprobs_R, torch.nan).float(),
        nodes_RK=gathered(nodes_RN, torch.full_like(own_R, -1), -1)[:, :num_nodes],
    )


def _judged(
    logits_RKV: Tensor, tokens_RK: Tensor, temperatures_R: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The target's log-probs of the draft tokens, and its probabilities to sample them."""
    num_rows, num_draft = tokens_RK.shape
    rows = max(1, CHUNK // max(1, num_draft * logits_RKV.shape[-1]))
    parts = []
    for first in range(0, num_rows, rows):
        logits = logits_RKV[first : first + rows, :num_draft]
        temperatures = temperatures_R[first : first + rows, None, None]
        tokens = tokens_RK[first : first + rows, :, None]
        parts.append(target_logprobs(logits, temperatures, top_k, top_p).gather(-1, tokens)[..., 0])
    logprobs_RK = torch.cat(parts) if parts else tokens_RK.double()
    best_RK = (logits_RKV[:, :num_draft].argmax(-1) == tokens_RK).double()
    return logprobs_RK, torch.where(temperatures_R[:, None] > 0, logprobs_RK.exp(), best_RK)


def _lengths(lengths_R: Tensor | Sequence[int] | None, tokens_RK: Tensor) -> Tensor:
    num_rows, num_draft = tokens_RK.shape
    if lengths_R is None:
        return torch.full((num_rows,), num_draft, device=tokens_RK.device)
    found = torch.as_tensor(lengths_R, device=tokens_RK.device)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise DtypeError(f"lengths_R is {found.dtype}; expected whole numbers of draft tokens")
    if found.shape != (num_rows,):
        raise ShapeError(
            f"lengths_R has shape {list(found.shape)}; expected [{num_rows}], one a row"
        )
    return found.long()


def _check_finite(verified: Verified) -> None:
    places = torch.arange(verified.tokens_RK.shape[1], device=verified.tokens_RK.device)
    bad_RK = ~verified.logprobs_RK.isfinite() & (places < verified.num_tokens_R[:, None])
    if bad_RK.any():
        row, place = bad_RK.nonzero()[0].tolist()
        raise NonFiniteError(
            f"the target's logits of row {row} are not all numbers at the place of output token "
            f"{place} (NaN, +inf, or -inf for every token); look at the weights and at what the "
            "model was given"
        )
