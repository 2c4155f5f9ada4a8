"""Where tokens live, and how many there are.

Shapes: T tokens of this rank's micro-batch laid end to end, S sequences, G prompt groups,
B x L a padded batch (T = B * L, row-major).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, EmptyBatchError, SettingError, ShapeError

__all__ = ["Denominators", "Packed", "count", "pack", "unpack"]

MAX_GROUPS = 2**24
"""Group ids of a step are below it, since the counts of groups are dense (128 MiB there)."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Which sequence and group each token belongs to, and which tokens are trained on.

    It holds no values: log-probs, advantages and losses are `[T]` tensors beside it.

    Args:
        seq_ids_T: int64, sequence of each token, in `0..num_seqs-1`, in any order.
        mask_T: bool, trainable tokens.
        num_seqs: S, the same on every rank of `seq_group`.
        group_ids_S: int64, prompt group of each sequence, in `0..G-1` over the whole step, the same
            number for the same prompt on every rank; `count` takes ids below 2^24.
        positions_T: int64, index of a token within its sequence.
        seq_group: ranks that hold parts of the same sequences (context parallel).

    Raises:
        ShapeError, DtypeError: tensors that do not fit together, or what is no tensor.
        SettingError: ids out of range (looked for on CPU tensors only, to spare the GPU a stall).

    Example:
        >>> mask_BL = torch.tensor([[False, True, True], [True, False, False]])
        >>> packed = Packed.from_padded(mask_BL, group_ids_B=torch.tensor([0, 0]))
        >>> packed.seq_ids_T.tolist(), packed.num_seqs
        ([0, 0, 0, 1, 1, 1], 2)
        >>> count(packed).num_tokens.item()
        3
    """

    seq_ids_T: Tensor
    """int64 `[T]`: which sequence a token belongs to."""
    mask_T: Tensor
    """bool `[T]`: trainable tokens."""
    num_seqs: int
    """S, the same on every rank that shares these sequences."""
    group_ids_S: Tensor | None = None
    """int64 `[S]`: prompt group of each sequence."""
    positions_T: Tensor | None = None
    """int64 `[T]`: index within the sequence."""
    seq_group: ProcessGroup | None = None
    """Ranks that hold parts of the same sequences."""

    def __post_init__(self) -> None:
        _check_1d("seq_ids_T", self.seq_ids_T, torch.int64, None)
        length = self.seq_ids_T.shape[0]
        _check_1d("mask_T", self.mask_T, torch.bool, length)
        if self.positions_T is not None:
            _check_1d("positions_T", self.positions_T, torch.int64, length)
            _check_range("positions_T", self.positions_T, None)
        if self.num_seqs < 0:
            raise SettingError(f"num_seqs is {self.num_seqs}; expected 0 or more")
        if self.group_ids_S is not None:
            _check_1d("group_ids_S", self.group_ids_S, torch.int64, self.num_seqs)
            _check_range("group_ids_S", self.group_ids_S, None)
        _check_range("seq_ids_T", self.seq_ids_T, self.num_seqs)

    @classmethod
    def from_padded(
        cls,
        mask_BL: Tensor,
        group_ids_B: Tensor | None = None,
        *,
        seq_group: ProcessGroup | None = None,
    ) -> Self:
        """A padded batch, every position kept: `x_BL.flatten()` is `x_T`."""
        check_tensors(mask_BL=mask_BL)
        if mask_BL.ndim != 2:
            raise ShapeError(f"mask_BL has shape {tuple(mask_BL.shape)}; expected [B, L]")
        B, L = mask_BL.shape
        device = mask_BL.device
        return cls(
            seq_ids_T=torch.arange(B, device=device).repeat_interleave(L),
            mask_T=mask_BL.reshape(-1),
            num_seqs=B,
            group_ids_S=group_ids_B,
            positions_T=torch.arange(L, device=device).repeat(B),
            seq_group=seq_group,
        )

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_S1: Tensor,
        mask_T: Tensor,
        group_ids_S: Tensor | None = None,
        *,
        seq_group: ProcessGroup | None = None,
    ) -> Self:
        """Sequences end to end; `cu_seqlens_S1` is `[0, n0, n0 + n1, ...]`."""
        check_tensors(cu_seqlens_S1=cu_seqlens_S1, mask_T=mask_T)
        if cu_seqlens_S1.ndim != 1 or cu_seqlens_S1.shape[0] < 1:
            raise ShapeError(
                f"cu_seqlens_S1 has shape {tuple(cu_seqlens_S1.shape)}; expected [S + 1], "
                "starting with 0"
            )
        cu = cu_seqlens_S1.to(torch.int64)
        lengths_S = cu.diff()
        if cu[0] != 0 or cu[-1] != mask_T.shape[0] or bool((lengths_S < 0).any()):
            raise ShapeError(
                f"cu_seqlens_S1 is {cu.tolist()}; expected 0 first, no decrease, and the length "
                f"of mask_T ({mask_T.shape[0]}) last"
            )
        num_seqs = lengths_S.shape[0]
        seq_ids_T = torch.arange(num_seqs, device=cu.device).repeat_interleave(lengths_S)
        return cls(
            seq_ids_T=seq_ids_T,
            mask_T=mask_T,
            num_seqs=num_seqs,
            group_ids_S=group_ids_S,
            positions_T=torch.arange(mask_T.shape[0], device=cu.device) - cu[:-1][seq_ids_T],
            seq_group=seq_group,
        )

    @classmethod
    def cat(cls, parts: Sequence[Packed]) -> Packed:
        """Micro-batches laid end to end, for what is computed once for the whole step."""
        if not parts:
            raise EmptyBatchError("Packed.cat got no micro-batch; expected at least one")
        starts = torch.tensor([0, *(part.num_seqs for part in parts)]).cumsum(0).tolist()
        return Packed(
            seq_ids_T=torch.cat(
                [p.seq_ids_T + start for p, start in zip(parts, starts, strict=False)]
            ),
            mask_T=torch.cat([p.mask_T for p in parts]),
            num_seqs=starts[-1],
            group_ids_S=_cat_if_all([p.group_ids_S for p in parts], "group_ids_S"),
            positions_T=_cat_if_all([p.positions_T for p in parts], "positions_T"),
            seq_group=parts[0].seq_group,
        )

    @property
    def num_positions(self) -> int:
        """T, trainable or not."""
        return self.mask_T.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """A copy whose tensors are on `device`."""
        return replace(
            self,
            seq_ids_T=self.seq_ids_T.to(device),
            mask_T=self.mask_T.to(device),
            group_ids_S=None if self.group_ids_S is None else self.group_ids_S.to(device),
            positions_T=None if self.positions_T is None else self.positions_T.to(device),
        )

    def per_token(self, values_S: Tensor) -> Tensor:
        """Each sequence's value at each of its tokens: `[S]` to `[T]`.

        >>> packed = Packed.from_cu_seqlens(torch.tensor([0, 1, 3]), torch.ones(3).bool())
        >>> packed.per_token(torch.tensor([5., 7.])).tolist()
        [5.0, 7.0, 7.0]
        """
        _check_device(self.seq_ids_T, values_S=values_S)
        if values_S.shape != (self.num_seqs,):
            raise ShapeError(
                f"values_S has shape {tuple(values_S.shape)}; expected [{self.num_seqs}], "
                "one value for each sequence"
            )
        return values_S[self.seq_ids_T]

    def sum_per_sequence(self, values_T: Tensor) -> Tensor:
        """The sum of `values_T` over the trainable tokens of each sequence: `[T]` to `[S]`.

        Differentiable, over all ranks of `seq_group`, and accumulated in float64, so that a sum
        does not depend on how its sequence is spread out.
        """
        self.check(values_T=values_T)
        wide_T = torch.where(self.mask_T, values_T, 0).to(torch.float64)
        zeros_S = wide_T.new_zeros(self.num_seqs)
        sums_S = zeros_S.index_add(0, self.seq_ids_T, wide_T)
        if self.seq_group is not None:
            sums_S = _AllReduceSum.apply(sums_S, self.seq_group)
        return sums_S.to(values_T.dtype) if values_T.is_floating_point() else sums_S.to(torch.int64)

    def check(self, **tensors: Tensor) -> None:
        """Raise unless every tensor, given by name, is `[T]` and on the device of the mask.

        Raises:
            ShapeError, DtypeError: another shape, or no tensor at all.
            SettingError: another device.
        """
        _check_device(self.mask_T, **tensors)
        for name, tensor in tensors.items():
            if tensor.shape != self.mask_T.shape:
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}; expected "
                    f"{tuple(self.mask_T.shape)}, one value for each position of the packed batch"
                )


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """What losses are divided by, counted once for a whole optimizer step. See `count`."""

    num_tokens: Tensor
    """0-d int64: trainable tokens."""
    num_seqs: Tensor
    """0-d int64: sequences with at least one trainable token."""
    num_groups: Tensor | None
    """0-d int64: prompt groups with at least one trainable token; None without group ids."""
    group_tokens_G: Tensor | None
    """int64 `[G]`: trainable tokens of each group; None without group ids."""
    counted_keep: bool
    """Whether rejected tokens were left out of the counts, which may then all be 0."""

    def to(self, device: torch.device | str) -> Self:
        """A copy whose tensors are on `device`."""
        group_tokens_G = self.group_tokens_G
        return replace(
            self,
            num_tokens=self.num_tokens.to(device),
            num_seqs=self.num_seqs.to(device),
            num_groups=None if self.num_groups is None else self.num_groups.to(device),
            group_tokens_G=None if group_tokens_G is None else group_tokens_G.to(device),
        )


def count(
    packed: Packed | Sequence[Packed],
    *,
    keep_T: Tensor | Sequence[Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Denominators:
    """Count one optimizer step: every micro-batch, on every rank, before the first forward.

    Args:
        packed: the micro-batches of this rank. A sequence lies in one of them.
        keep_T: bool `[T]` for each; tokens that a correction rejected are then not counted. Where
            it leaves nothing of the step, all counts are 0 and every `aggregate` is 0 too.
        group: data-parallel ranks. Ranks that share sequences are `Packed.seq_group`, not here.

    Raises:
        EmptyBatchError: no micro-batch here, or, without `keep_T`, no trainable token on any rank.
        SettingError: a group id of 2^24 or more.

    Example:
        >>> mask_BL = torch.tensor([[True, True], [True, False]])
        >>> a = Packed.from_padded(mask_BL, torch.tensor([0, 1]))
        >>> b = Packed.from_padded(torch.tensor([[False, False]]), torch.tensor([1]))
        >>> d = count([a, b])
        >>> d.num_tokens.item(), d.num_seqs.item(), d.num_groups.item(), d.group_tokens_G.tolist()
        (3, 2, 2, [2, 1])
    """
    parts = [packed] if isinstance(packed, Packed) else list(packed)
    if not parts:
        raise EmptyBatchError(
            "count got no micro-batch; expected at least one Packed on every rank (a rank "
            "without work passes one whose mask_T is False)"
        )
    keeps = _as_list(keep_T, len(parts))
    with_groups = parts[0].group_ids_S is not None
    if any((part.group_ids_S is not None) != with_groups for part in parts):
        raise SettingError(
            "some micro-batches have group_ids_S and some do not; expected all or none"
        )

    tokens_per_part = [tokens_per_sequence(p, k) for p, k in zip(parts, keeps, strict=True)]
    totals = torch.stack(
        [torch.stack([tokens_S.sum(), (tokens_S > 0).sum()]) for tokens_S in tokens_per_part]
    ).sum(0)
    if group is not None:
        dist.all_reduce(totals, group=group)
    if keep_T is None and totals[0] == 0:
        raise EmptyBatchError(
            "the step has no trainable token on any rank; skip it, or look at mask_T"
        )
    group_tokens_G = _group_tokens(parts, tokens_per_part, group) if with_groups else None
    return Denominators(
        num_tokens=totals[0],
        num_seqs=totals[1],
        num_groups=None if group_tokens_G is None else (group_tokens_G > 0).sum(),
        group_tokens_G=group_tokens_G,
        counted_keep=keep_T is not None,
    )


def tokens_per_sequence(packed: Packed, keep_T: Tensor | None = None) -> Tensor:
    """int64 `[S]`: trainable (and kept) tokens of each whole sequence."""
    if keep_T is None:
        return packed.sum_per_sequence(torch.ones_like(packed.seq_ids_T))
    _check_1d("keep_T", keep_T, torch.bool, packed.num_positions)
    return packed.sum_per_sequence(keep_T.to(torch.int64))


def _group_tokens(
    parts: Sequence[Packed], tokens_per_part: Sequence[Tensor], group: ProcessGroup | None
) -> Tensor:
    ids = torch.cat([part.group_ids_S for part in parts if part.group_ids_S is not None])
    tokens = torch.cat(list(tokens_per_part))
    largest = ids.max() if ids.numel() else ids.new_tensor(-1)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    num_groups = int(largest) + 1
    if num_groups > MAX_GROUPS:
        raise SettingError(
            f"group_ids_S holds {num_groups - 1}; expected ids below {MAX_GROUPS}; number the "
            "prompts of a step 0, 1, 2, ..., the same on every rank"
        )
    group_tokens_G = tokens.new_zeros(num_groups).index_add(0, ids, tokens)
    if group is not None:
        dist.all_reduce(group_tokens_G, group=group)
    return group_tokens_G


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay 1-D tensors end to end; returns `(values_T, cu_seqlens_S1)`.

    >>> values, cu = pack([torch.tensor([1, 2]), torch.tensor([3])])
    >>> values.tolist(), cu.tolist()
    ([1, 2, 3], [0, 2, 3])
    """
    if not sequences:
        raise EmptyBatchError("pack got no sequence; expected at least one 1-D tensor")
    for index, values in enumerate(sequences):
        if values.ndim != 1:
            raise ShapeError(f"sequence {index} has shape {tuple(values.shape)}; expected 1-D")
    lengths = torch.tensor([0, *(values.shape[0] for values in sequences)])
    return torch.cat(list(sequences)), lengths.cumsum(0).to(sequences[0].device)


