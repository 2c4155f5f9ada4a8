"""Deltas: bit-exact for every dtype, and small for what changed little."""

import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import MissingExtraError, SyncError
from miles.sync import DeltaReport, apply_delta, encode_delta, measure_delta
from miles.sync._zstd import compress
from miles.sync.delta import Delta

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def noise(shape, dtype, seed):
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


def changed(old, places):
    new = old.clone()
    data = new.reshape(-1).view(torch.uint8)
    for place in places:
        data[place % data.numel()] ^= 1
    return new


def round_trip(old, new):
    delta = encode_delta(old, new)
    header = json.loads(json.dumps(delta.header()))
    got = apply_delta(old, Delta.read(header, delta.payload))
    assert got.dtype == new.dtype and got.shape == new.shape
    assert torch.equal(bits(got), bits(new))
    return delta


shapes = st.lists(st.integers(1, 30), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), shapes, st.lists(st.integers(0, 2**20), max_size=40))
def test_any_change_of_any_dtype_is_undone_bit_for_bit(dtype, shape, places):
    old = noise(shape, dtype, 0)  # all bit patterns: NaNs with payloads, -0.0, subnormals
    new = changed(old, places)
    delta = round_trip(old, new)
    size = min(dtype.itemsize, 8)
    differs = (bits(old) != bits(new)).view(-1, size).any(1)
    assert delta.num_changed == int(differs.sum())


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(DTYPES), shapes)
def test_two_unrelated_tensors(dtype, shape):
    round_trip(noise(shape, dtype, 1), noise(shape, dtype, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_tensors_and_scalars(dtype):
    assert round_trip(torch.empty(0, 4, dtype=dtype), torch.empty(0, 4, dtype=dtype)).nbytes == 0
    round_trip(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))


def test_signed_zeros_and_nans_are_told_by_their_bits():
    old = torch.tensor([0.0, float("nan"), 1.0])
    new = torch.tensor([-0.0, float("nan"), 1.0])
    assert round_trip(old, new).num_changed == 1
    quiet = torch.tensor([0x7FC00001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00002, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_trip(quiet, other).num_changed == 1


@pytest.mark.parametrize(
    ("every", "encoding"), [(1, "dense"), (3, "bitmap"), (200, "index1"), (5000, "index2")]
)
def test_the_shorter_way_to_tell_places_is_taken(every, encoding):
    old = noise((20000,), torch.bfloat16, 0)
    new = old.clone()
    new.view(torch.int16)[::every] ^= 1
    delta = round_trip(old, new)
    assert delta.encoding == encoding
    assert delta.nbytes < 20000 * 2 / 8


def test_far_places_take_wider_gaps():
    old = torch.zeros(70000, dtype=torch.uint8)
    new = old.clone()
    new[-1] = 1
    assert round_trip(old, new).encoding == "index4"


def test_strides_do_not_matter():
    old, new = torch.randn(30, 20).T, torch.randn(20, 30)
    assert torch.equal(apply_delta(old, encode_delta(old, new)), new)


def test_the_base_stays_as_it_was():
    old, new = torch.zeros(100), torch.ones(100)
    apply_delta(old, encode_delta(old, new))
    assert not old.any()


def test_what_does_not_fit_is_refused():
    old, new = noise((50,), torch.bfloat16, 1), noise((50,), torch.bfloat16, 2)
    delta = encode_delta(old, new)
    with pytest.raises(SyncError, match=r"new tensor is \(50,\) torch.float32"):
        encode_delta(old, new.float())
    with pytest.raises(SyncError, match=r"the delta is of \(50,\)"):
        apply_delta(old.view(5, 10), delta)
    with pytest.raises(SyncError, match="not the one that the delta was taken from"):
        apply_delta(new, delta)
    with pytest.raises(SyncError, match="damaged"):
        Delta.read({"dtype": "torch.float32"}, b"")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 7), st.sampled_from([1, 4, 100]))
def test_a_damaged_payload_never_gives_a_wrong_tensor(place, bit, every):
    old = noise((3000,), torch.bfloat16, 3)
    new = old.clone()
    new.view(torch.int16)[::every] ^= 1
    delta = encode_delta(old, new)
    payload = bytearray(delta.payload)
    payload[place % len(payload)] ^= 1 << bit
    try:  # a bit of the frame's header may say nothing
        got = apply_delta(old, Delta.read(delta.header(), bytes(payload)))
    except SyncError:
        return
    assert torch.equal(bits(got), bits(new))


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": "index3"},
        {"encoding": "index1"},
        {"encoding": "dense"},
        {"num_changed": -1},
        {"num_changed": 5},
        {"num_changed": 4000},
        {"encoding": "nonsense"},
        {"encoding": ["index1"]},
        {"encoding": "bitmap", "num_changed": 0},
        {"encoding": "index1", "num_changed": 0},
        {"encoding": "dense", "num_changed": 0},
        {"num_changed": True},
        {"num_changed": "5"},
    ],
)
def test_a_damaged_header_is_refused(change):
    old = noise((3000,), torch.bfloat16, 3)
    new = old.clone()
    new.view(torch.int16)[::4] ^= 1
    delta = encode_delta(old, new)
    with pytest.raises(SyncError):
        apply_delta(old, Delta.read(delta.header() | change, delta.payload))


@pytest.mark.parametrize(
    "gaps", [[3, 2**40, 2**64 - 2**40], [3, 0, 5], [2999, 1, 1], [3000, 1, 1], [2**63, 2**63, 1]]
)
def test_gaps_that_cannot_be_are_refused(gaps):
    old = torch.zeros(3000, dtype=torch.bfloat16)
    new = old.clone()
    new[[3, 7, 900]] = 1
    delta = encode_delta(old, new)
    payload = compress(np.array(gaps, dtype=np.uint64).tobytes() + bytes(6), 3)
    with pytest.raises(SyncError, match="the delta is damaged: "):
        apply_delta(old, Delta.read(delta.header() | {"encoding": "index8"}, payload))


def test_a_report_counts_elements_and_bytes():
    old = {"a": torch.zeros(1000, dtype=torch.bfloat16), "b": torch.zeros(10)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["a"][:10] = 1
    report = measure_delta(old, new.items())
    assert (report.num_elements, report.num_changed, report.full_bytes) == (1010, 10, 2040)
    assert report.changed_share == 10 / 1010
    assert report.ratio == 2040 / report.delta_bytes > 20
    assert DeltaReport.of([]).ratio == 0 and DeltaReport.of([]).changed_share == 0
    with pytest.raises(SyncError, match="c is not among the old"):
        measure_delta(old, [("c", torch.zeros(1))])


def test_without_zstandard_the_error_says_what_to_install(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name in ("zstandard", "compression.zstd"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'miles\[delta\]'"):
        encode_delta(torch.zeros(1), torch.ones(1))
    assert encode_delta(torch.zeros(1), torch.zeros(1)).encoding == "same"
