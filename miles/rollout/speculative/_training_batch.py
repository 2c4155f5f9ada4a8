"""What a draft is trained on: a captured pass, laid out, and the sequences of it that are taken.

Shapes: B x L tokens, F features of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import SettingError, ShapeError
from miles.packed import Packed
from miles.rollout.speculative._capture import Captured
from miles.rollout.speculative.losses import check_batch

__all__ = ["TrainingBatch"]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One micro-batch of the draft."""

    input_ids_BL: Tensor
    features_BLF: Tensor
    """0 at padding."""
    mask_BL: Tensor
    seq_ids_BL: Tensor
    """-1 at padding."""
    target_rows_BL: Tensor
    """int64: which of the policy's rows each place has, -1 where it has none."""
    position_ids_BL: Tensor | None

    @classmethod
    def of(cls, seen: Captured, mask: Tensor | Packed, seq_ids_BL: Tensor | None) -> TrainingBatch:
        """All of the pass; sequences as given, else by the `Packed`, else by the pass itself."""
        seen.check_unchanged()
        ids_BL = seen.input_ids_BL
        mask_BL, of_packed_BL = _laid_out(mask, ids_BL)
        seq_ids_BL = _seq_ids(seen, of_packed_BL if seq_ids_BL is None else seq_ids_BL)
        check_batch(ids_BL, mask_BL, seq_ids_BL)
        positions = seen.position_ids_BL
        inside_BL1 = (seq_ids_BL >= 0)[..., None]
        return cls(
            input_ids_BL=ids_BL,
            features_BLF=torch.where(inside_BL1, seen.features_BLF.detach(), 0),
            mask_BL=mask_BL,
            seq_ids_BL=seq_ids_BL,
            target_rows_BL=seen.target.rows_of_places(*ids_BL.shape),
            position_ids_BL=None if positions is None else positions.expand_as(ids_BL),
        )

    def taken(self, share: float, before: int) -> tuple[TrainingBatch | None, int]:
        """A share of the sequences, evenly spread, and how many there were.

        A row is a sequence, or those in it are where there is only one row. `before` counts those
        of the micro-batches before; the first of all is always taken.
        """
        starts_BL = self.seq_ids_BL != self.seq_ids_BL.roll(1, 1)
        starts_BL[:, 0] = True
        starts_BL &= self.seq_ids_BL >= 0
        one_row = self.input_ids_BL.shape[0] == 1
        found = int(starts_BL.sum()) if one_row else self.input_ids_BL.shape[0]
        takes = [_is_taken(before + i, share) for i in range(found)]
        if all(takes):
            return self, found
        if not any(takes):
            return None, found
        takes_N = torch.tensor(takes, device=starts_BL.device)
        if one_row:
            number_L = (starts_BL[0].cumsum(0) - 1).clamp(min=0)
            takes_N = takes_N[number_L] & (self.seq_ids_BL[0] >= 0)
        index_N = takes_N.nonzero()[:, 0]
        parts: dict[str, Any] = {
            name: None if tensor is None else tensor.index_select(int(one_row), index_N)
            for name, tensor in vars(self).items()
        }
        return TrainingBatch(**parts), found


def _is_taken(number: int, share: float) -> bool:
    reached, after = (math.ceil(round(share * n, 9)) for n in (number, number + 1))
    return after > reached


def _laid_out(mask: Tensor | Packed, ids_BL: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mask as `[B, L]`, and the sequences if it says which."""
    if isinstance(mask, Tensor):
        return mask, None
    if mask.seq_group is not None and dist.get_world_size(mask.seq_group) > 1:
        raise SettingError(
            "the batch's sequences are spread over the ranks of seq_group; a draft needs them "
            "whole; gather input ids, features and logits, and pass them as captured="
        )
    if mask.num_positions != ids_BL.numel():
        raise ShapeError(
            f"the Packed has {mask.num_positions} tokens and the policy saw {tuple(ids_BL.shape)}; "
            "expected one for each"
        )
    return mask.mask_T.view_as(ids_BL), mask.seq_ids_T.view_as(ids_BL)


def _seq_ids(seen: Captured, given_BL: Tensor | None) -> Tensor:
    if given_BL is None:
        return seen.seq_ids()
    if given_BL.shape != seen.input_ids_BL.shape:
        raise ShapeError(
            f"seq_ids_BL has shape {tuple(given_BL.shape)}; expected "
            f"{tuple(seen.input_ids_BL.shape)}"
        )
    if seen.attention_mask_BL is None:
        return given_BL
    return given_BL.masked_fill(seen.attention_mask_BL == 0, -1)
