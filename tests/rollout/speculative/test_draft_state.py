"""What a draft's trainer saves, and which states it refuses."""

import copy
import re

import pytest
import torch
from torch import nn

from miles.errors import CheckpointError
from miles.rollout.speculative import Eagle3Draft, MTPDraft
from tests.models import token_batch
from tests.rollout.speculative.targets import target
from tests.rollout.speculative.tiny_draft import (
    TinyDraft,
    observe_once,
    policy_of,
    trainer_of,
    weights,
)


@pytest.mark.parametrize("draft_of", [TinyDraft, Eagle3Draft.from_target])
def test_interrupted_and_resumed_equals_uninterrupted(draft_of, tmp_path):
    policy = policy_of()

    def made():
        torch.manual_seed(0)
        return trainer_of(draft_of(policy), policy, lr=1e-2, warmup_steps=6)

    def train(trainer, steps):
        found = []
        for step in steps:
            observe_once(trainer, token_batch(seed=step))
            found.append(trainer.step())
        return found

    whole = made()
    expected = train(whole, range(6))
    first = made()
    train(first, range(3))
    torch.save(first.state_dict(), tmp_path / "draft.pt")
    train(first, range(3, 5))  # what goes on does not change what was saved
    second = made()
    second.load_state_dict(torch.load(tmp_path / "draft.pt"))
    assert second.version == 3
    torch.testing.assert_close(train(second, range(3, 6)), expected[3:], rtol=0, atol=0)
    torch.testing.assert_close(weights(second.draft), weights(whole.draft), rtol=0, atol=0)


def everything(draft):
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


def test_a_state_is_of_the_whole_draft_and_of_nothing_that_is_the_policys():
    policy = target("deepseek_v3")
    states, drafts = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        draft = MTPDraft.from_target(policy)
        draft.stages[0].eh_proj.requires_grad_(False)  # a part that is not trained
        for name, buffer in draft.named_buffers():
            assert name.endswith("e_score_correction_bias")  # what routes its tokens
            buffer.normal_()
        draft.embedding = policy.get_input_embeddings().requires_grad_(False)
        draft.register_buffer("scratch", torch.full((2,), seed), persistent=False)
        drafts.append(draft)
        states.append(trainer_of(draft, policy).state_dict())
        assert states[-1]["draft"].keys() == everything(draft).keys() - {"embedding.weight"}
    trainer, before = trainer_of(drafts[1], policy), everything(drafts[1])
    for part in ("stages.0.eh_proj.weight", next(n for n in before if n.endswith("_bias"))):
        lacking = {name: value for name, value in states[0]["draft"].items() if name != part}
        with pytest.raises(CheckpointError, match=f"another draft.*{re.escape(part)}"):
            trainer.load_state_dict(states[0] | {"draft": lacking})
    torch.testing.assert_close(everything(drafts[1]), before, rtol=0, atol=0)
    trainer.load_state_dict(states[0])
    torch.testing.assert_close(everything(drafts[1]), everything(drafts[0]), rtol=0, atol=0)
    assert drafts[1].scratch.tolist() == [1, 1]


def test_without_a_policy_no_frozen_weight_is_written():
    """It may be the policy's, which has learnt since."""
    policy = policy_of()
    embedding = policy.get_input_embeddings().requires_grad_(False)

    def made(seed, given=None):
        draft = TinyDraft(policy, seed=seed)
        draft.embedding = embedding
        draft.register_buffer("scratch", torch.full((2,), seed))
        return trainer_of(draft, given)

    state, trainer = made(1).state_dict(), made(2)
    embedding.weight.data.mul_(2)
    before = everything(trainer.draft)
    with pytest.raises(CheckpointError, match=r"\['embedding.weight'\] are frozen.*give policy="):
        trainer.load_state_dict(state)
    torch.testing.assert_close(everything(trainer.draft), before, rtol=0, atol=0)
    learnt = embedding.weight.clone()
    embedding.weight.data.copy_(state["draft"]["embedding.weight"])  # the policy's, loaded first
    trainer.load_state_dict(state)
    torch.testing.assert_close(everything(trainer.draft), state["draft"], rtol=0, atol=0)
    embedding.weight.data.copy_(learnt)
    made(3, policy).load_state_dict(made(4, policy).state_dict())
    assert embedding.weight.equal(learnt)


def test_a_vocabulary_is_held_once():
    policy = policy_of()
    draft = Eagle3Draft.from_target(policy, target_ids=torch.arange(0, 40, 2))
    state = trainer_of(draft, policy).state_dict()
    assert state["draft"].keys() == dict(draft.named_parameters()).keys()
    assert state["target_ids"].equal(draft.target_ids)


def test_a_state_of_another_draft_is_refused_whole():
    policy = policy_of()
    trainer = trainer_of(TinyDraft(policy), policy)
    state = trainer_of(TinyDraft(policy, reduced=False), policy).state_dict()
    before = weights(trainer.draft)
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        trainer.load_state_dict(state)
    with pytest.raises(CheckpointError, match="version"):
        trainer.load_state_dict({"draft": {}, "optimizer": {}})
    sgd = torch.optim.SGD(trainer.draft.parameters(), lr=0.1, momentum=0.9)
    sgd.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    other = trainer.state_dict() | {"optimizer": sgd.state_dict()}
    with pytest.raises(CheckpointError, match="optimizer"):
        trainer.load_state_dict(other)
    torch.testing.assert_close(weights(trainer.draft), before, rtol=0, atol=0)


