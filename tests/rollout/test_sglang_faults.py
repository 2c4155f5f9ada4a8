"""`SGLangEngine` when a pause, an update or an end meets a server that does not do its part."""

import asyncio
import contextlib
import time

import pytest

from miles.errors import EngineError
from miles.rollout import SamplingParams, SGLangEngine, Span, Status
from tests.rollout.sglang_fake import FakeSGLang, Refusal
from tests.rollout.test_sglang_engine import PROMPT, QUICK, expected, params, until

SELDOM = {"recheck_seconds": 1000.0}


class Slow(FakeSGLang):
    """Takes its time to say what it is, and to abort; may refuse to pause."""

    info_seconds = abort_seconds = pause_seconds = 0.0
    refuses = False

    async def server_info(self, body):
        await asyncio.sleep(self.info_seconds)
        return await super().server_info(body)

    async def abort_request(self, body):
        await asyncio.sleep(self.abort_seconds)
        return await super().abort_request(body)

    async def pause_generation(self, body):
        await asyncio.sleep(self.pause_seconds)
        if self.refuses:
            raise Refusal(500, {"error": "it cannot"})
        return await super().pause_generation(body)

    async def continue_generation(self, body):
        if self.refuses:
            raise Refusal(500, {"error": "it cannot"})
        return await super().continue_generation(body)


@contextlib.contextmanager
def one(*, engine=(), **settings):
    with (
        Slow(**settings) as fake,
        contextlib.closing(SGLangEngine(fake.url, **QUICK | dict(engine))) as made,
    ):
        yield fake, made


@contextlib.contextmanager
def two(*, engine=(), **settings):
    with (
        Slow(**settings) as first,
        Slow(**settings) as other,
        contextlib.closing(SGLangEngine([first.url, other.url], **QUICK | dict(engine))) as made,
    ):
        yield first, other, made


def states(engine):
    return [server.alive for server in engine.servers]


def lose(engine, fake) -> None:
    """Let a server be gone for long enough to be taken out."""
    fake.stop()
    asyncio.run(engine.refresh())
    fake.start()
    assert not engine.servers[-1].alive


def test_a_resume_that_fails_can_be_tried_again_and_never_locks_requests_out():
    with one() as (fake, engine):
        asyncio.run(engine.pause())
        fake.refuses = True
        with pytest.raises(EngineError, match="it cannot"):
            asyncio.run(engine.resume())
        future = engine.submit(PROMPT, params(4))
        fake.refuses, fake.weight_version = False, "step-7"
        with pytest.raises(EngineError, match="step-7"):  # it runs, and its weights are unknown
            asyncio.run(engine.resume())
        with pytest.raises(EngineError, match="step-7"):
            future.result(20)
        fake.weight_version = "1"
        asyncio.run(engine.refresh())
        assert engine.submit(PROMPT, params(4)).result(20).weight_versions == [1]


def test_a_pause_reaches_a_server_that_is_coming_back_and_so_does_its_end():
    with two(engine=SELDOM) as (_, other, engine):

        async def while_it_comes_back(act):
            back = asyncio.ensure_future(engine.readmit(other.url))
            await asyncio.sleep(0.2)
            await act()
            await back

        other.info_seconds = 0.5
        lose(engine, other)
        asyncio.run(while_it_comes_back(engine.pause))
        assert states(engine) == [True, True] and other.held
        lose(engine, other)
        other.held = other._engine_paused = True
        asyncio.run(while_it_comes_back(engine.resume))
        assert states(engine) == [True, True] and not other.held
        lose(engine, other)
        other.info_seconds, other.pause_seconds = 0.0, 0.5
        asyncio.run(engine.pause())
        asyncio.run(while_it_comes_back(engine.resume))
        assert states(engine) == [True, True] and not other.held


def test_nothing_is_sent_after_a_pause_even_by_one_that_was_looking_for_a_server():
    with one(engine=SELDOM) as (fake, engine):
        lose(engine, fake)
        fake.info_seconds = 0.5
        future = engine.submit(PROMPT, params(4))
        until(lambda: fake.calls.count("/server_info") >= 2)
        asyncio.run(engine.pause())
        until(lambda: states(engine) == [True])
        time.sleep(0.2)
        assert not fake.requests
        asyncio.run(engine.resume())
        assert future.result(20).tokens == expected(PROMPT, 4)[0]


def test_a_pause_that_fails_leaves_nobody_paused():
    with two() as (first, other, engine):
        first.refuses, other.pause_seconds = True, 0.3
        with pytest.raises(EngineError, match="it cannot"):
            asyncio.run(engine.pause())
        time.sleep(0.5)  # a pause that its end had overtaken would take hold now
        assert not other.held and "/continue_generation" in other.calls


@pytest.mark.parametrize("mode", ["in_place", "abort"])
def test_a_pause_that_is_cancelled_leaves_nobody_paused(mode):
    with two(engine={"pause_mode": mode}) as (first, other, engine):
        other.pause_seconds = 0.5

        async def rollout():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.pause(), 0.2)
            work = [engine.generate([3, i], params(4)) for i in range(4)]
            samples = await asyncio.wait_for(asyncio.gather(*work), 10)
            other.pause_seconds = 0.0
            await engine.pause()  # one that is not is as ever
            late = asyncio.create_task(engine.generate([9], params(3)))
            await asyncio.sleep(0.1)
            assert first.held and other.held and not late.done()
            await engine.resume()
            return samples, await asyncio.wait_for(late, 10)

        samples, late = asyncio.run(rollout())
        assert [s.tokens for s in samples] == [expected([3, i], 4)[0] for i in range(4)]
        assert late.num_generated_tokens == 3 and not first.held and not other.held


