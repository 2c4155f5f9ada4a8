"""Advantages and returns on two and four processes equal those on one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from miles import Packed
from miles.losses.advantages import (
    distill_advantages,
    group_advantages,
    multi_reward_advantages,
)
from miles.losses.returns import (
    discounted_returns,
    gae,
    length_adaptive_lambda,
    terminal_rewards,
    whiten,
)
from tests.distributed.gloo import run
from tests.steps import random_step

# One rank has no sample, and of four ranks the first has none whose values are whitened.
SAMPLES_OF_RANKS = {
    1: [range(10)],
    2: [range(10), []],
    4: [range(2), range(2, 8), [], range(8, 10)],
}
TOKENS = ["gae", "gae lambdas", "gae terminal", "returns", "terminal", "whiten", "distill"]
SAMPLES = ["batch_std", "group_std", "normalize_then_sum", "sum_then_normalize", "whiten samples"]


def zigzag(packed: Packed, num_ranks: int) -> list[torch.Tensor]:
    """Where the tokens of each rank lie: chunks i and 2n - 1 - i of every sequence."""
    chunks = [
        (packed.seq_ids_T == seq).nonzero().flatten().tensor_split(2 * num_ranks)
        for seq in range(packed.num_seqs)
    ]
    return [
        torch.cat([c for parts in chunks for c in (parts[rank], parts[-1 - rank])])
        for rank in range(num_ranks)
    ]


def tokens_here(num_ranks: int) -> tuple[Packed, torch.Tensor]:
    packed = random_step(max_len=30).packed
    index_T = zigzag(packed, num_ranks)[rank_of(num_ranks)]
    part = replace(
        packed,
        seq_ids_T=packed.seq_ids_T[index_T],
        mask_T=packed.mask_T[index_T],
        positions_T=packed.positions_T[index_T],
        seq_group=dist.group.WORLD if num_ranks > 1 else None,
    )
    return part, index_T


def rank_of(num_ranks: int) -> int:
    return dist.get_rank() if num_ranks > 1 else 0


def compute(num_ranks: int) -> dict[str, torch.Tensor]:
    """Each result is 0 where another rank has the value, so that ranks add up to one process."""
    step = random_step(max_len=30)
    packed, index_T = tokens_here(num_ranks)
    rewards_T, values_T = step.advantages_T[index_T], step.ref_T[index_T]
    world = dist.group.WORLD if num_ranks > 1 else None
    results = {}

    def record(name, *values):
        whole_T = torch.zeros(len(step.old_T), dtype=torch.float64)
        results[name] = torch.stack([whole_T.index_put((index_T,), x_T) for x_T in values])

    lam_S = length_adaptive_lambda(packed, alpha=0.2)
    rewards_S = torch.linspace(-1, 1, packed.num_seqs, dtype=torch.float64)
    last_T = terminal_rewards(rewards_S, packed)
    record("gae", *gae(rewards_T, values_T, packed, gamma=0.99, lam=0.95))
    record("gae lambdas", *gae(rewards_T, values_T, packed, lam=lam_S, lam_value=1.0))
    record("gae terminal", *gae(last_T, values_T, packed, lam=0.9))
    record("returns", discounted_returns(rewards_T, packed, gamma=0.9))
    record("terminal", last_T)
    record("whiten", whiten(values_T, packed.mask_T, group=world))
    distilled = (step.old_T[index_T], step.ref_T[index_T], packed)
    record("distill", distill_advantages(*distilled, center=True))

    mine = list(SAMPLES_OF_RANKS[num_ranks][rank_of(num_ranks)])
    rng = torch.Generator().manual_seed(0)
    rewards_SR = torch.randn((10, 2), generator=rng, dtype=torch.float64)
    rewards_SR[3, 0] = torch.nan
    ids_S = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 3, 3])

    def record_samples(name, values_S):
        whole_S = torch.zeros(10, dtype=torch.float64)
        results[name] = whole_S.index_put((torch.tensor(mine, dtype=torch.int64),), values_S)

    samples = (rewards_SR[mine, 0], ids_S[mine])
    for scale in ("batch_std", "group_std"):
        record_samples(scale, group_advantages(*samples, scale=scale, group=world))
    for how in ("normalize_then_sum", "sum_then_normalize"):
        advantages = multi_reward_advantages(rewards_SR[mine], ids_S[mine], how=how, group=world)
        record_samples(how, advantages)
    mask_S = ~samples[0].isnan() & (torch.tensor(mine, dtype=torch.int64) >= 2)
    record_samples("whiten samples", whiten(samples[0], mask_S, group=world))
    return results


@pytest.fixture(scope="module")
def single():
    return compute(1)


@pytest.fixture(scope="module", params=[2, 4])
def summed(request, tmp_path_factory):
    ranks = run(compute, request.param, tmp_path_factory.mktemp("gloo"), request.param)
    return {name: sum(rank[name] for rank in ranks) for name in ranks[0]}


def assert_ranks_add_up(summed, single, name):
    assert single[name].abs().max() > 1e-3
    torch.testing.assert_close(summed[name], single[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_sequences(num_ranks):
    packed = random_step(max_len=30).packed
    parts = [set(packed.seq_ids_T[i_T].tolist()) for i_T in zigzag(packed, num_ranks)]
    assert len(set.intersection(*parts)) >= 3
    whole_T = torch.cat(zigzag(packed, num_ranks)).sort().values
    assert whole_T.tolist() == list(range(packed.num_positions))


@pytest.mark.parametrize("name", TOKENS)
def test_zigzag_shards_match_one_process(summed, single, name):
    assert_ranks_add_up(summed, single, name)


@pytest.mark.parametrize("name", SAMPLES[:-1])
def test_group_advantages_match_one_process(summed, single, name):
    assert_ranks_add_up(summed, single, name)


def test_upstream_whitening_hung_when_one_rank_had_no_trainable_token(summed, single):
    assert_ranks_add_up(summed, single, "whiten samples")


def test_every_result_is_compared(single):
    assert sorted(single) == sorted(TOKENS + SAMPLES)
