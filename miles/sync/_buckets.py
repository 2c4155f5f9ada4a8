"""Sizes that buckets may have, and the tensors that go into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from miles.errors import SettingError
from miles.sync._checksum import BLOCK
from miles.sync._plan import pair

__all__ = ["Specs", "check_bucket_bytes", "gathered", "whole"]

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def check_bucket_bytes(bucket_bytes: int) -> int:
    """A size that buckets may have."""
    if bucket_bytes < BLOCK or bucket_bytes % BLOCK:
        raise SettingError(
            f"bucket_bytes is {bucket_bytes}; expected a positive multiple of {BLOCK}"
        )
    return bucket_bytes


def gathered(weights: Iterable[tuple[str, Tensor]], specs: Specs) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `specs`, whole, one at a time; raises as `pair` does.

    Every rank that shares sharded tensors has to take all of them.
    """
    for name, tensor in pair(weights, specs):
        yield name, whole(tensor, specs[name][1])


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A `DTensor` gathered on every rank that shares it, another tensor as it is.

    Args:
        tensor: any.
        dtype: what a sharded tensor is cast to before it is gathered, to move fewer bytes.
    """
    shards: Any = tensor
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if dtype is not None and not any(p.is_partial() for p in shards.placements):
        shards = shards.to(dtype)
    full: Tensor = shards.full_tensor()
    return full
