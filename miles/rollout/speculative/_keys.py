"""Keys and values of draft layers: of an unrolled training pass, and of an engine's requests.

Both are caches as transformers' layers take them, and attend for layers of our own.

Shapes: B rows of a batch, L positions, H heads, G key/value heads, D head size, S slots, R slots of
a pass, M positions of a slot in it, N keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from miles.rollout.speculative._chain_attention import SequenceRows, can_chain, chain_attention
from miles.rollout.speculative._host import upload

__all__ = ["SlotKeys", "UnrolledKeys", "as_computed"]

MASK_CELLS = 2**24


class UnrolledKeys(Cache):  # type: ignore[misc]  # transformers is not typed for us
    """Of steps that each pass over all positions, as a chain of drafts would have met them.

    At position t, step i sees step 0 up to t, and of steps 1 to i position t alone: when an engine
    drafts from t on, step 0 is all that was settled, and the later steps are its own chain.

    Ids on the CPU spare the host a wait for the GPU.
    """

    def __init__(self, seq_ids_BL: Tensor | None) -> None:
        super().__init__(layers=[])
        self._seq_ids_BL = seq_ids_BL
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._rows: SequenceRows | None = None

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Positions and masks are given, so nothing is derived from this."""
        return 0

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """Bool `[B or 1, 1, L, (steps + 1) * L]` of the step to come; None: plainly causal."""
        if not self._steps and self._seq_ids_BL is None:
            return None
        return self._visible(0, length, len(self._steps), device)

    def update(
        self, keys_BGLD: Tensor, values_BGLD: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a step's; return those of every step, one after the other."""
        self._steps.append((keys_BGLD, values_BGLD))
        keys, values = zip(*self._steps, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def attend(self, query_BHLD: Tensor, keys_BGLD: Tensor, values_BGLD: Tensor) -> Tensor:
        """Take a step's keys and values, and return what its queries read, `[B, H, L, D]`.

        Without a mask wherever `can_chain`; else by `attend_masked`, which says the same.
        """
        groups = query_BHLD.shape[1] // keys_BGLD.shape[1]
        keys, values = _repeat(keys_BGLD, groups), _repeat(values_BGLD, groups)
        if not self._steps:
            chained = can_chain(as_computed(query_BHLD))
            device = query_BHLD.device
            self._rows = SequenceRows.of(self._seq_ids_BL, device) if chained else None
        rows = self._rows
        if rows is None:
            self._steps.append((keys, values))
            return self.attend_masked(query_BHLD)
        query, keys, values = (
            rows.lay_out(as_computed(part)) for part in (query_BHLD, keys, values)
        )
        self._steps.append((keys, values))
        return rows.put_back(chain_attention(query, self._steps))

    def attend_masked(self, query_BHLD: Tensor) -> Tensor:
        """What the queries of the last step read, `[B, H, L, D]`, by torch's attention and a mask.

        At most `MASK_CELLS` of a mask live at a time; longer rows are recomputed on the way back.
        """
        if len(self._steps) == 1 and self._seq_ids_BL is None:
            return F.scaled_dot_product_attention(query_BHLD, *self._steps[0], is_causal=True)
        length = query_BHLD.shape[2]
        rows = max(1, MASK_CELLS // length)
        if rows >= length:
            return self._attend_rows(query_BHLD, 0, length, list(self._steps))
        return torch.cat(
            [
                checkpoint(
                    self._attend_rows,
                    query_BHLD[:, :, first : first + rows],
                    first,
                    min(first + rows, length),
                    list(self._steps),
                    use_reentrant=False,
                )
                for first in range(0, length, rows)
            ],
            dim=2,
        )

    def _attend_rows(
        self, query: Tensor, first: int, last: int, steps: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ranges = [slice(0, last)] + [slice(first, last)] * (len(steps) - 1)
        keys, values = (
            torch.cat(
                [step[which][:, :, rows] for step, rows in zip(steps, ranges, strict=True)], 2
            )
            for which in (0, 1)
        )
        mask = self._visible(first, last, len(steps) - 1, query.device)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def _visible(self, first: int, last: int, num_later: int, device: torch.device) -> Tensor:
        rows = torch.arange(first, last, device=device)
        visible = torch.arange(last, device=device) <= rows[:, None]
        own = torch.eye(last - first, dtype=torch.bool, device=device).repeat(1, num_later)
        if self._seq_ids_BL is None:
            return torch.cat([visible, own], dim=1)[None, None]
        ids = upload(self._seq_ids_BL, device)
        same = ids[:, first:last, None] == ids[:, None, :last]
        return torch.cat([visible & same, own.expand(len(ids), -1, -1)], dim=2)[:, None]


class SlotKeys(Cache):  # type: ignore[misc]  # transformers is not typed for us
    """A rectangle of keys and values per layer; a slot is a row of it.

    `reserve` makes room, `begin` says which slots a pass is about and where its positions go.
    """

    def __init__(self, num_slots: int, max_context: int) -> None:
        super().__init__(layers=[])
        self._num_slots, self._max_context = num_slots, max_context
        self._size = 0
        self._rectangles: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Positions and masks are given, so nothing is derived from this."""
        return 0

    def reserve(self, num_keys: int) -> bool:
        """Make room for so many places; whether that moves what is held, at the next pass."""
        if num_keys <= self._size:
            return False
        self._size = min(max(num_keys, 2 * self._size), self._max_context)
        return True

    def begin(
        self,
        slots_R: Tensor,
        index_RM: Tensor,
        *,
        in_order: bool,
        num_keys: int,
        first_key: int = 0,
    ) -> None:
        """Prepare a pass over these slots, int64 on the device.

        `index_RM` are int64 places in the slots. Those beyond what `reserve` made room for are
        padding. `in_order`: the slots are 0 to R - 1, which saves copying what they hold. Keys
        before `first_key` are never seen.
        """
        self._num_keys, self._index_RM = num_keys, index_RM.clamp(max=self._size)
        self._slots_R1 = slots_R[:, None]
        self._rows: slice | Tensor = slice(len(slots_R)) if in_order else slots_R
        keys_N = torch.arange(num_keys, device=index_RM.device)
        visible = keys_N <= index_RM[..., None]
        if first_key:  # a place that sees nothing else sees itself: softmax needs something
            visible = visible & (keys_N >= first_key) | (keys_N == index_RM[..., None])
        self._mask = visible[:, None]

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """That of this pass, bool `[R, 1, M, N]`."""
        return self._mask

    def update(
        self,
        keys_RGMD: Tensor,
        values_RGMD: Tensor,
        layer_idx: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's; return all that the slots of this pass hold, `[R, G, N, D]`."""
        held = self._reserve(layer_idx, keys_RGMD, values_RGMD)
        for rectangle, new in zip(held, (keys_RGMD, values_RGMD), strict=True):
            rectangle[self._slots_R1, :, self._index_RM] = new.transpose(1, 2).to(rectangle.dtype)
        keys, values = (rectangle[self._rows, :, : self._num_keys] for rectangle in held)
        return keys, values

    def attend(self, query_RHMD: Tensor, keys_RGMD: Tensor, values_RGMD: Tensor) -> Tensor:
        """Store a layer's, and return what its queries read, `[R, H, M, D]`."""
        keys, values = self.update(keys_RGMD, values_RGMD)
        groups = query_RHMD.shape[1] // keys.shape[1]
        mask = self._mask
        if query_RHMD.shape[2] > 1:
            keys, values = _repeat(keys, groups), _repeat(values, groups)
            return F.scaled_dot_product_attention(query_RHMD, keys, values, attn_mask=mask)
        # The heads of a group become queries of one head, so that nothing is repeated.
        folded = query_RHMD[:, :, 0].unflatten(1, (-1, groups))
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        return out.flatten(1, 2)[:, :, None]

    def copy(self, source: int, target: int) -> None:
        """Give one slot's to another."""
        for rectangle in (r for held in self._rectangles.values() for r in held):
            rectangle[target] = rectangle[source]

    def clear(self, slots_R: Tensor) -> None:
        """Zeros, since 0 x a NaN left there would be NaN."""
        for rectangle in (r for held in self._rectangles.values() for r in held):
            rectangle.index_fill_(0, slots_R, 0)

    def _reserve(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's rectangles, grown to `_size` places and one more that takes padding."""
        held = self._rectangles.get(layer_idx)
        if held is not None and held[0].shape[2] > self._size:
            return held
        shape = (self._num_slots, keys.shape[1], self._size + 1)
        new = keys.new_zeros((*shape, keys.shape[3])), values.new_zeros((*shape, values.shape[3]))
        if held is not None:
            for grown, old in zip(new, held, strict=True):
                grown[:, :, : old.shape[2] - 1] = old[:, :, :-1]
        self._rectangles[layer_idx] = new
        return new


def as_computed(x: Tensor) -> Tensor:
    """In the dtype of autocast, where it is on."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _repeat(keys: Tensor, groups: int) -> Tensor:
    return keys if groups == 1 else keys[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
