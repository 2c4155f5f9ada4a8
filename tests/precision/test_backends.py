"""Who multiplies, why, and in what layout the scales arrive."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from miles.errors import SettingError, ShapeError
from miles.precision import BlockFP8, _gemm, _gemm_grouped, backends
from miles.precision._gemm import Operand
from miles.precision.backends import BACKENDS, Gemm, choose, explain, refusal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def gemm(**changes) -> Gemm:
    given = {"kind": "fprop", "rows": 64, "columns": 256, "depth": 256, "dtype": torch.bfloat16}
    return Gemm(**(given | {"device": CUDA} | changes))


@pytest.fixture
def hopper(monkeypatch):
    """As if there were a Hopper GPU, with DeepGEMM, Triton and a torch that has scaled_mm."""
    backends.warn_once.cache_clear()
    backends._without_sm90.cache_clear()
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_without_triton", lambda: None)
    monkeypatch.setattr(backends, "_without_scaled_mm", lambda: None)
    monkeypatch.setattr(backends, "deep_gemm", lambda: types.SimpleNamespace())
    yield
    backends._without_sm90.cache_clear()


@pytest.fixture
def ampere(hopper, monkeypatch):
    """As if there were an A100."""
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 0))


# --- the choice


def test_auto_is_the_reference_on_the_cpu():
    assert choose("auto", gemm(device=CPU)) == "reference"


def test_without_a_gpu_every_fast_backend_says_what_it_needs():
    for name in ("deepgemm", "scaled_mm"):
        assert "Hopper" in refusal(name, gemm(device=CPU))
        with pytest.raises(SettingError, match=f"backend='{name}' can't run fprop .*Hopper"):
            choose(name, gemm(device=CPU))
    assert refusal("triton", gemm(device=CPU)) == "the tensors are on cpu; it needs a CUDA GPU"
    with pytest.raises(SettingError, match=r"backend='triton' can't run .*a CUDA GPU"):
        choose("triton", gemm(device=CPU))
    if not torch.cuda.is_available():
        for name in ("deepgemm", "scaled_mm", "triton"):
            assert "no CUDA device" in refusal(name, gemm())


def test_an_unknown_backend_is_refused_with_the_list():
    with pytest.raises(SettingError, match=r"'cutlass'; expected 'auto' or one of .*deepgemm"):
        choose("cutlass", gemm())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"depth": 192}, "192 features; expected a multiple of 128"),
        ({"columns": 200}, "200 features; expected a multiple of 16"),
        ({"dtype": torch.float32}, "x is torch.float32"),
        ({"kind": "wgrad", "rows": 72}, "72 features; expected a multiple of 16"),
    ],
)
def test_a_size_that_a_backend_lacks_is_refused_by_name_and_said_once_by_auto(
    hopper, monkeypatch, changes, reason
):
    asked = gemm(**changes)
    for name in ("deepgemm", "scaled_mm"):
        with pytest.raises(SettingError, match=reason):
            choose(name, asked)
    monkeypatch.setattr(backends, "_without_triton", lambda: "it is not installed")
    with pytest.warns(UserWarning, match=f"runs as dequant_bf16.*{reason}.*triton: it is not"):
        assert choose("auto", asked) == "dequant_bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = "depth" if asked.kind == "wgrad" else "rows"
        assert choose("auto", gemm(**(changes | {tokens: 77}))) == "dequant_bf16"


def test_tokens_may_be_any_number(hopper):
    assert choose("auto", gemm(rows=3)) == "deepgemm"
    assert choose("scaled_mm", gemm(kind="wgrad", depth=3)) == "scaled_mm"


def test_triton_takes_any_size(hopper):
    odd = [{"depth": 200}, {"columns": 3}, {"dtype": torch.float32}, {"kind": "wgrad", "rows": 7}]
    for changes in odd:
        assert refusal("triton", gemm(experts=True, **changes)) is None
    with pytest.warns(UserWarning, match="runs as triton, no faster than bf16"):
        assert [choose("auto", gemm(**changes)) for changes in odd] == ["triton"] * 4


def test_triton_without_tensor_cores_of_fp8_says_that_it_is_not_faster_than_bf16(ampere):
    with pytest.warns(UserWarning, match=r"runs as triton, no faster.*capability 8\.0.*9\.0"):
        assert choose("auto", gemm()) == "triton"
    text = explain(BlockFP8(), 8, 256, 256, CUDA)
    assert "fprop fp8: triton, the first that can run it; no faster than bf16\n" in text


def test_triton_says_what_it_lacks(hopper, monkeypatch):
    monkeypatch.setattr(backends, "_without_triton", lambda: "the package triton is not installed")
    with pytest.raises(SettingError, match="the package triton is not installed"):
        choose("triton", gemm())
    monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
    with pytest.raises(SettingError, match=r"cuda has compute capability 7\.5; it needs 8\.0"):
        choose("triton", gemm())


def test_the_second_backend_steps_in_where_the_first_is_missing(hopper, monkeypatch):
    monkeypatch.setattr(backends, "deep_gemm", lambda: "the package is not installed")
    assert choose("auto", gemm()) == "scaled_mm"
    with pytest.raises(SettingError, match="not installed"):
        choose("deepgemm", gemm())
    with pytest.raises(SettingError, match="no fprop of experts"):
        choose("scaled_mm", gemm(experts=True))


def test_explain_names_the_choice_and_every_refusal():
    text = explain(BlockFP8(wgrad="fp8"), 8, 256, 256, "cpu")
    for kind in ("fprop", "dgrad", "wgrad"):
        assert f"{kind} fp8: reference" in text
    assert text.count("not deepgemm: the tensors are on cpu") == 3
    assert "wgrad bf16: a plain GEMM of unrounded" in explain(BlockFP8(), 8, 256, 256, "cpu")
    assert "dequantised" in explain(BlockFP8(dgrad="dequant"), 8, 256, 256, "cpu")


def test_explain_on_a_hopper_gpu(hopper):
    text = explain(BlockFP8(), 8, 256, 192, "cuda")
    assert "fprop fp8: triton" in text and "dgrad fp8: deepgemm" in text
    assert "not scaled_mm: it sums over 192 features" in text
    experts = explain(BlockFP8(wgrad="fp8"), 8, 256, 256, "cuda", experts=True)
    assert "wgrad fp8: triton" in experts and "no wgrad of experts" in experts


def test_every_backend_states_its_scale_layout():
    assert all(able.scales for able in BACKENDS.values())


# --- layouts of scales


@pytest.mark.parametrize("rows", [16, 128, 144])
@pytest.mark.parametrize("depth", [128, 512, 640, 2048])
def test_scales_brought_into_place_pass_the_check_with_their_values(rows, depth):
    plain = torch.rand(rows, depth // 128)
    for scale in (plain, plain.t().contiguous().t(), torch.rand(rows, 40)[:, : depth // 128]):
        moved = _gemm.row_scale(scale)
        _gemm.check_row_scale(moved, (rows, depth))
        assert torch.equal(moved, scale)
        padded = _gemm.column_major(scale)
        assert torch.equal(padded, scale) and padded.stride(0) == 1 and padded.stride(1) % 4 == 0
    tiles = torch.rand(3, depth // 128)
    for scale in (tiles, tiles.t().contiguous().t()):
        moved = _gemm.rhs_scale(scale)
        _gemm.check_rhs_scale(moved, (3 * 128, depth))
        assert torch.equal(moved[: depth // 128], scale.t())


@pytest.mark.parametrize(
    "scale",
    [
        torch.rand(32, 5),  # row by row
        torch.rand(5, 36).t()[:32],  # with gaps
        torch.rand(5, 32).t().double(),
        torch.rand(6, 32).t(),
        torch.rand(5, 32),
    ],
    ids=["row-major", "gaps", "float64", "too many", "transposed"],
)
def test_scales_of_rows_in_a_wrong_layout_raise(scale):
    with pytest.raises(ShapeError, match=r"expected float32 \(32, 5\) of strides \(1, 32\)"):
        _gemm.check_row_scale(scale, (32, 640))


@pytest.mark.parametrize(
    "scale",
    [torch.rand(5, 3), torch.rand(8, 3), torch.rand(3, 5).t(), torch.rand(3, 8)],
    ids=["unpadded", "row-major", "L is 5", "untransposed"],
)
def test_scales_of_tiles_in_a_wrong_layout_raise(scale):
    with pytest.raises(ShapeError, match=r"expected float32 \(8, 3\) of strides \(1, 8\)"):
        _gemm.check_rhs_scale(scale, (3 * 128, 640))


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has no scaled_mm")
@pytest.mark.parametrize(("m", "n", "d"), [(16, 256, 128), (30, 256, 640), (130, 128, 512)])
def test_torchs_own_check_takes_what_scaled_mm_gets(m, n, d):
    def operand(rows, scales, square):
        codes = torch.empty(rows, d, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(scales, d // 128, device="meta")
        return Operand(codes, scale, square, torch.bfloat16)

    a = operand(m, m, False)
    assert _gemm.scaled_mm(a, operand(n, n // 128, True), torch.bfloat16).shape == (m, n)
    out = _gemm.scaled_mm(a, operand(n, n, False), torch.float32)
    assert out.shape == (m, n) and out.dtype == torch.float32


# --- the padded rows of DeepGEMM's grouped kernel


class Blockwise:
    """Multiplies as the kernel does: the expert of a block is that of its first row."""

    @staticmethod
    def m_grouped_fp8_gemm_nt_contiguous(a, b, out, layout):
        (codes, scale), (weight, weight_scale) = a, b
        assert codes.shape[0] % 128 == 0 and scale.stride() == (1, codes.shape[0])
        assert weight.is_contiguous() and layout.dtype == torch.int32
        out.fill_(torch.nan)
        for start in range(0, len(layout), 128):
            block = slice(start, start + 128)
            expert = int(layout[start])
            if expert < 0:
                continue
            assert set(layout[block].tolist()) <= {expert, -1}
            left = Operand(codes[block], scale[block], False, torch.bfloat16)
            right = Operand(weight[expert], weight_scale[expert], True, torch.bfloat16)
            out[block] = _gemm.reference(left, right, out.dtype)


@pytest.mark.parametrize("counts", [[3, 0, 128, 1], [0, 0, 0, 5], [129, 127, 256, 0], [128]])
def test_padded_experts_give_what_the_loop_gives(counts, monkeypatch):
    monkeypatch.setattr(backends, "deep_gemm", lambda: Blockwise)
    ends = torch.tensor(counts).cumsum(0).int()
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 256).bfloat16()
    a = _gemm.encode(x, "fp32", "activation")
    b = _gemm.encode(torch.randn(len(counts), 144, 256).bfloat16(), "fp32", "weight")
    expected = _gemm_grouped.grouped("reference", a, b, ends, torch.bfloat16)
    got = _gemm_grouped.grouped("deepgemm", a, b, ends, torch.bfloat16)
    # float32 sums of other numbers of rows may be added in another order: one step of bf16.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-5)
