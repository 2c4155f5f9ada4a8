"""From samples to the tensors of a training step.

Shapes: B samples, L positions of the longest, T = B * L positions laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from miles.errors import EmptyBatchError, RoutingError, SettingError, ShapeError
from miles.moe.tape import RoutingTape
from miles.packed import Packed
from miles.rollout.sample import Sample

__all__ = ["TrainBatch", "collate"]

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """A right-padded micro-batch, laid out by prediction: position t predicts token t + 1.

    `token_logprobs(logits.flatten(0, 1), batch.targets_T)` fits `packed` and
    `rollout_logprobs_T`; position t of the routing is the one used to process token t.
    """

    input_ids_BL: Tensor
    """int64 `[B, L]`."""
    attention_mask_BL: Tensor
    """int64 `[B, L]`: 1 at tokens, 0 at padding."""
    targets_T: Tensor
    """int64 `[T]`: the next token where it is trained on, -100 elsewhere."""
    packed: Packed
    """Sequences, groups and the trainable positions."""
    rollout_logprobs_T: Tensor
    """float32 `[T]`: log-prob of the target when it was sampled, NaN where there is none."""
    routing: RoutingTape | None
    """T rows, if the samples have any."""
    routing_required_T: Tensor
    """bool `[T]`: positions whose routing can reach a trained-on token."""

    def to(self, device: torch.device | str) -> TrainBatch:
        """A copy on `device` (the tape stays where it is)."""
        return replace(
            self,
            input_ids_BL=self.input_ids_BL.to(device),
            attention_mask_BL=self.attention_mask_BL.to(device),
            targets_T=self.targets_T.to(device),
            packed=self.packed.to(device),
            rollout_logprobs_T=self.rollout_logprobs_T.to(device),
        )


def collate(
    samples: Sequence[Sample],
    *,
    group_ids: Sequence[int] | None = None,
    pad_token_id: int = 0,
    pad_to_multiple_of: int = 1,
) -> TrainBatch:
    """Lay samples out for one forward pass.

    Args:
        samples: at least one.
        group_ids: prompt group of each, `0..G-1` over the whole step.
        pad_token_id: what padding holds; it never influences anything.
        pad_to_multiple_of: L is rounded up to this.

    Raises:
        EmptyBatchError: no sample.
        MissingLogprobError, ShapeError: a sample that is not aligned.
        RoutingError: some samples have routing and some do not.

    Example:
        >>> from miles.rollout import Sample, collate
        >>> sample = Sample(tokens=[5, 6])
        >>> sample.append([7], logprobs=[-0.5], weight_version=0)
        >>> batch = collate([sample])
        >>> batch.targets_T.tolist(), batch.rollout_logprobs_T[1].item()
        ([-100, 7, -100], -0.5)
    """
    if not samples:
        raise EmptyBatchError("collate got no sample; expected at least one")
    if group_ids is not None and len(group_ids) != len(samples):
        raise ShapeError(
            f"got {len(group_ids)} group_ids for {len(samples)} samples; expected one each"
        )
    if pad_to_multiple_of < 1:
        raise SettingError(f"pad_to_multiple_of is {pad_to_multiple_of}; expected 1 or more")
    for sample in samples:
        sample.check()
    longest = max(len(sample.tokens) for sample in samples)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

    def rows(parts: Iterable[list[Any]], filler: Any) -> Tensor:
        return torch.tensor([part + [filler] * (width - len(part)) for part in parts])

    input_ids_BL = rows((sample.tokens for sample in samples), pad_token_id)
    targets_BL = rows((_targets(sample) for sample in samples), IGNORED)
    logprobs_BL = rows((sample.rollout_logprobs[1:] for sample in samples), torch.nan)
    lengths_B1 = torch.tensor([len(sample.tokens) for sample in samples])[:, None]
    positions_L = torch.arange(width)
    groups = None if group_ids is None else torch.tensor(group_ids, dtype=torch.int64)
    return TrainBatch(
        input_ids_BL=input_ids_BL,
        attention_mask_BL=(positions_L < lengths_B1).to(torch.int64),
        targets_T=targets_BL.flatten(),
        packed=Packed.from_padded(targets_BL != IGNORED, groups),
        rollout_logprobs_T=logprobs_BL.float().flatten(),
        routing=_routing(samples, width),
        routing_required_T=(positions_L < lengths_B1 - 1).flatten(),
    )


def _targets(sample: Sample) -> list[int]:
    pairs = zip(sample.tokens[1:], sample.loss_mask[1:], strict=True)
    return [token if trainable else IGNORED for token, trainable in pairs]


def _routing(samples: Sequence[Sample], width: int) -> RoutingTape | None:
    tapes = [sample.routing for sample in samples if sample.routing is not None]
    if not tapes:
        return None
    if len(tapes) != len(samples):
        missing = [index for index, sample in enumerate(samples) if sample.routing is None]
        raise RoutingError(
            f"samples {missing[:8]} have no routing and the others do; expected all or none "
            "(an aborted request may have lost it: sample again, or set routing=None on all)"
        )
    return RoutingTape.pad(tapes, width)
