"""Hidden states of a target's forward passes, for a draft that reads them.

Shapes: B rows, L tokens of a row, F features of a token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miles.errors import SettingError, UnsupportedModelError
from miles.rollout.speculative.draft import FINAL

__all__ = ["FeatureTap"]


class FeatureTap:
    """Reads the outputs of some decoder layers of a transformers model, side by side."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        decoder: Any = model.get_decoder()  # type: ignore[operator]  # of transformers' models
        blocks = getattr(decoder, "layers", None)
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has no list `layers` of decoder layers; expected one, "
                "since the draft reads hidden states; use a draft that reads tokens only"
            )
        wrong = [layer for layer in layers if not (layer == FINAL or 0 <= layer < len(blocks))]
        if wrong:
            raise SettingError(
                f"the draft reads the outputs of layers {wrong} and {type(model).__name__} has "
                f"{len(blocks)}; expected 0..{len(blocks) - 1}, or {FINAL} for the final norm; "
                "use a draft that was made for this model"
            )
        self._modules = [decoder if layer == FINAL else blocks[layer] for layer in layers]

    @contextlib.contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """The list gets the features `[B, L, F]` of the forward pass inside when that is over."""
        outputs: list[Tensor | None] = [None] * len(self._modules)
        features: list[Tensor] = []
        thread = threading.get_ident()  # a trainer may run the same model in another

        def keep(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                if threading.get_ident() == thread:
                    outputs[index] = output if isinstance(output, Tensor) else output[0]

            return hook

        with contextlib.ExitStack() as stack:
            for index, module in enumerate(self._modules):
                handle = module.register_forward_hook(keep(index))
                stack.callback(handle.remove)
            yield features
        features.append(torch.cat([output for output in outputs if output is not None], dim=-1))
