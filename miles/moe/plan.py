"""A tape on the device, ahead of the forward pass that replays it.

Shapes: N tokens of a forward pass, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.moe.tape import RoutingTape

__all__ = ["RoutingPlan"]


class RoutingPlan:
    """A tape and its copy on the device; `RoutingReplay.prefetch` makes it.

    The copy holds the tape's one or two bytes an index, layer by layer.
    """

    tape: RoutingTape
    """What is replayed."""

    def __init__(
        self, tape: RoutingTape, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self.tape = tape
        self._ready: torch.cuda.Event | None = None
        if stream is None:
            self._copy(device)
            return
        with torch.cuda.stream(stream):
            self._copy(device)
            self._ready = stream.record_event()

    # Not an inference tensor, whatever the caller is in: a backward pass may save it.
    @torch.inference_mode(False)
    def _copy(self, device: torch.device) -> None:
        self._ids_MNK = _to(self.tape._ids, device).transpose(0, 1).contiguous()
        holes_N = self.tape._holes_N
        self._holes_N = None if holes_N is None else _to(holes_N, device)

    @property
    def device(self) -> torch.device:
        """Where the copy is."""
        return self._ids_MNK.device

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """`[M, N, K]` ids and bool `[N]` holes, once the current stream may read them."""
        if self._ready is not None:
            stream = torch.cuda.current_stream(self._ids_MNK.device)
            stream.wait_event(self._ready)
            for copied in (self._ids_MNK, self._holes_N):
                if copied is not None:
                    copied.record_stream(stream)
        return self._ids_MNK, self._holes_N


def _to(host: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return host.to(device, copy=True)
    return host.pin_memory().to(device, non_blocking=True)
