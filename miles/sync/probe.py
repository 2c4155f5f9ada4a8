"""Whether an engine answers like the trainer's model after a sync.

Checksums tell that bytes arrived. They do not tell that the engine unpacked, fused or rounded them
as it should: log-probs of fixed prompts do.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miles.errors import SettingError, ShapeError, SyncError
from miles.protocols import RolloutEngine

__all__ = ["ProbeReport", "model_logprobs", "probe"]

Scorer = Callable[[list[list[int]]], Sequence[Any]]
"""Token sequences in; for each, the log-prob of every token given those before it (the first's is
not looked at)."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """How far two sets of log-probs are apart; in nats."""

    num_tokens: int
    """Tokens compared."""
    mean_abs: float
    """Mean of |d|, d the trainer's log-prob minus the engine's."""
    max_abs: float
    """Largest |d|."""
    k3: float
    """Mean of exp(d) - 1 - d: the KL divergence of the engine from the trainer, estimated."""
    worst: int
    """Index of the sequence with the largest mean |d|."""
    worst_mean_abs: float
    """Its mean |d|."""


def probe(
    engine: RolloutEngine | Scorer,
    trainer: Scorer,
    prompts: Sequence[Sequence[int]],
    *,
    params: Any = None,
    version: int | None = None,
    max_mean: float = 0.05,
    max_abs: float = math.inf,
    max_k3: float = math.inf,
) -> ProbeReport:
    """Compare an engine's log-probs with the trainer's, token by token.

    Call it after a push, before the engine's samples are trained on. From asyncio code:
    `await asyncio.to_thread(probe, ...)`.

    Args:
        engine: a function that scores the prompts; or an engine, which then continues each prompt,
            and the tokens it samples are compared by the log-probs it sampled them with.
        trainer: scores sequences with the trainer's model, at the temperature of `params`; see
            `model_logprobs`.
        prompts: token ids.
        params: how an engine samples (`miles.rollout.SamplingParams`).
        version: what the engine has to serve, before and after.
        max_mean: largest mean |d|, in nats. Engines in bf16 differ by 0.01 to 0.03.
        max_abs: largest |d|.
        max_k3: largest k3.

    Raises:
        SyncError: a threshold is exceeded, a log-prob is not finite, or the engine serves another
            version; the text names the worst sequence.
        SettingError: an engine without `params`, or no prompts.
        ShapeError: log-probs that do not fit their sequence.

    Example:
        >>> from miles.sync import probe
        >>> right = lambda sequences: [[0.0, -1.0, -2.0] for _ in sequences]
        >>> wrong = lambda sequences: [[0.0, -1.0, -2.0], [0.0, -7.0, -8.0]]
        >>> probe(right, right, [[5, 6, 7], [5, 6, 8]]).max_abs
        0.0
        >>> probe(wrong, right, [[5, 6, 7], [5, 6, 8]])
        Traceback (most recent call last):
        ...
        miles.errors.SyncError: the engine does not answer like the trainer: mean |d| 3 (at most ...

    References:
        k3: http://joschu.net/blog/kl-approx.html. An engine 6 nats off while a comparison of
        weights passed: https://github.com/radixark/miles/issues/862
    """
    if not prompts:
        raise SettingError("no prompts to probe with; expected one or more")
    sequences = [list(prompt) for prompt in prompts]
    if isinstance(engine, RolloutEngine):
        if params is None:
            raise SettingError(
                "an engine is probed by sampling; expected params=SamplingParams(...)"
            )
        refresh = getattr(engine, "refresh", None)  # of engines that remember what they serve
        if version is not None and inspect.iscoroutinefunction(refresh):
            asyncio.run(refresh())
        _check_version(engine, version)
        samples = asyncio.run(_generate(engine, sequences, params))
        _check_version(engine, version)
        sequences = [list(sample.tokens) for sample in samples]
        theirs = [sample.rollout_logprobs for sample in samples]
        masks = [list(sample.loss_mask) for sample in samples]
    else:
        theirs = list(engine(sequences))
        masks = [[True] * len(tokens) for tokens in sequences]
    ours = list(trainer(sequences))
    gaps = [
        _gaps(index, *row)
        for index, row in enumerate(zip(sequences, masks, theirs, ours, strict=True))
    ]
    report = _report(gaps)
    limits = {"mean |d|": max_mean, "largest |d|": max_abs, "k3": max_k3}
    values = (report.mean_abs, report.max_abs, report.k3)
    exceeded = [
        f"{name} {value:.4g} (at most {limit:g})"
        for (name, limit), value in zip(limits.items(), values, strict=True)
        if not value <= limit
    ]
    if exceeded:
        tokens = sequences[report.worst]
        raise SyncError(
            f"the engine does not answer like the trainer: {', '.join(exceeded)} over "
            f"{report.num_tokens} tokens; worst is sequence {report.worst}, mean |d| "
            f"{report.worst_mean_abs:.4g}, which begins with {tokens[:8]}; do not train on what it "
            "samples: push again, and compare the model it was started with"
        )
    return report


def model_logprobs(model: nn.Module, *, temperature: float = 1.0) -> Scorer:
    """The trainer's half of `probe`, for a causal language model of transformers.

    Args:
        model: returns `.logits` of `[1, L, V]`; it is called in the mode that it is in.
        temperature: what the engine samples at; at 0 engines report the log-probs of 1.

    Returns:
        A function for `probe`; it takes one sequence at a time.
    """

    @torch.no_grad()
    def score(sequences: list[list[int]]) -> list[Tensor]:
        device = next(model.parameters()).device
        scored = []
        for tokens in sequences:
            ids_1L = torch.tensor([tokens], device=device)
            logits_LV = model(ids_1L).logits[0, :-1].float() / (temperature or 1.0)
            logprobs_LV = logits_LV.log_softmax(-1)
            picked_L = logprobs_LV.gather(1, ids_1L[0, 1:, None])[:, 0]
            scored.append(torch.cat([picked_L.new_full((1,), math.nan), picked_L]))
        return scored

    return score


async def _generate(engine: RolloutEngine, prompts: list[list[int]], params: Any) -> list[Any]:
    return await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))


def _check_version(engine: RolloutEngine, version: int | None) -> None:
    if version is not None and engine.weight_version != version:
        raise SyncError(f"the engine serves version {engine.weight_version}; expected {version}")


def _gaps(index: int, tokens: list[int], mask: list[bool], theirs: Any, ours: Any) -> Tensor:
    """float64: trainer minus engine, at the tokens that count."""
    rows = [torch.as_tensor(row).detach().double().cpu() for row in (ours, theirs)]
    if any(row.shape != (len(tokens),) for row in rows):
        raise ShapeError(
            f"log-probs of sequence {index} have shapes {[tuple(row.shape) for row in rows]} "
            f"(trainer, engine); expected one for each of its {len(tokens)} tokens"
        )
    counts = torch.tensor(mask)
    counts[:1] = False
    gaps = (rows[0] - rows[1])[counts]
    if not gaps.isfinite().all():
        raise SyncError(
            f"a log-prob of sequence {index}, which begins with {tokens[:8]}, is not finite in the "
            "engine or in the trainer; do not train on what the engine samples"
        )
    return gaps


def _report(gaps: list[Tensor]) -> ProbeReport:
    every = torch.cat(gaps)
    if not every.numel():
        raise SettingError("the prompts hold no token to compare; expected two tokens or more")
    means = [float(row.abs().mean()) if row.numel() else 0.0 for row in gaps]
    worst = max(range(len(means)), key=means.__getitem__)
    return ProbeReport(
        num_tokens=every.numel(),
        mean_abs=float(every.abs().mean()),
        max_abs=float(every.abs().max()),
        k3=float((every.exp() - 1 - every).mean()),
        worst=worst,
        worst_mean_abs=means[worst],
    )
