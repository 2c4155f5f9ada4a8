"""Quantise kernels against the plain reference, bit for bit."""

import pytest
import torch

from miles.precision import MXFP8, NVFP4, PROFILES, BlockFP8, Int4, fake_quantize, quantize
from tests.precision.data import KINDS, tensor

SHAPES = [(1, 1), (3, 130), (257, 1000), (128, 128), (2, 5, 384), (3, 130, 192)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
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
            where = (shape, role, profile)
            assert torch.equal(got.scale.cpu(), expected.scale), where
            codes, wanted = got.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8)
            assert torch.equal(codes, wanted), where


@pytest.mark.parametrize("kind", KINDS)
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
        for a, b in ((on_cpu.codes, on_gpu.codes), (on_cpu.scale, on_gpu.scale)):
            assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8)), recipe
        fake = fake_quantize(x.cuda(), recipe, role=role).cpu()
        assert torch.equal(fake, on_cpu.dequantize(x.dtype)), recipe


def test_scales_of_rows_lie_as_the_gemms_read_them():
    q = quantize(torch.randn(130, 512, device="cuda"), BlockFP8(), role="activation")
    assert q.scale.shape == (130, 4) and q.scale.stride() == (1, 132)
