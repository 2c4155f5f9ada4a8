"""What each recipe rounds to, against its definition written again and literals by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import DtypeError, NonFiniteError, SettingError, ShapeError
from miles.precision import (
    MXFP8,
    NVFP4,
    PROFILES,
    BlockFP8,
    Int4,
    fake_quantize,
    quantize,
    recipe_from_dict,
)
from miles.precision._int4 import pack, unpack
from miles.precision._micro import pack_nvfp4, unpack_nvfp4
from tests.precision.data import E2M1, E4M3, KINDS, nearest, tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RECIPES = [
    (BlockFP8(), "weight"),
    (BlockFP8(scale="ue8m0"), "weight"),
    (BlockFP8(scale="ue8m0", store="float8_e8m0fnu"), "activation"),
    *((BlockFP8(profile=profile), "activation") for profile in PROFILES),
    *((BlockFP8(profile=profile, scale="ue8m0"), "activation") for profile in PROFILES),
    (BlockFP8(), "gradient"),
    (Int4(), "weight"),
    (Int4(group_size=64, scale_dtype="float32"), "weight"),
    (Int4.compressed_tensors(), "weight"),
    (MXFP8(), "activation"),
    (NVFP4(), "weight"),
]
every_recipe = pytest.mark.parametrize(("recipe", "role"), RECIPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def magnitudes(codes: torch.Tensor) -> torch.Tensor:
    """Codes of float8 as indices of their magnitudes."""
    return (codes.view(torch.uint8) & 0x7F).long()


@every_recipe
@every_dtype
@every_kind
def test_fake_quantised_is_the_dequantised_bit_for_bit(recipe, role, dtype, kind):
    x = tensor(kind, (130, 192), dtype)
    fake = fake_quantize(x, recipe, role=role)
    exact = quantize(x, recipe, role=role).dequantize(dtype)
    assert fake.dtype == dtype and torch.equal(fake.view(torch.uint8), exact.view(torch.uint8))
    assert not fake.isnan().any()


@every_recipe
def test_the_gradient_passes_straight_through(recipe, role):
    x = tensor("heavy", (130, 192), torch.float32).requires_grad_()
    weights = tensor("normal", (130, 192), torch.float32)
    (fake_quantize(x, recipe, role=role) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


# --- block FP8


@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@every_dtype
@every_kind
def test_block_fp8_is_transformer_engines_formula(role, scale, dtype, kind):
    x = tensor(kind, (130, 192), dtype)
    q = quantize(x, BlockFP8(scale=scale), role=role)
    height = 128 if role == "weight" else 1
    for row in range(0, 130, height):
        for column in (0, 128):
            block = x[row : row + height, column : column + 128].float()
            amax = float(block.abs().max())
            got = q.scale[row // height, column // 128]
            multiplier = torch.tensor(448.0) / torch.tensor(amax) if amax else torch.tensor(1.0)
            multiplier = multiplier.clamp(max=torch.finfo(torch.float32).max)
            if scale == "ue8m0":
                multiplier = torch.tensor(2.0 ** math.floor(math.log2(float(multiplier))))
            assert float(got) == float(torch.tensor(1.0) / multiplier)
            codes = q.codes[row : row + height, column : column + 128]
            assert torch.equal(magnitudes(codes), nearest(block * multiplier, E4M3))
            assert bool((codes.float().signbit() == block.signbit()).all())


def test_block_fp8_by_hand():
    x = torch.zeros(2, 256)
    x[0, 0], x[0, 1], x[1, 128] = 896.0, 3.0, -7.0
    q = quantize(x, BlockFP8(), role="activation")
    assert q.scale.tolist() == [[2.0, 1.0], [1.0, 0.015625]]  # 7 / 448 is 1/64
    assert q.codes.float()[0, :2].tolist() == [448.0, 1.5] and q.codes.float()[1, 128] == -448.0
    weight = quantize(x, BlockFP8())
    assert weight.scale.tolist() == [[2.0, 0.015625]]
    assert quantize(torch.full((1, 128), 3.0), BlockFP8(scale="ue8m0")).scale.item() == 2**-7


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["fp32", "ue8m0"]))
@settings(max_examples=25, deadline=None)
def test_a_tail_is_a_block_padded_with_zeros(rows, columns, scale):
    x = tensor("normal", (rows, columns), torch.float32, seed=rows)
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = x
    recipe = BlockFP8(scale=scale)
    q, whole = quantize(x, recipe), quantize(padded, recipe)
    assert torch.equal(q.scale, whole.scale)
    assert torch.equal(q.codes.float(), whole.codes[:rows, :columns].float())


def test_experts_are_matrices_of_their_own():
    x = tensor("heavy", (3, 130, 192))
    q = quantize(x, BlockFP8())
    assert q.scale.shape == (3, 2, 2)
    for expert in range(3):
        alone = quantize(x[expert], BlockFP8())
        assert torch.equal(q.scale[expert], alone.scale)
        assert torch.equal(q.codes[expert].float(), alone.codes.float())


@pytest.mark.parametrize("sigma", [1.0, 1e-4, 1e-6, 1e-8, 1e-10, 1e-30])
def test_small_gradients_survive(sigma):
    """A floor of 1e-4 under the scale left nothing of gradients of 1e-8, which RL has."""
    gradient = tensor("normal", (64, 1024), torch.float32) * sigma
    rounded = quantize(gradient, BlockFP8(), role="gradient").dequantize()
    noise = (rounded - gradient).double().pow(2).sum() / gradient.double().pow(2).sum()
    assert -10 * math.log10(float(noise)) > 31


def test_zero_blocks_are_zero_with_scale_one():
    """A converter without a floor made NaN codes of them."""
    for recipe in (BlockFP8(), BlockFP8(scale="ue8m0")):
        q = quantize(torch.zeros(128, 128, dtype=torch.bfloat16), recipe)
        assert q.scale.item() == 1 and not q.codes.view(torch.uint8).any()


# Rounded up, the largest numbers of a dtype are beyond it.
BELOW_MAXIMUM = [kind for kind in KINDS if kind != "maxima"]


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("kind", BELOW_MAXIMUM)
def test_rounding_again_changes_no_code(scale, kind):
    recipe, x = BlockFP8(scale=scale), tensor(kind, (256, 256))
    once = quantize(x, recipe)
    again = quantize(once.dequantize(torch.bfloat16), recipe)
    if kind != "subnormal":  # bf16 has too few bits there to hold a rounded value
        assert torch.equal(once.codes.float(), again.codes.float())


def test_powers_of_two_make_every_value_exact_in_bf16():
    q = quantize(tensor("normal", (256, 256), torch.float32), BlockFP8(scale="ue8m0"))
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize())


def f32(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32)


def profile_by_the_book(name: str, amax: float, power_of_two: bool):
    """(what an element becomes before the cast, the scale), from the engines' own formulas."""
    amax = f32(amax)
    if name == "te":
        multiplier = f32(448.0) / amax if amax > 0 else f32(1.0)
        if power_of_two:
            multiplier = f32(2.0 ** math.floor(math.log2(multiplier)))
        return lambda x: x * multiplier, f32(1.0) / multiplier
    floor = {"deepgemm": 1e-4, "sglang": 1e-10, "vllm": 1e-10, "hf": 0.0}[name]
    if name == "hf" and amax == 0:
        return lambda x: x, f32(1.0)
    amax = torch.maximum(amax, f32(floor))
    if power_of_two:
        scale = f32(2.0 ** math.ceil(math.log2(amax / f32(448.0))))
    elif name == "sglang":
        return lambda x: x * (f32(448.0) / amax), amax * f32(1 / 448)
    elif name == "hf":
        multiplier = amax.reciprocal() * 448.0
        return lambda x: x * multiplier, f32(1.0) / multiplier
    else:
        scale = amax / f32(448.0)
    if name == "vllm":
        return lambda x: x / scale, scale
    return lambda x: x * (f32(1.0) / scale), scale


