"""What a `DraftTrainer` is made of, looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from miles.errors import CheckpointError, SettingError
from miles.rollout.speculative._capture import unwrapped

__all__ = [
    "check_made_for",
    "check_optimizer",
    "check_settings",
    "check_state",
    "trouble_of",
    "own_parameters",
]


def check_settings(
    steps: int, share: float, warmup_steps: int, max_grad_norm: float | None
) -> None:
    """Raise `SettingError` for what is out of range."""
    if steps < 1:
        raise SettingError(f"steps is {steps}; expected 1 or more")
    if not 0 < share <= 1:
        raise SettingError(f"share is {share}; expected above 0 and at most 1")
    if warmup_steps < 0:
        raise SettingError(f"warmup_steps is {warmup_steps}; expected 0 or more")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise SettingError(f"max_grad_norm is {max_grad_norm}; expected above 0, or None")


def own_parameters(draft: Any, policy: nn.Module | None) -> dict[str, nn.Parameter]:
    """What a draft trains; `SettingError` if that is nothing, or some of it the policy's."""
    if not hasattr(draft, "named_parameters"):
        raise SettingError(
            f"{type(draft).__name__} has no weights to train; expected a draft with some, such as "
            "Eagle3Draft"
        )
    named = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    if not named:
        raise SettingError("the draft has no parameter that requires a gradient")
    policys = {id(p) for p in policy.parameters()} if policy is not None else set()
    shared = [name for name, parameter in named.items() if id(parameter) in policys]
    if shared:
        raise SettingError(
            f"the draft's {shared[:8]} are parameters of the policy, which its optimizer would "
            "train; hold them by reference, outside named_parameters(), or freeze them"
        )
    return named


def check_made_for(draft: Any, policy: nn.Module | None, steps: int) -> None:
    """Raise what the draft itself has against policy or steps, if it looks."""
    if hasattr(draft, "check_steps"):
        draft.check_steps(steps)
    inner = unwrapped(policy, "get_decoder")
    if inner is not None and hasattr(draft, "check_target"):
        draft.check_target(inner)


def check_optimizer(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> None:
    """Raise `SettingError` unless the optimizer is over just these."""
    theirs = {id(p) for settings in optimizer.param_groups for p in settings["params"]}
    if theirs != {id(p) for p in params}:
        raise SettingError(
            f"the optimizer holds {len(theirs)} parameters that are not the draft's {len(params)}; "
            "build it over the draft's parameters that require a gradient"
        )


def check_state(state: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
    """Raise `CheckpointError` unless the state is of these parameters."""
    missing = [key for key in ("draft", "optimizer", "version") if key not in state]
    if missing:
        raise CheckpointError(f"the state lacks {missing}; expected what state_dict() returned")
    shapes = {name: tuple(tensor.shape) for name, tensor in state["draft"].items()}
    expected = {name: tuple(p.shape) for name, p in named.items()}
    if shapes != expected:
        wrong = {n for n in shapes.keys() | expected if shapes.get(n) != expected.get(n)}
        raise CheckpointError(
            f"the state is of another draft; {sorted(wrong)[:8]} differ: got "
            f"{[shapes.get(n) for n in sorted(wrong)[:8]]}, expected "
            f"{[expected.get(n) for n in sorted(wrong)[:8]]}"
        )


def trouble_of(wrong_features: float, losses: Sequence[float], norm: float) -> list[str]:
    """What of a step is NaN or infinite, in words."""
    named = [(f"the loss of unrolled step {i}", loss) for i, loss in enumerate(losses)]
    named.append(("the norm of its gradient", norm))
    found = [f"{name} is {number}" for name, number in named if not math.isfinite(number)]
    if wrong_features:
        found.insert(0, f"{wrong_features:.0f} features of the policy are NaN or infinite")
    return found
