"""What the ranks of one trainer tell each other, so that all of them push or none does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import SyncError

__all__ = ["Trainers", "is_of_the_wire", "lost"]


class Trainers:
    """The ranks that hold parts of the weights; rank 0 of the group acts for them.

    Args:
        group: their process group, None for a trainer of one process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self.alone = self._group is None
        self.rank = 0 if self._group is None else self._group.rank()
        self._interrupted = False

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around a push: after Ctrl-C in one it is unknown which collective would be next.

        Raises:
            SyncError: one was interrupted, on this rank or, as it told this one, on rank 0.
        """
        if self._interrupted:
            raise SyncError(
                "a push was interrupted, so ranks of the trainers may be out of step; close this "
                "syncer, make new process groups, and a syncer of them"
            )
        try:
            yield
        except BaseException as error:
            if not self.alone and not isinstance(error, Exception):
                self._interrupted = True
            raise

    def agree(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on rank 0, which JSON can hold, on every rank; all of them call it.

        Raises:
            SyncError: it raised on rank 0, or another rank failed and the group timed out.
            Exception: what it raised on this rank.
        """
        result: Any = None
        failure: BaseException | None = None
        try:
            result = {"result": act()}
        except BaseException as error:
            failure = error
            result = {
                "error": f"{type(error).__name__}: {error}",
                "interrupted": not isinstance(error, Exception),
            }
        if self._group is not None:
            try:
                result = self._share(result, self._group)
            except RuntimeError as error:
                failure = failure or error
                if failure is error or is_of_the_wire(failure):
                    raise lost(failure) from failure
            else:
                self._interrupted |= result.get("interrupted", False)
        if failure is not None:
            if self._group is not None and is_of_the_wire(failure):
                raise lost(failure) from failure
            raise failure
        if "error" in result:
            raise SyncError(f"rank 0 of the trainers failed: {result['error']}")
        return result["result"]

    def gather(self, text: str) -> list[str]:
        """Every rank's text, on every rank, in the order of ranks; all of them call it.

        Raises:
            SyncError: another rank failed and the group timed out.
        """
        if self._group is None:
            return [text]
        try:
            return self._gather(text.encode(), self._group)
        except RuntimeError as error:
            raise lost(error) from error

    def told(self, error: BaseException) -> BaseException:
        """The error, or what it means if a collective of the trainers failed."""
        return error if self.alone or not is_of_the_wire(error) else lost(error)

    def _gather(self, body: bytes, group: dist.ProcessGroup) -> list[str]:
        device = _device_of(group)
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(lengths, torch.tensor([len(body)], device=device), group=group)
        counts = [int(length) for length in lengths]
        padded = bytearray(body.ljust(max(counts, default=0) or 1))
        mine = torch.frombuffer(padded, dtype=torch.uint8).to(device)
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine, group=group)
        return [
            part[:count].cpu().numpy().tobytes().decode()
            for part, count in zip(parts, counts, strict=True)
        ]

    def _share(self, message: Any, group: dist.ProcessGroup) -> Any:
        device = _device_of(group)
        body = bytearray(json.dumps(message).encode()) if self.rank == 0 else bytearray()
        length = torch.tensor([len(body)], device=device)
        _broadcast(length, group)
        if self.rank == 0:
            data = torch.frombuffer(body, dtype=torch.uint8).to(device)
        else:
            data = torch.empty(int(length), dtype=torch.uint8, device=device)
        _broadcast(data, group)
        return json.loads(data.cpu().numpy().tobytes())


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")


def is_of_the_wire(error: BaseException) -> bool:
    """Whether a collective failed; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and "gloo" in str(error)
    )


def lost(error: BaseException) -> SyncError:
    """What a rank raises that waited for another in vain."""
    return SyncError(
        "another rank of the trainers failed, or the group timed out; expected all of them to hand "
        f"out the same names ({type(error).__name__}: {error}); see the error of that rank, make "
        "new process groups and push again"
    )


def _broadcast(tensor: Tensor, group: dist.ProcessGroup) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()