def test_a_state_of_other_target_ids_or_a_broken_optimizer_is_refused_whole():
    policy = policy_of()
    one, other = (
        trainer_of(Eagle3Draft.from_target(policy, target_ids=torch.arange(i, i + 8)), policy)
        for i in (0, 8)
    )
    before, state = weights(other.draft), other.state_dict()
    with pytest.raises(CheckpointError, match="other target_ids"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(CheckpointError, match="other target_ids"):
        other.load_state_dict(state | {"target_ids": None})
    for broken in ({}, None, {"param_groups": state["optimizer"]["param_groups"]}):
        with pytest.raises(CheckpointError, match="state's optimizer is another one"):
            other.load_state_dict(state | {"optimizer": broken, "version": 7})
    torch.testing.assert_close(weights(other.draft), before, rtol=0, atol=0)
    assert other.version == 0
    sgd = torch.optim.SGD(one.draft.parameters(), lr=0.5, momentum=0.9)
    observe_once(one, token_batch())
    one.step()
    sgd.load_state_dict(
        {
            "state": {0: {"momentum_buffer": torch.zeros(1)}},
            "param_groups": sgd.state_dict()["param_groups"],
        }
    )
    with pytest.raises(CheckpointError, match="state's optimizer is another one"):
        other.load_state_dict(state | {"optimizer": sgd.state_dict()})
    observe_once(other, token_batch())
    other.step()
    other.load_state_dict(state)


def test_a_state_of_another_class_or_order_of_optimizer_is_refused_whole():
    policy = policy_of()

    def made(optimizer=None, order=1):
        draft = TinyDraft(policy)
        own = optimizer and optimizer([*draft.parameters()][::order])
        return trainer_of(draft, policy, optimizer=own)

    def learn(trainer):
        observe_once(trainer, token_batch())
        trainer.step()

    def adagrad(params):
        return torch.optim.Adagrad(params, lr=0.1)

    def sgd(params):
        return torch.optim.SGD(params, lr=0.1)

    for one, other, words in (
        (made(), made(sgd), "it is AdamW, the trainer's is SGD"),
        (made(sgd), made(), "it is SGD, the trainer's is AdamW"),
        (made(adagrad), made(adagrad, order=-1), "sum of parameter 0 has shape .*another order"),
    ):
        learn(one)
        before = weights(other.draft), copy.deepcopy(other.optimizer.state_dict())
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict(one.state_dict())
        after = weights(other.draft), other.optimizer.state_dict()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert other.version == 0
        learn(other)
        state = other.state_dict()
        del state["optimizer"]["param_groups"][0]["lr"]
        with pytest.raises(CheckpointError, match=r"a group lacks \['lr'\]"):
            other.load_state_dict(state)


@pytest.mark.parametrize("name", ["Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "Rprop"])
def test_a_state_of_the_same_optimizer_is_loaded_whatever_that_keeps(name):
    policy, found = policy_of(), []
    for _ in range(2):
        draft = TinyDraft(policy)
        optimizer = getattr(torch.optim, name)(draft.parameters(), lr=0.1)
        trainer = trainer_of(draft, policy, optimizer=optimizer)
        if found:
            trainer.load_state_dict(found[0])
            trainer.load_state_dict(found[0])  # torch's defaults are others now
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)  # adds to the groups
        observe_once(trainer, token_batch())
        trainer.step()
        found.append(trainer.state_dict())
    assert found[1]["version"] == 2


def test_a_state_of_an_older_torch_gets_the_settings_that_torch_gives_it():
    """And is refused, with nothing changed, where one is missing that torch does not know."""
    policy = policy_of()
    trainer = trainer_of(TinyDraft(policy), policy)
    observe_once(trainer, token_batch())
    trainer.step()
    before, state = copy.deepcopy(trainer.optimizer.state_dict()), trainer.state_dict()
    for name in ("decoupled_weight_decay", "maximize", "foreach"):  # came one by one to AdamW
        state["optimizer"]["param_groups"][0].pop(name, None)
    broken = copy.deepcopy(state)
    del broken["optimizer"]["param_groups"][0]["betas"]
    with pytest.raises(CheckpointError, match=r"a group lacks \['betas'\]"):
        trainer.load_state_dict(broken)
    torch.testing.assert_close(trainer.optimizer.state_dict(), before, rtol=0, atol=0)
    trainer.load_state_dict(state)
    observe_once(trainer, token_batch())
    trainer.step()
    assert trainer.version == 2


def test_the_learning_rate_is_the_trainers_and_not_that_of_the_state():
    policy = policy_of()
    state = trainer_of(TinyDraft(policy), policy, lr=0.1, warmup_steps=10)
    observe_once(state, token_batch())
    state.step()
    resumed = trainer_of(TinyDraft(policy), policy, lr=0.5, warmup_steps=0)
    resumed.load_state_dict(state.state_dict())
    observe_once(resumed, token_batch())
    assert resumed.step()["draft/lr"] == 0.5
