"""What examples/fp8_rl.py and examples/int4_qat.py promise, two steps long."""

import csv
import functools
import shutil
from pathlib import Path

import pytest
import torch
import tyro

from miles.precision import BlockFP8, Int4
from miles.precision.exporting import export

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = [
    "--num-steps=2", "--num-prompts=8", "--num-updates=2", "--num-epochs=1", "--warmup-steps=4",
    "--num-held-out=4",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def examples():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        # The loop asks for two; tests that run side by side only wait for each other then.
        patch.setattr(torch, "set_num_threads", lambda _: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs an example once: its folder and the rows of its CSV."""

    @functools.cache
    def one(name: str) -> tuple[Path, list[dict[str, str]]]:
        out = tmp_path_factory.mktemp(name)
        return out, run(name, out)

    return one


def run(name: str, out: Path, *flags: str) -> list[dict[str, str]]:
    if name == "fp8_rl":
        from fp8_rl import Fp8Config as Config
        from fp8_rl import main
    else:
        from int4_qat import Int4Config as Config
        from int4_qat import main
    main(tyro.cli(Config, args=[f"--out={out}", *SMALL, *flags]))
    with (out / "mismatch.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["fp8_rl", "int4_qat"])
def test_rounding_in_the_trainer_too_takes_the_mismatch_away(name, finished):
    out, rows = finished(name)
    assert [(row["way"], row["step"]) for row in rows] == [
        (way, step) for way in ("bf16", "engine only", "both") for step in "01"
    ]
    bf16, engine_only, both = (
        [float(row["mismatch_abs"]) for row in rows[start : start + 2]] for start in (0, 2, 4)
    )
    assert min(engine_only) > 1e-3
    assert max(both) < min(engine_only) / 10
    assert min(both) < 3 * max(bf16)  # a step in which no code of an activation flipped
    # Before the first update both sample from the same rounded weights.
    assert rows[2]["reward"] == rows[4]["reward"]
    assert (out / "mismatch.png").stat().st_size > 1000


def test_resume_keeps_what_is_finished_and_makes_the_rest_the_same(finished, capsys):
    out, rows = finished("int4_qat")
    kept = (out / "engine_only" / "metrics.jsonl").read_text()
    shutil.rmtree(out / "both")
    assert run("int4_qat", out, "--resume") == rows
    assert (out / "engine_only" / "metrics.jsonl").read_text() == kept
    shown = capsys.readouterr().out
    assert "resumed at step 2" in shown and "trainer against engine" in shown


@pytest.mark.parametrize("recipe", [BlockFP8(), Int4()], ids=["fp8", "int4"])
def test_float32_trainer_and_bf16_engine_export_the_same_rounded_weights(recipe):
    from arithmetic import build_model
    from precision_ways import prepare

    trainer, engine = build_model(0, width=128), build_model(0, width=128).bfloat16()
    for model in (trainer, engine):
        prepare(model, attention="eager", recipe=recipe)
    rounded = dict(export(engine))
    for name, tensor in export(trainer):
        assert torch.equal(tensor.to(rounded[name].dtype), rounded[name])


def test_gradients_of_the_bf16_copies_reach_the_float32_weights():
    from arithmetic import build_model
    from precision_ways import in_bf16

    model = build_model(0)
    logits = in_bf16(model)(torch.arange(2, 8)[None]).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(weight.grad is not None for weight in model.parameters())