def unpack(values_T: Tensor, packed: Packed, *, fill: float = 0) -> Tensor:
    """One row for each sequence, by `positions_T`, with `fill` where there is no token.

    The inverse of `x_BL.flatten()` for `Packed.from_padded`.

    >>> packed = Packed.from_cu_seqlens(torch.tensor([0, 1, 3]), torch.ones(3).bool())
    >>> unpack(torch.tensor([5., 7., 9.]), packed).tolist()
    [[5.0, 0.0], [7.0, 9.0]]
    """
    packed.check(values_T=values_T)
    if packed.positions_T is None:
        raise SettingError("unpack needs positions_T; build the Packed with it")
    width = int(packed.positions_T.max()) + 1 if packed.num_positions else 0
    rows_SL = values_T.new_full((packed.num_seqs, width), fill)
    return rows_SL.index_put((packed.seq_ids_T, packed.positions_T), values_T)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose losses are summed too, so the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _as_list(keep_T: Tensor | Sequence[Tensor] | None, length: int) -> list[Tensor | None]:
    if keep_T is None:
        return [None] * length
    keeps: list[Tensor | None] = [keep_T] if isinstance(keep_T, Tensor) else list(keep_T)
    if len(keeps) != length:
        raise ShapeError(f"got {len(keeps)} keep_T for {length} micro-batches; expected one each")
    return keeps


