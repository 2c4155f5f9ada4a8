import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses.covariance import (
    _splitmix64,
    clip_cov,
    covariance_statistics,
    kl_cov,
    token_ids,
)
from miles.losses.ratios import log_ratio
from miles.losses.surrogates import ppo_clip
from tests.steps import Step, quick, random_step

# means 1 and -0.5, so covariances 2, -0.5, 0, 2.5, 0; the last token is not trained on
ADVANTAGES = [5.0, 0.0, 1.0, 2.0, -3.0, math.nan]
LOGPROBS = [0.0, 0.0, -4.0, 2.0, -0.5, -math.inf]
PACKED = Packed.from_padded(torch.tensor([[True] * 5 + [False]]))
IDS = token_ids(PACKED, torch.tensor([0]))


def float64(values: list[float], grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


LOGPROBS_T, ADVANTAGES_T = float64(LOGPROBS), float64(ADVANTAGES)


def literal_statistics(**settings):
    return covariance_statistics(
        LOGPROBS_T, ADVANTAGES_T, PACKED, token_ids_T=IDS, **{"share": 0.4, **settings}
    )


def ids_of(step: Step) -> torch.Tensor:
    return token_ids(step.packed, torch.arange(step.packed.num_seqs))


def covariances_of(step: Step) -> torch.Tensor:
    """float64, -inf at masked positions."""
    mask_T = step.packed.mask_T
    x_T, a_T = step.logprobs_T, step.advantages_T
    cov_T = (a_T - a_T[mask_T].mean()) * (x_T - x_T[mask_T].mean())
    return torch.where(mask_T, cov_T, -torch.inf)


def arguments(step: Step, leaf_T: torch.Tensor):
    ratio_T = log_ratio(leaf_T, step.old_T, step.packed)
    return leaf_T, ratio_T, step.advantages_T, step.packed


def whole(step: Step, **settings):
    args = (step.logprobs_T, step.advantages_T, step.packed)
    return covariance_statistics(*args, token_ids_T=ids_of(step), **settings)


def test_splitmix64_is_the_published_one():
    # first outputs of the generator seeded with 0 and with 1234567
    seeds = torch.tensor([0, 1234567])
    got = [value % 2**64 for value in _splitmix64(seeds).tolist()]
    assert got == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_token_ids_are_distinct_and_do_not_depend_on_the_split():
    mask_BL = torch.ones(3, 2).bool()
    ids_T = token_ids(Packed.from_padded(mask_BL), torch.tensor([7, 0, 2]))
    assert ids_T.tolist() == [7 << 32, (7 << 32) + 1, 0, 1, 2 << 32, (2 << 32) + 1]
    alone_T = token_ids(Packed.from_padded(mask_BL[:1]), torch.tensor([2]))
    assert torch.equal(alone_T, ids_T[4:])


def test_statistics_literals():
    got = literal_statistics(seed=3, cov_min=2.0, cov_max=9.0)
    assert (got.mean_advantage.item(), got.mean_logprob.item()) == (1.0, -0.5)
    assert got.threshold.item() == 1.0  # between 2, the second largest, and 0
    assert (got.cov_min, got.cov_max, got.seed) == (2.0, 9.0, 3)


def test_kl_cov_literals_and_their_gradients():
    # tokens 0 and 3 have the largest covariances
    lr = float64([0.5, 0.2, 0.0, -0.1, 0.3, math.nan], grad=True)
    args = (LOGPROBS_T, lr, ADVANTAGES_T, PACKED)
    got = kl_cov(*args, statistics=literal_statistics(), token_ids_T=IDS, kl_coef=0.5)
    got.loss_T.sum().backward()
    plain = -ADVANTAGES_T[:5] * lr.detach()[:5].exp()
    penalty, slope = float64([0.25, 0, 0, 0.05, 0]), float64([0.5, 0, 0, -0.5, 0])
    torch.testing.assert_close(got.loss_T[:5].detach(), plain + penalty)
    torch.testing.assert_close(lr.grad[:5], plain + slope)
    assert got.loss_T[5] == 0 and lr.grad[5] == 0
    assert not (got.clipped_low_T | got.clipped_high_T).any()


def test_clip_cov_literals_and_their_gradients():
    # candidates are tokens 0 and 3, and both are drawn
    lr = float64([0.5, 0.2, 0.0, -0.1, 0.5, math.nan], grad=True)
    args, given = (LOGPROBS_T, lr, ADVANTAGES_T, PACKED), {"token_ids_T": IDS}
    got = clip_cov(*args, statistics=literal_statistics(), **given)
    got.loss_T.sum().backward()
    assert got.loss_T.tolist() == pytest.approx([0, 0, -1, 0, 3 * math.exp(0.5), 0])
    assert lr.grad.tolist() == pytest.approx([0, 0, -1, 0, 3 * math.exp(0.5), 0])
    assert got.clipped_high_T.tolist() == [True] + [False] * 5
    one = clip_cov(*args, statistics=literal_statistics(share=0.2), **given).loss_T
    assert sorted([one[0].item() == 0, one[3].item() == 0]) == [False, True]
    for seed in range(8):  # both ends belong to the range, whatever the draw
        ends = literal_statistics(cov_min=2.0, cov_max=2.5, seed=seed)
        assert torch.equal(clip_cov(*args, statistics=ends, **given).loss_T, got.loss_T)
    none = literal_statistics(cov_min=3.0)
    loss_T = clip_cov(*args, statistics=none, **given).loss_T
    assert loss_T.tolist() == pytest.approx([-6, 0, -1, -2 * math.exp(-0.1), 3 * math.exp(0.5), 0])


@quick
@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_kl_cov_penalises_exactly_the_share_of_largest_covariance(seed, share):
    step = random_step(seed)
    statistics, cov_T = whole(step, share=share), covariances_of(step)
    num_tokens = int(step.packed.mask_T.sum())
    k = max(1, math.floor(share * num_tokens + 1e-9))
    args = arguments(step, step.logprobs_T)
    given = {"statistics": statistics, "token_ids_T": ids_of(step)}
    penalty_T = kl_cov(*args, **given).loss_T - kl_cov(*args, **given, kl_coef=0.0).loss_T
    expected_T = torch.zeros_like(penalty_T)
    chosen = cov_T.topk(k).indices
    expected_T[chosen] = (step.logprobs_T - step.old_T).abs()[chosen]
    torch.testing.assert_close(penalty_T, expected_T)


@quick
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.integers(0, 5))
def test_clip_cov_drops_exactly_the_share_or_all_candidates(seed, share, draw):
    step = random_step(seed)
    statistics = whole(step, share=share, seed=draw, cov_min=0.1, cov_max=2.0)
    cov_T, args = covariances_of(step), arguments(step, step.logprobs_T)
    loss_T = clip_cov(*args, statistics=statistics, token_ids_T=ids_of(step)).loss_T
    plain_T = torch.where(step.packed.mask_T, ppo_clip(args[1], args[2]).loss_T, 0)
    dropped_T = loss_T != plain_T
    candidates_T = (cov_T >= 0.1) & (cov_T <= 2.0)
    k = max(1, math.floor(share * int(step.packed.mask_T.sum()) + 1e-9))
    assert (loss_T[dropped_T] == 0).all() and (dropped_T <= candidates_T).all()
    assert int(dropped_T.sum()) == min(k, int(candidates_T.sum()))


