"""What recording and replaying the routing cost, beside the same work without.

    python benchmarks/routing.py --device cuda
    python benchmarks/routing.py --device cuda --parts train --micro-batches 5 --no-checkpointing
    python benchmarks/routing.py --tokens 512 --layers 2 --hidden 64 --moe-hidden 32 --repeats 2

The model is a Qwen3-MoE with random weights in bf16: 48 layers, 128 experts, top-8, 5.0 billion
parameters. It replays its own routing, so that the work of the experts is the same with and
without; what is compared runs in turns, in one process, in an order that rotates.

- `train`: forward and backward of the mean log-prob over 15 sequences of 2048 tokens, no optimizer
  (a whole step is longer, so a share of it is smaller). `prefetched` starts the copy of the next
  step's tape between forward and backward; `on the device` has no copy at all, so the two differ
  by what the overlap does not hide. `natural` also notes what the router would have chosen.
- `record`: a forward pass without gradients over the same tokens, as a rollout's prefill or a
  trainer's log-prob pass.
- `decode`: a whole rollout of `HFEngine` over as many tokens, half of them generated.
- `copy`: a tape to the device alone, waited for.

Times are from CUDA events between two waits for the device, so the host's work counts. The percent
is the median over repeats of the time over that of the first variant in the same turn.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from engine_throughput import current_commit
from torch import Tensor

from miles.losses import linear_logprobs
from miles.moe import RoutingReplay, RoutingTape
from miles.rollout import HFEngine, SamplingParams

Part = Literal["train", "record", "decode", "copy"]
VOCABULARY = 32_768
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """The cost of routing replay."""

    device: str = "cpu"
    """Where all runs."""
    parts: tuple[Part, ...] = ("train", "record", "decode", "copy")
    """What is measured."""
    tokens: int = 30_720
    """Tokens of a step."""
    layers: int = 48
    """Layers of the model, each with 128 experts."""
    hidden: int = 1024
    """Its width."""
    moe_hidden: int = 256
    """The width of an expert."""
    checkpointing: bool = True
    """Whether layers are run again in the backward pass; the whole step fits 80 GB only so."""
    micro_batches: int = 1
    """Parts that the training step is cut into."""
    repeats: int = 10
    """Turns that are timed, after two that are not; the rollouts have half as many."""
    out: Path = Path("benchmarks/results/routing.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def build(config: Config) -> Any:
    model_config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=config.hidden, intermediate_size=config.moe_hidden,
        moe_intermediate_size=config.moe_hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 64, num_key_value_heads=max(1, config.hidden // 256),
        head_dim=64,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model_config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(config.device):
            return transformers.Qwen3MoeForCausalLM(model_config)
    finally:
        torch.set_default_dtype(default)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds, and the peak of the device's memory in GiB (0 on a CPU)."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3, 0.0
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated() / 2**30


def in_turns(
    variants: dict[str, Callable[[], Any]],
    repeats: int,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, list[tuple[float, float]]]:
    """`timed` of each variant, `repeats` times; every turn begins with another one."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(repeats + WARM_UP):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            prepare()
            value = timed(variants[name])
            if turn >= WARM_UP:
                results[name].append(value)
        print(f"  turn {turn - WARM_UP + 1} of {repeats}", flush=True)
    return results


