"""Copies and sums in one pass: the reference against plain words, and the kernels against it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.sync import _copies, _kernels
from miles.sync._checksum import BLOCK, block_sums
from miles.sync._copies import Pieces
from miles.sync._filler import Filler
from tests.sync.copying import both

ROOT = Path(__file__).parents[2]


def test_the_kernels_under_the_interpreter_have_the_bytes_and_sums_of_the_reference():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.sync.interpreted_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_reference_writes_bytes_then_zeros_and_the_sums_of_both():
    out = torch.full((4 * BLOCK,), 7, dtype=torch.uint8)
    sums = torch.full((4,), 7, dtype=torch.int64)
    wide = torch.arange(4096.0) / 64
    given = [torch.tensor([1, 2, 3]), wide], [torch.int64, torch.bfloat16]
    pieces = Pieces(np.array([0, BLOCK]), np.array([24, BLOCK]), np.array([2, 0]))
    _copies.copy(*given, pieces, out, sums, version=5)
    assert out[2 * BLOCK :][:24].view(torch.int64).tolist() == [1, 2, 3]
    assert not out[2 * BLOCK + 24 : 3 * BLOCK].any()
    assert torch.equal(out[:BLOCK].view(torch.bfloat16), wide[2048:].bfloat16())
    assert out[BLOCK] == 7 == out[-1] and sums.tolist()[1::2] == [7, 7]
    assert torch.equal(sums[[0, 2]], block_sums(out, version=5)[[0, 2]])


@pytest.mark.parametrize(
    ("source", "dtype", "taken"),
    [
        (torch.zeros(3), torch.float32, True),
        (torch.zeros(4), torch.bfloat16, True),
        (torch.zeros(3), torch.bfloat16, False),  # 12 bytes
        (torch.zeros(9)[1:], torch.bfloat16, False),  # not at a multiple of 16
        (torch.zeros(4).double(), torch.float32, False),
        (torch.zeros(4).half(), torch.bfloat16, False),
        (torch.zeros(4, 4).T, torch.float32, False),
        (torch.zeros(4, device="meta"), torch.float32, False),
    ],
)
def test_what_is_copied_as_it_is(source, dtype, taken):
    assert _copies.is_taken(source, dtype, torch.device("cpu")) == taken


def test_the_cpu_has_no_kernels_and_a_gpu_without_triton_says_so_once(monkeypatch):
    assert _kernels.of(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "miles.sync._kernels_triton", None)
    monkeypatch.delattr("miles.sync._kernels_triton", raising=False)
    _kernels._load.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton cannot be imported .*miles\[kernels\]"):
        assert _kernels.of(torch.device("cuda")) is None
    assert _kernels.of(torch.device("cuda")) is None
    _kernels._load.cache_clear()


def fill(sources, dtypes, pieces, out, sums, *, version):
    for source, dtype, start, nbytes, block in zip(
        sources, dtypes, *(a.tolist() for a in vars(pieces).values()), strict=True
    ):
        first = start // dtype.itemsize
        view = out[block * BLOCK :][:nbytes]
        view[:], there = 0, out[block * BLOCK :][: -(-nbytes // BLOCK) * BLOCK]
        there[nbytes:] = 0
        with Filler(out, sums, version=version) as filler:
            filler.write(view.view(dtype), source.view(-1)[first:], block)


def test_the_filler_of_shared_memory_has_them_too():
    both("cpu", fill, exact=False)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_large_tensor_is_filled_by_several_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    source = torch.randint(256, (4000 * BLOCK - 5,), dtype=torch.uint8)
    out, sums = torch.zeros(4001 * BLOCK, dtype=torch.uint8), torch.zeros(4001, dtype=torch.int64)
    with Filler(out, sums, version=1) as filler:
        filler.write(out[BLOCK:][: len(source)], source, 1)
    assert torch.equal(out[BLOCK:-5], source)
    assert torch.equal(sums[1:], block_sums(out, version=1)[1:]) and sums[0] == 0