def test_draws_are_even_over_seeds_and_do_not_read_the_generator():
    # upstream: torch.randperm, unseeded, on the micro-batch: whole -0.9153, split -0.9516
    packed = Packed.from_padded(torch.ones(1, 10).bool())
    ids_T = token_ids(packed, torch.tensor([0]))
    a_T = float64([1.0, -1.0] * 5)
    x_T, lr = 2 * a_T, torch.zeros(10, dtype=torch.float64)
    given = {"token_ids_T": ids_T, "share": 0.1, "cov_min": 1.0, "cov_max": 5.0}
    counts_T = torch.zeros(10)
    state = torch.get_rng_state()
    for seed in range(1000):
        statistics = covariance_statistics(x_T, a_T, packed, seed=seed, **given)
        args = (x_T, lr, a_T, packed)
        dropped_T = clip_cov(*args, statistics=statistics, token_ids_T=ids_T).loss_T == 0
        assert dropped_T.sum() == 1
        counts_T += dropped_T
    assert counts_T.min() > 60 and counts_T.max() < 140  # 100 each, 4 standard deviations
    assert torch.equal(state, torch.get_rng_state())


def chosen_by_kl_cov(x_T, a_T, share, seed=0):
    packed = Packed.from_padded(torch.ones(1, len(x_T)).bool())
    ids_T = token_ids(packed, torch.tensor([0]))
    given = {"token_ids_T": ids_T, "share": share, "seed": seed}
    statistics = covariance_statistics(x_T, a_T, packed, **given)
    args = (x_T, torch.full_like(x_T, 0.1), a_T, packed)
    settings = {"statistics": statistics, "token_ids_T": ids_T}
    plain_T = kl_cov(*args, **settings, kl_coef=0.0).loss_T
    return kl_cov(*args, **settings).loss_T != plain_T


