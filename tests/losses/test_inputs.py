"""What comes in: lists for tensors, other devices, bf16, huge ids, rules that can be read once."""

import pytest
import torch

from miles import Packed, count
from miles.errors import DenominatorError, DtypeError, SettingError, ShapeError
from miles.losses import (
    Correction,
    aggregate,
    cispo,
    dppo,
    dro,
    generalized_jsd,
    gmpo,
    group_advantages,
    importance_weights,
    interpolate_proximal,
    keep_untruncated,
    kl_penalty,
    multi_reward_advantages,
    nll,
    passk_advantages,
    policy_loss,
    reinforce,
    token_logprobs,
    value_loss,
    vespo,
    veto,
)

PACKED = Packed.from_padded(torch.ones(1, 3, dtype=torch.bool), torch.tensor([0]))
X = torch.zeros(3)


@pytest.mark.parametrize("as_what", [list, iter, tuple, lambda rules: (rule for rule in rules)])
def test_rules_are_applied_whatever_they_come_in(as_what):
    """Those of a generator were used up by their check, and none was applied."""
    old, rollout = torch.tensor([-1.0, -1.0, -12.0]), torch.full((3,), -1.0)
    correction = importance_weights(old, rollout, PACKED, weight=None, reject=as_what([veto()]))
    assert not correction.keep_T.any()


@pytest.mark.parametrize("reject", [None, veto(), "veto", [None]])
def test_what_is_no_list_of_rules_is_refused(reject):
    with pytest.raises(SettingError, match="expected a list of Reject"):
        importance_weights(X, X, PACKED, weight=None, reject=reject)


