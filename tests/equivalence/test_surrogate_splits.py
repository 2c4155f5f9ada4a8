"""However a step is cut into micro-batches, ordered or laid out, every surrogate gives its loss."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, count
from miles.losses.aggregation import aggregate
from miles.losses.covariance import clip_cov, covariance_statistics, kl_cov, token_ids
from miles.losses.preferences import dpo, sequence_logprobs
from miles.losses.ratios import log_ratio
from miles.losses.regularizers import entropy_quantile_mask, nll, value_loss
from miles.losses.sequence_surrogates import gmpo, vespo
from miles.losses.surrogates import cispo, dppo, dro, ppo_clip, reinforce, sapo
from tests.steps import Step, quick, random_step, select

# of the inputs that `inputs_of` names; a loss for each token
LOSSES = {
    "ppo_clip": lambda i: ppo_clip(i.lr, i.a, dual_clip=1.5).loss_T,
    "cispo": lambda i: cispo(i.x, i.lr, i.a, i.packed, ratio_max=1.2).loss_T,
    "sapo": lambda i: sapo(i.lr, i.a).loss_T,
    "reinforce": lambda i: reinforce(i.x, i.a, i.packed).loss_T,
    "dro": lambda i: dro(i.x, i.lr, i.a, i.packed, beta=0.3).loss_T,
    "dppo tv": lambda i: dppo(i.x, i.lr, i.a, i.packed, rollout_logprobs_T=i.q).loss_T,
    "dppo kl": lambda i: (
        dppo(i.x, i.lr, i.a, i.packed, rollout_logprobs_T=i.q, kind="kl", ratio_cap=3.0).loss_T
    ),
    "gmpo": lambda i: gmpo(i.lr, i.a, i.packed).loss_T,
    "vespo": lambda i: vespo(i.x, i.lr, i.a, i.packed, log_weights_T=0.1 * (i.old - i.q)).loss_T,
    "clip_cov": lambda i: (
        clip_cov(
            i.x, i.lr, i.a, i.packed, statistics=i.statistics, token_ids_T=i.token_ids_T
        ).loss_T
    ),
    "kl_cov": lambda i: (
        kl_cov(i.x, i.lr, i.a, i.packed, statistics=i.statistics, token_ids_T=i.token_ids_T).loss_T
    ),
    "value_loss": lambda i: value_loss(i.x, i.old, i.ref, i.packed),
    "nll": lambda i: nll(i.x, i.packed),
}
MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "group_mean", "sum"]
SPLITS = {
    "1x8": [list(range(8))],
    "2x4": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "8x1": [[seq] for seq in range(8)],
    "uneven": [[6], [1, 3, 0, 7, 5], [4, 2]],
    "reversed": [list(range(8))[::-1]],
}
partitions = st.permutations(range(8)).flatmap(
    lambda order: st.sets(st.integers(1, 7)).map(
        lambda cuts: [
            list(order[low:high])
            for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 8], strict=True)
        ]
    )
)
every_loss = pytest.mark.parametrize("name", LOSSES)


def whole_step(step: Step):
    """Parts of a step: where its tokens live and lie, and which sequences of the step they are."""
    return [(step.packed, torch.arange(step.packed.num_positions), torch.arange(8))]


def micro_batches(step: Step, split: list[list[int]]):
    return [(*select(step.packed, seqs), torch.tensor(seqs)) for seqs in split]


def padded(step: Step, extra: int):
    packed = step.packed
    masked = int((~packed.mask_T).nonzero()[0])
    width = int(packed.positions_T.max()) + 1 + extra
    index_SL = torch.full((packed.num_seqs, width), masked)
    index_SL[packed.seq_ids_T, packed.positions_T] = torch.arange(packed.num_positions)
    layout = Packed.from_padded(packed.mask_T[index_SL], packed.group_ids_S)
    return [(layout, index_SL.flatten(), torch.arange(8))]


def statistics_of(step: Step, parts):
    """From the micro-batches laid end to end, in their order."""
    index_T = torch.cat([index_T for _, index_T, _ in parts])
    ids_T = torch.cat([token_ids(packed, seqs) for packed, _, seqs in parts])
    return covariance_statistics(
        step.logprobs_T[index_T],
        step.advantages_T[index_T],
        Packed.cat([packed for packed, _, _ in parts]),
        token_ids_T=ids_T,
        share=0.2,
        cov_min=0.2,
        cov_max=2.0,
        seed=5,
    )


def computed(step: Step, parts, name: str, mode: str = "token_mean", share: float | None = None):
    """The step's loss and the gradient of every log-prob, summed over micro-batches."""
    leaf_T, total = step.leaf(), 0.0
    statistics = statistics_of(step, parts)
    denominators = count([packed for packed, _, _ in parts])
    keep_T = entropy_quantile_mask(-step.ref_T, step.packed, share=share) if share else None
    for packed, index_T, seqs in parts:
        old, q, ref, a = (values_T[index_T] for values_T in step[2:])
        inputs = SimpleNamespace(
            **{"x": leaf_T[index_T], "old": old, "q": q, "ref": ref, "a": a, "packed": packed},
            lr=log_ratio(leaf_T[index_T], old, packed),
            statistics=statistics,
            token_ids_T=token_ids(packed, seqs),
        )
        loss = aggregate(
            LOSSES[name](inputs),
            packed,
            denominators,
            mode=mode,
            constant=6.0 if mode == "constant" else None,
            keep_T=None if keep_T is None else keep_T[index_T],
        )
        loss.backward()
        total += loss.item()
    return total, leaf_T.grad


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert expected[1].abs().max() > 1e-3 and expected[1].isfinite().all()


