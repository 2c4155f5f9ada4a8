"""GRPO with an FP8 engine: a bf16 trainer, and one that computes in the engine's FP8.

    python examples/fp8_rl.py                      # about four minutes on two CPU cores
    python examples/fp8_rl.py --attention sdpa     # kernels whose bits depend on the batch's shape

The engine serves block FP8: weights rounded 128 x 128, activations 1 x 128. The loop of
`grpo_loop.py` runs three ways from one warmed-up model: all in bf16; the engine in FP8 and the
trainer in bf16; both in FP8.

Expected: |trainer - engine| of log-probs is 4e-2 with FP8 in the engine only, and 3e-7 (float32's
rounding) in bf16 and with FP8 in both; one step of the 25 with both had 3e-4, so that their mean is
1e-5.
Logged in `examples/results/precision`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from precision_ways import WaysConfig, run_ways

from miles.precision import BlockFP8


@dataclass(frozen=True, kw_only=True)
class Fp8Config(WaysConfig):
    """GRPO in bf16, with FP8 in the engine only, and in both trainer and engine."""

    out: Path = Path("runs/fp8_rl")
    """Folder of the runs, one for each way, and of mismatch.csv and mismatch.png."""
    scale: Literal["fp32", "ue8m0"] = "fp32"
    """Scales of blocks: any number, or powers of two."""


def main(config: Fp8Config) -> None:
    run_ways(config, BlockFP8(scale=config.scale))


if __name__ == "__main__":
    main(tyro.cli(Fp8Config))
