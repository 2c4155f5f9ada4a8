"""The benchmarks that need a GPU or an engine, at tiny size on the CPU."""

import csv
import importlib
import math
from pathlib import Path

import pytest
import torch

from miles.errors import CheckpointError
from miles.precision import convert_
from miles.rollout import Sample

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def tiny_curves(curves, folder, **changes):
    return curves.Config(
        hidden=128, layers=1, intermediate=128, moe_layers=1, moe_intermediate=128, num_experts=2,
        topk=1, batch=2, length=32, steps=2, short_steps=1, learning_rates=(1e-3,), commit="x",
        out=folder / "curves.csv", **changes,
    )  # fmt: skip


def test_masters_keep_what_bf16_would_lose(benchmark):
    optimizer_of = benchmark("precision_curves").MasterAdamW
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optimizer_of([weight], lr=1e-3)
    for _ in range(8):  # each step is 1e-3, and bf16 has no number between 1 and 1 - 2**-8
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(optimizer.masters[0].detach(), torch.full((4,), 0.992))
    assert torch.equal(weight, torch.full((4,), 0.992).bfloat16())


def test_the_distance_is_of_the_last_steps(benchmark):
    curves = benchmark("precision_curves")
    losses = [9.0] + [2.02, 1.98] * (curves.LAST // 2)
    assert curves.distance(losses, [1.0] + [2.0] * curves.LAST) == pytest.approx(0.01)


def test_the_learning_rate_rises_and_falls_to_a_tenth(benchmark):
    schedule = benchmark("precision_curves").schedule
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == 1 / 20 and rates[19] == rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[-1] == pytest.approx(0.1, 0.01)


@pytest.mark.parametrize(("name", "precision"), [("dense", "fp8"), ("moe", "int4")])
def test_what_a_curve_saves_is_served_bit_for_bit(
    benchmark, monkeypatch, tmp_path, name, precision
):
    curves, sglang = benchmark("precision_curves"), benchmark("precision_sglang")
    config = tiny_curves(
        curves, tmp_path, models=(name,), precisions=("bf16", precision), save=tmp_path / "models"
    )
    curves.main(config)
    losses = [row for row in rows(config.out) if row["run"] == "curve"]
    assert [(row["precision"], row["step"]) for row in losses] == [
        (p, str(step)) for p in ("bf16", precision) for step in range(2)
    ]
    summary = rows(curves.summary_path(config.out))
    assert all(row["finite"] == "True" and float(row["held_out"]) > 0 for row in summary)
    assert [bool(row["distance"]) for row in summary] == [False, True] * 2
    assert config.out.with_suffix(".png").stat().st_size > 0

    def answers(config, folder, prompts):
        assert ("--quantization" in sglang.server_flags(config)) == (precision == "fp8")
        samples = [Sample(tokens=prompt) for prompt in prompts]
        for sample in samples:
            sample.append([65, 66], logprobs=[-1.0, -2.0], weight_version=0)
        return samples

    monkeypatch.setattr(sglang, "answers_of", answers)
    folder = tmp_path / "models" / f"{name}-{precision}"
    keywords = {"device": "cpu", "recipe": precision, "prompts": 2, "profiles": ("te",)}
    keywords |= {"out": tmp_path / "gap.csv", "commit": "x", "rounded": folder}
    sglang.main(sglang.Config(model=Path(f"{folder}-master"), **keywords))
    found = rows(tmp_path / "gap.csv")
    assert [row["trainer"].split(",")[0] for row in found] == ["bf16", precision.upper()]
    assert all(row["weights"] == f"{name}-{precision}-master" for row in found)
    assert all(math.isfinite(float(row["mean"])) for row in found)
    with pytest.raises(CheckpointError, match="differs from what the model computes with"):
        sglang.main(sglang.Config(model=tmp_path / "models" / f"{name}-bf16", **keywords))


def test_variants_of_a_step_share_their_parameters(benchmark, tmp_path):
    step = benchmark("precision_step")
    config = step.Config(
        hidden=128, layers=1, intermediate=128, vocabulary=128, tokens=64, length=32, repeats=2,
        variants=("fp8", "int4, 32"), out=tmp_path / "step.csv", commit="x",
    )  # fmt: skip
    model = step.build(config)
    found = step.models(config, model)
    own = [id(parameter) for parameter in model.parameters()]
    assert all([id(p) for p in other.parameters()] == own for other in found.values())
    with pytest.raises(ValueError, match="already"):
        convert_(found["fp8"], [("*", step.RECIPES["fp8"])])
    step.main(config)
    measured = {row["variant"]: row for row in rows(config.out)}
    assert list(measured) == ["bf16", "fp8", "int4, 32"]
    assert [bool(row["rounding_percent"]) for row in measured.values()] == [False, True, True]
