"""Requests of `SGLangEngine` that are aborted, cancelled or paused."""

import asyncio

import pytest

from miles.errors import EngineError, SettingError
from miles.rollout import (
    SGLangEngine,
    Status,
)
from tests.rollout.sglang_fake import FakeSGLang
from tests.rollout.test_sglang_engine import (
    PROMPT,
    QUICK,
    VERSIONS,
    expected,
    params,
    serving,
    until,
)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_abort_ends_one_request_and_a_group_ends_as_a_group(version):
    names = ["req-1", "req-10", "7/0", "7/1", "70/0"]
    with serving(version, step_seconds=0.01) as (fake, engine):

        async def rollout():
            tasks = {
                name: asyncio.create_task(engine.generate(PROMPT, params(60), request_id=name))
                for name in names
            }
            while len(fake.requests) < len(names):
                await asyncio.sleep(0.005)
            await engine.abort(["req-1", "7/"])
            return {name: await task for name, task in tasks.items()}

        status = {name: sample.status for name, sample in asyncio.run(rollout()).items()}
    assert [n for n in names if status[n] is Status.ABORTED] == ["req-1", "7/0", "7/1"]
    assert status["req-10"] is status["70/0"] is Status.TRUNCATED


@pytest.mark.parametrize("version", VERSIONS)
def test_aborts_at_any_moment_lose_nothing(version):
    """Aborts race with sending, waiting, running and finishing; every call returns a prefix."""
    with serving(version, step_seconds=0.002, max_running=20, engine={"max_in_flight": 60}) as (
        _, engine,
    ):  # fmt: skip

        async def rollout():
            tasks = [
                asyncio.create_task(engine.generate([3 + i % 9], params(25), request_id=f"{i}/"))
                for i in range(200)
            ]
            for i in range(0, 200, 7):
                await asyncio.sleep(0.003)
                await engine.abort([f"{i}/", f"{(i * 31) % 200}/"])
            await engine.abort()
            return await asyncio.wait_for(asyncio.gather(*tasks), 30)

        samples = asyncio.run(rollout())
        seen = {sample.status for sample in samples}
        assert Status.ABORTED in seen and seen <= {Status.ABORTED, Status.TRUNCATED}
        for i, sample in enumerate(samples):
            whole = expected([3 + i % 9], 25)[0]
            assert sample.tokens == whole[: len(sample.tokens)]
            assert (sample.status is Status.TRUNCATED) == (sample.tokens == whole)
        assert engine.num_in_flight == 0


def test_a_text_is_no_list_of_ids():
    refused = pytest.raises(SettingError, match=r"expected a list: \['7/'\]")
    with serving() as (_, engine), refused:
        asyncio.run(engine.abort("7/"))


def test_a_cancelled_call_is_aborted_at_the_server():
    with serving(step_seconds=0.01) as (fake, engine):

        async def rollout():
            task = asyncio.create_task(engine.generate(PROMPT, params(1000)))
            while not fake.requests:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(rollout())
        until(lambda: "/abort_request" in fake.calls and engine.num_in_flight == 0)


def test_an_abort_that_the_server_never_answers_returns_what_was_there():
    with serving(engine={"abort_timeout": 0.2}, step_seconds=0.01) as (fake, engine):
        fake.abort = lambda *a, **k: None

        async def rollout():
            task = asyncio.create_task(engine.generate(PROMPT, params(1000), request_id="a"))
            while not fake.requests:
                await asyncio.sleep(0.005)
            await engine.abort(["a"])
            return await asyncio.wait_for(task, 5)

        sample = asyncio.run(rollout())
        assert sample.status is Status.ABORTED and sample.tokens == PROMPT


def test_close_returns_what_there_is():
    fake = FakeSGLang(step_seconds=0.01).start()
    engine = SGLangEngine(fake.url, **QUICK)
    future = engine.submit(PROMPT, params(1000))
    until(lambda: fake.requests)
    engine.close()
    assert future.result(5).status is Status.ABORTED
    with pytest.raises(EngineError, match="closed"):
        engine.submit(PROMPT, params())
    engine.close()
    fake.stop()


def test_a_request_that_waits_at_a_paused_server_can_be_aborted():
    """Paused by someone else, so that the engine does not hold it back."""
    with serving() as (fake, engine):
        fake.held = True

        async def rollout():
            task = asyncio.create_task(engine.generate(PROMPT, params(5), request_id="a"))
            while not fake.requests:
                await asyncio.sleep(0.005)
            ending = asyncio.create_task(engine.abort(["a"]))
            await asyncio.sleep(0.1)
            fake.held = False
            await ending
            return await task

        sample = asyncio.run(rollout())
        assert sample.status is Status.ABORTED and sample.tokens == PROMPT


# Pausing.


@pytest.mark.parametrize("mode", ["in_place", "retract"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_pause_holds_everything_and_changes_nothing(version, mode):
    with serving(version, step_seconds=0.01, engine={"pause_mode": mode}) as (fake, engine):

        async def rollout():
            running = asyncio.create_task(engine.generate(PROMPT, params(30)))
            await asyncio.sleep(0.1)
            await engine.pause()
            late = asyncio.create_task(engine.generate([9], params(3)))
            ended = asyncio.create_task(engine.generate([8], params(3), request_id="ended"))
            await asyncio.sleep(0.2)
            assert not running.done() and len(fake.requests) == 1
            await engine.abort(["ended"])
            assert (await asyncio.wait_for(ended, 1)).tokens == [8]
            await engine.resume()
            return await running, await late

        running, late = asyncio.run(rollout())
        assert running.tokens == expected(PROMPT, 30)[0] and running.status is Status.TRUNCATED
        assert late.tokens == expected([9], 3)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_pause_by_abort_returns_partials(version):
    with serving(version, step_seconds=0.01) as (_, engine):

        async def rollout():
            task = asyncio.create_task(engine.generate(PROMPT, params(60)))
            await asyncio.sleep(0.1)
            engine.pause_mode = "abort"
            await engine.pause()
            part = await task
            again = asyncio.create_task(engine.generate(part, params(60)))
            await engine.resume()
            return part, await again

        part, whole = asyncio.run(rollout())
        assert part.status is Status.ABORTED and part.num_generated_tokens
        assert whole.tokens == expected(PROMPT, 60)[0]


def test_resume_without_a_pause_does_nothing():
    with serving() as (fake, engine):
        asyncio.run(engine.resume())
        assert "/continue_generation" not in fake.calls


# Sampling.
