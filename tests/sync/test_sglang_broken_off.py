"""`SGLangSyncer` after a push that broke off: nobody lets half-written weights serve."""

import asyncio
import contextlib
import signal
import threading
import time

import pytest
import torch

from miles.errors import SyncError
from miles.rollout import SGLangEngine, Status
from miles.sync import sglang
from tests.rollout.test_sglang_engine import PROMPT, QUICK, params, until
from tests.sync.test_sglang import VERSIONS, Server, same, weights


def half_written(syncer, server):
    """Version 1, and a part of 2."""
    syncer.push(weights(1).items(), version=1)
    server.fail_at = f"update_weights_from_tensor {server.names().count(TENSOR) + 2}"
    with pytest.raises(SyncError, match="hold a part of it"):
        syncer.push(weights(2).items(), version=2)


TENSOR = "update_weights_from_tensor"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_retry_that_fails_early_leaves_them_held(syncer_for, version, again):
    with Server(version) as server:
        syncer = syncer_for(server)
        half_written(syncer, server)
        syncer = syncer_for(server) if again else syncer  # a trainer that was started again
        server.never_idle = True
        with pytest.raises(SyncError, match=rf"{server.url} hold a part of an earlier .* paused"):
            syncer.push(weights(2).items(), version=2)
        assert server.held and int(server.weight_version) < 0
        server.never_idle = False
        syncer.push(weights(2).items(), version=2)
        assert same(server.loaded, weights(2)) and not server.held


def test_a_server_that_cannot_be_emptied_releases_no_other_that_is_half_written(syncer_for):
    with Server("0.5.17") as half, Server("0.5.17") as whole:
        half_written(syncer_for(half), half)
        whole.never_idle = True
        with pytest.raises(SyncError, match=f"{half.url} hold a part of an .*any others serve"):
            syncer_for(half, whole).push(weights(2).items(), version=2)
        assert half.held and int(half.weight_version) < 0
        assert not whole.held and whole.weight_version == "0"


def test_one_that_was_started_again_since_tells_engines_to_wait(syncer_for):
    with Server("0.5.17") as server:
        syncer = syncer_for(server)
        half_written(syncer, server)
        server.stop()
        server.weight_version, server.loaded = "0", {}
        server.start()
        server.never_idle = True
        with pytest.raises(SyncError, match=r"hold a part .* a weight version below 0.* push"):
            syncer.push(weights(2).items(), version=2)
        assert server.held and int(server.weight_version) < 0
        server.never_idle = False
        with contextlib.closing(SGLangEngine(server.url, **QUICK)) as engine:
            assert not engine.servers[0].alive and "or one failed" in engine.servers[0].reason
            future = engine.submit(PROMPT, params(3))
            time.sleep(0.2)
            assert "/generate" not in server.calls and not future.done()
            syncer.push(weights(2).items(), version=2)
            assert future.result(20).weight_versions == [2]
        assert same(server.loaded, weights(2)) and not server.held


@contextlib.contextmanager
def held_in_place(version):
    """A server, an engine's request that is paused in place in there, and the engine."""
    with (
        Server(version, step_seconds=0.01) as server,
        contextlib.closing(SGLangEngine(server.url, **QUICK)) as engine,
    ):
        future = engine.submit(PROMPT, params(500))
        until(lambda: server._running and server._running[0].output)
        asyncio.run(engine.pause())
        yield server, engine, future


@pytest.mark.parametrize("version", VERSIONS)
def test_requests_that_are_held_in_place_end(syncer_for, version):
    with held_in_place(version) as (server, _, future):
        syncer_for(server, timeout=5).push(weights(1).items(), version=1)
        sample = future.result(5)
        assert sample.status is Status.ABORTED and sample.num_generated_tokens
        assert same(server.loaded, weights(1)) and not server.held


def test_on_half_written_weights_they_end_without_a_step(syncer_for):
    with held_in_place("0.5.17") as (server, _, future):
        (request,) = server._running
        tokens, server.weight_version = len(request.output), "-5"
        syncer_for(server, timeout=5).push(weights(1).items(), version=1)
        assert future.result(5).status is Status.ABORTED
        assert len(request.output) == tokens and same(server.loaded, weights(1))
        assert server.calls.count("/continue_generation") == 1  # when all is there


def test_an_engine_that_pauses_in_place_may_abort_then():
    with held_in_place("0.5.17") as (server, engine, future):
        engine.pause_mode = "abort"
        asyncio.run(asyncio.wait_for(engine.pause(), 5))
        assert future.result(5).status is Status.ABORTED
        asyncio.run(asyncio.wait_for(engine.resume(), 5))
        assert not server.held
        assert engine.submit(PROMPT, params(3)).result(5).num_generated_tokens == 3


class Sluggish(Server):
    """Takes its time with some call."""

    slow = ""
    seconds = 0.5

    async def update_weight_version(self, body):
        if self.slow == body["new_version"]:
            await asyncio.sleep(self.seconds)
        return await super().update_weight_version(body)


@contextlib.contextmanager
def ctrl_c(seconds):
    """Ctrl-C in a while."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_does_not_let_a_mark_overtake_the_version(syncer_for):
    with Sluggish("0.5.17") as server:
        syncer = syncer_for(server)
        syncer.push(weights(1).items(), version=1)
        server.slow = "2"
        with pytest.raises(KeyboardInterrupt), ctrl_c(0.3):
            syncer.push(weights(2).items(), version=2)
        time.sleep(0.5)
        assert int(server.weight_version) < 0 and server.held
        assert syncer.push(weights(2).items(), version=2).num_tensors == 5
        assert server.weight_version == "2" and not server.held


def test_a_push_with_nothing_to_do_lets_servers_go_on_that_the_last_one_held(
    syncer_for, monkeypatch
):
    with Server("0.5.17") as server:
        syncer = syncer_for(server)

        def interrupted(*arguments):  # Ctrl-C, and again when that was seen to
            raise KeyboardInterrupt

        monkeypatch.setattr(syncer, "_resume", interrupted)
        monkeypatch.setattr(syncer, "_after_failure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            syncer.push(weights(1).items(), version=1)
        monkeypatch.undo()
        assert server.weight_version == "1" and server.held
        for calls in (1, 0):
            before = server.calls.count("/continue_generation")
            assert syncer.push(weights(1).items(), version=1).num_tensors == 0
            assert server.calls.count("/continue_generation") == before + calls
        assert not server.held


class Hung(Server):
    """Answers nothing more when weights come."""

    def __init__(self, version):
        super().__init__(version)
        self.over, self.hangs = threading.Event(), False

    async def _hang(self):
        while self.hangs and not self.over.is_set():
            await asyncio.sleep(0.01)

    async def update_weights_from_tensor(self, body):
        self.hangs = True
        await self._hang()
        return await super().update_weights_from_tensor(body)

    async def end_weight_update(self, body):
        await self._hang()
        return await super().end_weight_update(body)

    async def update_weight_version(self, body):
        await self._hang()
        return await super().update_weight_version(body)


def test_a_server_that_hangs_is_waited_for_once(syncer_for, monkeypatch):
    monkeypatch.setattr(sglang, "AFTER_SECONDS", 0.1)
    with Hung("0.5.21") as server:
        syncer = syncer_for(server, timeout=1.5)
        start = time.monotonic()
        with pytest.raises(SyncError, match="hold a part of it"):
            syncer.push({"w": torch.ones(3)}.items(), version=1)
        seconds = time.monotonic() - start
        server.over.set()
        assert 1.5 <= seconds < 2.5
        patient = syncer._clients[0]._http.timeout
        assert patient.read == 1.5 and patient.connect == 1.5
