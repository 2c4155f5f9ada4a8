"""A trainer whose mask was given before the pass makes the host wait for no result of the device.

There is no device here: tensors that a test marks, and what is made of them, are taken for its.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miles import Packed
from miles.errors import SettingError
from miles.rollout.speculative import (
    Eagle3Draft,
    EagleDraft,
    MTPDraft,
    StandaloneDraft,
    _chain_attention,
    _host,
    _keys,
    _model_draft,
    _training_batch,
    losses,
    trainer,
)
from miles.rollout.speculative.losses import TargetLogits
from miles.rollout.speculative.trainer import Captured, DraftTrainer
from tests.models import tiny, token_batch
from tests.rollout.speculative.tiny_draft import (
    TinyDraft,
    grads,
    grads_after,
    mask_of,
    observe_once,
    policy_of,
    trainer_of,
)

UPLOADERS = [_chain_attention, _keys, _model_draft, _training_batch, losses, trainer]
aten = torch.ops.aten
WAITS = {aten.nonzero, aten._local_scalar_dense, aten.equal, aten.masked_select, aten._unique2}


class Device(TorchDispatchMode):
    """Refuses what would make the host wait for a marked tensor, or mixes it with another.

    What is made of no tensor (`arange`, `zeros`) may be either's.
    """

    def __init__(self):
        super().__init__()
        self.there, self.here, self.begun = {}, {}, set()

    def mark(self, *values):
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                self.there[tensor.untyped_storage()._cdata] = tensor  # held: a new one has a new id

    def begin(self, *values):
        self.begun |= {id(tensor) for tensor in values if tensor is not None}

    def read(self, tensor):
        assert id(tensor) in self.begun, "a copy was not begun before the pass"
        copy = tensor.detach().clone()
        self.there.pop(copy.untyped_storage()._cdata, None)
        self.here[copy.untyped_storage()._cdata] = copy
        return copy

    def upload(self, tensor, device):
        copy = tensor.clone()
        self.here.pop(copy.untyped_storage()._cdata, None)
        self.mark(copy)
        return copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        storages = [x.untyped_storage()._cdata for x in tensors]
        there = any(storage in self.there for storage in storages)
        here = any(s in self.here and x.ndim for s, x in zip(storages, tensors, strict=True))
        assert not (there and here), f"{func} of the device's and of the CPU's"
        name = func.overloadpacket
        by_mask = name in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert not (there and (name in WAITS or by_mask)), f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (there or here):
                home = self.there if there else self.here
                home[tensor.untyped_storage()._cdata] = tensor
        return out


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(_host.HostCopies, "begin", lambda self, *values: device.begin(*values))
    monkeypatch.setattr(_host.HostCopies, "of", lambda self, tensor: device.read(tensor))
    for module in UPLOADERS:
        monkeypatch.setattr(module, "upload", device.upload)
    return device


def standalone(policy):
    return StandaloneDraft.from_target(policy, tiny("llama", num_hidden_layers=1))


def reduced(policy):
    return Eagle3Draft.from_target(policy, target_ids=torch.arange(0, 40, 2))


LENGTHS = [7, 4, 6]
IDS_BL = token_batch(3, 7)
REAL_BL = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
LAYOUTS = {
    "padded": (IDS_BL, {"attention_mask": REAL_BL.long()}),
    "packed": (
        IDS_BL[REAL_BL][None],
        {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
    ),
    "some logits": (IDS_BL, {"logits_to_keep": torch.tensor([5, 2, 3])}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "draft_of",
    [TinyDraft, Eagle3Draft.from_target, reduced, EagleDraft.from_target, MTPDraft.from_target,
     standalone],
)  # fmt: skip
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_nothing_on_the_device_is_read_by_the_host(layout, draft_of, share, device):
    policy = policy_of(attn_implementation="sdpa")
    ids_BL, call = LAYOUTS[layout]
    learner = DraftTrainer(draft_of(policy), policy, share=share)
    mask_BL = mask_of(ids_BL)
    with learner.capture(mask_BL):
        policy(ids_BL, use_cache=False, **call)
    seen = learner._captured
    device.mark(ids_BL, mask_BL, call, seen.features_BLF, vars(seen.target))
    for module in (policy, learner.draft):
        device.mark([*module.parameters()], [*module.buffers()])
    with device:
        learner.observe()
    assert learner.pending == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_given_before_the_pass_teaches_what_one_given_after_does(packed):
    policy, ids_BL = policy_of(), token_batch()
    mask = Packed.from_padded(mask_of(ids_BL)) if packed else mask_of(ids_BL)
    expected = grads_after(policy, ids_BL, mask)
    learner = trainer_of(TinyDraft(policy), policy)
    with learner.capture(mask):
        policy(ids_BL)
    learner.observe()
    torch.testing.assert_close(grads(learner.draft), expected, rtol=0, atol=0)


def test_sequences_given_before_the_pass_are_those_of_observe():
    policy, ids_BL = policy_of(), token_batch(1, 9)
    seq_ids_BL = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, -1]])
    found = []
    for before in (False, True):
        learner = trainer_of(Eagle3Draft.from_target(policy), policy)
        torch.manual_seed(0)
        for parameter in learner.draft.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        given = (mask_of(ids_BL),), {"seq_ids_BL": seq_ids_BL}
        nothing = (), {}
        first, second = (given, nothing) if before else (nothing, given)
        with learner.capture(*first[0], **first[1]):
            policy(ids_BL)
        learner.observe(*second[0], **second[1])
        found.append(grads(learner.draft))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_mask_is_given_once():
    policy, ids_BL = policy_of(), token_batch()
    mask_BL = mask_of(ids_BL)
    learner = trainer_of(TinyDraft(policy), policy)
    with pytest.raises(SettingError, match="without a mask"), learner.capture(seq_ids_BL=ids_BL):
        policy(ids_BL)
    with learner.capture():
        policy(ids_BL)
    with pytest.raises(SettingError, match="no mask"):
        learner.observe()
    learner.observe(mask_BL)
    with learner.capture(mask_BL):
        policy(ids_BL)
    for again in ({"mask": mask_BL}, {"seq_ids_BL": torch.zeros_like(ids_BL)}):
        with pytest.raises(SettingError, match="given to capture"):
            learner.observe(**again)
    by_hand = Captured(
        input_ids_BL=ids_BL,
        features_BLF=torch.zeros(*ids_BL.shape, learner.draft.fc.in_features - 16),
        target=TargetLogits(values_BKX=torch.zeros(*ids_BL.shape, policy.config.vocab_size)),
    )
    with pytest.raises(SettingError, match="no mask"):
        learner.observe(captured=by_hand)  # what capture() got is of another pass
    learner.observe(mask_BL, captured=dataclasses.replace(by_hand))
    learner.observe()
    assert learner.pending == 3
    with learner.capture(mask_BL):
        policy(ids_BL)
    learner.discard()
    observe_once(learner, ids_BL)  # the mask is forgotten with its pass
    assert learner.pending == 1


def test_a_mask_counts_as_it_was_when_the_pass_began():
    """On a CPU too: a copy to the host of a GPU's mask is of that time."""
    policy, given = tiny("llama"), []
    ids_BL = token_batch(4, 12)
    for change in (False, True):
        mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        torch.manual_seed(0)
        made = DraftTrainer(Eagle3Draft.from_target(policy, dtype=torch.float32), policy, share=1.0)
        with made.capture(mask_BL):
            policy(ids_BL, use_cache=False)
        if change:
            mask_BL[:, 4:] = False
        made.observe()
        given.append(made.step()["draft/loss"].item())
    assert given[0] == given[1]
