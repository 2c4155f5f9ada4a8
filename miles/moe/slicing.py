"""A tape cut the way a parallel trainer cuts its tokens and layers.

Where several apply, the order is that of the tokens: `for_context_parallel`, then
`for_sequence_parallel`; `for_pipeline` may come anywhere. Data parallel is a slice of the batch,
and expert parallel needs nothing, since each rank routes all of its tokens.

The tape has one row for each token, the last of a sequence included (`RoutingTape.pad` and
`collate` see to that). Shapes: N rows, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles.errors import RoutingError
from miles.moe.tape import RoutingTape

__all__ = ["for_context_parallel", "for_pipeline", "for_sequence_parallel"]


def for_sequence_parallel(tape: RoutingTape, rank: int, world_size: int) -> RoutingTape:
    """The contiguous chunk of tokens that this tensor-parallel rank routes.

    The tape is padded at its end with rows that say "not recorded", to a multiple of
    `world_size`; without padding no row is copied.

    Args:
        tape: one row for each token of the micro-batch.
        rank: of this process in the tensor-parallel group.
        world_size: of that group.

    Returns:
        `ceil(N / world_size)` rows on every rank.

    Raises:
        RoutingError: a rank outside the group.

    Example:
        >>> from miles.moe import RoutingTape
        >>> tape = RoutingTape(torch.arange(3).view(3, 1, 1), num_experts=4)
        >>> [for_sequence_parallel(tape, rank, 2).expert_ids.flatten().tolist() for rank in (0, 1)]
        [[0, 1], [2, -1]]
    """
    _check_rank(rank, world_size)
    size = -(-len(tape) // world_size)
    part = tape[rank * size : (rank + 1) * size]
    return part if len(part) == size else RoutingTape.pad([part], size)


def for_context_parallel(
    tape: RoutingTape, cu_seqlens: Tensor | Sequence[int], rank: int, world_size: int
) -> RoutingTape:
    """The two chunks of every sequence that this context-parallel rank holds (zig-zag).

    Each sequence is padded at its end, with rows that say "not recorded", to a multiple of
    `2 * world_size` and cut into so many chunks; rank r takes chunks r and
    `2 * world_size - 1 - r`, which balances the work of causal attention. A group of one holds
    everything, unpadded.

    Args:
        tape: one row for each token, sequences end to end.
        cu_seqlens: integer `[S + 1]`, where sequences begin, from 0 to N.
        rank: of this process in the context-parallel group.
        world_size: of that group.

    Returns:
        As many rows on every rank.

    Raises:
        RoutingError: a rank outside the group, or `cu_seqlens` that do not fit the tape.

    Example:
        >>> from miles.moe import RoutingTape
        >>> tape = RoutingTape(torch.arange(7).view(7, 1, 1), num_experts=8)
        >>> for rank in (0, 1):
        ...     for_context_parallel(tape, [0, 4, 7], rank, 2).expert_ids.flatten().tolist()
        [0, 3, 4, -1]
        [1, 2, 5, 6]
    """
    _check_rank(rank, world_size)
    starts_S1 = torch.as_tensor(cu_seqlens).to("cpu", torch.int64)
    _check_cu_seqlens(starts_S1, len(tape))
    if world_size == 1:
        return tape
    index = [
        _zigzag(start, end, rank, world_size)
        for start, end in zip(starts_S1[:-1].tolist(), starts_S1[1:].tolist(), strict=True)
    ]
    return tape._take(torch.cat(index) if index else starts_S1[:0])


def for_pipeline(tape: RoutingTape, layers: Sequence[int]) -> RoutingTape:
    """The mixture-of-experts layers that this pipeline stage (or virtual stage) holds.

    Args:
        tape: all layers of the model.
        layers: which of the tape's layers, in the stage's order. They are counted among the
            mixture-of-experts layers: dense ones have no place in a tape. A stage may have none.

    Returns:
        All rows of these layers; neighbours, such as `range(2, 4)`, are not copied.

    Raises:
        RoutingError: a layer that the tape does not have.

    Example:
        >>> from miles.moe import RoutingTape
        >>> tape = RoutingTape(torch.arange(4).view(1, 4, 1), num_experts=4)
        >>> for_pipeline(tape, range(2, 4)).expert_ids.tolist()
        [[[2], [3]]]
    """
    chosen = [int(layer) for layer in layers]
    wrong = [layer for layer in chosen if not 0 <= layer < tape.num_layers]
    if wrong:
        raise RoutingError(
            f"layers {wrong} are not on the tape; expected 0..{tape.num_layers - 1}, counted among "
            "the mixture-of-experts layers only"
        )
    first, count = (chosen[0] if chosen else 0), len(chosen)
    if chosen == list(range(first, first + count)):
        ids = tape._ids[:, first : first + count]
    else:
        ids = tape._ids[:, chosen]
    return tape._with(ids, tape._holes_N, tape.spans)


def _zigzag(start: int, end: int, rank: int, world_size: int) -> Tensor:
    """int64: rows of one sequence that a rank holds, -1 for padding."""
    size = -(-(end - start) // (2 * world_size))
    chunks = [rank, 2 * world_size - 1 - rank]
    index = torch.cat([torch.arange(chunk * size, (chunk + 1) * size) for chunk in chunks]) + start
    return index.masked_fill(index >= end, -1)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise RoutingError(
            f"rank is {rank} of world_size {world_size}; expected 0..{world_size - 1}"
            if world_size > 0
            else f"world_size is {world_size}; expected 1 or more"
        )


def _check_cu_seqlens(starts_S1: Tensor, num_rows: int) -> None:
    fits = (
        starts_S1.ndim == 1
        and len(starts_S1) > 0
        and int(starts_S1[0]) == 0
        and int(starts_S1[-1]) == num_rows
        and bool((starts_S1.diff() >= 0).all())
    )
    if not fits:
        raise RoutingError(
            f"cu_seqlens is {starts_S1.tolist()}; expected numbers that grow from 0 to {num_rows}, "
            "the rows of the tape; it has one for each token, padding included"
        )
