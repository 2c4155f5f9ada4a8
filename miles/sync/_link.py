"""The collective carrier's wire: JSON from one rank to another, bytes from the sender to all.

Messages go over the CPU half of the process group (gloo), one rank to one rank, so that an error
tells who is gone and a host reads the next message while a bucket is still under way.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import SettingError, SyncError

__all__ = ["Link", "PeerLostError"]

_FOREVER = 10 * 365 * 86400.0
_MAX_MESSAGE = 1 << 30


class PeerLostError(SyncError):
    """Another rank hung up or was silent for too long; the group is of no use any more."""

    def __init__(self, text: str, rank: int | None = None) -> None:
        super().__init__(text)
        self.rank = rank


class Link:
    """One rank's end.

    Args:
        group: a process group that moves CPU tensors; rank 0 of it sends.
        timeout: seconds that a peer may be silent in the middle of a push.
        device: where buckets are; by default a GPU if the group has NCCL.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout: float, device: torch.device | None
    ) -> None:
        backends = dist.get_backend_config(group)
        if "cpu:" not in backends:
            raise SettingError(
                f"the process group moves {backends!r} only; expected one for CPU tensors too, "
                "which messages are: dist.new_group(ranks, backend='cpu:gloo,cuda:nccl')"
            )
        if device is None:
            device = torch.device("cuda" if "cuda:nccl" in backends else "cpu")
        if device == torch.device("cuda"):  # the receiver's thread has another one
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.timeout = timeout
        self.rank, self.size = group.rank(), group.size()
        self._group = group

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """A message to `rank`."""
        body = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        length = torch.tensor([body.numel()])
        for part in (length, body):
            self._wait(rank, lambda part=part: self._group.send([part], rank, 0), self.timeout)

    def receive(self, rank: int, *, timeout: float | None = None) -> dict[str, Any]:
        """The next message of `rank`.

        Args:
            rank: who is to send it.
            timeout: seconds; the link's by default, 0 for no limit.
        """
        length = torch.zeros(1, dtype=torch.int64)
        limit = self.timeout if timeout is None else timeout or _FOREVER
        self._wait(rank, lambda: self._group.recv([length], rank, 0), limit)
        if not 0 < int(length) <= _MAX_MESSAGE:
            raise PeerLostError(f"rank {rank} sent nonsense: a message of {int(length)} bytes")
        body = torch.empty(int(length), dtype=torch.uint8)
        self._wait(rank, lambda: self._group.recv([body], rank, 0), self.timeout)
        try:
            message = json.loads(body.numpy().tobytes())
        except ValueError as error:
            raise PeerLostError(f"rank {rank} sent nonsense: {error}") from error
        if not isinstance(message, dict):
            raise PeerLostError(f"rank {rank} sent nonsense: {type(message).__name__}")
        return message

    def broadcast(self, data: Tensor) -> Any:
        """Start to move `data` from rank 0 to the same tensor everywhere; see `finish`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self.timeout)
        options.asyncOp = True
        try:
            return self._group.broadcast([data], options)
        except RuntimeError as error:
            raise PeerLostError(f"a broadcast did not start ({error})") from error

    def finish(self, work: Any) -> None:
        """Wait until a broadcast is over, on the host too.

        Raises:
            PeerLostError: it failed, or took longer than the timeout.
        """
        if self.device.type == "cpu":
            self._wait(None, lambda: work, self.timeout)
            return
        work.wait()  # the stream waits; NCCL has no time limit of its own that leaves us alive
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        deadline = time.monotonic() + self.timeout
        while not event.query():
            if time.monotonic() > deadline:
                raise PeerLostError(f"no answer within {self.timeout:g} s")
            time.sleep(2e-5)

    def abandon(self) -> None:
        """End what is under way on a GPU, where it would wait for ever."""
        if self.device.type == "cuda" and hasattr(self._group, "abort"):
            self._group.abort()

    def _wait(self, rank: int | None, start: Any, timeout: float) -> None:
        who = "a peer" if rank is None else f"rank {rank}"
        begun = time.monotonic()
        try:
            start().wait(timedelta(seconds=timeout))
        except RuntimeError as error:  # gloo's, of which there is one kind
            reason = str(error).splitlines()[0][:200]
            # A pair of which one operation took too long fails at once from then on.
            late = time.monotonic() - begun >= timeout or "timeout" in reason
            what = f"did not answer within {timeout:g} s" if late else "is gone"
            text = f"{who} {what} ({reason})"
            raise PeerLostError(text, rank) from error
