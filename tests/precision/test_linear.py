"""FP8 linear: values and gradients against float64 GEMMs of the same operands."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from miles.errors import DtypeError, SettingError, ShapeError
from miles.precision import BlockFP8, Int4, quantize
from miles.precision.linears import grouped_linear, linear
from tests.precision.data import tensor

MODES = ("fp8", "dequant", "bf16")
COMBINATIONS = [
    BlockFP8(fprop=fprop, dgrad=dgrad, wgrad=wgrad)
    for fprop, dgrad, wgrad in itertools.product(MODES, repeat=3)
]
FLOAT32 = 2e-6
"""Relative RMS: sums of up to 300 float32 products, each rounded to 6e-8."""
BFLOAT16 = 2e-3
"""Relative RMS of a result rounded to 8 bits: uniform, half a step of 2**-8 over sqrt(3)."""
DEQUANT = 6e-3
"""As above, of operands that are rounded to bf16 too."""


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS."""
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-300))


def seen(x, recipe, role, mode):
    """What a GEMM multiplies, in float64."""
    if 0 in x.shape:
        return x.double()
    return (x if mode == "bf16" else quantize(x, recipe, role=role).dequantize()).double()


def along_tokens(x, recipe, role, mode):
    """As `seen`, but rounded along the tokens."""
    return seen(x.detach().t().contiguous(), recipe, role, mode).t()


def oracle(x, weight, dy, recipe):
    """Result and gradients of `[T, K]` and `[N, K]` in float64."""
    low = weight.detach().to(x.dtype)
    y = seen(x, recipe, "activation", recipe.fprop) @ seen(low, recipe, "weight", recipe.fprop).T
    dx = seen(dy, recipe, "gradient", recipe.dgrad) @ seen(low, recipe, "weight", recipe.dgrad)
    dy_t = along_tokens(dy, recipe, "gradient", recipe.wgrad)
    return y, dx, dy_t.T @ along_tokens(x, recipe, "activation", recipe.wgrad)


def case(t=70, n=130, k=300, dtype=torch.float32, weight_dtype=None, seed=0):
    x = tensor("heavy", (t, k), dtype, seed).requires_grad_()
    weight = tensor("normal", (n, k), weight_dtype or dtype, seed + 1).requires_grad_()
    return x, weight, tensor("normal", (t, n), dtype, seed + 2) * 1e-5


# --- values and gradients


@pytest.mark.parametrize("recipe", COMBINATIONS, ids=lambda r: f"{r.fprop}-{r.dgrad}-{r.wgrad}")
def test_every_combination_is_the_gemm_of_its_operands(recipe):
    x, weight, dy = case()
    y = linear(x, weight, recipe)
    got = (y, *torch.autograd.grad(y, (x, weight), dy))
    for a, b in zip(got, oracle(x, weight, dy, recipe), strict=True):
        assert error(a, b) < FLOAT32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("profile", ["te", "sglang"])
def test_bf16_with_a_float32_master_weight(mode, scale, profile):
    recipe = BlockFP8(scale=scale, profile=profile, fprop=mode, dgrad=mode, wgrad=mode)
    x, weight, dy = case(dtype=torch.bfloat16, weight_dtype=torch.float32)
    y = linear(x, weight, recipe)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wanted = oracle(x, weight, dy, recipe)
    # Of power-of-two scales, dequantised numbers are bf16 as they are.
    exact = mode != "dequant" or scale == "ue8m0"
    for a, b in zip((y, dx), wanted, strict=False):
        assert error(a, b) < (BFLOAT16 if exact else DEQUANT)
    assert error(dw, wanted[2]) < (FLOAT32 if exact else DEQUANT)


def test_the_dequant_backend_is_the_dequant_mode():
    x, weight, dy = case(dtype=torch.bfloat16)
    results = []
    for mode, backend in (("fp8", "dequant_bf16"), ("dequant", "auto")):
        y = linear(x, weight, BlockFP8(fprop=mode, dgrad=mode, wgrad=mode), backend=backend)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_by_hand():
    # Block scale 1 (largest 448): 449 is cut to 448, 17 is halfway between 16 and 18: to even.
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([448.0, 17.0, 1.0])
    weight = torch.zeros(1, 128)
    weight[0, :3] = torch.tensor([1.0, 1.0, 448.0])
    assert linear(x, weight, BlockFP8()).item() == 448 + 16 + 448
    assert linear(x, weight, BlockFP8(fprop="bf16")).item() == 448 + 17 + 448


