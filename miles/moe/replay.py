"""Rollout Routing Replay (R3): force the experts that were recorded, keep the gradients live.

Every router of transformers keeps *which* experts (one `topk` over its scores) apart from *how
much* each weighs (gather, renormalise, scale). So only that one call is intercepted: recorded
indices go in, values are gathered from the live, dense scores, and all of the family's own
arithmetic runs downstream of them, with its gradient.

Shapes: N tokens of a forward pass, M mixture-of-experts layers, E experts, K of them a token.

References:
    R3: arXiv 2510.11370.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from miles.errors import RoutingError, SettingError, UnsupportedModelError
from miles.moe import discovery
from miles.moe.families import ROUTER_FAMILIES, RouterFamily, find_routers
from miles.moe.tape import RoutingTape

__all__ = ["RoutingReplay"]


@dataclass
class _Slot:
    """One router of the model."""

    name: str
    module: nn.Module
    family: RouterFamily
    num_experts: int
    topk: int
    experts: nn.Module | None
    recorded: list[Tensor] = field(default_factory=list)
    plan_NK: Tensor | None = None


class RoutingReplay:
    """Records and replays the routing of one model.

    Nothing is global and nothing stays behind: outside `record` and `replay` the model is as it
    was.

    Args:
        model: a transformers model whose routers are in `ROUTER_FAMILIES`.
        discover: also look for routers of other families, with a forward pass over three tokens,
            and test in a few more that they replay.

    Raises:
        UnsupportedModelError: no known router in the model, one that can't be replayed (`REFUSED`
            says why), or a discovered one that fails the self-test.
    """

    def __init__(self, model: nn.Module, *, discover: bool = False) -> None:
        self._model = model
        found = discovery.discover(model) if discover else []
        self._slots = [
            _Slot(name, module, family, *family.sizes(module), _experts(model, name))
            for name, module, family in find_routers(model, [*ROUTER_FAMILIES, *found])
        ]
        if not self._slots:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no router among the {len(ROUTER_FAMILIES)} families "
                "of miles.moe.ROUTER_FAMILIES; a dense model needs no replay; for another "
                "mixture-of-experts family append a RouterFamily, or pass discover=True"
            )
        sizes = {(slot.num_experts, slot.topk) for slot in self._slots}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"the routers have different (experts, topk) {sorted(sizes)}; expected one pair "
                "for all layers"
            )
        if found:
            discovery.self_test(self, model)

    @property
    def layers(self) -> list[str]:
        """Names of the router modules, in the order of a tape's layers."""
        return [slot.name for slot in self._slots]

    @property
    def num_experts(self) -> int:
        """Experts of each layer: E."""
        return self._slots[0].num_experts

    @property
    def topk(self) -> int:
        """Experts that a token goes to: K."""
        return self._slots[0].topk

    def unrecorded(self, num_tokens: int) -> RoutingTape:
        """A tape of this model's shape in which no row was recorded."""
        return RoutingTape.unrecorded(
            num_tokens, num_layers=len(self._slots), topk=self.topk, num_experts=self.num_experts
        )

    @contextlib.contextmanager
    def record(self) -> Iterator[RoutingTape]:
        """Note the routing of the forward passes inside; the tape is filled when the block ends.

        Several forward passes are laid end to end. A padded `[B, L]` batch gives B * L rows.
        """
        tape = self.unrecorded(0)
        with self._record_ids() as ids:
            yield tape
        if ids:
            tape._fill(ids[0])

    @contextlib.contextmanager
    def _record_ids(self) -> Iterator[list[Tensor]]:
        """`record` into an int16 `[N, M, K]` on the model's device, without waiting for it."""
        for slot in self._slots:
            slot.recorded.clear()
        filled: list[Tensor] = []
        with self._intercepting(_record):
            yield filled
        layers = [torch.cat(slot.recorded) if slot.recorded else None for slot in self._slots]
        for slot in self._slots:
            slot.recorded.clear()
        rows = {
            slot.name: 0 if ids is None else len(ids)
            for slot, ids in zip(self._slots, layers, strict=True)
        }
        if len(set(rows.values())) > 1:
            raise RoutingError(f"layers recorded different numbers of tokens: {rows}")
        present = [ids for ids in layers if ids is not None]
        if present:
            filled.append(torch.stack(present, 1))

    @contextlib.contextmanager
    def replay(
        self,
        tape: RoutingTape | None,
        invalid: Literal["raise", "natural", "drop"] = "raise",
        *,
        required_N: Tensor | None = None,
    ) -> Iterator[None]:
        """Force the experts of `tape` in every forward pass inside.

        Args:
            tape: one row for each token of the forward pass, padding included (None, what `collate`
                gives for samples without routing, is refused).
            invalid: what to do where a row was not recorded: raise, let the router choose, or drop
                the row from the experts (its gate weights are zero; shared experts still see it).
            required_N: bool `[N]`, rows that must be recorded under `invalid="raise"`; the others
                (padding, the last token of a sequence) fall back to the router. All, by default.

        Raises:
            RoutingError: the tape does not fit the model or the batch, a required row is missing,
                or a router ran no `topk`.
        """
        if invalid not in ("raise", "natural", "drop"):
            raise SettingError(f"invalid is {invalid!r}; expected 'raise', 'natural' or 'drop'")
        if tape is None:
            raise RoutingError(
                "got no tape; expected the routing of every sample; have the engine record it "
                "(HFEngine(..., record_routing=True)), or train without replay"
            )
        if tape.num_experts_inferred:
            tape = tape.with_num_experts(self.num_experts)
        self._check_tape(tape, invalid, required_N)
        device = next(self._model.parameters()).device
        ids = tape.expert_ids.to(device=device, dtype=torch.int64)
        for layer, slot in enumerate(self._slots):
            slot.plan_NK = ids[:, layer]
        holes = not bool(tape.recorded_N.all())
        try:
            with contextlib.ExitStack() as stack:
                if holes and invalid == "drop":
                    dropped_N = ~tape.recorded_N.to(device)
                    for slot in self._slots:
                        stack.callback(_drop_rows(slot, dropped_N).remove)
                stack.enter_context(self._intercepting(_replay_with_holes if holes else _replay))
                yield
        finally:
            for slot in self._slots:
                slot.plan_NK = None

    def _check_tape(self, tape: RoutingTape, invalid: str, required_N: Tensor | None) -> None:
        got = (tape.num_layers, tape.topk, tape.num_experts)
        expected = (len(self._slots), self.topk, self.num_experts)
        if got != expected:
            raise RoutingError(
                f"the tape has (layers, topk, experts) {got} and the model {expected}; expected "
                "the same; was it recorded with this model?"
            )
        if required_N is not None and required_N.shape != (len(tape),):
            raise RoutingError(
                f"required_N has shape {tuple(required_N.shape)}; expected [{len(tape)}], one for "
                "each row of the tape"
            )
        missing_N = ~tape.recorded_N
        if required_N is not None:
            missing_N &= required_N.to("cpu")
        if invalid == "raise" and bool(missing_N.any()):
            raise RoutingError(
                f"{int(missing_N.sum())} of {len(tape)} rows were not recorded, the first at token "
                f'{int(missing_N.nonzero()[0])}; record them, or pass invalid="natural" to let the '
                'router choose there, or invalid="drop" to leave them out of the experts'
            )

    @contextlib.contextmanager
    def _intercepting(self, handle: _Handler) -> Iterator[None]:
        _refuse_checkpointing(self._model)
        with contextlib.ExitStack() as stack:
            for slot in self._slots:
                stack.callback(_Forward(slot, handle).leave)
            yield


