"""The two ways in which `SGLangEngine` and `SGLangSyncer` share a server; see docs/rollout.md."""

import asyncio
import contextlib
import time

import pytest
import torch

from miles.errors import SyncError
from miles.rollout import SGLangEngine, Span, Status
from miles.sync import SGLangSyncer
from tests.rollout.sglang_fake import FakeSGLang
from tests.rollout.test_sglang_engine import PROMPT, QUICK, params, until

WEIGHTS = {"w": torch.ones(2), "v": torch.zeros(3)}
COUNT = 25
AFTER = 3 + COUNT


@contextlib.contextmanager
def both(version, *, pause, **engine):
    """A server, an engine with requests that run and one that waits, and a syncer."""
    with (
        FakeSGLang(version, step_seconds=0.02, max_running=2) as fake,
        contextlib.closing(SGLangEngine(fake.url, **QUICK | engine)) as made,
        contextlib.closing(SGLangSyncer(fake.url, via="value", pause=pause, timeout=20)) as syncer,
    ):
        futures = [made.submit(PROMPT, params(COUNT)) for _ in range(3)]
        until(lambda: len(fake._running) == 2 and all(r.output for r in fake._running))
        until(lambda: len(fake._waiting) == 1)
        yield fake, made, syncer, futures


def finished(engine, futures):
    """Spans of the whole answers, and whether they were ABORTED on their way.

    Those of the requests that ran when the push came are first.
    """
    samples = [future.result(20) for future in futures]
    aborted = [sample.status is Status.ABORTED for sample in samples]
    whole = [
        engine.submit(sample, params(COUNT)).result(20) if cut else sample
        for sample, cut in zip(samples, aborted, strict=True)
    ]
    assert all(len(sample.tokens) == AFTER for sample in whole)
    return sorted((sample.spans for sample in whole), key=len, reverse=True), aborted


WAYS = [("0.5.17", "abort"), ("0.5.21", "abort"), ("0.5.21", "retract")]


def check(spans, aborted, *, mode):
    assert aborted == [mode == "abort"] * 3
    for before, after in spans[:2]:
        assert (before.weight_version, after.weight_version, after.end) == (0, 1, AFTER)
    assert spans[2] == [Span(3, AFTER, 1)]  # it had not begun


@pytest.mark.parametrize(("version", "mode"), WAYS)
def test_a_syncer_pauses_the_server_itself_and_the_engine_is_told_afterwards(version, mode):
    with both(version, pause=mode) as (fake, engine, syncer, futures):
        assert syncer.push(WEIGHTS.items(), version=1).num_tensors == 2
        assert asyncio.run(engine.refresh()) == 1
        check(*finished(engine, futures), mode=mode)
        assert not fake.held and not fake.died


@pytest.mark.parametrize(("version", "mode"), WAYS)
def test_a_pause_of_the_engine_goes_with_a_syncer_that_does_not_pause(version, mode):
    with both(version, pause=None, pause_mode=mode) as (fake, engine, syncer, futures):
        asyncio.run(engine.pause())
        late = engine.submit([9], params(3))
        assert syncer.push(WEIGHTS.items(), version=1).num_tensors == 2
        time.sleep(0.1)
        assert fake.held and not late.done()
        asyncio.run(engine.resume())
        check(*finished(engine, futures), mode=mode)
        assert late.result(20).spans == [Span(1, 4, 1)]
        assert fake.calls.count("/pause_generation") == 1 and not fake.died


@pytest.mark.parametrize(
    ("version", "mode"), [("0.5.17", "in_place"), ("0.5.21", "in_place"), ("0.5.17", "retract")]
)
def test_a_pause_that_leaves_requests_in_the_way_is_refused_and_nothing_is_lost(version, mode):
    with both(version, pause=None, pause_mode=mode) as (fake, engine, syncer, futures):
        asyncio.run(engine.pause())
        with pytest.raises(SyncError, match="servers serve what they did"):
            syncer.push(WEIGHTS.items(), version=1)
        asyncio.run(engine.resume())
        spans, aborted = finished(engine, futures)
        assert spans == [[Span(3, AFTER, 0)]] * 3 and not any(aborted)
        assert not fake.updates
