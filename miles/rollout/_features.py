"""Hidden states of a target's forward passes, for a draft that reads them.

Shapes: B rows, L tokens of a row, F features of a token, n tokens of one request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miles.errors import SettingError, UnsupportedModelError
from miles.rollout.speculative.draft import FINAL

__all__ = ["FeatureTap", "UntoldFeatures"]


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


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass read, and whose it is."""

    features_BLF: Tensor
    owners: Mapping[Hashable, tuple[int, int]]
    """Of each owner its row, and how many of the first tokens."""
    size: int


class UntoldFeatures:
    """What passes read of tokens that the draft has not been told; keeping it launches nothing.

    A pass goes with those before it, once every owner of these has taken its part or has left.

    Example:
        >>> features = UntoldFeatures()
        >>> for step in range(3):  # two owners, one token of each in a step
        ...     features.add(torch.tensor([[[step]], [[10 + step]]]), {"a": (0, 1), "b": (1, 1)})
        >>> features.drop_beyond(4)  # the first pass goes
        >>> [part.flatten().tolist() for part in features.take(["b"])], features.size
        ([[11, 12]], 4)
        >>> features.forget("a")
        >>> features.size
        0
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._first = 0
        """The number of the oldest pass that is kept."""
        self._since: dict[Hashable, int] = {}
        """Of each owner, the first pass that it has not taken its part of, if there is one."""
        self._known: Mapping[Any, tuple[int, int]] | None = None
        """Whose owners are all in `_since`, save for those that have left."""
        self.size = 0
        """Tokens whose features are kept, padding and those of owners that have left too."""

    def add(self, features_BLF: Tensor, owners: Mapping[Any, tuple[int, int]]) -> None:
        """Keep a pass: of each owner the first so many tokens of a row.

        The mapping is kept as it is. Where it is the last pass's own, nobody new is looked for,
        so that a step costs the same for any number of rows.
        """
        if owners is not self._known:
            number = self._first + len(self._passes)
            for owner in owners:
                self._since.setdefault(owner, number)
            self._known = owners
        rows, width, _ = features_BLF.shape
        self._passes.append(_Pass(features_BLF, owners, rows * width))
        self.size += rows * width

    def take(self, owners: Sequence[Hashable]) -> list[Tensor]:
        """`[n, F]` of each, of all its tokens that are left, in order; of three launches.

        Owners without any get `[0, F]`; some pass must be there.
        """
        end = self._first + len(self._passes)
        since = {owner: self._since.pop(owner, end) for owner in owners}
        oldest = max(self._first, min([end - 1, *since.values()]))
        places: dict[Hashable, list[int]] = {owner: [] for owner in owners}
        parts_TF: list[Tensor] = []
        start = 0
        for number, one in enumerate(self._passes[oldest - self._first :], oldest):
            width = one.features_BLF.shape[1]
            for owner, found in places.items():
                if since[owner] <= number and owner in one.owners:
                    row, count = one.owners[owner]
                    first = start + row * width
                    found += range(first, first + count)
            parts_TF.append(one.features_BLF.flatten(0, 1))
            start += one.size
        self._known = None
        self._drop_taken()
        all_TF = parts_TF[0] if len(parts_TF) == 1 else torch.cat(parts_TF)
        index_T = torch.tensor([place for found in places.values() for place in found])
        if all_TF.is_cuda:
            index_T = index_T.pin_memory().to(all_TF.device, non_blocking=True)
        taken_TF = all_TF.index_select(0, index_T.long())
        return list(taken_TF.split([len(found) for found in places.values()]))

    def forget(self, owner: Hashable) -> None:
        """The owner has left."""
        self._since.pop(owner, None)
        self._drop_taken()

    def drop_beyond(self, size: int) -> None:
        """Drop the oldest passes that hold none of the last so many tokens."""
        while len(self._passes) > 1 and self.size - self._passes[0].size >= size:
            self._drop(1)

    def _drop_taken(self) -> None:
        oldest = min(self._since.values(), default=self._first + len(self._passes))
        self._drop(max(0, oldest - self._first))

    def _drop(self, count: int) -> None:
        self.size -= sum(one.size for one in self._passes[:count])
        del self._passes[:count]
        self._first += count
