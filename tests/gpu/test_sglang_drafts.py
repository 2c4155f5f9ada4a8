"""Drafts of ours in the real SGLang, which has to keep as much of them as our engine does.

MILES_SGLANG_SITE is the server's PYTHONPATH; MILES_SGLANG_PYTHON its interpreter.
"""

import asyncio
import itertools
from contextlib import closing

import pytest
import torch
import transformers

from miles.losses import token_logprobs
from miles.rollout import HFEngine, SamplingParams, SGLangEngine, SGLangServer, collate
from miles.rollout.speculative import (
    DraftTrainer,
    Eagle3Draft,
    EagleDraft,
    SpeculativeStats,
    export_draft,
)
from tests.gpu.test_sglang_sync import ENV, FLAGS, MEAN_GAP, PYTHON, skip_without_sglang

CONFIG = transformers.LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
STEPS, COUNT = 3, 64
PARAMS = SamplingParams(max_new_tokens=48, ignore_eos=True)
PROMPTS = [[1 + i % 7, 11 + i % 5, 3] for i in range(COUNT)]


def policy(device):
    """Its next token depends on the last one most of all, which a draft learns in seconds."""
    made = transformers.LlamaForCausalLM(CONFIG)
    gains = {"embed_tokens": 16.0, "lm_head": 4.0, "o_proj": 0.2, "down_proj": 0.2}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                gain = gains.get(name.split(".")[-2], 1.0)
                weight.normal_(0, gain / weight.shape[-1] ** 0.5, generator=generator)
    return made.to(device, torch.bfloat16).eval()


def answers(engine, seeds):
    waiting = [
        engine.submit(prompt, SamplingParams(max_new_tokens=48, seed=seed))
        for prompt, seed in zip(PROMPTS, seeds, strict=False)
    ]
    return [answer.result(100) for answer in waiting]


def trained(kind, model, updates):
    """A draft that has learnt the model's own answers."""
    draft = kind.from_target(model, dtype=torch.float32)
    trainer = DraftTrainer(draft, model, lr=2e-3, steps=STEPS, share=1.0, autocast=torch.bfloat16)
    seeds = itertools.count(10**6)
    with closing(HFEngine(model, max_batch=COUNT)) as engine:
        for update in range(updates):
            if update % 5 == 0:
                batch = collate(answers(engine, seeds)).to(model.device)
            with trainer.capture(batch.packed), torch.no_grad():
                model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
            trainer.observe()
            trainer.step()
    return draft


@pytest.mark.parametrize(
    ("kind", "algorithm"), [(EagleDraft, "EAGLE"), (Eagle3Draft, "EAGLE3")], ids=["eagle", "eagle3"]
)
def test_a_server_keeps_as_much_of_a_draft_as_our_engine(tmp_path, kind, algorithm):
    skip_without_sglang()
    model = policy("cuda")
    draft = trained(kind, model, updates=300).to(torch.bfloat16)
    with closing(HFEngine(model, max_batch=COUNT, draft=draft, draft_steps=STEPS)) as engine:
        answers(engine, range(COUNT))
        ours = engine.acceptance().summary()
    model.save_pretrained(tmp_path / "policy")
    export_draft(draft, tmp_path / "draft", dtype=torch.bfloat16)
    flags = [flag for flag in FLAGS if flag not in ("--load-format", "dummy")]
    flags += [
        "--speculative-algorithm", algorithm,
        "--speculative-draft-model-path", str(tmp_path / "draft"),
        "--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(STEPS + 1), "--speculative-use-rejection-sampling",
    ]  # fmt: skip

    async def ask(engine):
        return await asyncio.gather(*(engine.generate(prompt, PARAMS) for prompt in PROMPTS))

    with (
        SGLangServer(
            tmp_path / "policy", args=flags, env=ENV, cwd=tmp_path, python=PYTHON,
            start_timeout=280,
        ) as server,
        closing(SGLangEngine(server.url)) as engine,
    ):  # fmt: skip
        samples = asyncio.run(ask(engine))
    counts = [SpeculativeStats(**sample.metadata["speculative"]) for sample in samples]
    theirs = sum(counts[1:], counts[0])
    print(
        f"{algorithm}: accept length {ours.accept_length:.2f}, in SGLang {theirs.accept_length:.2f}"
    )
    assert theirs.num_tokens == sum(len(s.response_tokens) for s in samples) - COUNT
    assert ours.accept_length > 1.3  # else a draft with its inputs mixed up would do as well
    assert theirs.accept_length == pytest.approx(ours.accept_length, rel=0.1)
    batch = collate(samples).to("cuda")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    gap_T = (token_logprobs(logits.flatten(0, 1), batch.targets_T) - batch.rollout_logprobs_T).abs()
    assert gap_T[batch.packed.mask_T].mean() < MEAN_GAP
