"""The checksum of bytes, and that of each block."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.sync._checksum import BLOCK, block_sums, checksum, salt, weights, wrap


def noise(shape, dtype, seed):
    """Random bytes of any dtype."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


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
    weights_K = weights(torch.device("cpu")).tolist()
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
