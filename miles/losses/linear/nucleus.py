"""The recorded support of a truncated sampler.

Shapes: T tokens, K kept ids of all tokens together, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses._vocab import IGNORED

__all__ = ["Nucleus"]


@dataclass(frozen=True)
class Nucleus:
    """The ids that top-p or top-k left each token to be sampled from, one row after the other.

    A row without ids was sampled from the whole vocabulary. Ids are those of the whole vocabulary
    on every rank, in any order within a row.

    Args:
        ids_K: int64, kept ids.
        offsets_T1: int64, `[0, n0, n0 + n1, ...]`: where each row's ids begin, and K last.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together.
        SettingError: offsets that are not as above (looked at on the CPU only).

    Example:
        >>> nucleus = Nucleus(torch.tensor([7, 2]), torch.tensor([0, 2, 2]))  # the 2nd: no limit
        >>> nucleus.mask(9).sum(-1).tolist()
        [2, 9]
    """

    ids_K: Tensor
    """int64 `[K]`: kept ids."""
    offsets_T1: Tensor
    """int64 `[T + 1]`: where each row begins, and K."""

    def __post_init__(self) -> None:
        ids_K, offsets_T1 = self.ids_K, self.offsets_T1
        if ids_K.ndim != 1 or offsets_T1.ndim != 1 or not offsets_T1.numel():
            raise ShapeError(
                f"ids_K has shape {tuple(ids_K.shape)} and offsets_T1 {tuple(offsets_T1.shape)}; "
                "expected [K] and [T + 1]"
            )
        if ids_K.dtype != torch.int64 or offsets_T1.dtype != torch.int64:
            raise DtypeError(
                f"ids_K is {ids_K.dtype} and offsets_T1 {offsets_T1.dtype}; expected int64 for both"
            )
        if offsets_T1.device.type == "cpu":
            rising = bool((offsets_T1.diff() >= 0).all())
            if offsets_T1[0] != 0 or offsets_T1[-1] != ids_K.shape[0] or not rising:
                raise SettingError(
                    f"offsets_T1 is {offsets_T1[:8].tolist()}...{offsets_T1[-1].item()}; expected "
                    f"0 first, no decrease, and the number of ids ({ids_K.shape[0]}) last"
                )

    @classmethod
    def from_mask(cls, mask_TV: Tensor) -> Self:
        """From a bool `[T, V]` that is True where an id was kept.

        Example:
            >>> Nucleus.from_mask(torch.tensor([[True, False, True], [False, True, False]]))
            Nucleus(ids_K=tensor([0, 2, 1]), offsets_T1=tensor([0, 2, 3]))
        """
        if mask_TV.ndim != 2 or mask_TV.dtype != torch.bool:
            raise ShapeError(
                f"mask_TV is {mask_TV.dtype} of shape {tuple(mask_TV.shape)}; expected bool [T, V]"
            )
        offsets_T1 = torch.nn.functional.pad(mask_TV.sum(-1).cumsum(0), (1, 0))
        return cls(mask_TV.nonzero()[:, 1].contiguous(), offsets_T1)

    @property
    def lengths_T(self) -> Tensor:
        """int64 `[T]`: ids of each row; 0 for a row without limit."""
        return self.offsets_T1.diff()

    @property
    def rows_K(self) -> Tensor:
        """int64 `[K]`: the row of each id."""
        lengths_T = self.lengths_T
        rows_T = torch.arange(lengths_T.shape[0], device=lengths_T.device)
        return rows_T.repeat_interleave(lengths_T, output_size=self.ids_K.shape[0])

    def mask(self, vocab_size: int) -> Tensor:
        """bool `[T, V]`: what a token may be; all True in a row without ids."""
        lengths_T = self.lengths_T
        mask_TV = (lengths_T == 0)[:, None].repeat(1, vocab_size)
        mask_TV[self.rows_K, self.ids_K] = True
        return mask_TV

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(self.ids_K.to(device), self.offsets_T1.to(device))

    def check(self, targets_T: Tensor, vocab_size: int) -> None:
        """Refuse a nucleus of other tokens, or one that leaves out a target. Waits for a GPU."""
        num_rows = self.offsets_T1.shape[0] - 1
        if num_rows != targets_T.shape[0]:
            raise ShapeError(
                f"keep has {num_rows} rows; expected one for each of the {targets_T.shape[0]} "
                "tokens (a row without ids for a token that was not truncated)"
            )
        ids_K = self.ids_K
        wrong_K = (ids_K < 0) | (ids_K >= vocab_size)
        if bool(wrong_K.any()):
            raise SettingError(
                f"keep holds the ids {ids_K[wrong_K][:8].tolist()}; expected 0..{vocab_size - 1}"
            )
        rows_K = self.rows_K
        free_T = (self.lengths_T == 0) | (targets_T == IGNORED)
        free_T[rows_K[ids_K == targets_T[rows_K]]] = True
        if not bool(free_T.all()):
            token = int((~free_T).nonzero()[0])
            kept = ids_K[self.offsets_T1[token] : self.offsets_T1[token + 1]]
            raise SettingError(
                f"keep leaves out the target of token {token}: {int(targets_T[token])} is not in "
                f"{kept[:8].tolist()} ({kept.shape[0]} ids, {int((~free_T).sum())} such tokens); "
                "expected the ids that the sampled token was drawn from"
            )
