"""A router of megatron-core with its choice of experts noted or forced.

megatron-core hands the scores of a router to `router.router_replay.get_replay_topk` and makes the
gate weights from what that returns. So nothing needs to be intercepted: while something is noted or
forced, ours stands in `router.router_replay`.

Shapes: N tokens of a forward pass, E experts, K of them a token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from miles.errors import RoutingError, UnsupportedModelError
from miles.moe import _checkpoint
from miles.moe._intercept import Forced, Router
from miles.moe.families import RouterFamily

__all__ = ["MegatronRouter"]

FAMILY = RouterFamily(router="TopKRouter", topk="topk")


class MegatronRouter(Router):
    """One `TopKRouter`; stands in for its `RouterReplay` while something is noted or forced."""

    def __init__(self, name: str, module: Any) -> None:
        self.layer_number = int(module.layer_number)
        called = f"{name} (layer {self.layer_number} of the model)"
        super().__init__(name, module, FAMILY, experts=None, name=called)
        self._chose = False
        self._check: RemovableHandle | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What megatron-core calls in place of its own topk, with its parameter names.

        Args:
            scores: `[N, E]` of all experts, before any mask over groups.
            topk: K.
            num_groups: handed on.
            group_topk: handed on.
            default_compute_topk: the router's own choice.

        Returns:
            Scores `[N, K]` and int64 ids `[N, K]` of the experts that are chosen.
        """
        assert default_compute_topk is not None
        self._chose = True
        forced = self.forced
        if forced is None:
            values, ids_NK = default_compute_topk(scores, topk, num_groups, group_topk)
        else:
            bind(self, forced)
            ids_NK = self.plan(forced, scores)
            if forced.holes_N is not None or forced.natural is not None:
                live_NK = default_compute_topk(scores, topk, num_groups, group_topk)[1]
                if forced.natural is not None:
                    forced.natural.note(live_NK, self.topk)
                if forced.holes_N is not None:
                    ids_NK = torch.where(forced.holes_N[:, None], live_NK, ids_NK)
            values = scores.gather(1, ids_NK)
        if self.chosen is not None and not _checkpoint.in_backward():
            self.chosen.note(ids_NK, self.topk)
        return values, ids_NK

    def _put_up(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        module: Any = self.module
        below = module.router_replay
        recomputing = self.forced is not None and self.forced.recomputing
        if isinstance(below, MegatronRouter) and not recomputing:
            self._depth = 0
            raise RoutingError(
                f"{self.name} is being recorded or replayed by another object for the same model; "
                "expected one, whose record() and replay() may be nested"
            )
        self._below, self._chose = below, False
        module.router_replay = self
        self._check = module.register_forward_hook(self._check_that_it_chose)

    def _take_down(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._check is not None:
            self.module.router_replay = self._below
            self._check.remove()
            self._check = self._below = None

    def _check_that_it_chose(self, *_: Any) -> None:
        if not self._chose:
            raise RoutingError(
                f"{self.name} chose its experts without asking its router_replay, so its routing "
                "can be neither recorded nor replayed; expected moe_router_fusion=False and a load "
                "balancing other than sinkhorn"
            )
        self._chose = False

    def _drop_holes(self) -> RemovableHandle:
        """Zero the final gate weights of rows that were not recorded.

        They stay in the routing map, since the dispatchers count K rows for every token.
        """

        def zero(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> Any:
            forced = self.forced
            if forced is None or forced.holes_N is None or not forced.drop:
                return None
            probs_NE, map_NE = output
            return probs_NE.masked_fill(forced.holes_N[:, None], 0), map_NE

        return self.module.register_forward_hook(zero)


def bind(router: MegatronRouter, forced: Forced) -> None:
    """Have the recomputed regions that are running, if any, choose the same when they run again.

    megatron-core's `tensor_parallel.checkpoint` keeps, in the context of its autograd function, the
    function that it runs a second time in the backward pass; around that one goes what the routers
    had to choose. So the order of micro-batches does not matter, and the binding lives and dies
    with the region's part of the graph. Other regions are left to `_checkpoint`.

    Raises:
        UnsupportedModelError: the router runs inside another autograd function.
        RoutingError: the router is run again, and its first run was not replayed.
    """
    _checkpoint.bind(router, forced)
    for context in _first_runs(router):
        if not isinstance(context.run_function, _checkpoint.Again):
            context.run_function = _checkpoint.Again(context.run_function)
        context.run_function.forced[router] = forced.again()


def _first_runs(router: MegatronRouter) -> list[Any]:
    """Contexts of the calls of `tensor_parallel.checkpoint` whose first run led here."""
    from megatron.core.tensor_parallel.random import CheckpointFunction

    first_run = CheckpointFunction.forward.__code__
    found: list[Any] = []
    call = sys._getframe()
    while call.f_back is not None:
        call = call.f_back
        code = call.f_code
        if code is first_run:
            found.append(call.f_locals["ctx"])
        elif code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            raise UnsupportedModelError(
                f"{router.name} runs inside {code.co_qualname} of {code.co_filename}, which may "
                "run it again with other experts; expected the recomputation of "
                "megatron.core.tensor_parallel.checkpoint, without fp8 or fp4 (these take that of "
                "TransformerEngine)"
            )
    return found
