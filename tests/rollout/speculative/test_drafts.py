"""Drafts that are models: what they compute in training is what they propose with in an engine."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from miles.errors import SettingError
from miles.rollout.speculative import (
    Draft,
    Eagle3Draft,
    EagleDraft,
    MTPDraft,
    Proposal,
    StandaloneDraft,
    _draft_steps,
)
from miles.rollout.speculative import _keys as keys_module
from miles.rollout.speculative.eagle3 import default_feature_layers, frequent_tokens
from tests.models import VOCAB, tiny
from tests.rollout.graphs import pretend_graphs
from tests.rollout.speculative.targets import (
    DRAFTS,
    HIDDEN,
    TARGETS,
    K,
    cached_draft,
    draft_of,
    extend,
    features_of,
    propose,
    random_features,
    target,
    tokens,
    uniforms,
)

NORMS = {"atol": 2e-5, "rtol": 1e-3}
"""Norms of transformers compute in float32 even in a float64 model."""


def unrolled(draft: Any, ids_L: Tensor, features_LF: Tensor | None, row: int) -> Tensor:
    """float64 `[K, V]`: what training computes at that row, over the target's vocabulary."""
    features_BLF = None if features_LF is None else features_LF[None]
    with torch.no_grad():
        logits = draft.unroll(ids_L[None], features_BLF, num_steps=K)
    probs_KU = torch.stack([step_BLU[0, row].softmax(-1) for step_BLU in logits])
    if draft.target_ids is None:
        return probs_KU
    return torch.zeros((K, VOCAB), dtype=torch.float64).index_copy(1, draft.target_ids, probs_KU)


