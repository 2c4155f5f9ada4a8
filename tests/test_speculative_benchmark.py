"""The benchmark of rollouts with a draft, at tiny size, with a stand-in in the server's place."""

import contextlib
import csv
import gc
import importlib
import itertools
import math
import random
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from miles.errors import EmptyBatchError
from miles.rollout import HFEngine, Sample, SamplingParams, SGLangServer
from miles.rollout.speculative import load_draft
from tests.rollout.graphs import pretend_graphs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("speculative")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config(benchmark, policy, folder, /, **changes):
    settings = {
        "policy": policy, "batches": (1, 3), "draft_tokens": (1, 2), "new_tokens": 8, "repeats": 2,
        "train_updates": 2, "micro_batch_size": 2, "commit": "x", "out": folder / "rows.csv",
        "waves": 2,
    }  # fmt: skip
    return benchmark.Config(**settings | changes)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def served_by_a_stand_in(monkeypatch, benchmark):
    """Have the stand-in started, and return the list that the flags will be in."""
    given = []

    def made(folder, *, args, **settings):
        given.append(args)
        names = {path.name for path in Path(folder).parent.iterdir()}
        assert {"policy", "draft"} <= names
        return SGLangServer(
            folder, args=[], module="tests.rollout.sglang_fake",
            **settings | {"cwd": BENCHMARKS.parent, "env": {}},
        )  # fmt: skip

    monkeypatch.setattr(benchmark, "SGLangServer", made)
    return given


@pytest.mark.parametrize("draft_vocabulary", [0, 16])
def test_a_draft_is_trained_measured_kept_and_served(
    monkeypatch, benchmark, policy, tmp_path, draft_vocabulary
):
    given = served_by_a_stand_in(monkeypatch, benchmark)
    benchmark.main(
        config(
            benchmark, policy, tmp_path, save=tmp_path, server_site=str(tmp_path),
            draft_vocabulary=draft_vocabulary, embedded=not draft_vocabulary,
        )
    )  # fmt: skip
    found = rows(tmp_path / "rows.csv")
    own = [row for row in found if row["engine"] == "HFEngine"]
    names = ["plain", "1 draft token", "2 draft tokens", "off", "controller"]
    measured = "" if draft_vocabulary else "13"
    assert [(row["batch"], row["variant"]) for row in own] == [
        (batch, name) for batch in measured for name in names
    ]
    for row in own:
        assert int(row["tokens_per_second"]) > 0 and row["repeats"] == row["waves"] == "2"
        assert (row["new_tokens"], row["shortest"]) == ("8", "4")
        if row["variant"] == "plain":
            assert row["speedup"] == "1.000" and row["accept_length"] == ""
        elif row["variant"] == "off":
            assert float(row["draft_length"]) == 0 and float(row["accept_length"]) == 1
        elif row["variant"] != "controller":  # it may have found that nothing pays
            most = int(row["variant"][0])
            assert 1 <= float(row["accept_length"]) <= most + 1
            assert 0 < float(row["draft_length"]) <= most
    rejects = "--speculative-use-rejection-sampling"
    last = "3 draft tokens, target-only" if draft_vocabulary else "3 draft tokens"
    served = found[len(own) :]
    assert [(row["batch"], row["variant"]) for row in served] == [
        (batch, name) for batch in "13" for name in ("plain", last)
    ]
    assert not any(flag.startswith("--speculative") for flag in given[0])
    assert "EAGLE3" in given[1] and (rejects in given[1]) == (not draft_vocabulary)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    ids = load_draft(tmp_path / "draft", model).target_ids
    assert ids is None if not draft_vocabulary else len(ids) == draft_vocabulary


def test_speed_is_of_the_same_turn_and_counts_are_of_all(benchmark, policy, tmp_path):
    def answered(count, accepted):
        sample = Sample(tokens=[1])
        sample.append([2] * count, logprobs=[0.0] * count)
        sample.metadata["speculative"] = {
            "num_verify_steps": 2, "num_proposed": 6, "num_accepted": accepted,
            "num_tokens": count, "num_more": 9,
        }  # fmt: skip
        return sample

    settings = config(benchmark, policy, tmp_path, batches=(2,))
    speeds = {"plain": [100.0, 50.0, 80.0], "one": [150.0, 100.0, 80.0]}
    counts = {
        "plain": benchmark.counts_of(Sample(tokens=[1])),
        "one": benchmark.counts_of(answered(5, 3)) + benchmark.counts_of(answered(3, 1)),
    }
    plain, one = benchmark.summaries(settings, 2, speeds, counts)
    assert plain["speedup"] == "1.000" and plain["accept_length"] == ""
    assert one["speedup"] == "1.500" and one["tokens_per_second"] == 100
    assert one["accept_length"] == "2.000" and one["draft_length"] == "3.00"


