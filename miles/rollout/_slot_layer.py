"""Keys and values of one attention layer, for all requests of the embedded engine.

Shapes: R rows of a decoding step, W tokens that a row processes in it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from miles.rollout._graph import round_up

__all__ = ["KEY_TILE", "SlotLayer"]

KEY_TILE = 64


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed for us
    """The rectangle of one attention layer; told before each forward pass where to write."""

    is_sliding = False

    def __init__(self, num_slots: int, max_context: int) -> None:
        super().__init__()
        self.num_slots, self.max_context = num_slots, max_context
        self._prefill: tuple[Tensor, Tensor] | None = None
        self._tokens: tuple[Tensor, Tensor] | None = None
        self._num_keys = 0
        self._rectangles: tuple[Tensor, Tensor] | None = None

    def write_rows(self, rows: Tensor, slots: Tensor) -> None:
        """Next: row `rows[i]` of the batch goes to slot `slots[i]`, from position 0."""
        self._prefill, self._tokens = (rows, slots), None

    def write_tokens(self, rows_R: Tensor, positions_RW: Tensor, num_keys: int) -> None:
        """Next: W tokens for each of the first R slots; attention sees `num_keys` positions."""
        self._prefill, self._tokens, self._num_keys = None, (rows_R, positions_RW), num_keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what the layer computed; return what it may attend to."""
        if self._prefill is not None:
            rows, slots = self._prefill
            width = min(key_states.shape[2], self.max_context)
            if self._rectangles is None:
                length = min(round_up(width, KEY_TILE), self.max_context)
                self._rectangles = self._zeros(key_states, value_states, length)
            keys, values = self._rectangles
            keys[slots, :, :width] = key_states[rows, :, :width]
            values[slots, :, :width] = value_states[rows, :, :width]
            return key_states, value_states
        assert self._tokens is not None
        rows_R, positions_RW = self._tokens
        num_rows = rows_R.shape[0]
        assert self._rectangles is not None  # a prefill came first
        keys, values = self._rectangles
        keys[rows_R[:, None], :, positions_RW] = key_states.transpose(1, 2)
        values[rows_R[:, None], :, positions_RW] = value_states.transpose(1, 2)
        return keys[:num_rows, :, : self._num_keys], values[:num_rows, :, : self._num_keys]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot."""
        assert self._rectangles is not None
        for rectangle in self._rectangles:
            rectangle[target, :, :length] = rectangle[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zeros, since 0 x NaN is NaN."""
        for rectangle in self._rectangles or ():
            rectangle[slot].zero_()

    @property
    def num_keys(self) -> int:
        """Positions that a slot has room for; when it grows, the rectangles move."""
        return 0 if self._rectangles is None else self._rectangles[0].shape[2]

    def reserve(self, length: int) -> None:
        """Make room for so many positions, by doubling."""
        held, size = self._rectangles, self.num_keys
        if held is None or size >= length:
            return
        grown = self._zeros(*held, min(max(length, 2 * size), self.max_context))
        for new, old in zip(grown, held, strict=True):
            new[:, :, :size] = old
        self._rectangles = grown

    def _zeros(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Zeros, since 0 x garbage may be NaN."""
        shape = (self.num_slots, keys.shape[1], length)
        return keys.new_zeros((*shape, keys.shape[3])), values.new_zeros((*shape, values.shape[3]))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of the base class; storage is made in `update`."""

    def get_seq_length(self) -> int:
        """Positions and masks are given explicitly, so nothing is derived from this."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A prefill attends to its own tokens only."""
        return query_length, 0

    def get_max_length(self) -> int:
        """The engine's context."""
        return self.max_context
