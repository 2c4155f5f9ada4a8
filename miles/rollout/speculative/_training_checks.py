"""What a `DraftTrainer` is made of, looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from miles.errors import SettingError
from miles.rollout.speculative._capture import unwrapped

__all__ = [
    "check_made_for",
    "check_optimizer",
    "check_own",
    "check_settings",
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


def check_own(named: Mapping[str, nn.Parameter], policy: nn.Module | None) -> None:
    """Raise `SettingError` unless there are parameters, none of them the policy's."""
    if not named:
        raise SettingError("the draft has no parameter that requires a gradient")
    policys = {id(p) for p in policy.parameters()} if policy is not None else set()
    shared = [name for name, parameter in named.items() if id(parameter) in policys]
    if shared:
        raise SettingError(
            f"the draft's {shared[:8]} are parameters of the policy, which its optimizer would "
            "train; hold them by reference, outside named_parameters(), or freeze them"
        )


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
