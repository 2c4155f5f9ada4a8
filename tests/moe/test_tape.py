import base64
import contextlib
import json
import resource
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miles.errors import EmptyBatchError, MilesError, RoutingError
from miles.moe import RoutingTape
from miles.moe._formats import FORMAT
from miles.moe.tape import RoutingSpan
from tests.steps import quick

IDS = torch.tensor([[[0, 1], [2, 3]], [[-1, -1], [-1, -1]], [[3, 0], [1, 2]]])


def random_tape(seed: int = 0, rows: int = 6, num_experts: int = 300, holes: bool = True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, 3, num_experts, generator=generator).argsort(-1)[..., :4]
    if holes:
        ids[torch.rand(rows, generator=generator) < 0.3] = -1
    return RoutingTape(ids, num_experts=num_experts)


def tagged_tape(seed: int = 0, rows: int = 6, num_experts: int = 300, holes: bool = True):
    """`random_tape` with up to three spans, gaps between some of them."""
    cuts = torch.randint(0, rows + 1, (6,), generator=torch.Generator().manual_seed(seed))
    pairs = cuts.sort().values.view(3, 2).tolist()
    spans = [(a, b, version // 2) for version, (a, b) in enumerate(pairs) if a < b]
    return random_tape(seed, rows, num_experts, holes).with_spans(spans)


def versions(tape):
    """The weight version of each row, None where it is not known."""
    out = [None] * len(tape)
    for start, end, version in tape.spans:
        out[start:end] = [version] * (end - start)
    return out


def sglang(ids):
    """`meta_info["routed_experts"]` for ids `[rows, layers, topk]`."""
    return base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode()


def test_one_byte_an_index_up_to_256_experts_and_two_above():
    ids = torch.zeros(5, 2, 3, dtype=torch.int64)
    assert RoutingTape(ids, num_experts=256).nbytes == 5 * 2 * 3
    assert RoutingTape(ids, num_experts=257).nbytes == 2 * 5 * 2 * 3


def test_holes_cost_one_byte_a_row_and_only_where_there_are_some():
    tape = RoutingTape(IDS, num_experts=4)
    assert tape.nbytes == 3 * 2 * 2 + 3
    assert RoutingTape(IDS[::2], num_experts=4).nbytes == 2 * 2 * 2


@pytest.mark.parametrize(("largest", "num_experts"), [(255, 256), (300, 301), (32767, 32768)])
def test_the_largest_id_survives(largest, num_experts):
    tape = RoutingTape(torch.tensor([[[largest, 0]], [[-1, -1]]]), num_experts=num_experts)
    assert tape.expert_ids.tolist() == [[[largest, 0]], [[-1, -1]]]
    assert tape.expert_ids.dtype == torch.int16


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_gives_the_same_tape(dtype):
    whole = IDS[::2]
    assert RoutingTape(whole.to(dtype), num_experts=4) == RoutingTape(whole, num_experts=4)


def test_a_tape_keeps_its_ids_when_the_tensor_it_came_from_changes():
    ids = torch.zeros(2, 1, 1, dtype=torch.uint8)
    tape = RoutingTape(ids, num_experts=4)
    ids.fill_(3)
    assert tape.expert_ids.tolist() == [[[0]], [[0]]]


@pytest.mark.parametrize("num_experts", [4, 300])
def test_a_tape_keeps_its_ids_when_those_it_showed_change(num_experts):
    tape = RoutingTape(IDS, num_experts=num_experts)
    tape[::2].expert_ids.fill_(3)
    tape.expert_ids.fill_(3)
    tape[:1].expert_ids.fill_(3)
    assert torch.equal(tape.expert_ids, IDS.to(torch.int16))


def test_holes_are_told_apart_from_expert_zero():
    tape = RoutingTape(IDS, num_experts=4)
    assert tape.recorded_N.tolist() == [True, False, True]
    assert torch.equal(tape.expert_ids, IDS.to(torch.int16))
    assert tape != RoutingTape(IDS.clamp(min=0), num_experts=4)


def test_slices_keep_ids_and_holes():
    tape = RoutingTape(IDS, num_experts=4)
    assert torch.equal(tape[1:].expert_ids, IDS[1:].to(torch.int16))
    assert tape[1:].recorded_N.tolist() == [False, True]
    assert tape[:1].recorded_N.tolist() == [True]
    assert len(tape[5:]) == 0
    assert (tape[1:].num_layers, tape[1:].topk, tape[1:].num_experts) == (2, 2, 4)


def test_rows_picks_tokens_in_any_order():
    picked = RoutingTape(IDS, num_experts=4).rows(torch.tensor([2, 1, 2]))
    assert torch.equal(picked.expert_ids, IDS[[2, 1, 2]].to(torch.int16))
    assert picked.recorded_N.tolist() == [True, False, True]


def test_unrecorded_is_all_holes():
    tape = RoutingTape.unrecorded(2, num_layers=3, topk=1, num_experts=8)
    assert tape.expert_ids.tolist() == [[[-1]] * 3] * 2
    assert not tape.recorded_N.any()
    assert len(RoutingTape.unrecorded(0, num_layers=3, topk=1, num_experts=8)) == 0


@quick
@given(st.integers(0, 10_000), st.lists(st.integers(0, 6), max_size=3))
def test_cat_of_slices_is_the_whole(seed, cuts):
    tape = tagged_tape(seed)
    bounds = [0, *sorted(cuts), len(tape)]
    parts = [tape[low:high] for low, high in pairwise(bounds)]
    assert RoutingTape.cat(parts) == tape


@quick
@given(st.integers(0, 10_000), st.integers(0, 6), st.integers(0, 6))
def test_slices_of_a_cat_are_the_parts_in_order(seed, rows, other_rows):
    a, b = tagged_tape(seed, rows), tagged_tape(seed + 1, other_rows)
    both = RoutingTape.cat([a, b])
    assert both[: len(a)] == a and both[len(a) :] == b
    assert versions(both) == versions(a) + versions(b)


@quick
@given(st.integers(0, 10_000), st.slices(6).filter(lambda cut: (cut.step or 1) > 0))
def test_a_slice_of_a_tape_is_the_tape_of_the_slice(seed, cut):
    tape = tagged_tape(seed)
    assert torch.equal(tape[cut].expert_ids, tape.expert_ids[cut])
    assert versions(tape[cut]) == versions(tape)[cut]


@quick
@given(st.integers(0, 10_000), st.lists(st.integers(-6, 5), max_size=9))
def test_rows_take_their_versions_along(seed, index):
    tape = tagged_tape(seed)
    picked = tape.rows(torch.tensor(index, dtype=torch.int64))
    assert torch.equal(picked.expert_ids, tape.expert_ids[index])
    assert versions(picked) == [versions(tape)[row] for row in index]


@quick
@given(st.integers(0, 10_000), st.integers(0, 6), st.integers(0, 6))
def test_pad_lays_tapes_and_their_spans_at_multiples_of_the_width(seed, rows, other_rows):
    a, b = tagged_tape(seed, rows), tagged_tape(seed + 1, other_rows)
    padded = RoutingTape.pad([a, b], 7)
    assert padded[:rows] == a and padded[7 : 7 + other_rows] == b
    assert not padded[rows:7].recorded_N.any() and padded[rows:7].spans == ()


def test_slices_and_a_cat_of_one_share_memory_and_nbytes_counts_what_is_seen():
    tape = random_tape(rows=10, num_experts=8, holes=False)
    view = RoutingTape.cat([tape[2:5]])
    assert view._ids.untyped_storage().data_ptr() == tape._ids.untyped_storage().data_ptr()
    assert view.nbytes == 3 * 3 * 4


def test_touching_spans_of_one_version_are_one():
    tape = RoutingTape(IDS, num_experts=4, spans=[(0, 1, 7), (1, 2, 7), (2, 3, 8)])
    assert tape.spans == (RoutingSpan(0, 2, 7), RoutingSpan(2, 3, 8))
    assert tape != RoutingTape(IDS, num_experts=4)
    assert tape == RoutingTape(IDS, num_experts=4).with_spans(tape.spans)


@quick
@given(st.integers(0, 10_000), st.sampled_from([8, 256, 257, 1000]), st.integers(0, 6))
def test_bytes_round_trip(seed, num_experts, rows):
    tape = tagged_tape(seed, rows, num_experts)
    again = RoutingTape.from_bytes(
        tape.to_bytes(), num_layers=3, topk=4, num_experts=num_experts, spans=tape.spans
    )
    assert again == tape


@quick
@given(
    st.integers(0, 10_000),
    st.sampled_from([8, 256, 257, 1000]),
    st.integers(0, 6),
    st.lists(st.sampled_from([0, 2, 3]), min_size=3, max_size=3, unique=True),
)
def test_sglang_round_trip_drops_dense_layers(seed, num_experts, rows, moe_layers):
    tape = random_tape(seed, rows, num_experts)
    whole = torch.zeros(rows, 5, 4, dtype=torch.int32)
    whole[:, moe_layers] = tape.expert_ids.int()
    sizes = {"num_layers": 5, "topk": 4, "moe_layers": moe_layers, "num_tokens": rows + 1}
    assert RoutingTape.from_sglang(sglang(whole), **sizes, num_experts=num_experts) == tape
    inferred = RoutingTape.from_sglang(sglang(whole).encode(), **sizes)
    assert torch.equal(inferred.expert_ids, tape.expert_ids)
    assert inferred.num_experts_inferred and inferred.num_experts in (256, 32768)
    assert inferred.with_num_experts(num_experts) == tape


def test_sglang_literal():
    # Two rows, one layer, two experts: int32 little endian 3, 1, 0, 2.
    data = "AwAAAAEAAAAAAAAAAgAAAA=="
    tape = RoutingTape.from_sglang(data, num_layers=1, topk=2)
    assert tape.expert_ids.tolist() == [[[3, 1]], [[0, 2]]]
    assert tape.nbytes == 4
    assert "num_experts<=256" in repr(tape)
    unknown = RoutingTape.from_sglang(sglang([[[3, 1]], [[-1, -1]]]), num_layers=1, topk=2)
    assert unknown.recorded_N.tolist() == [True, False] and unknown.num_experts == 256


def test_the_row_that_a_stop_token_leaves_is_dropped_when_the_length_is_told():
    data = sglang([[[3, 1]], [[0, 2]], [[1, 2]]])
    for num_tokens in (3, 4):
        tape = RoutingTape.from_sglang(data, num_layers=1, topk=2, num_tokens=num_tokens)
        assert len(tape) == num_tokens - 1
        tape.validate(num_tokens=num_tokens)
    assert len(RoutingTape.from_sglang(data, num_layers=1, topk=2)) == 3


def test_a_payload_that_was_cut_anywhere_is_refused():
    ids = torch.arange(18).view(3, 3, 2)  # a row is 24 bytes, so every 32 characters end one
    data, sizes = sglang(ids), {"num_layers": 3, "topk": 2, "num_tokens": 4, "num_experts": 18}
    assert torch.equal(RoutingTape.from_sglang(data, **sizes).expert_ids, ids.to(torch.int16))
    for length in range(len(data)):
        with pytest.raises(RoutingError, match=r"truncated|0 rows|1 rows|2 rows"):
            tape = RoutingTape.from_sglang(data[:length], **sizes)
            raise AssertionError(f"{length} characters gave {tape}")


def test_an_inferred_number_of_experts_gives_way_to_a_told_one_and_to_a_larger_bound():
    small = RoutingTape.from_sglang(sglang([[[3, 1]]]), num_layers=1, topk=2)
    large = RoutingTape.from_sglang(sglang([[[300, 1]]]), num_layers=1, topk=2)
    assert (small.num_experts, large.num_experts) == (256, 32768)
    both = RoutingTape.cat([small, large])
    assert both.expert_ids.tolist() == [[[3, 1]], [[300, 1]]]
    assert both.num_experts == 32768 and both.num_experts_inferred
    told = RoutingTape(torch.tensor([[[5, 4]]]), num_experts=8)
    for mixed in (RoutingTape.cat([small, told]), RoutingTape.pad([small, told], 1)):
        assert mixed.num_experts == 8 and not mixed.num_experts_inferred
    with pytest.raises(RoutingError, match="expert id 300"):
        RoutingTape.cat([large, told])


@quick
@given(st.integers(0, 10_000), st.sampled_from([8, 256, 257]), st.integers(0, 6), st.booleans())
def test_save_and_load_round_trip(tmp_path_factory, seed, num_experts, rows, holes):
    path = tmp_path_factory.mktemp("tape") / "tape.safetensors"
    tape = tagged_tape(seed, rows, num_experts, holes)
    tape.save(path)
    assert RoutingTape.load(path) == tape
    tape[1::2].save(str(path))
    assert RoutingTape.load(str(path)) == tape[1::2]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_came_from_bytes_or_is_inferred_can_be_saved(tmp_path):
    tape = RoutingTape(IDS, num_experts=4)
    RoutingTape.from_bytes(tape.to_bytes(), num_layers=2, topk=2, num_experts=4).save(
        tmp_path / "a"
    )
    assert RoutingTape.load(tmp_path / "a") == tape
    RoutingTape.from_sglang(sglang([[[3]]]), num_layers=1, topk=1).save(tmp_path / "b")
    assert RoutingTape.load(tmp_path / "b").num_experts_inferred


def test_a_loaded_tape_lies_in_its_file_and_survives_its_replacement(tmp_path):
    path = tmp_path / "tape.safetensors"
    tape = random_tape(rows=50, holes=False)
    tape.save(path)
    loaded = RoutingTape.load(path)
    if (maps := Path("/proc/self/maps")).exists():
        assert str(path) in maps.read_text()
    random_tape(seed=1, rows=7).save(path)
    assert loaded == tape and len(RoutingTape.load(path)) == 7


@contextlib.contextmanager
def largest_file(num_bytes):
    """What a full disk does: writes beyond this fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "tape.safetensors"
    old = random_tape(rows=3)
    old.save(path)
    with largest_file(10_000), pytest.raises(OSError):
        random_tape(rows=9000).save(path)
    assert RoutingTape.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_that_are_no_tape_say_so(tmp_path):
    path = tmp_path / "tape.safetensors"
    with pytest.raises(FileNotFoundError):
        RoutingTape.load(path)
    random_tape().save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:-1], whole[: len(whole) // 2], bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(RoutingError, match=r"not a whole RoutingTape file.*save the tape"):
            RoutingTape.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(RoutingError, match="safetensors file of format None"):
        RoutingTape.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "why"),
    [
        ({"expert_ids": torch.zeros(2, 3, 4)}, {}, "float32"),
        ({"expert_ids": torch.zeros(2, 3, dtype=torch.uint8)}, {}, "shape"),
        ({"expert_ids": torch.full((2, 3, 4), 8, dtype=torch.uint8)}, {}, "outside 0..7"),
        ({"missing": torch.zeros(3, dtype=torch.bool)}, {}, "mask"),
        ({}, {"num_experts": "0"}, "num_experts is 0"),
        ({}, {"num_experts": "{"}, "not a whole"),
        ({}, {"spans": "[[0, 9, 1]]"}, "does not fit 2 rows"),
        ({}, {"spans": None}, "spans"),
    ],
)
def test_files_whose_content_does_not_fit_say_why(tmp_path, tensors, metadata, why):
    path = tmp_path / "tape.safetensors"
    random_tape(rows=2, num_experts=8, holes=False).save(path)
    fields = {"num_experts": "8", "num_experts_inferred": "false", "spans": json.dumps([])}
    fields = {k: v for k, v in (fields | metadata).items() if v is not None}
    save_file(load_file(path) | tensors, path, fields | {"format": FORMAT})
    with pytest.raises(RoutingError, match="not a whole RoutingTape file") as caught:
        RoutingTape.load(path)
    assert why in str(caught.value)


@quick
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_what_routers_choose_is_valid(seed, rows):
    tape = random_tape(seed, rows, num_experts=6, holes=False)
    tape.validate()
    tape.validate(num_tokens=rows)
    tape.validate(num_tokens=rows + 1, request_id="r")


def test_the_last_token_may_lack_its_row_and_no_other():
    ids = torch.tensor([[[0, 1]], [[-1, -1]]])
    RoutingTape(ids, num_experts=4).validate(num_tokens=2)
    with pytest.raises(RoutingError, match="1 of 2 rows are missing, the first at token 1"):
        RoutingTape(ids, num_experts=4).validate()
    RoutingTape.unrecorded(0, num_layers=1, topk=2, num_experts=4).validate(num_tokens=1)


def test_zeros_are_choices_only_where_they_can_be():
    def zeros(rows, layers, topk, num_experts=4):
        return RoutingTape(
            torch.zeros(rows, layers, topk, dtype=torch.int64), num_experts=num_experts
        )

    for tape in (zeros(1, 1, 2), zeros(8, 4, 1), zeros(40, 1, 2, 1)):
        with pytest.raises(RoutingError, match="request 'r': the routing is all zero"):
            tape.validate(request_id="r")
    zeros(3, 4, 1).validate()
    zeros(40, 1, 1, 1).validate()
    ids = torch.tensor([[[0, 0], [0, 1]], [[0, 0], [2, 0]]])
    with pytest.raises(RoutingError, match=r"layers \[0\] is all zero.*moe_layers"):
        RoutingTape(ids, num_experts=4).validate()
    RoutingTape(ids[:, 1:], num_experts=4).validate()
    ids[1, 0, 1] = 1
    with pytest.raises(RoutingError, match=r"token 0, layer 0 has expert ids \[0, 0\]"):
        RoutingTape(ids, num_experts=4).validate()


def test_an_expert_named_twice_is_found_at_any_distance():
    good = torch.arange(5).expand(3, 2, 5).clone()
    good[0] = -1
    for a in range(5):
        for b in range(a):
            ids = good.clone()
            ids[2, 1, a] = ids[2, 1, b]
            tape = RoutingTape(ids, num_experts=5)
            with pytest.raises(RoutingError, match="token 1, layer 1"):
                tape[1:].validate()
            with pytest.raises(RoutingError, match="1 of 3 rows are missing"):
                tape.validate()


def test_equality_looks_at_ids_order_and_number_of_experts():
    tape = RoutingTape(IDS, num_experts=4)
    assert tape == RoutingTape(IDS.clone(), num_experts=4)
    assert tape != RoutingTape(IDS.flip(-1), num_experts=4)
    assert tape != RoutingTape(IDS, num_experts=5)
    assert tape != tape[1:]
    assert tape != "tape"


def test_repr_says_the_sizes():
    assert repr(RoutingTape(IDS, num_experts=4)) == (
        "RoutingTape(tokens=3, layers=2, topk=2, num_experts=4, not_recorded=1)"
    )


def bad_inputs():
    def tape(ids, num_experts=4):
        return RoutingTape(torch.tensor(ids), num_experts=num_experts)

    good = tape([[[0, 1]]])
    yield RoutingError, "(2,)", "[num_tokens, num_moe_layers, topk]", lambda: tape([0, 1])
    yield RoutingError, "float32", "integers", lambda: tape([[[0.0]]])
    yield RoutingError, "bool", "integers", lambda: tape([[[True]]])
    yield RoutingError, "num_experts is 0", "1 to 32768", lambda: tape([[[0]]], 0)
    yield RoutingError, "num_experts is 40000", "1 to 32768", lambda: tape([[[0]]], 40000)
    yield RoutingError, "token 1, layer 0: expert ids [4]", "0..3", lambda: tape([[[0]], [[4]]])
    yield RoutingError, "[-2]", "0..3", lambda: tape([[[-2]]])
    yield RoutingError, "token 0, layer 1", "whole row", lambda: tape([[[0, 1], [-1, -1]]])
    yield RoutingError, "[1, -1]", "whole row", lambda: tape([[[1, -1]]])
    yield EmptyBatchError, "no tape", "at least one", lambda: RoutingTape.cat([])
    for other in (tape([[[0]]]), tape([[[0, 1], [0, 1]]]), tape([[[0, 1]]], 5)):
        pair = [good, other]
        yield RoutingError, "tape 1", "(1, 2, 4)", lambda pair=pair: RoutingTape.cat(pair)
    for number in (0, 40000):
        resize = partial(good.with_num_experts, number)
        yield RoutingError, f"num_experts is {number}", "1 to 32768", resize
    yield RoutingError, "expert id 1", "0..0", lambda: good.with_num_experts(1)
    yield RoutingError, "slice(None, None, -1)", "forward", lambda: good[::-1]
    for spans in ([(0, 2, 1)], [(0, 1, 1), (0, 1, 2)], [(1, 1, 1)], [(-1, 1, 1)]):
        yield RoutingError, "1 rows", "in order", lambda spans=spans: good.with_spans(spans)
    yield RoutingError, "(0, 1)", "weight_version", lambda: good.with_spans([(0, 1)])

    def decode(data, num_layers=1, topk=2, **settings):
        return RoutingTape.from_sglang(data, num_layers=num_layers, topk=topk, **settings)

    data = sglang([[[0, 1]], [[2, 3]]])
    yield RoutingError, "None", "--enable-return-routed-experts", lambda: decode(None)
    yield RoutingError, "23 characters", "truncated", lambda: decode(data[:23])
    yield RoutingError, "24 characters", "truncated", lambda: decode("*" + data[1:])
    yield RoutingError, "15 bytes", "multiple of 8", lambda: decode(data[:20])
    yield RoutingError, "16 bytes", "multiple of 24", lambda: decode(data, num_layers=3)
    yield RoutingError, "num_layers is 0", "1 or more", lambda: decode(data, num_layers=0)
    yield RoutingError, "topk 0", "1 or more", lambda: decode(data, topk=0)
    for tokens in (1, 4):
        short = partial(decode, data, num_tokens=tokens)
        yield RoutingError, f"2 rows for {tokens} tokens", f"expected {tokens - 1}", short
    yield RoutingError, "num_tokens is 0", "1 or more", lambda: decode("", num_tokens=0)
    for layers in ([], [1], [-1], [0, 0]):
        pick = partial(decode, data, moe_layers=layers)
        yield RoutingError, f"moe_layers is {layers}", "distinct layers in 0..0", pick
    yield RoutingError, "token 1, layer 0", "0..2", lambda: decode(data, num_experts=3)
    far = sglang([[[0, 32768]]])
    yield RoutingError, "32768]", "0..32767", lambda: decode(far)

    def unpack(data, **changes):
        sizes = {"num_layers": 1, "topk": 2, "num_experts": 4} | changes
        return RoutingTape.from_bytes(data, **sizes)

    stored = good.to_bytes()
    yield RoutingError, "2 bytes", "multiple of 3", lambda: unpack(stored[:-1])
    yield RoutingError, "3 bytes", "multiple of 5", lambda: unpack(stored, num_experts=300)
    yield RoutingError, "up to 1", "0..0", lambda: unpack(stored, num_experts=1)
    yield RoutingError, "1 rows", "in order", lambda: unpack(stored, spans=[(0, 2, 1)])
    yield RoutingError, "1 rows", "width=0", lambda: RoutingTape.pad([good], 0)
    yield EmptyBatchError, "no tape", "at least one", lambda: RoutingTape.pad([], 3)

    holes = RoutingTape.unrecorded(2, num_layers=1, topk=2, num_experts=4)
    two = decode(data, num_experts=4)
    yield (
        RoutingError,
        "'r': the routing is missing",
        "2 rows",
        lambda: holes.validate(num_tokens=3, request_id="r"),
    )
    for tokens in (1, 4):
        yield (
            RoutingError,
            f"'r': the routing has 2 rows for {tokens} tokens",
            f"expected {tokens - 1}",
            lambda tokens=tokens: two.validate(num_tokens=tokens, request_id="r"),
        )


@pytest.mark.parametrize(("error", "got", "expected", "call"), list(bad_inputs()))
def test_bad_input_says_what_came_and_what_is_wanted(error, got, expected, call):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, MilesError)
    assert got in str(caught.value) and expected in str(caught.value)
