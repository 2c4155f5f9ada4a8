"""A trainer's tensors, made such that `_copies.copy` can write whole buckets of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from miles.errors import SyncError
from miles.sync import _copies
from miles.sync._bucket_plan import Layout, Share, shares
from miles.sync._buckets import whole
from miles.sync._plan import check_filled, pair

__all__ = ["Collection", "Sources", "made"]

Check = Callable[[str, Tensor], None]


def _any(name: str, tensor: Tensor) -> None:
    """Every tensor will do."""


class Collection:
    """Tensors that are all there, push after push; how they are cut is remembered.

    Args:
        where: the engine's.
        bucket_bytes: most bytes of a bucket, a multiple of 4096.
        check: raises where a tensor cannot be copied.
    """

    def __init__(self, where: Layout, bucket_bytes: int, check: Check = _any) -> None:
        self.where = where
        self._bucket_bytes, self._check = bucket_bytes, check
        self._order: tuple[list[str], list[Share]] = [], []

    def cut(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[list[Share], Sources]:
        """What travels in which bucket.

        Args:
            weights: a list, a tuple or the items of a dict; see `_plan.at_once`.

        Raises:
            SyncError: other names than the engine's.
        """
        pairs = list(weights)
        names = [name for name, _ in pairs]
        where = self.where
        if names != self._order[0]:
            if len(names) != len(where.names) or set(names) != where.number.keys():
                # Tied ones have more names, and `pair` knows which are; or it raises.
                pairs = list(pair(pairs, where.specs))
                names = [name for name, _ in pairs]
            if names != self._order[0]:
                order = [where.number[name] for name in names]
                self._order = names, shares(order, where, self._bucket_bytes)
        return self._order[1], Sources(names, [t for _, t in pairs], where, self._check)


class Sources:
    """One collection."""

    def __init__(
        self, names: list[str], tensors: list[Tensor], where: Layout, check: Check
    ) -> None:
        self._names, self._tensors, self._where, self._check = names, tensors, where, check
        self._last: tuple[int, Tensor] | None = None

    def of(self, share: Share, device: torch.device) -> list[Tensor]:
        """Of each piece its tensor; others than `_copies.is_taken` are copied first.

        Raises:
            SyncError: a tensor of another shape than the engine's.
        """
        found = []
        specs, tensors = self._where.specs, self._tensors
        ats = range(share.first, share.first + len(share.pieces))
        for at, name, dtype in zip(
            ats, self._names[ats.start : ats.stop], share.dtypes, strict=True
        ):
            tensor = tensors[at]
            if tensor.shape != specs[name][0]:
                raise SyncError(
                    f"{name} has shape {tuple(tensor.shape)}; the engine expects {specs[name][0]}"
                )
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or not _copies.is_taken(
                tensor, dtype, device
            ):
                if self._last is None or self._last[0] != at:  # it may be in several buckets
                    check_filled(name, tensor)
                    full = whole(tensor, dtype)
                    self._check(name, full)
                    self._last = at, made(full, dtype, device)
                tensor = self._last[1]
            found.append(tensor)
        return found


def made(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor, or a copy of it, such that `_copies.copy` takes it."""
    if _copies.is_taken(tensor, dtype, device):
        return tensor
    return tensor.to(device, dtype).contiguous()
