"""What one rank refuses, all refuse, instead of waiting for it in a collective."""

import torch
import torch.distributed as dist

from miles import Packed
from miles.errors import MilesError, MissingLogprobError, NonFiniteError, SettingError
from miles.losses import (
    MaxStaleness,
    Weight,
    group_advantages,
    importance_weights,
    multi_reward_advantages,
)
from tests.distributed.gloo import run

BROKEN_RANK = 1


def advantages(broken):
    rewards = torch.tensor([1.0, float("inf") if broken else 0.0])
    group_advantages(rewards, torch.tensor([0, 0]), scale="batch_std", group=dist.group.WORLD)


def several_rewards(broken):
    rewards = torch.tensor([[1.0, 0.0], [0.0, float("inf") if broken else 1.0]])
    multi_reward_advantages(rewards, torch.tensor([0, 0]), group=dist.group.WORLD)


def ids(broken):
    group_ids = torch.tensor([0, -1 if broken else 0])
    group_advantages(torch.zeros(2), group_ids, scale="batch_std", group=dist.group.WORLD)


def weights(broken):
    correct(old=float("nan") if broken else -1.0)


def versions(broken):
    reject = {"reject": [MaxStaleness(1)], "current_version": 3}
    correct(versions_T=torch.tensor([3, -1 if broken else 3]), **reject)


def split_sequence(broken):
    """Context parallel: no `group`, but the ranks of the sequence sum over it."""
    correct(old=float("nan") if broken else -1.0, group=None, seq_group=dist.group.WORLD)


def correct(*, old=-1.0, group="world", seq_group=None, **settings):
    packed = Packed.from_padded(torch.ones(1, 2, dtype=torch.bool), seq_group=seq_group)
    importance_weights(
        torch.tensor([old, -1.0]), torch.full((2,), -1.1), packed,
        weight=Weight(level="sequence_mean", mode="truncate", high=2.0), normalize="mean",
        group=dist.group.WORLD if group else None, **settings,
    )  # fmt: skip


CASES = [
    (advantages, NonFiniteError),
    (several_rewards, NonFiniteError),
    (ids, SettingError),
    (weights, MissingLogprobError),
    (versions, SettingError),
    (split_sequence, MissingLogprobError),
]


def refusals():
    """The error of every case on this rank, and that no case is left half way."""
    errors = []
    for case, _ in CASES:
        try:
            case(dist.get_rank() == BROKEN_RANK)
        except MilesError as error:
            errors.append((type(error).__name__, str(error)))
        case(False)
    return errors


def test_what_one_rank_refuses_all_refuse(tmp_path):
    sound, broken = run(refusals, 2, tmp_path)
    assert [kind for kind, _ in broken] == [kind.__name__ for _, kind in CASES]
    assert [kind for kind, _ in sound] == ["SettingError"] * len(CASES)
    assert all("another rank refused" in text for _, text in sound)
