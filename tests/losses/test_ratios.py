import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses import log_ratio
from tests.steps import quick, random_step

LEVELS = ["token", "sequence_mean", "sequence_sum", "sequence_token"]
# two sequences: the first trains on tokens 0 and 2, the second on token 3
PACKED = Packed.from_padded(torch.tensor([[True, False, True], [True, False, False]]))
NEW = [-1.0, torch.nan, -2.0, -5.0, torch.inf, -torch.inf]
OLD = [-1.5, torch.inf, -4.5, -4.0, torch.nan, -torch.inf]


@pytest.mark.parametrize(
    ("level", "expected", "gradient"),
    [
        ("token", [0.5, 0, 2.5, -1, 0, 0], [1, 0, 10, 100, 0, 0]),
        ("sequence_mean", [1.5, 0, 1.5, -1, 0, 0], [5.5, 0, 5.5, 100, 0, 0]),
        ("sequence_sum", [3, 0, 3, -1, 0, 0], [11, 0, 11, 100, 0, 0]),
        ("sequence_token", [1.5, 0, 1.5, -1, 0, 0], [1, 0, 10, 100, 0, 0]),
    ],
)
def test_literals_and_their_gradients(level, expected, gradient):
    new_T, old_T = torch.tensor(NEW, requires_grad=True), torch.tensor(OLD, requires_grad=True)
    got = log_ratio(new_T, old_T, PACKED, level=level)
    upstream = torch.tensor([1.0, torch.nan, 10.0, 100.0, torch.nan, torch.nan])
    got.backward(upstream)
    assert got.tolist() == expected
    assert new_T.grad.tolist() == gradient and old_T.grad is None


@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_sum"])
def test_gradcheck(level):
    step = random_step()
    packed, old_T = step.packed, torch.where(step.packed.mask_T, step.old_T, 0)
    new_T = torch.where(packed.mask_T, step.logprobs_T, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_ratio(x, old_T, packed, level=level).exp(), new_T)


@quick
@given(st.integers(0, 10_000))
def test_sequence_levels_match_a_loop_over_sequences(seed):
    step = random_step(seed)
    for seq in range(step.packed.num_seqs):
        member_T = step.packed.mask_T & (step.packed.seq_ids_T == seq)
        delta = step.logprobs_T[member_T] - step.old_T[member_T]
        if not len(delta):
            continue
        expected = {"token": delta, "sequence_sum": delta.sum(), "sequence_mean": delta.mean()}
        for level, value in expected.items():
            got = log_ratio(step.logprobs_T, step.old_T, step.packed, level=level)[member_T]
            torch.testing.assert_close(got, value.expand(len(delta)))


def test_sequence_token_has_exactly_the_value_of_sequence_mean():
    new_T = torch.tensor([3e4, -3e4, 0.1, 0.3]).requires_grad_()
    packed = Packed.from_padded(torch.ones(1, 4).bool())
    values = [
        log_ratio(new_T, torch.zeros(4), packed, level=level)
        for level in ("sequence_mean", "sequence_token")
    ]
    assert values[0].tolist() == values[1].tolist()


@pytest.mark.parametrize("level", LEVELS)
def test_garbage_at_masked_positions_changes_nothing(level):
    step = random_step()
    mask_T = step.packed.mask_T
    results = []
    for fill in (lambda x: x, lambda x: torch.where(mask_T, x, 0)):
        new_T = fill(step.logprobs_T).clone().requires_grad_()
        got = log_ratio(new_T, fill(step.old_T), step.packed, level=level)
        got.exp().sum().backward()
        results.append((got.detach(), new_T.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0][1][~mask_T] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_trainable_nan_is_not_hidden_and_stays_in_its_sequence(level):
    new_T = torch.tensor(NEW)
    new_T[2] = torch.nan
    got = log_ratio(new_T, torch.tensor(OLD), PACKED, level=level)
    assert got[2].isnan() and got[3] == -1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(level, dtype):
    new_T = torch.tensor(NEW, dtype=dtype)
    assert log_ratio(new_T, torch.tensor(OLD, dtype=dtype), PACKED, level=level).dtype == dtype


def test_bad_input():
    new_T = torch.tensor(NEW)
    with pytest.raises(ShapeError, match=r"old_T has shape \(5,\); expected \(6,\)"):
        log_ratio(new_T, new_T[:5], PACKED)
    with pytest.raises(SettingError, match="level is 'sequence'; expected token"):
        log_ratio(new_T, new_T, PACKED, level="sequence")


def test_bfloat16_is_compared_in_float32_and_whole_numbers_are_refused():
    packed = Packed.from_padded(torch.ones(1, 2, dtype=torch.bool))
    new = torch.tensor([-1.9297, -2.0], dtype=torch.bfloat16)
    old = torch.tensor([-2.0, -2.0], dtype=torch.bfloat16)
    ratio = log_ratio(new, old, packed, level="sequence_mean")
    assert ratio.dtype == torch.float32 and ratio[0] == (new[0].float() + 2) / 2
    with pytest.raises(DtypeError, match=r"new_T is torch\.int64"):
        log_ratio(torch.zeros(2, dtype=torch.int64), old, packed)
