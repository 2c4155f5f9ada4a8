"""How often two routings sent a token to the same experts.

Shapes: N tokens, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.errors import RoutingError
from miles.moe.tape import RoutingTape, _alike

__all__ = ["equal_sets", "routing_agreement"]


def routing_agreement(a: RoutingTape, b: RoutingTape) -> float:
    """Share of (token, layer) pairs that went to the same set of experts, in any order.

    Rows that either tape did not record are left out. For the share of one layer or of one token,
    or to put several micro-batches and ranks together, see `equal_sets`.

    Raises:
        RoutingError: tapes of different shape, or without a row that both recorded.

    >>> from miles.moe import RoutingTape, routing_agreement
    >>> a = RoutingTape(torch.tensor([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> b = RoutingTape(torch.tensor([[[1, 0]], [[2, 1]]]), num_experts=4)
    >>> routing_agreement(a, b)
    0.5
    """
    share = equal_sets(a, b).nanmean()
    if not bool(share.isfinite()):
        raise RoutingError("no row is recorded in both tapes; expected at least one to compare")
    return float(share)


def equal_sets(a: RoutingTape, b: RoutingTape) -> Tensor:
    """Which (token, layer) pairs went to the same set of experts, in any order.

    Take means over what you want to know: `nanmean(0)` is the agreement of each layer, `nanmean(1)`
    that of each token. Sums and counts of several micro-batches and ranks add up, as in
    `miles.losses.mean_over(equal_NM[:, layer], equal_NM[:, layer].isfinite())`.

    Returns:
        float64 `[N, M]`: 1 where the sets are equal, 0 where they differ, NaN in rows that either
        tape did not record.

    Raises:
        RoutingError: tapes of different shape, or of models with another number of experts.

    >>> from miles.moe import RoutingTape, equal_sets
    >>> a = RoutingTape(torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]]), num_experts=4)
    >>> b = RoutingTape(torch.tensor([[[1, 0], [2, 1]], [[-1, -1], [-1, -1]]]), num_experts=4)
    >>> equal_sets(a, b).tolist(), equal_sets(a, b).nanmean(0).tolist()
    ([[1.0, 0.0], [nan, nan]], [1.0, 0.0])
    """
    shapes = [(len(tape), tape.num_layers, tape.topk) for tape in (a, b)]
    if shapes[0] != shapes[1]:
        raise RoutingError(
            f"tapes have shapes {shapes[0]} and {shapes[1]}; expected the same tokens, layers and "
            "topk"
        )
    a, b = _alike([a, b])
    same_NM = (a._ids.sort(-1).values == b._ids.sort(-1).values).all(-1).to(torch.float64)
    return same_NM.masked_fill(~(a.recorded_N & b.recorded_N)[:, None], torch.nan)
