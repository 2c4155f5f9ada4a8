"""RL of a real model with a draft, with a tiny model in its place."""

import importlib
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from miles.rollout.speculative import load_draft
from tests.examples.test_grpo_loop import rows

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = (
    "Start We begin at The first number is Next Then That makes Now we get After that answer So the"
    " result This leaves . , = + - ? <pad> <eos>"
)
WORDS = [*dict.fromkeys(TEXT.split(" ")), *map(str, range(-60, 61))]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("speculative_smollm2")


def tiny():
    """A model of words instead of SmolLM2, and its tokenizer."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = FastTokenizer(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def config(example, out, **changes):
    settings = {
        "num_steps": 2, "num_prompts": 2, "num_samples_per_prompt": 2, "micro_batch_size": 2,
        "max_new_tokens": 8, "warmup_steps": 1, "max_batch": 4, "eval_every": 2,
        "num_held_out": 2, "checkpoint_every": 1, "num_terms": 3, "draft_warmup_updates": 2,
        "draft_vocabulary": 64, "num_compared": 2, "num_rewards": 4, "out": out,
    }  # fmt: skip
    return example.SmolSpeculativeConfig(**settings | changes)


def test_a_run_leaves_a_policy_and_a_draft_that_fits_it(example, tmp_path, capsys):
    example.main(config(example, tmp_path), tiny)
    assert "reward with the draft" in capsys.readouterr().out
    found = rows(tmp_path)
    assert len(found) == 2
    for row in found:
        assert 1 <= row["speculative/accept_length"] <= 4 and 1 <= row["frozen/accept_length"] <= 4
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / "policy")
    assert policy.dtype == torch.bfloat16
    draft = load_draft(tmp_path / "served" / "draft", policy)
    ids = draft.target_ids
    kept = torch.load(tmp_path / "vocabulary.pt", weights_only=True)
    assert torch.equal(ids, kept) and len(ids) == 64
    trained = torch.load(tmp_path / "draft" / "step-000002.pt", weights_only=True)["draft"]
    torch.testing.assert_close(draft.fc.weight, trained["fc.weight"].bfloat16())
    resumed = config(example, tmp_path, resume=True, num_rewards=6)
    assert torch.equal(example.vocabulary_of(resumed, None, None, None), kept)
    example.main(resumed, tiny)
    assert "reward with the draft" in capsys.readouterr().out
    assert rows(tmp_path) == found


def test_the_teacher_works_a_sum_out_and_is_sloppy_at_a_quarter(example):
    tokenizer = SimpleNamespace(apply_chat_template=lambda messages, **_: messages[0]["content"])
    task = example.WorkedSums(0, tokenizer, num_terms=4)
    teacher, wrong, rewards = random.Random(0), 0, []
    problems = task.training(400, 0)
    for problem in problems:
        terms = example.terms_of(example.ChainSum.prompt(task, problem.item))
        assert sum(terms) == int(problem.item["answer"]) and len(terms) == 4
        text = task.taught(problem, teacher)
        rewards.append(task.score(text, problem))
        steps = re.findall(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", text)
        assert [int(sign + number) for _, sign, number, _ in steps] == terms[1:]
        totals = [terms[0], *(int(total) for *_, total in steps)]
        assert [int(before) for before, *_ in steps] == totals[:-1]
        over = [b - a - t for a, b, t in zip(totals, totals[1:], terms[1:], strict=False)]
        assert set(over) <= {0, 1}
        wrong += sum(over)
        assert task.score(text, problem) == 1 or sum(over)
    assert wrong / 1200 == pytest.approx(0.25, abs=0.04)  # three standard deviations
    assert sum(r == 1 for r in rewards) / 400 == pytest.approx(0.75**3, abs=0.075)
    assert problems[0].prompt.endswith("end with the number.")
