"""Drafts of ours in the real SGLang, which has to keep as much of them as our engine does.

MILES_SGLANG_SITE is the server's PYTHONPATH; MILES_SGLANG_PYTHON its interpreter.
"""

import asyncio
import copy
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
RULES, SYMBOLS = 16, 32


def texts(number, length, seed):
    """A rule, a symbol, and mostly what the rule has after each symbol."""
    rules = torch.Generator().manual_seed(0)
    next_RS = torch.stack([torch.randperm(SYMBOLS, generator=rules) for _ in range(RULES)])
    generator = torch.Generator().manual_seed(seed)
    rule_N = torch.randint(RULES, (number,), generator=generator)
    symbol_N = torch.randint(SYMBOLS, (number,), generator=generator)
    columns = [100 + rule_N, 16 + symbol_N]
    while len(columns) < length:
        any_N = torch.randint(SYMBOLS, (number,), generator=generator)
        jumps_N = torch.rand(number, generator=generator) < 0.2
        symbol_N = torch.where(jumps_N, any_N, next_RS[rule_N, symbol_N])
        columns.append(16 + symbol_N)
    return torch.stack(columns, dim=1)


PROMPTS = texts(COUNT, 2, seed=1).tolist()


def policy(device, updates=400):
    """Its first token decides what follows which. Drafts do not see that one, but in features.

    What a layer adds is twice what was there, so that layers' outputs are not alike.
    """
    made = transformers.LlamaForCausalLM(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                last = name.split(".")[-2] in ("o_proj", "down_proj")
                gain = 2 ** int(name.split(".")[2]) if last else 1
                weight.normal_(0, gain / weight.shape[-1] ** 0.5, generator=generator)
    made.to(device)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for update in range(updates):
        ids_BL = texts(32, 40, seed=2 + update).to(device)
        made(input_ids=ids_BL, labels=ids_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return made.to(torch.bfloat16).eval()


def answers(engine, seeds):
    waiting = [
        engine.submit(prompt, SamplingParams(max_new_tokens=48, seed=seed))
        for prompt, seed in zip(PROMPTS, seeds, strict=False)
    ]
    return [answer.result(100) for answer in waiting]


def accept_length(model, draft):
    with closing(HFEngine(model, max_batch=COUNT, draft=draft, draft_steps=STEPS)) as engine:
        answers(engine, range(COUNT))
        return engine.acceptance().accept_length


def mixed_up(draft):
    """What a server would serve that gives the draft other features than it learnt from."""
    without = copy.deepcopy(draft)
    first = CONFIG.hidden_size if isinstance(draft, EagleDraft) else 0  # after the embedding
    with torch.no_grad():
        without.fc.weight[:, first:].zero_()
    yield "without features", without
    if isinstance(draft, Eagle3Draft):
        for offset in (-1, 1):
            shifted = copy.deepcopy(draft)
            shifted.feature_layers = tuple(layer + offset for layer in draft.feature_layers)
            yield f"layers {shifted.feature_layers}", shifted


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


@pytest.mark.timeout(500)  # the first server on a machine takes minutes
@pytest.mark.parametrize(
    ("kind", "algorithm"), [(EagleDraft, "EAGLE"), (Eagle3Draft, "EAGLE3")], ids=["eagle", "eagle3"]
)
def test_a_server_keeps_as_much_of_a_draft_as_our_engine(tmp_path, kind, algorithm):
    skip_without_sglang()
    model = policy("cuda")
    draft = trained(kind, model, updates=300).to(torch.bfloat16)
    ours = accept_length(model, draft)
    for how, wrong in mixed_up(draft):
        length = accept_length(model, wrong)
        print(f"{algorithm}: accept length {ours:.2f}, {how} {length:.2f}")
        assert length < 0.87 * ours  # a server that did this would not pass below
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
            start_timeout=280, log=tmp_path / "server.log",
        ) as server,
        closing(SGLangEngine(server.url)) as engine,
    ):  # fmt: skip
        samples = asyncio.run(ask(engine))
    counts = [SpeculativeStats(**sample.metadata["speculative"]) for sample in samples]
    theirs = sum(counts[1:], counts[0])
    print(f"{algorithm}: accept length {ours:.2f}, in SGLang {theirs.accept_length:.2f}")
    for one, sample in zip(counts, samples, strict=True):
        assert len(sample.response_tokens) - 1 <= one.num_verify_steps + one.num_accepted
        assert one.num_proposed == STEPS * one.num_verify_steps
    assert theirs.accept_length == pytest.approx(ours, rel=0.1)
    batch = collate(samples).to("cuda")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    gap_T = (token_logprobs(logits.flatten(0, 1), batch.targets_T) - batch.rollout_logprobs_T).abs()
    assert gap_T[batch.packed.mask_T].mean() < MEAN_GAP