@pytest.mark.parametrize("shape", [(300,), (1, 300), (2, 3, 300)])
def test_any_leading_dimensions_and_a_bias(shape):
    x = tensor("normal", shape, torch.float32)
    _, weight, _ = case()
    bias = torch.randn(130, requires_grad=True)
    y = linear(x, weight, BlockFP8(), bias=bias)
    assert y.shape == (*shape[:-1], 130)
    flat = linear(x.reshape(-1, 300), weight, BlockFP8()) + bias
    assert torch.equal(y, flat.reshape(y.shape))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((130,), float(y.numel() // 130)))


@pytest.mark.parametrize("n", [1, 128, 129])
@pytest.mark.parametrize("k", [1, 127, 256])
@pytest.mark.parametrize("t", [1, 128])
def test_odd_shapes(t, n, k):
    recipe = BlockFP8(wgrad="fp8")
    x, weight, dy = case(t, n, k)
    y = linear(x, weight, recipe)
    got = (y, *torch.autograd.grad(y, (x, weight), dy))
    for a, b in zip(got, oracle(x, weight, dy, recipe), strict=True):
        assert error(a, b) < FLOAT32


@pytest.mark.parametrize("recipe", COMBINATIONS[::2], ids=str)
def test_no_rows_give_no_rows_and_a_gradient_of_zeros(recipe):
    x = torch.randn(2, 0, 256, requires_grad=True)
    _, weight, _ = case(k=256)
    y = linear(x, weight, recipe)
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (2, 0, 130) and dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))


# --- autograd


def test_a_cached_weight_changes_nothing_and_the_gradient_reaches_the_weight():
    recipe = BlockFP8()
    x, weight, dy = case(dtype=torch.bfloat16, weight_dtype=torch.float32)
    cached = quantize(weight.detach().bfloat16(), recipe)
    kinds = ({}, {"quantized_weight": cached})
    kinds += (kinds[1] | {"transposed_weight": cached.t()},)
    results = []
    for keywords in kinds:
        y = linear(x, weight, recipe, **keywords)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_scales_stored_as_e8m0_are_the_same_numbers():
    x, weight, _ = case(dtype=torch.bfloat16)
    stored = BlockFP8(scale="ue8m0", store="float8_e8m0fnu")
    y = linear(x, weight, stored, quantized_weight=quantize(weight.detach(), stored))
    assert torch.equal(y, linear(x, weight, BlockFP8(scale="ue8m0")))


@pytest.mark.parametrize("recipe", COMBINATIONS[::2], ids=str)
def test_frozen_parts_get_no_gradient_and_leave_nothing_in_memory(recipe):
    x, weight, dy = case()
    both = torch.autograd.grad(linear(x, weight, recipe), (x, weight), dy)
    y = linear(x.detach(), weight, recipe)
    assert torch.equal(torch.autograd.grad(y, weight, dy)[0], both[1])
    frozen = weight.detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, frozen, recipe)
    assert not any(t is x or t.shape == x.shape for t in saved)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], both[0])
    assert linear(x.detach(), frozen, recipe).grad_fn is None


def test_gradients_of_several_calls_add_up_in_float32():
    recipe = BlockFP8()
    total = torch.zeros(130, 300, dtype=torch.float64)
    x, weight, _ = case(dtype=torch.bfloat16, weight_dtype=torch.float32)
    for seed in range(4):
        x, _, dy = case(dtype=torch.bfloat16, seed=seed)
        linear(x, weight, recipe).backward(dy)
        total += oracle(x, weight, dy, recipe)[2]
    assert weight.grad.dtype == torch.float32 and error(weight.grad, total) < FLOAT32


def test_autocast_casts_x_and_keeps_the_float32_gradient():
    x, weight, dy = case()
    recipe = BlockFP8(wgrad="fp8")
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, recipe)
        twice = linear(linear(x, weight, recipe)[:, :64], weight[:, :64], recipe)
    low = x.detach().bfloat16().requires_grad_()
    wanted = linear(low, weight, recipe)
    assert y.dtype == twice.dtype == torch.bfloat16 and torch.equal(y, wanted)
    got = torch.autograd.grad(y, (x, weight), dy.bfloat16())
    expected = torch.autograd.grad(wanted, (low, weight), dy.bfloat16())
    assert [g.dtype for g in got] == [torch.float32, torch.float32]
    assert all(torch.equal(a, b.float()) for a, b in zip(got, expected, strict=True))