@every_loss
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_loss_and_gradient_are_the_same_for_every_split(name, mode, split):
    step = random_step()
    got = computed(step, micro_batches(step, SPLITS[split]), name, mode)
    assert_same(got, computed(step, whole_step(step), name, mode))


@every_loss
@quick
@given(seed=st.integers(0, 10_000), split=partitions, mode=st.sampled_from(MODES))
def test_loss_and_gradient_are_the_same_for_random_partitions(name, seed, split, mode):
    step = random_step(seed)
    got = computed(step, micro_batches(step, split), name, mode)
    expected = computed(step, whole_step(step), name, mode)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("extra", [0, 5])
def test_padded_equals_packed(name, extra):
    step = random_step()
    for mode in MODES:
        got = computed(step, padded(step, extra), name, mode)
        assert_same(got, computed(step, whole_step(step), name, mode))


@every_loss
def test_order_of_tokens_does_not_matter(name):
    step = random_step()
    order = torch.randperm(step.packed.num_positions, generator=torch.Generator().manual_seed(0))
    shuffled = Packed(
        seq_ids_T=step.packed.seq_ids_T[order],
        mask_T=step.packed.mask_T[order],
        num_seqs=step.packed.num_seqs,
        group_ids_S=step.packed.group_ids_S,
        positions_T=step.packed.positions_T[order],
    )
    got = computed(step, [(shuffled, order, torch.arange(8))], name)
    assert_same(got, computed(step, whole_step(step), name))


def test_covariance_selections_do_something_here():
    # upstream clip-cov drew from each micro-batch by itself: whole -0.9153, split -0.9516
    step = random_step()
    plain = computed(step, whole_step(step), "ppo_clip")[0]
    assert computed(step, whole_step(step), "clip_cov")[0] != pytest.approx(plain)
    statistics = statistics_of(step, whole_step(step))
    for field in ("threshold", "draw_limit"):
        assert getattr(statistics, field) > 0


def test_gmpo_is_not_the_mean_of_the_means_of_micro_batches():
    # upstream ended in torch.mean over the micro-batch: -0.172 whole, -0.665 split
    step, losses = random_step(), []
    for seqs in SPLITS["uneven"]:
        packed, index_T = select(step.packed, seqs)
        lr = log_ratio(step.logprobs_T[index_T], step.old_T[index_T], packed)
        loss_T = gmpo(lr, step.advantages_T[index_T], packed).loss_T
        if packed.mask_T.any():
            mean = aggregate(loss_T, packed, count(packed), mode="seq_mean_token_mean")
            losses.append(mean.item())
    whole = computed(step, whole_step(step), "gmpo", "seq_mean_token_mean")[0]
    assert sum(losses) / len(losses) != pytest.approx(whole, rel=0.01)


def test_minus_infinity_at_masked_slots_makes_no_nan():
    # upstream multiplied by the mask, so that -inf in both policies gave a NaN loss or gradient
    step = random_step()
    gone_T = torch.where(step.packed.mask_T, step.old_T, -torch.inf)
    blank = Step(step.packed, *[torch.where(step.packed.mask_T, x, gone_T) for x in step[1:]])
    for name in LOSSES:
        assert_same(
            computed(blank, whole_step(blank), name), computed(step, whole_step(step), name)
        )


@pytest.mark.parametrize("split", SPLITS)
def test_entropy_mask_of_the_whole_step_goes_with_every_split(split):
    step = random_step()
    parts = micro_batches(step, SPLITS[split])
    got = computed(step, parts, "reinforce", share=0.3)
    assert_same(got, computed(step, whole_step(step), "reinforce", share=0.3))
    index_T = torch.cat([index_T for _, index_T, _ in parts])
    cat = Packed.cat([packed for packed, _, _ in parts])
    keep_T = entropy_quantile_mask(-step.ref_T[index_T], cat, share=0.3)
    whole_T = entropy_quantile_mask(-step.ref_T, step.packed, share=0.3)
    assert torch.equal(keep_T, whole_T[index_T])


@pytest.mark.parametrize("mean", [False, True])
def test_pairs_are_the_same_whether_together_or_one_at_a_time(mean):
    step, results = random_step(), []
    pairs = [(0, 2), (3, 4), (5, 6)]
    for split in ([pairs], [[pair] for pair in pairs], [pairs[:1], pairs[:0:-1]]):
        leaf_T, total = step.leaf(), 0.0
        for part in split:
            packed, index_T = select(step.packed, [seq for pair in part for seq in pair])
            new_S, ref_S = (
                sequence_logprobs(x[index_T], packed, mean=mean) for x in (leaf_T, step.ref_T)
            )
            loss = dpo(new_S[::2], new_S[1::2], ref_S[::2], ref_S[1::2]).loss_P.sum() / len(pairs)
            loss.backward()
            total += loss.item()
        results.append((total, leaf_T.grad))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
