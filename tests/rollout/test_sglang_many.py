"""`SGLangEngine` over several servers, of which some die."""

import asyncio
import contextlib
import os
import signal

import pytest

from miles.errors import EngineDiedError, EngineError, SettingError
from miles.rollout import SamplingParams, SGLangEngine, SGLangServer, Status
from tests.rollout.sglang_fake import FakeSGLang
from tests.rollout.test_sglang_engine import PROMPT, QUICK, expected, params, until

FAKE = "tests.rollout.sglang_fake"


@contextlib.contextmanager
def one(*, engine=(), **settings):
    with (
        FakeSGLang(**settings) as fake,
        contextlib.closing(SGLangEngine(fake.url, **QUICK | dict(engine))) as made,
    ):
        yield fake, made


@contextlib.contextmanager
def two(*, engine=(), **settings):
    with (
        FakeSGLang(**settings) as first,
        FakeSGLang(**settings) as other,
        contextlib.closing(SGLangEngine([first.url, other.url], **QUICK | dict(engine))) as made,
    ):
        yield first, other, made


def generate(engine, prompts, count=4):
    async def rollout():
        return await asyncio.gather(*(engine.generate(p, params(count)) for p in prompts))

    return asyncio.run(rollout())


def states(engine):
    return [server.alive for server in engine.servers]


