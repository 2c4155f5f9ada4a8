"""Routing replay in megatron-core 0.16.1.

Shapes: N tokens of a forward pass, M mixture-of-experts layers, K experts a token, B sequences.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from miles.errors import MissingExtraError, RoutingError, SettingError, UnsupportedModelError
from miles.moe._megatron_router import MegatronRouter
from miles.moe.plan import RoutingPlan
from miles.moe.replay import RoutingReplay
from miles.moe.slicing import for_pipeline
from miles.moe.tape import RoutingTape

__all__ = ["MegatronReplay", "batch_first", "sequence_first"]

SUPPORTED = "0.16.1"


class MegatronReplay(RoutingReplay):
    """`RoutingReplay` of a model of megatron-core, or of the part of it that this process holds.

    It takes the place of megatron-core's own replay, router by router and only inside `record` and
    `replay`; `moe_enable_routing_replay` may be on or off. The model's instances leave
    `RouterReplay.global_router_replay_instances`, so nothing keeps them when the model goes.

    A tape has the rows in the order in which a router sees its tokens: `[sequence, batch]`, not
    `[batch, sequence]`. `sequence_first` brings an engine's tape into it. Multi-token-prediction
    layers are not on a tape: they choose by themselves.

    `replay` and `prefetch` take a tape of the whole model, of which they pick the layers that are
    here, or one of these layers alone, which is what `record` gives. Recomputed layers (`full`, or
    `selective` with `moe`) get the experts of their first run, in any order of micro-batches, also
    when the backward pass comes after the block.

    Args:
        model: a module that holds `TopKRouter`s, wrapped or not, or the list of chunks of a virtual
            pipeline. A stage without mixture-of-experts layers is fine.
        discover: must stay False; it is here because `RoutingReplay` has it.

    Raises:
        MissingExtraError: megatron-core is not installed.
        UnsupportedModelError: another version of it, a dense model, a setting under which its
            routers would ignore the replay, or layers that `moe_layer_freq` does not explain.

    Example:
        No doctest: a model of megatron-core needs process groups. See docs/megatron.md.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], *, discover: bool = False) -> None:
        if discover:
            raise SettingError(
                "discover=True looks for routers of transformers; expected False for a model of "
                "megatron-core, whose routers are known"
            )
        _check_version()
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        self._model = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
        self._config = _config(self._model)
        _refuse(self._config)
        routers = _routers(self._model, self._config)
        self._moe_layers, self._num_moe_layers = _place(self._model, self._config, routers)
        self._routers = list(routers)
        self._discover, self._stream = False, None
        self._recording = self._replaying = False

    @property
    def num_experts(self) -> int:
        """Experts of each layer: E."""
        return int(self._config.num_moe_experts)

    @property
    def topk(self) -> int:
        """Experts that a token goes to: K."""
        return int(self._config.moe_router_topk)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Which of the model's mixture-of-experts layers are here, as `for_pipeline` takes them."""
        return self._moe_layers

    def prefetch(self, tape: RoutingTape) -> RoutingPlan:
        """Start to copy the layers of this process to its device; see `RoutingReplay.prefetch`.

        Dispatchers count K different experts for every token; `RoutingTape.validate` sees to that
        when a tape is recorded, and it is not looked at again here.

        Raises:
            RoutingError: the tape does not fit the model.
        """
        here, whole = len(self._moe_layers), self._num_moe_layers
        if tape.num_layers == whole:
            tape = for_pipeline(tape, self._moe_layers)
        elif tape.num_layers != here:
            raise RoutingError(
                f"the tape has {tape.num_layers} layers; expected {whole}, all mixture-of-experts "
                f"layers of the model, or {here}, those of this process; was it recorded with this "
                "model?"
            )
        return super().prefetch(tape)


def sequence_first(tape: RoutingTape, batch_size: int) -> RoutingTape:
    """The rows of a padded batch, `[B, S]` end to end, in megatron-core's order `[S, B]`.

    After `for_context_parallel`, before `for_sequence_parallel`. A packed batch is one sequence to
    megatron-core and stays as it is.

    Raises:
        RoutingError: rows that `batch_size` does not divide.

    Example:
        >>> from miles.moe import RoutingTape
        >>> from miles.moe.megatron import batch_first, sequence_first
        >>> tape = RoutingTape(torch.arange(6).view(6, 1, 1), num_experts=6)
        >>> sequence_first(tape, 2).expert_ids.flatten().tolist()
        [0, 3, 1, 4, 2, 5]
        >>> batch_first(sequence_first(tape, 2), 2) == tape
        True
    """
    length = _length(tape, batch_size)
    return tape.rows(torch.arange(len(tape)).view(batch_size, length).T.flatten())


def batch_first(tape: RoutingTape, batch_size: int) -> RoutingTape:
    """The inverse of `sequence_first`: rows `[S, B]`, as recorded here, in the order `[B, S]`.

    Raises:
        RoutingError: rows that `batch_size` does not divide.
    """
    length = _length(tape, batch_size)
    return tape.rows(torch.arange(len(tape)).view(length, batch_size).T.flatten())


def _length(tape: RoutingTape, batch_size: int) -> int:
    if batch_size < 1 or len(tape) % batch_size:
        raise RoutingError(
            f"the tape has {len(tape)} rows and batch_size is {batch_size}; expected as many rows "
            "for each sequence of the batch, padding included"
        )
    return len(tape) // batch_size