def test_a_calibration_sees_every_kind_of_step(benchmark, policy, tmp_path):
    settings = config(benchmark, policy, tmp_path)
    model, tokenizer = benchmark.load(settings)
    prompts = benchmark.prompts_from(settings, model, tokenizer)
    draft = benchmark.Eagle3Draft.from_target(model)
    cost = benchmark.calibrated(settings, model, draft, prompts)
    # Which of the three noise leaves above 0 on a busy machine is chance.
    assert tokenizer is None and cost.t_draft(1) + cost.per_draft + cost.per_draft_row > 0
    assert math.isfinite(cost.speedup(3, [0.5, 0.5]))


def test_a_turn_is_the_same_for_all_and_another_than_the_last(benchmark, policy, tmp_path):
    settings = config(benchmark, policy, tmp_path, waves=3, shortest=0.3)
    prompts = itertools.repeat([1, 2])
    first, again, next_ = (
        benchmark.turn_of(settings, 40, turn, prompts, seeded=True) for turn in (0, 0, 1)
    )
    assert first == again and len(first) == 120
    assert [params.seed for _, params in first + next_] == list(range(240))
    for turn in (first, next_):
        assert {params.max_new_tokens for _, params in turn} == set(range(2, 9))
    lengths = [[params.max_new_tokens for _, params in turn] for turn in (first, next_)]
    assert lengths[0] != lengths[1]
    unseeded = benchmark.turn_of(settings, 40, 0, prompts, seeded=False)
    assert {params.seed for _, params in unseeded} == {None}
    for changes in ({"waves": 1}, {"until_end": True}):
        settings = config(benchmark, policy, tmp_path, **changes)
        turn = benchmark.turn_of(settings, 40, 0, prompts, seeded=True)
        assert {params.max_new_tokens for _, params in turn} == {8}
        assert len(turn) == 40 * settings.waves


class Crowd:
    """An engine that gives an answer, to whom it likes, once `full` requests are on their way, or
    all that will come."""

    def __init__(self, full: int, total: int, fails=()) -> None:
        self.full, self.total, self.fails = full, total, fails
        self.changed, self.waiting, self.most = threading.Condition(), [], 0
        threading.Thread(target=self.work, daemon=True).start()

    def submit(self, prompt, params) -> Future:
        with self.changed:
            self.waiting.append((prompt, Future()))
            self.most = max(self.most, len(self.waiting))
            self.changed.notify()
            return self.waiting[-1][1]

    def work(self) -> None:
        rng = random.Random(0)
        for left in range(self.total, 0, -1):
            with self.changed:
                size = min(self.full, left)
                self.changed.wait_for(lambda size=size: len(self.waiting) >= size)
                prompt, future = self.waiting.pop(rng.randrange(len(self.waiting)))
            if prompt in self.fails:
                future.set_exception(RuntimeError(f"no answer to {prompt}"))
            else:
                future.set_result(prompt)


@pytest.mark.parametrize("at_once", [1, 5, 30])
def test_a_window_is_full_and_never_more_than_that(benchmark, at_once):
    asked = [([index], SamplingParams(max_new_tokens=1)) for index in range(30)]
    crowd = Crowd(at_once, 30)
    assert benchmark.answers(crowd, at_once, asked) == [[index] for index in range(30)]
    assert crowd.most == at_once


def test_a_request_that_fails_ends_a_turn_and_does_not_block_it(benchmark):
    asked = [([index], SamplingParams(max_new_tokens=1)) for index in range(6)]
    with pytest.raises(RuntimeError, match=r"no answer to \[1\]"):
        benchmark.answers(Crowd(2, 6, fails=([1], [2])), 2, asked)


