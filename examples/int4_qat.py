"""GRPO with an INT4 engine: a bf16 trainer, and one that trains through the rounding.

    python examples/int4_qat.py                    # about four minutes on two CPU cores
    python examples/int4_qat.py --group-size 64    # coarser scales

The engine serves weights of 4 bits with a scale for each group of 32. The loop of `grpo_loop.py`
runs three ways from one warmed-up model: all in bf16; the engine in INT4 and the trainer in bf16;
both with INT4 weights (quantisation-aware training: float32 master weights, rounded in each
forward pass, gradients straight through).

Expected: |trainer - engine| of log-probs is 1e-1 with INT4 in the engine only, and 2e-7 (float32's
rounding) in bf16 and with INT4 in both. Logged in `examples/results/precision`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from precision_ways import WaysConfig, run_ways

from miles.precision import Int4


@dataclass(frozen=True, kw_only=True)
class Int4Config(WaysConfig):
    """GRPO in bf16, with INT4 weights in the engine only, and in both trainer and engine."""

    out: Path = Path("runs/int4_qat")
    """Folder of the runs, one for each way, and of mismatch.csv and mismatch.png."""
    width: int = 64
    """Hidden size of model and experts."""
    group_size: Literal[32, 64] = 32
    """Weights that share a scale."""


def main(config: Int4Config) -> None:
    run_ways(config, Int4(group_size=config.group_size))


if __name__ == "__main__":
    main(tyro.cli(Int4Config))
