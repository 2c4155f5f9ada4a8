"""FP8 GEMMs against the plain reference, on the same operands."""

import itertools
import warnings

import pytest
import torch

from miles.errors import NonFiniteError, SettingError, ShapeError
from miles.precision import BlockFP8, Int4, _gemm, _gemm_grouped, quantize
from miles.precision.backends import Gemm as GemmSizes
from miles.precision.backends import explain, refusal
from miles.precision.linears import grouped_linear, linear
from miles.precision.modules import convert_

BFLOAT16 = 3e-3
"""Relative RMS of two results, each rounded to 8 bits (1.2e-3 of uniform rounding, each), of sums
that the tensor cores keep about 14 bits of within a block of 128 (1e-4)."""
FLOAT32 = 2e-3
"""Relative RMS of float32 sums of the same; 2e-4 to 7e-4 has been reported of both libraries."""
RECIPES = [BlockFP8(wgrad="fp8"), BlockFP8(scale="ue8m0", wgrad="fp8")]
SHAPES = [(1, 128, 128), (130, 256, 640), (512, 384, 512), (2048, 512, 2176)]


@pytest.fixture(params=["scaled_mm", "deepgemm", "triton"])
def backend(request):
    sizes = {"rows": 128, "columns": 128, "depth": 128}
    cuda = torch.device("cuda")
    reason = refusal(
        request.param, GemmSizes(kind="fprop", dtype=torch.bfloat16, device=cuda, **sizes)
    )
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=["deepgemm", "triton"])
def of_experts(request):
    """Backends with GEMMs of experts."""
    if request.param == "deepgemm":
        pytest.importorskip("deep_gemm", reason="DeepGEMM is not installed")
    return request.param


def error(got, expected) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-300))