def test_non_reentrant_checkpointing_changes_nothing():
    x, weight, dy = case()
    recipe = BlockFP8(wgrad="fp8")
    plain = torch.autograd.grad(linear(x, weight, recipe), (x, weight), dy)
    y = checkpoint(lambda x: linear(x, weight, recipe), x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y, (x, weight), dy), plain))


@pytest.mark.parametrize("recipe", [BlockFP8(), COMBINATIONS[0], COMBINATIONS[-1]], ids=str)
def test_a_compiled_call_has_no_graph_break(recipe):
    def call(x, weight, bias, cached, turned):
        keywords = {"quantized_weight": cached, "transposed_weight": turned}
        return linear(x, weight, recipe, bias=bias, **keywords).relu()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for t in (5, 8):
        x, weight, dy = case(t, dtype=torch.bfloat16, weight_dtype=torch.float32)
        bias = torch.randn(130, requires_grad=True)
        cached = quantize(weight.detach().bfloat16(), recipe)
        for extra in ((None, None), (cached, cached.t())):
            results = []
            for function in (call, compiled):
                y = function(x, weight, bias, *extra)
                results.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
            assert all(map(torch.equal, *results))


def test_a_compiled_step_under_autocast_and_checkpointing_has_no_graph_break():
    recipe = BlockFP8()

    def call(x, weight):
        return checkpoint(lambda x: linear(x, weight, recipe), x, use_reentrant=False)

    x, weight, dy = case()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for function in (call, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy.bfloat16())))
    assert all(map(torch.equal, *results))


def test_custom_ops_tell_the_compiler_what_they_return():
    x, weight, dy = (t.detach() for t in case(16, 128, 256, torch.bfloat16))
    q = quantize(weight, BlockFP8())
    ends = torch.tensor([4, 16], dtype=torch.int32)
    calls = {
        "fp8_encode_weight": (weight, "fp32"),
        "fp8_encode_weights": (weight, "fp32"),
        "fp8_matmul": (x, q.codes, q.scale, None, "fprop", "fp32", "te", "auto"),
        "fp8_wgrad": (dy, x, ends, "fp8", "fp32", "te", "auto", torch.float32),
        "grouped_matmul": (x, torch.stack([weight] * 2), ends),
    }
    for name, arguments in calls.items():
        op = getattr(torch.ops.miles, name)
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")


