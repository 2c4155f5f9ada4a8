"""The target's distribution at a place, what is left of it, and tokens from it; float64.

Shapes: R rows (requests), P places, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles.errors import ShapeError
from miles.rollout.speculative._verify_checks import check_cut, check_temperatures

__all__ = [
    "at",
    "invert",
    "read_temperatures",
    "residual",
    "sampling_probs",
    "target_logprobs",
    "tempered",
    "without",
]


def tempered(
    logits_RPV: Tensor,
    temperatures_R: Tensor | Sequence[float],
    top_k: int = -1,
    top_p: float = 1.0,
) -> Tensor:
    """The distribution that tokens are sampled from.

    In this order: division by the temperature; top-k, which keeps exactly `top_k` tokens; top-p
    over what that left, renormalised, which keeps the fewest tokens whose probability together
    reaches `top_p`. Tokens rank by probability, and equal ones by id, lower first: what is kept
    does not depend on the device or the company. At temperature 0 all of it lies on the most
    likely token, of equal ones that with the lowest id.

    Args:
        logits_RPV: `[R, V]` or `[R, P, V]`, any float dtype; -inf means never.
        temperatures_R: one a row, 0 or above; looked at unless they are on a device already.
        top_k: tokens to keep; -1: all.
        top_p: probability to keep, above 0 and at most 1.

    Returns:
        float64 probabilities of the shape of the logits.

    Raises:
        ShapeError: logits of another rank, or not one temperature a row.
        SettingError: a temperature, `top_k` or `top_p` outside its range.

    Example:
        >>> import torch
        >>> from miles.rollout.speculative import tempered
        >>> logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
        >>> tempered(logits, [1.0]).round(decimals=3).tolist()
        [[0.5, 0.25, 0.125, 0.125]]
        >>> tempered(logits, [0.5], top_k=3).round(decimals=3).tolist()
        [[0.762, 0.19, 0.048, 0.0]]
        >>> tempered(logits, [0.0]).tolist()
        [[1.0, 0.0, 0.0, 0.0]]
    """
    if logits_RPV.dim() not in (2, 3):
        raise ShapeError(
            f"logits have shape {list(logits_RPV.shape)}; expected [rows, vocabulary] or "
            "[rows, places, vocabulary]"
        )
    check_cut(top_k, top_p)
    temperatures_R = torch.as_tensor(temperatures_R)
    if temperatures_R.device.type == "cpu":
        check_temperatures(temperatures_R)
    temperatures_R = read_temperatures(temperatures_R, logits_RPV)
    shape = [-1] + [1] * (logits_RPV.dim() - 1)
    logprobs = target_logprobs(logits_RPV, temperatures_R.view(shape), top_k, top_p)
    return sampling_probs(logprobs, logits_RPV, temperatures_R.view(shape))


def target_logprobs(logits: Tensor, temperatures: Tensor, top_k: int, top_p: float) -> Tensor:
    """float64, -inf for what is cut; those of temperature 1 where it is 0."""
    scaled = logits.double() / torch.where(temperatures > 0, temperatures, 1.0)
    if 0 < top_k < logits.shape[-1]:
        # Written as what to drop, so that a NaN stays and shows.
        last = scaled.topk(top_k).values[..., -1:]
        tied = scaled == last
        room = top_k - (scaled > last).sum(-1, keepdim=True)
        scaled = scaled.masked_fill((scaled < last) | (tied & (tied.cumsum(-1) > room)), -torch.inf)
    if top_p < 1:
        falling, order = scaled.sort(dim=-1, descending=True, stable=True)
        probs = falling.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return scaled.log_softmax(-1)


def sampling_probs(logprobs: Tensor, logits: Tensor, temperatures: Tensor) -> Tensor:
    """The probabilities to sample with: all on the most likely token where the temperature is 0."""
    best = torch.zeros_like(logprobs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(temperatures > 0, logprobs.exp(), best)


def residual(target_RV: Tensor, draft_RV: Tensor | None, token_R: Tensor) -> Tensor:
    """What the target still has to give after it refused `token_R`, normalised."""
    if draft_RV is None:
        rest_RV = target_RV.scatter(1, token_R[:, None], 0.0)
    else:
        rest_RV = (target_RV - draft_RV).clamp(min=0)
    total_R1 = rest_RV.sum(-1, keepdim=True)
    # Nothing is left where p and q are equal but for rounding; then p is what q covered.
    return torch.where(total_R1 > 0, rest_RV / total_R1, target_RV)


def without(draft_RV: Tensor, token_R: Tensor) -> Tensor:
    """The draft's distribution once `token_R` has been drawn."""
    rest_RV = draft_RV.scatter(1, token_R[:, None], 0.0)
    total_R1 = rest_RV.sum(-1, keepdim=True)
    return torch.where(total_R1 > 0, rest_RV / total_R1, rest_RV)


def invert(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """One token a row by inverting the distribution function."""
    cdf_RV = weights_RV.cumsum(-1)
    total_R1 = cdf_RV[:, -1:]
    draw_R1 = torch.minimum(
        uniforms_R[:, None] * total_R1, total_R1.nextafter(torch.zeros_like(total_R1))
    )
    token_R = torch.searchsorted(cdf_RV, draw_R1, right=True)[:, 0]
    token_R = token_R.clamp(max=weights_RV.shape[1] - 1)
    # A parallel sum rounds differently from one entry to the next and may rise at a weight of 0.
    return torch.where(at(weights_RV, token_R) > 0, token_R, weights_RV.argmax(-1))


def at(values_RV: Tensor, token_R: Tensor) -> Tensor:
    """`[R]`: the entry of each row's token."""
    return values_RV.gather(1, token_R[:, None])[:, 0]


def read_temperatures(temperatures_R: Tensor | Sequence[float], logits: Tensor) -> Tensor:
    """float64 `[R]` on the device of the logits."""
    found = torch.as_tensor(temperatures_R, dtype=torch.float64, device=logits.device)
    if found.shape != logits.shape[:1]:
        raise ShapeError(
            f"temperatures_R has shape {list(found.shape)}; expected [{logits.shape[0]}], one a "
            "row of the logits"
        )
    return found