class Step:
    """Forward and backward passes over the micro-batches of one training step."""

    def __init__(self, config: Config, model: Any) -> None:
        self.model, self.replay = model, RoutingReplay(model)
        length = min(2048, config.tokens // 2)
        rows = config.tokens // length
        if rows % config.micro_batches:
            raise SystemExit(f"{rows} sequences do not make {config.micro_batches} micro-batches")
        generator = torch.Generator().manual_seed(1)
        ids_BL = torch.randint(VOCABULARY, (rows, length), generator=generator)
        self.batches = ids_BL.to(config.device).chunk(config.micro_batches)
        self.tapes: list[RoutingTape] = []
        model.eval()
        for ids in self.batches:
            with torch.no_grad(), self.replay.record() as tape:
                self.hidden(ids)
            self.tapes.append(tape)
        self.next_plan = self.replay.prefetch(self.tapes[0])
        self.plans = [self.replay.prefetch(tape) for tape in self.tapes]

    def hidden(self, ids_BL: Tensor) -> Tensor:
        return self.model.model(input_ids=ids_BL, use_cache=False).last_hidden_state

    def run(
        self,
        routing: Callable[[int], AbstractContextManager[Any]],
        meanwhile: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """The loss; gradients are left in the parameters."""
        total = torch.zeros((), device=self.batches[0].device)
        for index, ids_BL in enumerate(self.batches):
            with routing(index):
                hidden_TD = self.hidden(ids_BL).flatten(0, 1)
                targets_T = ids_BL.roll(-1, 1).flatten()
                logprobs_T = linear_logprobs(
                    hidden_TD, self.model.lm_head.weight, targets_T
                ).logprobs
                loss = -logprobs_T.mean() / len(self.batches)
                meanwhile(index)
                loss.backward()
            total += loss.detach()
        return total

    def forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def prefetch_next(self, index: int) -> None:
        self.next_plan = self.replay.prefetch(self.tapes[(index + 1) % len(self.tapes)])

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        replay = self.replay.replay
        return {
            "without": lambda: self.run(lambda _: contextlib.nullcontext()),
            "replay": lambda: self.run(lambda i: replay(self.tapes[i])),
            "replay, prefetched": lambda: self.run(
                lambda _: replay(self.next_plan), self.prefetch_next
            ),
            "replay, on the device": lambda: self.run(lambda i: replay(self.plans[i])),
            "replay, natural": lambda: self.run(
                lambda i: replay(self.tapes[i], record_natural=True)
            ),
        }


def train(config: Config, model: Any) -> dict[str, list[tuple[float, float]]]:
    step = Step(config, model)
    model.train()
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    variants = step.variants()
    losses = {name: float(run()) for name, run in variants.items()}
    print("  loss of each variant:", losses, flush=True)
    largest = max(abs(loss - losses["without"]) for loss in losses.values())
    assert largest < 1e-3, "the replayed routing is not the model's own"
    try:
        return in_turns(variants, config.repeats, step.forget_gradients)
    finally:
        step.forget_gradients()
        if config.checkpointing:
            model.gradient_checkpointing_disable()


@torch.no_grad()
def record(config: Config, model: Any) -> dict[str, list[tuple[float, float]]]:
    step = Step(config, model)

    def without() -> None:
        for ids_BL in step.batches:
            step.hidden(ids_BL)

    def recorded() -> None:
        for ids_BL in step.batches:
            with step.replay.record():
                step.hidden(ids_BL)

    return in_turns({"without": without, "record": recorded}, config.repeats)


def decode(config: Config, model: Any) -> dict[str, list[tuple[float, float]]]:
    requests = min(64, max(2, config.tokens // 128))
    each = config.tokens // requests
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(VOCABULARY, (requests, each // 2), generator=generator).tolist()
    params = [
        SamplingParams(max_new_tokens=each - each // 2, seed=seed, ignore_eos=True)
        for seed in range(requests)
    ]

    def rollout(engine: HFEngine) -> None:
        futures = [engine.submit(p, q) for p, q in zip(prompts, params, strict=True)]
        samples = [future.result() for future in futures]
        assert all((s.routing is not None) == engine.records_routing for s in samples)

    engines = {
        name: HFEngine(
            model, max_batch=requests, max_context=each + 16, eos_token_ids=(), record_routing=on
        )
        for name, on in {"without": False, "record": True}.items()
    }
    print(f"  {requests} requests, {each // 2} tokens of prompt, {each} in all", flush=True)
    try:
        variants = {name: lambda e=engine: rollout(e) for name, engine in engines.items()}
        return in_turns(variants, max(2, config.repeats // 2))
    finally:
        for engine in engines.values():
            engine.close()


def copy(config: Config, model: Any) -> dict[str, list[tuple[float, float]]]:
    step = Step(config, model)

    def prefetched() -> None:
        plans = [step.replay.prefetch(tape) for tape in step.tapes]
        synchronize()
        del plans

    megabytes = sum(tape.nbytes for tape in step.tapes) / 1e6
    print(f"  {megabytes:.1f} MB", flush=True)
    return in_turns({f"{megabytes:.1f} MB": prefetched}, config.repeats)


def main(config: Config) -> None:
    start = time.perf_counter()
    model = build(config)
    synchronize()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters", flush=True)
    common = environment(config.device, config.commit) | {
        "parameters": parameters, "layers": config.layers, "tokens": config.tokens,
        "micro_batches": config.micro_batches, "checkpointing": config.checkpointing,
    }  # fmt: skip
    measures = {"train": train, "record": record, "decode": decode, "copy": copy}
    for part in config.parts:
        print(f"{part}, after {time.perf_counter() - start:.0f} s", flush=True)
        results = measures[part](config, model)
        append(config.out, [common | {"part": part} | row for row in summaries(results)])


def summaries(results: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A row for each variant, and a line on the screen."""
    base = [ms for ms, _ in next(iter(results.values()))]
    rows = []
    for name, values in results.items():
        times = [ms for ms, _ in values]
        percents = [100 * (ms / b - 1) for ms, b in zip(times, base, strict=True)]
        ms, p20, p80 = spread(times)
        percent, percent_p20, percent_p80 = spread(percents)
        row = {
            "variant": name, "repeats": len(values),
            "ms": f"{ms:.3f}", "p20": f"{p20:.3f}", "p80": f"{p80:.3f}",
            "percent": f"{percent:.3f}",
            "percent_p20": f"{percent_p20:.3f}", "percent_p80": f"{percent_p80:.3f}",
            "peak_gib": f"{max(peak for _, peak in values):.3f}",
        }  # fmt: skip
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80."""
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), p20, p80


def environment(device: str, commit: str) -> dict[str, Any]:
    """When, where, with what."""
    on_gpu = device == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or current_commit(),
    }


def append(out: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV, below a header if it has none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
