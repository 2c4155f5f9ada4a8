"""The parts of a push to SGLang servers that don't talk to them, or only ask."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._buckets import whole
from miles.sync._sglang_client import Client
from miles.sync._sglang_payload import FlatBucket, InPlace, flat_buckets

__all__ = ["Queue", "Sent", "check_able", "ended", "noted", "write_folder"]

ROWS = 4
"""First rows of a weight that are compared with what a server says that it holds."""


class Queue:
    """Buckets that are under way, so many at a time.

    Args:
        depth: how many.
        sent: where it is noted.
    """

    def __init__(self, depth: int, sent: Sent) -> None:
        self._depth, self._sent = depth, sent
        self._under_way: deque[Callable[[], None]] = deque()

    def make_room(self) -> None:
        """Wait until one more may begin."""
        self._settle(self._depth - 1)

    def add(self, finish: Callable[[], None]) -> None:
        """One has begun; what ends it."""
        self._under_way.append(finish)

    def end(self) -> None:
        """Wait for all."""
        self._settle(0)

    def _settle(self, under_way: int) -> None:
        try:
            while len(self._under_way) > under_way:
                self._sent.wait(self._under_way.popleft())
        except BaseException:
            self.abandon()  # other ranks free their slabs when they hear of it
            raise

    def abandon(self) -> None:
        """Wait for all, whatever comes of them: servers may read them until then."""
        while self._under_way:
            with contextlib.suppress(SyncError):
                self._under_way.popleft()()


class Sent:
    """What one push has sent."""

    def __init__(self) -> None:
        self.tensors = self.bytes = self.buckets = self.in_place = 0
        self.waited = 0.0
        self.phases: dict[str, float] = {}
        self.rows: dict[str, Tensor] = {}

    def wait(self, finish: Callable[[], None]) -> None:
        """Wait for what is under way, and note how long."""
        start = time.perf_counter()
        finish()
        self.waited += time.perf_counter() - start

    def compare(self, client: Client) -> None:
        """Read weights back.

        Raises:
            SyncError: a server holds something else, or does not tell.
        """
        for name, wanted in self.rows.items():
            body = {"name": name, "truncate_size": ROWS}
            try:
                told = torch.tensor(client.post("/get_weights_by_name", body))
            except (SyncError, TypeError, ValueError, RuntimeError) as error:
                raise SyncError(
                    f"{client.url} does not tell what it holds of {name} ({error}); its model "
                    "class may not be able to: leave verify= out"
                ) from error
            # The server's dtype may be narrower: half a unit in the last place of bf16.
            if told.shape != wanted.shape or not torch.allclose(told, wanted, rtol=2**-8, atol=0):
                raise SyncError(f"{client.url} holds other values of {name} than were sent")


def check_able(
    clients: Sequence[Client], *, via: str, selector: str | None, pause: str | None
) -> None:
    """Raise `SyncError` for what these servers cannot do, before anything is touched."""
    for client in clients:
        if client.weight_cache:
            raise SyncError(
                f"{client.url} shares its weights with a weight-cache daemon and ends itself "
                "when it is told to load others; use SGLangWeightCacheSyncer, or start it "
                "with --weight-cache-mode off"
            )
        if via == "disk" and client.draft and not client.sessions:
            raise SyncError(
                f"{client.url} has a draft model, into which SGLang before 0.5.21 would load "
                "the policy's files as well; expected via='cuda_ipc', 'value' or 'distributed' "
                "with selector='target'"
            )
        if not client.sessions and (selector == "draft" or pause == "retract"):
            raise SyncError(
                f"{client.url} is older than 0.5.21, which cannot update a draft model alone "
                "nor forget cached prefixes of retracted requests; expected selector other "
                "than 'draft', and pause='abort'"
            )


def noted(
    weights: Iterable[tuple[str, Tensor]], sent: Sent, verify: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights through, counted; of those to verify, keep the first rows."""
    for name, tensor in weights:
        sent.tensors += 1
        sent.bytes += tensor.nbytes
        if name in verify:
            sent.rows[name] = whole(tensor.detach())[:ROWS].float().cpu()
        yield name, tensor
    if missing := set(verify) - sent.rows.keys():
        raise SyncError(f"verify names {sorted(missing)}, which were not among the weights")


def ended(calls: list[Future[Any]], bucket: FlatBucket | InPlace | None) -> None:
    """Wait for calls; raise the first error, with the bucket's weights where it is about one."""
    wait(calls)
    for call in calls:
        try:
            call.result()
        except SyncError as error:
            if bucket is None:
                raise
            raise SyncError(f"the bucket of {bucket.names} was not loaded: {error}") from error


def write_folder(weights: Iterable[tuple[str, Tensor]], path: Path, bucket_bytes: int) -> int:
    """A folder of safetensors, there as a whole or not at all; returns the number of files."""
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    places: dict[str, str] = {}
    number = 0
    for bucket in flat_buckets(weights, bucket_bytes=bucket_bytes, device="cpu"):
        number += 1
        file = f"model-{number:05}.safetensors"
        tensors = {
            w.name: bucket.flat[w.start_idx : w.end_idx].view(w.dtype).view(w.shape)
            for w in bucket.metadata
        }
        save_file(tensors, part / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if not number:
        raise SyncError("no weights were given; expected those of the whole model")
    index = {"metadata": {}, "weight_map": places}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    return number