def case(m, n, k, weight_dtype=torch.bfloat16, lead=()):
    torch.manual_seed(m + n + k)
    x = torch.randn(m, k, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(*lead, n, k, device="cuda").to(weight_dtype).requires_grad_()
    dy = (torch.randn(m, n, device="cuda") * 1e-6).bfloat16()
    return x, weight, dy


def step(function, x, weight, dy):
    y = function(x, weight)
    return tuple(t.detach() for t in (y, *torch.autograd.grad(y, (x, weight), dy)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_value_and_gradients_are_those_of_the_reference(backend, shape, recipe, dtype):
    x, weight, dy = case(*shape, dtype)
    got = step(lambda x, w: linear(x, w, recipe, backend=backend), x, weight, dy)
    wanted = step(lambda x, w: linear(x, w, recipe, backend="reference"), x, weight, dy)
    assert got[2].dtype == dtype
    limits = (BFLOAT16, BFLOAT16, FLOAT32 if dtype == torch.float32 else BFLOAT16)
    for name, a, b, limit in zip(("y", "dx", "dw"), got, wanted, limits, strict=True):
        assert error(a, b) < limit, (name, error(a, b))


@pytest.mark.parametrize("n", [144, 192])
def test_features_need_not_be_a_multiple_of_128_where_nothing_sums_over_them(backend, n):
    recipe = BlockFP8(dgrad="bf16", wgrad="fp8")
    x, weight, dy = case(200, n, 384)
    got = step(lambda x, w: linear(x, w, recipe, backend=backend), x, weight, dy)
    wanted = step(lambda x, w: linear(x, w, recipe, backend="reference"), x, weight, dy)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < BFLOAT16


def test_a_cached_weight_gives_the_same_bits(backend):
    recipe = BlockFP8()
    x, weight, dy = case(130, 256, 640)
    q = quantize(weight.detach(), recipe)
    keywords = {"quantized_weight": q, "transposed_weight": q.t()}
    plain = step(lambda x, w: linear(x, w, recipe, backend=backend), x, weight, dy)
    for kept in ({"quantized_weight": q}, keywords):
        got = step(lambda x, w, k=kept: linear(x, w, recipe, backend=backend, **k), x, weight, dy)
        assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize("blocks", [1, 4, 5, 6, 16])
def test_scaled_mm_reads_the_scales_that_it_is_given(blocks):
    # A wrong layout is about -71 dB; every number of blocks along K has its own padding.
    recipe = BlockFP8()
    x, weight, _ = case(256, 384, 128 * blocks)
    x, weight = x.detach(), weight.detach()
    x *= torch.exp2(torch.randint(-9, 9, (256, 1), device="cuda"))
    weight *= torch.exp2(torch.randint(-9, 9, (128 * blocks,), device="cuda"))
    got = linear(x, weight, recipe, backend="scaled_mm")
    assert error(got, linear(x, weight, recipe, backend="reference")) < BFLOAT16


def test_scales_in_a_wrong_layout_raise_before_the_gemm(monkeypatch):
    x, weight, _ = case(256, 384, 640)
    monkeypatch.setattr(_gemm, "row_scale", lambda scale: scale.contiguous())
    with pytest.raises(ShapeError, match="strides"):
        linear(x, weight, BlockFP8(), backend="scaled_mm")
    monkeypatch.undo()
    monkeypatch.setattr(_gemm, "rhs_scale", lambda scale: scale.t())
    with pytest.raises(ShapeError, match="strides"):
        linear(x, weight, BlockFP8(), backend="scaled_mm")


def test_what_cannot_run_raises_by_name_and_auto_takes_triton():
    x, weight, _ = case(64, 256, 192)
    for name in ("scaled_mm", "deepgemm"):
        with pytest.raises(SettingError, match=name):
            linear(x, weight, BlockFP8(), backend=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is no faster than bf16, unless one did before
        got = linear(x, weight, BlockFP8())
    assert error(got, linear(x, weight, BlockFP8(), backend="reference")) < BFLOAT16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 130, 200), (129, 127, 272), (300, 513, 1000)])
def test_triton_takes_any_size_and_dtype(shape, dtype):
    x, weight, dy = case(*shape, dtype)
    x = x.detach().to(dtype).requires_grad_()
    dy = (dy * 1e3).to(dtype)
    got = step(lambda x, w: linear(x, w, RECIPES[0], backend="triton"), x, weight, dy)
    wanted = step(lambda x, w: linear(x, w, RECIPES[0], backend="reference"), x, weight, dy)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype and error(a, b) < BFLOAT16


@pytest.mark.parametrize("decode", [False, True], ids=["fp8", "decoded"])
@pytest.mark.parametrize("square", [True, False], ids=["tiles", "rows"])
def test_triton_adds_up_in_float32(decode, square, monkeypatch):
    # Decoded, as without FP8 tensor cores, products within a block of 128 keep float32's bits.
    monkeypatch.setattr(_gemm_triton(), "_decodes", lambda device: decode)
    x, weight, _ = case(300, 520, 4096)
    a = _gemm.encode(x, "fp32", "activation")
    b = _gemm.encode(weight, "fp32", "weight" if square else "gradient")
    got = _gemm.dense("triton", a, b, torch.float32)
    exact = a.dequantize(torch.float32).double() @ b.dequantize(torch.float32).double().T
    assert error(got, exact) < (1e-5 if decode else FLOAT32)


@pytest.mark.parametrize("decode", [False, True], ids=["fp8", "decoded"])
@pytest.mark.parametrize(("n", "k"), [(192, 384), (512, 2048), (16384, 1024)])
def test_a_row_has_the_same_bits_alone_and_in_company(n, k, decode, monkeypatch):
    module = _gemm_triton()
    monkeypatch.setattr(module, "_decodes", lambda device: decode)
    x, weight, _ = case(4096, n, k)
    a, b = _gemm.encode(x, "fp32", "activation"), _gemm.encode(weight, "fp32", "weight")
    whole = _gemm.dense("triton", a, b, torch.float32)
    used = set()
    for count in (1, 7, 64, 200, 1000, 4096):
        used.add(module.tile_of(count, n, module._tiles(x.device)))
        for start in (0, 5, 4096 - count):
            part = slice(start, min(start + count, 4096))
            rows = a._replace(codes=a.codes[part], scale=a.scale[part])
            assert torch.equal(_gemm.dense("triton", rows, b, torch.float32), whole[part])
    assert n < 16384 or len(used) == len(module._tiles(x.device))
    experts = b._replace(codes=b.codes.expand(3, -1, -1), scale=b.scale.expand(3, -1, -1))
    ends = torch.tensor([70, 70, 4096], device="cuda", dtype=torch.int32)
    got = _gemm_grouped.grouped("triton", a, experts, ends, torch.float32)
    assert torch.equal(got, whole)


def _gemm_triton():
    from miles.precision import _gemm_triton  # imports triton, which not every machine has

    return _gemm_triton


def test_explain_takes_a_fast_backend_on_this_gpu():
    text = explain(BlockFP8(), 4096, 7168, 16384, "cuda")
    assert any(f"fprop fp8: {name}" in text for name in ("deepgemm", "scaled_mm")), text


def test_not_finite_in_is_not_finite_out(backend):
    for bad in (torch.nan, torch.inf):
        x, weight, dy = case(130, 256, 640)
        with torch.no_grad():
            x[3, 7], dy[5, 9] = bad, bad
        y, dx, _ = step(lambda x, w: linear(x, w, BlockFP8(), backend=backend), x, weight, dy)
        assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()
        assert not dx[5].isfinite().any() and dx[6:].isfinite().all()


def test_no_rows(backend):
    x, weight, dy = case(0, 256, 640)
    y, dx, dw = step(lambda x, w: linear(x, w, RECIPES[0], backend=backend), x, weight, dy)
    assert y.shape == (0, 256) and dx.shape == (0, 640) and not dw.any()


def test_nothing_waits_for_the_gpu(backend):
    x, weight, dy = case(512, 384, 512)

    def call():
        return step(lambda x, w: linear(x, w, RECIPES[0], backend=backend), x, weight, dy)

    call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_keeps_float32_gradients(backend):
    x, weight, dy = case(512, 384, 512, torch.float32)
    x = x.detach().float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = linear(x, weight, BlockFP8(), backend=backend)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = dy.float().t() @ x.detach().bfloat16().float()
    assert error(dw, exact) < 1e-4  # float32 sums, never rounded to bf16 (TF32 is off)


def test_a_compiled_layer_is_the_eager_one(backend):
    recipe = RECIPES[0]

    def layer(x, weight):
        return torch.nn.functional.silu(linear(x, weight, recipe, backend=backend))

    x, weight, dy = case(512, 384, 512, torch.float32)
    eager = step(layer, x, weight, dy)
    compiled = step(torch.compile(layer, fullgraph=True), x, weight, dy)
    for a, b in zip(compiled, eager, strict=True):
        assert error(a, b) < 3e-2  # the compiler's silu rounds less, and FP8 may flip a code


# --- experts


@pytest.mark.parametrize("counts", [[3, 0, 140, 257], [0, 0, 0, 64], [128, 128]], ids=str)
@pytest.mark.parametrize("mode", ["fp8", "dequant", "bf16"])
def test_experts_are_those_of_the_reference(of_experts, counts, mode):
    wgrad = mode if of_experts == "triton" else "bf16"
    recipe = BlockFP8(scale="ue8m0", fprop=mode, dgrad=mode, wgrad=wgrad)
    ends = torch.tensor(counts, device="cuda").cumsum(0)
    x, weight, dy = case(sum(counts), 256, 384, lead=(len(counts),))
    name = of_experts if mode == "fp8" else "auto"
    got = step(lambda x, w: grouped_linear(x, w, ends, recipe, backend=name), x, weight, dy)
    spans = itertools.pairwise([0, *ends.tolist()])
    parts = []
    for expert, (start, end) in enumerate(spans):
        one = (x.detach()[start:end].requires_grad_(), weight[expert].detach().requires_grad_())
        parts.append(
            step(lambda x, w: linear(x, w, recipe, backend="reference"), *one, dy[start:end])
        )
    joined = (torch.cat, torch.cat, torch.stack)
    for a, b, join in zip(got, zip(*parts, strict=True), joined, strict=True):
        assert error(a, join(b)) < BFLOAT16
    empty = [i for i, count in enumerate(counts) if count == 0]
    assert not got[2][empty].any()


def test_experts_do_not_wait_for_the_gpu(of_experts):
    recipe = BlockFP8(wgrad="fp8" if of_experts == "triton" else "bf16")
    ends = torch.tensor([3, 3, 140, 300], device="cuda")
    x, weight, dy = case(300, 256, 384, lead=(4,))

    def call():
        return step(
            lambda x, w: grouped_linear(x, w, ends, recipe, backend=of_experts), x, weight, dy
        )

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recipe", [BlockFP8(), Int4()], ids=["fp8", "int4"])
def test_nan_after_a_step_is_named_at_the_next_one(recipe):
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128, bias=False) for _ in range(3)))
    model = model.cuda().bfloat16()
    convert_(model, [("*", recipe)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    for turn in range(2):
        model(x).float().sum().backward()
        if turn == 1:
            model[1].weight.grad[3, 2] = float("nan")
        optimizer.step()
        optimizer.zero_grad()
    assert model(x).isnan().any()
    optimizer.step()
    with pytest.raises(NonFiniteError, match=r"1\.weight held NaN or infinity in the"):
        model(x)