@pytest.mark.parametrize("name", list(PROFILES))
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "tiny", "constant"])
def test_profiles_are_the_engines_formulas(name, scale, kind):
    x = tensor(kind, (40, 256), torch.bfloat16)
    q = quantize(x, BlockFP8(profile=name, scale=scale), role="activation")
    for row in range(40):
        for column in (0, 128):
            block = x[row, column : column + 128].float()
            before, expected = profile_by_the_book(name, float(block.abs().max()), scale == "ue8m0")
            assert q.scale[row, column // 128] == expected
            codes = q.codes[row, column : column + 128]
            assert torch.equal(magnitudes(codes), nearest(before(block), E4M3))


def test_profiles_differ_where_they_are_said_to():
    x = tensor("normal", (512, 1024))
    codes = {
        name: quantize(x, BlockFP8(profile=name), role="activation").codes.float()
        for name in PROFILES
    }
    assert not torch.equal(codes["te"], codes["deepgemm"])
    assert not torch.equal(codes["te"], codes["hf"])
    assert torch.equal(codes["te"], codes["sglang"])  # only its stored scale is another
    two = [
        quantize(x, BlockFP8(profile=name, scale="ue8m0"), role="activation") for name in PROFILES
    ]
    assert all(torch.equal(q.scale, two[0].scale) for q in two)
    assert all(torch.equal(q.codes.float(), two[0].codes.float()) for q in two)


def test_weights_and_gradients_have_one_formula_whatever_the_profile():
    x = tensor("normal", (256, 256))
    for role in ("weight", "gradient"):
        q = [quantize(x, BlockFP8(profile=name), role=role) for name in ("te", "deepgemm")]
        assert torch.equal(q[0].scale, q[1].scale)


# --- INT4


def test_int4_by_hand():
    weight = torch.tensor([[7.0, -7.0, 3.4, 3.6, 0.5, -0.5, 1.5, 0.0]])
    q = quantize(weight, Int4(group_size=8))
    assert q.scale.tolist() == [[1.0]]
    assert q.codes.tolist() == [[7, -7, 3, 4, 0, 0, 2, 0]]  # ties to even


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", BELOW_MAXIMUM)
def test_int4_rounded_again_is_the_same(group_size, dtype, kind):
    recipe = Int4(group_size=group_size)
    once = fake_quantize(tensor(kind, (64, 192), dtype), recipe)
    assert torch.equal(fake_quantize(once, recipe), once) or kind == "subnormal"


def test_the_rules_of_compressed_tensors_are_not_idempotent():
    recipe = Int4.compressed_tensors()
    assert not recipe.idempotent and Int4().idempotent
    once = fake_quantize(tensor("normal", (64, 256)), recipe)
    changed = (fake_quantize(once, recipe) != once).float().mean()
    assert changed > 0.5
    assert quantize(tensor("normal", (64, 256)), recipe).codes.min() == -8


def test_the_scale_is_rounded_before_anything_is_divided_by_it():
    """Else 2 to 7 % of a trainer's weights are not those of its packed checkpoint."""
    weight = tensor("normal", (256, 512), torch.float32)
    q = quantize(weight, Int4())
    groups = weight.view(256, -1, 32)
    scale = (groups.abs().amax(-1) / torch.tensor(7.0)).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-7, 7)
    assert torch.equal(q.scale, scale) and torch.equal(q.codes.view_as(codes).float(), codes)
    assert torch.equal(q.dequantize(), (codes * scale.float()[..., None]).view_as(weight))