def test_prompts_take_turns_and_a_group_stays_together():
    prompts = [[3, 4, 5 + i // 4] for i in range(40)]
    with two() as (first, other, engine):
        samples = generate(engine, prompts)
        assert [s.tokens for s in samples] == [expected(p, 4)[0] for p in prompts]
        homes = [{tuple(r["input_ids"]) for r in fake.requests} for fake in (first, other)]
        assert not homes[0] & homes[1] and len(homes[0]) == len(homes[1]) == 5


def test_a_longer_prompt_goes_where_most_of_it_is_but_a_system_prompt_binds_nobody():
    prompt = [3 + i % 20 for i in range(600)]
    with two(context_length=8192) as (first, other, engine):
        generate(engine, [prompt])
        generate(engine, [prompt + [4] * 300])
        assert len(first.requests) == 2 and not other.requests
        generate(engine, [[5] * 128 + [i] * 400 for i in range(3, 7)])
        assert len(first.requests) == 4 and len(other.requests) == 2


@pytest.mark.parametrize("prompts", ["a long beginning in common", "one"])
def test_a_server_that_is_much_busier_than_another_gets_no_more(prompts):
    own = 1 if prompts == "one" else 30
    with two(context_length=8192, step_seconds=0.05) as (first, other, engine):
        for _ in range(2):
            samples = generate(engine, [[5] * 130 + [i % own] * 60 for i in range(90)])
        assert all(sample.num_generated_tokens == 4 for sample in samples)
        assert min(len(first.requests), len(other.requests)) > 2 * 30


def test_a_group_stays_together_where_nothing_else_runs():
    with two(step_seconds=0.05) as (first, other, engine):
        generate(engine, [PROMPT] * 16)
        assert len(first.requests) == 16 and not other.requests


def test_a_resumed_sample_goes_back_to_its_server():
    with two() as (first, other, engine):
        parts = generate(engine, [[3, i] for i in range(3, 9)])
        for part in parts:
            part.status = Status.ABORTED
        generate(engine, parts, 6)
        for fake in (first, other):
            assert len(fake.requests) == 6
            assert {tuple(r["input_ids"][:2]) for r in fake.requests[:3]} == {
                tuple(r["input_ids"][:2]) for r in fake.requests[3:]
            }


def test_requests_of_a_dead_server_are_answered_by_another():
    with two(step_seconds=0.01) as (first, other, engine):
        futures = [engine.submit([3, i], params(30)) for i in range(3, 23)]
        until(lambda: first.requests and other.requests)
        first.stop()
        samples = [future.result(30) for future in futures]
        for i, sample in enumerate(samples, start=3):
            assert sample.tokens == expected([3, i], 30)[0]
            assert sample.status is Status.TRUNCATED
        moved = [s for s in samples if s.metadata.get("retries")]
        assert moved and all(s.metadata["server"] == other.url for s in moved)
        assert states(engine) == [False, True]
        assert first.url in engine.servers[0].reason


def test_a_server_killed_in_the_middle_of_everything(tmp_path):
    settings = {"module": FAKE, "args": ["--step-seconds", "0.01"], "log": tmp_path / "server.log"}
    with (
        pytest.warns(UserWarning, match="had ended before it was stopped"),
        SGLangServer("m", **settings) as mortal,
        FakeSGLang(step_seconds=0.01) as other,
        contextlib.closing(SGLangEngine([mortal.url, other.url], **QUICK)) as engine,
    ):
        futures = [engine.submit([3, i % 30], params(30)) for i in range(100)]
        until(lambda: len(other.requests) > 10)
        os.killpg(mortal.pid, signal.SIGKILL)
        samples = [future.result(30) for future in futures]
        for i, sample in enumerate(samples):
            assert sample.tokens == expected([3, i % 30], 30)[0]


def test_with_nobody_left_the_error_says_so_and_the_engine_recovers():
    with one(step_seconds=0.01, engine={"retries": 2}) as (fake, engine):
        future = engine.submit(PROMPT, params(200))
        until(lambda: fake.requests)
        fake.stop()
        with pytest.raises(EngineDiedError, match=r"no server is left.*no sample was changed"):
            future.result(20)
        fake.start()
        until(lambda: states(engine) == [True])
        assert generate(engine, [PROMPT])[0].tokens == expected(PROMPT, 4)[0]


def test_a_server_comes_back_only_with_the_current_weights():
    with two(engine={"recheck_seconds": 1000.0}) as (first, other, engine):
        first.stop()
        generate(engine, [[3, i] for i in range(3, 9)])
        assert states(engine) == [False, True]
        with pytest.raises(EngineDiedError, match="no SGLang server answers"):
            asyncio.run(engine.readmit(first.url))
        other.weight_version = "5"
        assert asyncio.run(engine.refresh()) == 5
        first.start()
        with pytest.raises(EngineError, match="weights of version 0; expected 5; push them to it"):
            asyncio.run(engine.readmit(first.url))
        assert states(engine) == [False, True]
        first.weight_version = "5"
        asyncio.run(engine.readmit(first.url))
        asyncio.run(engine.readmit(first.url))
        assert states(engine) == [True, True] and engine.servers[0].reason == ""
        with pytest.raises(SettingError, match="no server of this engine"):
            asyncio.run(engine.readmit("http://127.0.0.1:9"))


def test_it_comes_back_by_itself():
    with two() as (first, other, engine):
        first.stop()
        generate(engine, [[3, i] for i in range(3, 9)])
        other.weight_version = "5"
        asyncio.run(engine.refresh())
        first.start()
        until(lambda: "weights of version 0" in engine.servers[0].reason)
        first.weight_version = "5"
        until(lambda: states(engine) == [True, True])
        versions = generate(engine, [[3, i] for i in range(9, 15)])
        assert {v for s in versions for v in s.weight_versions} == {5}
        assert first.requests


def test_a_server_that_is_behind_waits_until_it_has_the_newest():
    with two() as (first, other, engine):
        other.weight_version = "2"
        asyncio.run(engine.refresh())
        assert states(engine) == [False, True] and engine.weight_version == 2
        assert {s.weight_versions[0] for s in generate(engine, [[3, i] for i in range(4)])} == {2}
        assert not first.requests
        first.weight_version = "2"
        until(lambda: states(engine) == [True, True])


def test_weights_never_go_back():
    with one(weight_version="5", engine={"retries": 1}) as (fake, engine):
        fake.weight_version = "3"  # it was restarted, say
        asyncio.run(engine.refresh())
        assert engine.weight_version == 5 and states(engine) == [False]
        with pytest.raises(EngineDiedError, match="weights of version 3; expected 5"):
            asyncio.run(engine.generate(PROMPT, params()))


def test_a_server_that_was_started_again_between_two_requests_gets_no_third():
    quick = {"retries": 1, "recheck_seconds": 1000.0}
    for version in ("0.5.17", "0.5.21"):
        with two(version=version, weight_version="5", engine=quick) as (first, _, engine):
            first.stop()
            first.weight_version = "0"
            first.start()
            samples = [generate(engine, [[3, i]])[0] for i in range(3, 9)]
            assert [s.weight_versions for s in samples].count([0]) == 1
            assert states(engine) == [False, True] and engine.servers[0].weight_version == 0
            assert "weights of version 0; expected 5" in engine.servers[0].reason
            first.weight_version = "5"
            asyncio.run(engine.refresh())
            assert states(engine) == [True, True]
    with one(weight_version="5", engine=quick) as (fake, engine):
        fake.weight_version = "0"
        assert generate(engine, [PROMPT])[0].weight_versions == [0]
        with pytest.raises(EngineDiedError, match="weights of version 0; expected 5"):
            generate(engine, [PROMPT])


def test_a_server_that_comes_back_into_a_pause_is_paused():
    with two() as (first, _, engine):
        asyncio.run(engine.pause())
        first.stop()
        asyncio.run(engine.refresh())
        assert states(engine) == [False, True]
        first.calls.clear()
        first.start()
        until(lambda: states(engine) == [True, True])
        assert "/pause_generation" in first.calls
        asyncio.run(engine.resume())
        assert generate(engine, [[3, i] for i in range(4)])
        assert {"/continue_generation", "/generate"} <= set(first.calls)


def test_a_connection_that_breaks_at_a_living_server_is_asked_again_and_the_first_is_aborted():
    with one(step_seconds=0.01) as (fake, engine):
        future = engine.submit(PROMPT, SamplingParams(max_new_tokens=40))
        until(lambda: fake.requests)
        fake.cut()
        sample = future.result(20)
        assert sample.tokens == expected(PROMPT, 40)[0] and sample.metadata["retries"] == 1
        assert "/abort_request" in fake.calls
        assert len({body["rid"] for body in fake.requests}) == 2
