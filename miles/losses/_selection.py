"""What a whole step has in common, over every rank: its sums, its largest tokens, its errors.

Shapes: N values of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import MilesError, SettingError
from miles.packed import Packed


def ranks_of_step(packed: Packed, group: ProcessGroup | None) -> list[ProcessGroup]:
    """The groups to reduce over in turn: ranks that share sequences, then data-parallel ones."""
    return [ranks for ranks in (packed.seq_group, group) if ranks is not None]


def sum_over(values: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """The sum over ranks."""
    total = values.clone()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


@contextmanager
def refused_together(groups: Sequence[ProcessGroup], device: torch.device) -> Iterator[None]:
    """Raise on every rank when one does, so that none waits for it in a collective."""
    error: MilesError | None = None
    try:
        yield
    except MilesError as refused:
        error = refused
    num_refused = 0
    if groups:
        num_refused = int(sum_over(torch.tensor(int(error is not None), device=device), groups))
    if error is not None:
        raise error
    if num_refused:
        raise SettingError(
            "another rank refused its part of this step, for a reason that its own error tells; "
            "expected usable input on every rank"
        )


def largest(values_N: Tensor, k: int, groups: Sequence[ProcessGroup]) -> Tensor:
    """The `k` largest over ranks, in falling order; fewer where there are fewer.

    A rank sends its own `k` largest and no more.
    """
    top = values_N.topk(min(k, values_N.shape[0])).values
    lowest = -torch.inf if top.is_floating_point() else torch.iinfo(top.dtype).min
    for group in groups:
        width = torch.tensor(top.shape[0], device=top.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
        padded = top.new_full((int(width),), lowest)
        padded[: top.shape[0]] = top
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, padded, group=group)
        present = torch.cat(parts)
        present = present[present != lowest]
        top = present.topk(min(k, present.shape[0])).values
    return top


def number_in_share(share: float, num_tokens: int) -> int:
    """`floor(share * num_tokens)`, at least 1; a product that rounding left just short counts."""
    return max(1, int(share * num_tokens + 1e-9))


def check_share(share: float) -> None:
    """Refuse what is no fraction."""
    if not 0 < share <= 1:
        raise SettingError(
            f"share is {share}; expected a fraction above 0 and at most 1, such as 0.2"
        )
