"""Buckets as they are filled, and the inbox they arrive in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import SettingError, SyncError
from miles.sync._bucket_plan import Layout
from miles.sync._buckets import check_bucket_bytes, gathered
from miles.sync._checksum import BLOCK, block_sums
from miles.sync._inbox import Inbox
from miles.sync._outbox import Outbox
from tests.sync.test_checksum import noise

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool]
CPU = torch.device("cpu")


def specs_of(tensors):
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def filled(weights, specs, bucket_bytes, version=1):
    """(bucket, a copy of its bytes) one after the other, and the sums."""
    outbox = Outbox(specs, bucket_bytes, CPU)
    for buffer in outbox.buffers:
        buffer.fill_(171)
    found = [(b, b.data.clone()) for b in outbox.fill(weights, version, lambda: None)]
    return found, outbox.sums


def inbox_of(specs, bucket_bytes, version=1):
    where = Layout(specs)
    buffer = torch.full((where.nbytes,), 99, dtype=torch.uint8)
    return Inbox(where, buffer, bucket_bytes, version)


def arrive(inbox, buckets, damage=lambda index, data: None):
    for bucket, data in buckets:
        there = inbox.place(bucket.index, data.numel(), bucket.packed)
        there.copy_(data)
        damage(bucket.index, there)
        inbox.arrived(bucket.index, there)


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
models = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(models, st.sampled_from([1, 2, 3, 64]), st.randoms())
def test_any_tensors_arrive_bit_for_bit_as_a_collection_and_as_a_stream(model, blocks, random):
    tensors = {f"t{i}": noise(shape, dtype, i) for i, (shape, dtype) in enumerate(model)}
    specs, bucket_bytes = specs_of(tensors), blocks * BLOCK
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    collected, sums = filled(shuffled, specs, bucket_bytes)
    streamed, others = filled(gathered(iter(shuffled), specs), specs, bucket_bytes)
    assert [b.packed for b, _ in collected] == [b.packed for b, _ in streamed]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(collected, streamed, strict=True))
    assert torch.equal(sums, others)
    assert all(data.numel() == bucket_bytes for _, data in collected[:-1])
    flat = torch.cat([data for _, data in collected])
    assert torch.equal(sums, block_sums(flat, version=1))
    inbox = inbox_of(specs, bucket_bytes)
    arrive(inbox, collected)
    got = inbox.check(sums)
    assert list(got) == list(tensors)
    assert all(same_bits(got[name], tensors[name]) for name in tensors)


def test_a_large_tensor_lies_in_several_buckets_and_small_ones_share_one():
    tensors = {
        "a": torch.ones(3),
        "b": torch.ones(1),
        "large": noise((5000, 2), torch.bfloat16, 0),
    }
    order = [(name, tensors[name]) for name in ("large", "a", "b")]
    buckets, _ = filled(order, specs_of(tensors), 2 * BLOCK)
    assert [b.packed for b, _ in buckets] == [
        [[2, 0, 1, 8192]],
        [[2, 8192, 1, 16384]],
        [[2, 16384, 1, 20000], [0, 0, 1, 12]],
        [[1, 0, 1, 4]],
    ]
    assert [(b.index, b.first, b.last) for b, _ in buckets][2:] == [
        (2, "large", "a"),
        (3, "b", "b"),
    ]
    assert [data.numel() for _, data in buckets] == [8192, 8192, 8192, 4096]
    assert not buckets[2][1][20000 - 16384 : 4096].any() and not buckets[3][1][4:].any()


@pytest.mark.parametrize("stream", [False, True])
def test_values_are_cast_and_strided_ones_are_laid_out(stream):
    tensors = {"w": torch.randn(140, 30).double().T, "x": torch.randn(64)}
    specs = {"w": ((30, 140), torch.bfloat16), "x": ((64,), torch.bfloat16)}
    buckets, sums = filled(iter(tensors.items()) if stream else list(tensors.items()), specs, BLOCK)
    inbox = inbox_of(specs, BLOCK)
    arrive(inbox, buckets)
    got = inbox.check(sums)
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_a_stream_may_write_to_the_same_memory_again():
    memory = torch.empty(3000)
    specs = {name: ((3000,), torch.float32) for name in "abc"}

    def stream():
        for value, name in enumerate("abc"):
            yield name, memory.fill_(value)

    inbox = inbox_of(specs, 2 * BLOCK)
    buckets, sums = filled(stream(), specs, 2 * BLOCK)
    arrive(inbox, buckets)
    assert [t.unique().tolist() for t in inbox.check(sums).values()] == [[0.0], [1.0], [2.0]]


def test_a_buffer_is_asked_for_before_it_is_written_again():
    tensors = {name: torch.ones(1024) for name in "abcd"}
    outbox, events = Outbox(specs_of(tensors), BLOCK, CPU), []
    for bucket in outbox.fill(list(tensors.items()), 1, lambda: events.append("free")):
        events.append(bucket.index)
    assert events == ["free", 0, "free", 1, "free", 2, "free", 3]
    assert [buffer.numel() for buffer in outbox.buffers] == [BLOCK, BLOCK]


@pytest.fixture
def tensors():
    return {"a": noise((2700,), torch.float32, 1), "b": noise((70,), torch.bfloat16, 2)}


def test_a_flipped_byte_is_found_and_its_tensor_bucket_and_block_are_named(tensors):
    specs = specs_of(tensors)
    buckets, sums = filled(list(tensors.items()), specs, 2 * BLOCK)
    inbox = inbox_of(specs, 2 * BLOCK)

    def flip(index, data):
        if index == 1:
            data[5] ^= 64

    arrive(inbox, buckets, flip)
    text = "^a arrived with another checksum, in bucket 1 at byte 8192 of the tensor; 1 blocks"
    with pytest.raises(SyncError, match=text):
        inbox.check(sums)


def test_the_tensor_is_named_whatever_the_order_and_whatever_has_no_bytes(tensors):
    given = {"none": torch.empty(0), **tensors, "zero": torch.empty(0, 3)}
    order = ["b", "zero", "a", "none"]
    buckets, sums = filled([(name, given[name]) for name in order], specs_of(given), 8 * BLOCK)
    inbox = inbox_of(specs_of(given), 8 * BLOCK)

    def flip(index, data):
        data[1] ^= 1

    arrive(inbox, buckets, flip)
    with pytest.raises(SyncError, match=r"^b arrived .* in bucket 0 at byte 0 of the tensor"):
        inbox.check(sums)


def test_the_bytes_of_another_version_are_found(tensors):
    specs = specs_of(tensors)
    buckets, sums = filled(list(tensors.items()), specs, 4 * BLOCK, version=1)
    inbox = inbox_of(specs, 4 * BLOCK, version=2)
    arrive(inbox, buckets)
    with pytest.raises(SyncError, match="4 blocks of 4096 bytes differ"):
        inbox.check(sums)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ([0, 2], "bucket 1 was dropped: expected 1, got 2"),
        ([0, 1, 1], "bucket 1 came again, or out of order: expected 2, got 1"),
        ([1, 0], "bucket 0 was dropped: expected 0, got 1"),
    ],
)
def test_buckets_dropped_repeated_and_reordered_are_refused(tensors, order, text):
    specs = specs_of(tensors)
    buckets, _ = filled(list(tensors.items()), specs, BLOCK)
    with pytest.raises(SyncError, match=text):
        arrive(inbox_of(specs, BLOCK), [buckets[i] for i in order])


def test_a_tensor_that_did_not_come_whole_is_named(tensors):
    specs = specs_of(tensors)
    buckets, sums = filled(list(tensors.items()), specs, BLOCK)
    inbox = inbox_of(specs, BLOCK)
    arrive(inbox, buckets[:2])
    with pytest.raises(SyncError, match=r"tensors \['a', 'b'\] did not arrive whole"):
        inbox.check(sums)


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        ([[2, 0, 1, 4]], "bucket 0: tensors 2 to 2 are announced; the engine has no such tensor"),
        ([[0, 0, 1, 10804]], "bytes 0 to 10804 of a; expected byte 0 of 10800"),
        ([[0, 4096, 1, 8192]], "bytes 4096 to 8192 of a; expected byte 0"),
        ([[0, 0, 1, -4]], "bytes 0 to -4 of a"),
        ([[1, 0, 1, 140], [1, 0, 1, 140]], "bytes 0 to 140 of b; expected byte 140 of 140 next"),
        ([[0, 0, 1, 4096], [1, 0, 1, 140], [0, 4096, 1, 8192]], "holds a apart from its first"),
        ([[0, 0, 1, 4]], "bucket 0 has 8192 bytes; its tensors take 4096"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tensors, packed, text):
    with pytest.raises(SyncError, match=text):
        inbox_of(specs_of(tensors), 4 * BLOCK).place(0, 8192, packed)


@pytest.mark.parametrize("size", [0, -4096, 100, 4097])
def test_sizes_that_buckets_cannot_have(size):
    with pytest.raises(SettingError, match="multiple of 4096"):
        check_bucket_bytes(size)
