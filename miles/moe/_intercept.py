"""A router's forward with its choice of experts noted or forced.

Shapes: N tokens of a forward pass, E experts, K of them a token.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miles.errors import RoutingError, UnsupportedModelError
from miles.moe import _checkpoint
from miles.moe.families import RouterFamily

__all__ = ["Choices", "Forced", "Router"]


class Choices:
    """What one router chose, pass by pass.

    A compiled graph can't append to a list without being compiled anew for each length, so it calls
    an operator that finds this object by the number in `key`.
    """

    passes: list[Tensor]
    """int16 `[N, K]` each."""

    def __init__(self) -> None:
        self.passes = []
        self.key = _NUMBERED.key(self)

    def note(self, ids: Tensor, topk: int) -> None:
        """Keep what a `topk` chose."""
        ids_NK = ids.detach().reshape(-1, topk)
        if torch.compiler.is_compiling():
            _note(self.key, ids_NK)
        else:
            self.passes.append(ids_NK.to(torch.int16))


class _Numbered:
    """Objects that operators of a compiled graph find again, by a number that is a tensor."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def key(self, thing: Any) -> Tensor:
        number = next(self._numbers)
        self._alive[number] = thing
        return torch.tensor(number)

    def get(self, key: Tensor) -> Any:
        """None once the object is gone."""
        return self._alive.get(int(key))


_NUMBERED = _Numbered()


# It changes nothing in `key`; saying so keeps the compiler from dropping a call without a result.
@torch.library.custom_op("miles::note_routing", mutates_args=("key",))
def _note(key: Tensor, ids_NK: Tensor) -> None:
    _NUMBERED.get(key).passes.append(ids_NK.to(torch.int16))


# What it returns is used, so the compiler keeps it, and it may run again in a backward graph.
@torch.library.custom_op("miles::bind_routing", mutates_args=())
def _bind(key: Tensor, ids_NK: Tensor) -> Tensor:
    forced: Forced | None = _NUMBERED.get(key)
    if forced is None:  # the backward graph of a block that has ended, which has its ids
        return ids_NK.clone()
    if not _checkpoint.in_backward() or _checkpoint.is_second_run():
        _checkpoint.bind(forced.router, forced)
    return ids_NK.clone()


@_bind.register_fake
def _(key: Tensor, ids_NK: Tensor) -> Tensor:
    return torch.empty_like(ids_NK)


@dataclass(eq=False)
class Forced:
    """What one router has to choose."""

    router: Router
    """The one."""
    ids_NK: Tensor
    """Unsigned or signed integers of any width; rows of `holes_N` mean nothing."""
    holes_N: Tensor | None
    """bool: rows in which the router chooses itself; None if there are none."""
    drop: bool = False
    """Zero the gate weights in the holes."""
    natural: Choices | None = None
    """Takes what the router would have chosen."""
    recomputing: bool = False
    """This is the forward pass that activation checkpointing runs again in the backward pass."""

    def __post_init__(self) -> None:
        self.key = _NUMBERED.key(self)

    def again(self) -> Forced:
        """The same choice in a second run of the same forward pass."""
        return Forced(self.router, self.ids_NK, self.holes_N, self.drop, recomputing=True)


