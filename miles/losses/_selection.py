"""Which tokens of a whole step are the largest, over every rank.

Shapes: N values of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import SettingError
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
