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
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from miles.errors import RoutingError, SettingError, UnsupportedModelError
from miles.moe import discovery
from miles.moe._intercept import Choices, Forced, Router
from miles.moe.families import ROUTER_FAMILIES, find_routers
from miles.moe.plan import RoutingPlan
from miles.moe.tape import RoutingTape

__all__ = ["RoutingReplay"]


class RoutingReplay:
    """Records and replays the routing of one model.

    Nothing is global and nothing stays behind: outside `record` and `replay` the model is as it
    was.

    Args:
        model: a transformers model whose routers are in `ROUTER_FAMILIES`; or one of megatron-core,
            or the list of its chunks, for which this makes a `MegatronReplay`.
        discover: also look for routers of other families, with a forward pass over three tokens,
            and test in a few more that they replay.

    Raises:
        UnsupportedModelError: no known router in the model, one that can't be replayed (`REFUSED`
            says why), or a discovered one that fails the self-test.
    """

    def __new__(
        cls, model: nn.Module | Sequence[nn.Module], *, discover: bool = False
    ) -> RoutingReplay:
        """One of megatron-core for its models, else one of this class."""
        from miles.moe import megatron  # which derives from this class

        if cls is RoutingReplay and megatron.is_megatron(model):
            return super().__new__(megatron.MegatronReplay)
        return super().__new__(cls)

    def __init__(self, model: nn.Module, *, discover: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"got {type(model).__name__}; expected a module, or a list of megatron-core's"
            )
        self._model, self._discover = model, discover
        found = discovery.discover(model) if discover else []
        self._routers = [
            Router(name, module, family, _experts(model, name))
            for name, module, family in find_routers(model, [*ROUTER_FAMILIES, *found])
        ]
        if not self._routers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no router among the {len(ROUTER_FAMILIES)} families "
                "of miles.moe.ROUTER_FAMILIES; a dense model needs no replay; for another "
                "mixture-of-experts family append a RouterFamily, or pass discover=True"
            )
        sizes = {(router.num_experts, router.topk) for router in self._routers}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"the routers have different (experts, topk) {sorted(sizes)}; expected one pair "
                "for all layers"
            )
        self._stream: torch.cuda.Stream | None = None
        self._recording = self._replaying = False
        if found:
            discovery.self_test(self, model)

    def __reduce__(self) -> Any:
        # Of a copy of the model (`copy.deepcopy` comes here too), the copy of the object.
        return _rebuild, (self._model, self._discover)

    @property
    def layers(self) -> list[str]:
        """Names of the router modules, in the order of a tape's layers."""
        return [router.path for router in self._routers]

    @property
    def num_experts(self) -> int:
        """Experts of each layer: E."""
        return self._routers[0].num_experts

    @property
    def topk(self) -> int:
        """Experts that a token goes to: K."""
        return self._routers[0].topk

    def unrecorded(self, num_tokens: int) -> RoutingTape:
        """A tape of this model's shape in which no row was recorded."""
        return RoutingTape.unrecorded(
            num_tokens, num_layers=len(self._routers), topk=self.topk, num_experts=self.num_experts
        )

    @contextlib.contextmanager
    def record(self) -> Iterator[RoutingTape]:
        """Note the routing of the forward passes inside; the tape is filled when the block ends.

        Several forward passes are laid end to end. A padded `[B, L]` batch gives B * L rows. Under
        activation checkpointing the second run of a layer is not noted again. Inside a replay the
        tape gets what was replayed, and for rows that were dropped what the router chose.
        `generate` makes a forward pass a token, whose rows lie step by step, not row by row.

        Raises:
            RoutingError: this object is recording already.
        """
        tape = self.unrecorded(0)
        with self._record_ids() as ids:
            yield tape
        if ids:
            tape._fill(ids[0])

    @contextlib.contextmanager
    def _record_ids(self) -> Iterator[list[Tensor]]:
        """`record` into an int16 `[N, M, K]` on the model's device, without waiting for it."""
        if self._recording:
            raise RoutingError(
                "record() was entered inside record() of the same object, and both would get the "
                "same rows; expected one block, or a second RoutingReplay"
            )
        self._check_model()
        choices = [Choices() for _ in self._routers]
        filled: list[Tensor] = []
        self._recording = True
        try:
            with contextlib.ExitStack() as stack:
                for router, chosen in zip(self._routers, choices, strict=True):
                    stack.enter_context(router.noting(chosen))
                yield filled
        finally:
            self._recording = False
        filled += self._stacked(choices)

    def _stacked(self, choices: list[Choices]) -> list[Tensor]:
        """The choices of all layers as one int16 `[N, M, K]`; nothing if there were none."""
        layers = [torch.cat(chosen.passes) if chosen.passes else None for chosen in choices]
        rows = {
            router.name: 0 if ids_NK is None else len(ids_NK)
            for router, ids_NK in zip(self._routers, layers, strict=True)
        }
        if len(set(rows.values())) > 1:
            raise RoutingError(f"layers recorded different numbers of tokens: {rows}")
        present = [ids_NK for ids_NK in layers if ids_NK is not None]
        return [torch.stack(present, 1)] if present else []

    def prefetch(self, tape: RoutingTape) -> RoutingPlan:
        """Start to copy a tape to the model's device, beside what that is computing.

        For the next micro-batch, while the current one runs: on CUDA the copy is from pinned
        memory, on a stream of its own, and `replay` waits for it there and not on the host.

        Args:
            tape: as for `replay`.

        Returns:
            What `replay` takes in place of the tape.

        Raises:
            RoutingError: the tape does not fit the model.
        """
        if not isinstance(tape, RoutingTape):
            raise RoutingError(
                f"got {type(tape).__name__}; expected a RoutingTape, or None for none"
            )
        if tape.num_experts_inferred:
            tape = tape.with_num_experts(self.num_experts)
        self._check_sizes(tape)
        device = self._device()
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return RoutingPlan(tape, device, self._stream)

    def _check_sizes(self, tape: RoutingTape) -> None:
        got = (tape.num_layers, tape.topk, tape.num_experts)
        expected = (len(self._routers), self.topk, self.num_experts)
        if got != expected:
            raise RoutingError(
                f"the tape has (layers, topk, experts) {got} and the model {expected}; expected "
                "the same; was it recorded with this model?"
            )

    def _check_model(self) -> None:
        """Routers that were replaced since would neither be noted nor forced, without a word."""
        for router in self._routers:
            try:
                found = self._model.get_submodule(router.path)
            except AttributeError:
                found = None
            if found is not router.module:
                raise RoutingError(
                    f"{router.name} is another module than when this object was made; expected "
                    "RoutingReplay(model) after the last change of the model's modules"
                )

    def _device(self) -> torch.device:
        modules = [router.module for router in self._routers] or [self._model]
        devices = {next(module.parameters()).device for module in modules}
        if len(devices) > 1:
            raise UnsupportedModelError(
                f"the routers are on {sorted(map(str, devices))}; expected one device a process; "
                "models that are spread over several (device_map) are not supported"
            )
        return devices.pop()

    @contextlib.contextmanager
    def replay(
        self,
        tape: RoutingTape | RoutingPlan | None,
        invalid: Literal["raise", "natural", "drop"] = "raise",
        *,
        required_N: Tensor | None = None,
        record_natural: bool = False,
    ) -> Iterator[RoutingTape]:
        """Force the experts of `tape` in every forward pass inside.

        The backward pass may run inside or later, in any order of micro-batches, also under
        activation checkpointing (`use_reentrant=False`): a layer that runs again gets the experts
        of its first run.

        Args:
            tape: one row for each token of the forward pass, padding included, or what `prefetch`
                made of it (None, what `collate` gives for samples without routing, is refused).
            invalid: what to do where a row was not recorded: raise, let the router choose, or drop
                the row from the experts (its gate weights are zero; shared experts still see it).
            required_N: bool `[N]`, rows that must be recorded under `invalid="raise"`; the others
                (padding, the last token of a sequence) fall back to the router. All, by default.
            record_natural: also note what the router would have chosen, at the cost of its `topk`.

        Yields:
            With `record_natural`, a tape of the router's own choice, filled when the block ends;
            `routing_agreement` compares the two. Else an empty one.

        Raises:
            RoutingError: the tape does not fit the model or the batch, a required row is missing,
                a router ran no `topk`, or this object is replaying already.
            UnsupportedModelError: activation checkpointing of the reentrant kind.
        """
        if invalid not in ("raise", "natural", "drop"):
            raise SettingError(f"invalid is {invalid!r}; expected 'raise', 'natural' or 'drop'")
        if tape is None:
            raise RoutingError(
                "got no tape; expected the routing of every sample; have the engine record it "
                "(HFEngine(..., record_routing=True)), or train without replay"
            )
        if self._replaying:
            raise RoutingError(
                "replay() was entered inside replay() of the same object, and only one tape can "
                "be in force; expected one block after the other"
            )
        self._check_model()
        plan = tape if isinstance(tape, RoutingPlan) else self.prefetch(tape)
        self._check_sizes(plan.tape)
        if plan.device != self._device():
            raise RoutingError(
                f"the plan is on {plan.device} and the model on {self._device()}; expected one "
                "device; call prefetch() after the model has moved"
            )
        _check_holes(plan.tape, invalid, required_N)
        ids_MNK, holes_N = plan.wait()
        if holes_N is None and (invalid != "raise" or required_N is not None):
            # As if there were some, so that a compiled model is one graph for all such tapes.
            holes_N = torch.zeros(len(plan.tape), dtype=torch.bool, device=plan.device)
        drop = holes_N is not None and invalid == "drop"
        choices = [Choices() for _ in self._routers] if record_natural else []
        natural = self.unrecorded(0)
        self._replaying = True
        try:
            with contextlib.ExitStack() as stack:
                for layer, router in enumerate(self._routers):
                    forced = Forced(router, ids_MNK[layer], holes_N, drop)
                    if record_natural:
                        forced.natural = choices[layer]
                    stack.enter_context(router.forcing(forced))
                yield natural
        finally:
            self._replaying = False
        for ids in self._stacked(choices) if record_natural else ():
            natural._fill(ids)


