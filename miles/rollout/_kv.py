"""Key/value memory of the embedded engine: which rows of which forward pass belong to whom.

Shapes: U distinct prompts, L padded prompt length, R rows of a decoding step, W tokens that a row
processes in it, V vocabulary entries, F features of a token.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from miles.moe._ids import storage
from miles.moe.replay import RoutingReplay
from miles.moe.tape import RoutingTape
from miles.rollout._features import FeatureTap
from miles.rollout._graph import DecodeGraphs, Outputs

__all__ = ["KVMemory", "RequestMemory", "SlotMemory", "mixes_rows", "supports_slots"]

LENGTH_TILE = 16
KEY_TILE = 64
GRAPH_KEY_TILE = 256


class KVMemory(Protocol):
    """What the engine needs: prefill some slots, then decode one token for each."""

    def prefill(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[RoutingTape] | None]:
        """Process `prompts[u]` for all of `slots[u]`.

        Returns logits `[U, V]` of the last token, and the routing of each prompt.
        """
        ...

    def decode(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Process one token a slot.

        Returns logits `[R, V]`, and expert ids `[R, M, K]` as a tape stores them, on the device.
        """
        ...

    def worth_moving(self, highest: int, active: int) -> bool:
        """Whether filling the holes below `highest` would make a step cheaper."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Give `source`'s first `length` positions to the free slot `target`."""
        ...

    def free(self, slot: int) -> None:
        """Forget what the slot holds."""
        ...

    def weights_moved(self) -> None:
        """The model's parameters are other memory now."""
        ...


