"""`SGLangEngine` against fakes of two versions of the real server."""

import asyncio
import contextlib
import math
import time
from inspect import signature

import pytest

from miles.errors import (
    EngineError,
    PromptTooLongError,
    RoutingError,
    SettingError,
)
from miles.rollout import (
    RolloutEngine,
    RoutingLayout,
    Sample,
    SamplingParams,
    SGLangEngine,
    Span,
    Status,
)
from tests.rollout.sglang_fake import (
    FakeSGLang,
    Layout,
    experts,
    logprob,
    next_token,
)

VERSIONS = ["0.5.17", "0.5.21"]
LAYOUT = Layout()
ROUTING = RoutingLayout(num_layers=3, topk=2, num_experts=8, moe_layers=(1, 2))
PROMPT = [5, 6, 7]
QUICK = {"backoff": 0.01, "abort_timeout": 5.0, "recheck_seconds": 0.05}


def params(count: int = 6, **changes) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **changes)


def expected(prompt: list[int], count: int, version: int = 0, temperature: float = 1.0):
    """Tokens and log-probs that a fake gives."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        tokens.append(next_token(tokens[-1], len(tokens), version))
        logprobs.append(logprob(tokens[-2], tokens[-1], version, temperature))
    return tokens, logprobs


@contextlib.contextmanager
def serving(version="0.5.17", engine=(), **settings):
    with (
        FakeSGLang(version, **settings) as fake,
        contextlib.closing(SGLangEngine(fake.url, **QUICK | dict(engine))) as made,
    ):
        yield fake, made


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_logprobs_and_versions_are_the_servers(version):
    with serving(version, weight_version="7") as (fake, engine):
        assert isinstance(engine, RolloutEngine)
        sample = asyncio.run(engine.generate(PROMPT, params(temperature=0.7), request_id="a"))
        tokens, logprobs = expected(PROMPT, 6, 7, 0.7)
        assert sample.tokens == tokens
        assert sample.rollout_logprobs[3:] == pytest.approx(logprobs)
        assert all(math.isnan(x) for x in sample.rollout_logprobs[:3])
        assert sample.loss_mask == [False] * 3 + [True] * 6
        assert sample.spans == [Span(3, 9, 7)] and engine.weight_version == 7
        assert sample.status is Status.TRUNCATED and sample.routing is None
        assert sample.metadata["request_id"] == "a" and "retries" not in sample.metadata
        body = fake.requests[0]
        assert body["extra_key"] == "v7" and body["rid"].endswith("-a")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stop_token_completes_and_stays(version):
    tokens, _ = expected(PROMPT, 6)
    stop = tokens[6]
    with serving(version) as (_, engine):
        sample = asyncio.run(engine.generate(PROMPT, params(stop_token_ids=(stop,))))
    assert sample.status is Status.COMPLETED and sample.tokens == tokens[:7]


def test_the_protocols_parameters_are_taken():
    for method in ("generate", "abort", "pause", "resume"):
        ours, theirs = getattr(SGLangEngine, method), getattr(RolloutEngine, method)
        assert [*signature(ours).parameters] == [*signature(theirs).parameters]


@pytest.mark.parametrize(("version", "count"), [("0.5.17", 200), ("0.5.21", 1000)])
def test_a_thousand_requests_at_once(version, count):
    with serving(version, step_seconds=0.5) as (fake, engine):

        async def rollout():
            prompts = [[3 + i % 20, 1 + i // 50] for i in range(count)]
            work = (engine.generate(prompt, params(4)) for prompt in prompts)
            return prompts, await asyncio.gather(*work)

        prompts, samples = asyncio.run(rollout())
        for prompt, sample in zip(prompts, samples, strict=True):
            assert sample.tokens == expected(prompt, 4)[0]
        assert len({body["rid"] for body in fake.requests}) == count
        assert fake.max_seen_running > 100, "they were not sent at once"
        assert engine.num_in_flight == 0


def test_no_more_than_max_in_flight_are_sent():
    with serving(engine={"max_in_flight": 3}, step_seconds=0.005) as (fake, engine):

        async def rollout():
            return await asyncio.gather(*(engine.generate(PROMPT, params(4)) for _ in range(12)))

        assert len(asyncio.run(rollout())) == 12
        assert 1 <= fake.max_seen_running <= 3
    with pytest.raises(SettingError, match="max_in_flight is 0"):
        SGLangEngine("http://127.0.0.1:9", max_in_flight=0)


def test_any_loop_and_none():
    with serving() as (_, engine):
        one = asyncio.run(engine.generate(PROMPT, params()))
        two = asyncio.run(engine.generate(PROMPT, params()))
        three = engine.submit(PROMPT, params()).result(10)
        assert one.tokens == two.tokens == three.tokens


# Resuming.


@pytest.mark.parametrize("version", VERSIONS)
def test_an_aborted_sample_goes_on_as_if_it_had_not_been(version):
    with serving(version, step_seconds=0.01, layout=LAYOUT, engine={"routing": ROUTING}) as (
        fake, engine,
    ):  # fmt: skip

        async def cut(prompt):
            task = asyncio.create_task(engine.generate(prompt, params(40), request_id="x"))
            before = len(fake.requests)
            while len(fake.requests) == before:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.06)
            await engine.abort(["x"])
            return await task

        first = asyncio.run(cut(PROMPT))
        assert first.status is Status.ABORTED and 0 < first.num_generated_tokens < 40
        assert len(first.routing) == len(first.tokens) - 1
        kept = first.copy()
        second = asyncio.run(engine.generate(first, params(40)))
        assert first == kept, "what was passed in stays"
        assert second.status is Status.TRUNCATED
        tokens, logprobs = expected(PROMPT, 40)
        assert second.tokens == tokens
        assert second.rollout_logprobs[3:] == pytest.approx(logprobs)
        assert second.spans == [Span(3, 43, 0)]
        assert fake.requests[-1]["routed_experts_start_len"] == len(first.routing)
        ids = [experts(token, 0, LAYOUT)[1:].tolist() for token in tokens[:-1]]
        assert second.routing.expert_ids.tolist() == ids
        with pytest.raises(SettingError, match="room for at least one more"):
            engine.submit(second, params(40))


@pytest.mark.parametrize("version", VERSIONS)
def test_new_weights_make_a_new_span_and_a_new_cache_key(version):
    with serving(version) as (fake, engine):
        part = Sample(tokens=PROMPT)
        part.append([8, 9], logprobs=[-1.0, -2.0], weight_version=0)
        fake.weight_version = "3"
        assert asyncio.run(engine.refresh()) == 3 == engine.weight_version
        whole = asyncio.run(engine.generate(part, params(6)))
        assert whole.spans == [Span(3, 5, 0), Span(5, 9, 3)]
        assert whole.rollout_logprobs[3:5] == [-1.0, -2.0]
        assert fake.requests[-1]["extra_key"] == "v3"
        assert fake.requests[-1]["sampling_params"]["max_new_tokens"] == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_that_change_under_a_running_request(version):
    with serving(version, step_seconds=0.01, report_every=1) as (fake, engine):

        async def rollout():
            task = asyncio.create_task(engine.generate(PROMPT, params(30)))
            await asyncio.sleep(0.1)
            await engine.pause()
            assert fake.calls[-1] == "/pause_generation"
            await asyncio.sleep(0.05)
            fake.weight_version = "1"
            await engine.resume()
            return await task

        sample = asyncio.run(rollout())
        assert engine.weight_version == 1 and sample.num_generated_tokens == 30
        if version == "0.5.17":  # it tells only the last, so all count as the older one
            assert sample.spans == [Span(3, 33, 0)]
            assert sample.metadata["weight_versions_mixed"] == [0, 1]
        else:
            assert [s.weight_version for s in sample.spans] == [0, 1]
            assert sample.spans[-1].end == 33


# Routing.


@pytest.mark.parametrize("extra_row", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_routing_has_a_row_for_each_token_but_the_last(version, extra_row):
    settings = {"layout": LAYOUT, "extra_row": extra_row, "weight_version": "2"}
    with serving(version, engine={"routing": ROUTING}, **settings) as (_, engine):
        sample = asyncio.run(engine.generate(PROMPT, params()))
    assert len(sample.routing) == len(sample.tokens) - 1
    ids = [experts(token, 2, LAYOUT)[1:].tolist() for token in sample.tokens[:-1]]
    assert sample.routing.expert_ids.tolist() == ids
    assert [tuple(vars(s).values()) if hasattr(s, "__dict__") else tuple(s)
            for s in sample.routing.spans] == [(0, 8, 2)]  # fmt: skip


def test_a_request_aborted_while_it_waited_has_no_routing():
    settings = {"layout": LAYOUT, "max_running": 1, "step_seconds": 0.01}
    with serving(engine={"routing": ROUTING}, **settings) as (fake, engine):

        async def rollout():
            runs = asyncio.create_task(engine.generate(PROMPT, params(60), request_id="runs"))
            await asyncio.sleep(0.05)
            waits = asyncio.create_task(engine.generate(PROMPT, params(5), request_id="waits"))
            while len(fake.requests) < 2:
                await asyncio.sleep(0.005)
            await engine.abort(["waits"])
            got = await waits
            await engine.abort(["runs"])
            return got, await runs

        waits, runs = asyncio.run(rollout())
        assert waits.status is Status.ABORTED and waits.tokens == PROMPT and waits.routing is None
        assert runs.routing is not None
        # Resumed, it has holes for nothing: nothing was sampled.
        again = asyncio.run(engine.generate(waits, params(5)))
        assert len(again.routing) == len(again.tokens) - 1


def test_a_retracted_request_keeps_its_tokens_and_says_which_rows_are_missing():
    settings = {"layout": LAYOUT, "report_every": 4, "step_seconds": 0.01}
    with serving(engine={"routing": ROUTING}, **settings) as (_, engine):

        async def rollout():
            task = asyncio.create_task(engine.generate(PROMPT, params(60)))
            await asyncio.sleep(0.15)
            await engine.pause()
            await engine.abort()  # under in_place it would never answer: it is retracted first
            got = await asyncio.wait_for(task, 5)
            await engine.resume()
            return got

        part = asyncio.run(rollout())
        assert part.status is Status.ABORTED and part.routing is None
        assert part.num_generated_tokens and part.num_generated_tokens % 4 == 0
        whole = asyncio.run(engine.generate(part, params(60)))
        assert whole.tokens == expected(PROMPT, 60)[0]
        missing = len(part.tokens) - 1
        assert whole.routing.recorded_N.tolist() == [False] * missing + [True] * (62 - missing)


def test_routing_that_is_missing_or_of_another_shape_is_refused():
    refused = pytest.raises(SettingError, match="--enable-return-routed-experts")
    with FakeSGLang(layout=None) as fake, refused:
        SGLangEngine(fake.url, routing=ROUTING, **QUICK)
    wrong = RoutingLayout(num_layers=5, topk=2, num_experts=8)
    refused = pytest.raises(RoutingError, match="expected a multiple of 40")
    with serving(engine={"routing": wrong}, layout=LAYOUT) as (_, engine), refused:
        asyncio.run(engine.generate(PROMPT, params()))
    with serving(engine={"routing": ROUTING}, layout=LAYOUT) as (fake, engine):
        fake.meddle = lambda a: {**a, "meta_info": {**a["meta_info"], "routed_experts": None}}
        with pytest.raises(RoutingError, match="expected base64"):
            asyncio.run(engine.generate(PROMPT, params()))


# Aborting.


def test_what_would_change_the_distribution_is_refused():
    for sampling in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        with pytest.raises(SettingError, match="return_sampling_mask"):
            SGLangEngine("http://127.0.0.1:9", sampling=sampling)
    for sampling in ({"repetition_penalty": 1.1}, {"regex": "a*"}, {"logit_bias": {"1": 2.0}}):
        with pytest.raises(SettingError, match="leave it out"):
            sampling = {"top_p": 0.9, **sampling}
            SGLangEngine("http://127.0.0.1:9", sampling=sampling, return_sampling_mask=True)
    with pytest.raises(SettingError, match="its mask is all of it"):
        SGLangEngine("http://127.0.0.1:9", return_sampling_mask=True)
    with pytest.raises(SettingError, match="SamplingParams decides"):
        SGLangEngine("http://127.0.0.1:9", sampling={"temperature": 0.5})


def test_truncated_logprobs_are_used_when_the_server_returns_them():
    setting = {"sampling": {"top_p": 0.9}, "return_sampling_mask": True}
    with serving(engine=setting) as (fake, engine):
        sample = asyncio.run(engine.generate(PROMPT, params(4)))
        tokens, logprobs = expected(PROMPT, 4)
        assert sample.rollout_logprobs[3:] == pytest.approx([x / 2 for x in logprobs])
        assert sample.metadata["sampling_mask"] == [[token, 0] for token in tokens[3:]]
        assert fake.requests[0]["sampling_params"]["top_p"] == 0.9
        again = asyncio.run(engine.generate(sample, params(6)))
        assert len(again.metadata["sampling_mask"]) == 6

        def without(answer):
            del answer["meta_info"]["output_token_sampling_logprobs"]
            return answer

        fake.meddle = without
        with pytest.raises(EngineError, match="sent none log-probs after truncation"):
            asyncio.run(engine.generate(PROMPT, params(4)))


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        (None, "sent 0 sampling masks for the 4 tokens"),
        ([[0]], "sent 1 sampling masks for the 4 tokens"),
        ([None] * 4, "the sampling mask None; expected one that holds the token"),
        ([[31]] * 4, r"at place 0 .* the sampling mask \[31\]; expected one that holds"),
    ],
)
def test_sampling_masks_that_do_not_fit_are_refused(masks, says):
    setting = {"sampling": {"top_p": 0.9}, "return_sampling_mask": True}
    with serving(engine=setting) as (fake, engine):

        def other(answer):
            answer["meta_info"]["output_token_sampling_mask"] = masks
            return answer

        fake.meddle = other
        with pytest.raises(EngineError, match=says):
            asyncio.run(engine.generate(PROMPT, params(4)))


def test_one_that_is_aborted_while_it_waits_has_no_masks():
    setting = {"sampling": {"top_p": 0.9}, "return_sampling_mask": True}
    with serving(engine=setting, step_seconds=0.02, max_running=1) as (fake, engine):

        def as_sglang(answer):
            meta = answer["meta_info"]
            if not answer["output_ids"]:
                del meta["output_token_sampling_mask"], meta["output_token_sampling_logprobs"]
            return answer

        fake.meddle = as_sglang
        first = engine.submit(PROMPT, params(1000), request_id="first")
        until(lambda: fake._running)
        waits = engine.submit(PROMPT, params(4), request_id="waits")
        until(lambda: fake._waiting)
        asyncio.run(engine.abort(["waits", "first"]))
        assert waits.result(5).status is Status.ABORTED and waits.result(5).tokens == PROMPT
        assert first.result(5).num_generated_tokens == len(
            first.result(5).metadata["sampling_mask"]
        )


@pytest.mark.parametrize("reason", ["length", "stop", "abort"])
def test_more_tokens_than_were_asked_for_are_refused(reason):
    with serving() as (fake, engine):

        def more(answer):
            answer["output_ids"] += [9]
            answer["meta_info"]["output_token_logprobs"] += [[-1.0, 9, None]]
            answer["meta_info"]["finish_reason"] = {"type": reason}
            return answer

        fake.meddle = more
        if reason == "abort":  # in a step in which a draft's tokens were accepted
            assert asyncio.run(engine.generate(PROMPT, params(4))).num_generated_tokens == 5
            return
        with pytest.raises(EngineError, match=r"sent 5 tokens for .*; expected 4 at most"):
            asyncio.run(engine.generate(PROMPT, params(4)))


def test_a_seed_is_sent_where_it_means_something_and_warned_of_once_where_not():
    with serving() as (fake, engine):
        sample = asyncio.run(engine.generate(PROMPT, params(4, seed=9)))
        assert fake.requests[0]["sampling_params"]["sampling_seed"] == 9
        asyncio.run(engine.generate(sample, params(6)))
        assert fake.requests[1]["sampling_params"]["sampling_seed"] == 9
    with serving(deterministic=False) as (fake, engine):
        with pytest.warns(UserWarning, match="--enable-deterministic-inference"):
            engine.submit(PROMPT, params(4, seed=9)).result(10)
        engine.submit(PROMPT, params(4, seed=9)).result(10)
        assert "sampling_seed" not in fake.requests[0]["sampling_params"]


def test_an_answer_ends_where_the_context_does():
    with serving(context_length=12) as (_, engine):
        sample = asyncio.run(engine.generate(PROMPT, params(100)))
        assert len(sample.tokens) == 10 and sample.status is Status.TRUNCATED
        with pytest.raises(PromptTooLongError, match="longer than the model's context length"):
            asyncio.run(engine.generate([5] * 12, params(1)))


@pytest.mark.parametrize("names", ["old", "both", "new"])
def test_acceptance_is_read_under_any_name(names):
    with serving(speculative=names) as (_, engine):
        sample = asyncio.run(engine.generate(PROMPT, params(6)))
        stats = {"num_verify_steps": 3, "num_proposed": 9, "num_accepted": 3, "num_tokens": 5}
        assert sample.metadata["speculative"] == stats
        again = asyncio.run(engine.generate(sample, params(8)))
        # The first of the two tokens that came then is of its prefill too.
        assert again.metadata["speculative"]["num_tokens"] == 5 + 1
