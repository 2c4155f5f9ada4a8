"""Small corrections, for their tests."""

import torch

from miles import Packed
from miles.losses.corrections import (
    Correction,
    MaxStaleness,
    OffPolicyNegative,
    Reject,
    Weight,
    importance_weights,
    interpolate_proximal,
    veto,
)
from miles.losses.metrics import reduce_metrics

TRUNCATE = Weight(level="token", mode="truncate", high=2.0)


def of_ratios(ratios, *, width=None, **settings) -> Correction:
    """Every token trainable; `width` tokens a sequence."""
    x_T = torch.tensor(ratios, dtype=torch.float64).log()
    packed = Packed.from_padded(torch.ones(len(ratios) // (width or 1), width or 1).bool())
    return importance_weights(x_T - 1, torch.full_like(x_T, -1.0), packed, **settings)


def readings(correction) -> dict[str, float]:
    return {key: value.item() for key, value in reduce_metrics(correction.metrics).items()}


def proximal(behave, current, versions, *, proximal_version=4, current_version=5, mask=None):
    mask = [True] * len(behave) if mask is None else mask
    return interpolate_proximal(
        torch.tensor(behave, dtype=torch.float64, requires_grad=True),
        torch.tensor(current, dtype=torch.float64, requires_grad=True),
        Packed.from_padded(torch.tensor([mask])),
        versions_T=torch.tensor(versions),
        proximal_version=proximal_version,
        current_version=current_version,
    )


def versions_of(step, seed):
    """0 to 5 where trainable, nonsense elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    versions_T = torch.randint(0, 6, step.old_T.shape, generator=rng)
    return torch.where(step.packed.mask_T, versions_T, torch.arange(len(versions_T)) % 3 * 50 - 1)


ALL_RULES = [
    OffPolicyNegative(delta=0.3),
    MaxStaleness(4),
    veto(0.2),
    Reject(level="token", statistic="k2", high=1.0),
]