def supports_slots(model: nn.Module) -> str | None:
    """None if `SlotMemory` can run the model, else the reason why not."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]  # a method of transformers' models
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "it takes no position_ids"
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=text_config).layers}
    if kinds != {DynamicLayer}:
        names = sorted(kind.__name__ for kind in kinds) or ["none declared"]
        return f"its layers keep other state than full attention ({', '.join(names)})"
    attention = getattr(text_config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f'its attention implementation is {attention!r}, not "sdpa" or "eager"'
    return None


def mixes_rows(model: nn.Module, max_context: int) -> str | None:
    """Why what comes of a row depends on the others of its batch, or None."""
    config: Any = model.config
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for kind in (rope, *(one for one in rope.values() if isinstance(one, dict))):
        if kind.get("rope_type") == "longrope":
            short = kind["original_max_position_embeddings"]
            if max_context > short:
                return (
                    f'its "longrope" turns all rows as one that is longer than {short} needs '
                    f"(max_context={short} does without)"
                )
    return None


class SlotMemory:
    """One rectangle of keys and values for all requests; a slot is a row of it.

    A decoding step runs rows `0..R-1` with R rounded up to a tile, so that the shape of the
    arithmetic, and with it every bit of a row's result, does not depend on who else is there (where
    the kernels themselves keep rows apart).

    A pass may process several tokens of a row, of which the engine keeps the first ones: what the
    others wrote is overwritten before it is looked at. So there is room for `max_proposed` tokens
    more than the context holds.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: RoutingReplay | None,
        *,
        num_slots: int,
        max_context: int,
        row_tile: int,
        cuda_graphs: bool,
        tap: FeatureTap | None = None,
        max_proposed: int = 0,
    ) -> None:
        self._model, self._row_tile, self._tap = model, row_tile, tap
        self.features: Tensor | None = None
        """What `tap` read in the last pass: `[U, L, F]` of a prefill, `[R, W, F]` of a step."""
        config: Any = model.config
        self._eager = config.get_text_config(decoder=True)._attn_implementation == "eager"
        num_layers = len(DynamicCache(config=config.get_text_config(decoder=True)).layers)
        num_rows = _round_up(num_slots, row_tile)
        self._room = max_context + max_proposed
        self._layers = [_SlotLayer(num_rows, self._room) for _ in range(num_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._recorder, self._max_context = recorder, max_context
        self.device = device = _device(model)
        self._every_row = torch.arange(num_rows, device=device)
        self._inputs = torch.zeros((3, num_rows), dtype=torch.int64, device=device)
        self._proposed = torch.zeros((num_rows, max_proposed), dtype=torch.int64, device=device)
        self._graphs = DecodeGraphs(self._step) if device.type == "cuda" and cuda_graphs else None
        self._graphed_keys = 0
        # A wider tile means fewer graphs; what it adds to attention is nothing beside a launch.
        self._key_tile = KEY_TILE if self._graphs is None else GRAPH_KEY_TILE

    def prefill(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[RoutingTape] | None]:
        device = _device(self._model)
        longest = max(len(prompt) for prompt in prompts)
        width = min(_round_up(longest, LENGTH_TILE), self._max_context)
        ids_UL = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_UL[row, : len(prompt)] = torch.tensor(prompt)
        lengths = [len(prompt) for prompt in prompts]
        owners = [(row, slot) for row, group in enumerate(slots) for slot in group]
        rows, targets = (
            torch.tensor(column, device=device) for column in zip(*owners, strict=True)
        )
        for layer in self._layers:
            layer.write_rows(rows, targets)
        # Causal attention never looks right, so padding there needs no mask.
        last_U = torch.tensor(lengths, device=device) - 1
        with (
            _only_positions(self._model, last_U),
            _recording(self._recorder) as recorded,
            _reading(self._tap) as read,
        ):
            logits_UV = self._forward(
                ids_UL.to(device), torch.arange(width, device=device)[None], None
            )[:, -1]
        self.features = read[0] if read else None
        if not recorded:
            return logits_UV, None
        tape = _tape(self._recorder, recorded)
        assert tape is not None
        starts = range(0, len(prompts) * width, width)
        return logits_UV, [
            tape[start : start + n] for start, n in zip(starts, lengths, strict=True)
        ]

    def decode(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        logits_R1V, ids_R1MK = self.verify(slots, tokens, positions, None)
        return logits_R1V[:, 0], None if ids_R1MK is None else ids_R1MK[:, 0]

    def verify(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        proposed_RK: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`decode`, and in the same pass K further tokens a slot: W = K + 1.

        Returns logits `[R, W, V]`, and expert ids `[R, W, M, K]`, K experts of a token here.
        """
        width = 1 if proposed_RK is None else 1 + proposed_RK.shape[1]
        num_rows = _round_up(max(slots) + 1, self._row_tile)
        most = self._max_context + width - 1  # a plain step reads what it reads without a draft
        num_keys = min(_round_up(max(positions) + width, self._key_tile), most)
        inputs = torch.zeros((3, num_rows), dtype=torch.int64)  # one transfer for all three
        index = torch.tensor(slots)
        inputs[0, index] = torch.tensor(tokens)
        inputs[1, index] = torch.tensor(positions)
        inputs[2, : len(slots)] = index
        self._inputs[:, :num_rows].copy_(inputs)
        own = self._inputs[2, : len(slots)]
        if proposed_RK is not None:
            self._proposed[own, : width - 1] = proposed_RK
        for layer in self._layers:
            layer.reserve(num_keys)
        step = self._step if self._graphs is None else self._graphs
        if self._graphs is not None and self._graphed_keys != (held := self._layers[0].num_keys):
            self._graphs.forget()
            self._graphed_keys = held
        logits_RWV, ids, features_RWF = step(num_rows, num_keys, width)
        # Indexing also saves them from the next step, which may write where they are.
        self.features = None if features_RWF is None else features_RWF[own]
        if ids is not None:
            ids = _stored(self._recorder, ids.unflatten(0, (num_rows, width))[own])
        return logits_RWV[own], ids

    def _step(self, num_rows: int, num_keys: int, width: int) -> Outputs:
        """The device's work of `verify`, from `_inputs` and `_proposed` to what it returns."""
        ids_RW, positions_RW = self._inputs[:2, :num_rows, None]
        if width > 1:
            ids_RW = torch.cat([ids_RW, self._proposed[:num_rows, : width - 1]], dim=1)
            positions_RW = positions_RW + torch.arange(width, device=ids_RW.device)
        for layer in self._layers:
            layer.write_tokens(self._every_row[:num_rows], positions_RW, num_keys)
        visible = torch.arange(num_keys, device=ids_RW.device) <= positions_RW[..., None]
        mask = self._mask(visible[:, None])
        if width > 1:  # what is proposed beyond the context is not kept, but has to be computed
            positions_RW = positions_RW.clamp(max=self._max_context - 1)
        with _recording(self._recorder) as recorded, _reading(self._tap) as read:
            logits_RWV = self._forward(ids_RW, positions_RW, mask)
        return logits_RWV, recorded[0] if recorded else None, read[0] if read else None

    def worth_moving(self, highest: int, active: int) -> bool:
        return _round_up(highest + 1, self._row_tile) > _round_up(active, self._row_tile)

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self._layers:
            layer.copy(source, target, length)

    def free(self, slot: int) -> None:
        """Nothing to do: what a slot holds beyond its own length is never looked at."""

    def weights_moved(self) -> None:
        if self._graphs is not None:
            self._graphs.forget()

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        out = self._model(
            input_ids=ids,
            position_ids=positions.expand(ids.shape[0], -1),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = out.logits
        return logits

    def _mask(self, visible: Tensor) -> Tensor:
        if not self._eager:
            return visible
        dtype = next(self._model.parameters()).dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
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
                length = min(_round_up(width, KEY_TILE), self.max_context)
                self._rectangles = self._zeros(key_states, value_states, length)
            self.reserve(width)
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


class RequestMemory:
    """A cache of the model's own kind for each request, one forward pass each.

    Slower, and right for models whose caches go by `past_key_values`: sliding windows, for one.
    """

    def __init__(self, model: nn.Module, recorder: RoutingReplay | None) -> None:
        self._model, self._recorder = model, recorder
        self._caches: dict[int, Any] = {}

    def prefill(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[RoutingTape] | None]:
        logits: list[Tensor] = []
        routing: list[RoutingTape] = []
        for prompt, owners in zip(prompts, slots, strict=True):
            cache, last_V, recorded = self._forward(list(prompt), 0, None)
            logits.append(last_V)
            tape = _tape(self._recorder, recorded)
            routing += [] if tape is None else [tape]
            for owner in owners:
                self._caches[owner] = cache if owner == owners[-1] else copy.deepcopy(cache)
        return torch.stack(logits), routing or None

    def decode(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        logits: list[Tensor] = []
        ids: list[Tensor] = []
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            self._caches[slot], last_V, recorded = self._forward(
                [token], position, self._caches[slot]
            )
            logits.append(last_V)
            ids += recorded
        return torch.stack(logits), _stored(self._recorder, torch.cat(ids)) if ids else None

    def worth_moving(self, highest: int, active: int) -> bool:
        return False  # a step costs what is active, wherever it is

    def move(self, source: int, target: int, length: int) -> None:
        self._caches[target] = self._caches.pop(source)

    def free(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def weights_moved(self) -> None:
        """Nothing to do."""

    def _forward(
        self, tokens: list[int], start: int, cache: Any
    ) -> tuple[Any, Tensor, list[Tensor]]:
        device = _device(self._model)
        positions = torch.arange(start, start + len(tokens), device=device)[None]
        with _recording(self._recorder) as recorded:
            out = self._model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.past_key_values, out.logits[0, -1], recorded


def _recording(recorder: RoutingReplay | None) -> AbstractContextManager[list[Tensor]]:
    return contextlib.nullcontext([]) if recorder is None else recorder._record_ids()


def _reading(tap: FeatureTap | None) -> AbstractContextManager[list[Tensor]]:
    return contextlib.nullcontext([]) if tap is None else tap.reading()


def _stored(recorder: RoutingReplay | None, ids: Tensor) -> Tensor:
    """Expert ids in the dtype of the recorder's tapes."""
    assert recorder is not None
    return ids.to(storage(recorder.num_experts))


def _tape(recorder: RoutingReplay | None, recorded: list[Tensor]) -> RoutingTape | None:
    if recorder is None or not recorded:
        return None
    tape = recorder.unrecorded(0)
    tape._fill(recorded[0])
    return tape


@contextlib.contextmanager
def _only_positions(model: nn.Module, last_U: Tensor) -> Iterator[None]:
    """Have the head see one position a row, so that no `[U, L, V]` is ever made."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # of transformers
    thread = threading.get_ident()  # a trainer may run the same model in another

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != thread:
            return None
        hidden = inputs[0]
        return (
            hidden[torch.arange(hidden.shape[0], device=hidden.device), last_U][:, None],
            *inputs[1:],
        )

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _round_up(value: int, tile: int) -> int:
    return -(-value // tile) * tile
