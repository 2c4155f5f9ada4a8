"""What only shows when drafts serve, learn and are saved beside each other."""

import asyncio
import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from miles.errors import EngineError, SettingError
from miles.rollout import HFEngine, SamplingParams
from miles.rollout._features import FeatureTap
from miles.rollout.speculative import (
    AcceptanceStats,
    CostModel,
    DraftController,
    DraftTrainer,
    Eagle3Draft,
    MTPDraft,
    NgramDraft,
    StandaloneDraft,
    export_draft,
    load_draft,
)
from miles.rollout.speculative.draft import Proposal
from tests.models import VOCAB, params, serving, tiny


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 8,
        "num_attention_heads": 2, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def test_seeds_that_made_the_remembered_answers_do_not_judge_them():
    model = llama(vocab_size=3, num_hidden_layers=1, num_attention_heads=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token has the same chance
    draft, count = NgramDraft(min_ngram=8, max_ngram=8), 1000
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 3, (count, 14), generator=generator).tolist()
    with serving(model, max_batch=128, draft=draft, draft_steps=1) as engine:

        def score() -> float:
            wanted = [SamplingParams(max_new_tokens=3, seed=i) for i in range(count)]
            futures = [engine.submit(p, w) for p, w in zip(prompts, wanted, strict=True)]
            samples.extend(future.result(200) for future in futures)
            seconds = torch.tensor([s.response_tokens[1] for s in samples[-count:]])
            got = seconds.bincount(minlength=3).double()
            return float(((got - count / 3) ** 2 / (count / 3)).sum())

        samples = []
        assert score() < 14  # two degrees of freedom: once in a thousand times
        for sample in samples:
            draft.remember(sample)
        assert score() < 14
        assert engine.acceptance().accept_rate > 0.2  # the answers were proposed


def test_a_draft_made_anew_does_not_judge_answers_by_the_numbers_that_made_them():
    """It remembers as many answers as the one had that they were made with."""
    model = llama(vocab_size=3, num_hidden_layers=1, num_attention_heads=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token has the same chance
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 3, (600, 14), generator=generator).tolist()

    def answers(remembered, seed):
        draft = NgramDraft(min_ngram=8, max_ngram=8)
        for sample in remembered:
            draft.remember(sample)
        wanted = [SamplingParams(max_new_tokens=3, seed=seed + i) for i in range(600)]
        with serving(model, max_batch=128, draft=draft, draft_steps=1) as engine:
            futures = [engine.submit(p, w) for p, w in zip(prompts, wanted, strict=True)]
            return [future.result(200) for future in futures]

    made = answers(answers([], 0), 10**6)
    seconds = torch.tensor([s.response_tokens[1] for s in answers(made, 10**6)])
    got = seconds.bincount(minlength=3).double()
    assert float(((got - 200) ** 2 / 200).sum()) < 14  # two degrees: once in a thousand times


class Forgetful:
    """A draft and its memory, without what it proposes."""

    feature_layers = ()

    def memory(self, **sizes):
        return self

    def extend(self, *settled):
        pass

    def move(self, source, target):
        pass

    def free(self, slot):
        pass


class Undecided(Forgetful):
    """Draws at random whatever the temperature."""

    def propose(self, slots, *, num_steps, temperatures, uniforms_RK):
        tokens_RK = torch.zeros(len(slots), num_steps, dtype=torch.int64)
        probs_RKV = torch.full((*tokens_RK.shape, VOCAB), 1 / VOCAB)
        return Proposal(tokens_RK=tokens_RK, probs_RKV=probs_RKV)


def test_a_choice_at_temperature_0_ends_only_that_request():
    with serving("llama", draft=Undecided(), draft_steps=2) as engine:
        asyncio.run(engine.pause())
        greedy = engine.submit([1, 2, 3], params(8, temperature=0.0))
        sampled = engine.submit([4, 5, 6], params(8, seed=0, temperature=1.0))
        asyncio.run(engine.resume())
        with pytest.raises(EngineError, match="leave a choice at temperature 0"):
            greedy.result(30)
        assert len(sampled.result(30).response_tokens) == 8


class Misshapen(Forgetful):
    """Proposes integers of another kind."""

    def propose(self, slots, *, num_steps, temperatures, uniforms_RK):
        return Proposal(tokens_RK=torch.zeros(len(slots), num_steps, dtype=torch.int32))


