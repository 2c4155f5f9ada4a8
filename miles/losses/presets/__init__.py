"""Published algorithms as a few lines over the parts. Each returns `(loss, metrics)`.

Denominators are those of the whole step, from `count`. `correction` is this micro-batch's part of a
`Correction` for the gap to the engine. Advantages are the caller's: each docstring names the line
that makes them, `docs/papers.md` has them side by side.

Shapes: T tokens.
"""

from miles.losses.presets.critics import decoupled_ppo, ppo, vapo
from miles.losses.presets.groups import cispo, dapo, dr_grpo, gmpo, grpo, gspo, gspo_token, sapo
from miles.losses.presets.returns import (
    on_policy_distillation,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
)

__all__ = [
    "cispo",
    "dapo",
    "decoupled_ppo",
    "dr_grpo",
    "gmpo",
    "grpo",
    "gspo",
    "gspo_token",
    "on_policy_distillation",
    "ppo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "sapo",
    "vapo",
]
