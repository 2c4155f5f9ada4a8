"""Triton kernels under the interpreter, against the plain reference, bit for bit."""

import pytest
import torch

from miles.errors import NonFiniteError, SettingError, ShapeError
from miles.precision import MXFP8, NVFP4, BlockFP8, Int4, fake_quantize, quantize
from miles.precision.quantize import _encode, _fake, quantize_pair
from tests.precision.data import KINDS, broken, same_bits, tensor


@pytest.mark.parametrize("part", ["fp8", "pairs", "layouts", "int4", "broken"])
def test_the_kernels_under_the_interpreter_have_the_bits_of_the_reference(interpreted, part):
    error = interpreted(part)
    assert not error, error


# --- pairs and transposes, on the reference


@pytest.mark.parametrize("role", ["weight", "activation", "gradient"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_a_tensor_and_its_transpose_rounded_apart(kind, scale, role):
    x, recipe = tensor(kind, (130, 200)), BlockFP8(scale=scale)
    q, turned = quantize_pair(x, recipe, role=role)
    columns = quantize(x.T.contiguous(), recipe, role=role)
    rows = quantize(x, recipe, role=role)
    assert same_bits((q.codes, q.scale), (rows.codes, rows.scale))
    assert same_bits((turned.codes, turned.scale), (columns.codes, columns.scale))
    assert turned.role == role and turned.recipe == recipe


def test_a_transposed_weight_is_the_weight_transposed():
    x = tensor("heavy", (3, 130, 200))
    q = quantize(x, BlockFP8())
    turned = quantize(x.transpose(-2, -1).contiguous(), BlockFP8())
    assert same_bits((q.t().codes, q.t().scale), (turned.codes, turned.scale))
    assert torch.equal(q.t().dequantize(), q.dequantize().transpose(-2, -1))
    assert q.t().codes.is_contiguous() and same_bits((q.t().t().codes,), (q.codes,))


def test_only_square_blocks_transpose():
    for recipe, role in ((BlockFP8(), "activation"), (Int4(), "weight"), (MXFP8(), "weight")):
        with pytest.raises(SettingError, match=r"t\(\) got"):
            quantize(torch.ones(32, 32), recipe, role=role).t()


def test_a_pair_of_what_is_no_matrix_is_refused():
    with pytest.raises(ShapeError, match=r"x \(activation\) has shape \(2, 3, 4\)"):
        quantize_pair(torch.ones(2, 3, 4), BlockFP8(), role="activation", name="x")
    for shape in ((4,), (0, 4)):
        with pytest.raises(ShapeError, match=r"expected \[M, K\]"):
            quantize_pair(torch.ones(shape), BlockFP8(), role="gradient")
    with pytest.raises(SettingError, match="MXFP8; expected BlockFP8"):
        quantize_pair(torch.ones(4, 4), MXFP8(), role="gradient")
    with pytest.raises(SettingError, match="BlockFP8 or Int4 on CUDA"):
        quantize_pair(torch.ones(4, 4), BlockFP8(), role="gradient", backend="triton")


# --- NaN and infinity, on the reference

EVERY = [
    (BlockFP8(), "weight"),
    *((BlockFP8(scale=scale), "activation") for scale in ("fp32", "ue8m0")),
    *((BlockFP8(scale="ue8m0", profile=name), "activation") for name in ("deepgemm", "vllm", "hf")),
    (BlockFP8(scale="ue8m0", store="float8_e8m0fnu"), "gradient"),
    (Int4(), "weight"),
    (Int4(scale_dtype="float16"), "weight"),
    (MXFP8(), "gradient"),
    (NVFP4(), "weight"),
]


@pytest.mark.parametrize(("recipe", "role"), EVERY, ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unchecked_all_of_a_block_with_nan_or_infinity_is_nan(recipe, role, value, dtype):
    x = broken((3, 160), dtype, value)
    out = _encode(x, recipe, role).dequantize(dtype)
    fake, _ = _fake(x, recipe, role)
    height, width = {
        BlockFP8: (3 if role == "weight" else 1, 128),
        Int4: (1, 32),
        MXFP8: (1, 32),
        NVFP4: (3, 160),
    }[type(recipe)]
    top = 0 if height == 3 else 1
    nan = torch.zeros(3, 160, dtype=torch.bool)
    nan[top : top + height, :width] = True
    assert torch.equal(out.isnan(), nan) and torch.equal(fake.isnan(), nan)
    assert out[~nan].isfinite().all()


@pytest.mark.parametrize(("recipe", "role"), EVERY, ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinity_raise_and_are_named(recipe, role, value):
    x = broken((3, 160), torch.bfloat16, value)
    text = rf"mlp.up \({role}\) holds 1 NaN or infinite of 480 values, the first at \(1, 5\)"
    for call in (quantize, fake_quantize):
        with pytest.raises(NonFiniteError, match=text):
            call(x, recipe, role=role, name="mlp.up")
    if isinstance(recipe, BlockFP8):
        with pytest.raises(NonFiniteError, match=text):
            quantize_pair(x, recipe, role=role, name="mlp.up")


def test_scales_that_overflow_their_dtype_raise():
    recipe = Int4(scale_dtype="float16")
    with pytest.raises(NonFiniteError, match=r"finite, but its scales .* torch.float16"):
        quantize(torch.full((1, 32), 1e6), recipe)
