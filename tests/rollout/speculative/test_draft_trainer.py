"""A draft that learns from the policy's own passes, and never touches the policy."""

import copy

import pytest
import torch
from torch import nn

from miles import Packed
from miles.errors import (
    EmptyBatchError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnsupportedModelError,
)
from miles.rollout.speculative import AcceptanceStats, Eagle3Draft, NgramDraft
from miles.rollout.speculative.losses import MaskPolicy, TargetLogits, draft_loss
from miles.rollout.speculative.trainer import Captured, DraftTrainer
from tests.models import Passes, token_batch
from tests.rollout.speculative.tiny_draft import (
    TinyDraft,
    grads,
    grads_after,
    mask_of,
    observe_once,
    policy_of,
    trainer_of,
    weights,
)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["kl", "hard", "tv", "lk"])
def test_a_draft_learns_to_be_accepted(family, kind):
    policy = policy_of(family)
    trainer = trainer_of(
        TinyDraft(policy, reduced=False), policy, lr=1e-2, kind=kind, warmup_steps=5, steps=2
    )
    ids_BL = token_batch(8, 12)
    seen = []
    for _ in range(60):
        observe_once(trainer, ids_BL)
        seen.append(trainer.step())
    first, last = seen[0], seen[-1]
    assert last["draft/loss"] < first["draft/loss"]
    if kind != "hard":  # these tokens are not the policy's samples, and hard labels are all it sees
        assert last["draft/agreement/step_0"] > first["draft/agreement/step_0"] + 0.2
        assert last["draft/accept_length"] > first["draft/accept_length"] + 0.2
    assert trainer.version == 60 and seen[0]["draft/lr"] == pytest.approx(1e-2 / 5)


@pytest.mark.parametrize("draft_of", [TinyDraft, Eagle3Draft.from_target])
def test_no_gradient_reaches_the_policy_and_its_own_stays_what_it_is(draft_of):
    policy, alone = policy_of(), policy_of()
    ids_BL = token_batch()
    alone(ids_BL).logits.logsumexp(-1).sum().backward()
    trainer = trainer_of(draft_of(policy), policy)
    passes = Passes(policy, at=10)
    with trainer.capture():
        loss = policy(ids_BL).logits.logsumexp(-1).sum()
    trainer.observe(mask_of(ids_BL))
    assert all(p.grad is None for p in policy.parameters())
    loss.backward()
    trainer.step()
    assert passes.count == 1
    expected = dict(alone.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=0, msg=name)
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0, msg=name)