def test_a_zero_group_has_scale_one():
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[0, 0] = 1
    q = quantize(weight, Int4())
    assert q.scale[1].tolist() == [1, 1] and q.scale[0, 1] == 1 and not q.codes[1].any()


@given(st.lists(st.integers(-8, 7), min_size=8, max_size=8))
def test_packing_is_low_nibble_first_with_offset_eight(codes):
    packed = pack(torch.tensor([codes], dtype=torch.int8))
    expected = sum((code + 8) << 4 * place for place, code in enumerate(codes))
    assert packed.dtype == torch.int32 and packed.item() & 0xFFFFFFFF == expected
    assert unpack(packed).tolist() == [codes]


# --- MXFP8 and NVFP4


@every_dtype
@every_kind
def test_mxfp8_rounds_its_scale_up_so_that_nothing_clips(dtype, kind):
    x = tensor(kind, (16, 100), dtype)
    q = quantize(x, MXFP8(), role="activation")
    assert q.scale.dtype == torch.float8_e8m0fnu and q.scale.shape == (16, 4)
    for block in range(4):
        part = x[:, 32 * block : 32 * block + 32].float()
        amax = part.abs().amax(-1)
        for row in range(16):
            ratio = float(amax[row] / f32(448.0))
            exponent = math.ceil(math.log2(ratio)) if ratio > 0 else -127
            code = max(exponent, -127) + 127
            assert int(q.scale.view(torch.uint8)[row, block]) == code
            scaled = part[row].double() / 2.0 ** (code - 127)
            assert float(scaled.abs().max()) <= 448 * (1 + 1e-6)
            codes = q.codes[row, 32 * block : 32 * block + 32]
            assert torch.equal(magnitudes(codes), nearest(scaled.clamp(-448, 448), E4M3))


def test_a_zero_block_of_mxfp8_has_scale_code_zero():
    q = quantize(torch.zeros(1, 32), MXFP8())
    assert q.scale.view(torch.uint8).item() == 0


