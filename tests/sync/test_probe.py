"""Log-probs of an engine against the trainer's."""

import math

import pytest
import torch

from miles.errors import SettingError, ShapeError, SyncError
from miles.sync import InProcessSyncer, model_logprobs, probe
from tests.models import params, serving, tiny

PROMPTS = [[5, 6, 7], [1, 2], [9, 8, 7, 6]]


def scores(*rows):
    return lambda sequences: [list(row) for row in rows]


def test_readings_are_those_computed_by_hand():
    engine = scores([math.nan, -1.0, -2.0], [0.0, -3.0])
    trainer = scores([0.0, -1.5, -2.0], [math.nan, -2.0])
    report = probe(engine, trainer, [[1, 2, 3], [4, 5]], max_mean=1.0)
    assert (report.num_tokens, report.mean_abs, report.max_abs) == (3, 0.5, 1.0)
    k3 = ((math.exp(-0.5) - 0.5) + 0 + (math.e - 2)) / 3
    assert report.k3 == pytest.approx(k3, rel=1e-12)
    assert (report.worst, report.worst_mean_abs) == (1, 1.0)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_mean": 0.1}, r"mean \|d\| 0.5 \(at most 0.1\) over 3 tokens; worst is sequence 1"),
        ({"max_mean": 9, "max_abs": 0.9}, r"largest \|d\| 1 \(at most 0.9\)"),
        ({"max_mean": 9, "max_k3": 0.1}, r"k3 0.\d+ \(at most 0.1\).*begins with \[4, 5\]"),
    ],
)
def test_a_gap_above_a_threshold_names_the_worst_sequence(limits, text):
    engine = scores([math.nan, -1.0, -2.0], [0.0, -3.0])
    trainer = scores([0.0, -1.5, -2.0], [0.0, -2.0])
    with pytest.raises(SyncError, match=text):
        probe(engine, trainer, [[1, 2, 3], [4, 5]], **limits)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_is_never_within_a_threshold(bad):
    with pytest.raises(SyncError, match=r"sequence 0, which begins with .*not finite"):
        probe(scores([0.0, bad]), scores([0.0, -1.0]), [[1, 2]], max_mean=math.inf)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="expected one for each of its 2 tokens"):
        probe(scores([0.0]), scores([0.0, 0.0]), [[1, 2]])
    with pytest.raises(SettingError, match="no prompts"):
        probe(scores(), scores(), [])
    with pytest.raises(SettingError, match="no token to compare"):
        probe(scores([0.0]), scores([0.0]), [[1]])


def test_an_engine_is_right_after_a_sync_and_wrong_before():
    trainer = tiny("llama", seed=1).eval()
    sampling = params(12, temperature=0.8)
    score = model_logprobs(trainer, temperature=0.8)
    with serving(tiny("llama")) as engine:
        with pytest.raises(SettingError, match="expected params"):
            probe(engine, score, PROMPTS)
        with pytest.raises(SyncError, match="does not answer like the trainer"):
            probe(engine, score, PROMPTS, params=sampling)
        InProcessSyncer(engine).push(trainer.state_dict().items(), version=3)
        report = probe(engine, score, PROMPTS, params=sampling, version=3, max_mean=1e-4)
        assert report.num_tokens == 3 * 12 and report.k3 < 1e-6
        with pytest.raises(SyncError, match="serves version 3; expected 4"):
            probe(engine, score, PROMPTS, params=sampling, version=4)


def test_samples_of_an_engine_that_changed_its_version_meanwhile_are_not_compared(monkeypatch):
    trainer = tiny("llama").eval()
    with serving(tiny("llama")) as engine:
        InProcessSyncer(engine).push(trainer.state_dict().items(), version=3)
        generate = engine.generate

        async def pushing(prompt, sampling, **options):
            sample = await generate(prompt, sampling, **options)
            InProcessSyncer(engine).push(trainer.state_dict().items(), version=4)
            return sample

        monkeypatch.setattr(engine, "generate", pushing)
        with pytest.raises(SyncError, match="serves version 4; expected 3"):
            probe(engine, model_logprobs(trainer), [[1, 2]], params=params(4), version=3)


def test_a_scorer_needs_no_engine():
    model = tiny("llama").eval()
    score = model_logprobs(model)
    report = probe(score, model_logprobs(model.double()), PROMPTS, max_mean=1e-4)
    assert report.num_tokens == 2 + 1 + 3
    assert torch.isnan(score([[1, 2]])[0][0])


def test_log_probs_at_temperature_zero_are_those_of_one():
    model = tiny("llama").eval()
    cold, warm = (model_logprobs(model, temperature=t)([[1, 2, 3]])[0] for t in (0.0, 1.0))
    assert torch.equal(cold[1:], warm[1:]) and cold[1:].isfinite().all()


def test_an_engine_that_remembers_its_version_is_asked_again(monkeypatch):
    trainer = tiny("llama").eval()
    with serving(tiny("llama")) as engine:
        asked = []

        async def refresh():
            asked.append(True)
            InProcessSyncer(engine).push(trainer.state_dict().items(), version=3)

        monkeypatch.setattr(engine, "refresh", refresh, raising=False)
        probe(engine, model_logprobs(trainer), PROMPTS, params=params(4), version=3)
        assert asked == [True]
