"""What `SGLangEngine` says when something is wrong, with the request, the server or the answer."""

import asyncio
import contextlib
import http.server
import json
import subprocess
import sys
import threading
from typing import ClassVar

import httpx
import pytest

from miles.errors import (
    EmptyBatchError,
    EngineDiedError,
    EngineError,
    MilesError,
    NonFiniteError,
    SettingError,
)
from miles.rollout import Sample, SGLangEngine, _sglang_calls
from miles.rollout._sglang_api import KNOWN_VERSIONS, features_of, vocab_size_of
from tests.rollout.sglang_fake import VOCAB, FakeSGLang, Refusal
from tests.rollout.test_sglang_engine import PROMPT, QUICK, expected, params, serving, until


def test_bad_requests_say_what_is_wrong():
    with serving() as (_, engine):
        with pytest.raises(EmptyBatchError):
            asyncio.run(engine.generate([], params()))
        with pytest.raises(SettingError, match=r"prompt is -1; expected an id 0 or more"):
            engine.submit([3, -1], params())


@pytest.mark.parametrize(
    "config", [{"vocab_size": VOCAB}, {"vocab_size": 9, "text_config": {"vocab_size": VOCAB}}]
)
def test_ids_that_the_model_does_not_have_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with serving(model_path=str(tmp_path)) as (fake, engine):
        for prompt in ([VOCAB], [3, VOCAB, -1], Sample(tokens=[3, VOCAB])):
            with pytest.raises(SettingError, match=r"prompt is 32; expected an id in 0\.\.31"):
                engine.submit(prompt, params())
        assert asyncio.run(engine.generate([VOCAB - 1], params())).num_generated_tokens == 6
        assert len(fake.requests) == 1 and not fake.died
        # Weights pushed through a folder, which has no config.json, change its model_path.
        fake.model_path, fake.weight_version = str(tmp_path / "version-1"), "1"
        asyncio.run(engine.refresh())
        with pytest.raises(SettingError, match="expected an id in"):
            engine.submit([VOCAB], params())