def test_the_loss_is_draft_loss_over_the_captured_pass():
    policy = policy_of()
    draft, ids_BL = TinyDraft(policy), token_batch()
    observe_once(trainer_of(draft, policy, steps=2), ids_BL)
    with torch.no_grad():
        out = policy(ids_BL, output_hidden_states=True)
    features = torch.cat([out.hidden_states[1], out.hidden_states[2]], -1)
    loss, _ = draft_loss(
        draft.unroll(ids_BL, features, num_steps=2), out.logits, ids_BL, mask_of(ids_BL),
        denominator=1, target_ids=draft.target_ids,
    )  # fmt: skip
    names, params = zip(*draft.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
    torch.testing.assert_close(grads(draft), expected)


def test_a_head_run_at_judged_places_only_gives_the_same():
    policy = policy_of()
    ids_BL, draft = token_batch(), Eagle3Draft.from_target(policy)
    found = grads_after(policy, ids_BL, draft=draft)
    draft.zero_grad()
    whole = TinyDraft(policy)  # stands for a draft without unroll_states
    whole.__dict__.update(feature_layers=draft.feature_layers, unroll=draft.unroll)
    whole.register_buffer("target_ids", None)
    whole.named_parameters = draft.named_parameters
    trainer = trainer_of(whole, policy)
    observe_once(trainer, ids_BL)
    torch.testing.assert_close(grads(draft), found)


@pytest.mark.parametrize("draft_of", [TinyDraft, Eagle3Draft.from_target])
def test_micro_batches_make_the_step_of_the_whole_batch(draft_of):
    ids_BL, found = token_batch(4, 9), []
    mask_BL = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    for size in (4, 2, 1):
        policy = policy_of(dtype=torch.float64)
        torch.manual_seed(0)
        trainer = trainer_of(draft_of(policy), policy, lr=1e-2, warmup_steps=0)
        for ids, mask in zip(ids_BL.split(size), mask_BL.split(size), strict=True):
            observe_once(trainer, ids, mask)
        assert trainer.pending == 4 // size
        metrics = trainer.step()
        assert trainer.pending == 0
        found.append((metrics, weights(trainer.draft)))
    for metrics, after in found[1:]:
        torch.testing.assert_close(after, found[0][1])
        torch.testing.assert_close(metrics, found[0][0])


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_share_of_the_sequences_is_the_same_ones_however_the_batch_is_cut(share):
    taken = {0.5: [0, 2, 4], 0.3: [0, 3]}[share]
    ids_BL = token_batch(6, 9)
    mask_BL = mask_of(ids_BL)

    def learnt(batches, share=share):
        policy = policy_of(dtype=torch.float64)
        trainer = trainer_of(TinyDraft(policy), policy, share=share)
        for ids, mask, kwargs in batches:
            observe_once(trainer, ids, mask, **kwargs)
        return trainer.pending, grads(trainer.draft)

    _, expected = learnt([(ids_BL[taken], mask_BL[taken], {})], share=1.0)
    positions = {"position_ids": torch.arange(9).repeat(6)[None]}
    packed = [(ids_BL.reshape(1, -1), mask_BL.reshape(1, -1), positions)]
    for pending, batches in (
        (1, [(ids_BL, mask_BL, {})]),
        (2, [(ids_BL[:3], mask_BL[:3], {}), (ids_BL[3:], mask_BL[3:], {})]),
        (len(taken), [(i[None], m[None], {}) for i, m in zip(ids_BL, mask_BL, strict=True)]),
        (1, packed),
    ):
        found = learnt(batches)
        assert found[0] == pending
        torch.testing.assert_close(found[1], expected)


def test_a_row_of_padding_is_observed_and_takes_no_sequence_s_place():
    policy, ids_BL = policy_of(), token_batch(1, 9)
    nothing = torch.zeros(1, 9, dtype=torch.int64)
    for draft in (TinyDraft(policy), Eagle3Draft.from_target(policy)):
        trainer = DraftTrainer(draft, policy)
        observe_once(trainer, ids_BL, nothing.bool(), attention_mask=nothing)
        assert trainer.pending == 1
        observe_once(trainer, ids_BL)
        assert trainer.pending == 2
        trainer.step()


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_a_share_is_of_the_sequences_with_places_to_learn_from(tokens):
    ids_BL = token_batch(8, 9)
    mask_BL = mask_of(ids_BL)
    mask_BL[[0, 3, 4]] = False
    mask_BL[4, 0] = True  # no step predicts the first place of a sequence
    taken = [1, 5, 7] if tokens == "response" else [0, 2, 4, 6]

    def learnt(batches, share=0.5):
        policy = policy_of(dtype=torch.float64)
        rule = MaskPolicy(tokens=tokens)
        trainer = trainer_of(TinyDraft(policy), policy, share=share, mask_policy=rule)
        for ids, mask, kwargs in batches:
            observe_once(trainer, ids, mask, **kwargs)
        found = grads(trainer.draft)
        trainer.step()
        return found

    expected = learnt([(ids_BL[taken], mask_BL[taken], {})], share=1.0)
    packed = {"position_ids": torch.arange(9).repeat(8)[None]}
    for batches in (
        [(ids_BL, mask_BL, {})],
        [(i[None], m[None], {}) for i, m in zip(ids_BL, mask_BL, strict=True)],
        [(ids_BL.reshape(1, -1), mask_BL.reshape(1, -1), packed)],
    ):
        torch.testing.assert_close(learnt(batches), expected)


def test_every_step_learns_from_its_first_sequence():
    policy = policy_of()
    trainer = DraftTrainer(TinyDraft(policy), policy)  # a quarter of the sequences by default
    for _ in range(3):
        observe_once(trainer, token_batch(1, 9))
        assert trainer.pending == 1
        trainer.step()


def test_offloaded_weights_are_there_and_come_back_the_same():
    policy, found = policy_of(), []
    for offload in (False, True):
        trainer = trainer_of(TinyDraft(policy), policy, lr=1e-2)
        names = [id(p) for p in trainer.draft.parameters()]
        observe_once(trainer, token_batch())
        if offload:
            with pytest.raises(SettingError, match="step"):
                trainer.offload_()
        trainer.step()
        if offload:
            before = dict(trainer.named_tensors())
            trainer.offload_()
            trainer.offload_()
            torch.testing.assert_close(dict(trainer.named_tensors()), before, rtol=0, atol=0)
            with trainer.capture():
                policy(token_batch())
            with pytest.raises(SettingError, match="onload_"):
                trainer.observe(mask_of(token_batch()))
            with pytest.raises(SettingError, match="onload_"):
                trainer.step()
            trainer.discard()
            trainer.onload_()
        observe_once(trainer, token_batch())
        trainer.step()
        assert [id(p) for p in trainer.draft.parameters()] == names
        found.append(weights(trainer.draft))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("where", ["features", "logits", "weights"])
def test_nan_is_named_and_no_step_is_taken(where):
    policy, ids_BL = policy_of(), token_batch()
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy)
    observe_once(trainer, ids_BL)
    trainer.step()
    before, state = weights(draft), copy.deepcopy(trainer.optimizer.state_dict())
    observe_once(trainer, ids_BL)
    with trainer.capture():
        policy(ids_BL)
    if where == "features":
        trainer._captured.features_BLF[0, 3, 0] = torch.nan
        words = "1 features of the policy"
    elif where == "logits":
        seen = trainer._captured
        logits = seen.target.values_BKX.clone()
        logits[1, 4, 5] = torch.nan
        trainer._captured = Captured(**vars(seen) | {"target": TargetLogits(values_BKX=logits)})
        trainer._captured.__dict__["values_version"] = None
        words = "loss of unrolled step 0 is nan"
    else:
        draft.back.weight.data[0, 0] = before["back.weight"][0, 0] = torch.nan
        words = "loss of unrolled step 1 is nan"
    trainer.observe(mask_of(ids_BL))
    with pytest.raises(NonFiniteError, match=words):
        trainer.step()
    torch.testing.assert_close(weights(draft), before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(trainer.optimizer.state_dict(), state, rtol=0, atol=0)
    assert trainer.version == 1 and trainer.pending == 0
    if where != "weights":
        observe_once(trainer, ids_BL)
        trainer.step()


def test_named_tensors_are_the_checkpoints_names_without_vocabulary_maps():
    policy = policy_of()
    ids = torch.arange(0, 40, 2)
    draft = Eagle3Draft.from_target(policy, target_ids=ids)
    trainer = trainer_of(draft, policy)
    named = dict(trainer.named_tensors())
    assert not {"d2t", "t2d"} & named.keys()
    assert {"fc.weight", "norm.weight", "lm_head.weight"} <= named.keys()
    observe_once(trainer, token_batch())
    trainer.step()
    assert named["fc.weight"].data_ptr() == draft.fc.weight.data_ptr()  # live, not stale copies


class Advice:
    def __init__(self):
        self.seen, self.answer = [], False

    def observe(self, stats):
        self.seen.append(stats)

    def should_train(self):
        return self.answer


def test_due_asks_the_controller():
    policy, advice = policy_of(), Advice()
    assert trainer_of(TinyDraft(policy), policy).due()
    trainer = trainer_of(TinyDraft(policy), policy, controller=advice)
    assert not trainer.due() and not advice.seen
    advice.answer = True
    stats = AcceptanceStats.count(accepted=[1], proposed=[3])
    assert trainer.due(stats) and advice.seen == [stats]


def test_misuse_is_refused_in_words():
    policy, ids_BL = policy_of(), token_batch()
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy)
    with pytest.raises(SettingError, match="inside capture"):
        trainer.observe(mask_of(ids_BL))
    with pytest.raises(EmptyBatchError, match="observe"):
        trainer.step()
    with pytest.raises(SettingError, match="0 forward passes"), trainer.capture():
        pass
    with pytest.raises(SettingError, match="2 forward passes"), trainer.capture():
        policy(ids_BL), policy(ids_BL)
    with pytest.raises(SettingError, match="input_ids"), trainer.capture():
        policy(inputs_embeds=policy.get_input_embeddings()(ids_BL))
    with trainer.capture():
        logits = policy(ids_BL).logits
    with pytest.raises(SettingError, match="waiting"), trainer.capture():
        pass
    with pytest.raises(ShapeError, match="mask_BL"):
        trainer.observe(mask_of(ids_BL)[:, 1:])
    with pytest.raises(ShapeError, match="Packed has 7 tokens"):
        trainer.observe(Packed.from_padded(mask_of(ids_BL)[:1]))
    logits.div_(0.7)
    with pytest.raises(SettingError, match="changed in place"):
        trainer.observe(mask_of(ids_BL))
    trainer.discard()
    observe_once(trainer, ids_BL, torch.zeros_like(ids_BL).bool())
    with pytest.raises(EmptyBatchError, match="no place"):
        trainer.step()
    observe_once(trainer, ids_BL)
    with pytest.raises(SettingError, match="state_dict"):
        trainer.state_dict()


