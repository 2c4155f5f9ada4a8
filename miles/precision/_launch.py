"""What is called around every launch of a Triton kernel, some 50 us of Python without it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["cdiv", "on_device_of"]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` wraps its numbers for kernels: 3 us a call."""
    return -(-a // b)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's GPU as the current one, if it isn't; there is none for the interpreter."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