_Live = Callable[[], Any]
_Handler = Callable[[_Slot, Tensor, Tensor, _Live], Any]


def _record(slot: _Slot, scores_NE: Tensor, dense_NE: Tensor, live: _Live) -> Any:
    out = live()
    slot.recorded.append(out[1].detach().reshape(-1, slot.topk).to(torch.int16))
    return out


def _replay(slot: _Slot, scores_NE: Tensor, dense_NE: Tensor, live: _Live) -> Any:
    plan_NK = _plan(slot, scores_NE)
    return torch.return_types.topk((dense_NE.gather(-1, plan_NK), plan_NK))


def _replay_with_holes(slot: _Slot, scores_NE: Tensor, dense_NE: Tensor, live: _Live) -> Any:
    plan_NK = _plan(slot, scores_NE)
    plan_NK = torch.where(plan_NK < 0, live()[1], plan_NK)
    return torch.return_types.topk((dense_NE.gather(-1, plan_NK), plan_NK))


def _plan(slot: _Slot, scores_NE: Tensor) -> Tensor:
    assert slot.plan_NK is not None
    leading = scores_NE.shape[:-1]
    if slot.plan_NK.shape[0] != leading.numel():
        raise RoutingError(
            f"{slot.name} processes {leading.numel()} tokens and the tape has "
            f"{slot.plan_NK.shape[0]}; expected one row a token, padding included"
        )
    return slot.plan_NK.view(*leading, slot.topk)


