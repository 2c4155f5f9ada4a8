"""Quantise kernels against the plain reference, bit for bit."""

import contextlib
import itertools

import pytest
import torch

from miles.errors import NonFiniteError
from miles.precision import MXFP8, NVFP4, PROFILES, BlockFP8, Int4, fake_quantize, quantize
from miles.precision._int4 import pack
from miles.precision.quantize import _encode, _encode_pair, _fake, quantize_pair
from tests.precision.data import KINDS, broken, same_bits, tensor

SHAPES = [(1, 1), (3, 130), (257, 1000), (128, 128), (2, 5, 384), (3, 130, 192)]
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
every_kind = pytest.mark.parametrize("kind", KINDS)


def same(got, expected) -> bool:
    """Whether two `QTensor`s hold the same, on whatever device."""
    return same_bits((got.codes.cpu(), got.scale.cpu()), (expected.codes, expected.scale))


@contextlib.contextmanager
def no_wait():
    """Waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_dtype
@every_kind
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_triton_has_the_bits_of_the_reference_on_the_cpu(dtype, kind, scale):
    for shape in SHAPES:
        x = tensor(kind, shape, dtype)
        cases = [(role, "te") for role in ("weight", "gradient")]
        cases += [("activation", profile) for profile in PROFILES]
        for role, profile in cases:
            recipe = BlockFP8(scale=scale, profile=profile)
            expected = quantize(x, recipe, role=role)
            got = quantize(x.cuda(), recipe, role=role, backend="triton")
            assert same(got, expected), (shape, role, profile)
            if len(shape) > 2 and role != "weight":
                continue
            pair = quantize_pair(x.cuda(), recipe, role=role, backend="triton")
            turned = quantize(x.transpose(-2, -1).contiguous(), recipe, role=role)
            assert same(pair[0], expected), (shape, role, profile)
            assert same(pair[1], turned), (shape, role, profile)
            assert pair[1].codes.is_contiguous()
            if role == "weight":
                assert same(got.t(), turned)


@every_dtype
@every_kind
def test_int4_by_triton_has_the_bits_of_the_reference_on_the_cpu(dtype, kind):
    from miles.precision import _int4_triton

    shapes = {32: (5, 96), 64: (3, 200, 64), 128: (300, 1024), 96: (7, 192), 8: (3, 24)}
    for size, scale in itertools.product(shapes, ("bfloat16", "float16", "float32")):
        x = tensor(kind, shapes[size], dtype)
        for rules in ({}, {"divisor": 7.5, "lowest": -8}):
            recipe = Int4(group_size=size, scale_dtype=scale, **rules)
            where = (size, scale, rules)
            expected = _encode(x, recipe, "weight")
            assert same(_encode(x.cuda(), recipe, "weight", "triton"), expected), where
            packed = [t.cpu() for t in _int4_triton.encode_packed(x.cuda(), recipe)]
            assert same_bits(packed, (pack(expected.codes), expected.scale)), where
            fake = fake_quantize(x.cuda(), recipe).cpu()
            assert same_bits((fake,), (expected.dequantize(dtype),)), where


@every_kind
def test_the_reference_has_the_same_bits_on_both_devices(kind):
    x = tensor(kind, (130, 192), torch.bfloat16)
    recipes = [
        (BlockFP8(), "weight"),
        (BlockFP8(scale="ue8m0"), "activation"),
        (Int4(), "weight"),
        (Int4.compressed_tensors(), "weight"),
        (MXFP8(), "weight"),
        (NVFP4(), "weight"),
    ]
    for recipe, role in recipes:
        on_cpu = quantize(x, recipe, role=role)
        on_gpu = quantize(x.cuda(), recipe, role=role, backend="reference")
        assert same(on_gpu, on_cpu), recipe
        fake = fake_quantize(x.cuda(), recipe, role=role).cpu()
        assert torch.equal(fake, on_cpu.dequantize(x.dtype)), recipe


def test_scales_of_rows_lie_as_the_gemms_read_them():
    x = torch.randn(130, 512, device="cuda")
    q = quantize(x, BlockFP8(), role="activation")
    assert q.scale.shape == (130, 4) and q.scale.stride() == (1, 132)
    q, turned = quantize_pair(x[:, :510].contiguous(), BlockFP8(), role="activation")
    assert q.scale.shape == (130, 4) and q.scale.stride() == (1, 132)
    assert turned.scale.shape == (510, 2) and turned.scale.stride() == (1, 512)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@every_dtype
def test_a_block_with_nan_or_infinity_is_nan_and_nothing_waits(value, dtype):
    x = broken((3, 160), dtype, value).cuda()
    cases = [
        (BlockFP8(scale=s), role) for s in ("fp32", "ue8m0") for role in ("weight", "gradient")
    ]
    cases += [
        (BlockFP8(profile=p, scale=s), "activation") for p in PROFILES for s in ("fp32", "ue8m0")
    ]
    cases += [(Int4(), "weight"), (Int4(scale_dtype="float32"), "weight")]
    for recipe, role in cases:
        _fake(x, recipe, role), _encode(x, recipe, role)  # compile, outside the watch
        if isinstance(recipe, BlockFP8):
            _encode_pair(x, recipe, role)
        with no_wait():
            outs = [_encode(x, recipe, role).dequantize(dtype), fake_quantize(x, recipe, role=role)]
            if isinstance(recipe, BlockFP8):
                q, turned = _encode_pair(x, recipe, role)
                outs.append(q.dequantize(dtype))
        nan = _encode(x.cpu(), recipe, role).dequantize(dtype).isnan()
        for out in outs:
            assert torch.equal(out.isnan().cpu(), nan), (recipe, role)
        if isinstance(recipe, BlockFP8):
            columns = _encode(x.cpu().T.contiguous(), recipe, role).dequantize(dtype)
            assert torch.equal(turned.dequantize(dtype).isnan().cpu(), columns.isnan())
            assert torch.equal(q.codes.float().isnan().cpu(), nan), (recipe, role)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_quantize_raises_and_names_it(value):
    x = broken((3, 160), torch.bfloat16, value).cuda()
    text = r"up \(weight\) holds 1 NaN or infinite of 480 values, the first at \(1, 5\)"
    for recipe in (BlockFP8(), BlockFP8(scale="ue8m0"), Int4(), MXFP8(), NVFP4()):
        with pytest.raises(NonFiniteError, match=text):
            quantize(x, recipe, name="up")
    with pytest.raises(NonFiniteError, match=text):
        quantize_pair(x, BlockFP8(), role="weight", name="up")


def test_more_elements_than_an_int32_counts():
    x = torch.randn(65664, 32768, device="cuda", dtype=torch.bfloat16)
    end = x[-128:, -256:]
    for role in ("weight", "gradient"):
        q, turned = _encode_pair(x, BlockFP8(), role)
        alone, turned_alone = _encode_pair(end.contiguous(), BlockFP8(), role)
        assert torch.equal(q.codes[-128:, -256:].float(), alone.codes.float())
        assert torch.equal(q.scale[-len(alone.scale) :, -2:], alone.scale)
        assert torch.equal(turned.codes[-256:, -128:].float(), turned_alone.codes.float())
        assert torch.equal(turned.scale[-len(turned_alone.scale) :, -1:], turned_alone.scale)
        del q, turned
    assert torch.equal(fake_quantize(x, Int4())[-128:, -256:], fake_quantize(end, Int4()))
