"""What the host decides by: small tensors on their way to it and back, that nothing waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopies", "upload"]


class HostCopies:
    """Copies of tensors on the CPU, of their values when they were begun.

    Reading one waits for the work that was queued before it was begun, not for any since.
    """

    def __init__(self) -> None:
        self._begun: dict[int, tuple[Tensor, Tensor, torch.cuda.Event | None]] = {}

    def begin(self, *values: Any) -> None:
        """Queue copies of what is on a GPU, and copy what is not; others than tensors pass by."""
        for tensor in values:
            if isinstance(tensor, Tensor) and not tensor.is_cuda:
                self._begun[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True), None
            elif isinstance(tensor, Tensor):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(torch.cuda.current_stream(tensor.device))
                self._begun[id(tensor)] = tensor, host, copied  # held, so that its id stays its own

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU; of one that was not begun after all that is queued."""
        if id(tensor) not in self._begun:
            return tensor.cpu()
        _, host, copied = self._begun[id(tensor)]
        if copied is not None:
            copied.synchronize()
        return host


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from the CPU to a GPU without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A copy, also of what is pinned: its owner may write to it before the GPU gets here.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor).to(device, non_blocking=True)
    return tensor.to(device)