def _cat_if_all(parts: Sequence[Tensor | None], name: str) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise SettingError(f"some micro-batches have {name} and some do not; expected all or none")
    return torch.cat(present)


def check_tensors(**tensors: Tensor) -> None:
    """Raise `DtypeError` for what is no tensor, such as a list."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{name} is a {type(tensor).__name__}; expected a tensor; wrap it in torch.tensor"
            )


def _check_device(expected: Tensor, **tensors: Tensor) -> None:
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if tensor.device != expected.device:
            raise SettingError(
                f"{name} is on {tensor.device}; expected {expected.device}, where the packed batch "
                f'is; move it with .to("{expected.device}")'
            )


def _check_1d(name: str, tensor: Tensor, dtype: torch.dtype, length: int | None) -> None:
    check_tensors(**{name: tensor})
    if tensor.ndim != 1 or (length is not None and tensor.shape[0] != length):
        expected = "1-D" if length is None else f"[{length}]"
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")
    if tensor.dtype != dtype:
        raise DtypeError(
            f"{name} is {tensor.dtype}; expected {dtype}; convert it with .to({dtype})"
        )


def _check_range(name: str, ids: Tensor, limit: int | None) -> None:
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (limit is not None and high >= limit):
        bound = "0 or more" if limit is None else f"0..{limit - 1}"
        raise SettingError(f"{name} holds values from {low} to {high}; expected {bound}")