def is_megatron(model: Any) -> bool:
    """Whether any module is of megatron-core; imports nothing."""
    chunks = [model] if isinstance(model, nn.Module) else model
    return any(
        cls.__module__.startswith("megatron.core.")
        for chunk in chunks
        for module in chunk.modules()
        for cls in type(module).__mro__
    )


def _check_version() -> None:
    try:
        core = importlib.import_module("megatron.core")
    except ImportError as error:
        raise MissingExtraError("megatron-core", "megatron") from error
    if core.__version__.partition("+")[0] != SUPPORTED:
        raise UnsupportedModelError(
            f"megatron-core is {core.__version__}; expected {SUPPORTED}, the version whose routers "
            "and recomputation this was tested with: pip install 'miles[megatron]'"
        )


def _config(model: nn.Module) -> Any:
    """The configuration of a mixture of experts that a module of the model holds."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, TransformerConfig) and config.num_moe_experts:
            return config
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no module of megatron-core whose config has "
        "num_moe_experts; a dense model needs no replay"
    )


def _refuse(config: Any) -> None:
    """Raise for settings under which routers would not do what the tape says."""
    scopes = [getattr(scope, "name", scope) for scope in config.cuda_graph_scope or ()]
    captured = not scopes or any(scope.startswith(("moe", "full")) for scope in scopes)
    reasons = {
        "moe_router_fusion=True": config.moe_router_fusion
        and "the fused kernel chooses without asking the replay; set it to False",
        "moe_router_load_balancing_type='sinkhorn'": (
            config.moe_router_load_balancing_type == "sinkhorn"
        )
        and "it is no choice of the highest scores and never asks the replay; take another",
        "overlap_moe_expert_parallel_comm=True": config.overlap_moe_expert_parallel_comm
        and "layers would run after the forward step, and with it the block; set it to False",
        f"cuda_graph_impl={config.cuda_graph_impl!r}": config.cuda_graph_impl != "none"
        and captured
        and "a captured router repeats the choice that it was captured with; leave routers out of "
        "cuda_graph_scope",
    }
    for setting, reason in reasons.items():
        if reason:
            raise UnsupportedModelError(f"{setting} in the model's config: {reason}")


def _routers(model: nn.Module, config: Any) -> list[MegatronRouter]:
    """The routers in the order of layers, without those of multi-token prediction."""
    from megatron.core.transformer.moe.router import Router, TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    for name, module in found:
        if not isinstance(module, TopKRouter):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}; expected a TopKRouter of megatron-core"
            )
        if module.layer_number is None:
            raise UnsupportedModelError(
                f"{name} has no layer_number, so its place on a tape can't be told; expected a "
                "router inside a TransformerLayer, or set_layer_number() on its MoELayer"
            )
        action = getattr(module.router_replay, "router_replay_action", None)
        if action is not None:
            raise UnsupportedModelError(
                f"{name} is under {action} of megatron-core's own replay; expected none: call "
                "RouterReplay.clear_global_router_replay_action() and clear_global_indices() first"
            )
    ours = {id(module.router_replay) for _, module in found}
    instances = RouterReplay.global_router_replay_instances
    instances[:] = [instance for instance in instances if id(instance) not in ours]
    found = [(name, module) for name, module in found if module.layer_number <= config.num_layers]
    found.sort(key=lambda pair: pair[1].layer_number)
    return [MegatronRouter(name, module) for name, module in found]


def _place(
    model: nn.Module, config: Any, routers: list[MegatronRouter]
) -> tuple[tuple[int, ...], int]:
    """Which of the model's mixture-of-experts layers these are, and how many there are."""
    if config.pipeline_model_parallel_size == 1:
        return tuple(range(len(routers))), len(routers)
    freq = config.moe_layer_freq
    pattern = (
        [layer % freq == 0 for layer in range(config.num_layers)]
        if isinstance(freq, int)
        else [bool(layer) for layer in freq]
    )
    _check_pattern(model, config, pattern)
    numbers = [layer + 1 for layer, is_moe in enumerate(pattern) if is_moe]
    here = tuple(numbers.index(router.layer_number) for router in routers)
    return here, len(numbers)


def _check_pattern(model: nn.Module, config: Any, pattern: list[bool]) -> None:
    """Raise where a layer of this stage is not of the kind that `moe_layer_freq` says."""
    from megatron.core.transformer.module import GraphableMegatronModule

    for name, module in model.named_modules():
        number = getattr(module, "layer_number", None)
        if not isinstance(module, GraphableMegatronModule) or number is None:
            continue
        if number > config.num_layers:  # multi-token prediction
            continue
        is_moe = hasattr(getattr(module, "mlp", None), "router")
        if is_moe != pattern[number - 1]:
            kinds = {True: "a mixture of experts", False: "dense"}
            raise UnsupportedModelError(
                f"{name} (layer {number} of the model) is {kinds[is_moe]}, and by "
                f"moe_layer_freq={config.moe_layer_freq} it is {kinds[pattern[number - 1]]}, so "
                "its place on a tape can't be told; expected a model built to moe_layer_freq, as "
                "get_gpt_decoder_block_spec does"
            )