def test_settings_that_cannot_be_are_refused_in_words():
    policy = policy_of()
    with pytest.raises(SettingError, match="NgramDraft has no weights to train; expected"):
        DraftTrainer(NgramDraft(), policy)
    draft = TinyDraft(policy)
    for changes, words in (
        ({"steps": 0}, "steps is 0"),
        ({"kind": "mse"}, "kl, hard, tv, lk"),
        ({"share": 0.0}, "share"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"optimizer": torch.optim.SGD(policy.parameters(), lr=0.1)}, "optimizer holds"),
    ):
        with pytest.raises(SettingError, match=words):
            trainer_of(draft, policy, **changes)
    with pytest.raises(SettingError, match="no policy"), trainer_of(draft, None).capture():
        pass
    far = trainer_of(TinyDraft(policy, layers=(0, 4)), policy)
    with pytest.raises(SettingError, match=r"layers \[4\]"), far.capture():
        pass
    bare = trainer_of(draft, nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="no decoder"), bare.capture():
        pass
    with pytest.raises(SettingError, match=r"fc\.weight.* float16.* keep the draft in float32"):
        trainer_of(TinyDraft(policy).half(), policy)
    draft.embedding = policy.get_input_embeddings()
    with pytest.raises(SettingError, match="parameters of the policy"):
        trainer_of(draft, policy)
    with pytest.raises(ShapeError, match="vocab_size"):
        trainer_of(Eagle3Draft.from_target(policy), policy_of(vocab_size=48))


def test_an_optimizer_of_ones_own_is_used():
    policy = policy_of()
    draft = TinyDraft(policy)
    sgd = torch.optim.SGD(draft.parameters(), lr=0.5)
    trainer = trainer_of(draft, policy, optimizer=sgd, warmup_steps=2, max_grad_norm=None)
    before = weights(draft)
    observe_once(trainer, token_batch())
    count = float(trainer._metrics[0]["draft/loss"].count)
    gradient = grads(draft)
    trainer.step()
    for name, parameter in draft.named_parameters():
        expected = before[name] - 0.25 * gradient[name] / count
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_schedule_of_ones_own_rules_after_the_warm_up(warmup):
    policy = policy_of()
    draft, found = TinyDraft(policy), []
    sgd = torch.optim.SGD(draft.parameters(), lr=0.5)
    trainer = trainer_of(draft, policy, optimizer=sgd, warmup_steps=warmup)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.1)
    for step in range(4):
        observe_once(trainer, token_batch())
        found.append(float(trainer.step()["draft/lr"]))
        if step + 1 >= warmup:
            schedule.step()
    expected = [0.5, 0.05, 0.005, 0.0005] if not warmup else [0.25, 0.5, 0.05, 0.005]
    assert found == pytest.approx(expected)
