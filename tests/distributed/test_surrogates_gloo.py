"""Surrogates, covariance statistics and entropy masks on several processes equal those on one.

Each layout is spawned once and computes everything; the tests compare the results.
"""

import dataclasses
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from miles import Packed, count
from miles.errors import EmptyBatchError, NonFiniteError
from miles.losses._selection import largest
from miles.losses.aggregation import aggregate
from miles.losses.covariance import clip_cov, covariance_statistics, kl_cov, token_ids
from miles.losses.preferences import dpo, sequence_logprobs
from miles.losses.ratios import log_ratio
from miles.losses.regularizers import entropy_quantile_mask
from miles.losses.sequence_surrogates import gmpo, vespo
from tests.distributed.gloo import run
from tests.steps import random_step, select

# data-parallel ranks x context-parallel ranks
LAYOUTS = {"2x1": (2, 1), "1x2": (1, 2), "4x1": (4, 1), "1x4": (1, 4), "2x2": (2, 2)}
SEQUENCES = {
    1: [list(range(8))],
    2: [[5, 0, 2], [1, 7, 3, 4, 6]],
    4: [[5, 0, 2], [1], [7, 3], [4, 6]],
}
SURROGATES = ["gmpo", "vespo", "clip_cov", "kl_cov"]
MODES = ["token_mean", "seq_mean_token_mean", "group_mean"]
SHARES = [0.01, 0.2, 0.5, 1.0]


def zigzag(packed: Packed, ranks: int, rank: int) -> torch.Tensor:
    """Where the tokens of a rank lie: of 2n chunks of every sequence, its own and the mirrored."""
    chunks = [
        (packed.seq_ids_T == seq).nonzero().flatten().tensor_split(2 * ranks)
        for seq in range(packed.num_seqs)
    ]
    return torch.cat([c for parts in chunks for c in (parts[rank], parts[-1 - rank])])


