"""Tensors written to memory on the CPU, and summed up while they are in its caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.sync._checksum import BLOCK, block_sums, salt, weights

__all__ = ["Filler"]

_AT_A_TIME = 64
"""Blocks that are copied before they are summed up: they have to stay in a core's own cache."""
_ALONE = 1024
"""Blocks that are worth a thread."""


class Filler:
    """Writes tensors to their blocks and the sums of these; a context, for its threads.

    Args:
        data: uint8, a multiple of 4096 long, on the CPU.
        sums: int64, one for each block.
        version: see `block_sums`.
    """

    def __init__(self, data: Tensor, sums: Tensor, *, version: int) -> None:
        self._data, self._sums, self._version = data, sums, version
        self._words_BK: Any = data.view(torch.int64).view(-1, BLOCK // 8).numpy()
        self._sums_B: Any = sums.numpy()
        self._weights_K: Any = weights(torch.device("cpu")).numpy()
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, view: Tensor, tensor: Tensor, block: int) -> None:
        """Copy a tensor to `view`, which begins with that block, and sum it up.

        One that is contiguous, on the CPU and of the view's dtype is read once, by several threads.
        """
        blocks = -(-view.nbytes // BLOCK)
        if tensor.dtype != view.dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
            view.copy_(tensor)
            part = self._data[block * BLOCK : (block + blocks) * BLOCK]
            if blocks:
                self._sums[block : block + blocks] = block_sums(part, version=self._version)
            return
        source_N = tensor.view(-1).view(torch.uint8).numpy()
        threads = max(1, min(self._threads, blocks // _ALONE))
        ends = [blocks * i // threads for i in range(threads + 1)]
        if threads == 1:
            self._fill(source_N, block, 0, blocks)
        else:
            list(
                self._pool.map(
                    self._fill, [source_N] * threads, [block] * threads, ends[:-1], ends[1:]
                )
            )

    def _fill(self, source_N: Any, block: int, first: int, end: int) -> None:
        salted = np.int64(salt(self._version))
        for at in range(first, end, _AT_A_TIME):
            there = slice(block + at, block + min(at + _AT_A_TIME, end))
            words_BK, sums_B = self._words_BK[there], self._sums_B[there]
            part_N = source_N[at * BLOCK : min(at + _AT_A_TIME, end) * BLOCK]
            words_BK.reshape(-1).view(np.uint8)[: len(part_N)] = part_N
            np.einsum("bk,k->b", words_BK, self._weights_K, out=sums_B)
            sums_B += salted
