"""What `verify_chain` and `verify_tree` refuse, in words.

Shapes: R rows (requests), K draft tokens of a row, N nodes of a draft tree, V vocabulary entries,
U uniform numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miles.errors import DtypeError, MilesError, NonFiniteError, SettingError, ShapeError

__all__ = [
    "check_chain_probs",
    "check_chain_shapes",
    "check_common",
    "check_cut",
    "check_parents",
    "check_temperatures",
    "check_tree_probs",
    "check_tree_shapes",
]

SUM_TOLERANCE = 1e-4
"""A float32 softmax over 256k tokens sums to 1 within 1e-6."""

Finding = tuple[Tensor, type[MilesError], Callable[[int, int], str]]
"""Where something is wrong (`[R]` or `[R, K]`), and what to say about the first such place."""


def check_cut(top_k: int, top_p: float) -> None:
    """Refuse truncations that mean nothing."""
    if top_k != -1 and top_k < 1:
        raise SettingError(f"top_k is {top_k}; expected 1 or more, or -1 to keep every token")
    if not 0 < top_p <= 1:
        raise SettingError(f"top_p is {top_p}; expected above 0 and at most 1 (1 keeps all)")


def check_temperatures(temperatures_R: Tensor) -> None:
    """Refuse what is no temperature."""
    _refuse(_temperatures(temperatures_R))


def check_chain_shapes(
    logits_RKV: Tensor, tokens_RK: Tensor, probs_RKV: Tensor | None, uniforms_RU: Tensor
) -> tuple[int, int]:
    """Rows and draft tokens of a row."""
    num_rows, num_draft, num_vocab = _sizes(logits_RKV, tokens_RK, uniforms_RU)
    if probs_RKV is not None:
        _check_probs_shape(probs_RKV, (num_rows, num_draft, num_vocab), "one for each draft token")
    return num_rows, num_draft


def check_tree_shapes(
    logits_RNV: Tensor,
    tokens_RN: Tensor,
    parents_RN: Tensor,
    probs_RNV: Tensor | None,
    uniforms_RU: Tensor,
    replacement: bool | None,
) -> int:
    """Nodes of a row."""
    num_rows, num_nodes, num_vocab = _sizes(logits_RNV, tokens_RN, uniforms_RU)
    _check_int64(parents_RN, "parents_RN")
    if parents_RN.shape != tokens_RN.shape:
        raise ShapeError(
            f"parents_RN has shape {list(parents_RN.shape)}; expected {list(tokens_RN.shape)}, one "
            "for each node"
        )
    if probs_RNV is not None:
        _check_probs_shape(probs_RNV, (num_rows, num_nodes + 1, num_vocab), "one for each place")
        if replacement is None:
            raise SettingError(
                "probs_RNV was given without replacement; say replacement=True if each child was "
                "drawn from the same distribution, False if without its elder siblings"
            )
    elif replacement is not None:
        raise SettingError(
            f"replacement={replacement} has no effect without probs_RNV; leave it out for children "
            "that were chosen without chance"
        )
    return num_nodes


def check_common(
    tokens_RK: Tensor,
    temperatures_R: Tensor,
    uniforms_RU: Tensor,
    lengths_R: Tensor,
    num_vocab: int,
) -> None:
    """What chains and trees have in common."""
    num_draft = tokens_RK.shape[1]
    real_RK = _real(tokens_RK, lengths_R)
    _refuse(
        _temperatures(temperatures_R),
        (
            (lengths_R < 0) | (lengths_R > num_draft),
            SettingError,
            lambda row, _: (
                f"lengths_R of row {row} is {lengths_R[row].item()}; expected 0 to {num_draft}, "
                "the draft tokens that it came with"
            ),
        ),
        (
            ~((uniforms_RU >= 0) & (uniforms_RU < 1)),
            SettingError,
            lambda row, k: (
                f"uniforms_RU of row {row} has {uniforms_RU[row, k].item()} at {k}; expected "
                "numbers from 0 up to and without 1"
            ),
        ),
        (
            real_RK & ((tokens_RK < 0) | (tokens_RK >= num_vocab)),
            SettingError,
            lambda row, k: (
                f"draft token {k} of row {row} is {tokens_RK[row, k].item()}; expected an id of "
                f"the target's vocabulary, 0 to {num_vocab - 1}. Has the draft another vocabulary?"
            ),
        ),
    )


def check_chain_probs(
    probs_RKV: Tensor, tokens_RK: Tensor, temperatures_R: Tensor, lengths_R: Tensor
) -> None:
    """Distributions that the draft tokens can have been drawn from."""
    real_RK = _real(tokens_RK, lengths_R)
    sampled_RK = real_RK & (temperatures_R > 0)[:, None]
    own_RK = probs_RKV.gather(-1, tokens_RK.clamp(0, probs_RKV.shape[-1] - 1)[..., None])[..., 0]
    _refuse(
        *_distributions(probs_RKV, real_RK, temperatures_R, "draft token"),
        *_impossible(own_RK, tokens_RK, sampled_RK),
        (
            real_RK & ~sampled_RK & (own_RK < 1 - SUM_TOLERANCE),
            SettingError,
            lambda row, k: (
                f"row {row} is at temperature 0 and draft token {k} is not the one that its "
                f"distribution lies on (it has {own_RK[row, k].item():.6g}); expected 1"
            ),
        ),
    )


def check_parents(parents_RN: Tensor, lengths_R: Tensor) -> None:
    """A tree whose nodes stand after their parents."""
    node_N = torch.arange(parents_RN.shape[1], device=parents_RN.device)
    bad_RN = _real(parents_RN, lengths_R) & ((parents_RN < -1) | (parents_RN >= node_N))
    _refuse(
        (
            bad_RN,
            SettingError,
            lambda row, node: (
                f"node {node} of row {row} has parent {parents_RN[row, node].item()}; expected -1 "
                f"(the root) or a node before it, 0 to {node - 1}"
            ),
        )
    )


def check_tree_probs(
    probs_RNV: Tensor,
    tokens_RN: Tensor,
    parents_RN: Tensor,
    temperatures_R: Tensor,
    lengths_R: Tensor,
    replacement: bool | None,
) -> None:
    """Distributions that children can have been drawn from, at the places that have any."""
    real_RN = _real(tokens_RN, lengths_R)
    sampled_RN = real_RN & (temperatures_R > 0)[:, None]
    place_RN = torch.where(real_RN, parents_RN + 1, 0)
    used_RP = torch.zeros(probs_RNV.shape[:2], dtype=torch.int64, device=probs_RNV.device)
    used_RP.scatter_add_(1, place_RN, real_RN.long())
    row_R1 = torch.arange(tokens_RN.shape[0], device=tokens_RN.device)[:, None]
    own_RN = probs_RNV[row_R1, place_RN, tokens_RN.clamp(0, probs_RNV.shape[-1] - 1)]
    _refuse(
        *_distributions(probs_RNV, used_RP > 0, temperatures_R, "the children at place"),
        *_impossible(own_RN, tokens_RN, sampled_RN),
    )
    if replacement:
        return
    siblings_RNN = (parents_RN[:, :, None] == parents_RN[:, None]) & real_RN[:, None]
    same_RNN = siblings_RNN & (tokens_RN[:, :, None] == tokens_RN[:, None])
    twice_RN = same_RNN.tril(-1).any(-1) & sampled_RN
    _refuse(
        (
            twice_RN,
            SettingError,
            lambda row, node: (
                f"node {node} of row {row} repeats token {tokens_RN[row, node].item()} of an elder "
                "sibling; expected each once, since replacement=False"
            ),
        )
    )


def _temperatures(temperatures_R: Tensor) -> Finding:
    return (
        ~(temperatures_R.isfinite() & (temperatures_R >= 0)),
        SettingError,
        lambda row, _: (
            f"row {row} has temperature {temperatures_R[row].item()}; expected 0 (greedy) or a "
            "positive number"
        ),
    )


def _sizes(logits: Tensor, tokens: Tensor, uniforms: Tensor) -> tuple[int, int, int]:
    if not logits.is_floating_point():
        raise DtypeError(f"the target's logits are {logits.dtype}; expected a float dtype")
    if logits.dim() != 3 or not logits.shape[-1]:
        raise ShapeError(
            f"the target's logits have shape {list(logits.shape)}; expected [rows, draft tokens + "
            "1, vocabulary]"
        )
    _check_int64(tokens, "the draft tokens")
    num_rows, num_places, num_vocab = logits.shape
    if tokens.shape != (num_rows, num_places - 1):
        raise ShapeError(
            f"the draft tokens have shape {list(tokens.shape)}; expected "
            f"[{num_rows}, {num_places - 1}]: the target's logits, {list(logits.shape)}, cover a "
            "row's draft tokens and the place before them"
        )
    if uniforms.dtype != torch.float64:
        raise DtypeError(
            f"uniforms_RU is {uniforms.dtype}; expected float64: with fewer bits rare tokens have "
            "other chances"
        )
    if uniforms.shape != (num_rows, num_places):
        raise ShapeError(
            f"uniforms_RU has shape {list(uniforms.shape)}; expected [{num_rows}, {num_places}], "
            "one for each draft token and one for the target's own"
        )
    return num_rows, num_places - 1, num_vocab


def _check_int64(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.int64:
        raise DtypeError(f"{name} are {tensor.dtype}; expected int64")


def _check_probs_shape(probs: Tensor, shape: tuple[int, int, int], what: str) -> None:
    if probs.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"the draft's distributions are {probs.dtype}; expected float32 or float64, exactly "
            "what the tokens were drawn from"
        )
    if probs.shape != shape:
        raise ShapeError(
            f"the draft's distributions have shape {list(probs.shape)}; expected {list(shape)}: "
            f"{what}, over the target's vocabulary"
        )


def _real(tokens_RK: Tensor, lengths_R: Tensor) -> Tensor:
    return torch.arange(tokens_RK.shape[1], device=tokens_RK.device) < lengths_R[:, None]


def _distributions(
    probs_RKV: Tensor, used_RK: Tensor, temperatures_R: Tensor, what: str
) -> tuple[Finding, ...]:
    """Numbers that are no distribution, or that leave a choice at temperature 0."""
    finite_RK = probs_RKV.isfinite().all(-1)
    total_RK = probs_RKV.sum(-1, dtype=torch.float64)
    off_RK = ((total_RK - 1).abs() > SUM_TOLERANCE) | (probs_RKV < 0).any(-1)
    top_RK = probs_RKV.amax(-1)
    return (
        (
            used_RK & ~finite_RK,
            NonFiniteError,
            lambda row, k: (
                f"the draft's distribution of {what} {k} of row {row} has NaN or infinity; look at "
                "the draft's weights"
            ),
        ),
        (
            used_RK & off_RK,
            SettingError,
            lambda row, k: (
                f"the draft's distribution of {what} {k} of row {row} sums to "
                f"{total_RK[row, k].item():.6g} or has a negative entry; expected probabilities "
                "that sum to 1. Did logits come instead?"
            ),
        ),
        (
            used_RK & (temperatures_R == 0)[:, None] & (top_RK < 1 - SUM_TOLERANCE),
            SettingError,
            lambda row, k: (
                f"row {row} is at temperature 0, but the draft drew {what} {k} at random (its most "
                f"likely token has {top_RK[row, k].item():.6g}); expected the most likely token, "
                "with a distribution that lies on it alone or probs=None"
            ),
        ),
    )


def _impossible(own_RK: Tensor, tokens_RK: Tensor, sampled_RK: Tensor) -> tuple[Finding, ...]:
    return (
        (
            sampled_RK & (own_RK <= 0),
            SettingError,
            lambda row, k: (
                f"draft token {k} of row {row}, {tokens_RK[row, k].item()}, has probability 0 "
                "under the distribution that it was drawn from; expected the very distribution, "
                "after the draft's temperature and truncation"
            ),
        ),
    )


def _refuse(*findings: Finding) -> None:
    """Raise for the first kind that was found; waits for the device once if all is well."""
    found = torch.stack([where.any() for where, _, _ in findings]).tolist()
    for hit, (where, kind, say) in zip(found, findings, strict=True):
        if hit:
            row, *place = where.nonzero()[0].tolist()
            raise kind(say(row, place[0] if place else 0))
