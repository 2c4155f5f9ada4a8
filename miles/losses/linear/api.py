"""Log-probs of chosen tokens out of hidden states, and the choice of how they are computed.

Shapes: T tokens, D hidden size, V vocabulary entries (of this rank, where they are sharded).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import SettingError
from miles.losses._vocab import VocabShard, check_targets, temperature_of_rows
from miles.losses.linear.chunked import chunked_logprobs
from miles.losses.linear.nucleus import Nucleus
from miles.losses.linear.reference import reference_logprobs
from miles.losses.linear.scoring import Scoring, check_head, compute_dtype

__all__ = ["BACKENDS", "CHUNKED_ABOVE", "LogprobOutput", "explain", "linear_logprobs"]

Backend = Callable[[Tensor, Tensor, Tensor | None, Scoring], tuple[Tensor, Tensor | None]]

BACKENDS: dict[str, Backend] = {
    "reference": reference_logprobs,
    "chunked": chunked_logprobs,
}
"""What `backend=` may name, beside `auto`. A faster one goes here."""

CHUNKED_ABOVE = 2**24
"""The most logits, T * V, that `auto` lets the reference hold: 64 MiB of float32."""


class LogprobOutput(NamedTuple):
    """What `linear_logprobs` returns."""

    logprobs: Tensor
    """`[T]`: log-prob of each target; 0 where it is -100."""
    entropy: Tensor | None
    """`[T]`: entropy in nats of the distribution that the target was scored under; 0 where the
    target is -100. None unless asked for."""


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    entropy: bool = False,
    keep: Nucleus | None = None,
    vocab_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> LogprobOutput:
    """`log softmax(cap(hidden @ weight.T + bias) / temperature)[target]` of every token.

    Differentiable in hidden states, weight and bias. What a row with target -100 holds, NaN
    included, changes nothing anywhere. In the chunked backend a row that no gradient arrives at
    (masked, clipped, without advantage) costs nothing in the backward pass, and `[T, V]` is never
    in memory; finding those rows makes the host wait for a GPU once a pass.

    With `vocab_group`, rank r holds the weight (and bias) of the ids `r * V .. (r + 1) * V - 1`;
    hidden states, targets and `keep` are the same on every rank. Every rank gets the same result
    and, when all send back the same gradient, the whole gradient of the hidden states (do not
    all-reduce it again) and that of its own weight.

    Args:
        hidden_TD: bf16, fp16, float32 or float64 `[T, D]`.
        weight_VD: `[V, D]`, usually of the same dtype (two low ones are multiplied in float32).
        targets_T: int64 `[T]`, in `0..V-1`, or -100 for a position without a target.
        temperature: above 0, one for all or floating point `[T]`; it gets no gradient.
        bias: floating point `[V]`.
        softcap: c above 0: logits become `c * tanh(logits / c)`, before the temperature.
        entropy: whether to compute the entropy too.
        keep: the ids that the engine's top-p or top-k left; the softmax is over these alone.
        vocab_group: the ranks that hold the vocabulary together, an equal part each.
        backend: `reference` (the formula, holds `[T, V]`), `chunked` (tiles, any device), or
            `auto`: chunked where `T * V`, V over all ranks, exceeds 2**24, else reference.

    Returns:
        `LogprobOutput(logprobs, entropy)`, both `[T]` and float64 if hidden states or weight are,
        else float32.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
        SettingError: a target or temperature out of range (looked for in CPU tensors only, to
            spare the GPU a stall; there such a row is NaN), a target outside `keep`, an unknown
            backend.

    Example:
        >>> hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0], [2.0]])
        >>> targets = torch.tensor([1, 0])
        >>> out = linear_logprobs(hidden, weight, targets, temperature=2.0, entropy=True)
        >>> [round(x, 4) for x in out.logprobs.tolist()]  # e / (1 + 2 e) and 1 / 3
        [-0.862, -1.0986]
        >>> kept = Nucleus.from_mask(torch.tensor([[False, True, True], [True, False, False]]))
        >>> linear_logprobs(hidden, weight, targets, keep=kept).logprobs.exp().tolist()
        [0.5, 1.0]
    """
    check_head(hidden_TD, weight_VD, bias, softcap)
    shard = VocabShard.here(weight_VD.shape[0], vocab_group)
    check_targets(targets_T, hidden_TD.shape[0], shard.total)
    if keep is not None:
        keep.check(targets_T, shard.total)
    dtype = compute_dtype(hidden_TD, weight_VD)
    scoring = Scoring(
        targets_T=targets_T,
        temperature_T=temperature_of_rows(temperature, targets_T, dtype),
        softcap=softcap,
        entropy=entropy,
        keep=keep,
        shard=shard,
    )
    name, _ = _choose(backend, hidden_TD.shape[0], shard.total)
    # Autocast would turn the float32 multiplications back into bf16 ones.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return LogprobOutput(*BACKENDS[name](hidden_TD, weight_VD, bias, scoring))


def explain(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    *,
    vocab_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> str:
    """Which backend `linear_logprobs` would use, and why.

    Args:
        hidden_TD: `[T, D]`.
        weight_VD: `[V, D]`.
        vocab_group: as in `linear_logprobs`.
        backend: as in `linear_logprobs`.

    Example:
        >>> explain(torch.zeros(2, 4), torch.zeros(10, 4))
        'reference: T * V = 2 * 10 is at most 16777216'
    """
    check_head(hidden_TD, weight_VD, None, None)
    shard = VocabShard.here(weight_VD.shape[0], vocab_group)
    return ": ".join(_choose(backend, hidden_TD.shape[0], shard.total))


def _choose(backend: str, num_tokens: int, vocab_size: int) -> tuple[str, str]:
    """The backend and the reason; the same on every rank, since T and the whole V are."""
    if backend in BACKENDS:
        return backend, "asked for by name"
    if backend != "auto":
        raise SettingError(
            f"backend is {backend!r}; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    size = f"T * V = {num_tokens} * {vocab_size}"
    if num_tokens * vocab_size > CHUNKED_ABOVE:
        return "chunked", f"{size} is more than {CHUNKED_ABOVE}"
    return "reference", f"{size} is at most {CHUNKED_ABOVE}"