def test_ties_at_the_edge_are_broken_by_the_draw():
    # log-probs of exactly 0 under one advantage are many; covariances 0.25 x 4, 0.75 x 2, -0.25 x 2
    a_T, x_T = float64([1.0] * 4 + [-1.0] * 4), float64([0.0] * 4 + [-1.0, -1.0, 0.0, 0.0])
    assert chosen_by_kl_cov(x_T, a_T, 0.25).nonzero().flatten().tolist() == [4, 5]
    draws = torch.stack([chosen_by_kl_cov(x_T, a_T, 0.5, seed) for seed in range(20)])
    assert draws.any(0).tolist() == [True] * 6 + [False] * 2
    assert draws[:, 4:6].all() and (draws[:, :4].sum(1) == 2).all()


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_equal_covariances_do_not_choose_every_token(share, number):
    assert chosen_by_kl_cov(float64([0.0] * 8), float64([1.0] * 8), share).sum() == number


def test_rounding_of_the_log_probs_moves_no_token_over_the_edge():
    step = random_step(3)
    statistics, given = whole(step, share=0.3), {"token_ids_T": ids_of(step)}
    args = arguments(step, step.logprobs_T)
    for noise in (1e-9, -1e-9):
        moved = (step.logprobs_T + noise, *args[1:])
        got = kl_cov(*moved, statistics=statistics, **given).loss_T
        assert torch.equal(got, kl_cov(*args, statistics=statistics, **given).loss_T)


