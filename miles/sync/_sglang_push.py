"""The parts of a push to SGLang servers that don't talk to them, or only ask."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from miles.errors import SyncError
from miles.sync._buckets import whole
from miles.sync._plan import check_filled
from miles.sync._sglang_client import Client, LateError
from miles.sync._sglang_payload import FlatBucket, InPlace

__all__ = [
    "Model", "Queue", "Sent", "check_able", "check_together", "ended", "noted", "on_all",
    "pause_by", "stop",
]  # fmt: skip

T = TypeVar("T")
FLUSH_SECONDS = 30.0
"""How long aborted requests may take to leave a server."""
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
                self._sent.wait(self._under_way[0])
                self._under_way.popleft()
        except BaseException as error:
            if isinstance(error, Exception):  # Ctrl-C leaves it under way
                self._under_way.popleft()
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
        self.shapes: dict[str, torch.Size] = {}
        self.moved: Callable[[int], object] = lambda nbytes: None
        """Called with the bytes of each weight, for a bar."""

    def wait(self, finish: Callable[[], object]) -> None:
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
            # The server's dtype may be narrower. Half a unit in the last place is up to 2**-8 of a
            # number in bf16, and 2**-25 of float16's subnormal ones, below 2**-14.
            same = told.shape == wanted.shape
            if not same or not torch.allclose(told, wanted, rtol=2**-8, atol=2**-25):
                raise SyncError(f"{client.url} holds other values of {name} than were sent")


class Model:
    """Names and shapes of a syncer's first push, which all others have to have.

    Servers skip a name that they do not know, and keep what they had of one that does not come,
    without a word.
    """

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self.nbytes: int | None = None

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise `SyncError` for another name or shape."""
        if not self._shapes or self._shapes.get(name) == shape:
            return
        if name not in self._shapes:
            raise SyncError(f"{name} is unknown; {self._expected}")
        raise SyncError(
            f"{name} has shape {tuple(shape)}, and had {tuple(self._shapes[name])}; "
            f"{self._expected}"
        )

    def check_end(self, names: Iterable[str]) -> None:
        """Raise `SyncError` where these are not all."""
        if missing := sorted(self._shapes.keys() - set(names)):
            raise SyncError(f"missing weights {missing[:8]}; {self._expected}")

    def note(self, sent: Sent) -> None:
        """A whole push that went through."""
        if not self._shapes:
            self._shapes, self.nbytes = sent.shapes, sent.bytes

    @property
    def _expected(self) -> str:
        return (
            f"expected the {len(self._shapes)} names and shapes of this syncer's first push; make "
            "a new syncer for another model"
        )


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
        if selector == "draft" and not client.draft:
            raise SyncError(
                f"{client.url} has no draft model; expected a server that was started with "
                "--speculative-algorithm and --speculative-draft-model-path"
            )
        if selector == "draft" and not client.sessions:
            raise SyncError(
                f"{client.url} is older than 0.5.21, which cannot update a draft model alone; "
                "write the draft with export_draft, and start the server again with it"
            )
        if pause == "retract" and not client.sessions:
            raise SyncError(
                f"{client.url} is older than 0.5.21, which cannot forget cached prefixes of "
                "retracted requests; expected pause='abort'"
            )


def pause_by(client: Client, mode: str) -> None:
    """Pause a server, whoever paused it before.

    SGLang waits for the end of the requests that it aborts (0.5.17), and takes no
    /continue_generation meanwhile. Those that somebody has paused in place would never end: they
    run again for that, or, on weights that are not to run, are moved back to the queue, and end in
    there.
    """
    if mode == "abort" and client.mixed:
        client.post("/pause_generation", {"mode": "retract"})
    elif mode == "abort":
        client.post("/continue_generation")
    client.post("/pause_generation", {"mode": mode})


def stop(client: Client, pause: str | None) -> None:
    """Pause a server, unless it was, and empty it of cached prefixes.

    As good as after the update, since it is paused; one that cannot be emptied has not been touched
    yet. (The update's own flush_cache would kill it.)
    """
    try:
        if pause is not None:
            pause_by(client, pause)
    except LateError as error:
        raise SyncError(
            f"{error}. A server that was told by another client to abort requests which were "
            "paused in place waits for them for good, and has to be started again"
        ) from error
    try:
        client.post("/flush_cache", timeout=FLUSH_SECONDS)
    except SyncError as error:
        if pause is not None or isinstance(error, LateError):
            raise
        raise SyncError(
            f"{error}. Requests that were paused in place never end: if there are such, let them "
            "go on first (/continue_generation, an engine's resume()), or pause them with 'abort' "
            "or 'retract'"
        ) from error


def on_all(pool: Executor, call: Callable[[Client], T], clients: Iterable[Client]) -> list[T]:
    """Call all at once; every call ends before the first error is raised."""
    futures: list[Future[T]] = []
    try:
        for client in clients:
            futures.append(pool.submit(call, client))
        wait(futures)
    finally:
        wait(futures)  # after Ctrl-C too: what comes next is not to overtake them
    return [future.result() for future in futures]


def check_together(
    weights: Iterable[tuple[str, Tensor]],
    model: Model,
    verify: Sequence[str],
    check: Callable[[str, Tensor], None],
) -> None:
    """Raise `SyncError` for what would be found in the middle of weights that are all there.

    Args:
        weights: (name, tensor) pairs.
        model: which names and shapes are right.
        verify: names that have to be among them.
        check: raises for a tensor that cannot be sent.
    """
    names: set[str] = set()
    for name, tensor in weights:
        if name in names:
            raise SyncError(f"{name} came twice; expected each weight once")
        names.add(name)
        model.check(name, tensor.shape)
        check_filled(name, tensor)
        check(name, tensor)
    model.check_end(names)
    _check_verify(verify, names)


def noted(
    weights: Iterable[tuple[str, Tensor]], sent: Sent, verify: Sequence[str], model: Model
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights through, counted; of those to verify, keep the first rows.

    Raises:
        SyncError: they are not the model's, have no values, or lack one that `verify` names.
    """
    for name, tensor in weights:
        sent.shapes[name] = shape = tensor.shape
        model.check(name, shape)
        check_filled(name, tensor)
        sent.tensors += 1
        sent.bytes += tensor.nbytes
        sent.moved(tensor.nbytes)
        if name in verify:
            rows = whole(tensor.detach())[:ROWS]
            sent.rows[name] = rows.to("cpu", torch.float32, copy=True)  # a stream may write again
        yield name, tensor
    model.check_end(sent.shapes)
    _check_verify(verify, sent.rows)


def _check_verify(verify: Sequence[str], names: Collection[str]) -> None:
    if missing := set(verify).difference(names):
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
