"""Composable RL post-training building blocks for language models.

The packages (`miles.losses`, `miles.rollout`, `miles.moe`, `miles.sync`) are imported when they
are first used; `import miles` itself needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from miles import errors
from miles.errors import MilesError
from miles.packed import Denominators, Packed, count, pack, unpack

if TYPE_CHECKING:
    from miles import losses, moe, rollout, sync
    from miles.rollout import Sample

__version__ = "0.1.0"

__all__ = [
    "Denominators",
    "MilesError",
    "Packed",
    "Sample",
    "__version__",
    "count",
    "errors",
    "losses",
    "moe",
    "pack",
    "rollout",
    "sync",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in {"losses", "moe", "rollout", "sync"}:
        return importlib.import_module(f"miles.{name}")
    if name == "Sample":
        return importlib.import_module("miles.rollout").Sample
    raise AttributeError(f"module 'miles' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