@pytest.mark.parametrize("surrogate", [clip_cov, kl_cov])
def test_masked_garbage_changes_nothing(surrogate):
    step, results = random_step(), []
    mask_T = step.packed.mask_T
    clean = Step(step.packed, *(torch.where(mask_T, values_T, 0) for values_T in step[1:]))
    for each in (step, clean):
        leaf_T = each.leaf()
        statistics = whole(each, share=0.2, cov_min=0.1)
        args, given = arguments(each, leaf_T), {"token_ids_T": ids_of(each)}
        loss_T = surrogate(*args, statistics=statistics, **given).loss_T
        loss_T.backward(torch.full_like(loss_T, torch.nan).where(~mask_T, 1.0))
        results.append((loss_T.detach(), leaf_T.grad, dataclasses.asdict(statistics)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert (results[0][0][~mask_T] == 0).all() and (results[0][1][~mask_T] == 0).all()


@pytest.mark.parametrize("surrogate", [clip_cov, kl_cov])
def test_gradcheck_and_no_gradient_but_that_of_the_ratio(surrogate):
    lr = float64([0.05, -0.1, 0.07, 0.02, -0.03, 0.0], grad=True)
    x_T, a_T = LOGPROBS_T.clone().requires_grad_(), ADVANTAGES_T.clone().requires_grad_()
    given = {"statistics": literal_statistics(), "token_ids_T": IDS}
    assert torch.autograd.gradcheck(lambda r: surrogate(x_T, r, a_T, PACKED, **given).loss_T, lr)
    surrogate(x_T, lr, a_T, PACKED, **given).loss_T.sum().backward()
    assert x_T.grad is None and a_T.grad is None


@pytest.mark.parametrize("surrogate", [clip_cov, kl_cov])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("token", [0, 1])
def test_a_trainable_nan_reaches_the_loss(surrogate, which, token):
    inputs = [LOGPROBS_T.clone(), torch.zeros(6).double(), ADVANTAGES_T.clone()]
    inputs[which][token] = torch.nan
    given = {"statistics": literal_statistics(), "token_ids_T": IDS}
    assert surrogate(*inputs, PACKED, **given).loss_T[token].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_statistics_refuse_a_trainable_number_that_is_not_finite(value):
    for which in (0, 1):
        inputs = [LOGPROBS_T.clone(), ADVANTAGES_T.clone()]
        inputs[which][2] = value
        with pytest.raises(NonFiniteError, match="NaN or infinite at 1 trainable tokens"):
            covariance_statistics(*inputs, PACKED, token_ids_T=IDS)


def test_float32_is_kept():
    args = (LOGPROBS_T.float(), torch.zeros(6), ADVANTAGES_T.float(), PACKED)
    given = {"statistics": literal_statistics(), "token_ids_T": IDS}
    assert clip_cov(*args, **given).loss_T.dtype == torch.float32
    assert kl_cov(*args, **given).loss_T.dtype == torch.float32


def test_bad_input():
    args = (LOGPROBS_T, ADVANTAGES_T, PACKED)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(SettingError, match=r"share is .*; expected a fraction"):
            covariance_statistics(*args, token_ids_T=IDS, share=share)
    with pytest.raises(SettingError, match="expected cov_min < cov_max"):
        covariance_statistics(*args, token_ids_T=IDS, cov_min=5.0, cov_max=1.0)
    with pytest.raises(DtypeError, match=r"token_ids_T is torch\.int32; .* use token_ids"):
        covariance_statistics(*args, token_ids_T=IDS.int())
    with pytest.raises(ShapeError, match=r"token_ids_T has shape \(5,\)"):
        covariance_statistics(*args, token_ids_T=IDS[:5])
    nothing = Packed.from_padded(torch.zeros(1, 6).bool())
    with pytest.raises(EmptyBatchError, match="no trainable token on any rank"):
        covariance_statistics(LOGPROBS_T, ADVANTAGES_T, nothing, token_ids_T=IDS)
    given = {"statistics": literal_statistics(), "token_ids_T": IDS}
    four = (LOGPROBS_T, torch.zeros(6), ADVANTAGES_T, PACKED)
    with pytest.raises(SettingError, match="expected absolute ratios"):
        clip_cov(*four, **given, ratio_min=0.2, ratio_max=0.2)
    with pytest.raises(SettingError, match=r"kl_coef is -1\.0; expected 0 or more"):
        kl_cov(*four, **given, kl_coef=-1.0)
    with pytest.raises(ShapeError, match=r"log_ratio_T has shape \(3,\)"):
        kl_cov(LOGPROBS_T, torch.zeros(3), ADVANTAGES_T, PACKED, **given)
    with pytest.raises(ShapeError, match=r"sequence_ids_S has shape \(2,\); expected \[1\]"):
        token_ids(PACKED, torch.tensor([0, 1]))
    with pytest.raises(DtypeError, match=r"sequence_ids_S is torch\.float32"):
        token_ids(PACKED, torch.zeros(1))
    for bad in (-1, 2**31):
        with pytest.raises(
            SettingError, match=rf"holds values from {bad} to {bad}; expected 0\.\."
        ):
            token_ids(PACKED, torch.tensor([bad]))
    assert token_ids(PACKED, torch.tensor([2**31 - 1])).min() == (2**31 - 1) * 2**32
    unplaced = dataclasses.replace(PACKED, positions_T=None)
    with pytest.raises(SettingError, match="token_ids needs positions_T"):
        token_ids(unplaced, torch.tensor([0]))
