"""Random draws that belong to a request, and tokens from them.

Shapes: R requests in a step, V vocabulary entries.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["Draws", "draw"]

DRAWS = 256


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
