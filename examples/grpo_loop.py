"""GRPO on a mixture-of-experts model, from a sloppy teacher to arithmetic, everything visible.

    python examples/grpo_loop.py                 # about three minutes on two CPU cores
    python examples/grpo_loop.py --no-r3 --no-tis
    python examples/grpo_loop.py --resume        # after Ctrl-C: the same numbers as without it

An engine in a process of its own samples in bfloat16, the trainer works in float32: a small case
of the gap that every RL system has between rollout and training. R3 replays the engine's experts
in the trainer, TIS weighs each token by how far the two disagree, and after every step the new
weights go to the engine through shared memory.

Expected: `held-out accuracy before RL: 0.2x`, and at the end `held-out accuracy after RL: 0.9x`.
In `--out`: metrics.jsonl, samples.jsonl, config.json, reward.png, checkpoints in HF format.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from arithmetic import ChainSum, build_model, build_tokenizer, warm_up
from rollouts import Rollouts, local_engine
from runlog import RunLog, load_checkpoint, save_checkpoint
from torch import Tensor

from miles import Packed, count
from miles.losses import (
    group_advantages,
    mismatch_metrics,
    presets,
    reduce_metrics,
    token_logprobs,
    truncated_is,
)
from miles.moe import RoutingReplay
from miles.rollout import Sample, SamplingParams, TrainBatch, collate


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO with R3 and TIS on a small mixture-of-experts model."""

    out: Path = Path("runs/grpo")
    """Folder of the run."""
    resume: bool = False
    """Go on from the last checkpoint in `out`; otherwise an old run there is replaced."""
    seed: int = 0
    """Decides initial weights, problems and every sampled token."""

    num_steps: int = 50
    """Rollout-and-train steps."""
    num_prompts: int = 256
    """Prompts per step."""
    num_samples_per_prompt: int = 4
    """Answers per prompt: the group whose rewards are compared."""
    num_updates: int = 4
    """Optimizer steps made of one rollout; each takes its share of the samples."""
    num_epochs: int = 4
    """Passes over one rollout; more than one leans on the clipped ratio."""
    micro_batch_size: int = 256
    """Samples per forward pass."""
    max_new_tokens: int = 4
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs that are trained on."""

    warmup_steps: int = 500
    """Supervised steps before RL, on a teacher's answers of which two in three are wrong."""
    warmup_learning_rate: float = 3e-3
    """AdamW, for the warm-up."""
    learning_rate: float = 5e-4
    """AdamW, for RL; falls linearly to a tenth."""
    weight_decay: float = 0.1
    """AdamW, for RL."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ratio_max: float = 1.28
    """Upper clip of the probability ratio; the lower one is 0.8."""

    r3: bool = True
    """Replay the engine's expert choices in the trainer."""
    tis: bool = True
    """Truncated importance sampling for the gap between trainer and engine."""
    tis_max: float = 2.0
    """Largest importance weight."""
    engine_process: bool = True
    """Run the engine in its own process, synced through shared memory."""
    max_batch: int = 256
    """Requests that the engine generates at once."""

    eval_every: int = 20
    """Steps between held-out evaluations."""
    num_held_out: int = 256
    """Held-out problems."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    device: str = "cpu"
    """Of trainer and engine."""


@dataclass
class Run:
    """What the functions below work on."""

    config: Config
    task: Any
    model: Any
    call: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    replay: RoutingReplay | None
    log: RunLog
    observe: Any
    rollouts: Rollouts = field(init=False)

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def decode(self, sample: Sample) -> str:
        return str(self.tokenizer.decode(sample.response_tokens, skip_special_tokens=True))


def train(
    config: Config, task: Any, model: Any, tokenizer: Any, *, call: Any = None,
    engine: Any = local_engine, observe: Any = None,
) -> None:  # fmt: skip
    """Everything from warm-up to the last evaluation.

    `call` computes the forward pass of RL if `model` itself doesn't; `engine` starts another engine
    than `local_engine`; `observe` adds readings of what was sampled, before the updates.
    """
    torch.set_num_threads(2)
    checkpoints = config.out / "checkpoints"
    model.to(config.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )  # fmt: skip
    step = load_checkpoint(checkpoints, model, optimizer) if config.resume else 0
    if not config.resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    replay = RoutingReplay(model) if config.r3 else None
    with RunLog(config.out, config, num_steps=config.num_steps, start=step) as log:
        run = Run(config, task, model, call or model, tokenizer, optimizer, replay, log, observe)
        if config.resume:
            log.say(f"resumed at step {step}")
        else:
            warm_up(
                model, tokenizer, task, num_steps=config.warmup_steps,
                learning_rate=config.warmup_learning_rate, log=log,
            )  # fmt: skip
            if log.stopped:
                return log.say("stopped during the warm-up: nothing to resume, start again")
            save_checkpoint(checkpoints, 0, model, tokenizer, optimizer)
        run.rollouts = Rollouts(model, engine, config, checkpoints / "step-000000", log)
        with closing(run.rollouts):
            run.rollouts.sync(step)
            if step == 0:
                log.start_accuracy = evaluate(run, step)
                log.say(f"held-out accuracy before RL: {log.start_accuracy:.2f}")
            while step < config.num_steps and not log.stopped:
                step = train_step(run, step)
                if step % config.checkpoint_every == 0 or step == config.num_steps or log.stopped:
                    save_checkpoint(checkpoints, step, model, tokenizer, optimizer)
            log.plot()
            if step < config.num_steps:
                log.say(f"stopped at step {step}; --resume goes on from there")
            else:
                log.say(f"held-out accuracy after RL: {evaluate(run, step):.2f}")


def train_step(run: Run, step: int) -> int:
    """Sample, score, correct, update, sync: the engine goes from version `step` to `step + 1`."""
    config, n = run.config, run.config.num_samples_per_prompt
    began = time.perf_counter()
    problems = [p for p in run.task.training(config.num_prompts, step) for _ in range(n)]
    samples = sample(run, problems, step, temperature=config.temperature, seed=step * 1_000_000)
    sampled = time.perf_counter()

    # Rewards, compared within the group of a prompt's answers.
    answers = [run.decode(s) for s in samples]
    for s, answer, problem in zip(samples, answers, problems, strict=True):
        s.reward = run.task.score(answer, problem)
    rewards_S = torch.tensor([s.reward for s in samples], device=config.device)
    group_ids_S = torch.arange(len(samples), device=config.device) // n
    advantages_S = group_advantages(rewards_S, group_ids_S)

    # An advantage of exactly 0 (a group of equal rewards) has no gradient: train on the others
    # only, and average over those, as DAPO's dynamic sampling does.
    useful = advantages_S.nonzero().flatten().cpu()
    share_useful = len(useful) / len(samples)
    useful = useful if len(useful) else torch.arange(len(samples))
    shares = [share.split(config.micro_batch_size) for share in useful.chunk(config.num_updates)]
    chunks = [chunk for share in shares for chunk in share]
    updates = torch.arange(len(chunks)).split([len(share) for share in shares])

    # The trainer's own log-probs before the first update, and weights for the gap to the engine's.
    micros = [collate([samples[i] for i in chunk]).to(config.device) for chunk in chunks]
    with torch.no_grad():
        old = [forward(run, micro) for micro in micros]
    rollout_T = torch.cat([micro.rollout_logprobs_T for micro in micros])
    whole = Packed.cat([micro.packed for micro in micros])
    readings = reduce_metrics(mismatch_metrics(torch.cat(old), rollout_T, whole))
    corrections: list[Any] = [None] * len(micros)
    if config.tis:
        correction = truncated_is(torch.cat(old), rollout_T, whole, high=config.tis_max)
        corrections = correction.split([micro.packed.num_positions for micro in micros])
        readings |= reduce_metrics(correction.metrics)
    readings |= run.observe(run, micros) if run.observe else {}

    # Updates. What a loss is divided by is counted over all micro-batches of its update.
    run.log.phase("training", len(micros))
    schedule = min(1, (step + 1) / 10) * (1 - 0.9 * step / config.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * schedule
    metrics, losses, norms = [], [], []
    for update in updates * config.num_epochs:
        denominators = count([micros[k].packed for k in update])
        run.optimizer.zero_grad()
        for k in update:
            packed = micros[k].packed
            loss, parts = presets.grpo(
                forward(run, micros[k]), old[k], packed.per_token(advantages_S[chunks[k]]), packed,
                denominators, ratio_max=config.ratio_max, correction=corrections[k],
            )  # fmt: skip
            loss.backward()
            metrics.append(parts)
            losses.append(loss.detach())
            run.log.advance()
        norms.append(torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm))
        run.optimizer.step()
    trained = time.perf_counter()
    synced = run.rollouts.sync(step + 1)

    num_tokens = sum(len(s.response_tokens) for s in samples)
    row = {
        "step": step,
        "reward": rewards_S.mean().item(),
        "accuracy": (rewards_S == 1).float().mean().item(),
        "loss": torch.stack(losses).sum().item() / len(norms),
        "grad_norm": torch.stack(norms).mean().item(),
        "response_tokens": num_tokens / len(samples),
        "useful": share_useful,
        **{name: value.item() for name, value in (readings | reduce_metrics(metrics)).items()},
        "time/sample": sampled - began,
        "time/train": trained - sampled,
        "time/sync": synced.seconds,
        **{f"time/sync/{phase}": seconds for phase, seconds in synced.phases.items()},
        "time/tokens_per_second": num_tokens / (sampled - began),
    }
    if (step + 1) % config.eval_every == 0:
        row["held_out"] = evaluate(run, step + 1)
    shown = range(0, len(samples), len(samples) // 4)
    run.log.step(row, [(problems[i].prompt, answers[i], rewards_S[i].item()) for i in shown])
    return step + 1


def forward(run: Run, batch: TrainBatch) -> Tensor:
    """Log-probs of the batch's targets, through the experts that the engine chose if R3 is on."""
    replaying: Any = nullcontext()
    if run.replay is not None:
        replaying = run.replay.replay(batch.routing, required_N=batch.routing_required_T)
    with replaying:
        logits_BLV = run.call(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    logits_TV = logits_BLV.flatten(0, 1)
    return token_logprobs(logits_TV, batch.targets_T, temperature=run.config.temperature)


def sample(
    run: Run, problems: list[Any], version: int, *, temperature: float, seed: int
) -> list[Sample]:
    """One answer for each problem, from the engine."""
    run.log.phase("sampling", len(problems))
    prompts = {problem.prompt: run.encode(problem.prompt) for problem in problems}
    params = SamplingParams(max_new_tokens=run.config.max_new_tokens, temperature=temperature)
    requests = [
        (prompts[problem.prompt], replace(params, seed=seed))
        for seed, problem in enumerate(problems, run.config.seed * 10**12 + seed)
    ]
    return run.rollouts.generate(requests, version)


def evaluate(run: Run, version: int) -> float:
    """Share of held-out problems whose greedy answer gets the full reward."""
    problems = run.task.held_out(run.config.num_held_out)
    samples = sample(run, problems, version, temperature=0.0, seed=0)
    pairs = zip(samples, problems, strict=True)
    return sum(run.task.score(run.decode(s), p) == 1 for s, p in pairs) / len(problems)


if __name__ == "__main__":
    import tyro

    config = tyro.cli(Config)
    train(config, ChainSum(config.seed), build_model(config.seed), build_tokenizer())