def test_after_close_every_call_has_ended_and_new_ones_say_so():
    with one(step_seconds=0.05) as (fake, engine):
        fake.abort_seconds = fake.pause_seconds = 20.0
        request = engine.submit(PROMPT, SamplingParams(max_new_tokens=4000))
        until(lambda: fake.requests)
        pause = engine._start(engine._calls.pause("in_place"))
        waits = engine.submit(PROMPT, params(4))
        until(lambda: "/pause_generation" in fake.calls)
        engine.close()
        for future in (request, waits):
            assert future.result(0).status is Status.ABORTED
        with pytest.raises(EngineError, match="was closed before"):
            pause.result(0)
        for act in (engine.abort, engine.pause, engine.resume, engine.refresh):
            with pytest.raises(EngineError, match="the engine is closed"):
                asyncio.run(act())


def test_a_callback_may_close_the_engine():
    with one() as (_, engine):
        future = engine.submit(PROMPT, params(4))
        future.add_done_callback(lambda _: engine.close())
        assert future.result(20).tokens == expected(PROMPT, 4)[0]
        until(lambda: not engine._thread.is_alive())


def test_one_server_with_newer_weights_takes_no_other_out():
    with two(weight_version="1") as (_, other, engine):
        lose(engine, other)
        other.weight_version = "99"
        until(lambda: "version 99; expected 1, as the servers" in engine.servers[1].reason)
        with pytest.raises(EngineError, match="version 99; expected 1"):
            asyncio.run(engine.readmit(other.url))
        assert asyncio.run(engine.refresh()) == 1 and states(engine) == [True, False]


def test_a_server_that_falls_behind_while_it_is_told_of_a_pause_stays_out():
    with two(engine=SELDOM) as (first, other, engine):

        async def push_meanwhile():
            await engine.pause()
            back = asyncio.ensure_future(engine.readmit(other.url))
            while "/pause_generation" not in other.calls:
                await asyncio.sleep(0.005)
            first.weight_version = "5"
            assert await engine.refresh() == 5
            with pytest.raises(EngineError, match="version 0; expected 5; push them to it"):
                await back

        lose(engine, other)
        other.calls.clear()
        other.pause_seconds = 0.5
        asyncio.run(push_meanwhile())
        assert states(engine) == [True, False] and engine.weight_version == 5


def test_a_server_that_holds_requests_in_place_comes_back_to_a_pause_that_aborts():
    with two(engine=SELDOM | {"pause_mode": "abort"}, step_seconds=0.01) as (_, other, engine):
        lose(engine, other)
        with contextlib.closing(SGLangEngine(other.url, **QUICK)) as another:
            future = another.submit(PROMPT, params(500))
            until(lambda: other._running and other._running[0].output)
            asyncio.run(another.pause())
            asyncio.run(engine.pause())
            asyncio.run(asyncio.wait_for(engine.readmit(other.url), 5))
            assert states(engine) == [True, True] and other.held
            assert future.result(5).status is Status.ABORTED


def test_with_no_other_server_newer_weights_are_welcome():
    with one(weight_version="1") as (fake, engine):
        lose(engine, fake)
        fake.weight_version = "2"
        until(lambda: states(engine) == [True])
        assert engine.weight_version == 2


@pytest.mark.parametrize("version", ["0.5.17", "0.5.21"])
def test_the_mark_of_an_update_is_no_version(version):
    class Marked(FakeSGLang):
        @property
        def _number(self):
            return int(self.weight_version)

    with (
        Marked(version, step_seconds=0.02, weight_version="4") as fake,
        contextlib.closing(SGLangEngine(fake.url, **QUICK, retries=1)) as engine,
    ):
        future = engine.submit([3, 4], params(400), request_id="a")
        until(lambda: fake._running and fake._running[0].output)
        fake.weight_version = "-1"
        time.sleep(0.1)
        asyncio.run(engine.abort(["a"]))
        sample = future.result(20)
        assert sample.spans == [Span(2, len(sample.tokens), 4)] and engine.weight_version == 4
        assert "weight_versions_mixed" not in sample.metadata


def test_a_server_under_an_update_is_waited_for():
    with one(step_seconds=0.01, weight_version="4", engine={"retries": 1}) as (fake, engine):
        future = engine.submit(PROMPT, params(40))
        until(lambda: fake.requests)
        fake.weight_version = "-1"
        fake.cut()
        until(lambda: "an update is under way" in engine.servers[0].reason)
        late = engine.submit(PROMPT, params(4))
        time.sleep(1.0)  # many times what two tries take
        assert not future.done() and not late.done()
        with pytest.raises(EngineError, match="an update is under way"):
            asyncio.run(engine.readmit(fake.url))
        fake.weight_version = "5"
        assert future.result(20).weight_versions == late.result(20).weight_versions == [5]
        assert future.result().metadata["retries"] == 1 and "retries" not in late.result().metadata
        fake.weight_version = "-1"
        with contextlib.closing(SGLangEngine(fake.url, **QUICK)) as another:
            assert asyncio.run(engine.refresh()) == 5
            assert states(engine) == states(another) == [False]


def test_an_abort_with_a_wrong_key_says_so_and_ends_nothing():
    with one(admin_api_key="k", step_seconds=0.01) as (fake, engine):
        future = engine.submit(PROMPT, params(60), request_id="a")
        until(lambda: fake.requests)
        with pytest.raises(EngineError, match="admin_api_key"):
            asyncio.run(engine.abort(["a"]))
        assert future.result(20).tokens == expected(PROMPT, 60)[0]
        last = engine.submit(PROMPT, params(4000), request_id="b")
        until(lambda: len(fake.requests) == 2)
        engine.close()
        assert last.result(0).status is Status.ABORTED
