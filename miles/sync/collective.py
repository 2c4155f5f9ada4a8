"""Weights for engines on other devices or machines, through a process group (NCCL or gloo).

Rank 0 of the group sends, all others receive. A push goes through these messages, each a JSON
object from one rank to one rank over the group's CPU backend (nothing is ever unpickled):

    sender: hello       receivers: what they serve, and expect if that is new
    sender: begin       the version, or skip
    sender: bucket ...  which tensors; then the bytes, broadcast, two buckets at a time
    sender: sums        then the checksums of all blocks of 4096 bytes, broadcast
    sender: end         all has left     receivers: vote
    sender: commit      or abort         receivers: done

Receivers put the bytes into memory that isn't served. They commit when all voted for it, and none
does when one did not.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.errors import SettingError, SyncError
from miles.protocols import SyncReport, WeightTarget
from miles.sync._bucket_plan import Layout
from miles.sync._buckets import check_bucket_bytes, gathered
from miles.sync._checksum import BLOCK
from miles.sync._collective import Sender
from miles.sync._inbox import Inbox
from miles.sync._link import Link, PeerLostError
from miles.sync._plan import as_version, at_once, check_commit, committing
from miles.sync._progress import bar
from miles.sync._session import Specs, describe, specs_of
from miles.sync._trainers import Trainers

__all__ = ["CollectiveReceiver", "CollectiveSyncer"]


class CollectiveSyncer:
    """The trainer's side.

    Every rank of a sharded trainer makes one and pushes; rank 0 sends, the others take part in
    gathering one tensor at a time. What fails on rank 0 raises on all of them; what fails on
    another raises there, and as a `SyncError` on the rest, when `trainers` times out:

        pair = dist.new_group([0, 2], backend="cpu:gloo,cuda:nccl")  # trainer rank 0 and the engine
        trainers = dist.new_group([0, 1])
        CollectiveSyncer(pair, trainers=trainers).push(model.state_dict().items(), version=1)

    After an error that says that a rank is gone, and after Ctrl-C, the group is of no use: make a
    new one, with a new syncer. After any other, push again.

    On a GPU, pass a collection (`state_dict().items()`, a list): its tensors are copied and summed
    up a bucket at a time. Those of a generator, which may be gone when the next is asked for, and
    those of sharded trainers are taken one by one.

    Args:
        group: the sender, rank 0, and the receivers. On ranks that are not in it, what
            `dist.new_group` returns there, or None.
        trainers: the ranks that hold the weights, if there are several; rank 0 of it sends.
        bucket_bytes: most bytes in a broadcast, a multiple of 4096; the sender holds two buckets.
        timeout: seconds that a receiver may be silent. Ranks of the trainer wait for one another
            as long as their own group lets them.
        device: where the buckets are; by default a GPU if the group has NCCL, else the CPU.
        progress: a bar (of tqdm) when a push takes longer than a second.

    Raises:
        SettingError: a group without a CPU backend, or a bucket size that cannot be.
    """

    def __init__(
        self,
        group: Any,
        *,
        trainers: dist.ProcessGroup | None = None,
        bucket_bytes: int = 256 << 20,
        timeout: float = 120.0,
        device: torch.device | None = None,
        progress: bool = False,
    ) -> None:
        self._trainers = Trainers(trainers)
        check_bucket_bytes(bucket_bytes)
        self._progress = progress
        self._tensors: dict[str, Any] | None = None
        self._specs: Specs = {}
        self._sender: Sender | None = None
        if self._trainers.rank == 0:
            link = Link(group, timeout, device)
            if link.rank != 0 or link.size < 2:
                raise SettingError(
                    f"the sender is rank {link.rank} of {link.size} in the group; expected rank 0 "
                    "of 2 or more, so name it first in dist.new_group, then the receivers"
                )
            self._sender = Sender(link, bucket_bytes)

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """See `WeightSyncer.push`; every rank of the trainer calls it with the same names.

        Raises:
            SettingError: `version` is no integer.
            SyncError: names what went wrong, at which rank, bucket and tensor. All engines serve
                what they served before, unless the text says that some have committed; pushing
                the version again settles that.
        """
        start = time.perf_counter()
        version = as_version(version)
        try:
            with self._trainers.in_step():
                outcome = self._push(weights, version)
        except BaseException as error:
            if self._sender is not None and not isinstance(error, Exception):  # Ctrl-C
                self._sender.interrupted()
            raise
        return SyncReport(version=version, seconds=time.perf_counter() - start, **outcome)

    def _push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        """The fields of a report."""
        plan = self._trainers.agree(lambda: self._sender and self._sender.open(version))
        outcome: dict[str, Any] = {"num_tensors": 0, "num_bytes": 0, "copied_bytes": 0}
        if not plan["skip"]:
            if plan["tensors"] != self._tensors:
                self._tensors, self._specs = plan["tensors"], _numbered(plan)
            specs = self._specs
            together = self._trainers.alone and at_once(weights)
            tensors = weights if together else gathered(weights, specs)

            def send() -> dict[str, Any] | None:
                try:
                    if self._sender is not None:
                        size = self._sender.nbytes(specs)
                        with bar(self._progress, size, version) as moved, torch.no_grad():
                            return self._sender.send(tensors, specs, version, moved)
                finally:  # the gathers of the other ranks need this one, whatever happened
                    for _ in () if self._trainers.alone else tensors:
                        pass
                return None

            outcome = self._trainers.agree(send)
        return outcome

    def close(self) -> None:
        """Tell the receivers that no more will come, and release the buffers."""
        if self._sender is not None:
            self._sender.close()


class CollectiveReceiver:
    """An engine's side: a loop in the engine's process.

    Call `start()` for a thread of its own, `serve()` to spend this one on it, or `receive_once()`
    between two steps of yours. New weights lie beside those served until they are committed, which
    takes one more copy of them.

    Args:
        target: the engine.
        group: the sender, rank 0, and the receivers; for a GPU, of backend
            "cpu:gloo,cuda:nccl".
        timeout: seconds that the sender may be silent in the middle of a push.
        device: where bytes arrive; by default a GPU if the group has NCCL, else the CPU.
        alias: serve the memory in which a version arrived, where it is on the device of the
            engine's tensors: nothing is copied while the engine stands still, two such memories
            take turns, and the tensors that the engine came with are let go of. Without, it is
            copied into the engine's tensors, which stay where they are (as memory savers and
            captured graphs like it).

    Raises:
        SettingError: a group without a CPU backend, or rank 0, which sends.
    """

    def __init__(
        self,
        target: WeightTarget,
        group: dist.ProcessGroup,
        *,
        timeout: float = 120.0,
        device: torch.device | None = None,
        alias: bool = True,
    ) -> None:
        self._target, self._alias = target, alias
        self._link = Link(group, timeout, device)
        if self._link.rank == 0:
            raise SettingError("the receiver is rank 0 of the group; expected the trainer there")
        # With aliasing they take turns: what was committed is not written again.
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._told: list[Any] = []
        self._where = Layout({})
        self._stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        self._interrupted = False
        self.error: Exception | None = None
        """What ended the thread of `start()`, if the sender did not."""

    def start(self) -> None:
        """`serve()` in a thread."""

        def serve() -> None:
            try:
                self.serve()
            except Exception as error:  # there is nobody above to see it
                self.error = error
                warnings.warn(f"no more weights will be received: {error}", stacklevel=1)

        self._thread = threading.Thread(target=serve, name="weight-receiver", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread of `start()` has ended."""
        if self._thread is not None:
            self._thread.join(timeout)

    def serve(self) -> None:
        """Receive until the sender closes; a push that fails is warned of, and the next awaited.

        Raises:
            SyncError: the sender is gone.
        """
        while True:
            try:
                if self.receive_once() is None:
                    return
            except PeerLostError:
                raise
            except SyncError as error:
                warnings.warn(str(error), stacklevel=1)

    def receive_once(self) -> int | None:
        """Wait for a push, however long it takes to come; the version served after it.

        Returns:
            None when the sender has closed.

        Raises:
            SyncError: the push failed; the target serves what it served.
        """
        if self._interrupted:
            raise PeerLostError("receiving was interrupted; make a new process group")
        try:
            asked = self._link.receive(0, timeout=0)
            if asked["op"] == "close":
                return None
            served = self._target.weight_version
            self._link.send(0, self._hello(known=asked.get("known", False)))
            begin = self._link.receive(0)
            if begin["op"] == "begin":
                self._receive(begin, served)
            elif begin["op"] == "abort":
                raise SyncError(f"{begin['error']}; version {served} is still served")
            elif begin["op"] != "skip":
                raise PeerLostError(f"rank 0 sent nonsense: {begin['op']} before begin")
        except PeerLostError as error:
            self._link.abandon()
            raise PeerLostError(
                f"{error}; version {self._target.weight_version} is still served; make a new "
                "process group"
            ) from error
        except KeyError as error:
            raise PeerLostError(f"rank 0 sent nonsense: a message without {error}") from error
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C: which message is next is unknown
                self._interrupted = True
                self._link.abandon()
            raise
        return self._target.weight_version

    def _hello(self, *, known: bool) -> dict[str, Any]:
        """What is served, and what is expected unless the sender knows."""
        live = self._target.weight_tensors()
        now = [(name, tensor.shape, tensor.dtype) for name, tensor in live.items()]
        if known and now == self._told:
            return {"version": self._target.weight_version}
        hello = describe(self._target)
        self._told, self._where = now, Layout(_numbered(hello))
        return hello

    def _receive(self, begin: dict[str, Any], served: int) -> None:
        version, where = begin["version"], self._where
        live = self._target.weight_tensors()
        alias = self._alias and all(t.device == self._link.device for t in live.values())
        try:
            with self._beside():
                buffer = self._buffer(where.nbytes)
                inbox = Inbox(where, buffer, begin["bucket_bytes"], version)
                arrived = self._collect(inbox, begin["bucket_bytes"], where.nbytes // BLOCK)
                tensors = {name: arrived[name] for name in live}
            now = self._target.weight_version
            if now != served:
                raise SyncError(
                    f"the engine went from version {served} to {now} meanwhile, so another trainer "
                    "syncs it; expected one"
                )
            vote: dict[str, Any] = {}
        except PeerLostError:
            raise
        except _AbortedError as error:
            raise SyncError(
                f"version {version} was not taken, {self._target.weight_version} is still served: "
                f"{error}"
            ) from error
        except Exception as error:  # whatever it was, the sender has to hear of it
            vote = {"error": f"{type(error).__name__}: {error}"}
        self._link.send(0, vote)
        # The sender hears all votes first, each of which may take as long as that.
        decision = self._link.receive(0, timeout=self._link.timeout * self._link.size)
        if decision["op"] != "commit":
            reason = vote.get("error", decision.get("error"))
            raise SyncError(
                f"version {version} was not taken, {self._target.weight_version} is still served: "
                f"{reason}"
            )
        start = time.perf_counter()
        try:
            if served != version:
                if alias:
                    self._buffers.reverse()
                with committing(self._target):
                    check_commit(version, self._target.weight_version)
                    self._target.commit_weights(tensors, version=version, alias=alias)
                if alias and self._link.device.type == "cuda":
                    # What was served until now is written next.
                    torch.cuda.synchronize(self._link.device)
            self._link.send(0, {"seconds": time.perf_counter() - start})
        except PeerLostError:
            raise
        except Exception as error:  # whatever it was, the sender has to hear of it
            # Either buffer may be served in part now: neither is written again.
            self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
            self._link.send(0, {"error": f"{type(error).__name__}: {error}"})
            raise SyncError(f"version {version} was not committed: {error}") from error

    def _collect(self, inbox: Inbox, bucket_bytes: int, blocks: int) -> dict[str, Tensor]:
        """Everything up to the end; a fault is kept until then, to stay in step."""
        fault: SyncError | None = None
        under_way: deque[tuple[Any, int, Tensor | None]] = deque()
        while (message := self._link.receive(0))["op"] == "bucket":
            index, nbytes = message["index"], message["nbytes"]
            if not 0 <= nbytes <= bucket_bytes:
                raise PeerLostError(f"rank 0 sent nonsense: bucket {index} of {nbytes} bytes")
            taken: Tensor | None = None
            try:
                taken = None if fault else inbox.place(index, nbytes, message["pieces"])
            except SyncError as error:
                fault = error
            data = taken
            if data is None:
                data = torch.empty(nbytes, dtype=torch.uint8, device=self._link.device)
            if nbytes:
                under_way.append((self._link.broadcast(data), index, taken))
            elif taken is not None:  # tensors without elements, which have no bytes to wait for
                inbox.arrived(index, taken)
            if len(under_way) > 1:
                self._take(inbox, *under_way.popleft())
        sums = self._sums(message, blocks, under_way)
        while under_way:
            self._take(inbox, *under_way.popleft())
        if message["op"] != "sums" or (message := self._link.receive(0))["op"] != "end":
            raise _AbortedError(message.get("error", message["op"]))
        if fault:
            raise fault
        return inbox.check(sums)

    def _sums(self, message: dict[str, Any], blocks: int, under_way: deque[Any]) -> Tensor:
        """Where the sender's sums are on their way to, if they come."""
        sums = torch.empty(blocks, dtype=torch.int64, device=self._link.device)
        if message["op"] == "sums":
            if message["blocks"] != blocks:
                raise PeerLostError(f"rank 0 sent nonsense: {message} of {blocks} blocks")
            if blocks:
                under_way.append((self._link.broadcast(sums), -1, None))
        return sums

    def _take(self, inbox: Inbox, work: Any, index: int, data: Tensor | None) -> None:
        try:
            self._link.finish(work)
        except PeerLostError as error:
            where = "the sums" if index < 0 else f"bucket {index}"
            raise PeerLostError(f"{error}, in {where}") from error
        if data is not None:
            inbox.arrived(index, data)

    def _buffer(self, nbytes: int) -> Tensor:
        """Memory that is not served."""
        if self._buffers[0].numel() != nbytes:
            self._buffers[0] = torch.empty(nbytes, dtype=torch.uint8, device=self._link.device)
        return self._buffers[0]

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU, a stream of its own, so that the engine goes on meanwhile."""
        if self._link.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._link.device):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(self._stream):
                yield
            self._stream.synchronize()


class _AbortedError(SyncError):
    """The sender said that this version will not come."""


def _numbered(hello: dict[str, Any]) -> Specs:
    """What a receiver expects, in an order that is the same on all ranks."""
    return dict(sorted(specs_of(hello).items()))
