"""What a draft is trained on: a captured pass, laid out, and the sequences of it that are taken.

All that is decided by masks and ids of sequences is decided on the CPU.

Shapes: B x L tokens, F features of a token.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import SettingError, ShapeError
from miles.packed import Packed, check_tensors
from miles.rollout.speculative._capture import Captured
from miles.rollout.speculative._host import HostCopies, upload
from miles.rollout.speculative.losses import Kind, MaskPolicy, _valid, check_batch

__all__ = ["Given", "TrainingBatch"]

ON_CPU = ("mask_BL", "seq_ids_BL", "target_rows_BL")
"""Of a `TrainingBatch`; the rest is where the policy is."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is said of a pass: its mask, and perhaps its sequences."""

    mask: Tensor | Packed | None = None
    seq_ids_BL: Tensor | None = None
    copies: HostCopies = field(default_factory=HostCopies)

    @classmethod
    def before(cls, mask: Tensor | Packed | None, seq_ids_BL: Tensor | None) -> Given:
        """What is known before the pass, on its way to the CPU."""
        if mask is None and seq_ids_BL is not None:
            raise SettingError("capture() got seq_ids_BL without a mask; give both, or neither")
        given = cls(mask=mask, seq_ids_BL=seq_ids_BL)
        parts = (mask.mask_T, mask.seq_ids_T) if isinstance(mask, Packed) else (mask,)
        given.copies.begin(*parts, seq_ids_BL)
        return given

    def and_after(self, mask: Tensor | Packed | None, seq_ids_BL: Tensor | None) -> Given:
        """With what is said after it, if nothing was before."""
        if self.mask is not None and (mask is not None or seq_ids_BL is not None):
            raise SettingError(
                "the mask was given to capture(); call observe() without mask and seq_ids_BL"
            )
        if self.mask is None and mask is None:
            raise SettingError("there is no mask; give one to capture() or to observe()")
        return self if mask is None else replace(self, mask=mask, seq_ids_BL=seq_ids_BL)


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One micro-batch of the draft."""

    input_ids_BL: Tensor
    features_BLF: Tensor
    """0 at padding, once taken."""
    position_ids_BL: Tensor | None
    mask_BL: Tensor
    seq_ids_BL: Tensor
    """-1 at padding."""
    target_rows_BL: Tensor
    """int64: which of the policy's rows each place has, -1 where it has none."""

    @classmethod
    def of(cls, seen: Captured, given: Given) -> TrainingBatch:
        """All of the pass; sequences as given, else by the `Packed`, else by the pass itself."""
        seen.check_unchanged()
        ids_BL, copies = seen.input_ids_BL, given.copies
        assert given.mask is not None
        mask_BL, seq_ids_BL = _laid_out(given.mask, ids_BL, copies)
        if given.seq_ids_BL is not None:
            seq_ids_BL = copies.of(given.seq_ids_BL)
        seq_ids_BL = _seq_ids(seen, seq_ids_BL, copies)
        check_batch(ids_BL, mask_BL, seq_ids_BL)
        positions, target = seen.position_ids_BL, seen.target
        if target.positions_K is not None:
            target = replace(target, positions_K=copies.of(target.positions_K))
        return cls(
            input_ids_BL=ids_BL,
            features_BLF=seen.features_BLF.detach(),
            position_ids_BL=None if positions is None else positions.expand_as(ids_BL),
            mask_BL=mask_BL,
            seq_ids_BL=seq_ids_BL,
            target_rows_BL=target.rows_of_places(*ids_BL.shape),
        )

    def taken(
        self, share: float, before: int, kind: Kind, mask_policy: MaskPolicy | None
    ) -> tuple[TrainingBatch | None, int]:
        """A share of the sequences, evenly spread, and how many there were to choose from.

        A row is a sequence, or those in it are where there is only one row. Only those count that
        have a place to learn from. `before` counts those of the micro-batches before; the first of
        all is always taken, and until then so is the first of those without, since a rank has to
        observe something.
        """
        if share == 1:
            return self._without_padding(), 0
        starts_BL = self.seq_ids_BL != self.seq_ids_BL.roll(1, 1)
        starts_BL[:, 0] = True
        starts_BL &= self.seq_ids_BL >= 0
        number_L = (starts_BL[0].cumsum(0) - 1).clamp(min=0)
        one_row = self.input_ids_BL.shape[0] == 1
        places_BL = _valid(
            self.mask_BL, self.seq_ids_BL, self.target_rows_BL, kind, mask_policy or MaskPolicy(), 1
        ).view_as(self.mask_BL)
        if one_row:
            learns_N = torch.zeros(int(starts_BL.sum()), dtype=torch.bool)
            learns_N[number_L[places_BL[0]]] = True
        else:
            learns_N = places_BL.any(1)
        found, numbers = int(learns_N.sum()), itertools.count(before)
        takes = [learns and _is_taken(next(numbers), share) for learns in learns_N.tolist()]
        if not any(takes):
            if found or before:
                return None, found
            takes[:1] = [True]
        if all(takes):
            return self._without_padding(), found
        takes_N = torch.tensor(takes)
        if one_row:
            takes_N = takes_N[number_L] & (self.seq_ids_BL[0] >= 0)
        index_N = takes_N.nonzero()[:, 0]
        there_N = upload(index_N, self.input_ids_BL.device)
        parts: dict[str, Any] = {
            name: tensor.index_select(int(one_row), index_N if name in ON_CPU else there_N)
            for name, tensor in vars(self).items()
            if tensor is not None
        }
        return replace(self, **parts)._without_padding(), found

    def _without_padding(self) -> TrainingBatch:
        inside_BL1 = upload(self.seq_ids_BL >= 0, self.features_BLF.device)[..., None]
        return replace(self, features_BLF=torch.where(inside_BL1, self.features_BLF, 0))


def _is_taken(number: int, share: float) -> bool:
    reached, after = (math.ceil(round(share * n, 9)) for n in (number, number + 1))
    return after > reached


def _laid_out(
    mask: Tensor | Packed, ids_BL: Tensor, copies: HostCopies
) -> tuple[Tensor, Tensor | None]:
    """The mask as `[B, L]`, and the sequences if it says which."""
    if not isinstance(mask, Packed):
        check_tensors(mask=mask)
        return copies.of(mask), None
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
    mask_T, seq_ids_T = copies.of(mask.mask_T), copies.of(mask.seq_ids_T)
    return mask_T.view(ids_BL.shape), seq_ids_T.view(ids_BL.shape)


def _seq_ids(seen: Captured, given_BL: Tensor | None, copies: HostCopies) -> Tensor:
    if given_BL is None:
        return seen.seq_ids(copies)
    if given_BL.shape != seen.input_ids_BL.shape:
        raise ShapeError(
            f"seq_ids_BL has shape {tuple(given_BL.shape)}; expected "
            f"{tuple(seen.input_ids_BL.shape)}"
        )
    if seen.attention_mask_BL is None:
        return given_BL
    return given_BL.masked_fill(copies.of(seen.attention_mask_BL) == 0, -1)
