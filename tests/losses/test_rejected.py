"""Rejected tokens leave every term of a preset, and a step whose tokens are all rejected is 0."""

import itertools
from dataclasses import replace

import pytest
import torch

from miles import Packed, count
from miles.errors import DenominatorError, DtypeError, EmptyBatchError
from miles.losses import (
    Correction,
    aggregate,
    keep_untruncated,
    policy_loss,
    reduce_metrics,
    truncated_is,
)
from miles.losses.presets import vapo
from tests.presets import RUNNERS, right_T
from tests.steps import Step, random_step, select

CUT_S = torch.tensor([True, False, False, False, False, True, False, False])
MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "group_mean", "sum"]


def run(name, step, *, keep_T=None):
    """Loss and gradient of one preset; with `keep_T`, what it rejects is not counted."""
    leaf_T = step.leaf()
    correction = Correction.only(step.packed.mask_T if keep_T is None else keep_T)
    counted = right_T(step.packed) & correction.keep_T
    loss, metrics = RUNNERS[name](
        leaf_T, step, count(step.packed, keep_T=keep_T), count(step.packed, keep_T=counted),
        correction,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), leaf_T.grad, metrics


@pytest.mark.parametrize("name", RUNNERS)
def test_truncated_samples_that_are_not_counted_are_as_if_they_were_not_there(name):
    """VAPO's NLL went on training right answers that were rejected."""
    step = random_step()
    assert (right_T(step.packed) & step.packed.per_token(CUT_S)).any()
    loss, gradient_T, _ = run(name, step, keep_T=keep_untruncated(CUT_S, step.packed))
    fewer, index_T = select(step.packed, (~CUT_S).nonzero().flatten().tolist())
    expected, expected_T, _ = run(name, Step(fewer, *(x_T[index_T] for x_T in step[1:])))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_T[index_T], expected_T)
    assert (gradient_T[step.packed.per_token(CUT_S)] == 0).all()


@pytest.mark.parametrize("name", RUNNERS)
def test_a_step_whose_samples_are_all_rejected_is_0_with_a_graph(name):
    """`count` raised, and the training loop with it."""
    step = random_step()
    loss, gradient_T, _ = run(name, step, keep_T=torch.zeros_like(step.packed.mask_T))
    assert loss == 0 and (gradient_T == 0).all()


@pytest.mark.parametrize(
    ("backend", "mode"),
    [*itertools.product(["reference", "chunked"], MODES), ("compiled", "seq_mean_token_mean")],
)
def test_nothing_kept_is_0_in_every_mode_and_backend(mode, backend):
    packed = Packed.from_padded(torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 1]))
    keep_T = torch.zeros(4, dtype=torch.bool)
    step = count(packed, keep_T=keep_T)
    assert [step.num_tokens, step.num_seqs, step.num_groups] == [0, 0, 0]
    leaf_T = torch.ones(4, requires_grad=True)
    constant = 2.0 if mode == "constant" else None
    loss, metrics = policy_loss(
        leaf_T, torch.ones(4), torch.ones(4), packed, step, mode=mode, constant=constant,
        correction=Correction.only(keep_T), count_rejected=False, ref_logprobs_T=torch.zeros(4),
        kl_coef=0.1, backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss == 0 and leaf_T.grad.tolist() == [0.0] * 4
    assert reduce_metrics(metrics)["ratio/mean"] == 1
    whole = aggregate(leaf_T, packed, step, mode=mode, constant=constant, keep_T=keep_T,
                      count_rejected=False)  # fmt: skip
    assert whole == 0 and whole.requires_grad


def test_a_step_without_a_trainable_token_is_still_refused():
    nothing = Packed.from_padded(torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(EmptyBatchError, match="no trainable token"):
        count(nothing)


def test_denominators_of_0_for_tokens_that_are_kept_are_refused():
    packed = Packed.from_padded(torch.ones(1, 2, dtype=torch.bool))
    step = count(packed, keep_T=~packed.mask_T)
    with pytest.raises(DenominatorError, match="denominators are 0, but keep_T keeps tokens"):
        aggregate(torch.ones(2), packed, step, keep_T=packed.mask_T, count_rejected=False)


def test_vapo_needs_no_count_of_right_answers_that_were_all_rejected():
    packed = Packed.from_padded(torch.ones(2, 1, dtype=torch.bool))
    keep_T = torch.tensor([False, True])
    x, right = torch.tensor([-1.0, -2.0]), torch.tensor([True, False])
    loss, _ = vapo(
        x, x, torch.ones(2), packed, count(packed, keep_T=keep_T), right_S=right,
        right_denominators=None, correction=Correction.only(keep_T), count_rejected=False,
    )  # fmt: skip
    assert loss == -1.0


def test_a_correction_of_flags_alone_weighs_1_and_moves_with_its_tokens():
    keep_T = torch.tensor([True, False])
    only = Correction.only(keep_T)
    assert only.weights_T.tolist() == [1.0, 0.0] and only.keep_T is keep_T and only.metrics == {}
    moved = only.to("meta")
    assert moved.weights_T.is_meta and moved.keep_T.is_meta
    with pytest.raises(DtypeError, match=r"keep_T is torch\.float32; expected torch\.bool"):
        Correction.only(keep_T.float())
    packed = Packed.from_padded(torch.ones(1, 2, dtype=torch.bool))
    full = truncated_is(torch.zeros(2), torch.zeros(2), packed)
    assert replace(full, keep_T=full.keep_T & keep_T).to("cpu").metrics == full.metrics