def test_of_several_servers_the_smallest_vocabulary_counts_unless_one_is_given(tmp_path):
    for name, size in (("a", VOCAB), ("b", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": size}))
    paths = [str(tmp_path / "a"), str(tmp_path / "b"), "some/model"]
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(FakeSGLang(model_path=path)).url for path in paths]
        with contextlib.closing(SGLangEngine(urls, **QUICK)) as engine:
            assert asyncio.run(engine.generate([19], params()))
            with pytest.raises(SettingError, match=r"0\.\.19"):
                engine.submit([20], params())
        with contextlib.closing(SGLangEngine(urls, vocab_size=25, **QUICK)) as engine:
            assert asyncio.run(engine.generate([24], params()))
            with pytest.raises(SettingError, match=r"0\.\.24"):
                engine.submit([25], params())
    for size in (0, -3):
        with pytest.raises(SettingError, match=f"vocab_size is {size}; expected 1 or more"):
            SGLangEngine("http://127.0.0.1:9", vocab_size=size)


@pytest.mark.parametrize("text", ["", "[3]", "{}", '{"vocab_size": "many"}', '{"vocab_size": 0}'])
def test_a_vocabulary_that_is_not_told_is_not_known(tmp_path, monkeypatch, text):
    (tmp_path / "config.json").write_text(text)
    assert vocab_size_of(str(tmp_path)) is None
    assert vocab_size_of(str(tmp_path / "missing")) is None
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    monkeypatch.chdir(tmp_path)
    assert vocab_size_of("") is None and vocab_size_of(".") == 7


@pytest.mark.parametrize("bad", [VOCAB, -1])
def test_an_id_that_gets_through_ends_the_server(bad):
    """Which is why it must not."""
    with FakeSGLang() as fake:
        body = {"input_ids": [3, bad], "sampling_params": {"max_new_tokens": 4}}
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{fake.url}/generate", json=body, timeout=20)
        assert "device-side assert" in fake.died
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{fake.url}/model_info", timeout=20)
    with FakeSGLang() as fake, contextlib.closing(SGLangEngine(fake.url, **QUICK)) as engine:
        if bad > 0:  # its vocabulary is not known here
            other = engine.submit(PROMPT, params(4000))
            with pytest.raises(EngineDiedError):
                asyncio.run(engine.generate([bad], params()))
            with pytest.raises(EngineDiedError):
                other.result(20)


def test_nobody_there():
    says = r"no SGLang server answers at .*; expected one there; look at its log, start it"
    with pytest.raises(EngineDiedError, match=says):
        SGLangEngine("http://127.0.0.1:9", **QUICK)
    for url in ("localhost", "ftp://x", ""):
        with pytest.raises(SettingError, match="expected one like http"):
            SGLangEngine(url, **QUICK)
    for urls in ([], ["http://a", "http://a"]):
        with pytest.raises(SettingError, match="urls is"):
            SGLangEngine(urls)


def test_versions_are_told_apart_and_unknown_ones_refused():
    assert features_of("0.5.19").weight_version_spans and not features_of("0.5.19").update_sessions
    assert features_of("0.5.23.post1").update_sessions
    for version in ("0.4.10", "0.5.20", "0.5.21.dev7", "0.5.170", "0.6.0", "nightly"):
        with pytest.raises(EngineError, match=r"expected one of 0\.5\.17"):
            features_of(version)
        assert features_of(version, assume=KNOWN_VERSIONS[0]).version == version
    with FakeSGLang() as fake:
        fake.version = "0.7.0"
        with pytest.raises(EngineError, match=r"runs SGLang '0.7.0'.*assume_version"):
            SGLangEngine(fake.url, **QUICK)
        with contextlib.closing(SGLangEngine(fake.url, assume_version="0.5.17", **QUICK)) as engine:
            assert engine.servers[0].version == "0.7.0"
        with pytest.raises(SettingError, match=r"assume_version is '0\.7\.0'"):
            SGLangEngine(fake.url, assume_version="0.7.0", **QUICK)


def test_a_weight_version_must_be_a_number():
    with serving(weight_version="default") as (_, engine):
        assert engine.weight_version == 0
        assert asyncio.run(engine.generate(PROMPT, params())).weight_versions == [0]
    refused = pytest.raises(EngineError, match="--weight-version 0")
    with FakeSGLang(weight_version="latest") as fake, refused:
        SGLangEngine(fake.url, **QUICK)


def test_keys():
    with FakeSGLang(api_key="k", admin_api_key="a") as fake:
        with pytest.raises(EngineError, match=r"401.*asks for a key, and api_key is None"):
            SGLangEngine(fake.url, **QUICK)
        with pytest.raises(EngineError, match="refused the api_key it got"):
            SGLangEngine(fake.url, api_key="wrong", **QUICK)
        with contextlib.closing(SGLangEngine(fake.url, api_key="k", **QUICK)) as engine:
            assert asyncio.run(engine.generate(PROMPT, params())).num_generated_tokens == 6
            # Whoever gave only the one key is not told of another that was refused.
            with pytest.raises(
                EngineError, match="the api_key, which it got since admin_api_key is"
            ):
                asyncio.run(engine.pause())
            # The failed pause holds nobody back.
            assert asyncio.run(asyncio.wait_for(engine.generate(PROMPT, params()), 5))
        refused = pytest.raises(EngineError, match="it refused the admin_api_key it got; expected")
        wrong = {"api_key": "k", "admin_api_key": "x"}
        with contextlib.closing(SGLangEngine(fake.url, **wrong, **QUICK)) as engine, refused:
            asyncio.run(engine.pause())
        both = {"api_key": "k", "admin_api_key": "a"}
        with contextlib.closing(SGLangEngine(fake.url, **both, **QUICK)) as engine:
            asyncio.run(engine.pause())
            asyncio.run(engine.resume())
    refused = pytest.raises(EngineError, match="asks for a key, and admin_api_key is None")
    with serving(admin_api_key="a") as (_, engine), refused:
        asyncio.run(engine.pause())


def meta(**changes):
    return lambda a: {**a, "meta_info": {**a["meta_info"], **changes}}


@pytest.mark.parametrize(
    ("meddle", "error", "says"),
    [
        (lambda a: {"nothing": 1}, EngineError, "output_ids"),
        (lambda a: [a, a], EngineError, "does not fit"),
        (lambda a: {**a, "output_ids": "abc"}, EngineError, "output_ids"),
        (lambda a: {**a, "output_ids": a["output_ids"][:-1]}, EngineError,
         "6 log-probs for the 5 tokens of request 'x'; expected one each"),
        (lambda a: {**a, "output_ids": a["output_ids"][::-1]}, EngineError, "the same token"),
        (meta(output_token_logprobs=None), EngineError, "sent 0 log-probs for the 6 tokens"),
        (meta(output_token_logprobs=[[None, t, None] for t in expected(PROMPT, 6)[0][3:]]),
         NonFiniteError, "no number as log-prob of token 0"),
        (meta(finish_reason={"type": "bored"}), EngineError, "expected a type among stop"),
        (meta(finish_reason=None), EngineError, "finish_reason None"),
        (meta(weight_version="latest"), EngineError, "expected an integer"),
        (meta(weight_versions=[{"version": "0", "start": 0, "end": 4}]), EngineError,
         "without a gap"),
    ],
)  # fmt: skip
def test_answers_that_are_none(meddle, error, says):
    with serving() as (fake, engine):
        fake.meddle = meddle
        sample = Sample(tokens=PROMPT)
        kept = sample.copy()
        with pytest.raises(error, match=says) as caught:
            asyncio.run(engine.generate(sample, params(), request_id="x"))
        assert isinstance(caught.value, MilesError)
        assert sample.tokens == kept.tokens and not sample.spans
        fake.meddle = lambda a: a
        assert asyncio.run(engine.generate(sample, params())).num_generated_tokens == 6


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        (None, r"It works!.*Is this address an SGLang server"),
        ("gzip", r"/server_info answered with bytes that are not .*; expected JSON .*; look at"),
    ],
)
def test_something_else_than_sglang(encoding, says):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # the base class calls it by this name
            self.send_response(200)
            if encoding is not None:
                self.send_header("content-encoding", encoding)
            self.end_headers()
            self.wfile.write(b"<html>It works!</html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EngineError, match=says):
            SGLangEngine(f"http://127.0.0.1:{server.server_port}", **QUICK)
        server.shutdown()


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_is_busy_is_asked_again(status):
    with serving() as (fake, engine):
        left = [2]

        def busy(answer):
            if left[0]:
                left[0] -= 1
                raise Refusal(status, {"error": {"message": "The request queue is full."}})
            return answer

        fake.meddle = busy
        sample = asyncio.run(engine.generate(PROMPT, params()))
        assert sample.num_generated_tokens == 6 and sample.metadata["retries"] == 2
        left[0] = 1000
        with pytest.raises(EngineError, match=f"answered {status}.*queue is full"):
            asyncio.run(engine.generate(PROMPT, params()))
        assert left[0] == 1000 - 6, "the first and five repetitions"


def test_what_a_busy_server_sent_away_is_asked_of_another():
    def full(answer):
        raise Refusal(503, {"error": "full"})

    with (
        FakeSGLang() as first,
        FakeSGLang() as other,
        contextlib.closing(SGLangEngine([first.url, other.url], **QUICK)) as engine,
    ):
        first.meddle = full
        for prompt in range(4):
            sample = engine.submit([prompt, 2], params()).result(20)
            assert sample.metadata["server"] == other.url
            assert sample.metadata.get("retries", 0) <= 1
        assert all(server.alive for server in engine.servers) and first.requests
        other.meddle = full  # with nobody else left they are asked again
        before = [len(fake.requests) for fake in (first, other)]
        with pytest.raises(EngineError, match=r"503.*full"):
            engine.submit(PROMPT, params()).result(20)
        after = [len(fake.requests) for fake in (first, other)]
        assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3]
        first.meddle = lambda answer: answer
        assert engine.submit([9], params()).result(20).metadata["server"] == first.url


