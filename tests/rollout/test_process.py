import asyncio
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from miles.errors import (
    EngineDiedError,
    EngineError,
    MilesError,
    MissingExtraError,
    PromptTooLongError,
    SettingError,
    StopTokenError,
)
from miles.moe import RoutingTape
from miles.rollout import EngineProcess, RolloutEngine, Sample, Span, Status, _wire, process
from tests.models import broken_engine, generate_all, make_engine, params

PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5], [5, 6, 7], [2, 2], [8]]
WANTED = [params(6 + i, seed=i) for i in range(len(PROMPTS))]
LONG = params(60, seed=4)


@pytest.fixture(scope="module")
def child():
    process = EngineProcess(make_engine, "qwen3_moe", 0.02)
    yield process
    process.close()


@pytest.fixture
def engine(child):
    """Slow enough to be caught in the middle; started again only after a test that ended it."""
    if not child.alive:
        child.restart()
    return child


@pytest.fixture(scope="module")
def inside():
    local = make_engine("qwen3_moe")
    yield local
    local.close()


def fields(sample: Sample) -> tuple:
    ours = {k: v for k, v in sample.metadata.items() if k != "request_id"}
    logprobs = sample.rollout_logprobs[sample.num_prompt_tokens :]
    return sample.tokens, logprobs, sample.loss_mask, sample.spans, sample.status, ours


def test_samples_are_those_of_the_engine_inside(engine, inside):
    assert isinstance(engine, RolloutEngine)
    got = generate_all(engine, PROMPTS, WANTED)
    expected = generate_all(inside, PROMPTS, WANTED)
    assert [fields(s) for s in got] == [fields(s) for s in expected]
    assert [s.routing for s in got] == [s.routing for s in expected]
    assert got[0].routing is not None and got[0].weight_versions == [3]


def test_a_sample_to_resume_survives_the_wire_both_ways(engine, inside):
    whole = generate_all(inside, PROMPTS[:1], LONG)[0]
    part = Sample(
        tokens=whole.tokens[:9],
        loss_mask=[False] * 3 + [True] * 6,
        rollout_logprobs=whole.rollout_logprobs[:9],
        reward=0.25,
        status=Status.ABORTED,
        spans=[Span(3, 5, 1), Span(5, 9, 2)],
        routing=whole.routing[:8],
        metadata={"answer": [1, {"a": "b"}], "group": 7},
    )
    resumed = generate_all(engine, [part], LONG)[0]
    assert resumed.tokens == whole.tokens and resumed.routing[:8] == part.routing
    assert resumed.spans == [Span(3, 5, 1), Span(5, 9, 2), Span(9, 63, 3)]
    assert resumed.reward == 0.25
    assert resumed.metadata["answer"] == [1, {"a": "b"}] and resumed.metadata["group"] == 7


def bad_requests():
    yield PromptTooLongError, "64 tokens", [5] * 64, params(1)
    yield StopTokenError, "40", [5], params(1, stop_token_ids=(40,))
    yield SettingError, "-3", [-3], params(1)


@pytest.mark.parametrize(("error", "text", "prompt", "wanted"), list(bad_requests()))
def test_errors_keep_their_class_and_text(engine, error, text, prompt, wanted):
    with pytest.raises(error, match=text) as caught:
        generate_all(engine, [prompt], wanted)
    assert type(caught.value) is error


def test_metadata_stays_here_whatever_it_holds(engine):
    mine = object()
    sample = generate_all(
        engine, [Sample(tokens=[5], metadata={"mine": mine, "pair": (1, 2)})], WANTED[0]
    )[0]
    assert sample.metadata["mine"] is mine and sample.metadata["pair"] == (1, 2)
    assert sample.metadata["finish_reason"] == "length"


def test_abort_pause_and_resume_reach_the_child(engine):
    async def main() -> list[Sample]:
        names = ["first", "second"]
        tasks = [
            asyncio.create_task(engine.generate([5, 6], LONG, request_id=name)) for name in names
        ]
        await asyncio.sleep(0.2)
        await engine.abort(["first"])
        aborted = await tasks[0]
        await engine.pause()
        await asyncio.sleep(1.5)  # it would be done by now
        assert not tasks[1].done()
        await engine.resume()
        last = asyncio.create_task(engine.generate([5, 6], LONG))
        samples = [aborted, await tasks[1]]
        await engine.abort()
        return [*samples, await last]

    first, second, last = asyncio.run(main())
    assert first.status is last.status is Status.ABORTED
    assert second.status is Status.TRUNCATED and len(second.tokens) == 62
    assert second.tokens[: len(first.tokens)] == first.tokens


