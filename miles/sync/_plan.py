"""Which tensors go where, settled before anything moves."""

from __future__ import annotations

import contextlib
import operator
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from miles.errors import SettingError, SyncError

__all__ = [
    "as_version", "at_once", "check_commit", "check_filled", "check_version", "committing", "match",
    "memory_of", "pair",
]  # fmt: skip


def as_version(version: int, expected: str = "an integer") -> int:
    """What a caller gave, as Python's int; numpy's integers are taken too.

    Raises:
        SettingError: it is none.
    """
    try:
        if isinstance(version, bool):
            raise TypeError("a bool")
        return operator.index(version)
    except TypeError as error:
        raise SettingError(f"version is {version!r}; expected {expected}") from error


def check_version(version: int, served: int) -> bool:
    """Whether there is anything to do; versions only grow."""
    if version < served:
        raise SyncError(
            f"version {version} is older than {served}, which the engine serves; expected a larger "
            "number (after going back to an older checkpoint, restart the engine or count on)"
        )
    return version > served


def check_commit(version: int, served: int) -> None:
    """Raise where the engine got this version, or a later one, while it was on its way."""
    if not check_version(version, served):
        raise SyncError(
            f"the engine got version {version} from another trainer meanwhile; expected one trainer"
        )


def committing(target: Any) -> threading.RLock:
    """What all receivers of a target hold from `check_commit` to the end of a commit."""
    key = id(target)  # it need not be hashable
    with _MAKING:
        if key not in _COMMITS:
            _COMMITS[key] = threading.RLock()
            with contextlib.suppress(TypeError):  # with `__slots__`: the lock is left behind
                weakref.finalize(target, _COMMITS.pop, key, None)
        return _COMMITS[key]


_COMMITS: dict[int, threading.RLock] = {}
_MAKING = threading.Lock()


def check_filled(name: str, tensor: Tensor) -> None:
    """Raise for a tensor without values."""
    if tensor.is_meta:
        raise SyncError(
            f"{name} is on the meta device, where tensors have no values; expected one that has: "
            "initialise or load the model before it is pushed"
        )


def match(weights: Iterable[tuple[str, Tensor]], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of `live`'s names with the trainer's tensors; see `pair`.

    They are held until all have come, so a stream may not fill one buffer again and again.
    """
    together = at_once(weights)
    matched = dict(pair(weights, {name: (tuple(t.shape), t.dtype) for name, t in live.items()}))
    first: dict[_Memory, str] = {}
    for name, tensor in matched.items() if not together else ():
        other = first.setdefault(memory_of(tensor), name)
        if other != name and tensor.numel():
            raise SyncError(
                f"{name} came in the memory of {other}, whose values may be gone; expected tensors "
                "that stay, or a list of them or a dict's items, where they are tied"
            )
    return matched


def at_once(weights: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether all tensors are alive together, as those of a generator need not be."""
    return isinstance(weights, (list, tuple, type({}.items())))


def pair(
    weights: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Iterator[tuple[str, Tensor]]:
    """Pass through the tensors the target expects; raise for one that is missing or misshapen.

    A name beyond those is left out where it is another name of the same elements (tied weights). A
    list or the items of a dict tell: all is there at once. A generator may write to its memory
    again, so there it is unknown.
    """
    left = dict(expected)
    together = at_once(weights)
    taken: set[_Elements] = set()
    extra: dict[str, _Elements] = {}
    for name, tensor in weights:
        if name in left:
            shape, _ = left.pop(name)
            if tuple(tensor.shape) != shape:
                raise SyncError(
                    f"{name} has shape {tuple(tensor.shape)}; the engine expects {shape}"
                )
            check_filled(name, tensor)
            taken.add(_elements(tensor))
            yield name, tensor.detach()
        else:
            extra[name] = _elements(tensor)
    unknown = [name for name, where in extra.items() if not together or where not in taken]
    if left or unknown:
        raise SyncError(
            f"missing tensors {sorted(left)[:8]}, unknown tensors {unknown[:8]}; expected the "
            f"engine's {len(expected)} names, each once (of tied tensors one name, or all of them "
            "in a list or a dict's items)"
        )


_Memory = tuple[StorageWeakRef, int]
_Elements = tuple[_Memory, tuple[int, ...], tuple[int, ...], torch.dtype]


def memory_of(tensor: Tensor) -> _Memory:
    """Where a tensor lies; a weak reference, since an address alone is used again after a free."""
    shard = getattr(tensor, "_local_tensor", tensor)  # a DTensor has no storage
    return StorageWeakRef(shard.untyped_storage()), int(shard.storage_offset())


def _elements(tensor: Tensor) -> _Elements:
    """Which elements a tensor is made of, and how."""
    return memory_of(tensor), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
