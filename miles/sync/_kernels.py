"""The Triton kernels of `miles.sync`: imported when first asked for, where there is a GPU."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

__all__ = ["of"]


def of(device: torch.device) -> Any:
    """The module `_kernels_triton`; None where plain torch has to do, which is said once."""
    return _load() if device.type == "cuda" else None


@functools.lru_cache
def _load() -> Any:
    try:
        from miles.sync import _kernels_triton
    except ImportError as error:
        warnings.warn(
            "torch copies and sums up weights, some times slower, since Triton cannot be imported "
            f"({error}); pip install 'miles[kernels]'",
            stacklevel=2,
        )
        return None
    return _kernels_triton
