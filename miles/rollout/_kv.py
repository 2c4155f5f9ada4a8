"""Key/value memory of the embedded engine: which rows of which forward pass belong to whom.

Shapes: U distinct prompts, L padded prompt length, R rows of a decoding step, W tokens that a row
processes in it, V vocabulary entries, F features of a token.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from miles.moe._ids import storage
from miles.moe.replay import RoutingReplay
from miles.moe.tape import RoutingTape
from miles.rollout._features import FeatureTap
from miles.rollout._graph import (
    GRAPH_TOKENS,
    Outputs,
    StepGraphs,
    coarse,
    each,
    graphs_run_on,
    power_of_two,
    round_up,
)
from miles.rollout._slot_layer import KEY_TILE, SlotLayer

__all__ = ["KVMemory", "RequestMemory", "SlotMemory", "mixes_rows", "supports_slots"]

LENGTH_TILE = 16
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

    def free(self, slot: int, *, spoilt: bool = False) -> None:
        """Forget what the slot holds; `spoilt`: that may be NaN."""
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
        num_rows = round_up(num_slots, row_tile)
        self._room = max_context + max_proposed
        self._layers = [SlotLayer(num_rows, self._room) for _ in range(num_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._recorder, self._max_context = recorder, max_context
        self.device = device = _device(model)
        self._every_row = torch.arange(num_rows, device=device)
        self._inputs = torch.zeros((3, num_rows), dtype=torch.int64, device=device)
        self._proposed = torch.zeros((num_rows, max_proposed), dtype=torch.int64, device=device)
        self._graphs = self._prefills = None
        if cuda_graphs and graphs_run_on(device):
            size = 2 * (GRAPH_TOKENS + power_of_two(num_slots))
            self._prompts = torch.zeros(size, dtype=torch.int64, device=device)
            self._graphs = StepGraphs(self._step)
            self._prefills = StepGraphs(partial(self._prefill_step, self._prompts, True))
        self._graphed_keys: list[int] = []
        self._spoilt: set[int] = set()
        # A wider tile means fewer graphs; what it adds to attention is nothing beside a launch.
        self._key_tile = KEY_TILE if self._graphs is None else GRAPH_KEY_TILE

    def prefill(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[RoutingTape] | None]:
        owners = [(row, slot) for row, group in enumerate(slots) for slot in group]
        count, longest = len(prompts), max(len(prompt) for prompt in prompts)
        rows, width = power_of_two(count), min(coarse(longest), self._max_context)
        graphs = self._prefills
        if graphs is not None and not (graphs.usable and rows * width <= GRAPH_TOKENS):
            graphs = None
        if graphs is None:
            shape = count, len(owners), min(round_up(longest, LENGTH_TILE), self._max_context)
        else:  # coarse, so that few graphs do
            shape = rows, power_of_two(len(owners)), width
        self._reserve(shape[2])
        self._mend(slot for _, slot in owners)
        numbers = _numbers(prompts, owners, *shape)
        if graphs is None:
            outputs = self._prefill_step(numbers.to(self.device), False, *shape)
        else:
            self._prompts[: len(numbers)].copy_(numbers)
            # The next pass may write where these are.
            outputs = each(lambda part: part[:count].clone(), graphs(*shape))
        logits_UV, ids, self.features = outputs
        if ids is None:
            return logits_UV, None
        tape = _tape(self._recorder, [ids.flatten(0, 1)])
        assert tape is not None
        starts = range(0, count * shape[2], shape[2])
        return logits_UV, [
            tape[start : start + len(prompt)] for start, prompt in zip(starts, prompts, strict=True)
        ]

    def _prefill_step(
        self, numbers: Tensor, masked: bool, num_prompts: int, num_owners: int, width: int
    ) -> Outputs:
        """The device's work of `prefill`, from `_numbers`; the expert ids are `[U, L, M, K]`."""
        size = num_prompts * (width + 1)
        ids_UL = numbers[: num_prompts * width].view(num_prompts, width)
        last_U = numbers[num_prompts * width : size]
        rows, targets = numbers[size : size + 2 * num_owners].view(2, num_owners)
        for layer in self._layers:
            layer.write_rows(rows, targets)
        positions_1L = torch.arange(width, device=numbers.device)[None]
        # Causal attention never looks right, so padding there needs no mask. Versions of
        # transformers make one during a capture all the same, and other kernels round otherwise.
        mask = None
        if masked:
            visible = (positions_1L <= positions_1L.T).expand(num_prompts, 1, -1, -1)
            mask = self._mask(visible)
        with (
            _only_positions(self._model, last_U),
            _recording(self._recorder) as recorded,
            _reading(self._tap) as read,
        ):
            logits_UV = self._forward(ids_UL, positions_1L, mask)[:, -1]
        ids = recorded[0].unflatten(0, ids_UL.shape) if recorded else None
        return logits_UV, ids, read[0] if read else None

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
        num_rows = round_up(max(slots) + 1, self._row_tile)
        most = self._max_context + width - 1  # a plain step reads what it reads without a draft
        num_keys = min(round_up(max(positions) + width, self._key_tile), most)
        inputs = torch.zeros((3, num_rows), dtype=torch.int64)  # one transfer for all three
        index = torch.tensor(slots)
        inputs[0, index] = torch.tensor(tokens)
        inputs[1, index] = torch.tensor(positions)
        inputs[2, : len(slots)] = index
        self._inputs[:, :num_rows].copy_(inputs)
        own = self._inputs[2, : len(slots)]
        if proposed_RK is not None:
            self._proposed[own, : width - 1] = proposed_RK
        self._reserve(num_keys)
        step = self._step if self._graphs is None else self._graphs
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

    @property
    def graphed(self) -> bool:
        """Whether each new shape of a step is captured."""
        return self._graphs is not None

    def worth_moving(self, highest: int, active: int) -> bool:
        return round_up(highest + 1, self._row_tile) > round_up(active, self._row_tile)

    def move(self, source: int, target: int, length: int) -> None:
        self._mend([target])
        for layer in self._layers:
            layer.copy(source, target, length)

    def free(self, slot: int, *, spoilt: bool = False) -> None:
        """What a slot holds beyond its own length counts 0 times, which is NaN if that is."""
        if spoilt:
            self._spoilt.add(slot)

    def _mend(self, slots: Iterable[int]) -> None:
        """Before somebody has them."""
        for slot in self._spoilt.intersection(slots):
            for layer in self._layers:
                layer.clear(slot)
            self._spoilt.discard(slot)

    def weights_moved(self) -> None:
        for graphs in (self._graphs, self._prefills):
            if graphs is not None:
                graphs.forget()

    def _reserve(self, num_keys: int) -> None:
        """Make room for so many positions of each slot."""
        for layer in self._layers:
            layer.reserve(num_keys)
        if self._graphed_keys != (held := [layer.num_keys for layer in self._layers]):
            self.weights_moved()
            self._graphed_keys = held

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

    def free(self, slot: int, *, spoilt: bool = False) -> None:
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


def _numbers(
    prompts: Sequence[Sequence[int]],
    owners: Sequence[tuple[int, int]],
    num_prompts: int,
    num_owners: int,
    width: int,
) -> Tensor:
    """What a prefill of that shape reads, int64: ids `[U, L]`, the place of each prompt's last
    token, and rows and slots of the owners, one after the other.

    The last prompt and the last owner fill the shape up.
    """
    ids_UL = torch.zeros((num_prompts, width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_UL[row, : len(prompt)] = torch.tensor(prompt)
    ids_UL[len(prompts) :] = ids_UL[len(prompts) - 1]
    last = [len(prompt) - 1 for prompt in prompts]
    last += last[-1:] * (num_prompts - len(prompts))
    filled = [*owners, *[owners[-1]] * (num_owners - len(owners))]
    rows, slots = zip(*filled, strict=True)
    return torch.cat([ids_UL.flatten(), torch.tensor([*last, *rows, *slots])])


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
