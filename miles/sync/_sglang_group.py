"""The process group of a trainer and the ranks of SGLang servers."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import distributed_c10d

from miles.errors import SyncError
from miles.sync._sglang_client import Client
from miles.sync._sglang_payload import FlatBucket
from miles.sync._sglang_push import ended, on_all

__all__ = ["Broadcasts", "Group", "join", "listen"]

LEAVE_SECONDS = 20.0
"""How long the end of a group may take."""


class Broadcasts:
    """`via="distributed"`: buckets by broadcast, in a group with all servers while there is one.

    Args:
        clients: the servers.
        pool: for calls.
        master: this host's address as servers reach it, and a free port.
        backend: "nccl", or "gloo" on the CPU.
        timeout: seconds to wait for servers.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        pool: Executor,
        *,
        master: tuple[str, int],
        backend: str,
        timeout: float,
    ) -> None:
        self._clients, self._pool, self._master = clients, pool, master
        self._backend, self._timeout = backend, timeout
        self._group: Group | None = None

    def join(self) -> None:
        """Make the group, unless there is one; servers join when they are called.

        Raises:
            SyncError: a server did not join.
        """
        if self._group is not None:
            return
        address, port = self._master
        size = 1 + sum(client.tp_size for client in self._clients)
        where = f"{address}:{port}"
        try:
            # Before servers are called: they would wait in their scheduler for who never comes.
            store = listen(address, port, size=size, timeout=self._timeout)
        except (RuntimeError, ValueError) as error:
            raise _no_group(where, error) from error
        calls, offset = [], 1
        # A server may have one that a trainer before us left behind, and waits if told to end it.
        name = f"miles_weights_{uuid.uuid4().hex}"
        for client in self._clients:
            body = {
                "master_address": address, "master_port": port, "rank_offset": offset,
                "world_size": size, "group_name": name, "backend": self._backend,
            }  # fmt: skip
            calls.append(self._pool.submit(client.post, "/init_weights_update_group", body))
            offset += client.tp_size
        try:
            self._group = Group(
                store, size=size, name=name, backend=self._backend, timeout=self._timeout
            )
        except (RuntimeError, ValueError) as error:
            failed = [call.exception() for call in calls if call.done() and call.exception()]
            raise _no_group(where, failed[0] if failed else error) from error
        try:
            ended(calls, None)
        except BaseException:
            self.leave(by_force=True)
            raise

    def start(
        self, bucket: FlatBucket, to: Sequence[Client], choice: Callable[[Client], dict[str, Any]]
    ) -> Callable[[], None]:
        """Start to send a bucket; what ends it.

        Args:
            bucket: without gaps.
            to: all servers.
            choice: what else the call to a server says.
        """
        assert self._group is not None
        body: dict[str, Any] = {
            "names": [weight.name for weight in bucket.metadata],
            "dtypes": [str(weight.dtype).removeprefix("torch.") for weight in bucket.metadata],
            "shapes": [list(weight.shape) for weight in bucket.metadata],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        path = "/update_weights_from_distributed"
        calls = [self._pool.submit(client.post, path, body | choice(client)) for client in to]
        group, work = self._group, self._group.broadcast(bucket.flat)

        def finish() -> None:
            group.finish(work, calls)
            ended(calls, bucket)

        return finish

    def leave(self, *, by_force: bool = False) -> None:
        """Out of the group with all servers, since NCCL's end waits for all ranks, or by force."""
        if self._group is None:
            return
        group, self._group = self._group, None
        try:  # one that is gone would leave the others waiting
            by_force = by_force or not on_all(self._pool, Client.weight_version, self._clients)
        except SyncError:
            by_force = True
        calls = []
        if by_force:
            group.abandon()
        else:
            path, body = "/destroy_weights_update_group", {"group_name": group.name}
            calls = [self._pool.submit(client.post, path, body) for client in self._clients]
        group.close()
        wait(calls, LEAVE_SECONDS)


class Group:
    """Rank 0 of a group of its own, beside whatever groups the trainer has.

    Args:
        store: where its ranks meet.
        size: ranks of all servers, and this one.
        name: as given to the servers.
        backend: "nccl", or "gloo" on the CPU.
        timeout: seconds to wait for the servers.
    """

    def __init__(self, store: Store, *, size: int, name: str, backend: str, timeout: float) -> None:
        self.name = name
        self._timeout, self._lost = timeout, False
        self._group = join(store, size=size, name=name, backend=backend, timeout=timeout)

    def broadcast(self, flat: Tensor) -> Broadcast:
        """Start to send; see `finish`."""
        return Broadcast(self._group, flat)

    def finish(self, sent: Broadcast, calls: list[Any]) -> None:
        """Wait, as long as no call fails: a server that refuses never joins the broadcast.

        Args:
            sent: from `broadcast`.
            calls: futures of the HTTP calls, which answer after the broadcast unless they fail.
        """
        deadline = time.monotonic() + self._timeout
        while not sent.finished():
            failed = [call for call in calls if call.done() and call.exception()]
            if failed or time.monotonic() > deadline:
                self._lost = not sent.begun
                self.abandon()
                for call in failed:
                    call.result()
                raise SyncError(
                    f"a broadcast took more than {self._timeout:g} s; is every server up, does "
                    "NCCL find a way to it, and is NCCL_CUMEM_ENABLE the same on both sides? (A "
                    "server whose environment has none sets 0.)"
                )
            time.sleep(0.0005)

    def abandon(self) -> None:
        """End what is under way; the group is of no use any more."""
        if hasattr(self._group, "abort") and not self._lost:
            self._group.abort()

    def close(self) -> None:
        """Leave, which with NCCL ends when servers do, or after a while.

        Not where a thread still waits in the group for servers: that would wait too.
        """
        if not self._lost:
            ending = threading.Thread(target=_end, args=(self._group,), daemon=True)
            ending.start()
            ending.join(LEAVE_SECONDS)


class Broadcast:
    """One bucket on its way.

    It starts in a thread: with NCCL the first call of a group returns when all ranks have called,
    and a server that refuses never does.
    """

    def __init__(self, group: Any, flat: Tensor) -> None:
        self.begun = False
        """Whether all ranks have called."""
        self._sent: Any = None
        self._error: BaseException | None = None
        # Not the current one: who fills the next bucket waits for that, and servers may never come.
        # The bucket has been written.
        stream = torch.cuda.Stream(flat.device) if flat.is_cuda else None

        def start() -> None:
            try:
                with torch.cuda.stream(stream):
                    self._sent = _queued(group, flat)
            except BaseException as error:  # told by `finished`
                self._error = error
            self.begun = True

        threading.Thread(target=start, name="sglang-broadcast", daemon=True).start()

    def finished(self) -> bool:
        """Whether everybody has it."""
        if not self.begun:
            return False
        if self._error is not None:
            raise self._error
        on_gpu = isinstance(self._sent, torch.cuda.Event)
        return bool(self._sent.query() if on_gpu else self._sent.is_completed())


def _end(group: Any) -> None:
    with contextlib.suppress(RuntimeError):  # of a group that was broken off
        dist.destroy_process_group(group)


def _queued(group: Any, flat: Tensor) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
    work = group.broadcast([flat], options)
    if not flat.is_cuda:
        return work
    work.wait()  # on the device only
    event = torch.cuda.Event()
    event.record()
    return event


def _no_group(where: str, reason: BaseException | None) -> SyncError:
    return SyncError(
        f"no process group with the servers at {where}: {str(reason).splitlines()[0]}; expected a "
        "free port of this host, and an address by which servers reach it"
    )


def listen(address: str, port: int, *, size: int, timeout: float) -> Store:
    """Where ranks meet, on this host; nobody has to be there yet.

    Not by torch's `rendezvous`, which waits for all, and under torchrun does not listen at all.

    Raises:
        RuntimeError: the port is taken.
    """
    return TCPStore(
        address, port, size, is_master=True, timeout=timedelta(seconds=timeout),
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip


def join(store: Store, *, size: int, name: str, backend: str, timeout: float) -> Any:
    """A process group as SGLang makes it: apart from the default one, which need not exist."""
    limit = timedelta(seconds=timeout)
    named: Any = name
    group, _ = distributed_c10d._new_process_group_helper(
        size, 0, [], dist.Backend(backend), distributed_c10d.PrefixStore(name, store),
        group_name=named, timeout=limit,
    )  # fmt: skip
    # As for a group made by `new_group`; `destroy_process_group` wants it.
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group
