"""Run by `test_triton.py` in a process of its own: Triton's interpreter is chosen at import."""

import itertools
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from miles.precision import PROFILES, BlockFP8, Int4, _fp8, _fp8_triton, _int4, _int4_triton
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


def main(part: str) -> None:
    assert callable(interpreter._convert_float)
    interpreter._convert_float = convert
    np.seterr(all="ignore")
    {
        "fp8": check_fp8,
        "pairs": check_pairs,
        "layouts": check_layouts,
        "int4": check_int4,
        "broken": check_broken,
    }[part]()


if __name__ == "__main__":
    main(*sys.argv[1:])
