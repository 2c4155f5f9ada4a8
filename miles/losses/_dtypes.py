"""Floating point that log-probs can be compared in."""

from __future__ import annotations

from torch import Tensor

from miles.errors import DtypeError

__all__ = ["as_logprobs"]


def as_logprobs(**tensors: Tensor) -> list[Tensor]:
    """The tensors, bf16 and fp16 as float32: a difference of 0.01 is a tenth of a clip range."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} is {tensor.dtype}; expected floating point log-probs")
    return [t.float() if t.dtype.itemsize < 4 else t for t in tensors.values()]
