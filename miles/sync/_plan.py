"""Which tensors go where, settled before anything moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from miles.errors import SyncError

__all__ = ["check_version", "layout", "match", "pair"]

ALIGNMENT = 256


def check_version(version: int, served: int) -> bool:
    """Whether there is anything to do; versions only grow."""
    if version < served:
        raise SyncError(
            f"version {version} is older than {served}, which the engine serves; expected a larger "
            "number (after going back to an older checkpoint, restart the engine or count on)"
        )
    return version > served


def match(weights: Iterable[tuple[str, Tensor]], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of `live`'s names with the trainer's tensors; see `pair`."""
    return dict(pair(weights, {name: (tuple(t.shape), t.dtype) for name, t in live.items()}))


def pair(
    weights: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Iterator[tuple[str, Tensor]]:
    """Pass through the tensors the target expects; raise for one that is missing or misshapen.

    A name beyond those is let through only where its storage came under an expected name too (tied
    weights).
    """
    left = dict(expected)
    storages: set[int] = set()
    extra: dict[str, int] = {}
    for name, tensor in weights:
        if name in left:
            shape, _ = left.pop(name)
            if tuple(tensor.shape) != shape:
                raise SyncError(f"{name} has shape {tuple(tensor.shape)}; the engine expects {shape}")
            storages.add(tensor.data_ptr())
            yield name, tensor.detach()
        else:
            extra[name] = tensor.data_ptr()
    unknown = [name for name, pointer in extra.items() if pointer not in storages]
    if left or unknown:
        raise SyncError(
            f"missing tensors {sorted(left)[:8]}, unknown tensors {unknown[:8]}; expected the engine's "
            f"{len(expected)} names, each once"
        )


def layout(
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> tuple[dict[str, int], int]:
    """Byte offset of each tensor in one buffer, and the buffer's size."""
    offsets: dict[str, int] = {}
    end = 0
    for name, (shape, dtype) in expected.items():
        offsets[name] = end
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end
