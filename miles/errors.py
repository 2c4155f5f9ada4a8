"""Every error that `miles` raises on purpose.

All of them are `MilesError`; each also inherits the standard exception that it refines, so
`except ValueError` keeps working. Messages say what was got, what was expected and what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DenominatorError",
    "DtypeError",
    "EmptyBatchError",
    "EngineDiedError",
    "EngineError",
    "MilesError",
    "MissingExtraError",
    "MissingLogprobError",
    "NonFiniteError",
    "PromptTooLongError",
    "RewardError",
    "RoutingError",
    "SettingError",
    "ShapeError",
    "StopTokenError",
    "SyncError",
    "UnsupportedModelError",
]


class MilesError(Exception):
    """The root of every error of this library."""


class ShapeError(MilesError, ValueError):
    """Tensors or lists whose shapes do not fit together."""


class DtypeError(MilesError, TypeError):
    """A tensor of the wrong dtype."""


class SettingError(MilesError, ValueError):
    """An argument outside its range, or two that exclude each other."""


class EmptyBatchError(MilesError, ValueError):
    """A batch without sequences, or without a trainable token where one is needed."""


class NonFiniteError(MilesError, ValueError):
    """NaN or infinity where a number is needed."""


class RewardError(MilesError, ValueError):
    """A reward that is not a finite number (use `None` for "not scored")."""


class MissingLogprobError(MilesError, ValueError):
    """A trainable token that came without the log-prob it was sampled with."""


class DenominatorError(MilesError, ValueError):
    """Denominators that were not counted the way the aggregation needs."""


class RoutingError(MilesError, ValueError):
    """Expert routing that is missing, of the wrong shape, or of another model."""


class PromptTooLongError(MilesError, ValueError):
    """A prompt that leaves no room in the engine's context."""


class StopTokenError(MilesError, ValueError):
    """A stop token that the model's vocabulary does not have."""


class UnsupportedModelError(MilesError, ValueError):
    """A model that a block cannot serve; the text names the reason."""


class EngineError(MilesError, RuntimeError):
    """A rollout engine that failed while it was serving; the text carries its traceback."""


class EngineDiedError(EngineError):
    """The engine's process ended. What it had not returned is lost; nothing else is."""


class SyncError(MilesError, RuntimeError):
    """A weight sync that did not complete. The engine still serves the version it had."""


class CheckpointError(MilesError, RuntimeError):
    """A checkpoint that is incomplete or belongs to another run."""


class MissingExtraError(MilesError, ImportError):
    """An optional dependency is absent; the text holds the line that installs it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {module!r}, which is not installed; "
            f"install it with: pip install 'miles[{extra}]'",
            name=module,
        )
