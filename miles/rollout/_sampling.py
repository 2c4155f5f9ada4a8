"""Random draws that belong to a request, and tokens from them.

Shapes: R requests in a step, V vocabulary entries.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Draws", "draw", "uniforms"]

DRAWS = 256
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 by the golden ratio
STRIDE = np.uint64(1 << 32)
"""Numbers that belong to a step, whatever the number of draft tokens: another engine that goes on
with an answer finds none that it has used."""


class Draws:
    """Uniform numbers of one request, by position: the same on every device, in any company."""

    def __init__(self, seed: int | None) -> None:
        self.seed = random.getrandbits(48) if seed is None else seed
        # The generator reads 32 bits. Seeds below 2**32 stay as they are.
        folded = (self.seed ^ (self.seed >> 32) * 0x9E3779B1) % 2**32
        self._generator = torch.Generator().manual_seed(folded)
        self._values: list[float] = []

    def __getitem__(self, position: int) -> float:
        while len(self._values) <= position:
            block = torch.rand(DRAWS, generator=self._generator, dtype=torch.float64)
            self._values += block.tolist()
        return self._values[position]


def draw(
    logits_RV: Tensor, temperatures: list[float], draws: list[float]
) -> tuple[list[int], list[float]]:
    """One token a row by inverting the distribution function, and its log-prob."""
    device = logits_RV.device
    temperature_R1 = torch.tensor([t or 1.0 for t in temperatures], device=device)[:, None]
    logprobs_RV = (logits_RV.float() / temperature_R1).log_softmax(-1)
    cdf_RV = logprobs_RV.double().exp().cumsum(-1)
    total_R1 = cdf_RV[:, -1:]
    draw_R1 = torch.tensor(draws, dtype=torch.float64, device=device)[:, None] * total_R1
    draw_R1 = torch.minimum(draw_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    tokens_R1 = torch.searchsorted(cdf_RV, draw_R1, right=True)
    if not all(temperatures):
        greedy_R1 = torch.tensor([t == 0 for t in temperatures], device=device)[:, None]
        tokens_R1 = torch.where(greedy_R1, logprobs_RV.argmax(-1, keepdim=True), tokens_R1)
    tokens_R1 = tokens_R1.clamp(max=logits_RV.shape[1] - 1)
    return tokens_R1[:, 0].tolist(), logprobs_RV.gather(-1, tokens_R1)[:, 0].tolist()


def uniforms(
    seeds: Sequence[int], steps: Sequence[int], count: int, salt: int = 0
) -> NDArray[np.float64]:
    """Float64 `[R, count]` in [0, 1): what R requests draw at their steps, each another number;
    with another salt, all others.

    SplitMix64 of a counter, so that any place of a request's stream costs the same. Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> uniforms([7, 7], [0, 1], 2).round(3).tolist() == [
        ...     uniforms([7], [0], 2)[0].round(3).tolist(),
        ...     uniforms([7], [1], 2)[0].round(3).tolist()]
        True
    """
    salted = [(seed + salt * int(GOLDEN)) % 2**64 for seed in seeds]
    seed_R1 = np.array(salted, dtype=np.uint64)[:, None]
    first_R1 = np.array(steps, dtype=np.uint64)[:, None] * STRIDE
    place_RU = first_R1 + np.arange(1, count + 1, dtype=np.uint64)
    bits_RU = _mixed(_mixed(seed_R1) + np.multiply(place_RU, GOLDEN, dtype=np.uint64))
    return (bits_RU >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
