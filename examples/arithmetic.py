"""The task of `grpo_loop.py`: sums of one-digit numbers from reasoning_gym, and a model to learn them.

The model is a Qwen3-MoE of transformers with random weights and one token a character.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHARACTERS = "0123456789+- ="
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Problem:
    """A prompt and what its answer is graded by."""

    prompt: str
    item: dict[str, Any]


class ChainSum:
    """reasoning_gym's `chain_sum`: three one-digit numbers, added and subtracted.

    A tenth of all questions, told by a hash of their text, is held out: training never sees them.
    """

    def __init__(self, seed: int) -> None:
        import reasoning_gym

        self._seed = seed
        self._dataset = reasoning_gym.create_dataset(
            "chain_sum", size=1_000_000, seed=seed,
            min_terms=3, max_terms=3, min_digits=1, max_digits=1,
        )  # fmt: skip

    def held_out(self, count: int) -> list[Problem]:
        """Distinct held-out problems, the same for every run with this seed."""
        found: dict[str, Problem] = {}
        for problem in self._walk(random.Random(self._seed)):
            if _is_held_out(problem):
                found[problem.prompt] = problem
            if len(found) == count:
                return list(found.values())
        raise AssertionError("unreachable: the walk is endless")

    def training(self, count: int, step: int) -> list[Problem]:
        """Problems of training step `step`."""
        walk = self._walk(random.Random(f"{self._seed}/{step}"))
        chosen = (problem for problem in walk if not _is_held_out(problem))
        return [next(chosen) for _ in range(count)]

    def score(self, answer: str, problem: Problem) -> float:
        """The task's own grade: 1 for the answer, less for text that merely holds it."""
        return float(self._dataset.score_answer(answer, problem.item))

    def _walk(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            item = self._dataset[rng.randrange(len(self._dataset))]
            yield Problem(item["question"].rsplit(": ", 1)[1].replace(" ", ""), item)


def _is_held_out(problem: Problem) -> bool:
    return zlib.crc32(problem.prompt.encode()) % 10 == 0


def build_tokenizer() -> Any:
    """One token a character, as a tokenizer that `AutoTokenizer` loads again."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: index for index, text in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model(seed: int) -> Any:
    """A quarter of a million parameters, 8 experts of which each token uses 2."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(CHARACTERS) + 2,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
