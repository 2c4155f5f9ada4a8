"""Drafts that propose tokens, a target that judges them without loss, and drafts that learn."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.rollout.speculative.checkpoint import export_draft, load_draft
    from miles.rollout.speculative.controller import DraftController, Simulation, simulate
    from miles.rollout.speculative.cost import CostModel, CostSample
    from miles.rollout.speculative.draft import FINAL, Draft, DraftMemory, Proposal
    from miles.rollout.speculative.eagle import EagleDraft
    from miles.rollout.speculative.eagle3 import (
        Eagle3Draft,
        default_feature_layers,
        frequent_tokens,
    )
    from miles.rollout.speculative.losses import (
        MaskPolicy,
        TargetLogits,
        draft_loss,
        mtp_loss,
        shift_tokens,
    )
    from miles.rollout.speculative.mtp import MTPDraft
    from miles.rollout.speculative.ngram import NgramDraft
    from miles.rollout.speculative.standalone import StandaloneDraft
    from miles.rollout.speculative.stats import AcceptanceStats, SpeculativeStats
    from miles.rollout.speculative.trainer import (
        Captured,
        DraftTrainer,
        TrainableDraft,
        TrainingAdvice,
    )
    from miles.rollout.speculative.verify import Verified, tempered, verify_chain, verify_tree

__all__ = [
    "FINAL",
    "AcceptanceStats",
    "Captured",
    "CostModel",
    "CostSample",
    "Draft",
    "DraftController",
    "DraftMemory",
    "DraftTrainer",
    "Eagle3Draft",
    "EagleDraft",
    "MTPDraft",
    "MaskPolicy",
    "NgramDraft",
    "Proposal",
    "Simulation",
    "SpeculativeStats",
    "StandaloneDraft",
    "TargetLogits",
    "TrainableDraft",
    "TrainingAdvice",
    "Verified",
    "default_feature_layers",
    "draft_loss",
    "export_draft",
    "frequent_tokens",
    "load_draft",
    "mtp_loss",
    "shift_tokens",
    "simulate",
    "tempered",
    "verify_chain",
    "verify_tree",
]

MODULES = {
    "checkpoint": ("export_draft", "load_draft"),
    "controller": ("DraftController", "Simulation", "simulate"),
    "cost": ("CostModel", "CostSample"),
    "draft": ("FINAL", "Draft", "DraftMemory", "Proposal"),
    "eagle": ("EagleDraft",),
    "eagle3": ("Eagle3Draft", "default_feature_layers", "frequent_tokens"),
    "losses": ("MaskPolicy", "TargetLogits", "draft_loss", "mtp_loss", "shift_tokens"),
    "mtp": ("MTPDraft",),
    "ngram": ("NgramDraft",),
    "standalone": ("StandaloneDraft",),
    "stats": ("AcceptanceStats", "SpeculativeStats"),
    "trainer": ("Captured", "DraftTrainer", "TrainableDraft", "TrainingAdvice"),
    "verify": ("Verified", "tempered", "verify_chain", "verify_tree"),
}
LAZY = {name: module for module, names in MODULES.items() for name in names}
"""Which module holds a name; drafts of models need the `hf` extra, which is asked for on use."""


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
