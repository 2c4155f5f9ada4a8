"""Finding the routers of a model that no `RouterFamily` describes, and testing before trusting.

A router calls `topk` with k = K over scores whose last dimension is E, and it or its configuration
says both numbers. That is a guess, so `self_test` replays through it before anything is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miles.errors import UnsupportedModelError
from miles.moe.families import REFUSED, ROUTER_FAMILIES, RouterFamily
from miles.moe.tape import RoutingTape

if TYPE_CHECKING:
    from miles.moe.replay import RoutingReplay

__all__ = ["discover", "self_test"]

_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_router_classes",
    "out_features",
)
_TOPK = ("top_k", "topk", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


def discover(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[RouterFamily]:
    """Describe the routers of the model that neither `ROUTER_FAMILIES` nor `REFUSED` names.

    Runs one forward pass. The result is a guess: append it to `ROUTER_FAMILIES` once `self_test`
    passes, or let `RoutingReplay(model, discover=True)` do both for one model.

    Args:
        model: any model.
        inputs: keyword arguments of the forward pass; three token ids by default.

    Returns:
        One entry a class of routers; empty if no module calls `topk` like a router.
    """
    known = {family.router for family in ROUTER_FAMILIES} | REFUSED.keys()
    spy = _Spy()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(spy.enter).remove)
            stack.callback(module.register_forward_hook(spy.leave).remove)
        with spy:
            _first_output(model, inputs)
    return [family for router, family in spy.found.items() if router not in known]


def self_test(
    replay: RoutingReplay, model: nn.Module, inputs: Mapping[str, Any] | None = None
) -> None:
    """Check that a model's routing can be recorded and replayed, in a few forward passes.

    Recording must change nothing, replay of the model's own routing must give bitwise the same
    output, and other experts in the layers of one class of routers must give another output.

    Args:
        replay: of the model.
        model: the model, which is left as it was.
        inputs: keyword arguments of the forward pass; three token ids by default.

    Raises:
        UnsupportedModelError: one of the three does not hold.
        RoutingError: a router runs no `topk` over its experts, or several.
    """
    plain = _first_output(model, inputs)
    with replay.record() as tape:
        recorded = _first_output(model, inputs)
    if not torch.equal(plain, recorded):
        raise _distrusted(model, "two passes over the same tokens gave different outputs")
    with replay.replay(tape):
        replayed = _first_output(model, inputs)
    if not torch.equal(plain, replayed):
        raise _distrusted(model, "replay of the model's own routing changed its output")
    modules = dict(model.named_modules())
    kinds = [type(modules[name]).__name__ for name in replay.layers]
    for kind in sorted(set(kinds)):
        ids = tape.expert_ids.long()
        chosen = torch.tensor([other == kind for other in kinds])
        ids[:, chosen] = (ids[:, chosen] + 1) % tape.num_experts
        with replay.replay(RoutingTape(ids, num_experts=tape.num_experts)):
            changed = _first_output(model, inputs)
        if torch.equal(plain, changed):
            raise _distrusted(model, f"other experts in every {kind} left the output as it was")


def _distrusted(model: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the routers found in {type(model).__name__} failed the self-test: {what}; expected what "
        "RouterFamily asks of a router; register the right module by hand, or train this model "
        "without routing replay"
    )


@torch.no_grad()
def _first_output(model: nn.Module, given: Mapping[str, Any] | None) -> Tensor:
    inputs = dict(given or {})
    if given is None:
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.arange(1, 4, device=device)[None]}
        if hasattr(getattr(model, "config", None), "use_cache"):
            inputs["use_cache"] = False
    with _evaluating(model):
        out = model(**inputs)
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Spy(TorchFunctionMode):
    """Attributes the calls of `topk` to the innermost module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, RouterFamily] = {}
        self._running: list[nn.Module] = []
        self._masked: list[tuple[nn.Module, torch.Size]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._running and func in (torch.topk, torch.Tensor.topk):
            tensor = args[0] if args else kwargs["input"]
            k = args[1] if len(args) > 1 else kwargs["k"]
            self._describe(self._running[-1], tensor.shape, k)
        elif self._running and func in (torch.masked_fill, torch.Tensor.masked_fill):
            tensor = args[0] if args else kwargs["input"]
            self._masked.append((self._running[-1], tensor.shape))
        return func(*args, **kwargs)

    def _describe(self, module: nn.Module, shape: torch.Size, k: int) -> None:
        num_experts, topk = _path(module, _EXPERTS, shape[-1]), _path(module, _TOPK, k)
        if num_experts is None or topk is None or len(shape) not in (2, 3):
            return
        router = type(module).__name__
        self.found[router] = RouterFamily(
            router=router,
            num_experts=num_experts,
            topk=topk,
            group_limited=(module, shape) in self._masked,
            score_ndim=len(shape),
        )


def _path(module: nn.Module, names: tuple[str, ...], value: int) -> str | None:
    """Where the module, its configuration or a part of it says `value`; None if nowhere."""
    holders = {"": module, "config.": getattr(module, "config", None)}
    holders |= {f"{name}.": part for name, part in module.named_modules() if name}
    for prefix, holder in holders.items():
        for name in names:
            if getattr(holder, name, None) == value:
                return prefix + name
    return None
