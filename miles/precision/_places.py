"""Where each tensor of a Hugging Face checkpoint lies in a model's parameters, and back.

transformers keeps some weights in another form than checkpoints hold them in: experts fused into
one three-dimensional parameter, projections renamed. Its own way back to the checkpoint's names,
`transformers.core_model_loading.revert_weight_conversion`, is what `save_pretrained` calls. It is
given the numbers of rows in place of the weights, so that what comes out tells which rows of which
parameter make up each tensor on disk, for every family that transformers knows.
"""

from __future__ import annotations

import bisect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miles.errors import UnsupportedModelError

__all__ = ["Layout", "Place", "find", "whole"]

StateDict = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """One tensor of the checkpoint."""

    name: str
    """On disk."""
    shape: torch.Size
    """On disk."""
    sources: tuple[str, ...]
    """Parameters it is made of; more than one only with `ids`."""
    rows: tuple[int, int] | None
    """First row and the one after the last, of the source as a matrix of its last dimension."""
    ids: Tensor | None = None
    """Else int64, of the tensor's shape: elements of the sources laid end to end."""

    def read(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the checkpoint has it; a view where that is possible."""
        if self.rows is not None:
            (name,) = self.sources
            return _matrix(sources[name])[slice(*self.rows)].view(self.shape)
        assert self.ids is not None
        flat = torch.cat([sources[name].flatten() for name in self.sources])
        return flat[self.ids.to(flat.device)]

    def write(self, piece: Tensor, sources: Mapping[str, Tensor]) -> None:
        """Put a tensor of the checkpoint into contiguous parameters."""
        if self.rows is not None:
            (name,) = self.sources
            matrix = _matrix(sources[name])
            matrix[slice(*self.rows)] = piece.reshape(-1, matrix.shape[1]).to(matrix.dtype)
            return
        assert self.ids is not None
        start = 0
        ids, values = self.ids.flatten(), piece.flatten()
        for name in self.sources:
            flat = sources[name].view(-1)
            inside = (ids >= start) & (ids < start + len(flat))
            flat[ids[inside] - start] = values[inside].to(flat.dtype)
            start += len(flat)


@dataclass(frozen=True)
class Layout:
    """A model as its checkpoint."""

    parameters: Mapping[str, Tensor]
    """Parameters and buffers by their name in the model, each once; shards under FSDP2."""
    places: tuple[Place, ...]
    """In the order of the parameters."""
    aliases: Mapping[str, str]
    """Names on disk of what is tied to another tensor, to that one's; not saved."""
    owners: Mapping[str, nn.Module]
    """The module that each parameter belongs to."""


def whole(tensor: Tensor) -> Tensor:
    """A tensor without gradient, gathered if it is a shard (all ranks have to call)."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def find(model: nn.Module) -> Layout:
    """The layout of a model; transformers isn't imported unless the model is one of its own.

    Raises:
        UnsupportedModelError: transformers changes values, not only their places.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    parameters, tied = _once(model)
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    shapes = tuple((name, tensor.shape) for name, tensor in parameters.items())
    known = _FOUND.get(model)
    if known is None or known[0] != shapes:
        known = shapes, *_find(model, parameters, tied)
        _FOUND[model] = known
    return Layout(
        parameters=parameters,
        places=known[1],
        aliases=known[2],
        owners={n: owners[id(p)] for n, p in parameters.items() if id(p) in owners},
    )


_Found = tuple[tuple[tuple[str, torch.Size], ...], tuple[Place, ...], dict[str, str]]
_FOUND: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()
"""Names and shapes of a model's parameters, places and aliases: seconds for 20,000 tensors."""


def _find(
    model: nn.Module, parameters: StateDict, tied: dict[str, str]
) -> tuple[tuple[Place, ...], dict[str, str]]:
    revert = _reverter(model)
    empty = {name: torch.empty(t.shape, device="meta") for name, t in parameters.items()}
    shapes = {name: tensor.shape for name, tensor in revert(empty).items()}
    places = tuple(_places(parameters, shapes, revert))
    by_source = {place.sources[0]: place.name for place in places}
    renamed = {name: next(iter(revert({name: empty[to]}))) for name, to in tied.items()}
    return places, {renamed[name]: by_source[to] for name, to in tied.items() if to in by_source}


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def _once(model: nn.Module) -> tuple[StateDict, dict[str, str]]:
    """The state dict without repetitions, and what was repeated by the name that was kept."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {k: t for k, t in model.state_dict(keep_vars=True).items() if k not in ignored}
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    # What transformers declares to be a copy is the one to leave out, wherever it comes.
    order = sorted(state, key=lambda name: name in declared)
    first: dict[int, str] = {}
    for name in order:
        first.setdefault(id(state[name]), name)
    kept = {k: t for k, t in state.items() if first[id(t)] == k}
    return kept, {k: first[id(t)] for k, t in state.items() if k not in kept}


def _reverter(model: nn.Module) -> Callable[[StateDict], StateDict]:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return dict
    from transformers.core_model_loading import revert_weight_conversion

    return lambda state: revert_weight_conversion(model, state)


def _places(
    parameters: StateDict,
    shapes: Mapping[str, torch.Size],
    revert: Callable[[StateDict], StateDict],
) -> list[Place]:
    names = list(parameters)
    starts = list(itertools.accumulate(map(_num_rows, parameters.values()), initial=0))
    numbered = {
        name: _number(t, start)
        for (name, t), start in zip(parameters.items(), starts, strict=False)
    }
    try:
        found = revert(numbered)
    except Exception:  # whatever an operation of transformers raises that needs true shapes
        # All weights then go the slower way, by element numbers, where an error is not caught.
        found = {}
    places, scattered = [], set(names) if not found else set()
    for name, rows in found.items():
        if not rows.numel():
            raise UnsupportedModelError(
                f"{name} has shape {tuple(rows.shape)}; expected weights that hold something; "
                "take it out of the model's state_dict"
            )
        first = bisect.bisect_right(starts, int(rows.flatten()[0])) - 1
        source, start = names[first], starts[first]
        whole = parameters[source].ndim < 2 or _has_whole_rows(rows)
        flat = (rows if parameters[source].ndim < 2 else rows[..., 0]).flatten().numpy()
        full = shapes[name] == _full(rows, parameters[source])
        if whole and full and _is_run(flat, starts[first + 1]):
            run = int(flat[0]) - start, int(flat[-1]) + 1 - start
            places.append(Place(name, shapes[name], (source,), run))
        else:
            every = rows.unique().tolist()
            scattered |= {names[bisect.bisect_right(starts, row) - 1] for row in every}
    places = [place for place in places if place.sources[0] not in scattered]
    places += _scattered({n: t for n, t in parameters.items() if n in scattered}, revert)
    position = {name: i for i, name in enumerate(names)}
    places.sort(key=lambda p: (position[p.sources[0]], p.rows or (0, 0)))
    _check_complete(places, parameters)
    return places


def _number(tensor: Tensor, start: int) -> Tensor:
    """The number of each row, counted from `start`, in two columns for any number of them.

    One column would not do: transformers 5.17 squeezes it away.
    """
    if tensor.ndim < 2:
        return torch.arange(start, start + len(tensor.flatten())).view(tensor.shape)
    rows = torch.arange(start, start + _num_rows(tensor)).view(*tensor.shape[:-1], 1)
    return rows.repeat(*(1,) * (tensor.ndim - 1), 2)


def _has_whole_rows(rows: Tensor) -> bool:
    """Whether two columns are still two columns."""
    return rows.ndim > 1 and rows.shape[-1] == 2 and torch.equal(rows[..., 0], rows[..., 1])


def _is_run(rows: np.ndarray[Any, Any], end: int) -> bool:
    """Whether rows follow each other, before `end`."""
    return len(rows) > 0 and rows[-1] < end and bool((np.diff(rows) == 1).all())


def _full(rows: Tensor, source: Tensor) -> torch.Size:
    """The shape of whole rows, of two columns here."""
    return torch.Size((*rows.shape[:-1], source.shape[-1])) if source.ndim > 1 else rows.shape


def _num_rows(tensor: Tensor) -> int:
    return int(tensor.shape[:-1].numel() if tensor.ndim > 1 else tensor.numel())


def _scattered(parameters: StateDict, revert: Callable[[StateDict], StateDict]) -> Iterable[Place]:
    """Places of weights that are transposed, permuted or made of several, element by element."""
    if not parameters:
        return
    sizes = torch.tensor([t.numel() for t in parameters.values()])
    ends = sizes.cumsum(0)
    numbered = {
        name: torch.arange(int(end) - t.numel(), int(end)).view(t.shape)
        for (name, t), end in zip(parameters.items(), ends, strict=True)
    }
    names = list(parameters)
    for name, ids in revert(numbered).items():
        which = torch.bucketize(ids.flatten(), ends, right=True).unique().tolist()
        sources = tuple(names[i] for i in which)
        # Numbered over all, wanted over this tensor's own sources.
        own = ids.clone()
        removed = torch.cat([sizes.new_zeros(1), ends])
        before = 0
        for i in which:
            inside = (ids >= removed[i]) & (ids < removed[i + 1])
            own[inside] = ids[inside] - removed[i] + before
            before += int(sizes[i])
        yield Place(name, ids.shape, sources, None, own)


def _check_complete(places: list[Place], parameters: StateDict) -> None:
    """Every element has one place: what isn't so can't be loaded back."""
    seen = dict.fromkeys(parameters, 0)
    for place in places:
        if place.rows is not None:
            seen[place.sources[0]] += place.shape.numel()
        else:
            assert place.ids is not None
            start = 0
            for name in place.sources:
                size = parameters[name].numel()
                inside = place.ids[(place.ids >= start) & (place.ids < start + size)]
                seen[name] += len(inside.unique())
                start += size
    wrong = [name for name, count in seen.items() if count != parameters[name].numel()]
    if wrong:
        raise UnsupportedModelError(
            f"the checkpoint of transformers doesn't hold each element of {wrong[:4]} once; "
            "expected conversions that move values; save such a model with save_pretrained"
        )
