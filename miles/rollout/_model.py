"""What the embedded engine needs to know of a model before it serves it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from miles.errors import MissingExtraError, SettingError, UnsupportedModelError
from miles.moe.replay import RoutingReplay
from miles.rollout._features import FeatureTap
from miles.rollout.speculative.draft import Draft

__all__ = ["eos_of", "memory_of", "recorder_of"]


def eos_of(model: nn.Module) -> list[int]:
    """Tokens that end an answer, as the model's generation config says."""
    eos: Any = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def recorder_of(model: nn.Module, record_routing: bool | str) -> RoutingReplay | None:
    """What notes the routing; None if nothing is to be noted, or with "auto" if nothing can be."""
    if not record_routing:
        return None
    try:
        return RoutingReplay(model)
    except UnsupportedModelError:
        if record_routing == "auto":
            return None
        raise


def _tap(model: nn.Module, draft: Draft, draft_steps: int) -> FeatureTap | None:
    """What the draft reads of the model, if it fits the model at all."""
    if not isinstance(draft, Draft):
        raise SettingError(
            f"draft is a {type(draft).__name__}; expected a draft of miles.rollout.speculative, or "
            "an object with its feature_layers and memory()"
        )
    for name, argument in (("check_target", model), ("check_steps", draft_steps)):
        check: Any = getattr(draft, name, None)  # of drafts that are models
        if check is not None:
            check(argument)
    return FeatureTap(model, draft.feature_layers) if draft.feature_layers else None


def memory_of(
    model: nn.Module,
    recorder: RoutingReplay | None,
    *,
    draft: Draft | None,
    draft_steps: int,
    **settings: Any,
) -> Any:
    """A `KVMemory`; with a draft, a `SlotMemory`."""
    try:
        from miles.rollout import _kv
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    reason = _kv.supports_slots(model) or _kv.mixes_rows(model, settings["max_context"])
    if draft is not None:
        settings |= {"tap": _tap(model, draft, draft_steps), "max_proposed": draft_steps}
    if reason is None:
        return _kv.SlotMemory(model, recorder, **settings)
    if draft is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be decoded with a draft, because {reason} and so runs "
            "one request at a time, where what a rejected token left cannot be taken back; leave "
            "out draft="
        )
    warnings.warn(
        f"{type(model).__name__} runs one request at a time, not as a batch, because {reason}; "
        "results are the same, throughput is lower",
        stacklevel=3,
    )
    return _kv.RequestMemory(model, recorder)
