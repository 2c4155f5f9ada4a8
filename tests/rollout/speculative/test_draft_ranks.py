"""Data-parallel ranks train one draft. No transformers here: each process would import it."""

import torch
from torch import nn

from miles.errors import EmptyBatchError, NonFiniteError, SettingError
from miles.rollout.speculative.losses import TargetLogits
from miles.rollout.speculative.trainer import Captured, DraftTrainer
from tests.distributed.gloo import run

V, F = 6, 4


class Draft(nn.Module):
    """Reads the feature and the next token."""

    feature_layers, target_ids = (0,), None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, V).double()
        self.read = nn.Linear(F, V).double()

    def unroll(self, input_ids_BL, features_BLF, *, num_steps, **_):
        read_BLV = self.read(features_BLF)
        return [self.table(input_ids_BL.roll(-1 - i, 1)) + read_BLV for i in range(num_steps)]


def passes():
    g = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(0, V, (4, 9), generator=g)
    features_BLF = torch.randn(4, 9, F, generator=g, dtype=torch.float64)
    logits_BLV = torch.randn(4, 9, V, generator=g, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 4)):
        yield Captured(
            input_ids_BL=ids_BL[rows],
            features_BLF=features_BLF[rows],
            target=TargetLogits(values_BKX=logits_BLV[rows]),
        )


def train(world_size):
    """Three steps over two batches, one a rank, the second of which is empty in the second step."""
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    trainer = DraftTrainer(Draft(), None, lr=1e-2, share=1.0, group=group)
    batches = list(enumerate(passes()))
    if world_size == 2:
        batches = batches[rank : rank + 1]
    for step in range(3):
        for number, seen in batches:
            mask_BL = torch.full_like(seen.input_ids_BL, step != 1 or number != 1).bool()
            trainer.observe(mask_BL, captured=seen)
        metrics = trainer.step()
    weights = {name: p.detach().clone() for name, p in trainer.draft.named_parameters()}
    seen = batches[0][1]
    trainer.observe(torch.ones_like(seen.input_ids_BL).bool(), captured=seen)
    if rank == 0:
        trainer.draft.read.weight.grad[0, 0] = torch.nan
    try:
        trainer.step()
    except NonFiniteError as error:
        return {"metrics": metrics, "weights": weights, "error": str(error)}


def test_ranks_train_one_draft_and_refuse_together(tmp_path):
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
    one = run(train, 1, tmp_path / "1", 1)[0]
    for rank in run(train, 2, tmp_path / "2", 2):
        torch.testing.assert_close(rank["weights"], one["weights"])
        torch.testing.assert_close(rank["metrics"], one["metrics"])
        assert "norm of its gradient is nan" in rank["error"]


def only_rank_0_observes():
    trainer = DraftTrainer(Draft(), None, group=torch.distributed.group.WORLD)
    if torch.distributed.get_rank() == 0:
        seen = next(passes())
        trainer.observe(torch.ones_like(seen.input_ids_BL).bool(), captured=seen)
    try:
        trainer.step()
    except EmptyBatchError as error:
        return str(error)


def test_a_rank_that_observed_nothing_is_told_of_on_all(tmp_path):
    got = run(only_rank_0_observes, 2, tmp_path)
    assert "nothing was observed on another rank" in got[0]
    assert "nothing was observed here" in got[1]


def observe_all(trainer):
    for seen in passes():
        trainer.observe(torch.ones_like(seen.input_ids_BL).bool(), captured=seen)


def refused(trainer):
    """What `step()` says of the ranks' drafts, and that it leaves all as it was."""
    tensors = [*trainer.draft.state_dict().values(), *(p.grad for p in trainer.draft.parameters())]
    before = [tensor.clone() for tensor in tensors]
    try:
        trainer.step()
    except SettingError as error:
        torch.testing.assert_close(tensors, before, rtol=0, atol=0)
        assert trainer.pending == 2 and trainer.version == 0
        return str(error)


def drafts_of_their_own():
    found = []
    for part in ("table.weight", "scratch", "target_ids", None):
        draft = Draft()
        draft.register_buffer("scratch", torch.zeros(2, dtype=torch.bfloat16))
        draft.target_ids = torch.arange(V)
        if torch.distributed.get_rank() == 1 and part is not None:
            tensors = draft.state_dict() | {"target_ids": draft.target_ids}
            tensors[part][-1] = 4  # of 0 to 5, where it is an id
        trainer = DraftTrainer(draft, None, share=1.0, group=torch.distributed.group.WORLD)
        observe_all(trainer)
        found.append(refused(trainer))
    return found


def test_ranks_with_different_drafts_are_refused_on_all(tmp_path):
    for found in run(drafts_of_their_own, 2, tmp_path):
        assert found.pop() is None  # these are equal
        for text in found:
            assert "the drafts of ranks [1] of the group are not that of rank 0" in text


def loads():
    """Fresh drafts of their own, one state into all, and then into one rank alone."""
    rank, found = torch.distributed.get_rank(), []
    state = DraftTrainer(Draft(), None).state_dict()
    draft = Draft()
    torch.nn.init.constant_(draft.table.weight, rank)
    trainer = DraftTrainer(draft, None, share=1.0, group=torch.distributed.group.WORLD)
    observe_all(trainer)
    found.append(refused(trainer))
    trainer.load_state_dict(state)
    observe_all(trainer)
    found.append(refused(trainer))
    assert trainer.version == 1
    if rank == 1:
        trainer.load_state_dict(state)
    observe_all(trainer)
    try:
        trainer.step()
    except SettingError as error:
        found.append(str(error))
    return found


def test_what_counts_is_the_draft_at_the_first_step_and_after_each_load(tmp_path):
    for found in run(loads, 2, tmp_path):
        assert found[1] is None  # fresh drafts, made equal by one state
        for text in (found[0], found[2]):
            assert "the drafts of ranks [1] of the group are not that of rank 0" in text