def _experts(model: nn.Module, router: str) -> nn.Module | None:
    """The module that the router's choice goes to: its child or sibling named `experts`."""
    for owner in (router, router.rpartition(".")[0]):
        experts = getattr(model.get_submodule(owner), "experts", None)
        if isinstance(experts, nn.Module):
            return experts
    return None


def _drop_rows(slot: _Slot, dropped_N: Tensor) -> RemovableHandle:
    """Zero the final gate weights of rows on their way into the experts.

    Zero scores would not do: routers that normalise over the K chosen would divide 0 by 0.
    """

    def zero(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) != 3 or not args[2].is_floating_point() or args[2].shape[-1] != slot.topk:
            raise _undroppable(slot)
        hidden, ids, weights = args
        return hidden, ids, weights.masked_fill(dropped_N.view(*weights.shape[:-1], 1), 0)

    if slot.experts is None:
        raise _undroppable(slot)
    return slot.experts.register_forward_pre_hook(zero)


def _undroppable(slot: _Slot) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{slot.name} is a {slot.family.router}, with no experts(hidden, ids, weights) beside it "
        'in which invalid="drop" could zero the weights; expected invalid="raise" or "natural"'
    )


class _TopKInterceptor(TorchFunctionMode):
    """Hands the one call that chooses experts to `handle`, and everything else on."""

    def __init__(self, slot: _Slot, handle: _Handler) -> None:
        super().__init__()
        self._slot, self._handle = slot, handle
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
            if k == self._slot.topk and self._are_scores(scores):
                self._refuse_a_second_call()
                dense = scores if self._unmasked is None else self._unmasked
                return self._handle(self._slot, scores, dense, lambda: func(*args, **kwargs))
        elif self._slot.family.group_limited and func in (
            torch.masked_fill,
            torch.Tensor.masked_fill,
        ):
            scores = args[0] if args else kwargs["input"]
            if self._are_scores(scores):
                self._unmasked = scores
        return func(*args, **kwargs)

    def _are_scores(self, tensor: Tensor) -> bool:
        # Group-limited routers run other topk calls too; theirs have other sizes, or three
        # dimensions where this one has two.
        slot = self._slot
        return tensor.ndim == slot.family.score_ndim and tensor.shape[-1] == slot.num_experts

    def _refuse_a_second_call(self) -> None:
        slot = self._slot
        if self.handled:
            raise RoutingError(
                f"{slot.name} ran topk(k={slot.topk}) over {slot.num_experts} scores twice in one "
                "pass (as many groups as experts?), so which call chooses the experts is "
                "ambiguous; expected one; train this model without routing replay"
            )
        self.handled = True


class _Forward:
    """Stands in for a router's forward while a context is entered.

    Contexts may be left in another order than the reverse: what was left passes everything on, and
    is taken off as soon as it is on top.
    """

    def __init__(self, slot: _Slot, handle: _Handler) -> None:
        self._slot, self._handle = slot, handle
        self._below: Any = slot.module.__dict__.get("forward")
        self._original = slot.module.forward
        self._entered = True
        slot.module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._entered:
            return self._original(*args, **kwargs)
        with _TopKInterceptor(self._slot, self._handle) as interceptor:
            out = self._original(*args, **kwargs)
        if not interceptor.handled:
            raise RoutingError(
                f"{self._slot.name} ran no topk over its {self._slot.num_experts} experts, so its "
                "routing can be neither recorded nor replayed; to record during a replay, enter "
                "record() before replay()"
            )
        return out

    def leave(self) -> None:
        self._entered = False
        module = self._slot.module
        top = module.__dict__.get("forward")
        while isinstance(top, _Forward) and not top._entered:
            top = top._below
        if top is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = top


def _refuse_checkpointing(model: nn.Module) -> None:
    if not model.training:
        return
    on = [
        n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False) is True
    ]
    if on:
        raise UnsupportedModelError(
            f"gradient checkpointing is on ({len(on)} modules), and its second forward pass would "
            "run after the replay ended, with other experts; expected "
            "model.gradient_checkpointing_disable()"
        )
