"""Which weights SGLang servers read where the trainer has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from miles.errors import SyncError
from miles.sync._sglang_payload import Block, InPlace, by_place
from miles.sync._sglang_slabs import Memory

__all__ = ["PER_CALL", "split"]

FUSED = ".q_a_proj.", ".kv_a_proj_with_mqa."
PER_CALL = 16
"""Allocations that a server opens and closes in the time that a bucket's call takes (docs/sync.md):
one is worth that if its weights would fill as large a part of a bucket."""

Named = list[tuple[str, Tensor]]


def split(
    weights: Iterable[tuple[str, Tensor]], memory: Memory, worth: float
) -> tuple[InPlace | None, Named]:
    """Weights that are read in place, if any, when what was queued is done, and the others.

    Args:
        weights: (name, tensor) pairs, all of which stay as they are until servers have read them.
        memory: what they lie in.
        worth: bytes that an allocation has to hold of them.

    Raises:
        SyncError: a name came twice; a tensor is not on a GPU.
    """
    seen: set[str] = set()
    placed: dict[tuple[torch.device, int, int], Named] = defaultdict(list)
    others: Named = []
    start = end = 0
    for name, tensor in weights:
        if name in seen:
            raise SyncError(f"{name} came twice; expected each weight once")
        seen.add(name)
        memory.check(name, tensor)
        # Sharded ones are gathered, which makes others of them; loaders may `view` what they get.
        # Two that have to come together may lie apart; `groups` brings them together.
        plain = type(tensor) in (Tensor, Parameter) and tensor.is_contiguous()
        plain = plain and not any(part in name for part in FUSED)
        if not plain or not tensor.numel() or tensor.is_conj() or tensor.is_neg():
            others.append((name, tensor))
            continue
        if not start <= tensor.data_ptr() < end:
            start, nbytes = memory.allocation(tensor)
            end = start + nbytes
        aligned = (tensor.data_ptr() - start) % tensor.itemsize == 0
        (placed[tensor.device, start, end] if aligned else others).append((name, tensor))
    found: list[tuple[str, Tensor, Block]] = []
    for (device, start, end), named in placed.items():
        large = sum(tensor.nbytes for _, tensor in named) >= worth
        block = memory.block(device, start, end - start) if large else None
        if block is None:
            others += named
        else:
            found += [(name, tensor.detach(), block) for name, tensor in named]
    for device in {tensor.device for _, tensor, _ in found}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return (by_place(found) if found else None), others