def test_a_misshapen_proposal_ends_only_the_requests_that_it_was_for():
    with serving("llama", draft=Misshapen(), draft_steps=2) as engine:
        asyncio.run(engine.pause())
        asked = engine.submit([1, 2, 3], params(8, seed=0))
        spared = engine.submit([4, 5, 6], params(2, seed=0))  # no room for a proposal
        asyncio.run(engine.resume())
        with pytest.raises(EngineError, match="failed to propose"):
            asked.result(30)
        assert len(spared.result(30).response_tokens) == 2


def test_rows_without_a_proposal_count_in_the_choice():
    cost = CostModel(floor=10e-3, per_token=1e-3, knee=1, draft_floor=0.1e-3)
    sparse, dense = (DraftController(cost, max_steps=3, exploration=0) for _ in range(2))
    for _ in range(40):
        dense.observe(AcceptanceStats.count(accepted=[3] * 10, proposed=[3] * 10))
        sparse.observe(AcceptanceStats.count(accepted=[3] + [0] * 9, proposed=[3] + [0] * 9))
    assert dense.speedups(10)[3] > 1 > sparse.speedups(10)[3]
    assert dense.choose(10) > 0 == sparse.choose(10)


def test_a_small_model_has_to_reach_as_far_as_the_engine():
    config = GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    draft = StandaloneDraft(GPT2LMHeadModel(config), vocab_size=VOCAB)
    with pytest.raises(SettingError, match=r"max_context is 64 and the draft .* reaches 16"):
        HFEngine(tiny("llama"), draft=draft)
    HFEngine(tiny("llama"), draft=draft, max_context=16).close()


def test_a_draft_serves_without_dropout():
    small = llama(attention_dropout=0.5).train()
    draft = StandaloneDraft(small, vocab_size=32)
    with serving(llama(), draft=draft) as engine:
        engine.submit([1, 2, 3], params(30, seed=0)).result(60)
        assert engine.acceptance().accept_rate == 1


def test_features_are_of_this_threads_passes():
    model = llama()
    tap = FeatureTap(model, (0, 3))
    ours, theirs = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        with tap.reading() as expected:
            model(ours)
        with tap.reading() as got:
            model(ours)
            other = threading.Thread(target=lambda: model(theirs))
            other.start()
            other.join()
    assert torch.equal(got[0], expected[0])


def test_a_pass_is_captured_of_this_thread_only():
    model = llama()
    trainer = DraftTrainer(Eagle3Draft.from_target(model), model)
    with trainer.capture():
        model(torch.tensor([[1, 2, 3]]))
        other = threading.Thread(target=lambda: model(torch.tensor([[4, 5, 6, 7]])))
        other.start()
        other.join()
    trainer.observe(torch.ones(1, 3, dtype=torch.bool))
    assert trainer.pending == 1


def test_a_head_that_moved_since_the_pass_is_noticed():
    model = llama()
    trainer = DraftTrainer(Eagle3Draft.from_target(model), model)
    with trainer.capture():
        model.model(torch.tensor([[1, 2, 3]]))  # the decoder alone
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(SettingError, match="the policy's head has changed"):
        trainer.observe(torch.ones(1, 3, dtype=torch.bool))


def test_a_float32_draft_is_served_in_the_targets_dtype(tmp_path):
    model = llama().bfloat16()
    draft = Eagle3Draft.from_target(model, dtype=torch.float32)
    export_draft(draft, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["fc.weight"].dtype == torch.float32


def test_exporting_a_small_model_leaves_it_as_it_is(tmp_path):
    draft = StandaloneDraft(llama(), vocab_size=32)
    before = draft.model.lm_head.weight.clone()
    export_draft(draft, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(draft.model.lm_head.weight, before) and before.dtype == torch.float32


def test_shards_of_an_older_draft_are_gone(tmp_path):
    model = llama()
    export_draft(Eagle3Draft.from_target(model), tmp_path)
    shard = "model-00001-of-00001.safetensors"
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    draft = load_draft(tmp_path, model)
    with torch.no_grad():
        draft.fc.weight.fill_(7.0)
    export_draft(draft, tmp_path)
    assert not (tmp_path / shard).exists()
    assert load_draft(tmp_path, model).fc.weight[0, 0] == 7


def test_a_routers_bias_stays_float32(tmp_path):
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=32, num_experts_per_tok=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config)
    draft = MTPDraft.from_target(model)
    bias = draft.stages[0].layer.mlp.gate.e_score_correction_bias
    with torch.no_grad():
        bias.copy_(6 + 0.05 * torch.randn(32))  # bf16 tells hardly any of these apart
    export_draft(draft, tmp_path, dtype=torch.bfloat16)
    loaded = load_draft(tmp_path, model.bfloat16())
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.stages[0].layer.mlp.gate.e_score_correction_bias, bias)
