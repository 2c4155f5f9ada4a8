r"""A whole training step of a dense Qwen3 in each precision: forward, backward and optimizer.

    python benchmarks/precision_step.py --device cuda
    python benchmarks/precision_step.py --device cuda --mode compiled
    python benchmarks/precision_step.py --layers 2 --hidden 256 --intermediate 256 --tokens 512 \
        --length 128 --vocabulary 512 --repeats 2

The model has 1.5 billion parameters in bf16, float32 masters and AdamW; a step has 2 micro-batches
of 8192 tokens in sequences of 2048. The variants share the parameters, the gradients and the
optimizer, so all of them fit on one GPU; they run in turns, in one process, in an order that
rotates. Head and embeddings stay in bf16 everywhere. `percent` is against bf16 of the same mode.

- `fp8`: `BlockFP8()`, weight gradients in bf16; `fp8, wgrad fp8`: these in FP8 too.
- `int4, 32` and `int4, 128`: rounded weights, groups of that size.
- `torchao rowwise`: `convert_to_float8_training` with that recipe; `torchao blockwise`: its
  prototype of the recipe of `fp8`.
- `--mode compiled` compiles every layer; torchao's are meant to be used so.

`rounding_ms` is what the first micro-batch of a step pays for new weights: all converted layers on
16 tokens after a step of some optimizer, less the same with what they keep. `fake_quantize_ms` is
`fake_quantize` of all these weights, one by one, without search for NaN. Compiled layers round in
every micro-batch, inside of their graph, and `rounding_ms` is left empty.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
import transformers
import tyro
from fp8_linear import torchao as torchao_blockwise
from fp8_linear import works
from precision_curves import MasterAdamW
from routing import WARM_UP, append, environment, in_turns, summaries, synchronize, timed
from torch import Tensor, nn

from miles.losses import linear_logprobs
from miles.precision import (
    BlockFP8,
    Int4,
    Recipe,
    convert_,
    fake_quantize,
    quantized_parameters,
)

RECIPES: dict[str, Recipe] = {
    "fp8": BlockFP8(),
    "fp8, wgrad fp8": BlockFP8(wgrad="fp8"),
    "int4, 32": Int4(group_size=32),
    "int4, 128": Int4(group_size=128),
}
RIVALS = ("torchao rowwise", "torchao blockwise")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training step in each precision."""

    device: str = "cpu"
    """Where all runs."""
    mode: Literal["eager", "compiled"] = "eager"
    """Whether layers are compiled."""
    variants: tuple[str, ...] = (*RECIPES, *RIVALS)
    """What is compared with bf16."""
    tokens: int = 16_384
    """Tokens of a step."""
    micro_batches: int = 2
    """Parts that it is cut into."""
    length: int = 2048
    """Tokens of a sequence."""
    hidden: int = 2048
    """Width of the model."""
    layers: int = 28
    """Its layers."""
    intermediate: int = 6144
    """Width of its MLPs."""
    vocabulary: int = 32_768
    """Tokens there are; the head is in bf16 whatever the variant."""
    profile: bool = False
    """Print how long host and GPU are busy with a step, and by what; write no CSV."""
    repeats: int = 10
    """Turns that are timed, after two that are not."""
    out: Path = Path("benchmarks/results/precision_step.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def build(config: Config) -> Any:
    model_config = transformers.Qwen3Config(
        vocab_size=config.vocabulary, hidden_size=config.hidden,
        intermediate_size=config.intermediate, num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.hidden // 128),
        num_key_value_heads=max(1, config.hidden // 256), head_dim=128, tie_word_embeddings=True,
        eos_token_id=None, bos_token_id=None, pad_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(config.device):
            return transformers.Qwen3ForCausalLM(model_config)
    finally:
        torch.set_default_dtype(default)


def variant(model: Any, name: str) -> Any | None:
    """The same model in another precision, on the same parameters; None where it can't be had."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    other = copy.deepcopy(model, shared)
    if name in RECIPES:
        report = convert_(other, [("*", RECIPES[name])])
        print(f"{name}: {report.table().splitlines()[-1]}", flush=True)
        return other
    try:
        return {"torchao rowwise": rowwise, "torchao blockwise": blockwise}[name](other)
    except Exception as error:  # of a rival; the row is left out and named
        print(f"without {name}: {type(error).__name__}: {error}", flush=True)
        return None


def rowwise(model: Any) -> Any:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("rowwise"),
        module_filter_fn=lambda module, name: name != "lm_head",
    )


def blockwise(model: Any) -> Any | None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = torchao_blockwise(module.weight)
            if layer is None:
                return None
            layer.weight = module.weight  # not a parameter of its own: the optimizer has this one
            model.set_submodule(name, layer)
    return model


class Step:
    """One training step of any model on the optimizer's parameters."""

    def __init__(self, config: Config, model: Any) -> None:
        self.optimizer = MasterAdamW(model.parameters(), lr=1e-6)
        rows = config.tokens // config.length
        if rows % config.micro_batches or rows * config.length != config.tokens:
            raise SystemExit(f"{rows} sequences of {config.length} tokens don't make the step")
        generator = torch.Generator().manual_seed(1)
        ids_BL = torch.randint(config.vocabulary, (rows, config.length), generator=generator)
        self.batches = ids_BL.to(config.device).chunk(config.micro_batches)

    def gradients(self, model: Any) -> Tensor:
        """The loss; gradients are left in the parameters."""
        total = torch.zeros((), device=self.batches[0].device)
        for ids_BL in self.batches:
            hidden_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
            targets_T = ids_BL.roll(-1, 1).flatten()
            out = linear_logprobs(hidden_BLD.flatten(0, 1), model.lm_head.weight, targets_T)
            loss = -out.logprobs.mean() / len(self.batches)
            loss.backward()
            total += loss.detach()
        return total

    def run(self, model: Any) -> Tensor:
        loss = self.gradients(model)
        self.optimizer.step()
        return loss

    def forget_gradients(self) -> None:
        for parameter in self.optimizer.parameters:
            parameter.grad = None


@torch.no_grad()
def rounding(model: Any, repeats: int) -> dict[str, str]:
    """Milliseconds that rounding all weights takes, as the model does it and as one kernel each."""
    found = list(quantized_parameters(model))
    if not found:
        return {"rounding_ms": "", "fake_quantize_ms": ""}
    inputs = {
        q.parameter.shape[1]: torch.randn(16, q.parameter.shape[1]).to(q.parameter) for q in found
    }

    def layers() -> None:
        for q in found:
            q.module(inputs[q.parameter.shape[1]])

    def fake() -> None:
        for q in found:
            fake_quantize(q.parameter, q.recipe)

    differences, kernels = [], []
    # Of an optimizer of nothing: to converted layers any step means that their weights are new.
    new_weights = torch.optim.SGD([nn.Parameter(torch.zeros(1))]).step
    for _ in range(repeats + 2):
        new_weights()
        cold = timed(layers)[0]
        differences.append(cold - timed(layers)[0])
        kernels.append(timed(fake)[0])
    weights_only = isinstance(found[0].recipe, Int4)
    return {
        "rounding_ms": f"{statistics.median(differences[2:]):.3f}",
        "fake_quantize_ms": f"{statistics.median(kernels[2:]):.3f}" if weights_only else "",
    }


def models(config: Config, model: Any) -> dict[str, Any]:
    """Name to a model, bf16 first, all on the parameters of one."""
    found = {"bf16": model}
    for name in config.variants:
        other = variant(model, name)
        if other is not None:
            found[name] = other
    if config.mode == "compiled":
        # Every variant compiles the same function, Qwen3's layer; past the limit it runs eagerly.
        torch._dynamo.config.recompile_limit = 64
        for other in found.values():
            for layer in other.model.layers:
                layer.compile()
    return found


def graphs_and_breaks() -> tuple[int, int]:
    """Graphs that were compiled up to now, and breaks between them."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def profile(step: Step, name: str, model: Any) -> None:
    """Host and whole time of a step, and what it consists of, by operator and kernel."""
    for _ in range(WARM_UP):
        step.run(model)
    synchronize()
    start = time.perf_counter()
    step.run(model)
    host = time.perf_counter() - start
    synchronize()
    total = time.perf_counter() - start
    with torch.profiler.profile() as profiler:
        step.run(model)
        synchronize()
    print(f"{name}: {total * 1e3:.1f} ms, the host {host * 1e3:.1f} ms of them", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for clock in dict.fromkeys((device, "cpu")):
        print(profiler.key_averages().table(sort_by=f"self_{clock}_time_total", row_limit=25))


def main(config: Config) -> None:
    if unknown := set(config.variants) - {*RECIPES, *RIVALS}:
        raise SystemExit(f"{sorted(unknown)}; expected some of {[*RECIPES, *RIVALS]}")
    model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters, {config.mode}", flush=True)
    step = Step(config, model)
    found = models(config, model)
    if config.profile:
        for name, other in found.items():
            profile(step, name, other)
        return
    losses: dict[str, float] = {}

    def first(name: str, other: Any) -> None:
        start, graphs = time.perf_counter(), graphs_and_breaks()
        losses[name] = float(step.gradients(other))
        seconds = time.perf_counter() - start
        more = [now - then for now, then in zip(graphs_and_breaks(), graphs, strict=True)]
        what = f"loss {losses[name]:.4f}, {seconds:.1f} s, {more[0]} graphs, {more[1]} breaks"
        print(f"  {name}: {what}", flush=True)

    running = {}
    for name, other in found.items():
        if works(name, functools.partial(first, name, other)):
            running[name] = other
        step.forget_gradients()
    away = {name: loss for name, loss in losses.items() if abs(loss / losses["bf16"] - 1) > 0.02}
    assert not away, f"bf16 has {losses['bf16']}, these do not compute the same model: {away}"

    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(step.run, other) for name, other in running.items()
    }
    results = in_turns(calls, config.repeats)
    common = environment(config.device, config.commit) | {
        "parameters": parameters, "vocabulary": config.vocabulary, "tokens": config.tokens,
        "micro_batches": config.micro_batches, "mode": config.mode,
    }  # fmt: skip
    rows = []
    for row in summaries(results):
        other = running[row["variant"]]
        nothing = {"rounding_ms": "", "fake_quantize_ms": ""}
        extra = rounding(other, config.repeats) if config.mode == "eager" else nothing
        share = float(extra["rounding_ms"]) / float(row["ms"]) if extra["rounding_ms"] else None
        extra["rounding_percent"] = "" if share is None else f"{100 * share:.3f}"
        print(f"  {row['variant']}: {extra}", flush=True)
        rows.append(common | row | {"loss": f"{losses[row['variant']]:.5f}"} | extra)
    append(config.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
