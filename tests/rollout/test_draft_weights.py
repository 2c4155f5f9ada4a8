"""A draft's weights reach a running engine, by any carrier, with a version of their own."""

import pytest
import torch

from miles.errors import SettingError, SyncError
from miles.rollout.speculative import Eagle3Draft, MTPDraft, NgramDraft, StandaloneDraft
from miles.sync import InProcessSyncer, SharedMemoryReceiver, SharedMemorySyncer
from tests.models import Passes, generate_all, params, serving, tiny

PROMPTS = [[5, 6, 7], [1, 2], [9]]


def weights_of(draft):
    return {name: tensor.detach().clone() for name, tensor in draft.checkpoint_tensors().items()}


@pytest.mark.parametrize("make", [Eagle3Draft.from_target, MTPDraft.from_target])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_pushed_weights_are_proposed_with(make, name):
    model = tiny(name)
    torch.manual_seed(0)
    served = make(model)
    torch.manual_seed(1)
    better = weights_of(make(model))
    with serving(model, draft=served) as engine:
        report = InProcessSyncer(engine.draft_weights).push(better.items(), version=3)
        assert engine.draft_weights.weight_version == 3 and engine.weight_version == 0
        assert report.num_tensors == len(better)
        generate_all(engine, PROMPTS, params(30, seed=0))
        got = engine.acceptance()
    torch.manual_seed(1)
    with serving(model, draft=make(model)) as engine:
        generate_all(engine, PROMPTS, params(30, seed=0))
        assert got == engine.acceptance()


def test_a_perfect_draft_arrives_in_mid_answer():
    model = tiny("llama")
    draft = StandaloneDraft.from_target(model, tiny("llama", seed=5))
    with serving(model, draft=draft) as engine:
        passes = Passes(engine.model, at=4)
        future = engine.submit([5, 6, 7], params(50, seed=4))
        passes.wait()
        perfect = StandaloneDraft.from_target(model, tiny("llama"))
        InProcessSyncer(engine.draft_weights).push(weights_of(perfect).items(), version=1)
        passes.go_on()
        assert future.result(timeout=60).num_generated_tokens == 50
        before = engine.acceptance()
        generate_all(engine, PROMPTS, params(30, seed=0))
        after = engine.acceptance()
    # The answer under way had keys of the old draft; those that came later have not.
    assert sum(before.accepted) < sum(before.proposed)
    accepted = sum(after.accepted) - sum(before.accepted)
    assert accepted == sum(after.proposed) - sum(before.proposed) > 0


def test_shared_memory_carries_a_draft(tmp_path):
    model = tiny("llama")
    draft = Eagle3Draft.from_target(model)
    wanted = weights_of(Eagle3Draft.from_target(model))
    with serving(model, draft=draft) as engine:
        receiver = SharedMemoryReceiver(engine.draft_weights, tmp_path / "draft")
        syncer = SharedMemorySyncer(tmp_path / "draft")
        for version in (1, 2, 3):
            new = {name: tensor + version for name, tensor in wanted.items()}
            syncer.push(new.items(), version=version)
            assert all(torch.equal(new[n], t) for n, t in draft.checkpoint_tensors().items())
        syncer.close()
        receiver.close()


def test_what_cannot_be_pushed_is_refused():
    model = tiny("llama")
    with serving(model) as engine, pytest.raises(SettingError, match="has no draft"):
        _ = engine.draft_weights
    with (
        serving(model, draft=NgramDraft()) as engine,
        pytest.raises(SettingError, match="NgramDraft has no weights"),
    ):
        _ = engine.draft_weights
    draft = Eagle3Draft.from_target(model)
    with serving(model, draft=draft) as engine:
        syncer = InProcessSyncer(engine.draft_weights)
        before = weights_of(draft)
        missing = {n: t + 1 for n, t in before.items() if n != "fc.weight"}
        with pytest.raises(SyncError, match=r"fc\.weight"):
            syncer.push(missing.items(), version=1)
        syncer.push(before.items(), version=2)
        with pytest.raises(SyncError, match="version 1 is older than 2"):
            syncer.push(before.items(), version=1)
        assert all(torch.equal(before[n], t) for n, t in draft.checkpoint_tensors().items())