def test_a_cancelled_call_is_aborted_in_the_child_and_leaves_the_others_alone(engine, monkeypatch):
    sent = []
    monkeypatch.setattr(engine, "_call", lambda message: sent.append(message) or call(message))
    call = EngineProcess._call.__get__(engine)

    async def main() -> Sample:
        task = asyncio.create_task(engine.generate([5], LONG))
        await asyncio.sleep(0.1)
        task.cancel()
        return await engine.generate([5], params(3))

    assert len(asyncio.run(main()).tokens) == 4
    abort = next(message for message in sent if message.op == "abort")
    assert abort.request_ids == [sent[0].request_id]


def test_a_child_that_is_closed_hands_over_what_it_has(engine, monkeypatch):
    decode = _wire.decode
    monkeypatch.setattr(_wire, "decode", lambda data: time.sleep(2.0) or decode(data))

    async def main() -> list[Sample]:
        calls = [asyncio.create_task(engine.generate([5, 6], LONG)) for _ in range(3)]
        await asyncio.sleep(0.3)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*calls)

    for sample in asyncio.run(main()):
        assert sample.status is Status.ABORTED and 2 < len(sample.tokens) < 62
    assert engine._process.exitcode == 0


def test_a_text_is_no_list_of_ids(engine):
    with pytest.raises(SettingError, match=r"expected a list: \['r1'\]"):
        asyncio.run(engine.abort("r1"))


def test_a_child_that_has_ended_runs_for_no_thread():
    context, before = multiprocessing.get_context("fork"), sys.getswitchinterval()

    def ended(child):
        process._join(child)
        return child.exitcode

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            child = context.Process(target=time.sleep, args=(0.03,))
            child.start()
            with ThreadPoolExecutor(6) as pool:
                assert set(pool.map(ended, [child] * 6)) == {0}
    finally:
        sys.setswitchinterval(before)


def test_a_killed_child_fails_all_that_wait_and_a_restart_serves_again(engine):
    before = generate_all(engine, PROMPTS, WANTED)
    pid = engine.pid

    async def main() -> list:
        await engine.abort()  # what earlier tests left behind
        calls = [asyncio.create_task(engine.generate([5], LONG)) for _ in range(6)]
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(main())
    assert [type(error) for error in errors] == [EngineDiedError] * 6
    assert f"process {pid} ended with exit code -9; 6 calls" in str(errors[0])
    assert not engine.alive
    with pytest.raises(EngineDiedError, match=r"restart\(\)"):
        generate_all(engine, [[5]], LONG)
    with pytest.raises(EngineDiedError):
        _ = engine.weight_version
    engine.restart()
    assert engine.alive and engine.pid != pid and engine.weight_version == 3
    again = generate_all(engine, PROMPTS, WANTED)
    assert [fields(s) for s in again] == [fields(s) for s in before]


def test_a_child_that_no_longer_reads_is_closed_all_the_same(engine, monkeypatch):
    """The last that needs the child, which it ends."""
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.2)
    os.kill(engine.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(asyncio.run, engine.generate([5] * 200_000, LONG))  # fills the pipe
        while not engine._lock.locked():
            time.sleep(0.01)
        engine.close()
        with pytest.raises(EngineDiedError):
            call.result(60)
    assert not engine.alive


def test_a_factory_that_fails_says_why():
    with pytest.raises(EngineError, match=r"(?s)did not start.*Traceback.*no such checkpoint"):
        EngineProcess(broken_engine)


def test_a_child_that_is_not_ready_in_time_is_an_error():
    with pytest.raises(EngineError, match=r"no answer within 0\.01 s"):
        EngineProcess(make_engine, start_timeout=0.01)


def test_every_error_class_comes_back_as_itself():
    for kind in MilesError.__subclasses__():
        if kind is MissingExtraError:
            continue
        back = _wire.error_from_wire(_wire.error_to_wire(kind("why")))
        assert type(back) is kind and str(back) == "why"
    foreign = _wire.error_from_wire(_wire.error_to_wire(KeyError("x")))
    assert type(foreign) is EngineError and str(foreign) == "KeyError: 'x'"
    missing = _wire.error_from_wire(_wire.error_to_wire(MissingExtraError("msgspec", "hf")))
    assert type(missing) is EngineError and "pip install" in str(missing)


def test_a_tape_with_holes_survives_the_wire():
    ids = torch.tensor([[[299, 0]], [[-1, -1]]])
    sample = Sample(tokens=[1, 2], routing=RoutingTape(ids, num_experts=300))
    message = _wire.Message(1, "generate", sample=_wire.sample_to_wire(sample))
    decoded = _wire.decode(_wire.encode(message))
    assert _wire.sample_from_wire(decoded.sample).routing == sample.routing
