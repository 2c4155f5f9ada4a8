"""Small random optimizer steps, whose masked positions hold garbage."""

from typing import NamedTuple

import torch
from hypothesis import settings
from torch import Tensor

from miles import Packed

quick = settings(max_examples=40, deadline=None)


class Step(NamedTuple):
    """One whole step on one process, float64."""

    packed: Packed
    logprobs_T: Tensor
    old_T: Tensor
    rollout_T: Tensor
    ref_T: Tensor
    advantages_T: Tensor

    def leaf(self) -> Tensor:
        return self.logprobs_T.clone().requires_grad_()


def random_step(seed: int = 0, num_seqs: int = 8, max_len: int = 7) -> Step:
    """Sequence 1 trains on nothing; groups hold two sequences each; group 1 has no sequence."""
    rng = torch.Generator().manual_seed(seed)
    lengths_S = torch.randint(1, max_len + 1, (num_seqs,), generator=rng)
    cu_S1 = torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)])
    mask_T = torch.rand(int(cu_S1[-1]), generator=rng) < 0.7
    mask_T[cu_S1[1] : cu_S1[2]] = False
    mask_T[0] = True
    group_ids_S = torch.arange(num_seqs) // 2 * 2
    packed = Packed.from_cu_seqlens(cu_S1, mask_T, group_ids_S)

    def near(values_T: Tensor, spread: float) -> Tensor:
        noise_T = torch.randn(values_T.shape, generator=rng, dtype=torch.float64)
        return values_T + spread * noise_T

    old_T = -torch.rand(mask_T.shape, generator=rng, dtype=torch.float64) * 3
    values = [near(old_T, 0.3), old_T, near(old_T, 0.8), near(old_T, 0.5), near(0 * old_T, 1.0)]
    return Step(packed, *(poison(values_T, mask_T) for values_T in values))


def poison(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """NaN, inf and -inf in turn wherever `mask_T` is False."""
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=values_T.dtype)
    garbage_T = garbage[torch.arange(len(values_T)) % 3]
    return torch.where(mask_T, values_T, garbage_T)


def select(packed: Packed, seqs: list[int]) -> tuple[Packed, Tensor]:
    """These sequences, in this order, and where their tokens lie in `packed`."""
    parts = [(packed.seq_ids_T == seq).nonzero().flatten() for seq in seqs]
    index_T = torch.cat(parts)
    ids_S = torch.arange(len(seqs))
    lengths_S = torch.tensor([len(part) for part in parts])
    chosen = Packed(
        seq_ids_T=ids_S.repeat_interleave(lengths_S),
        mask_T=packed.mask_T[index_T],
        num_seqs=len(seqs),
        group_ids_S=packed.group_ids_S[seqs],
        positions_T=packed.positions_T[index_T],
        seq_group=packed.seq_group,
    )
    return chosen, index_T
