"""Activation checkpointing runs a forward pass again in the backward pass, with the same experts.

By then another micro-batch may be replayed, or none. Non-reentrant checkpointing keeps, for each
region, a function that runs it again; around that one goes what the region's routers had to choose.
The binding lives and dies with the region's part of the graph, in whatever order these are run.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint

from miles.errors import RoutingError, UnsupportedModelError

if TYPE_CHECKING:
    from miles.moe._intercept import Forced, Router

__all__ = ["Again", "bind", "in_backward", "is_second_run"]


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
    regions = _regions()
    if not regions and not torch.is_grad_enabled():  # so the reentrant kind runs the first time
        _refuse_reentrant(router)
    for region in regions:
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


def is_second_run() -> bool:
    """Whether this is the second run of a region, and not a compiled graph's backward pass."""
    return any(_is_of_checkpoint(pack) and not _region_of(pack) for pack, _ in _hooks())


def _regions() -> list[Any]:
    """The non-reentrant regions (`_CheckpointFrame`) whose first run this is, the innermost first.

    Each has hooks on saved tensors that close over it.
    """
    return [region for pack, _ in _hooks() if (region := _region_of(pack)) is not None]


def _hooks() -> list[Any]:
    """The pairs of hooks on saved tensors, the last first.

    Others may lie above those of a region (`save_on_cpu`), and torch shows the top ones only, so
    all are taken off and put back.
    """
    hooks: list[Any] = []
    stack: Any = torch._C._autograd  # torch's stubs have these without their results
    try:
        while top := stack._top_saved_tensors_default_hooks(True):
            stack._pop_saved_tensors_default_hooks()
            hooks.append(top)
    finally:
        for pack, unpack in reversed(hooks):
            stack._push_saved_tensors_default_hooks(pack, unpack)
    return hooks


def _is_of_checkpoint(pack: Any) -> bool:
    pack = inspect.unwrap(pack)
    code = getattr(pack, "__code__", None)
    return code is not None and code.co_filename == torch.utils.checkpoint.__file__


def _region_of(pack: Any) -> Any:
    if not isinstance(pack, types.FunctionType) or pack.__closure__ is None:
        return None
    if not _is_of_checkpoint(pack):
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
