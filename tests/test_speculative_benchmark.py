"""The benchmark of rollouts with a draft, at tiny size, with a stand-in in the server's place."""

import csv
import importlib
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from miles.rollout import Sample, SGLangServer
from miles.rollout.speculative import load_draft

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


def config(benchmark, policy, folder, **changes):
    settings = {
        "policy": policy, "batches": (1, 3), "draft_tokens": (1, 2), "new_tokens": 8, "repeats": 2,
        "train_updates": 2, "micro_batch_size": 2, "commit": "x", "out": folder / "rows.csv",
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
            draft_vocabulary=draft_vocabulary,
        )
    )  # fmt: skip
    found = rows(tmp_path / "rows.csv")
    own = [row for row in found if row["engine"] == "HFEngine"]
    names = ["plain", "1 draft tokens", "2 draft tokens", "off", "controller"]
    assert [(row["batch"], row["variant"]) for row in own] == [(b, n) for b in "13" for n in names]
    for row in own:
        assert int(row["tokens_per_second"]) > 0 and row["repeats"] == "2"
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
    assert tokenizer is None and cost.t_draft(1) > 0
    assert math.isfinite(cost.speedup(3, [0.5, 0.5]))
