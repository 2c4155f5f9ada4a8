"""Every preset: loss, gradient and readings do not depend on how a step is cut or laid out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import count
from miles.losses import Correction, presets, reduce_metrics
from tests.equivalence.test_loss_splits import (
    SPLITS,
    correct,
    micro_batches,
    padded,
    partitions,
    take,
    whole_step,
)
from tests.presets import RUNNERS, count_right
from tests.steps import quick, random_step


def run(name, step, parts):
    leaf_T, whole = step.leaf(), correct(step)
    packs = [packed for packed, _ in parts]
    denominators, right = count(packs), count_right(packs)
    total, metrics = 0.0, []
    for packed, index_T in parts:
        correction = Correction(whole.weights_T[index_T], whole.keep_T[index_T], {})
        part = take(step, packed, index_T)
        loss, readings = RUNNERS[name](leaf_T[index_T], part, denominators, right, correction)
        loss.backward()
        total += loss.item()
        metrics.append(readings)
    return total, leaf_T.grad, reduce_metrics(metrics)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert expected[1].abs().max() > 1e-4 and expected[1].isfinite().all()


def test_every_preset_is_here():
    assert sorted(RUNNERS) == sorted(presets.__all__)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", RUNNERS)
def test_a_preset_is_the_same_for_every_split(name, split):
    step = random_step()
    parts = micro_batches(step, SPLITS[split])
    assert_same(run(name, step, parts), run(name, step, whole_step(step)))


@pytest.mark.parametrize("name", RUNNERS)
@quick
@given(seed=st.integers(0, 1000), split=partitions)
def test_a_preset_is_the_same_for_random_partitions(name, seed, split):
    step = random_step(seed)
    got, expected = run(name, step, micro_batches(step, split)), run(name, step, whole_step(step))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", RUNNERS)
def test_a_padded_batch_is_the_packed_one(name):
    step = random_step()
    assert_same(run(name, step, [padded(step, 3)]), run(name, step, whole_step(step)))