def assert_proposes_what_it_learns(draft: Any, model: Any, ids: Tensor, got: Proposal) -> None:
    """`ids` are settled; features of what is proposed must not matter, so they are noise."""
    features = features_of(model, ids[None], draft.feature_layers)
    assert got.probs_RKV is not None
    for row in range(len(got.tokens_RK)):
        longer = torch.cat([ids, got.tokens_RK[row]])
        seen = random_features(draft, len(longer), seed=77)
        if seen is not None and features is not None:
            seen[: len(ids) - 1] = features[0, :-1]
        wanted_KV = unrolled(draft, longer, seen, len(ids) - 2)
        torch.testing.assert_close(got.probs_RKV[row].double(), wanted_KV, atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_proposal_is_drawn_from_what_unroll_computes(name: str, kind: str) -> None:
    model = target(name)
    draft = draft_of(kind, model)
    assert isinstance(draft, Draft)
    ids = tokens(9)
    features = features_of(model, ids[None], draft.feature_layers)
    memory = draft.memory(num_slots=2, max_context=32)
    extend(memory, 1, ids, None if features is None else features[0])
    got = propose(memory, [1])
    assert got.tokens_RK.dtype == torch.int64 and got.probs_RKV.dtype == torch.float32
    assert_proposes_what_it_learns(draft, model, ids, got)


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("kind", DRAFTS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_proposal_does_not_depend_on_how_and_beside_whom_its_tokens_were_settled(
    kind: str, graphed: bool, data: st.DataObject
) -> None:
    """Slots in any order, some to be refilled, pieces of any length, proposals in between."""
    with pytest.MonkeyPatch.context() as patch:
        if graphed:
            pretend_graphs(patch)
            patch.setattr(_draft_steps, "SETTLE_TOKENS", data.draw(st.sampled_from([64, 2048])))
        settle_in_pieces(cached_draft(kind), data)


def test_a_long_prompt_does_not_pad_the_rows_beside_it(monkeypatch) -> None:
    draft, lengths, seen = cached_draft("eagle3"), (3, 60, 4), []
    memory = draft.memory(num_slots=3, max_context=100)

    def noted(slots, places, new, features):
        seen.append([len(row) for row in new])

    monkeypatch.setattr(memory._steps, "settle", noted)  # that rows come out right, others test
    features = [random_features(draft, n - 1) for n in lengths]
    memory.extend([0, 1, 2], [tokens(n).tolist() for n in lengths], [0] * 3, features)
    assert seen == [[2, 3], [59]]


def settle_in_pieces(draft: Any, data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 4))
    slots = data.draw(st.permutations(range(num_slots)))
    lengths = [data.draw(st.integers(2, 70)) for _ in slots]
    rows = [tokens(length, seed=i) for i, length in enumerate(lengths)]
    features = [random_features(draft, length, seed=i) for i, length in enumerate(lengths)]
    memory = draft.memory(num_slots=num_slots, max_context=100)
    if data.draw(st.booleans()):  # what earlier requests left
        for slot in slots:
            extend(memory, slot, tokens(20, seed=9), random_features(draft, 20, seed=9))
        propose(memory, slots)
    settled = [0] * num_slots  # positions that the target has processed
    while any(done < length - 1 for done, length in zip(settled, lengths, strict=True)):
        active = [i for i in range(num_slots) if settled[i] < lengths[i] - 1]
        ends = [data.draw(st.integers(settled[i] + 1, lengths[i] - 1)) for i in active]
        memory.extend(
            [slots[i] for i in active],
            [rows[i][settled[i] : end + 1].tolist() for i, end in zip(active, ends, strict=True)],
            [settled[i] for i in active],
            None
            if not draft.feature_layers
            else [features[i][settled[i] : end] for i, end in zip(active, ends, strict=True)],
        )
        for i, end in zip(active, ends, strict=True):
            settled[i] = end
        if data.draw(st.booleans()):
            propose(memory, [slots[i] for i in active])
    together = propose(memory, list(slots))
    for i, slot in enumerate(slots):
        alone = draft.memory(num_slots=1, max_context=100, cuda_graphs=False)
        extend(alone, 0, rows[i], features[i])
        wanted = alone.propose(
            [0],
            num_steps=K,
            temperatures=[1.0],
            uniforms_RK=uniforms(num_slots, K)[i : i + 1],
        )
        assert torch.equal(together.tokens_RK[i], wanted.tokens_RK[0]), slot
        torch.testing.assert_close(together.probs_RKV[i], wanted.probs_RKV[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_moved_slot_goes_on_and_the_one_it_left_begins_anew(kind: str) -> None:
    draft = cached_draft(kind)
    ids, features = tokens(12), random_features(draft, 12)
    memory = draft.memory(num_slots=3, max_context=40)
    extend(memory, 2, ids[:6], None if features is None else features[:6])
    memory.move(2, 0)
    with pytest.raises(SettingError, match="slot 2 has no settled token"):
        propose(memory, [2])
    extend(memory, 0, ids, features, start=5)
    whole = draft.memory(num_slots=1, max_context=40)
    extend(whole, 0, ids, features)
    torch.testing.assert_close(propose(memory, [0]).probs_RKV, propose(whole, [0]).probs_RKV)
    memory.free(0)
    with pytest.raises(SettingError, match="slot 0 has no settled token"):
        propose(memory, [0])


@pytest.mark.parametrize("graphed", [False, True])
def test_nan_of_an_earlier_request_does_not_reach_the_next(
    graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if graphed:
        pretend_graphs(monkeypatch)
    draft = cached_draft("mtp_3")
    memory = draft.memory(num_slots=2, max_context=40)
    ids, features = tokens(12), random_features(draft, 12)
    extend(memory, 0, ids, torch.full_like(features, torch.nan))
    memory.extend(  # of two lengths, so that the first has padding
        [0, 1],
        [ids[:5].tolist(), ids.tolist()],
        [0, 0],
        [features[:4], features[:11]],
    )
    assert propose(memory, [0, 1]).probs_RKV.isfinite().all()


@pytest.mark.parametrize("kind", DRAFTS)
def test_packed_sequences_unroll_as_separate_rows(kind: str) -> None:
    draft = cached_draft(kind)
    lengths = [5, 1, 9, 3]
    rows = [tokens(n, seed=i) for i, n in enumerate(lengths)]
    seen = [random_features(draft, n, seed=i) for i, n in enumerate(lengths)]
    padding = 4
    ids = torch.cat([torch.full((padding,), -100), *rows, torch.full((padding,), 10**6)])[None]
    seq_ids = torch.cat(
        [torch.full((padding,), -1)]
        + [torch.full((n,), i) for i, n in enumerate(lengths)]
        + [torch.full((padding,), -1)]
    )[None]
    features = None
    if draft.feature_layers:
        hole = torch.full((padding, draft.num_features), torch.nan, dtype=torch.float64)
        features = torch.cat([hole, *seen, hole])[None]
    packed = draft.unroll(ids, features, num_steps=K, seq_ids_BL=seq_ids)
    start = padding
    for n, row, own in zip(lengths, rows, seen, strict=True):
        alone = draft.unroll(row[None], None if own is None else own[None], num_steps=K)
        for i in range(K):
            real = max(0, n - 1 - i)  # later ones have no token to read
            torch.testing.assert_close(
                packed[i][:, start : start + real], alone[i][:, :real], atol=1e-10, rtol=1e-8
            )
        start += n


@pytest.mark.parametrize("kind", DRAFTS)
def test_padding_at_the_end_of_a_row_does_not_matter(kind: str) -> None:
    draft = cached_draft(kind)
    ids, features = tokens(2, 8), random_features(draft, 2, 8)
    short = draft.unroll(ids[:, :6], None if features is None else features[:, :6], num_steps=K)
    whole = draft.unroll(ids, features, num_steps=K)
    for i in range(K):
        torch.testing.assert_close(whole[i][:, : 5 - i], short[i][:, : 5 - i])


@pytest.mark.parametrize("kind", DRAFTS)
def test_only_the_draft_gets_a_gradient_and_all_of_it_does(kind: str) -> None:
    model = target("deepseek_v3")
    draft = draft_of(kind, model).train()
    logits = draft.unroll(tokens(2, 12), random_features(draft, 2, 12), num_steps=K)
    sum(step.square().sum() for step in logits).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    without = [n for n, p in draft.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("experts" in name for name in without), without  # those that no token chose
    shared = {id(p) for p in model.parameters()}
    assert not any(id(p) in shared for p in draft.parameters())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_long_rows_in_pieces_have_the_same_values_and_gradients(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = draft_of(kind, target("qwen3"))
    ids, features = tokens(2, 23), random_features(draft, 2, 23)
    seq_ids = torch.arange(23).div(7, rounding_mode="floor").expand(2, -1) if packed else None

    def run() -> tuple[list[Tensor], list[Tensor]]:
        logits = draft.unroll(ids, features, num_steps=K, seq_ids_BL=seq_ids)
        loss = torch.stack(logits).square().sum()
        return logits, list(torch.autograd.grad(loss, list(draft.parameters())))

    whole = run()
    monkeypatch.setattr(keys_module, "MASK_CELLS", 23 * 5)  # 5 rows at a time
    for got, wanted in zip(run(), whole, strict=True):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "llama_llama3", "qwen3"])
def test_an_eagle_layer_is_a_llama_layer_without_its_first_norm(name: str) -> None:
    model = target(name)
    draft = EagleDraft.from_target(model)
    draft.config._attn_implementation = "eager"
    layer: Any = LlamaDecoderLayer(draft.config, 0).double()
    layer.load_state_dict(draft.layers[0].state_dict(), strict=False)
    layer.input_layernorm = nn.Identity()
    ids = tokens(2, 10)
    features = random_features(draft, 2, 10)
    embeds = model.get_input_embeddings()(ids[:, 1:])
    mixed = draft.fc(torch.cat([embeds, features[:, :-1]], dim=-1))
    positions = torch.arange(9)[None]
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    rotary = model.get_decoder().rotary_emb(mixed, positions)
    out = layer(mixed, attention_mask=mask, position_embeddings=rotary)
    wanted = model.get_output_embeddings()(out)
    (got,) = draft.unroll(ids, features, num_steps=1)
    torch.testing.assert_close(got[:, :-1], wanted, **NORMS)


def test_an_eagle3_layer_reads_normed_embedding_and_normed_state() -> None:
    model = target("llama")
    draft = Eagle3Draft.from_target(model)
    draft.config._attn_implementation = "eager"
    attention: Any = LlamaAttention(draft.config, 0).double()
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, part, getattr(draft.midlayer.self_attn, part))
    assert attention.q_proj.in_features == 2 * HIDDEN
    ids, features = tokens(2, 10), random_features(draft, 2, 10)
    layer = draft.midlayer
    embeds = model.get_input_embeddings()(ids[:, 1:])
    state = features[:, :-1] @ draft.fc.weight.T
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    rotary = model.get_decoder().rotary_emb(state, torch.arange(9)[None])
    both = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(state)], dim=-1)
    state = state + attention(both, position_embeddings=rotary, attention_mask=mask)[0]
    state = state + layer.mlp(layer.post_attention_layernorm(state))
    (got,) = draft.unroll(ids, features, num_steps=1)
    wanted = draft.norm(state) @ draft.lm_head.weight.T
    torch.testing.assert_close(got[:, :-1], wanted, **NORMS)


def test_a_module_of_mtp_reads_normed_embedding_before_normed_state() -> None:
    model = target("deepseek_v3")
    draft = MTPDraft.from_target(model)
    ids, features = tokens(2, 10), random_features(draft, 2, 10)
    stage: Any = draft.stages[0]
    both = [stage.enorm(model.get_input_embeddings()(ids[:, 1:])), stage.hnorm(features[:, :-1])]
    mixed = stage.eh_proj(torch.cat(both, dim=-1))
    rotary = model.get_decoder().rotary_emb(mixed, torch.arange(9)[None])
    out = stage.layer(mixed, attention_mask=None, position_embeddings=rotary)
    (got,) = draft.unroll(ids, features, num_steps=1)
    wanted = model.get_output_embeddings()(stage.norm(out))
    torch.testing.assert_close(got[:, :-1], wanted, **NORMS)
    assert hasattr(stage.layer.mlp, "experts")  # of the last layer's kind


def test_a_standalone_draft_says_what_its_model_says() -> None:
    small = target("qwen3", num_layers=2, seed=3)
    draft = StandaloneDraft.from_target(target("llama"), small)
    ids = tokens(2, 9)
    first, second = draft.unroll(ids, None, num_steps=2)
    torch.testing.assert_close(first[:, :-1], small(ids).logits[:, 1:])
    torch.testing.assert_close(second[:, :-2], small(ids).logits[:, 2:])
    eager = target("qwen3", num_layers=2, seed=3, attn_implementation="eager")
    seq_ids = torch.tensor([[0] * 4 + [1] * 5]).expand(2, -1)
    (got,) = StandaloneDraft(eager, vocab_size=VOCAB).unroll(
        ids, None, num_steps=1, seq_ids_BL=seq_ids
    )
    wanted = small(ids[:, 4:]).logits[:, 1:]
    torch.testing.assert_close(got[:, 4:-1], wanted, **NORMS)


def test_at_temperature_zero_a_draft_takes_its_most_likely_tokens() -> None:
    draft = cached_draft("eagle3_reduced")
    memory = draft.memory(num_slots=2, max_context=40)
    for slot in (0, 1):
        extend(memory, slot, tokens(7, seed=slot), random_features(draft, 7, seed=slot))
    sure = propose(memory, [0, 1], temperature=0.0)
    assert sure.probs_RKV is None
    mixed = memory.propose([0, 1], num_steps=K, temperatures=[0.0, 1.0], uniforms_RK=uniforms(2, K))
    assert torch.equal(mixed.tokens_RK[0], sure.tokens_RK[0])
    one_hot = torch.zeros(K, VOCAB).scatter_(1, sure.tokens_RK[0][:, None], 1.0)
    assert torch.equal(mixed.probs_RKV[0], one_hot)
    first = propose(memory, [0, 1], steps=1).probs_RKV[:, 0].argmax(-1)
    assert torch.equal(first, sure.tokens_RK[:, 0])


@pytest.mark.parametrize("kind", ["eagle3", "eagle3_reduced"])
def test_tokens_are_the_inverse_of_the_distribution_function(kind: str) -> None:
    draft = cached_draft(kind)
    memory = draft.memory(num_slots=1, max_context=40)
    extend(memory, 0, tokens(7), random_features(draft, 7))
    wide = propose(memory, [0], steps=1, temperature=2.0).probs_RKV[0, 0]
    sharp = propose(memory, [0], steps=1, temperature=1.0).probs_RKV[0, 0]
    known = wide > 0
    again = wide[known].double().square()
    torch.testing.assert_close(sharp[known].double(), again / again.sum(), atol=1e-6, rtol=1e-4)
    if draft.target_ids is not None:
        assert known.nonzero()[:, 0].tolist() == draft.target_ids.tolist()
    for uniform in (0.0, 0.25, 0.5, 0.999999, 1 - 2**-53):
        got = memory.propose(
            [0],
            num_steps=1,
            temperatures=[1.0],
            uniforms_RK=torch.tensor([[uniform]], dtype=torch.float64),
        )
        token = int(got.tokens_RK)
        below, above = sharp[:token].double().sum(), sharp[: token + 1].double().sum()
        assert sharp[token] > 0 and below - 1e-6 <= uniform <= above + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_may_have_another_dtype_than_its_target(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    for draft in (
        EagleDraft.from_target(model, dtype=dtype),
        Eagle3Draft.from_target(model, dtype=dtype),
        MTPDraft.from_target(model, dtype=dtype, num_modules=2),
    ):
        assert draft.dtype == dtype
        features = torch.randn(1, 6, draft.num_features)
        for step in draft.unroll(tokens(1, 6), features, num_steps=2):
            assert step.isfinite().all()
        memory = draft.memory(num_slots=1, max_context=20)
        extend(memory, 0, tokens(6), features[0])
        got = propose(memory, [0], steps=2)
        torch.testing.assert_close(got.probs_RKV.sum(-1), torch.ones(1, 2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["eagle", "eagle3", "mtp", "mtp_3"])
def test_autocast_is_near_float32(kind: str) -> None:
    draft = draft_of(kind, target("llama", initializer_range=0.1).float()).float()
    ids, features = tokens(2, 20), random_features(draft, 2, 20)
    seq_ids = torch.arange(20).div(7, rounding_mode="floor").expand(2, -1)
    wanted = draft.unroll(ids, features, num_steps=K, seq_ids_BL=seq_ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = draft.unroll(ids, features, num_steps=K, seq_ids_BL=seq_ids)
    for half, whole in zip(got, wanted, strict=True):
        error = (half.detach().float() - whole).norm() / whole.norm()
        assert error < 0.05, error  # 8 bits through one layer, three times
    torch.stack(got).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in draft.parameters())


def test_a_copy_reads_the_same_target_and_a_state_dict_holds_none_of_it() -> None:
    model = target("llama")
    for kind in ("eagle", "eagle3_borrowed", "mtp"):
        draft = draft_of(kind, model)
        again = copy.deepcopy(draft)
        assert again.shared is draft.shared
        assert not any("embed" in name or "head" in name for name in draft.state_dict())
        before = draft.unroll(tokens(1, 5), random_features(draft, 1, 5), num_steps=1)[0]
        model.get_output_embeddings().weight.data.mul_(2)  # it follows the policy
        after = again.unroll(tokens(1, 5), random_features(draft, 1, 5), num_steps=1)[0]
        torch.testing.assert_close(after, 2 * before)


def test_hooks_on_the_target_do_not_see_the_draft() -> None:
    model = target("llama")
    calls: list[str] = []
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.register_forward_hook(lambda *_: calls.append("seen"))
    draft = draft_of("eagle", model)
    draft.unroll(tokens(1, 5), random_features(draft, 1, 5), num_steps=2)
    assert calls == []


def test_a_draft_learns_its_target() -> None:
    model = target("llama")
    draft = Eagle3Draft.from_target(model)
    ids = tokens(8, 24)
    features = features_of(model, ids, draft.feature_layers)
    wanted = model(ids).logits.detach()[:, 1:].softmax(-1)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        (logits,) = draft.unroll(ids, features, num_steps=1)
        kl = torch.nn.functional.kl_div(
            logits[:, :-1].log_softmax(-1), wanted, reduction="none"
        ).sum(-1)
        losses.append(kl.mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4, (losses[0], losses[-1])


def test_default_layers_are_those_whose_outputs_sglang_captures() -> None:
    assert [default_feature_layers(n) for n in (36, 8, 7)] == [(1, 17, 32), (1, 3, 4), (1, 2, 3)]
    assert [default_feature_layers(n) for n in (6, 4, 3, 2, 1)] == [
        (2, 3, 4),
        (0, 1, 2),
        (0, 1),
        (0, 1),
        (0,),
    ]


def test_frequent_tokens_prefer_lower_ids_among_equals() -> None:
    assert frequent_tokens(torch.tensor([2, 2, 3, 0, 2]), 3).tolist() == [0, 1, 2]
    with pytest.raises(SettingError, match="size is 6; expected 1 to 5"):
        frequent_tokens(torch.zeros(5), 6)