def test_who_watches_operators_sees_them():
    """An eager call goes past the dispatcher, but not past a mode."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, weight, dy = case()
    expected = torch.autograd.grad(linear(x, weight, BlockFP8()), (x, weight), dy)
    with Watch():
        got = torch.autograd.grad(linear(x, weight, BlockFP8()), (x, weight), dy)
    assert all(map(torch.equal, got, expected))
    ours = [name for name in seen if name.startswith("miles.")]
    assert ours == [f"miles.fp8_{n}.default" for n in ("encode_weights", "matmul", "matmul")]
    with FakeTensorMode() as mode:
        fake_x, fake_weight = mode.from_tensor(x), mode.from_tensor(weight)
        assert linear(fake_x, fake_weight, BlockFP8()).shape == (len(x), len(weight))


# --- experts


@pytest.mark.parametrize("counts", [[3, 0, 140, 1], [0, 70], [5]])
@pytest.mark.parametrize("backend", ["reference", "dequant_bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_experts_are_a_linear_each(counts, backend, mode):
    recipe = BlockFP8(scale="ue8m0", fprop=mode, dgrad=mode, wgrad=mode)
    ends = torch.tensor(counts).cumsum(0)
    x, _, dy = case(sum(counts), 136, 256, torch.bfloat16)
    weight = tensor("normal", (len(counts), 136, 256), torch.bfloat16, 7).requires_grad_()
    y = grouped_linear(x, weight, ends, recipe, backend=backend)
    got = (y, *torch.autograd.grad(y, (x, weight), dy))
    starts = [0, *ends.tolist()]
    wanted = []
    for expert, (a, b) in enumerate(itertools.pairwise(starts)):
        wanted.append(oracle(x.detach()[a:b], weight[expert], dy[a:b], recipe))
    for result, parts, join in zip(
        got, zip(*wanted, strict=True), (torch.cat, torch.cat, torch.stack), strict=True
    ):
        assert error(result, join(parts)) < BFLOAT16
    empty = [i for i, count in enumerate(counts) if count == 0]
    assert not got[2][empty].any()


def test_experts_compile_without_a_graph_break():
    recipe = BlockFP8()
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    x, _, dy = case(20, 136, 256, torch.bfloat16)
    weight = tensor("normal", (2, 136, 256), torch.bfloat16).requires_grad_()
    results = []
    for function in (grouped_linear, compiled):
        y = function(x, weight, torch.tensor([3, 20]), recipe)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    assert all(map(torch.equal, *results))


def test_no_rows_for_any_expert():
    x = torch.randn(0, 256, requires_grad=True)
    weight = torch.randn(2, 8, 256, requires_grad=True)
    for recipe in (BlockFP8(), COMBINATIONS[0], COMBINATIONS[-1]):
        y = grouped_linear(x, weight, torch.tensor([0, 0]), recipe)
        _, dw = torch.autograd.grad(y.sum(), (x, weight))
        assert y.shape == (0, 8) and not dw.any()


# --- bad input


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_is_not_hidden(bad, mode):
    recipe = BlockFP8(fprop=mode, dgrad=mode, wgrad=mode)
    x, weight, dy = (t.detach().clone() for t in case(dtype=torch.bfloat16))
    x[3, 7] = dy[5, 9] = bad
    weight.requires_grad_()
    y = linear(x.requires_grad_(), weight, recipe)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()
    assert not dx[5].isfinite().any() and dx[:5].isfinite().all() and dx[6:].isfinite().all()
    assert not dw[9].isfinite().any() and not dw[:, 7].isfinite().any()
    if mode == "bf16":
        return
    with torch.no_grad():
        weight[1, 2] = bad
    assert not linear(x, weight, recipe)[:, 1].isfinite().any()


def test_tensors_that_do_not_fit_together_raise():
    x, weight, _ = case()
    q = quantize(weight.detach(), BlockFP8())
    calls = [
        (ShapeError, r"x has shape \(70, 299\) and weight \(130, 300\)", (x[:, 1:], weight), {}),
        (ShapeError, r"expected \[..., K\] and \[N, K\]", (x, weight[None]), {}),
        (ShapeError, "none of N and K zero", (x, weight[:0]), {}),
        (ShapeError, r"bias has shape \(3,\); expected \(130,\)", (x, weight), {"bias": x[0, :3]}),
        (DtypeError, "x is torch.float64", (x.double(), weight), {}),
        (DtypeError, "weight is torch.int64", (x, weight.long()), {}),
        (SettingError, "x is on cpu and weight on meta", (x, weight.to("meta")), {}),
        (SettingError, "'fast'; expected 'auto'", (x, weight), {"backend": "fast"}),
        (SettingError, "can't run fprop.*Hopper", (x, weight), {"backend": "scaled_mm"}),
        (SettingError, "can't run fprop.*Hopper", (x, weight), {"backend": "deepgemm"}),
        (SettingError, "can't run fprop.*a CUDA GPU", (x, weight), {"backend": "triton"}),
        (ShapeError, "quantized_weight is", (x, weight[1:]), {"quantized_weight": q}),
        (SettingError, "without quantized", (x, weight), {"transposed_weight": q.t()}),
        (
            ShapeError,
            r"transposed_weight is \(130, 300\)",
            (x, weight),
            {"quantized_weight": q, "transposed_weight": q},
        ),
    ]
    for kind, text, arguments, keywords in calls:
        with pytest.raises(kind, match=text):
            linear(*arguments, BlockFP8(), **keywords)


def test_a_quantised_weight_of_another_recipe_raises():
    x, weight, _ = case(k=256)
    for other, role in (
        (BlockFP8(scale="ue8m0"), "weight"),
        (Int4(), "weight"),
        (BlockFP8(), "activation"),
    ):
        with pytest.raises(SettingError, match=r"quantized_weight is of role .*expected a weight"):
            q = quantize(weight.detach(), other, role=role)
            linear(x, weight, BlockFP8(), quantized_weight=q)
    with pytest.raises(SettingError, match="recipe is Int4; expected BlockFP8"):
        linear(x, weight, Int4())


def test_ends_that_do_not_fit_the_rows_raise():
    x, weight = torch.randn(4, 128), torch.randn(2, 8, 128)
    for ends in ([3, 2], [1, 3], [-1, 4]):
        with pytest.raises(ShapeError, match="the last 4"):
            grouped_linear(x, weight, torch.tensor(ends), BlockFP8())
    with pytest.raises(ShapeError, match="one end an expert"):
        grouped_linear(x, weight, torch.tensor([1, 2, 4]), BlockFP8())
    with pytest.raises(DtypeError, match=r"ends is torch\.float32"):
        grouped_linear(x, weight, torch.tensor([1.0, 4.0]), BlockFP8())
