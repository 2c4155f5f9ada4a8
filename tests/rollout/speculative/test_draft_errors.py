"""What draft models refuse, and in which words."""

import pytest
import torch
from torch import nn

from miles.errors import DtypeError, SettingError, ShapeError, UnsupportedModelError
from miles.rollout.speculative import FINAL, Eagle3Draft, EagleDraft, MTPDraft, StandaloneDraft
from tests.models import VOCAB, tiny
from tests.rollout.speculative.targets import (
    cached_draft,
    draft_of,
    extend,
    propose,
    target,
    tokens,
    uniforms,
)


def test_another_vocabulary_or_hidden_size() -> None:
    draft = draft_of("eagle", target("llama"))
    other = target("llama", vocab_size=VOCAB + 2)
    with pytest.raises(ShapeError, match="vocab_size 40, but this model's is 42"):
        draft.check_target(other)
    with pytest.raises(ShapeError, match=r"embedding has a weight of shape \(42, 16\)"):
        EagleDraft(draft.config, other.get_input_embeddings(), other.get_output_embeddings())
    with pytest.raises(ShapeError, match="hidden_size 16, but this model's is 32"):
        draft.check_target(target("llama", hidden_size=32))
    with pytest.raises(ShapeError, match="vocabulary of 42, the target one of 40"):
        StandaloneDraft.from_target(target("llama"), other)


def test_layers_out_of_range() -> None:
    with pytest.raises(SettingError, match=r"\[4\] are not among the target's 4 layers"):
        Eagle3Draft.from_target(target("llama"), feature_layers=(0, 4))
    with pytest.raises(SettingError, match="repeat or go back"):
        Eagle3Draft.from_target(target("llama"), feature_layers=(2, 1))
    with pytest.raises(SettingError, match="outputs of decoder layers"):
        Eagle3Draft.from_target(target("llama"), feature_layers=(1, FINAL))
    draft = draft_of("eagle3", target("llama"))
    with pytest.raises(SettingError, match="not among the target's 2 layers"):
        draft.check_target(target("llama", num_layers=2))


def test_a_vocabulary_that_leaves_the_targets() -> None:
    make = Eagle3Draft.from_target
    model = target("llama")
    with pytest.raises(SettingError, match="ids 3 to 40; expected those of the target, 0 to 39"):
        make(model, target_ids=torch.tensor([3, 40]))
    with pytest.raises(SettingError, match="more than one of its tokens to 3; expected"):
        make(model, target_ids=torch.tensor([3, 3]))
    with pytest.raises(DtypeError, match="expected an int64 list"):
        make(model, target_ids=torch.tensor([3.0]))
    with pytest.raises(SettingError, match="a head of its own"):
        make(model, target_ids=torch.tensor([3]), own_head=False)


def test_features_of_another_width() -> None:
    draft = cached_draft("eagle3")
    with pytest.raises(ShapeError, match="16 numbers a position; this draft reads 48"):
        draft.unroll(tokens(1, 5), torch.zeros(1, 5, 16), num_steps=1)
    with pytest.raises(ShapeError, match="one row for each"):
        draft.unroll(tokens(1, 5), torch.zeros(1, 4, 48), num_steps=1)
    with pytest.raises(ShapeError, match="give features_BLF"):
        draft.unroll(tokens(1, 5), None, num_steps=1)
    with pytest.raises(DtypeError, match="expected floating point"):
        draft.unroll(tokens(1, 5), torch.zeros(1, 5, 48, dtype=torch.int64), num_steps=1)
    memory = draft.memory(num_slots=1, max_context=8)
    with pytest.raises(ShapeError, match="16 numbers a position"):
        memory.extend([0], [[1, 2]], [0], [torch.zeros(1, 16)])
    with pytest.raises(ShapeError, match=r"expected \[1, 48\]"):
        memory.extend([0], [[1, 2]], [0], [torch.zeros(2, 48)])
    with pytest.raises(ShapeError, match="got no features"):
        memory.extend([0], [[1, 2]], [0], None)


def test_tensors_of_unroll() -> None:
    draft = cached_draft("eagle")
    features = torch.zeros(1, 5, 16)
    with pytest.raises(ShapeError, match=r"expected int64 \[batch, length\]"):
        draft.unroll(tokens(5), features, num_steps=1)
    with pytest.raises(ShapeError, match="seq_ids_BL has shape"):
        draft.unroll(tokens(1, 5), features, num_steps=1, seq_ids_BL=torch.zeros(1, 4))
    with pytest.raises(SettingError, match="num_steps is 0"):
        draft.unroll(tokens(1, 5), features, num_steps=0)
    with pytest.raises(SettingError, match="num_steps is 4; expected 1 to 3"):
        cached_draft("mtp_3").unroll(tokens(1, 5), features, num_steps=4)


def test_slots_and_starts() -> None:
    draft = cached_draft("eagle")
    memory = draft.memory(num_slots=2, max_context=8)
    one = [torch.zeros(1, 16)]
    with pytest.raises(SettingError, match="different ones of 0 to 1"):
        memory.extend([2], [[1, 2]], [0], one)
    memory.extend([0], [[1, 2]], [0], one)
    with pytest.raises(SettingError, match=r"position 3 with 2 tokens; expected .* 1 on"):
        memory.extend([0], [[1, 2]], [3], one)
    with pytest.raises(ShapeError, match="expected one for each"):
        memory.extend([0, 1], [[1, 2]], [0], one)
    with pytest.raises(SettingError, match="would hold 9 tokens; max_context is 8"):
        memory.extend([1], [list(range(9))], [0], [torch.zeros(8, 16)])
    with pytest.raises(SettingError, match="at least 1 slot of at least 2 tokens"):
        draft.memory(num_slots=0, max_context=8)


def test_proposals() -> None:
    draft = cached_draft("eagle")
    memory = draft.memory(num_slots=2, max_context=8)
    extend(memory, 0, tokens(7), torch.zeros(7, 16))
    propose(memory, [0], steps=3)
    with pytest.raises(SettingError, match="2 places left of 8, too few for 4"):
        propose(memory, [0], steps=4)
    with pytest.raises(SettingError, match="temperatures are"):
        propose(memory, [0], temperature=-1.0)
    with pytest.raises(ShapeError, match=r"expected \(1, 2\)"):
        memory.propose([0], num_steps=2, temperatures=[1.0], uniforms_RK=uniforms(1, 3))
    with pytest.raises(DtypeError, match="expected float64"):
        memory.propose([0], num_steps=1, temperatures=[1.0], uniforms_RK=torch.zeros(1, 1))
    memory.extend([1], [[3]], [0], [torch.zeros(0, 16)])
    with pytest.raises(SettingError, match="needs two tokens"):
        propose(memory, [1])


def test_targets_that_a_draft_cannot_follow() -> None:
    gemma = tiny("gemma3")
    with pytest.raises(UnsupportedModelError, match="not one set of rotary ones"):
        EagleDraft.from_target(gemma)
    sliding = tiny("gemma3", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UnsupportedModelError, match="'sliding_attention'"):
        MTPDraft.from_target(sliding)
    with pytest.raises(UnsupportedModelError, match="cannot be a draft"):
        StandaloneDraft(gemma, vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError, match="no configuration of transformers"):
        EagleDraft.from_target(nn.Linear(2, 2))
    scaled = target("llama")
    scaled.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping=30"):
        EagleDraft.from_target(scaled)
