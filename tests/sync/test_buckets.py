"""Buckets, their checksums, and the inbox they arrive in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import SettingError, SyncError
from miles.sync._buckets import Piece, check_bucket_bytes, cut, gathered
from miles.sync._checksum import BLOCK, block_sums, checksum, salt, weights, wrap
from miles.sync._inbox import Inbox, total

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool]


def specs_of(tensors):
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def noise(shape, dtype, seed):
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def buckets_of(tensors, bucket_bytes, specs=None):
    specs = specs or specs_of(tensors)
    return list(
        cut(
            gathered(tensors.items(), specs),
            specs,
            bucket_bytes=bucket_bytes,
            buffer=lambda index: torch.full((bucket_bytes,), 171, dtype=torch.uint8),
        )
    )


def inbox_of(tensors, bucket_bytes):
    specs = specs_of(tensors)
    return Inbox(specs, torch.full((Inbox.size(specs),), 99, dtype=torch.uint8), bucket_bytes)


def arrive(inbox, buckets, damage=lambda bucket, data: None):
    for bucket in buckets:
        data = inbox.place(bucket.index, bucket.data.numel(), bucket.pieces)
        data.copy_(bucket.data)
        damage(bucket, data)
        inbox.arrived(data, bucket.pieces)


def sums_of(buckets):
    return total([(bucket.pieces, bucket.sums) for bucket in buckets])


shapes = st.lists(st.integers(0, 40), max_size=2).map(tuple)
models = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(models, st.sampled_from([256, 512, 1024, 1 << 16]), st.randoms())
def test_any_tensors_arrive_bit_for_bit_whatever_the_size_of_buckets(model, bucket_bytes, random):
    tensors = {f"t{i}": noise(shape, dtype, i) for i, (shape, dtype) in enumerate(model)}
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    buckets = buckets_of(dict(shuffled), bucket_bytes, specs_of(tensors))
    assert all(bucket.data.numel() <= bucket_bytes for bucket in buckets)
    assert all(piece.offset % 256 == 0 for bucket in buckets for piece in bucket.pieces)
    inbox = inbox_of(tensors, bucket_bytes)
    arrive(inbox, buckets)
    got = inbox.check(sums_of(buckets))
    assert list(got) == list(tensors)
    assert all(same_bits(got[name], tensors[name]) for name in tensors)
    # The sums of pieces are the checksum of the whole.
    assert sums_of(buckets) == {name: checksum(t) for name, t in tensors.items()}


def test_a_large_tensor_lies_in_several_buckets_and_small_ones_share_one():
    tensors = {"large": noise((300, 2), torch.bfloat16, 0), "a": torch.ones(3), "b": torch.ones(1)}
    buckets = buckets_of(tensors, 512)
    assert [[(p.name, p.start, p.offset, p.nbytes) for p in b.pieces] for b in buckets] == [
        [("large", 0, 0, 512)],
        [("large", 512, 0, 512)],
        [("large", 1024, 0, 176), ("a", 0, 256, 12)],
        [("b", 0, 0, 4)],
    ]
    assert [b.data.numel() for b in buckets] == [512, 512, 512, 256]


def test_values_are_cast_and_strided_ones_are_laid_out():
    tensors = {"w": torch.randn(40, 30).double().T}
    specs = {"w": ((30, 40), torch.bfloat16)}
    inbox = Inbox(specs, torch.empty(Inbox.size(specs), dtype=torch.uint8), 256)
    buckets = buckets_of(tensors, 256, specs)
    arrive(inbox, buckets)
    assert torch.equal(inbox.check(sums_of(buckets))["w"], tensors["w"].bfloat16())


def in_plain_python(data: bytes) -> int:
    """The definition of the checksum, word by word."""

    def signed(number):
        return (number + 2**63) % 2**64 - 2**63

    def mix(number):
        number = signed(number * 0x9E3779B97F4A7C15)
        number = signed((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9)
        number = signed((number ^ (number >> 27)) * 0x94D049BB133111EB)
        return (number ^ (number >> 31)) | 1

    def weight(i):
        return mix(i // 512) * mix(2**33 + i % 512 // 32) * mix(2**32 + i % 32)

    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
    return signed(sum(weight(i) * word for i, word in enumerate(words)))


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=1500), st.integers(0, 3))
def test_the_checksum_is_what_it_is_said_to_be(data, times):
    data *= 4**times  # up to 96,000 bytes: many blocks
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    assert checksum(tensor) == in_plain_python(data)


def test_the_checksum_is_that_of_the_manifests_that_were_written():
    assert checksum(torch.arange(10_000)) == -3439304686281501096


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**20), st.integers(0, 7))
def test_any_flipped_bit_changes_the_checksum(size, place, bit):
    data = noise((size,), torch.uint8, size)
    flipped = data.clone()
    flipped[place % size] ^= 1 << bit
    assert checksum(data) != checksum(flipped)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2000), st.integers(0, 2**20), st.integers(0, 2**20))
def test_two_words_that_change_places_change_the_checksum(size, i, j):
    data = torch.arange(size, dtype=torch.int32)
    swapped = data.clone()
    i, j = i % size, j % size
    swapped[[i, j]] = data[[j, i]]
    assert (checksum(data) == checksum(swapped)) == (i == j)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9000), st.integers(1, 8999), st.integers(0, 2**20))
def test_a_shift_a_truncation_and_rows_that_change_places_change_the_checksum(size, shift, row):
    data = noise((size,), torch.uint8, size)
    data[-1] = 1
    shift = shift % (size - 1) + 1
    assert checksum(torch.cat([data.new_zeros(shift), data])) != checksum(data)
    assert checksum(data[:-shift]) != checksum(data)
    rows = noise((256, 40), torch.uint8, size).T.contiguous()
    order = list(range(40))
    order[0], order[row % 39 + 1] = order[row % 39 + 1], order[0]
    other = rows[order]
    assert checksum(other) != checksum(rows)


def test_two_words_of_a_block_go_unseen_only_if_they_differ_in_their_highest_bits():
    weights_K = weights(16, torch.device("cpu")).tolist()
    differences = (a - b for i, a in enumerate(weights_K) for b in weights_K[:i])
    assert max((d & -d).bit_length() - 1 for d in differences) == 19


def test_many_threads_find_the_same_sums():
    data = noise((1 << 25,), torch.uint8, 0)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(checksum(data))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_block_sums_are_the_blocks_checksums_and_differ_by_version():
    data = noise((4 * BLOCK,), torch.uint8, 0)
    one, two = (block_sums(data, version=version) for version in (1, 2))
    alone = [checksum(block) for block in data.view(4, BLOCK)]
    assert [wrap(int(s) - salt(1)) for s in one] == alone
    assert (one != two).all()
    swapped = data.view(4, BLOCK)[[0, 2, 1, 3]].flatten()
    assert (block_sums(swapped, version=1) != one).tolist() == [False, True, True, False]


def test_a_misaligned_view_has_the_checksum_of_its_bytes():
    data = noise((2001,), torch.uint8, 0)
    assert checksum(data[1:]) == checksum(data[1:].clone())


@pytest.fixture
def tensors():
    return {"a": noise((300,), torch.float32, 1), "b": noise((70,), torch.bfloat16, 2)}


def test_a_flipped_byte_is_found_and_its_tensor_and_bucket_are_named(tensors):
    buckets, inbox = buckets_of(tensors, 512), inbox_of(tensors, 512)

    def flip(bucket, data):
        if bucket.index == 1:
            data[5] ^= 64

    arrive(inbox, buckets, flip)
    with pytest.raises(SyncError, match=r"^a \(bucket 0, 1, 2\) arrived with another checksum"):
        inbox.check(sums_of(buckets))


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ([0, 2], "bucket 1 was dropped: expected 1, got 2"),
        ([0, 1, 1], "bucket 1 came again, or out of order: expected 2, got 1"),
        ([1, 0], "bucket 0 was dropped: expected 0, got 1"),
    ],
)
def test_buckets_dropped_repeated_and_reordered_are_refused(tensors, order, text):
    buckets, inbox = buckets_of(tensors, 512), inbox_of(tensors, 512)
    with pytest.raises(SyncError, match=text):
        arrive(inbox, [buckets[i] for i in order])


def test_a_tensor_that_did_not_come_whole_is_named(tensors):
    buckets, inbox = buckets_of(tensors, 512), inbox_of(tensors, 512)
    arrive(inbox, buckets[:2])
    with pytest.raises(SyncError, match=r"tensors \['a', 'b'\] did not arrive whole"):
        inbox.check(sums_of(buckets))


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (Piece("c", 0, 0, 4), "bucket 0 holds c, which the engine does not have"),
        (Piece("a", 0, 0, 1204), "bytes 0 to 1204 of a at 0; expected byte 0 of 1200"),
        (Piece("a", 256, 0, 4), "bytes 256 to 260 of a"),
        (Piece("a", 0, 256, 4), "next, at 0"),
        (Piece("a", 0, 0, 4), "bucket 0 has 512 bytes; its tensors take 256"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tensors, piece, text):
    with pytest.raises(SyncError, match=text):
        inbox_of(tensors, 512).place(0, 512, [piece])


@pytest.mark.parametrize("size", [0, -256, 100, 300])
def test_sizes_that_buckets_cannot_have(size):
    with pytest.raises(SettingError, match="multiple of 256"):
        check_bucket_bytes(size)
