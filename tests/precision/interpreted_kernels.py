"""Checks of kernels for the fixture `interpreted`, in a process of their own.

Triton's interpreter is chosen at import.
"""

import contextlib
import itertools
import json
import sys
import traceback
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from miles.precision import (
    PROFILES,
    BlockFP8,
    Int4,
    _fp8,
    _fp8_triton,
    _gemm,
    _gemm_grouped,
    _gemm_triton,
    _int4,
    _int4_triton,
    backends,
)
from miles.precision._gemm import Operand
from miles.precision.linears import grouped_linear, linear
from tests.precision.data import KINDS, broken, same_bits, tensor

FLOATS = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def convert(array, source, target, _rounding):
    """The interpreter's own rounds to float8 without the carry and cuts to bfloat16."""
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    values = torch.from_numpy(np.ascontiguousarray(array)).view(FLOATS[source])
    rounded = values.to(FLOATS[target]).view(getattr(torch, f"uint{target.primitive_bitwidth}"))
    return rounded.numpy().astype(bits[target.primitive_bitwidth // 8], copy=False)


def cases():
    """Tensors on which a kernel could go wrong, and recipes for each."""
    scales = ["fp32", "ue8m0"]
    found = [*itertools.product(KINDS, DTYPES[:1], scales, [(3, 130)])]
    found += itertools.product(["heavy", "maxima", "subnormal"], DTYPES[1:], ["fp32"], [(3, 130)])
    found += itertools.product(["heavy"], DTYPES[:1], scales, [(130, 192), (2, 40, 136)])
    for kind, dtype, scale, shape in [*found, ("normal", torch.bfloat16, "fp32", (1, 1))]:
        x = tensor(kind, shape, dtype)
        for role, profile in [("weight", "te"), *(("activation", p) for p in PROFILES)]:
            yield x, BlockFP8(scale=scale, profile=profile), role, (kind, dtype, scale, shape)


def check_fp8() -> None:
    for x, recipe, role, what in cases():
        expected = _fp8.encode(x, recipe, role)
        assert same_bits(_fp8_triton.encode(x, recipe, role), expected), (what, role, recipe)


def check_pairs() -> None:
    for x, recipe, role, what in cases():
        # The one that divides, and the one that all but activations have.
        if recipe.profile not in ("te", "vllm") or (x.ndim > 2 and role != "weight"):
            continue
        if recipe.scale == "ue8m0" and what[0] not in ("heavy", "ties"):
            continue
        expected = _fp8.encode(x, recipe, role)
        turned = _fp8.encode(x.transpose(-2, -1).contiguous(), recipe, role)
        got = _fp8_triton.encode_pair(x, recipe, role)
        assert same_bits(got[0], expected) and same_bits(got[1], turned), (what, role, recipe)


def check_layouts() -> None:
    x = tensor("normal", (130, 193))
    (codes, scale), (turned, turned_scale) = _fp8_triton.encode_pair(x, BlockFP8(), "gradient")
    assert scale.shape == (130, 2) and scale.stride() == (1, 132)
    assert turned_scale.shape == (193, 2) and turned_scale.stride() == (1, 196)
    assert codes.is_contiguous() and turned.is_contiguous() and turned.shape == (193, 130)
    (_, scale), (_, turned_scale) = _fp8_triton.encode_pair(x, BlockFP8(), "weight")
    assert scale.is_contiguous() and turned_scale.is_contiguous()
    sliced = x.t()[5:, ::2]
    expected = _fp8.encode(sliced, BlockFP8(), "weight")
    assert same_bits(_fp8_triton.encode(sliced, BlockFP8(), "weight"), expected)
    store = BlockFP8(scale="ue8m0", store="float8_e8m0fnu")
    expected = _fp8.encode(x, store, "gradient")
    assert same_bits(_fp8_triton.encode_pair(x, store, "gradient")[0], expected)


def check_int4() -> None:
    groups = [(32, (5, 96)), (64, (3, 2, 64)), (128, (40, 256)), (96, (7, 192)), (8, (3, 24))]
    cases = [*itertools.product(KINDS, DTYPES, ["bfloat16"], groups[:1])]
    cases += itertools.product(["heavy", "wide"], DTYPES, ["float16", "float32"], groups[:1])
    cases += itertools.product(["heavy"], DTYPES, ["bfloat16"], groups[1:])
    for kind, dtype, scale, (size, shape) in cases:
        x = tensor(kind, shape, dtype)
        for divisor, lowest in ((7.0, -7), (7.5, -8)) if scale == "bfloat16" else ((7.0, -7),):
            recipe = Int4(group_size=size, scale_dtype=scale, divisor=divisor, lowest=lowest)
            what = (kind, dtype, scale, size, divisor)
            codes, scales_ = expected = _int4.encode(x, recipe)
            assert same_bits(_int4_triton.encode(x, recipe), expected), what
            packed = (_int4.pack(codes), scales_)
            assert same_bits(_int4_triton.encode_packed(x, recipe), packed), what
            fake = (_int4.decode(*expected, recipe, dtype), scales_)
            assert same_bits(_int4_triton.fake_quantize(x, recipe), fake), what
    turned = tensor("normal", (64, 48)).t()
    assert same_bits(_int4_triton.encode(turned, Int4()), _int4.encode(turned, Int4()))


def check_broken() -> None:
    """NaN and infinity make all of their block NaN, and nothing else."""
    for value, scale in itertools.product(("nan", "inf", "-inf"), ("fp32", "ue8m0")):
        x = broken((3, 160), torch.bfloat16, value)
        for profile in PROFILES if value == "nan" else ["te"]:
            recipe = BlockFP8(scale=scale, profile=profile)
            (codes, scales), (turned, turned_scales) = _fp8_triton.encode_pair(
                x, recipe, "activation"
            )
            assert scales.isnan().nonzero().tolist() == [[1, 0]], (value, profile)
            assert codes[1, :128].float().isnan().all() and codes.float().isnan().sum() == 128
            assert turned_scales.isnan().nonzero().tolist() == [[5, 0]]
            assert turned[5].float().isnan().all() and turned.float().isnan().sum() == 3
        codes, scales = _fp8_triton.encode(x, BlockFP8(scale=scale), "weight")
        assert scales.isnan().tolist() == [[True, False]]
        assert codes.float().isnan().sum() == 3 * 128
        for scale_dtype in ("bfloat16", "float16", "float32"):
            recipe = Int4(scale_dtype=scale_dtype)
            fake, scales = _int4_triton.fake_quantize(x, recipe)
            assert scales.isfinite().logical_not().nonzero().tolist() == [[1, 0]]
            assert fake[1, :32].isnan().all() and fake.isnan().sum() == 32
            codes, scales = _int4_triton.encode(x, recipe)
            assert not codes[1, :32].any() and scales[1, 0].isnan()


# --- GEMMs

SUMS = 2e-6
"""Relative RMS of two float32 sums of up to 400 products in another order."""
SIZES = st.integers(1, 300)


def sums_agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    got, expected = got.double(), expected.double()
    return bool((got - expected).norm() <= SUMS * expected.norm())


def operands(rows: int, columns: int, depth: int, square: bool) -> tuple[Operand, Operand]:
    """Of scales that differ by far from block to block: one that is read wrong shows."""
    b = tensor("normal", (columns, depth), torch.float32, 1)
    if not square:
        b *= torch.exp2(torch.arange(columns) % 9 - 4.0)[:, None]
    a = tensor("wide", (rows, 1), torch.float32, 2) * tensor("heavy", (rows, depth), torch.float32)
    b *= torch.exp2(torch.arange(depth) // 128 * 3.0)
    return (
        _gemm.encode(a, "fp32", "activation"),
        _gemm.encode(b, "fp32", "weight" if square else "gradient"),
    )


def check_gemm_sizes() -> None:
    """Tails of rows, columns and depth; one of each; decoded in the kernel or not; all tiles."""

    @settings(max_examples=12, deadline=None, database=None, derandomize=True)
    @given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.integers(0, 2))
    @example(1, 1, 1, True, False, 2)
    @example(1, 300, 256, True, True, 0)
    @example(128, 128, 128, True, False, 0)
    @example(130, 129, 272, False, True, 1)
    def check(rows, columns, depth, square, decode, tile):
        a, b = operands(rows, columns, depth, square)
        tiles = _gemm_triton.DECODING_TILES if decode else _gemm_triton.TILES
        with (
            mock.patch.object(_gemm_triton, "_decodes", lambda device: decode),
            mock.patch.object(_gemm_triton, "tile_of", lambda *_: tiles[min(tile, len(tiles) - 1)]),
        ):
            got = _gemm_triton.dense(a, b, torch.float32)
        assert sums_agree(got, _gemm.reference(a, b, torch.float32))

    check()
    a, b = operands(1, 128, 128, True)
    none = a._replace(codes=a.codes[:0], scale=a.scale[:0])
    assert _gemm_triton.dense(none, b, torch.bfloat16).shape == (0, 128)


def check_gemm_layouts() -> None:
    """Scales of any strides, rows of codes with gaps, and results of every dtype."""
    a, b = operands(70, 200, 272, True)
    rows = operands(70, 200, 272, False)[1]
    for right in (b, rows):
        expected = _gemm_triton.dense(a, right, torch.float32)
        for change in (
            lambda scale: scale.t().contiguous().t(),
            _gemm.column_major,
            lambda scale: torch.stack([scale, torch.full_like(scale, torch.nan)], -1)[..., 0],
        ):
            x, y = (one._replace(scale=change(one.scale)) for one in (a, right))
            assert torch.equal(_gemm_triton.dense(x, y, torch.float32), expected)
        for gap in (1, 16):
            x, y = (
                one._replace(
                    codes=torch.nn.functional.pad(
                        one.codes.view(torch.uint8), (0, gap), value=0x7F
                    ).view(torch.float8_e4m3fn)[:, :272]
                )
                for one in (a, right)
            )
            assert torch.equal(_gemm_triton.dense(x, y, torch.float32), expected)
        for dtype in DTYPES[:2]:
            got = _gemm_triton.dense(a, right, dtype)
            assert same_bits([got], [expected.to(dtype)])


def check_gemm_codes() -> None:
    """Every code of E4M3 is multiplied as what it is, and NaN reaches its row or column only."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    one = torch.zeros(256, 256)
    one.fill_diagonal_(1)
    a = Operand(every[:, None].expand(256, 128).contiguous(), torch.ones(256, 1), False, torch.half)
    b = Operand(one[:128, :128].to(torch.float8_e4m3fn), torch.ones(1, 1), True, torch.half)
    for decode in (False, True):
        with mock.patch.object(_gemm_triton, "_decodes", lambda device, decode=decode: decode):
            got = _gemm_triton.dense(a, b, torch.float32)
            assert torch.equal(got.nan_to_num(1e9), a.codes.float().nan_to_num(1e9)), got[
                :, 0
            ].tolist()
            for value in ("nan", "inf"):
                x = broken((70, 160), torch.bfloat16, value)
                left = _gemm.encode(x, "fp32", "activation")
                _, right = operands(1, 90, 160, False)
                got = _gemm_triton.dense(left, right, torch.float32)
                assert got[1].isnan().all() and got.isnan().sum() == 90
                bad = _gemm.encode(x, "fp32", "gradient")
                got = _gemm_triton.dense(operands(66, 1, 160, True)[0], bad, torch.float32)
                assert got[:, 1].isnan().all() and got.isnan().sum() == 66


def check_gemm_experts() -> None:
    """Forward and input gradient of experts are a GEMM each, bit for bit; so are weights'."""

    @settings(max_examples=5, deadline=None, database=None, derandomize=True)
    @given(
        st.lists(st.sampled_from([0, 0, 1, 3, 63, 64, 65, 130]), min_size=1, max_size=5),
        st.sampled_from([1, 72, 130]),
        st.sampled_from([100, 128, 272]),
        st.integers(0, 2),
    )
    @example([3, 0, 140, 1], 136, 256, 0)
    @example([0, 0], 8, 128, 0)
    @example([0, 5, 0], 8, 128, 2)
    def check(counts, columns, depth, tile):
        total, ends = sum(counts), torch.tensor(counts).cumsum(0).int()
        x = tensor("heavy", (max(total, 1), depth), torch.float32)
        weight = tensor("normal", (len(counts), columns, depth), torch.float32, 1)
        a, b = _gemm.encode(x, "fp32", "activation"), _gemm.encode(weight, "fp32", "weight")
        a = a._replace(codes=a.codes[:total], scale=a.scale[:total])
        with mock.patch.object(_gemm_triton, "tile_of", lambda *_: _gemm_triton.TILES[tile]):
            got = _gemm_grouped.grouped("triton", a, b, ends, torch.float32)
            dense = [
                _gemm_triton.dense(
                    a._replace(codes=a.codes[start:end], scale=a.scale[start:end]),
                    b._replace(codes=b.codes[expert], scale=b.scale[expert]),
                    torch.float32,
                )
                for expert, (start, end) in enumerate(_gemm_grouped.spans(ends))
            ]
            assert torch.equal(got, torch.cat(dense))
            if not total:
                return
            dy = tensor("normal", (total, columns), torch.float32, 3) * 1e-5
            arguments = (dy, x, ends, "fp32", "sglang", torch.float32)
            got = _gemm_grouped.grouped_weight("triton", *arguments)
        assert sums_agree(got, _gemm_grouped.grouped_weight("reference", *arguments))
        empty = [i for i, count in enumerate(counts) if not count]
        assert not got[empty].any()

    check()


def check_gemm_linear() -> None:
    """Whole layers: all three GEMMs, dense and of experts."""
    recipe = BlockFP8(wgrad="fp8")
    x = tensor("heavy", (70, 200)).requires_grad_()
    dy = tensor("normal", (70, 72), seed=1) * 1e-5
    ends = torch.tensor([3, 3, 70])
    with mock.patch.object(backends, "_unavailable", lambda name, device: None):
        for lead, call in (((), linear), ((3,), grouped_linear)):
            weight = tensor("normal", (*lead, 72, 200), seed=2).requires_grad_()
            between = (ends,) if lead else ()
            results = []
            for backend in ("triton", "reference"):
                y = call(x, weight, *between, recipe, backend=backend)
                results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
            for got, expected in zip(*results, strict=True):
                # Sums in another order are rounded to another bf16 here and there.
                assert (got - expected).norm() <= 1e-3 * expected.norm()


PARTS = {
    "fp8": check_fp8,
    "pairs": check_pairs,
    "layouts": check_layouts,
    "int4": check_int4,
    "broken": check_broken,
    "gemm_sizes": check_gemm_sizes,
    "gemm_layouts": check_gemm_layouts,
    "gemm_codes": check_gemm_codes,
    "gemm_experts": check_gemm_experts,
    "gemm_linear": check_gemm_linear,
}


def main() -> None:
    """A line of JSON for each part that is asked for: what went wrong, or nothing."""
    assert callable(interpreter._convert_float)
    interpreter._convert_float = convert
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    np.seterr(all="ignore")
    for line in sys.stdin:
        error = ""
        with contextlib.redirect_stdout(sys.stderr):
            try:
                PARTS[line.strip()]()
            except Exception:  # whatever it is, the test shows its text
                error = traceback.format_exc()
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
