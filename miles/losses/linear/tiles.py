"""A walk over the logits tile by tile: what a tile holds and what is gathered from it.

Shapes: N selected tokens, n of them in a tile, V vocabulary entries of this rank, v of them in a
tile, D hidden size, K kept ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from miles.losses._vocab import VocabShard
from miles.losses.linear.scoring import Scoring, compute_dtype

__all__ = ["LogSumExp", "Rows", "Tile", "matmul", "operand_dtype", "slices", "tile_of"]


def slices(length: int, step: int) -> Iterator[slice]:
    """`length` in pieces of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def operand_dtype(hidden_TD: Tensor, weight_VD: Tensor, *, backward: bool = False) -> torch.dtype:
    """What to multiply in so that products are summed, and come out, in float32 (or float64).

    Two low-precision operands can stay as they are on CUDA where `torch.mm` knows `out_dtype`;
    elsewhere the output would be rounded, at ~1e-2 nats a log-prob, so they are widened. In the
    backward pass fp16 is widened too: a gradient of 1e-8 would be 0 in it.
    """
    dtype = hidden_TD.dtype
    low = dtype == torch.bfloat16 or (dtype == torch.float16 and not backward)
    if (
        low
        and weight_VD.dtype == dtype
        and hidden_TD.device.type == "cuda"
        and "dtype" in torch.ops.aten.mm.overloads()
    ):
        return dtype
    return compute_dtype(hidden_TD, weight_VD)


def matmul(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`left @ right`; the left operand is rounded to the right one's dtype."""
    if right.dtype == out_dtype:
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=out_dtype)


class Rows:
    """The tokens that a pass works on, laid end to end without the others."""

    def __init__(
        self, selected_T: Tensor, hidden_TD: Tensor, scoring: Scoring, dtype: torch.dtype, step: int
    ) -> None:
        self.index_N = selected_T.nonzero().flatten()
        """Where they lie among all tokens. To know how many there are, the host waits here."""
        self.hidden_ND = hidden_TD[self.index_N].to(dtype)
        self.targets_N = scoring.targets_T[self.index_N]
        self.temperature_N = scoring.temperature_T[self.index_N]
        self.tiles = list(slices(self.index_N.shape[0], step))
        self._keep = None if scoring.keep is None else self._kept(selected_T, scoring)

    def _kept(
        self, selected_T: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Ids and rows of these tokens' nuclei, who has none, and where each tile's ids begin."""
        assert scoring.keep is not None
        lengths_N = scoring.keep.lengths_T[self.index_N]
        rows_K = scoring.keep.rows_K
        ids_K = scoring.keep.ids_K[selected_T[rows_K]]
        rows_K = torch.arange(lengths_N.shape[0], device=lengths_N.device).repeat_interleave(
            lengths_N, output_size=ids_K.shape[0]
        )
        offsets_N1 = torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0))
        edges = [*(tile.start for tile in self.tiles), lengths_N.shape[0]]
        return ids_K, rows_K, lengths_N == 0, offsets_N1[edges].tolist()

    def kept(self, tile: int, start: int, size: int) -> Tensor | None:
        """bool `[n, v]`: what the tokens of a tile may be among `size` ids from `start` on."""
        if self._keep is None:
            return None
        ids_K, rows_K, free_N, edges = self._keep
        where = self.tiles[tile]
        here = slice(edges[tile], edges[tile + 1])
        index = ids_K[here] - start
        # Ids of other tiles go to a column that is dropped: no count, so no wait for the GPU.
        index = torch.where((index >= 0) & (index < size), index, size)
        mask_nv = free_N[where, None].repeat(1, size + 1)
        mask_nv[rows_K[here] - where.start, index] = True
        return mask_nv[:, :size]


class Tile(NamedTuple):
    """The logits of some tokens over some ids."""

    logits_nv: Tensor
    """Over temperature; -inf where an id was not kept."""
    slope_nv: Tensor | None
    """Derivative of the cap, or None without one."""
    index_n1: Tensor
    """Column of the target, where it is in here."""
    inside_n1: Tensor
    """bool: whether it is."""


def tile_of(
    rows: Rows, tile: int, weight_vD: Tensor, bias_v: Tensor | None, start: int, scoring: Scoring
) -> Tile:
    """Compute one tile; `start` counts ids from the beginning of this rank's shard."""
    where, size = rows.tiles[tile], weight_vD.shape[0]
    dtype = scoring.temperature_T.dtype
    logits_nv = matmul(rows.hidden_ND[where], weight_vD.T, dtype)
    if bias_v is not None:
        logits_nv += bias_v.to(dtype)
    slope_nv = None
    if scoring.softcap is not None:
        tanh_nv = logits_nv.div_(scoring.softcap).tanh_()
        slope_nv = 1 - tanh_nv.square()
        logits_nv = tanh_nv.mul_(scoring.softcap)
    logits_nv /= rows.temperature_N[where, None]
    kept_nv = rows.kept(tile, scoring.shard.start + start, size)
    if kept_nv is not None:
        logits_nv.masked_fill_(~kept_nv, -torch.inf)
    index_n, inside_n = scoring.shard.locate(rows.targets_N[where], start, size)
    return Tile(logits_nv, slope_nv, index_n[:, None], inside_n[:, None])


class LogSumExp:
    """log-sum-exp and entropy of rows that come in parts, in any order and from several ranks.

    Sums are kept relative to the largest logit so far, so that neither overflows nor cancels.
    """

    def __init__(self, like_N: Tensor, *, entropy: bool) -> None:
        self.max_N = torch.full_like(like_N, -torch.inf)
        self.sum_N = torch.zeros_like(like_N)
        """Of exp(x - max)."""
        self.weighted_N = torch.zeros_like(like_N) if entropy else None
        """Of exp(x - max) (x - max)."""

    def add(self, where: slice, logits_nv: Tensor) -> None:
        """Take in more logits of the rows `where`; they are overwritten."""
        self._rebase(where, torch.maximum(self.max_N[where], logits_nv.amax(-1)))
        max_n1 = self.max_N[where, None]
        below_nv = logits_nv.sub_(max_n1.masked_fill(max_n1 == -torch.inf, 0))
        exp_nv = below_nv.exp()
        self.sum_N[where] += exp_nv.sum(-1)
        if self.weighted_N is not None:
            below_nv.masked_fill_(below_nv == -torch.inf, 0)
            self.weighted_N[where] += exp_nv.mul_(below_nv).sum(-1)

    def _rebase(self, where: slice, max_n: Tensor) -> None:
        old_n = self.max_N[where]
        shift_n = torch.where(old_n == -torch.inf, 0, old_n - max_n)
        scale_n = shift_n.exp()
        if self.weighted_N is not None:
            moved_n = self.weighted_N[where] + shift_n * self.sum_N[where]
            self.weighted_N[where] = scale_n * moved_n
        self.sum_N[where] *= scale_n
        self.max_N[where] = max_n

    def over_ranks(self, shard: VocabShard) -> None:
        """Add up what the ranks have."""
        if shard.group is None:
            return
        self._rebase(slice(None), shard.max_(self.max_N.clone()))
        shard.sum_(self.sum_N)
        if self.weighted_N is not None:
            shard.sum_(self.weighted_N)

    @property
    def value_N(self) -> Tensor:
        """The log-sum-exp."""
        return self.max_N + self.sum_N.log()

    @property
    def entropy_N(self) -> Tensor | None:
        """The entropy in nats."""
        if self.weighted_N is None:
            return None
        return self.sum_N.log() - self.weighted_N / self.sum_N
