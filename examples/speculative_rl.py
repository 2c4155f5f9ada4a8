"""RL with speculative rollouts: a draft that learns beside the policy, and one that doesn't.

    python examples/speculative_rl.py            # about ten minutes on two CPU cores
    python examples/speculative_rl.py --resume   # after Ctrl-C

The task is a sum with its running totals (`3+4-2=` is answered `7 5`), learnt from a teacher who is
sloppy at every total, and made right by GRPO. Before RL an EAGLE-3 draft learns the policy's
answers. Then the engine's draft goes on learning from the features and logits of the trainer's own
forward passes, while a copy stays as it is. Both propose tokens for a policy that moves away from
what they learnt first; what is sampled is the policy's in either case.

In `--out`: metrics.jsonl (`speculative/accept_length` and `frozen/accept_length`), acceptance.png,
reward.png, checkpoints of the policy, and of the draft in `draft/`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from arithmetic import ChainSum, Problem, build_model, build_tokenizer
from grpo_loop import Config, Run, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from miles.rollout import HFEngine, Sample, SamplingParams, TrainBatch, collate
from miles.rollout.speculative import AcceptanceStats, DraftTrainer, Eagle3Draft, export_draft
from miles.sync import InProcessSyncer, SyncReport


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(Config):
    """GRPO with an EAGLE-3 draft that learns online."""

    out: Path = Path("runs/speculative")
    """Folder of the run."""
    num_steps: int = 40
    """Rollout-and-train steps."""
    num_prompts: int = 128
    """Prompts per step."""
    num_epochs: int = 2
    """Passes over one rollout; the draft takes a step with each micro-batch."""
    micro_batch_size: int = 64
    """Samples per forward pass."""
    max_new_tokens: int = 20
    """Longest answer, in tokens."""
    learning_rate: float = 1e-3
    """AdamW, for RL; falls linearly to a tenth."""
    num_terms: int = 4
    """Numbers of a sum: one total fewer in the answer."""
    warmup_steps: int = 1200
    """Supervised steps before RL, on a teacher's answers with every second total one too high."""

    draft_steps: int = 4
    """Tokens that the draft proposes in a step of the engine."""
    unroll: int = 3
    """Steps of the draft's training-time test."""
    draft_learning_rate: float = 1e-3
    """AdamW, for the draft."""
    draft_warmup_updates: int = 300
    """Updates of the draft before RL, on the policy's answers of that time."""
    num_compared: int = 128
    """Prompts that the frozen draft speculates on after each step."""
    num_rewards: int = 1024
    """Answers with the draft, and as many without, that are compared at the end; a run that is done
    compares others with --resume."""


def terms_of(text: str) -> list[int]:
    """The numbers of a sum, with their signs: 3, 4 and -2 of `3+4-2=`."""
    return [int(term) for term in text.rstrip("=").replace("-", "+-").split("+") if term]


def answers_to(
    engine: Any, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Iterable[Any]
) -> list[Sample]:
    """One answer to each prompt, from an engine of ours; all start together, as in `Rollouts`."""
    pairs = zip(prompts, seeds, strict=False)
    asyncio.run(engine.pause())
    waiting = [engine.submit(prompt, replace(params, seed=seed)) for prompt, seed in pairs]
    asyncio.run(engine.resume())
    return [answer.result() for answer in waiting]


