from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed, count
from miles.errors import DtypeError, EmptyBatchError, MilesError, SettingError, ShapeError
from miles.packed import pack, tokens_per_sequence, unpack
from tests.steps import poison, quick, random_step, select

MASK_BL = torch.tensor([[False, True, True], [True, False, False]])
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def two_sequences(**changes) -> Packed:
    fields = {
        "seq_ids_T": torch.tensor([0, 0, 1]),
        "mask_T": torch.tensor([True, False, True]),
        "num_seqs": 2,
    }
    return Packed(**(fields | changes))


def counts(d):
    groups = None if d.num_groups is None else (d.num_groups.item(), d.group_tokens_G.tolist())
    return d.num_tokens.item(), d.num_seqs.item(), groups


def test_from_padded_keeps_every_position_row_major():
    packed = Packed.from_padded(MASK_BL, torch.tensor([4, 2]))
    assert packed.seq_ids_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert packed.mask_T.tolist() == MASK_BL.flatten().tolist()
    assert packed.group_ids_S.tolist() == [4, 2]
    assert (packed.num_seqs, packed.num_positions) == (2, 6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_cu_seqlens_takes_empty_sequences(dtype):
    packed = Packed.from_cu_seqlens(torch.tensor([0, 2, 2, 3], dtype=dtype), torch.ones(3).bool())
    assert packed.seq_ids_T.tolist() == [0, 0, 2]
    assert packed.positions_T.tolist() == [0, 1, 0]
    assert packed.num_seqs == 3


def test_cat_renumbers_sequences_and_keeps_global_groups():
    a = Packed.from_padded(MASK_BL, torch.tensor([0, 1]))
    b = Packed.from_cu_seqlens(torch.tensor([0, 2]), torch.ones(2).bool(), torch.tensor([1]))
    whole = Packed.cat([a, b])
    assert whole.seq_ids_T.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert whole.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert whole.mask_T.tolist() == [*MASK_BL.flatten().tolist(), True, True]
    assert (whole.group_ids_S.tolist(), whole.num_seqs) == ([0, 1, 1], 3)


def test_cat_of_selected_sequences_is_the_whole():
    whole = random_step().packed
    again = Packed.cat([select(whole, seqs)[0] for seqs in ([0, 1, 2], [3], [4, 5, 6, 7])])
    for name in ("seq_ids_T", "mask_T", "group_ids_S", "positions_T"):
        assert torch.equal(getattr(whole, name), getattr(again, name)), name


def test_to_moves_every_tensor_and_leaves_the_original():
    packed = Packed.from_padded(MASK_BL, torch.tensor([0, 1]))
    moved = packed.to("meta")
    tensors = (moved.seq_ids_T, moved.mask_T, moved.group_ids_S, moved.positions_T)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert packed.mask_T.device.type == "cpu"
    assert two_sequences().to("meta").positions_T is None


def test_per_token_spreads_a_value_over_its_sequence_in_any_order():
    packed = two_sequences(seq_ids_T=torch.tensor([1, 0, 1]))
    assert packed.per_token(torch.tensor([5.0, 7.0])).tolist() == [7.0, 5.0, 7.0]


def test_sum_per_sequence_skips_masked_garbage_in_value_and_gradient():
    packed = two_sequences(seq_ids_T=torch.tensor([1, 0, 1]))
    values = torch.tensor([2.0, torch.nan, 3.0], requires_grad=True)
    sums_S = packed.sum_per_sequence(values)
    (sums_S * torch.tensor([10.0, 100.0])).sum().backward()
    assert sums_S.tolist() == [0.0, 5.0]
    assert values.grad.tolist() == [100.0, 0.0, 100.0]


def test_sum_per_sequence_shows_a_trainable_nan_in_its_sequence_only():
    sums_S = two_sequences().sum_per_sequence(torch.tensor([torch.nan, 1.0, 3.0]))
    assert sums_S[0].isnan() and sums_S[1] == 3


def test_sum_per_sequence_keeps_the_dtype_but_not_its_rounding():
    packed = Packed.from_padded(torch.ones(1, 3).bool())
    sums_S = packed.sum_per_sequence(torch.tensor([2.0**24, 1.0, 1.0]))
    assert (sums_S.dtype, sums_S.item()) == (torch.float32, 2.0**24 + 2)
    assert packed.sum_per_sequence(torch.tensor([1, 2, 3])).dtype == torch.int64


def test_sum_per_sequence_passes_gradcheck():
    packed = random_step().packed
    values = torch.randn(packed.num_positions, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed.sum_per_sequence, values)


@quick
@given(st.integers(0, 10_000))
def test_permuting_tokens_changes_no_sequence_sum(seed):
    step = random_step(seed)
    order = torch.randperm(step.packed.num_positions)
    shuffled = two_sequences(
        seq_ids_T=step.packed.seq_ids_T[order], mask_T=step.packed.mask_T[order], num_seqs=8
    )
    expected = step.packed.sum_per_sequence(step.old_T)
    torch.testing.assert_close(shuffled.sum_per_sequence(step.old_T[order]), expected)
    assert counts(count(shuffled))[:2] == counts(count(step.packed))[:2]


@quick
@given(lengths)
def test_pack_then_unpack_gives_each_sequence_back(lengths):
    sequences = [torch.randn(length) for length in lengths]
    values_T, cu_S1 = pack(sequences)
    packed = Packed.from_cu_seqlens(cu_S1, torch.ones(len(values_T)).bool())
    rows = unpack(values_T, packed, fill=-7)
    for row, sequence in zip(rows, sequences, strict=True):
        assert torch.equal(row[: len(sequence)], sequence)
        assert (row[len(sequence) :] == -7).all()


def test_unpack_inverts_flatten_of_a_padded_batch_in_any_token_order():
    x_BL = torch.randn(4, 5)
    packed = Packed.from_padded(torch.rand(4, 5) < 0.5)
    assert torch.equal(unpack(x_BL.flatten(), packed), x_BL)
    order = torch.randperm(20)
    shuffled = Packed(
        seq_ids_T=packed.seq_ids_T[order],
        mask_T=packed.mask_T[order],
        positions_T=packed.positions_T[order],
        num_seqs=4,
    )
    assert torch.equal(unpack(x_BL.flatten()[order], shuffled), x_BL)


def test_unpack_is_differentiable():
    packed = Packed.from_cu_seqlens(torch.tensor([0, 1, 3]), torch.ones(3).bool())
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (unpack(values, packed) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert values.grad.tolist() == [1.0, 3.0, 4.0]


def test_count_of_literals():
    packed = Packed.from_padded(
        torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool(),
        torch.tensor([0, 0, 2, 3]),
    )
    assert counts(count(packed)) == (3, 2, (2, [2, 0, 1, 0]))
    assert counts(count(Packed.from_padded(MASK_BL))) == (3, 2, None)


def test_count_with_keep_leaves_rejected_tokens_out():
    packed = Packed.from_padded(MASK_BL, torch.tensor([0, 1]))
    keep_T = torch.tensor([True, True, False, False, True, True])
    d = count(packed, keep_T=keep_T)
    assert counts(d) == (1, 1, (1, [1, 0]))
    assert d.counted_keep and not count(packed).counted_keep
    assert tokens_per_sequence(packed, keep_T).tolist() == [1, 0]
    assert counts(count([packed], keep_T=[keep_T])) == counts(d)


@quick
@given(st.integers(0, 10_000), st.permutations(range(8)), st.sets(st.integers(1, 7)))
def test_count_does_not_depend_on_micro_batches_order_or_padding(seed, order, cuts):
    step = random_step(seed)
    keep_T = step.rollout_T > -2
    bounds = [0, *sorted(cuts), 8]
    parts = [select(step.packed, list(order[low:high])) for low, high in pairwise(bounds)]
    micro_batches = [part for part, _ in parts]
    assert counts(count(micro_batches)) == counts(count(step.packed))
    kept = count(micro_batches, keep_T=[keep_T[index_T] for _, index_T in parts])
    assert counts(kept) == counts(count(step.packed, keep_T=keep_T))
    padded_BL = torch.nn.functional.pad(unpack(step.packed.mask_T, step.packed), (0, 3))
    padded = Packed.from_padded(padded_BL, step.packed.group_ids_S)
    assert counts(count(padded)) == counts(count(step.packed))


def test_count_takes_a_rank_without_work_beside_one_with():
    idle = Packed.from_padded(torch.zeros(1, 2).bool(), torch.tensor([0]))
    busy = Packed.from_padded(torch.ones(1, 2).bool(), torch.tensor([1]))
    assert counts(count([idle, busy])) == (2, 1, (1, [0, 2]))


def bad_inputs():
    ids, mask = torch.tensor([0, 0, 1]), torch.tensor([True, False, True])
    plain = two_sequences()
    grouped = two_sequences(group_ids_S=torch.tensor([0, 1]))
    nothing = two_sequences(mask_T=torch.zeros(3).bool())
    yield ShapeError, "(1, 3)", "1-D", lambda: two_sequences(seq_ids_T=ids[None])
    yield ShapeError, "(2,)", "[3]", lambda: two_sequences(mask_T=mask[:2])
    yield ShapeError, "(1,)", "[3]", lambda: two_sequences(positions_T=ids[:1])
    yield ShapeError, "(3,)", "[2]", lambda: two_sequences(group_ids_S=ids)
    yield DtypeError, "int32", "int64", lambda: two_sequences(seq_ids_T=ids.int())
    yield DtypeError, "float32", "bool", lambda: two_sequences(mask_T=mask.float())
    yield DtypeError, "float32", "int64", lambda: two_sequences(positions_T=ids.float())
    yield DtypeError, "int32", "int64", lambda: two_sequences(group_ids_S=ids[:2].int())
    yield SettingError, "0 to 2", "0..1", lambda: two_sequences(seq_ids_T=ids * 2)
    yield SettingError, "-1 to 0", "0..1", lambda: two_sequences(seq_ids_T=ids - 1)
    yield SettingError, "-1 to 0", "0 or more", lambda: two_sequences(group_ids_S=ids[1:] - 1)
    yield SettingError, "-1 to 0", "0 or more", lambda: two_sequences(positions_T=ids - 1)
    yield SettingError, "-1", "0 or more", lambda: two_sequences(num_seqs=-1)
    yield ShapeError, "(3,)", "[B, L]", lambda: Packed.from_padded(mask)
    yield DtypeError, "int64", "bool", lambda: Packed.from_padded(MASK_BL.long())
    yield ShapeError, "(0,)", "[S + 1]", lambda: Packed.from_cu_seqlens(ids[:0], mask)
    for cu in ([0, 2], [1, 3], [0, 2, 1, 3]):
        bad_cu = torch.tensor(cu)
        yield ShapeError, str(cu), "(3) last", lambda cu=bad_cu: Packed.from_cu_seqlens(cu, mask)
    yield EmptyBatchError, "no micro-batch", "at least one", lambda: Packed.cat([])
    yield SettingError, "group_ids_S", "all or none", lambda: Packed.cat([plain, grouped])
    yield ShapeError, "(3,)", "[2]", lambda: plain.per_token(torch.ones(3))
    yield ShapeError, "values_T has shape (2,)", "(3,)", lambda: plain.sum_per_sequence(ids[:2])
    yield ShapeError, "values_T has shape (2,)", "(3,)", lambda: unpack(ids[:2], plain)
    yield SettingError, "unpack", "positions_T", lambda: unpack(ids, plain)
    yield EmptyBatchError, "no sequence", "1-D", lambda: pack([])
    yield ShapeError, "sequence 1 has shape (1, 3)", "1-D", lambda: pack([ids, ids[None]])
    yield EmptyBatchError, "no micro-batch", "at least one", lambda: count([])
    yield SettingError, "some do not", "all or none", lambda: count([plain, grouped])
    yield EmptyBatchError, "no trainable token", "mask_T", lambda: count(nothing)
    yield ShapeError, "1 keep_T for 2", "one each", lambda: count([plain, plain], keep_T=mask)
    yield ShapeError, "keep_T has shape (2,)", "3", lambda: count(plain, keep_T=mask[:2])
    yield DtypeError, "keep_T is torch.float32", "bool", lambda: count(plain, keep_T=mask.float())


@pytest.mark.parametrize(("error", "got", "expected", "call"), list(bad_inputs()))
def test_bad_input_says_what_came_and_what_is_wanted(error, got, expected, call):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, MilesError)
    assert got in str(caught.value) and expected in str(caught.value)


def test_poison_leaves_no_finite_number_at_masked_positions():
    mask_T = torch.tensor([True, False, False])
    assert poison(torch.ones(3), mask_T).isfinite().tolist() == mask_T.tolist()