def test_all_requests_of_a_turn_are_there_before_its_first_step(benchmark, policy, tmp_path):
    settings = config(benchmark, policy, tmp_path, batches=(6,), new_tokens=4)
    model, tokenizer = benchmark.load(settings)
    asked = benchmark.turn_of(
        settings, 6, 0, benchmark.prompts_from(settings, model, tokenizer), seeded=True
    )
    sizes, step = [], HFEngine._step

    class Noted(HFEngine):
        def _step(self):
            sizes.append(len(self._queue) + len(self._active))
            step(self)

    engines_module = importlib.import_module("speculative_engines")
    with contextlib.closing(Noted(model, max_batch=4)) as engine:
        got = engines_module.answers_together(engine, asked)
        assert sizes[0] == len(asked) == len(got)
        refused = [asked[0], ([], asked[0][1])]
        with pytest.raises(EmptyBatchError):
            engines_module.answers_together(engine, refused)
        assert engine.submit(*asked[0]).result(timeout=30).response_tokens  # it is not paused


def test_engines_of_a_batch_are_gone_before_those_of_the_next(
    monkeypatch, benchmark, policy, tmp_path
):
    made = []

    class Noted(HFEngine):
        def __init__(self, model, *, max_batch, **settings):
            assert all(size == max_batch for size, one in made if one() is not None)
            super().__init__(model, max_batch=max_batch, **settings)
            made.append((max_batch, weakref.ref(self)))

    monkeypatch.setattr(benchmark, "HFEngine", Noted)
    monkeypatch.setattr(importlib.import_module("speculative_engines"), "HFEngine", Noted)
    settings = config(benchmark, policy, tmp_path, batches=(1, 2), waves=1)
    model, tokenizer = benchmark.load(settings)
    prompts = benchmark.prompts_from(settings, model, tokenizer)
    list(benchmark.embedded(settings, model, benchmark.Eagle3Draft.from_target(model), prompts))
    gc.collect()
    assert [size for size, _ in made] == [2, *[1] * 5, *[2] * 5]
    assert all(one() is None for _, one in made)


def test_no_step_of_a_turn_has_a_new_shape(monkeypatch, benchmark, policy, tmp_path):
    """As on a GPU, with stand-ins for graphs."""
    pretend_graphs(monkeypatch)
    settings = config(benchmark, policy, tmp_path, batches=(20,), new_tokens=8)
    model, tokenizer = benchmark.load(settings)
    prompts = benchmark.prompts_from(settings, model, tokenizer)
    draft = benchmark.Eagle3Draft.from_target(model)
    chosen = []

    class Plain:
        def choose(self, batch, remaining=None):
            return 0

        def observe(self, stats):
            chosen.append(stats)

    controller = benchmark.WarmedUp(Plain(), range(3))
    engine = HFEngine(model, max_batch=20, draft=draft, draft_steps=2, controller=controller)
    benchmark.meet_shapes(prompts, settings.params, engine, 20)
    met = set(engine._memory._graphs.outputs)
    assert {(rows, width) for rows, _, width in met} >= {
        (r, w) for r in (16, 32) for w in (1, 2, 3)
    }
    assert not chosen  # the controller learns nothing of that
    for begin in (False, True):
        if begin:
            controller.begin()
        benchmark.answers(engine, 20, benchmark.turn_of(settings, 20, 0, prompts, seeded=True))
        assert set(engine._memory._graphs.outputs) == met
        assert bool(chosen) == begin
    engine.close()


def test_a_run_that_is_cut_off_leaves_the_rows_that_it_had(
    monkeypatch, benchmark, policy, tmp_path
):
    summaries = benchmark.summaries

    def ending(settings, batch, *rest):
        if batch == 3:
            raise KeyboardInterrupt
        return summaries(settings, batch, *rest)

    monkeypatch.setattr(benchmark, "summaries", ending)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(config(benchmark, policy, tmp_path, train_updates=1, waves=1))
    assert {row["batch"] for row in rows(tmp_path / "rows.csv")} == {"1"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"policy": Path("nowhere")}, "--policy is nowhere, where there is no folder"),
        ({"draft": Path("nowhere")}, "--draft is nowhere.*export_draft"),
        ({"waves": 0}, "--waves 0"),
        ({"repeats": 1}, "--repeats 1; expected .* 2 or more repeats"),
        ({"shortest": 0.0}, "--shortest 0.0"),
        ({"shortest": 1.5}, "--shortest 1.5"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    benchmark, policy, tmp_path, changes, text
):
    with pytest.raises(SystemExit, match=text):
        benchmark.main(config(benchmark, policy, tmp_path, **changes))