@every_dtype
@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "tiny", "constant"])
def test_nvfp4_is_e2m1_under_two_scales(dtype, kind):
    x = tensor(kind, (8, 64), dtype)
    q = quantize(x, NVFP4())
    whole = x.float().abs().max() / f32(2688.0)
    whole = whole if whole > 0 else f32(1.0)
    assert q.global_scale == whole
    for row in range(8):
        for block in range(4):
            part = x[row, 16 * block : 16 * block + 16].float()
            wanted = part.abs().max() / f32(6.0) / whole
            scale = q.scale[row, block]
            assert magnitudes(scale[None])[0] == nearest(wanted.clamp(max=448)[None], E4M3)[0]
            if float(scale.float()) > 0:
                multiplier = f32(1.0) / whole / scale.float()
                codes = q.codes[row, 16 * block : 16 * block + 16]
                assert torch.equal((codes & 7).long(), nearest(part * multiplier, E2M1))


def test_nvfp4_by_hand():
    x = torch.tensor([[6.0, -6.0, 0.25, 0.75, 1.25, 2.5, 3.5, 5.0] + [0.0] * 8]) * 448
    q = quantize(x, NVFP4())
    assert (q.global_scale.item(), q.scale.float().item()) == (1.0, 448.0)
    # Ties go to the even code: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
    assert q.codes[0, :8].tolist() == [7, 15, 0, 2, 2, 4, 6, 6]
    assert unpack_nvfp4(pack_nvfp4(q.codes)).tolist() == q.codes.tolist()


# --- recipes and bad input


@every_recipe
def test_recipes_survive_json(recipe, role):
    import json

    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_recipes_of_checkpoints():
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    assert BlockFP8.from_hf(config) == BlockFP8()
    assert BlockFP8.from_hf(config | {"scale_fmt": "ue8m0"}, profile="deepgemm") == BlockFP8(
        scale="ue8m0", profile="deepgemm"
    )
    for change, text in (
        ({"quant_method": "gptq"}, "quant_method"),
        ({"weight_block_size": [64, 64]}, r"\[128, 128\]"),
        ({"weight_block_size": None}, r"\[128, 128\]"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"scale_fmt": "e5m3"}, "scale_fmt"),
    ):
        with pytest.raises(SettingError, match=text):
            BlockFP8.from_hf(config | change)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: BlockFP8(scale="fp16"), "scale"),
        (lambda: BlockFP8(profile="trt"), "profile"),
        (lambda: BlockFP8(wgrad="fp4"), "wgrad"),
        (lambda: BlockFP8(store="float8_e8m0fnu"), "powers of two"),
        (lambda: Int4(group_size=12), "multiple of 8"),
        (lambda: Int4(divisor=8.0), "divisor"),
        (lambda: recipe_from_dict({"recipe": "Int8"}), "Int8"),
        (lambda: recipe_from_dict({"recipe": "Int4", "zero_point": 1}), "zero_point"),
        (lambda: quantize(torch.ones(1, 32), Int4(), role="activation"), "Int4 got"),
        (lambda: quantize(torch.ones(1, 32), MXFP8(), role="bias"), "role"),
        (lambda: quantize(torch.ones(1, 32), Int4(), backend="triton"), "BlockFP8 or Int4 on CUDA"),
        (lambda: quantize(torch.ones(1, 32), BlockFP8(), backend="cuda"), "backend is 'cuda'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, text):
    with pytest.raises(SettingError, match=text):
        make()


def test_tensors_that_cannot_be_rounded_are_refused():
    with pytest.raises(
        NonFiniteError, match=r"down_proj \(weight\) holds 2 NaN.*first at \(0, 3\)"
    ):
        weight = torch.ones(2, 32)
        weight[0, 3], weight[1, 1] = float("nan"), float("inf")
        quantize(weight, BlockFP8(), name="down_proj")
    with pytest.raises(ShapeError, match="expected a last dimension that they divide"):
        quantize(torch.ones(2, 33), Int4())
    with pytest.raises(ShapeError, match="expected 2 dimensions or more"):
        quantize(torch.ones(32), BlockFP8())
    with pytest.raises(DtypeError, match="int32"):
        fake_quantize(torch.ones(2, 32, dtype=torch.int32), BlockFP8())


@pytest.mark.parametrize("recipe", [BlockFP8(), MXFP8(), NVFP4(), Int4()], ids=repr)
def test_no_rows_are_rounded_to_no_rows(recipe):
    for role in recipe.roles:
        x = torch.empty(0, 128, dtype=torch.bfloat16)
        q = quantize(x, recipe, role=role)
        assert q.codes.shape == (0, 128) and len(q.scale) == 0
        assert torch.equal(q.dequantize(x.dtype), x)
        assert torch.equal(fake_quantize(x, recipe, role=role), x)