def _rebuild(model: nn.Module, discover: bool) -> RoutingReplay:
    return RoutingReplay(model, discover=discover)


def _check_holes(tape: RoutingTape, invalid: str, required_N: Tensor | None) -> None:
    if required_N is not None and (
        required_N.shape != (len(tape),) or required_N.dtype != torch.bool
    ):
        raise RoutingError(
            f"required_N is {required_N.dtype} of shape {tuple(required_N.shape)}; expected bool "
            f"[{len(tape)}], one for each row of the tape"
        )
    if invalid != "raise":
        return
    missing_N = ~tape.recorded_N
    if required_N is not None:
        missing_N &= required_N.to("cpu")
    if bool(missing_N.any()):
        raise RoutingError(
            f"{int(missing_N.sum())} of {len(tape)} rows were not recorded, the first at token "
            f'{int(missing_N.nonzero()[0])}; record them, or pass invalid="natural" to let the '
            'router choose there, or invalid="drop" to leave them out of the experts'
        )


def _experts(model: nn.Module, router: str) -> nn.Module | None:
    """The module that the router's choice goes to: its child or sibling named `experts`."""
    for owner in (router, router.rpartition(".")[0]):
        experts = getattr(model.get_submodule(owner), "experts", None)
        if isinstance(experts, nn.Module):
            return experts
    return None
