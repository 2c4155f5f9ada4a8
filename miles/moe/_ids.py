"""How expert ids are stored, and what is wrong with them.

Shapes: N tokens, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miles.errors import RoutingError

__all__ = ["MAX_EXPERTS", "NOT_RECORDED", "check_num_experts", "holes", "in_range", "storage"]

NOT_RECORDED = -1
MAX_EXPERTS = 32768
# With one expert a token, zeros may be a choice; so many of them and nothing else are not (less
# likely than 2 ** -32 for a router that chooses evenly among two or more).
FEWEST_ZEROS_TO_DOUBT = 32


def check_num_experts(num_experts: int) -> None:
    """Raise for a number that two bytes cannot tell apart."""
    if not 0 < num_experts <= MAX_EXPERTS:
        raise RoutingError(f"num_experts is {num_experts}; expected 1 to {MAX_EXPERTS}")


def storage(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int16


def in_range(ids: Tensor, num_experts: int, *, low: int = 0) -> bool:
    """Whether all ids lie in `low..num_experts-1`; free where one byte cannot do otherwise."""
    if not ids.numel() or (ids.dtype == torch.uint8 and num_experts >= 256 and low <= 0):
        return True
    least, largest = ids.aminmax()
    return low <= int(least) and int(largest) < num_experts


def holes(ids: Tensor, num_experts: int) -> Tensor:
    """bool `[N]`: rows that are -1 throughout; raises for any other id out of range."""
    holes_N = (ids == NOT_RECORDED).flatten(1).all(1)
    valid = ((ids >= 0) & (ids < num_experts)) | holes_N[:, None, None]
    if not bool(valid.all()):
        token, layer = (~valid).nonzero()[0, :2].tolist()
        raise RoutingError(
            f"token {token}, layer {layer}: expert ids {ids[token, layer].tolist()}; "
            f"expected 0..{num_experts - 1}, or -1 in the whole row of a token that was not "
            "recorded"
        )
    return holes_N


def check_recorded(recorded_N: Tensor, num_tokens: int | None, who: str) -> None:
    """Raise unless every token of a request but its last has a row."""
    rows = len(recorded_N)
    needed = rows if num_tokens is None else num_tokens - 1
    if needed > 0 and not bool(recorded_N.any()):
        raise RoutingError(
            f"{who}the routing is missing: none of {needed} rows was recorded; have the engine "
            'return it, or replay with invalid="natural"'
        )
    if num_tokens is not None and not needed <= rows <= num_tokens:
        raise RoutingError(
            f"{who}the routing has {rows} rows for {num_tokens} tokens; expected {needed}, one for "
            "each token but the last; the answer was cut, or belongs to another request"
        )
    missing = (~recorded_N[:needed]).nonzero().flatten()
    if len(missing):
        raise RoutingError(
            f"{who}{len(missing)} of {needed} rows are missing, the first at token "
            f'{int(missing[0])}; have the engine return them, or replay with invalid="natural"'
        )


def check_choices(ids: Tensor, recorded_N: Tensor, num_experts: int, who: str) -> None:
    """Raise if no router can have chosen `ids` `[N, M, K]`: all zero, or an expert twice."""
    recorded = ids if bool(recorded_N.all()) else ids[recorded_N]
    if not recorded.numel():
        return
    topk = ids.shape[2]
    if topk == 1:
        doubtful = recorded.numel() >= FEWEST_ZEROS_TO_DOUBT and num_experts > 1
        wrong = doubtful and not bool(recorded.any())
    else:
        # All pairs, by their distance. K outermost makes a comparison run over whole cache lines,
        # and the least of the XORs is 0 where two are equal. numpy takes a quarter of torch's time.
        ids_KR = np.ascontiguousarray(recorded.flatten(0, 1).numpy().T)
        wrong = any((ids_KR[gap:] ^ ids_KR[:-gap]).min() == 0 for gap in range(1, topk))
    if not wrong:
        return
    zero_layers = (recorded == 0).all(2).all(0).nonzero().flatten().tolist()
    if len(zero_layers) == ids.shape[1]:
        raise RoutingError(
            f"{who}the routing is all zero: the engine did not capture it (speculative decoding "
            "with n-grams and fused MoE runners bypass the capture); expected the "
            f"{topk} experts of each token; change the engine's settings"
        )
    if zero_layers:
        raise RoutingError(
            f"{who}the routing of layers {zero_layers} is all zero; expected the experts of each "
            "token; if these layers are dense, leave them out of moe_layers"
        )
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    token, layer = twice.nonzero()[0].tolist()
    raise RoutingError(
        f"{who}token {token}, layer {layer} has expert ids {ids[token, layer].tolist()}, one of "
        "them twice; expected distinct experts; the engine captured it wrongly: leave the sample "
        "out"
    )
