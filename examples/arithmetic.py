"""The task of `grpo_loop.py`: sums from reasoning_gym, and a model to learn them.

The model is a Qwen3-MoE of transformers with random weights and one token a character.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from miles import count
from miles.losses import aggregate, token_logprobs
from miles.rollout import Sample, collate

CHARACTERS = "0123456789+- ="
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Problem:
    """A prompt and what its answer is graded by."""

    prompt: str
    item: dict[str, Any]


class ChainSum:
    """reasoning_gym's `chain_sum`: one-digit numbers, added and subtracted.

    One question in `held_out_share`, told by a hash of its text, is held out: training never sees
    it.
    """

    def __init__(self, seed: int, *, num_terms: int = 3, held_out_share: int = 10) -> None:
        import reasoning_gym

        self._seed, self._share = seed, held_out_share
        self._dataset = reasoning_gym.create_dataset(
            "chain_sum", size=1_000_000, seed=seed,
            min_terms=num_terms, max_terms=num_terms, min_digits=1, max_digits=1,
        )  # fmt: skip

    def prompt(self, item: dict[str, Any]) -> str:
        """The sum itself, without the sentence around it."""
        return str(item["question"]).rsplit(": ", 1)[1].replace(" ", "")

    def score(self, answer: str, problem: Problem) -> float:
        """The task's own grade: 1 for the answer, less for text that merely holds it."""
        return float(self._dataset.score_answer(answer, problem.item))

    def taught(self, problem: Problem, teacher: random.Random) -> str:
        """What a sloppy teacher answers: one too high two times in three."""
        return str(int(problem.item["answer"]) + teacher.choice([0, 1, 1]))

    def training(self, count: int, step: int) -> list[Problem]:
        """Problems of training step `step`."""
        return list(itertools.islice(self._walk(f"{self._seed}/{step}", held_out=False), count))

    def held_out(self, count: int) -> list[Problem]:
        """Distinct held-out problems (all there are, if fewer), the same for every step."""
        walk = itertools.islice(self._walk(f"{self._seed}/held-out", held_out=True), 50 * count)
        found = {problem.prompt: problem for problem in walk}
        return list(found.values())[:count]

    def _walk(self, seed: str, *, held_out: bool) -> Iterator[Problem]:
        rng = random.Random(seed)
        while True:
            item = self._dataset[rng.randrange(len(self._dataset))]
            if (zlib.crc32(item["question"].encode()) % self._share == 0) == held_out:
                yield Problem(self.prompt(item), item)


def build_tokenizer() -> Any:
    """One token a character, as a tokenizer that `AutoTokenizer` loads again."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: index for index, text in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model(seed: int, *, width: int = 64, **changes: Any) -> Any:
    """8 experts of which each token uses 2; a quarter of a million parameters at width 64.

    `changes` to the configuration make it another model.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(CHARACTERS) + 2,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes)))


def warm_up(
    model: Any, tokenizer: Any, task: ChainSum, *, num_steps: int, learning_rate: float, log: Any
) -> None:
    """Supervised learning from the task's sloppy teacher.

    Imitation learns to add, and to be as sloppy; which answers are right only RL can tell.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    teacher = random.Random(0)
    log.phase("warm-up", num_steps)
    for step in range(num_steps):
        if log.stopped:
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / num_steps)
        samples = []
        for problem in task.training(128, -1 - step):
            texts = [problem.prompt, task.taught(problem, teacher)]
            prompt, answer = tokenizer(texts)["input_ids"]
            sample = Sample(tokens=prompt)
            sample.append([*answer, tokenizer.eos_token_id], logprobs=[0.0] * (len(answer) + 1))
            samples.append(sample)
        batch = collate(samples).to(model.device)
        logits_BLV = model(
            input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL
        ).logits
        loss_T = -token_logprobs(logits_BLV.flatten(0, 1), batch.targets_T)
        optimizer.zero_grad()
        aggregate(loss_T, batch.packed, count(batch.packed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.advance()