def test_denominators_and_corrections_left_on_another_device_are_named_and_can_be_moved():
    """Triton said "Pointer argument cannot be accessed" of them."""
    step = count(PACKED)
    moved = step.to("meta")
    assert moved.num_tokens.is_meta and moved.num_groups.is_meta and moved.group_tokens_G.is_meta
    assert moved.counted_keep == step.counted_keep
    for backend in ("reference", "chunked"):
        with pytest.raises(DenominatorError, match=r"on meta; expected cpu; .*\.to\(\"cpu\"\)"):
            policy_loss(X, X, X, PACKED, moved, backend=backend)
        with pytest.raises(SettingError, match=r"old_logprobs_T is on meta; expected cpu"):
            policy_loss(X, X.to("meta"), X, PACKED, step, backend=backend)
        elsewhere = Correction.only(PACKED.mask_T).to("meta")
        with pytest.raises(SettingError, match=r"weights_T is on meta; .*\.to\(\"cpu\"\)"):
            policy_loss(X, X, X, PACKED, step, correction=elsewhere, backend=backend)
    with pytest.raises(SettingError, match="keep_T is on meta"):
        aggregate(X, PACKED, step, keep_T=PACKED.mask_T.to("meta"))
    with pytest.raises(SettingError, match="group_ids_S is on meta"):
        group_advantages(X, torch.zeros(3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("largest", [2**24, 2**40, 2**63 - 1])
def test_counts_of_groups_are_dense_so_huge_ids_are_refused(largest):
    """2^28 took 2 GiB without a word."""
    packed = Packed.from_padded(torch.ones(1, 2, dtype=torch.bool), torch.tensor([largest]))
    with pytest.raises(SettingError, match="expected ids below 16777216"):
        count(packed)


def test_advantages_take_huge_ids_and_refuse_negative_ones():
    rewards, ids = torch.tensor([1.0, 0.0]), torch.tensor([2**62, 2**62])
    assert group_advantages(rewards, ids, scale="none").tolist() == [0.5, -0.5]
    for refused in (
        lambda: group_advantages(rewards, -ids),
        lambda: passk_advantages(rewards, -ids, k=1),
        lambda: multi_reward_advantages(rewards[:, None], -ids),
    ):
        with pytest.raises(SettingError, match="expected ids of 0 or more"):
            refused()


def narrow_losses(dtype):
    """By name: the function, its log-probs or values, and what it is of them."""
    new, old = (torch.tensor([a, b, -3.0], dtype=dtype) for a, b in ((-1.03, -2.0), (-1.05, -2.1)))
    A = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
    lr = new.detach().float() - old.float()
    return new, {
        "kl_penalty": lambda x: kl_penalty(x, old, PACKED),
        "value_loss": lambda x: value_loss(x, old, A, PACKED),
        "nll": lambda x: nll(x, PACKED),
        "reinforce": lambda x: reinforce(x, A, PACKED).loss_T,
        "cispo": lambda x: cispo(x, lr, A, PACKED, ratio_max=5.0).loss_T,
        "dro": lambda x: dro(x, lr, A, PACKED, beta=0.1).loss_T,
        "dppo": lambda x: dppo(
            x, lr, A, PACKED, rollout_logprobs_T=old, ratio_cap=3.0, kind="kl", delta=0.05
        ).loss_T,
        "interpolate_proximal": lambda x: interpolate_proximal(
            x, old, PACKED, versions_T=torch.full((3,), 3), proximal_version=4, current_version=5
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", narrow_losses(torch.float32)[1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_log_probs_are_computed_with_and_returned_in_float32(name, dtype):
    """k3 of bf16 log-probs a percent apart was off by half."""
    new, losses = narrow_losses(dtype)
    leaf = new.clone().requires_grad_()
    loss_T = losses[name](leaf)
    assert loss_T.dtype == torch.float32
    torch.testing.assert_close(loss_T, losses[name](new.float()), rtol=0, atol=0)
    if loss_T.requires_grad:
        loss_T.sum().backward()
        assert leaf.grad.dtype == dtype
    wide, losses = narrow_losses(torch.float64)
    assert losses[name](wide).dtype == torch.float64


def test_a_list_is_no_tensor():
    ids, rewards = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    for name, kind, refused in (
        ("rewards_S", "list", lambda: group_advantages([1.0, 0.0], ids)),
        ("group_ids_S", "list", lambda: group_advantages(rewards, ["a", "b"])),
        ("group_ids_S", "str", lambda: passk_advantages(rewards, "ab", k=1)),
        ("rewards_SR", "list", lambda: multi_reward_advantages([[1.0]], ids)),
        ("truncated_S", "list", lambda: keep_untruncated([True], PACKED)),
        ("group_ids_S", "list", lambda: Packed.from_padded(PACKED.mask_T[None], [0])),
        ("mask_BL", "list", lambda: Packed.from_padded([[True]])),
        ("logprobs_T", "list", lambda: nll([0.0, 0.0, 0.0], PACKED)),
        ("logits_TV", "list", lambda: token_logprobs([[0.0]], ids)),
    ):
        with pytest.raises(DtypeError, match=f"{name} is a {kind}; expected a tensor"):
            refused()
    for dtype in (torch.float32, torch.complex64, torch.bool):
        with pytest.raises(DtypeError, match="expected floating point and int64"):
            group_advantages(rewards, ids.to(dtype))


@pytest.mark.parametrize("temperature", [0, float("inf"), float("nan"), "1", None])
def test_a_temperature_is_a_finite_number_above_0(temperature):
    logits = torch.zeros(3, 2)
    with pytest.raises(SettingError, match="expected a finite number above 0"):
        token_logprobs(logits, torch.zeros(3, dtype=torch.int64), temperature=temperature)
    with pytest.raises(SettingError, match="expected a finite number above 0"):
        generalized_jsd(logits, logits, PACKED, temperature=temperature)
    rows = torch.tensor([1.0, float("inf"), 1.0])
    with pytest.raises(SettingError, match="expected finite numbers above 0"):
        token_logprobs(logits, torch.zeros(3, dtype=torch.int64), temperature=rows)


def test_logits_over_no_vocabulary_are_refused():
    with pytest.raises(ShapeError, match="V of 1 or more"):
        token_logprobs(torch.zeros(1, 0), torch.tensor([-100]))


def test_without_an_advantage_an_infinite_ratio_is_0_in_sequence_surrogates_too():
    one = Packed.from_padded(torch.ones(1, 1, dtype=torch.bool))
    inf, nothing = float("inf"), torch.zeros(1)
    for far in (inf, -inf, 800.0):
        for surrogate in (
            lambda x: gmpo(x, nothing, one),
            lambda x: vespo(x, x, nothing, one),
            lambda x: vespo(0 * x.nan_to_num() - 1, x.detach(), torch.ones(1), one),
        ):
            leaf = torch.tensor([far], requires_grad=True)
            loss_T = surrogate(leaf).loss_T
            loss_T.sum().backward()
            assert loss_T == 0 and leaf.grad == 0
    broken = torch.tensor([float("nan")])
    assert gmpo(broken, nothing, one).loss_T.isnan()
    assert vespo(broken, broken, nothing, one).loss_T.isnan()
