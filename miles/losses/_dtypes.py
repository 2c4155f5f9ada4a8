"""Floating point that log-probs can be compared in."""

from __future__ import annotations

from torch import Tensor

from miles.errors import DtypeError
from miles.packed import check_tensors

__all__ = ["as_logprobs", "widened"]


def as_logprobs(**tensors: Tensor) -> list[Tensor]:
    """The tensors, bf16 and fp16 as float32: a difference of 0.01 is a tenth of a clip range."""
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} is {tensor.dtype}; expected floating point log-probs")
    return [widened(tensor) for tensor in tensors.values()]


def widened(values: Tensor) -> Tensor:
    """bf16 and fp16 as float32, all else as it is; the gradient goes back in the old dtype."""
    return values.float() if values.is_floating_point() and values.dtype.itemsize < 4 else values
