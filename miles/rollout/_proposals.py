"""What a draft proposed, as the target's step takes it.

Shapes: R requests in a step, K draft tokens of a step, V vocabulary entries.
"""

from __future__ import annotations

import torch

from miles.errors import ShapeError
from miles.rollout.speculative.draft import Proposal

__all__ = ["check_shapes", "spread"]


def check_shapes(proposal: Proposal, expected: tuple[int, int, int]) -> None:
    """Whether it is of `(R, K, V)`."""
    got = proposal.tokens_RK
    if got.shape != expected[:2] or got.dtype != torch.int64:
        raise ShapeError(
            f"tokens_RK is {got.dtype} of shape {tuple(got.shape)}; expected int64 of shape "
            f"{expected[:2]}"
        )
    lengths = proposal.lengths
    if lengths is not None and (
        len(lengths) != expected[0] or not all(0 <= length <= expected[1] for length in lengths)
    ):
        raise ShapeError(
            f"lengths are {lengths}; expected {expected[0]} numbers of 0 to {expected[1]}"
        )
    probs = proposal.probs_RKV
    if probs is not None and (
        probs.shape != expected or probs.dtype not in (torch.float32, torch.float64)
    ):
        raise ShapeError(
            f"probs_RKV is {probs.dtype} of shape {tuple(probs.shape)}; expected float32 or "
            f"float64 of shape {expected}, over the target's vocabulary"
        )


def spread(
    proposal: Proposal, rows: list[int], lengths: list[int], width: int, device: torch.device
) -> Proposal | None:
    """The first `width` on the target's device, among rows that propose nothing; None if no row
    does."""
    num_rows = len(lengths)
    if not any(lengths):
        return None
    tokens_RK, probs_RKV = proposal.tokens_RK[:, :width].to(device), proposal.probs_RKV
    probs_RKV = None if probs_RKV is None else probs_RKV[:, :width].to(device)
    if len(rows) < num_rows:
        index = torch.tensor(rows, device=device)
        all_RK = tokens_RK.new_zeros((num_rows, width))
        tokens_RK = all_RK.index_copy_(0, index, tokens_RK)
        if probs_RKV is not None:
            all_RKV = probs_RKV.new_zeros((num_rows, *probs_RKV.shape[1:]))
            probs_RKV = all_RKV.index_copy_(0, index, probs_RKV)
    return Proposal(tokens_RK=tokens_RK, probs_RKV=probs_RKV, lengths=tuple(lengths))