def train_draft(
    trainer: DraftTrainer, policy: Any, sampled: Callable[[int], list[Sample]], *,
    updates: int, micro_batch_size: int, device: str, seconds: float = math.inf,
) -> None:  # fmt: skip
    """Let a draft learn the answers of a policy that stays as it is.

    Args:
        trainer: the draft's.
        policy: whose hidden states and logits it learns from.
        sampled: gives so many fresh answers of the policy.
        updates: most steps of the draft's optimizer.
        micro_batch_size: answers of each.
        device: the policy's.
        seconds: after which no further step begins.
    """
    end = time.monotonic() + seconds
    for update in range(updates):
        if update % 10 == 0:
            answers = sampled(4 * micro_batch_size)
        picked = random.Random(update).sample(answers, micro_batch_size)
        batch = collate(picked).to(device)
        with trainer.capture(batch.packed), torch.no_grad():
            policy(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
        trainer.observe()
        metrics = trainer.step()
        last = update == updates - 1 or time.monotonic() > end
        if update % 50 == 0 or last:
            steps = [f"{v:.2f}" for k, v in metrics.items() if k.startswith("draft/acceptance")]
            print(f"draft update {update}: acceptance {' '.join(steps)}", flush=True)
        if last:
            return


class RunningTotals(ChainSum):
    """A chain of one-digit numbers, answered with every total on the way."""

    def totals(self, problem: Problem) -> list[int]:
        return list(accumulate(terms_of(problem.prompt)))[1:]

    def taught(self, problem: Problem, teacher: random.Random) -> str:
        """Every total is one too high half of the time."""
        return " ".join(str(total + teacher.choice([0, 1])) for total in self.totals(problem))

    def score(self, answer: str, problem: Problem) -> float:
        """The share of totals that are right, in their places."""
        expected = [str(total) for total in self.totals(problem)]
        given = answer.split(" ")
        right = sum(a == b for a, b in zip(given, expected, strict=False))
        return right / max(len(given), len(expected))


class Speculation:
    """The run's engine with its draft, that draft's trainer, and an engine to compare with.

    `target_ids` are the draft's vocabulary, if it has one of its own.
    """

    def __init__(
        self, config: SpeculativeConfig, task: ChainSum, model: Any, tokenizer: Any, *,
        target_ids: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._config, self._task, self._model, self._tokenizer = config, task, model, tokenizer
        self._folder = config.out / "draft"
        self._seeds = count(10**14)
        self._batches: dict[int, TrainBatch] = {}
        self._seen = AcceptanceStats()
        self._readings: dict[str, Any] = {}
        on_gpu = config.device == "cuda"
        self._dtype = torch.bfloat16 if on_gpu else torch.float32  # of the engines' drafts
        self.draft = Eagle3Draft.from_target(model.to(config.device), target_ids=target_ids)
        self.trainer = DraftTrainer(
            self.draft, model, lr=config.draft_learning_rate, steps=config.unroll, share=0.5,
            temperature=config.temperature, autocast=torch.bfloat16 if on_gpu else None,
        )  # fmt: skip

    def start(self, config: Any, model_dir: Path, _: str) -> tuple[HFEngine, Speculation]:
        """The engine, and ourselves to sync it; as `rollouts.local_engine`."""
        served = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        served = served.to(config.device)
        first = self._folder / "step-000000.pt"
        if not config.resume:
            self._warm_up(HFEngine(copy.deepcopy(served), max_batch=config.max_batch))
            self._save(first)
        state = torch.load(first, weights_only=True)["draft"]
        self._engines, self._drafts, self._syncers = [], [], []
        for _ in ("online", "frozen"):
            ids = self.draft.target_ids
            draft = Eagle3Draft.from_target(served, target_ids=ids, dtype=self._dtype)
            draft.load_state_dict(draft.state_dict() | state)  # a vocabulary is not in `state`
            engine = HFEngine(
                served, max_batch=config.max_batch, draft=draft, draft_steps=config.draft_steps
            )
            self._engines.append(engine)
            self._drafts.append(draft)
            self._syncers.append(InProcessSyncer(engine))
            served = copy.deepcopy(served)
        self._draft_syncer = InProcessSyncer(self._engines[0].draft_weights)
        return self._engines[0], self

    def push(self, weights: Any, *, version: int) -> SyncReport:
        """New weights for both engines, new ones of the draft for the first."""
        saved = self._folder / f"step-{version:06d}.pt"
        self._seeds = count(10**15 + version * 10**9)
        if self._config.resume and self.trainer.version == 0:
            self.trainer.load_state_dict(torch.load(saved, weights_only=True))
        weights = list(weights)
        report, _ = [syncer.push(weights, version=version) for syncer in self._syncers]
        self._draft_syncer.push(self.trainer.named_tensors(), version=self.trainer.version)
        if version:
            self._save(saved)
        return report

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def call(self, input_ids: Any, attention_mask: Any) -> Any:
        """The policy's forward pass, from which the draft learns if the policy does."""
        batch = self._batches.get(id(input_ids))
        if batch is None or not torch.is_grad_enabled():
            return self._model(input_ids=input_ids, attention_mask=attention_mask)
        with self.trainer.capture(batch.packed):
            out = self._model(input_ids=input_ids, attention_mask=attention_mask)
        self.trainer.observe()
        self._readings = {k: v for k, v in self.trainer.step().items() if "acceptance" in k}
        return out

    def observe(self, run: Run, micros: list[TrainBatch]) -> dict[str, Any]:
        """How both drafts did on the policy that has just been sampled from."""
        self._batches = {id(micro.input_ids_BL): micro for micro in micros}
        total = self._engines[0].acceptance()
        before, self._seen = self._seen, total
        num_steps = total.num_verify_steps - before.num_verify_steps
        online = (sum(total.accepted) - sum(before.accepted)) / num_steps + 1
        earlier = self._engines[1].acceptance()
        answers = self._answers(self._engines[1], self._problems(self._config.num_compared))
        later = self._engines[1].acceptance()
        num_steps = later.num_verify_steps - earlier.num_verify_steps
        frozen = (sum(later.accepted) - sum(earlier.accepted)) / num_steps + 1
        return {
            "speculative/accept_length": torch.tensor(online),
            "speculative/draft_version": torch.tensor(
                self._engines[0].draft_weights.weight_version
            ),
            "frozen/accept_length": torch.tensor(frozen),
            "frozen/reward": self._rewards(answers).mean(),
            **self._readings,
        }

    def compare(self, num_prompts: int) -> str:
        """Rewards of the last policy with the draft and without, on the same prompts."""
        problems, rewards = self._problems(num_prompts), []
        for options in ({"draft": self._drafts[0], "draft_steps": self._config.draft_steps}, {}):
            engine = HFEngine(self._engines[0].model, max_batch=self._config.max_batch, **options)
            rewards.append(self._rewards(self._answers(engine, problems)))
            engine.close()
        with_draft_N, without_N = rewards
        more_N = with_draft_N - without_N
        z = more_N.mean() / (more_N.std() / math.sqrt(num_prompts)).clamp_min(1e-9)
        return (
            f"reward with the draft {with_draft_N.mean():.3f}, without {without_N.mean():.3f}: "
            f"{z:+.1f} standard errors apart"
        )

    def export(self, folder: Path) -> None:
        """The policy and its draft as a server loads them, in `policy/` and `draft/`."""
        self._engines[0].model.save_pretrained(folder / "policy")
        self._tokenizer.save_pretrained(folder / "policy")
        export_draft(self._drafts[0], folder / "draft", dtype=torch.bfloat16)

    def plot(self) -> int:
        """acceptance.png: accept length over steps; how many there were."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = (self._config.out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        steps = [row["step"] for row in rows]
        for key, label in (("speculative", "learning online"), ("frozen", "frozen before RL")):
            axes.plot(steps, [row[f"{key}/accept_length"] for row in rows], label=label)
        axes.set(xlabel="step", ylabel="accept length (with the bonus token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self._config.out / "acceptance.png", dpi=120)
        pyplot.close(figure)
        return len(rows)

    def _warm_up(self, engine: HFEngine) -> None:
        train_draft(
            self.trainer, self._model,
            lambda n: [sample for sample, _ in self._answers(engine, self._problems(n))],
            updates=self._config.draft_warmup_updates,
            micro_batch_size=self._config.micro_batch_size, device=self._config.device,
        )  # fmt: skip
        engine.close()

    def _problems(self, number: int) -> list[Problem]:
        return self._task.training(number, -(10**6) - next(self._seeds))

    def _answers(
        self, engine: HFEngine, problems: Sequence[Problem]
    ) -> list[tuple[Sample, Problem]]:
        params = SamplingParams(
            max_new_tokens=self._config.max_new_tokens, temperature=self._config.temperature
        )
        prompts = [self._tokenizer(p.prompt)["input_ids"] for p in problems]
        return list(zip(answers_to(engine, prompts, params, self._seeds), problems, strict=True))

    def _rewards(self, answers: list[tuple[Sample, Problem]]) -> Tensor:
        texts = [s.response_tokens for s, _ in answers]
        decoded = self._tokenizer.batch_decode(texts, skip_special_tokens=True)
        pairs = zip(decoded, answers, strict=True)
        return torch.tensor([self._task.score(text, problem) for text, (_, problem) in pairs])

    def _save(self, path: Path) -> None:
        """The draft at a step; of others, those that the policy has a checkpoint of stay."""
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.trainer.state_dict(), path)
        for old in self._folder.glob("step-*.pt"):
            if old != path and not (self._config.out / "checkpoints" / old.stem).exists():
                old.unlink()


def main(config: SpeculativeConfig) -> None:
    task = RunningTotals(config.seed, num_terms=config.num_terms)
    model, tokenizer = build_model(config.seed), build_tokenizer()
    speculation = Speculation(config, task, model, tokenizer)
    train(
        config, task, model, tokenizer, call=speculation.call, engine=speculation.start,
        observe=speculation.observe,
    )  # fmt: skip
    if speculation.plot() == config.num_steps:
        print(speculation.compare(config.num_rewards))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(SpeculativeConfig))