def here(data: int, context: int):
    """This rank's part, where it lies in the step, its sequences, and the data-parallel group."""
    packed = random_step().packed
    if data * context == 1:
        return packed, torch.arange(packed.num_positions), torch.arange(8), None
    rank = dist.get_rank()
    data_groups = [dist.new_group([d * context + c for d in range(data)]) for c in range(context)]
    seq_groups = [dist.new_group([d * context + c for c in range(context)]) for d in range(data)]
    seqs = SEQUENCES[data][rank // context]
    part, index_T = select(packed, seqs)
    if context > 1:
        local_T = zigzag(part, context, rank % context)
        index_T = index_T[local_T]
        part = replace(
            part,
            seq_ids_T=part.seq_ids_T[local_T],
            mask_T=part.mask_T[local_T],
            positions_T=part.positions_T[local_T],
            seq_group=seq_groups[rank // context],
        )
    group = data_groups[rank % context] if data > 1 else None
    return part, index_T, torch.tensor(seqs), group


def compute(data: int, context: int) -> dict[str, dict]:
    """`summed`: what ranks add up, `[T]` tensors spread over the step; `shared`: equal on ranks."""
    packed, index_T, seqs, group = here(data, context)
    step = random_step()
    old_T, rollout_T, ref_T, a_T = (values_T[index_T] for values_T in step[2:])
    x_T, ids_T = step.logprobs_T[index_T], token_ids(packed, seqs)
    denominators = count(packed, group=group)
    summed, shared = {}, {}

    def spread(values_T):
        return torch.zeros(len(step.old_T), dtype=torch.float64).index_put((index_T,), values_T)

    def record(name, make_loss):
        leaf_T = step.leaf()
        loss = make_loss(leaf_T[index_T])
        loss.backward()
        summed[name] = (loss.detach(), leaf_T.grad)

    given = {"token_ids_T": ids_T, "cov_min": 0.1, "cov_max": 2.0, "seed": 3, "group": group}
    for share in SHARES:
        found, keeps = selections(x_T, a_T, packed, share, given)
        shared |= {f"{name} {share}": value for name, value in found.items()}
        summed |= {f"{name} {share}": spread(keep_T.double()) for name, keep_T in keeps.items()}
    statistics = covariance_statistics(x_T, a_T, packed, share=0.2, **given)
    chosen = {"statistics": statistics, "token_ids_T": ids_T}

    def surrogate(name, x_T, lr):
        if name == "gmpo":
            return gmpo(lr, a_T, packed)
        if name == "vespo":
            return vespo(x_T, lr, a_T, packed, log_weights_T=0.1 * (old_T - rollout_T))
        if name == "clip_cov":
            return clip_cov(x_T, lr, a_T, packed, **chosen)
        return kl_cov(x_T, lr, a_T, packed, **chosen)

    for name in SURROGATES:
        for mode in MODES:
            record(
                f"{name} {mode}",
                lambda x_T, name=name, mode=mode: aggregate(
                    surrogate(name, x_T, log_ratio(x_T, old_T, packed)).loss_T,
                    packed,
                    denominators,
                    mode=mode,
                ),
            )

    if data == 1:  # pairs are of neighbouring sequences, which data-parallel ranks do not share
        record("pairs", lambda x_T: pair_loss(x_T, ref_T, packed) / context)
    groups = [g for g in (packed.seq_group, group) if g is not None]
    shared["refusals"] = refusals(packed, x_T, a_T, ids_T, group)
    values_T = x_T[packed.mask_T]
    shared["largest"] = {k: largest(values_T, k, groups) for k in (1, 4, 500)}
    return {"summed": summed, "shared": shared}


def selections(x_T, a_T, packed, share, given) -> tuple[dict, dict]:
    """Statistics and entropy masks, of numbers that all differ and of numbers that tie."""
    settings = {**given, "share": share}
    found = {
        "statistics": covariance_statistics(x_T, a_T, packed, **settings),
        "ties": covariance_statistics(0 * x_T, torch.sign(a_T), packed, **settings),
    }
    rule = {"share": share, "group": given["group"]}
    keeps = {
        "keep": entropy_quantile_mask(-x_T, packed, **rule),
        "keep of ties": entropy_quantile_mask(torch.floor(-x_T), packed, **rule),
    }
    return {name: dataclasses.asdict(value) for name, value in found.items()}, keeps


def pair_loss(x_T, ref_T, packed):
    new_S, ref_S = sequence_logprobs(x_T, packed), sequence_logprobs(ref_T, packed)
    return dpo(new_S[::2], new_S[1::2], ref_S[::2], ref_S[1::2]).loss_P.sum()


def refusals(packed, x_T, a_T, ids_T, group) -> dict[str, bool]:
    """Bad numbers on one rank only are refused on all of them, so that none waits for ever."""
    first = packed.mask_T.nonzero().flatten()[:1]
    alone = not dist.is_initialized() or dist.get_rank() == 0
    bad_T = x_T.index_fill(0, first, torch.nan) if alone else x_T
    nothing = replace(packed, mask_T=torch.zeros_like(packed.mask_T))
    calls = {
        "nan statistics": (
            NonFiniteError,
            lambda: covariance_statistics(bad_T, a_T, packed, token_ids_T=ids_T, group=group),
        ),
        "nan entropy": (NonFiniteError, lambda: entropy_quantile_mask(bad_T, packed, group=group)),
        "empty statistics": (
            EmptyBatchError,
            lambda: covariance_statistics(x_T, a_T, nothing, token_ids_T=ids_T, group=group),
        ),
        "empty entropy": (
            EmptyBatchError,
            lambda: entropy_quantile_mask(x_T, nothing, group=group),
        ),
    }
    raised = {}
    for name, (error, call) in calls.items():
        try:
            call()
            raised[name] = False
        except error:
            raised[name] = True
    return raised


@pytest.fixture(scope="module")
def single():
    return compute(1, 1)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(layout, tmp_path_factory):
    data, context = LAYOUTS[layout]
    return run(compute, data * context, tmp_path_factory.mktemp(layout), data, context)


def assert_sums_match(ranks, single, names):
    assert names
    for name in names:
        parts = [rank["summed"][name] for rank in ranks]
        expected = single["summed"][name]
        got = sum(parts) if torch.is_tensor(expected) else tuple(map(sum, zip(*parts, strict=True)))
        torch.testing.assert_close(
            got, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_every_rank_has(ranks, single, name):
    for rank in ranks:
        torch.testing.assert_close(
            rank["shared"][name], single["shared"][name], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", SURROGATES)
def test_losses_and_gradients_match(ranks, single, name):
    assert_sums_match(ranks, single, [f"{name} {mode}" for mode in MODES])
    assert single["summed"][f"{name} token_mean"][1].abs().max() > 1e-3


@pytest.mark.parametrize("share", SHARES)
def test_covariance_statistics_match(ranks, single, share):
    assert_every_rank_has(ranks, single, f"statistics {share}")
    assert_every_rank_has(ranks, single, f"ties {share}")


def test_entropy_masks_match(ranks, single):
    names = [name for name in single["summed"] if name.startswith("keep ")]
    assert len(names) == 2 * len(SHARES)
    assert_sums_match(ranks, single, names)


def test_the_largest_match(ranks, single):
    assert_every_rank_has(ranks, single, "largest")


def test_pair_losses_match_in_context_parallel(layout, ranks, single):
    if LAYOUTS[layout][0] == 1:
        assert_sums_match(ranks, single, ["pairs"])
        assert single["summed"]["pairs"][1].abs().max() > 1e-3


def test_what_one_rank_must_refuse_every_rank_refuses(ranks, single):
    for rank in (*ranks, single):
        assert all(rank["shared"]["refusals"].values()), rank["shared"]["refusals"]


def test_sequences_are_shared_in_context_parallel():
    packed = random_step().packed
    for ranks in (2, 4):
        parts = [zigzag(packed, ranks, rank) for rank in range(ranks)]
        assert torch.cat(parts).sort().values.tolist() == list(range(packed.num_positions))
        seqs = [set(packed.seq_ids_T[index_T].tolist()) for index_T in parts]
        assert len(seqs[0] & seqs[1]) >= 2