def test_waits_before_repetitions_double_up_to_a_limit_and_are_spread(monkeypatch):
    class Clock:
        """asyncio, whose `sleep` of the calls takes no time."""

        waited: ClassVar[list[float]] = []

        def __getattr__(self, name):
            return getattr(asyncio, name)

        async def sleep(self, seconds):
            self.waited.append(seconds)

    with serving(engine={"backoff": 0.5, "retries": 7}) as (fake, engine):

        def busy(answer):
            raise Refusal(503, {"error": "full"})

        fake.meddle = busy
        monkeypatch.setattr(_sglang_calls, "asyncio", Clock())
        with pytest.raises(EngineError, match=r"503.*full.*; expected .*; lower max_in_flight"):
            asyncio.run(engine.generate(PROMPT, params()))
        assert len(fake.requests) == 8
    most = [0.5, 1, 2, 4, 8, 10, 10]
    parts = [waited / limit for waited, limit in zip(Clock.waited, most, strict=True)]
    assert all(0.5 <= part <= 1 for part in parts) and len(set(parts)) == 7


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "so it goes"),
        (404, "so it goes"),
        (500, "so it goes.*; expected 200; look at the end of the server's log"),
        (504, "so it goes.*; expected 200; look at"),
    ],
)
def test_what_is_not_safe_to_repeat_is_not_repeated(status, says):
    with serving() as (fake, engine):

        def fail(answer):
            raise Refusal(status, {"error": {"message": "so it goes"}})

        fake.meddle = fail
        with pytest.raises(MilesError, match=says):
            asyncio.run(engine.generate(PROMPT, params()))
        assert len(fake.requests) == 1


def test_a_server_that_hangs_up():
    with serving(engine={"retries": 0}, step_seconds=0.01) as (fake, engine):
        future = engine.submit(PROMPT, params(1000))
        until(lambda: fake.requests)
        fake.cut()
        says = r"ended during /generate .*; expected an answer; look at the end of the server's log"
        with pytest.raises(EngineDiedError, match=says):
            future.result(20)


def test_a_server_that_hangs():
    with serving(engine={"request_timeout": 0.2}, step_seconds=0.05) as (fake, engine):
        with pytest.raises(EngineError, match=r"did not answer within 0\.2 s"):
            asyncio.run(engine.generate(PROMPT, params(1000)))
        assert len(fake.requests) == 1


@pytest.mark.parametrize("name", ["httpx", "msgspec"])
def test_what_is_missing_is_said(name):
    code = f"""
import sys
sys.modules[{name!r}] = None
from miles.errors import MissingExtraError
try:
    from miles.rollout import SGLangEngine
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"the package {name!r}" in done.stdout and "miles[sglang]" in done.stdout
