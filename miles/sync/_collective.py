"""The sending half of a push over a process group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from miles.errors import SyncError
from miles.sync._link import Link, PeerLostError
from miles.sync._outbox import Bucket, Outbox
from miles.sync._plan import check_version
from miles.sync._session import Specs

__all__ = ["Sender"]


class Sender:
    """Rank 0 of the group.

    Args:
        link: its end of the wire.
        bucket_bytes: most bytes in a broadcast.
    """

    def __init__(self, link: Link, bucket_bytes: int) -> None:
        self._link, self._bucket_bytes = link, bucket_bytes
        self._peers = range(1, link.size)
        self._outbox: Outbox | None = None
        self._works: list[Any] = []  # broadcasts under way, oldest first
        self._waited = 0.0
        self._at = ""
        self._expects: dict[int, dict[str, Any]] = {}  # what each receiver said last
        self._pushed: int | None = None
        self._lost = ""

    def open(self, version: int) -> dict[str, Any]:
        """Meet all receivers: what they expect, and whether there is anything to do."""
        if self._lost:
            raise SyncError(f"{self._lost}; make a new process group, and a syncer of it")
        self._at = ""
        try:
            self._tell({"op": "hello", "known": bool(self._expects)})
            hellos = {rank: self._link.receive(rank) for rank in self._peers}
            for rank, hello in hellos.items():
                if "tensors" not in hello and rank not in self._expects:
                    raise PeerLostError(f"rank {rank} sent nonsense: a hello without tensors", rank)
                self._expects[rank] = hello.get("tensors") or self._expects.get(rank, {})
            refusal = self._refusal(hellos, version)
            served = min(hello["version"] for hello in hellos.values())
            skip = bool(refusal) or served == version
            begin = {"op": "begin", "version": version, "bucket_bytes": self._bucket_bytes}
            self._tell({"op": "skip"} if skip else begin)
        except PeerLostError as error:
            raise self._give_up(error, version) from error
        if refusal:
            raise SyncError(refusal)
        return {"skip": skip, "served": served, "tensors": self._expects[1]}

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        specs: Specs,
        version: int,
        moved: Callable[[int], object],
    ) -> dict[str, Any]:
        """Stream, ask for votes, and commit or abort; the fields of a report.

        Args:
            weights: a collection, or a stream of whole tensors of these names and shapes.
            specs: what the receivers expect.
            version: of the weights.
            moved: is told how many bytes are under way, bucket by bucket.
        """
        start = time.perf_counter()
        try:
            number, sending = self._stream(weights, specs, version, moved)
            streamed = time.perf_counter()
            votes = {rank: self._link.receive(rank) for rank in self._peers}
        except PeerLostError as error:
            raise self._give_up(error, version) from error
        except Exception as error:  # whatever it is, receivers wait and are told
            self._abort(f"{type(error).__name__}: {error}")
            raise
        refused = {rank: vote["error"] for rank, vote in votes.items() if "error" in vote}
        if refused:
            self._abort("another receiver refused")
            raise SyncError(
                f"version {version} was not taken, the engines serve what they served: "
                + "; ".join(f"rank {rank}: {text}" for rank, text in refused.items())
            )
        voted = time.perf_counter()
        done = self._commit(version)
        num_bytes = self._outbox.num_bytes if self._outbox else 0
        commit = max(answer["seconds"] for answer in done.values())
        return {
            "num_tensors": len(specs),
            "num_bytes": num_bytes,
            "copied_bytes": num_bytes * (1 + len(self._peers)),
            "num_buckets": number,
            "phases": {
                "gather": streamed - start - sending,
                "send": sending,
                "load": voted - streamed,
                "commit": commit,
                "pause": commit,
            },
        }

    def interrupted(self) -> None:
        """A push was left anywhere, by Ctrl-C: which message would be next is unknown."""
        self._lost = self._lost or "a push was interrupted"
        self._link.abandon()

    def close(self) -> None:
        """Tell the receivers that no more will come."""
        self._outbox = None
        if not self._lost:
            self._lost = "this syncer is closed"
            with contextlib.suppress(PeerLostError):
                self._tell({"op": "close"})

    def _refusal(self, hellos: dict[int, dict[str, Any]], version: int) -> str:
        """Why this cannot be pushed to them; empty if it can."""
        for rank, hello in hellos.items():
            try:
                check_version(version, hello["version"])
            except SyncError as error:
                return f"rank {rank}: {error}"
            if self._pushed not in (None, hello["version"]):
                return (
                    f"rank {rank} serves version {hello['version']}; this trainer's last push was "
                    f"{self._pushed}, so another one syncs the same engine; expected one trainer"
                )
            mine, first = self._expects[rank], self._expects[1]
            for name in [*first, *mine] if mine != first else ():
                if mine.get(name) != first.get(name):
                    return (
                        f"rank {rank} expects {name} as {mine.get(name)}, rank 1 as "
                        f"{first.get(name)}; expected receivers of one model in one group"
                    )
        return ""

    def nbytes(self, specs: Specs) -> int:
        """Bytes that a version takes."""
        return self._prepared(specs).nbytes

    def _prepared(self, specs: Specs) -> Outbox:
        if self._outbox is None or self._outbox.specs != specs:
            self._outbox = Outbox(specs, self._bucket_bytes, self._link.device)
        return self._outbox

    def _stream(
        self,
        weights: Iterable[tuple[str, Tensor]],
        specs: Specs,
        version: int,
        moved: Callable[[int], object],
    ) -> tuple[int, float]:
        """Broadcast everything, and the sums; how many buckets, and the seconds of waiting."""
        outbox = self._prepared(specs)
        number, self._waited = 0, 0.0
        for bucket in outbox.fill(weights, version, lambda: self._settle(1)):
            self._send_bucket(bucket)
            moved(bucket.data.numel())
            number += 1
        begun = time.perf_counter()
        self._tell({"op": "sums", "blocks": outbox.sums.numel()})
        self._broadcast(outbox.sums)
        self._waited += time.perf_counter() - begun
        self._settle(0)
        self._tell({"op": "end"})
        return number, self._waited

    def _send_bucket(self, bucket: Bucket) -> None:
        begun = time.perf_counter()
        self._at = f", at bucket {bucket.index} (tensors {bucket.first} to {bucket.last})"
        nbytes = bucket.data.numel()
        self._tell({"op": "bucket", "index": bucket.index, "nbytes": nbytes,
                    "pieces": bucket.packed})  # fmt: skip
        self._broadcast(bucket.data)
        self._waited += time.perf_counter() - begun

    def _broadcast(self, data: Tensor) -> None:
        if data.numel():
            self._works.append(self._link.broadcast(data))

    def _settle(self, under_way: int) -> None:
        """Wait until at most so many broadcasts are under way."""
        begun = time.perf_counter()
        while len(self._works) > under_way:
            self._link.finish(self._works.pop(0))
        self._waited += time.perf_counter() - begun

    def _commit(self, version: int) -> dict[int, dict[str, Any]]:
        """All have voted for it: there is no way back for those that hear of it."""
        done: dict[int, dict[str, Any]] = {}
        failed: dict[int, str] = {}
        for rank in self._peers:
            try:
                self._link.send(rank, {"op": "commit"})
            except PeerLostError as error:
                failed[rank] = self._lost = str(error)
        for rank in [rank for rank in self._peers if rank not in failed]:
            try:
                answer = self._link.receive(rank)
                if "error" in answer:
                    failed[rank] = answer["error"]
                else:
                    done[rank] = answer
            except PeerLostError as error:
                failed[rank] = self._lost = str(error)
        self._pushed = None if failed else version
        if failed:
            raise SyncError(
                f"version {version} arrived everywhere; ranks {list(done)} serve it, but "
                + "; ".join(f"rank {rank} did not commit: {text}" for rank, text in failed.items())
                + "; push it again"
            )
        return done

    def _tell(self, message: dict[str, Any]) -> None:
        for rank in self._peers:
            self._link.send(rank, message)

    def _abort(self, reason: str) -> dict[int, str]:
        """Have everyone forget this version; those who cannot be reached, and why."""
        gone = {}
        try:
            self._settle(0)
        except PeerLostError as error:
            self._works.clear()
            self._lost = str(error)
            self._link.abandon()
        for rank in self._peers:
            try:
                self._link.send(rank, {"op": "abort", "error": reason})
            except PeerLostError as error:
                self._lost = str(error)
                gone[rank] = str(error)
        return gone

    def _give_up(self, error: PeerLostError, version: int) -> PeerLostError:
        """A rank is gone: tell the others, and say which one it was."""
        self._lost = str(error)
        gone = self._abort(str(error))
        if error.rank is not None:
            gone[error.rank] = str(error)  # the first reason says more than those that follow
        reasons = "; ".join(gone.values()) or str(error)
        return PeerLostError(
            f"version {version} was not pushed: {reasons}{self._at}; the engines that are left "
            "serve what they served; make a new process group without that rank, and push again"
        )
