"""Samples, and the engines that produce them."""

from typing import TYPE_CHECKING, Any

from miles.protocols import RolloutEngine
from miles.rollout.batch import TrainBatch, collate
from miles.rollout.hf import HFEngine
from miles.rollout.sample import Sample, SamplingParams, Span, Status

if TYPE_CHECKING:
    from miles.rollout.process import EngineProcess

__all__ = [
    "EngineProcess",
    "HFEngine",
    "RolloutEngine",
    "Sample",
    "SamplingParams",
    "Span",
    "Status",
    "TrainBatch",
    "collate",
]


def __getattr__(name: str) -> Any:
    if name == "EngineProcess":  # needs msgspec
        from miles.rollout.process import EngineProcess

        return EngineProcess
    raise AttributeError(f"module 'miles.rollout' has no attribute {name!r}")
