"""A later token's value at an earlier one, wherever its sequence's tokens lie.

Shapes: T tokens of this rank, M of them that another rank may need, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from miles.errors import SettingError, ShapeError
from miles.packed import Packed, check_tensors

__all__ = ["shift_tokens"]


@torch.no_grad()
def shift_tokens(values_T: Tensor, packed: Packed, *, by: int = 1, fill: float = 0) -> Tensor:
    """The value `by` positions later in the same sequence, at each token.

    Never one of another sequence. Tokens may be in any order; where `packed.seq_group` shares the
    sequences (context parallel, zig-zag shards too) the ranks exchange what lies at the edges of
    their pieces, and have to call this together.

    Args:
        values_T: `[T]` or `[T, ...]`: ids, a mask, hidden states. Detached.
        packed: where the tokens live, `positions_T` included.
        by: 0 or more.
        fill: what stands where the sequence has no such token.

    Returns:
        As `values_T`.

    Raises:
        ShapeError, DtypeError: not one value for each token.
        SettingError: a negative `by`, or no positions.

    Example:
        >>> from miles.rollout.speculative.losses import shift_tokens
        >>> packed = Packed.from_cu_seqlens(torch.tensor([0, 3, 5]), torch.ones(5).bool())
        >>> shift_tokens(torch.tensor([5, 6, 7, 8, 9]), packed, fill=-100).tolist()
        [6, 7, -100, 9, -100]
    """
    check_tensors(values_T=values_T)
    if values_T.shape[:1] != packed.mask_T.shape:
        raise ShapeError(
            f"values_T has shape {tuple(values_T.shape)}; expected [{packed.num_positions}, ...], "
            "one for each token"
        )
    if packed.positions_T is None:
        raise SettingError("shift_tokens needs positions_T; build the Packed with it")
    if by < 0:
        raise SettingError(f"by is {by}; expected 0 or more, the distance to a later token")
    keys_T = packed.seq_ids_T << 32 | packed.positions_T
    out_T, found_T = _look_up(keys_T + by, keys_T, values_T, fill)
    if packed.seq_group is None or by == 0:
        return out_T
    # A token whose earlier one is not here may be what another rank lacks.
    wanted_T = (packed.positions_T >= by) & ~torch.isin(keys_T - by, keys_T)
    keys_M, values_M = _gather(keys_T[wanted_T], values_T[wanted_T], packed.seq_group)
    theirs_T, _ = _look_up(keys_T + by, keys_M, values_M, fill)
    return torch.where(_like(found_T, out_T), out_T, theirs_T)


def _look_up(
    wanted_T: Tensor, keys_M: Tensor, values_M: Tensor, fill: float
) -> tuple[Tensor, Tensor]:
    """The value of each key, and whether there is one."""
    if keys_M.shape[0] == 0:
        return (
            values_M.new_full((wanted_T.shape[0], *values_M.shape[1:]), fill),
            torch.zeros_like(wanted_T, dtype=torch.bool),
        )
    sorted_M, order_M = keys_M.sort()
    at_T = torch.searchsorted(sorted_M, wanted_T).clamp(max=keys_M.shape[0] - 1)
    found_T = sorted_M[at_T] == wanted_T
    out_T = values_M[order_M[at_T]]
    return torch.where(_like(found_T, out_T), out_T, torch.full_like(out_T, fill)), found_T


def _like(flags_T: Tensor, values_T: Tensor) -> Tensor:
    return flags_T.view(-1, *[1] * (values_T.ndim - 1))


def _gather(keys_M: Tensor, values_M: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """What all ranks have, padded on the way to the most that one has."""
    size = dist.get_world_size(group)
    counts_R = [keys_M.new_zeros(1) for _ in range(size)]
    dist.all_gather(counts_R, keys_M.new_tensor([keys_M.shape[0]]), group=group)
    counts = torch.cat(counts_R).tolist()
    if not any(counts):
        return keys_M, values_M
    missing = max(counts) - keys_M.shape[0]
    keys_M = pad(keys_M, (0, missing), value=-1)
    is_bool = values_M.dtype == torch.bool
    values_M = values_M.to(torch.uint8) if is_bool else values_M
    values_M = torch.cat([values_M, values_M.new_zeros(missing, *values_M.shape[1:])])
    keys = [torch.empty_like(keys_M) for _ in counts]
    values = [torch.empty_like(values_M) for _ in counts]
    dist.all_gather(keys, keys_M, group=group)
    dist.all_gather(values, values_M.contiguous(), group=group)
    values_M = torch.cat(values)
    return torch.cat(keys), values_M.to(torch.bool) if is_bool else values_M
