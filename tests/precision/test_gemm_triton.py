"""The Triton GEMMs: values under the interpreter, and the code that they become for each GPU."""

import re

import pytest
import torch

from miles.errors import DtypeError, ShapeError
from miles.precision import _gemm

pytest.importorskip("triton")
from miles.precision import _gemm_triton

INSTRUCTION = {80: "m16n8k16", 89: "m16n8k32", 90: r"m64n\d+k32"}
"""Of the products of each compute capability; its k is how far a sum goes at once."""


@pytest.mark.parametrize("part", ["sizes", "layouts", "codes", "experts", "linear"])
def test_the_kernels_under_the_interpreter_have_the_sums_of_the_reference(interpreted, part):
    error = interpreted(f"gemm_{part}")
    assert not error, error


# --- the same bits for a row in any company


@pytest.mark.parametrize("tiles", [_gemm_triton.TILES, _gemm_triton.DECODING_TILES], ids=len)
def test_larger_results_get_larger_tiles_and_all_have_rows_for_one_instruction(tiles):
    sizes = [(1, 512), (64, 8192), (100, 16384), (4096, 7168)]
    chosen = [_gemm_triton.tile_of(*size, tiles) for size in sizes]
    assert chosen == sorted(chosen, key=lambda tile: tile.rows * tile.columns)
    assert chosen[0] == tiles[-1] and chosen[-1] == tiles[0]
    for tile in tiles:
        assert tile.rows % 64 == 0 and 128 % tile.columns == 0


def assembly(capability: int, square: bool, tile: _gemm_triton.Tile) -> str:
    """PTX of the dense kernel for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = _gemm_triton._dense_kernel.arg_names
    codes = torch.empty(1, 128, dtype=torch.uint8 if capability < 89 else torch.float8_e4m3fn)
    options = _gemm_triton._options(codes, square, tile)
    fixed = {name: options.pop(name) for name in names if name.isupper()}
    pointers = {"out_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    pointers |= dict.fromkeys(("a_ptr", "b_ptr"), "*u8" if capability < 89 else "*fp8e4nv")
    aligned = [*pointers, "depth", "a_stride", "b_stride"]
    source = ASTSource(
        _gemm_triton._dense_kernel,
        {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"]


@pytest.mark.parametrize("capability", INSTRUCTION)
def test_every_tile_multiplies_by_the_same_instruction(capability):
    tiles = _gemm_triton.TILES if capability >= 89 else _gemm_triton.DECODING_TILES
    for tile in tiles:
        code = assembly(capability, True, tile)
        found = set(re.findall(r"mma\S*\.(m\d+n\d+k\d+)\.", code))
        assert len(found) == 1 and re.fullmatch(INSTRUCTION[capability], *found), found
        assert "fma.rn.f32" in code and "cp.async" in code


# --- bad input


def test_operands_that_do_not_fit_raise():
    a = _gemm.encode(torch.ones(5, 256), "fp32", "activation")
    b = _gemm.encode(torch.ones(130, 256), "fp32", "weight")
    ends = torch.tensor([5], dtype=torch.int32)
    one = b._replace(codes=b.codes[None], scale=b.scale[None])
    rows = _gemm.encode(torch.ones(130, 256), "fp32", "gradient")
    dense, grouped = _gemm_triton.dense, _gemm_triton.grouped
    weight = _gemm_triton.grouped_weight
    calls = [
        (DtypeError, "codes of torch.uint8", dense, (a._replace(codes=a.codes.byte()), b)),
        (DtypeError, "scales of torch.float64", dense, (a._replace(scale=a.scale.double()), b)),
        (
            ShapeError,
            r"a has codes \(256, 5\) of strides",
            dense,
            (a._replace(codes=a.codes.t()), b),
        ),
        (ShapeError, "b has codes .* expected 2 dimensions", dense, (a, one)),
        (ShapeError, r"expected scales \(2, 2\) there", dense, (a, rows._replace(square=True))),
        (ShapeError, r"expected scales \(130, 2\) there", dense, (a, b._replace(square=False))),
        (ShapeError, "a has square=True", dense, (b, a)),
        (
            ShapeError,
            "one last dimension",
            dense,
            (a, _gemm.encode(torch.ones(1, 9), "fp32", "weight")),
        ),
        (ShapeError, "ends is torch.int64", grouped, (a, one, ends.long())),
        (ShapeError, r"expected contiguous torch.int32 \(1,\)", grouped, (a, one, ends.repeat(2))),
        (ShapeError, "b square=True; expected a multiple of 128", weight, (a, b, ends)),
    ]
    for kind, text, function, arguments in calls:
        with pytest.raises(kind, match=text):
            function(*arguments, torch.bfloat16)
