"""GAE, group advantages and the whole elementwise loss beside verl's and TRL's own code.

    pip install --no-deps trl==1.16.0 verl==0.9.1
    python benchmarks/losses.py                  # CPU
    python benchmarks/losses.py --device cuda

The loss is GRPO's clip with token-level importance weights and the k3 penalty over a batch of
`[128, 8192]` in float32, a fifth of it masked (and `[2048, 8192]`, on a GPU), averaged over tokens,
with each library's own readings, forward and backward. TRL's and verl's read some of theirs back
(`.item()`) as part of it; that is how they are called. On a GPU, ours is timed as called and as a
replayed CUDA graph, beside its floor: the bytes it cannot avoid (each input once, the gradient
once) over the bandwidth of a large copy in the same run.
"""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rivals import Trl, Verl
from torch import Tensor

from miles import Packed, count
from miles.losses import gae, group_advantages, policy_loss, truncated_is, whiten

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Losses against verl and TRL."""

    device: str = "cpu"
    """Where all run."""
    repeats: int = 15
    """Timed runs of each, after three that are not."""
    num_threads: int = 2
    """CPU threads of all."""
    out: Path = Path("benchmarks/results/losses.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def timed(
    runs: dict[str, Callable[[], Any]], repeats: int, device: str, *, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, since a busy machine slows all; the device is waited for."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + warm):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= warm:
                values[name].append(time.perf_counter() - start)
    return values


def graphed(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of a call, as a CUDA graph of ten of them, by events."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            function()
    values = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        values.append(start.elapsed_time(end) / 10_000)
    return values[3:]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(graphed(lambda: target.copy_(source), 5))


def time_gae(config: Config, verl: Verl) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4096, 8193, (64,), generator=generator)
    mask_BL = (torch.arange(8192) < lengths[:, None]).to(config.device)
    rewards_BL = torch.randn(64, 8192, generator=generator).to(config.device)
    values_BL = torch.randn(64, 8192, generator=generator).to(config.device)
    packed = Packed.from_padded(mask_BL)
    long_mask = mask_BL.long()

    def ours() -> Tensor:
        advantages_T, _ = gae(
            rewards_BL.flatten(), values_BL.flatten(), packed, gamma=0.99, lam=0.95
        )
        return whiten(advantages_T, packed.mask_T)

    def theirs() -> Tensor:
        return verl.algos.compute_gae_advantage_return(
            rewards_BL, values_BL, long_mask, 0.99, 0.95
        )[0]

    difference = (ours().view(64, 8192) - theirs())[mask_BL].abs().max()
    assert float(difference) < 1e-3, float(difference)
    return {"miles": ours, verl.name: theirs}


def time_advantages(config: Config, verl: Verl) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    rewards_S = torch.randint(0, 2, (65536,), generator=generator).float().to(config.device)
    groups_S = (torch.arange(65536) // 8).to(config.device)
    index = groups_S.cpu().numpy().astype(np.int64)
    rewards_BL, mask_BL = rewards_S[:, None], torch.ones_like(rewards_S)[:, None]

    def ours() -> Tensor:
        return group_advantages(rewards_S, groups_S)

    def loop() -> Tensor:
        return verl.algos.compute_grpo_outcome_advantage(rewards_BL, mask_BL, index)[0]

    def vectorised() -> Tensor:
        return verl.algos.compute_grpo_vectorized_outcome_advantage(rewards_BL, mask_BL, index)[0]

    assert float((ours() - loop()[:, 0]).abs().max()) < 1e-4
    return {"miles": ours, verl.name: loop, f"{verl.name} (vectorised)": vectorised}


def time_loss(config: Config, verl: Verl, trl: Trl, num_seqs: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_seqs, 8192)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    old = -noise(1.0).abs()
    batch = [old + noise(0.1), old, old + noise(0.05), old + noise(0.2)]
    new, old, rollout, ref = (x.to(config.device) for x in batch)
    mask = (torch.rand(shape, generator=generator) < 0.8).to(config.device)
    advantages_S = torch.randn(shape[0], generator=generator).to(config.device)
    packed = Packed.from_padded(mask)
    denominators = count(packed)
    num_tokens = int(denominators.num_tokens)
    correction = truncated_is(old.flatten(), rollout.flatten(), packed)
    weights = correction.weights_T.view(shape)
    flat = [x.flatten() for x in (new, old, ref)]
    advantages_T = packed.per_token(advantages_S)
    advantages = advantages_T.view(shape).contiguous()
    float_mask = mask.float()

    def ours(backend: str) -> Tensor:
        leaf = flat[0].detach().requires_grad_()
        loss, _ = policy_loss(
            leaf, flat[1], advantages_T, packed, denominators, correction=correction,
            ref_logprobs_T=flat[2], kl_coef=0.04, backend=backend,
        )  # fmt: skip
        loss.backward()
        return leaf.grad

    def theirs(rival: Any) -> Tensor:
        leaf = new.detach().requires_grad_()
        loss = rival.policy_loss(
            leaf, old, advantages, float_mask, weights=weights, ref=ref, kl_coef=0.04,
            num_tokens=num_tokens,
        )  # fmt: skip
        loss.backward()
        return leaf.grad.flatten()

    runs = {f"miles ({b})": lambda b=b: ours(b) for b in backends(config.device)}
    runs |= {rival.name: lambda rival=rival: theirs(rival) for rival in (verl, trl)}
    # Threads of a compiled CPU kernel spin on for a while, which would slow whoever comes next.
    runs["miles (compiled)"] = runs.pop("miles (compiled)")
    expected = ours("reference")
    for name, run in runs.items():
        gap = float((run() - expected).norm() / expected.norm())
        assert gap < 1e-5, (name, gap)
    return runs


def backends(device: str) -> list[str]:
    return ["reference", "compiled", "triton" if device == "cuda" else "chunked"]


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    verl, trl = Verl(), Trl()
    tasks = {
        "GAE, 64 x 8192": time_gae(config, verl),
        "group advantages, 65536 samples": time_advantages(config, verl),
        "policy loss, 1M tokens": time_loss(config, verl, trl, 128),
    }
    on_gpu = config.device == "cuda"
    if on_gpu:
        tasks["policy loss, 16M tokens"] = time_loss(config, verl, trl, 2048)
        bandwidth = copy_bandwidth()
    results = []
    for task, runs in tasks.items():
        times = timed(runs, config.repeats, config.device)
        for name, run in runs.items():
            results.append((task, name, times[name]))
            if name == "miles (triton)":
                results.append((task, "miles (triton, CUDA graph)", graphed(run, config.repeats)))
        if on_gpu and task.startswith("policy loss"):
            # 5 float inputs, mask and keep of one byte, and the gradient.
            floor = (2**24 if "16M" in task else 2**20) * (6 * 4 + 2) / bandwidth
            results.append((task, "floor: bytes / copy bandwidth", [floor] * 2))
    report(config, results)


def report(config: Config, results: list[tuple[str, str, list[float]]]) -> None:
    best = {task: statistics.median(v) for task, name, v in reversed(results) if "miles" in name}
    for task, name, values in results:
        median = statistics.median(values)
        print(f"{task:34} {name:28} {median * 1e3:9.3f} ms  x{median / best[task]:.1f}")
    write_rows(config, [(*result, {}) for result in results])


def write_rows(config: Any, rows: list[tuple[str, str, list[float], dict[str, str]]]) -> None:
    """Append task, library, seconds and other columns to the CSV."""
    from engine_throughput import current_commit

    cpu = f"{platform.machine()} CPU, {config.num_threads} threads"
    common = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if config.device == "cuda" else cpu,
        "torch": torch.__version__,
        "commit": config.commit or current_commit(),
    }
    new = not config.out.exists()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with config.out.open("a", newline="") as file:
        columns = [*common, "task", "library", "ms", "p20", "p80", *rows[0][3]]
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for task, name, values, extra in rows:
            p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
            seconds = {"ms": statistics.median(values), "p20": p20, "p80": p80}
            ms = {key: f"{value * 1e3:.4f}" for key, value in seconds.items()}
            writer.writerow(common | {"task": task, "library": name} | ms | extra)


if __name__ == "__main__":
    main(tyro.cli(Config))
