"""The weights of an engine's draft, for `miles.sync`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from miles.errors import SettingError
from miles.rollout.speculative.draft import Draft

__all__ = ["DraftWeights"]


class DraftWeights:
    """A `WeightTarget`: the draft's weights under their checkpoint's names, which
    `DraftTrainer.named_tensors` gives, with a version of their own.

    Args:
        draft: one of the package's models.
        between_steps: the engine's; nothing is proposed inside.

    Raises:
        SettingError: a draft without weights.
    """

    def __init__(
        self, draft: Draft, between_steps: Callable[[], AbstractContextManager[None]]
    ) -> None:
        named: Any = getattr(draft, "checkpoint_tensors", None)
        if named is None:
            raise SettingError(
                f"{type(draft).__name__} has no weights to bring; expected a draft that is a model"
            )
        self._named, self._between_steps = named, between_steps
        self.weight_version = 0
        """Of the draft; what the engine samples does not depend on it, only how fast it does."""

    def weight_tensors(self) -> Mapping[str, Tensor]:
        """The live parameters by name."""
        tensors: Mapping[str, Tensor] = self._named()
        return tensors

    def commit_weights(
        self, tensors: Mapping[str, Tensor], *, version: int, alias: bool = False
    ) -> None:
        """Propose with `tensors`, which are always copied, from the next step on."""
        with self._between_steps(), torch.no_grad():
            for name, live in self.weight_tensors().items():
                live.copy_(tensors[name])
            self.weight_version = version
