"""Run by `test_copies.py` in a process of its own: Triton's interpreter is chosen at import."""

import torch

from miles.sync import _copies, _kernels_triton
from miles.sync._checksum import block_sums, salt, weights
from tests.sync.copying import both


def write(sources, dtypes, pieces, out, sums, *, version):
    tables = _copies.tables(sources, dtypes, pieces)
    assert set(tables) == {"words", "bfloat16", "bytes"}
    _kernels_triton.copy(tables, out, sums, salt(version))


def main() -> None:
    both("cpu", write, exact=True)
    weights_K = weights(torch.device("cpu"))
    for num in (0, 1, 7, 100):
        words_BK = torch.randint(-(2**62), 2**62, (num, len(weights_K)))
        sums_B = torch.empty(num, dtype=torch.int64)
        _kernels_triton.sums(words_BK, weights_K, sums_B)
        assert torch.equal(sums_B, (words_BK * weights_K).sum(1))
        data = words_BK.flatten().view(torch.uint8)
        assert torch.equal(sums_B, block_sums(data, version=0))


if __name__ == "__main__":
    main()
