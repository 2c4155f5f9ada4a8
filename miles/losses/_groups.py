"""Sums and maxima within groups of samples.

Shapes: S samples, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Groups"]


class Groups:
    """Samples by group. Ids that are nearly as dense as `0..G-1` need no sort."""

    def __init__(self, ids_S: Tensor, low: int, high: int) -> None:
        """`low` and `high` are the ends of the range that the ids lie in."""
        self.ids_S = self.index_S = ids_S.to(torch.int64)
        if low >= 0 and high < 2 * ids_S.shape[0]:
            self.num_groups = high + 1
        else:
            ids_G, self.index_S = torch.unique(self.ids_S, return_inverse=True)
            self.num_groups = ids_G.shape[0]

    def sum(self, values_S: Tensor) -> Tensor:
        """Of each group: `[S]` to `[G]`."""
        return values_S.new_zeros(self.num_groups).scatter_add_(0, self.index_S, values_S)

    def max(self, values_S: Tensor) -> Tensor:
        """Of each group: `[S]` to `[G]`; -inf for an id that no sample has."""
        lowest_G = values_S.new_full((self.num_groups,), -torch.inf)
        return lowest_G.scatter_reduce_(0, self.index_S, values_S, "amax")

    def spread(self, values_G: Tensor) -> Tensor:
        """The value of each sample's group: `[G]` to `[S]`."""
        return values_G.index_select(0, self.index_S)
