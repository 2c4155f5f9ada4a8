"""Samples, and the engines that produce them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from miles.protocols import RolloutEngine
from miles.rollout.batch import TrainBatch, collate
from miles.rollout.hf import HFEngine
from miles.rollout.sample import Sample, SamplingParams, Span, Status

if TYPE_CHECKING:
    from miles.rollout._sglang_server import SGLangServer
    from miles.rollout.process import EngineProcess
    from miles.rollout.sglang import RoutingLayout, SGLangEngine

__all__ = [
    "EngineProcess",
    "HFEngine",
    "RolloutEngine",
    "RoutingLayout",
    "SGLangEngine",
    "SGLangServer",
    "Sample",
    "SamplingParams",
    "Span",
    "Status",
    "TrainBatch",
    "collate",
]


LAZY = {  # these need an extra
    "EngineProcess": "miles.rollout.process",
    "RoutingLayout": "miles.rollout.sglang",
    "SGLangEngine": "miles.rollout.sglang",
    "SGLangServer": "miles.rollout._sglang_server",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'miles.rollout' has no attribute {name!r}")
