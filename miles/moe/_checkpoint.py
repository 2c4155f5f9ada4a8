"""Activation checkpointing runs a forward pass again in the backward pass, with the same experts.

By then another micro-batch may be replayed, or none. Non-reentrant checkpointing keeps, for each
region, a function that runs it again; around that one goes what the region's routers had to choose.
The binding lives and dies with the region's part of the graph, in whatever order these are run.
"""

from __future__ import annotations

import contextlib
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import nn

from miles.errors import RoutingError, UnsupportedModelError

if TYPE_CHECKING:
    from miles.moe._intercept import Forced, Router

__all__ = ["bind", "in_backward", "refuse_compiled_regions"]


def in_backward() -> bool:
    """Whether this runs in a backward pass, as the second run of a checkpointed region does."""
    # No public name tells; torch.utils.checkpoint asks the same way.
    return torch._C._current_graph_task_id() != -1


def bind(router: Router, forced: Forced) -> None:
    """Have the regions that are running, if any, choose the same when they are run again.

    Raises:
        UnsupportedModelError: a region is of the reentrant kind, which keeps no such function.
        RoutingError: this is a second run, of a first one that was not replayed.
    """
    if in_backward() and not forced.recomputing:
        raise RoutingError(
            f"{router.name} is run again in a backward pass inside replay(), and its first run was "
            "not replayed, so the tape of this block is not its own; leave replay() before the "
            "backward pass of what was not replayed"
        )
    if not torch.is_grad_enabled():
        _refuse_reentrant(router)
        return
    for region in _regions():
        if not isinstance(region.recompute_fn, Again):
            region.recompute_fn = Again(region.recompute_fn)
        region.recompute_fn.forced[router] = forced.again()


class Again:
    """The second run of a region, with the choices of the first."""

    def __init__(self, recompute: Any) -> None:
        self._recompute = recompute
        self.forced: dict[Router, Forced] = {}

    def __call__(self, *args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for router, forced in self.forced.items():
                stack.enter_context(router.forcing(forced))
            return self._recompute(*args)


def _regions() -> list[Any]:
    """The non-reentrant regions (`_CheckpointFrame`) whose first run this is, the innermost first.

    Each has hooks on saved tensors that close over it. Others may lie above (`save_on_cpu`), and
    torch shows the top ones only, so all are taken off and put back.
    """
    hooks: list[Any] = []
    regions: list[Any] = []
    stack: Any = torch._C._autograd  # torch's stubs have these without their results
    try:
        while top := stack._top_saved_tensors_default_hooks(True):
            stack._pop_saved_tensors_default_hooks()
            hooks.append(top)
            region = _region_of(top[0])
            if region is not None:
                regions.append(region)
    finally:
        for pack, unpack in reversed(hooks):
            stack._push_saved_tensors_default_hooks(pack, unpack)
    return regions


def _region_of(pack: Any) -> Any:
    if not isinstance(pack, types.FunctionType) or pack.__closure__ is None:
        return None
    if pack.__code__.co_filename != torch.utils.checkpoint.__file__:
        return None
    closed_over = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    return closed_over["frame"].cell_contents if "frame" in closed_over else None


_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__


def _refuse_reentrant(router: Router) -> None:
    """Look through the calls that led here for the kind whose first run keeps no graph."""
    call = sys._getframe()
    while call.f_back is not None:
        call = call.f_back
        if call.f_code is _REENTRANT:
            raise UnsupportedModelError(
                f"{router.name} runs under reentrant activation checkpointing, which would run it "
                "again after the replay with other experts; expected use_reentrant=False, for "
                "transformers model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False})'
            )


def refuse_compiled_regions(model: nn.Module) -> None:
    """A compiled region inside a checkpointed layer can't tell the layer what it chose.

    Raises:
        UnsupportedModelError: a layer is checkpointed by transformers and compiled by itself.
    """
    if not model.training:
        return
    for name, module in model.named_modules():
        # transformers sets the flag on whole models too; only such a layer wraps its own call.
        if not vars(module).get("gradient_checkpointing") or not any(
            cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__
        ):
            continue
        if any(part._compiled_call_impl is not None for part in module.modules()):
            raise UnsupportedModelError(
                f"{name or type(model).__name__} is checkpointed around a compiled module, whose "
                "second run could not be given the same experts; expected torch.compile(model), "
                "with checkpointing inside, or one of the two"
            )
