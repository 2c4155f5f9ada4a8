"""What a draft that learns online adds to the policy's training step.

    python benchmarks/draft_cost.py
    python benchmarks/draft_cost.py --device cuda --hidden 2048 --sequences 8 --length 2048 \
        --vocabulary 32768 --draft-vocabulary 16384
    python benchmarks/draft_cost.py --device cuda ... --profile  # where the draft's time goes

The policy is a Llama with random weights, 32 layers by default, in bf16 on a GPU and float32 on a
CPU; its step is forward and backward passes over micro-batches, with gradient checkpointing or
without, and AdamW. The draft is a fresh EAGLE-3 one in float32, under bf16 autocast on a GPU. A
variant is the whole step: `policy` without a draft; `capture` with the hooks only; `K steps of S`
with `DraftTrainer` and its optimizer besides, by the number of unrolled steps and the share of the
sequences that it learns from. Responses are what is not prompt. All run in turns, in one process,
in an order that rotates; percent is the median over turns of the time over `policy`'s in the same
turn, flop_percent what the matrix products alone come to. On a CPU time is the process's own, on
one thread, so that other work on the machine counts for little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from routing import WARM_UP, append, environment, summaries, timed
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from miles.losses import token_logprobs
from miles.rollout.speculative import DraftTrainer, Eagle3Draft


@dataclass(frozen=True, kw_only=True)
class Config:
    """The cost of an online draft."""

    device: str = "cpu"
    """Where all runs."""
    layers: int = 32
    """Layers of the policy."""
    hidden: int = 256
    """Its width."""
    vocabulary: int = 4096
    """Its vocabulary."""
    draft_vocabulary: int = 0
    """The draft's, of which the head is its own; 0 for the policy's."""
    sequences: int = 8
    """Sequences of a step."""
    length: int = 128
    """Tokens of each."""
    prompt: float = 0.25
    """Share of them that is prompt."""
    micro_batches: int = 2
    """Parts that the step is cut into."""
    steps: tuple[int, ...] = (3,)
    """Unrolled steps of the draft."""
    shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the sequences that the draft learns from."""
    checkpointing: bool = False
    """Whether the policy's layers are run again in the backward pass."""
    profile: bool = False
    """Print the operators and kernels that the first trainer adds, and time nothing."""
    repeats: int = 10
    """Turns that are timed, after two that are not."""
    out: Path = Path("benchmarks/results/draft_cost.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def build(config: Config) -> Any:
    heads = max(1, config.hidden // 64)
    model_config = transformers.LlamaConfig(
        vocab_size=config.vocabulary, hidden_size=config.hidden,
        intermediate_size=config.hidden * 7 // 2, num_hidden_layers=config.layers,
        num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=config.length, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    with torch.device(config.device):
        model = transformers.LlamaForCausalLM(model_config).to(dtype)
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Step:
    """The policy's step, and what a draft adds."""

    def __init__(self, config: Config, policy: Any) -> None:
        self.policy, self.config = policy, config
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
        generator = torch.Generator().manual_seed(1)
        shape = (config.sequences, config.length)
        ids_BL = torch.randint(config.vocabulary, shape, generator=generator).to(config.device)
        mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        mask_BL[:, : int(config.prompt * config.length) - 1] = False
        mask_BL[:, -1] = False
        self.batches = [
            (ids, mask)
            for ids, mask in zip(
                ids_BL.chunk(config.micro_batches), mask_BL.chunk(config.micro_batches), strict=True
            )
        ]
        self.num_tokens = int(mask_BL.sum())

    def trainer(self, steps: int, share: float) -> DraftTrainer:
        ids = None
        if self.config.draft_vocabulary:
            ids = torch.arange(self.config.draft_vocabulary, device=self.config.device)
        draft = Eagle3Draft.from_target(self.policy, target_ids=ids, dtype=torch.float32)
        weights = sum(p.numel() for p in draft.parameters()) * steps * share
        size = weights / self.policy.num_parameters()
        print(f"  {steps} steps of {share:.0%}: {size:.1%} of the policy's parameters")
        autocast = torch.bfloat16 if self.config.device == "cuda" else None
        return DraftTrainer(draft, self.policy, steps=steps, share=share, autocast=autocast)

    def run(self, trainer: DraftTrainer | None, *, learn: bool = True) -> None:
        for ids_BL, mask_BL in self.batches:
            if trainer is None:
                logits_BLV = self.policy(ids_BL, use_cache=False).logits
            else:
                with trainer.capture(mask_BL):
                    logits_BLV = self.policy(ids_BL, use_cache=False).logits
            targets_BL = torch.where(mask_BL, ids_BL.roll(-1, 1), -100)
            logprobs_T = token_logprobs(logits_BLV.flatten(0, 1), targets_BL.flatten())
            (-logprobs_T.sum() / self.num_tokens).backward()
            del logits_BLV, logprobs_T
            if trainer is not None and learn:
                trainer.observe()
            elif trainer is not None:
                trainer.discard()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if trainer is not None and learn:
            trainer.step()


def in_turns(
    variants: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds and GiB of each variant, turn by turn."""
    clock = timed if torch.cuda.is_available() else of_process
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(repeats + WARM_UP):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = clock(variants[name])
            if turn >= WARM_UP:
                results[name].append(value)
        print(f"  turn {turn - WARM_UP + 1} of {repeats}", flush=True)
    return results


def of_process(run: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds that this process was running."""
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3, 0.0


def profile(policy: Callable[[], None], trained: Callable[[], None]) -> None:
    """What the trained step adds to the policy's, by kernel, or on a CPU by operator."""
    tables: list[dict[str, tuple[float, int]]] = []
    for run in (policy, trained):
        for _ in range(WARM_UP):
            run()
        with torch.profiler.profile() as profiler:
            run()
        on_gpu = torch.cuda.is_available()
        clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        tables.append({
            event.key: (getattr(event, clock) / 1e3, event.count)
            for event in profiler.key_averages()
            if (event.device_type == DeviceType.CUDA) == on_gpu and not event.is_user_annotation
        })  # fmt: skip
    without, with_draft = tables
    added = {
        name: (ms - without.get(name, (0.0, 0))[0], count - without.get(name, (0.0, 0))[1])
        for name, (ms, count) in with_draft.items()
    }
    for name, (ms, count) in sorted(added.items(), key=lambda item: -item[1][0])[:60]:
        print(f"  {ms:9.3f} ms {count:6d} x  {name[:150]}")
    print(f"  {sum(ms for ms, _ in added.values()):9.3f} ms in all")


def flops_of(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main(config: Config) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    policy = build(config)
    step = Step(config, policy)
    parameters = policy.num_parameters()
    print(f"{parameters / 1e6:.1f} million parameters", flush=True)
    trainers = {
        (steps, share): step.trainer(steps, share)
        for steps in config.steps
        for share in config.shares
    }
    first = next(iter(trainers.values()))
    variants: dict[str, Callable[[], None]] = {
        "policy": lambda: step.run(None),
        "capture": lambda: step.run(first, learn=False),
    }
    for (steps, share), trainer in trainers.items():
        variants[f"{steps} steps of {share:.0%}"] = lambda t=trainer: step.run(t)
    if config.profile:
        profile(variants["policy"], list(variants.values())[2])
        return
    flops = {name: flops_of(run) for name, run in variants.items()}
    results = in_turns(variants, config.repeats)
    common = environment(config.device, config.commit) | {
        "parameters": parameters, "layers": config.layers, "hidden": config.hidden,
        "vocabulary": config.vocabulary, "draft_vocabulary": config.draft_vocabulary,
        "sequences": config.sequences, "length": config.length, "prompt": config.prompt,
        "micro_batches": config.micro_batches, "checkpointing": config.checkpointing,
    }  # fmt: skip
    rows = []
    for row in summaries(results):
        percent = 100 * (flops[row["variant"]] / flops["policy"] - 1)
        print(f"  {row['variant']}: {percent:.2f} % more FLOPs")
        rows.append(common | row | {"flop_percent": f"{percent:.3f}"})
    append(config.out, rows)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