class Router:
    """One router of a model; stands in for its forward while something is noted or forced.

    The stand-in stays the same object, or a compiled graph would be compiled anew each time it is
    put up. It may be taken down in another order than several were put up: one that is down passes
    everything on, and is removed as soon as it is on top.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        family: RouterFamily,
        experts: nn.Module | None,
        name: str | None = None,
    ) -> None:
        self.path, self.name = path, name or path  # where it is, and what errors call it
        self.module, self.family, self.experts = module, family, experts
        self.num_experts, self.topk = family.sizes(module)
        self.forced: Forced | None = None
        self.chosen: Choices | None = None
        self._depth = 0
        self._below: Any = None
        self._original: Callable[..., Any] = module.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model made inside a block chooses freely."""
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        raise RoutingError(
            f"{self.name} can't be pickled while it is recorded or replayed; expected the model "
            "to be pickled outside of record() and replay()"
        )

    @contextlib.contextmanager
    def noting(self, choices: Choices) -> Iterator[None]:
        """Append what reaches the experts to `choices`."""
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "chosen", self.chosen)
            self.chosen = choices
            self._put_up()
            stack.callback(self._take_down)
            yield

    @contextlib.contextmanager
    def forcing(self, forced: Forced) -> Iterator[None]:
        """Choose what `forced` says."""
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "forced", self.forced)
            self.forced = forced
            self._put_up()
            stack.callback(self._take_down)
            if forced.drop:
                stack.callback(self._drop_holes().remove)
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._depth == 0:
            return self._original(*args, **kwargs)
        forced, chosen = self.forced, self.chosen
        if not torch.compiler.is_compiling():
            if forced is not None:
                _checkpoint.bind(self, forced)
            if _checkpoint.in_backward():
                chosen = None
        interceptor = _TopKInterceptor(self, forced, chosen)
        with interceptor:
            out = self._original(*args, **kwargs)
        if not interceptor.handled:
            raise RoutingError(
                f"{self.name} ran no topk over its {self.num_experts} experts, so its routing can "
                "be neither recorded nor replayed; if another RoutingReplay of this model is "
                "replaying, use its record()"
            )
        return out

    def plan(self, forced: Forced, scores_NE: Tensor) -> Tensor:
        """int64 in the shape of the router's choice."""
        leading = scores_NE.shape[:-1]
        if forced.ids_NK.shape[0] != leading.numel():
            raise RoutingError(
                f"{self.name} processes {leading.numel()} tokens and the tape has "
                f"{forced.ids_NK.shape[0]}; expected one row a token, padding included"
            )
        ids_NK = forced.ids_NK
        if torch.compiler.is_compiling():
            ids_NK = _bind(forced.key, ids_NK)
        return ids_NK.to(torch.int64).view(*leading, self.topk)

    def _drop_holes(self) -> torch.utils.hooks.RemovableHandle:
        """Zero the final gate weights of rows on their way into the experts.

        Zero scores would not do: routers that normalise over the K chosen would divide 0 by 0.
        """
        unsupported = UnsupportedModelError(
            f"{self.name} is a {self.family.router}, with no experts(hidden, ids, weights) beside "
            'it in which invalid="drop" could zero the weights; expected invalid="raise" or '
            '"natural"'
        )

        def zero(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            forced = self.forced
            if forced is None or forced.holes_N is None or not forced.drop:
                return args
            if len(args) != 3 or not args[2].is_floating_point() or args[2].shape[-1] != self.topk:
                raise unsupported
            hidden, ids, weights = args
            dropped = forced.holes_N.view(*weights.shape[:-1], 1)
            return hidden, ids, weights.masked_fill(dropped, 0)

        if self.experts is None:
            raise unsupported
        return self.experts.register_forward_pre_hook(zero)

    def _put_up(self) -> None:
        self._depth += 1
        if self._depth == 1 and not self._is_up():
            self._below = self.module.__dict__.get("forward")
            self._original = self.module.forward
            self.module.forward = self

    def _is_up(self) -> bool:
        top = self.module.__dict__.get("forward")
        while isinstance(top, Router):
            if top is self:
                return True
            top = top._below
        return False

    def _take_down(self) -> None:
        self._depth -= 1
        top = self.module.__dict__.get("forward")
        while isinstance(top, Router) and top._depth == 0:
            top = top._below
        if top is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = top


def _natural(live: Callable[[], Any]) -> Tensor:
    """What the router would have chosen, seen by nobody else.

    Nothing is saved for a gradient, so a second run may do without this; and a second object that
    records the same model must not take it for what the experts get.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            ids: Tensor = live()[1]
    else:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            ids = live()[1]
    return ids


class _TopKInterceptor(TorchFunctionMode):
    """Changes the one call that chooses experts, and hands everything else on."""

    def __init__(self, router: Router, forced: Forced | None, chosen: Choices | None) -> None:
        super().__init__()
        self._router, self._forced, self._chosen = router, forced, chosen
        self._unmasked: Tensor | None = None
        self.handled = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            k = args[1] if len(args) > 1 else kwargs["k"]
            if k == self._router.topk and self._are_scores(scores):
                self._refuse_a_second_call()
                return self._choose(scores, lambda: func(*args, **kwargs))
        elif self._router.family.group_limited and func in (
            torch.masked_fill,
            torch.Tensor.masked_fill,
        ):
            scores = args[0] if args else kwargs["input"]
            if self._are_scores(scores):
                self._unmasked = scores
        return func(*args, **kwargs)

    def _choose(self, scores_NE: Tensor, live: Callable[[], Any]) -> Any:
        forced = self._forced
        if forced is None:
            out = live()
        else:
            plan_NK = self._router.plan(forced, scores_NE)
            if forced.holes_N is not None or forced.natural is not None:
                live_NK = _natural(live)
                if forced.natural is not None:
                    forced.natural.note(live_NK, self._router.topk)
                if forced.holes_N is not None:
                    holes = forced.holes_N.view(*plan_NK.shape[:-1], 1)
                    plan_NK = torch.where(holes, live_NK, plan_NK)
            dense_NE = scores_NE if self._unmasked is None else self._unmasked
            out = torch.return_types.topk((dense_NE.gather(-1, plan_NK), plan_NK))
        if self._chosen is not None:
            self._chosen.note(out[1], self._router.topk)
        return out

    def _are_scores(self, tensor: Tensor) -> bool:
        # Group-limited routers run other topk calls too; theirs have other sizes, or three
        # dimensions where this one has two.
        router = self._router
        return tensor.ndim == router.family.score_ndim and tensor.shape[-1] == router.num_experts

    def _refuse_a_second_call(self) -> None:
        router = self._router
        if self.handled:
            raise RoutingError(
                f"{router.name} ran topk(k={router.topk}) over {router.num_experts} scores twice "
                "in one pass (as many groups as experts?), so which call chooses the experts is "
                "ambiguous; expected one; train this model without routing replay"
            )
        self.handled = True
