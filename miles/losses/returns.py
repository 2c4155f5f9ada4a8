"""Returns, GAE and whitening over the trainable tokens of a step: no gradient, float64 inside.

A time step is a trainable token. Other tokens are skipped without decay and get 0.

Shapes: T tokens, S sequences, K time steps (trainable tokens, sequence by sequence, in time order),
H pairs of time steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.errors import DtypeError, SettingError, ShapeError
from miles.packed import Packed, tokens_per_sequence

__all__ = ["discounted_returns", "gae", "length_adaptive_lambda", "terminal_rewards", "whiten"]


@torch.no_grad()
def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    packed: Packed,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    lam_value: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and the returns that a critic learns.

    `delta_t = r_t + gamma V_{t+1} - V_t` and `A_t = delta_t + gamma lam A_{t+1}` over the
    trainable tokens of a sequence, in `positions_T` order (array order without positions). There
    is no bootstrap after the last one. Linear time and memory; no loop over time.

    Args:
        rewards_T: float `[T]`; `terminal_rewards` makes it from one reward a sequence.
        values_T: float `[T]`, the critic's.
        packed: where the tokens live, in any order; sequences may be spread over
            `packed.seq_group`, and then `packed.positions_T` is required.
        gamma: discount, in `[0, 1]`.
        lam: decay of the advantages, in `[0, 1]`; a float, or float `[S]` with one for each
            sequence (`length_adaptive_lambda`).
        lam_value: decay of the returns; None for `lam`.

    Returns:
        Advantages `[T]` and returns `[T]`, 0 at masked positions, in the promoted dtype of the
        inputs. Returns are `A_t + V_t`, where A has `lam_value` if that is given. A NaN at a
        trainable token reaches that token and the earlier ones of its sequence, no other.

    Raises:
        SettingError: gamma or lam out of range; positions missing or repeated.

    References:
        GAE: arXiv 1506.02438, equation 16. A lambda for the critic: VC-PPO, arXiv 2503.01491.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, False, True]]))
        >>> rewards, values = torch.tensor([0.0, 9.0, 1.0]), torch.tensor([0.5, 9.0, 0.5])
        >>> advantages, returns = gae(rewards, values, packed, lam=0.5)
        >>> advantages.tolist(), returns.tolist()
        ([0.25, 0.0, 0.5], [0.75, 0.0, 1.0])
    """
    packed.check(rewards_T=rewards_T, values_T=values_T)
    _check_floating(rewards_T=rewards_T, values_T=values_T)
    _check_fraction("gamma", gamma)
    _check_lambda("lam", lam, packed)
    if lam_value is not None:
        _check_lambda("lam_value", lam_value, packed)
    dtype = torch.promote_types(rewards_T.dtype, values_T.dtype)

    steps = _time_steps(packed)
    values_K = steps.take(values_T)
    deltas_K = steps.take(rewards_T) - values_K
    next_K = torch.where(steps.last_K[:-1], 0, values_K[1:])
    deltas_K[:-1].add_(next_K, alpha=gamma)

    advantages_K = steps.scan(deltas_K, steps.decay(gamma, lam))
    returns_K = advantages_K
    if lam_value is not None:
        returns_K = steps.scan(deltas_K, steps.decay(gamma, lam_value))
    return steps.put(advantages_K, dtype), steps.put(returns_K + values_K, dtype)


@torch.no_grad()
def discounted_returns(rewards_T: Tensor, packed: Packed, *, gamma: float = 1.0) -> Tensor:
    """`G_t = r_t + gamma G_{t+1}` over the trainable tokens of each sequence (REINFORCE++).

    Args:
        rewards_T: float `[T]`.
        packed: as for `gae`.
        gamma: discount, in `[0, 1]`.

    Returns:
        `[T]`, 0 at masked positions, in the dtype of the rewards.

    References:
        REINFORCE++: arXiv 2501.03262.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, False, True]]))
        >>> discounted_returns(torch.tensor([1.0, 9.0, 4.0]), packed, gamma=0.5).tolist()
        [3.0, 0.0, 4.0]
    """
    packed.check(rewards_T=rewards_T)
    _check_floating(rewards_T=rewards_T)
    _check_fraction("gamma", gamma)
    steps = _time_steps(packed)
    return steps.put(steps.scan(steps.take(rewards_T), gamma), rewards_T.dtype)


@torch.no_grad()
def terminal_rewards(rewards_S: Tensor, packed: Packed) -> Tensor:
    """Each sequence's reward at its last trainable token: `[S]` to `[T]`.

    A sequence without a trainable token keeps no reward. NaN is not filtered: give 0, or mask the
    sequence, where a sample was not scored.

    Args:
        rewards_S: float `[S]`.
        packed: as for `gae`.

    Returns:
        `[T]`, 0 elsewhere, in the dtype of the rewards.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True, False], [False, True, True]]))
        >>> terminal_rewards(torch.tensor([5.0, 7.0]), packed).tolist()
        [0.0, 5.0, 0.0, 0.0, 0.0, 7.0]
    """
    _check_positions(packed)
    _check_floating(rewards_S=rewards_S)
    rewards_T = packed.per_token(rewards_S)
    times_T = packed.positions_T
    if times_T is None:
        times_T = torch.arange(packed.num_positions, device=packed.mask_T.device)
    last_S = times_T.new_full((packed.num_seqs,), -1)
    last_S.scatter_reduce_(0, packed.seq_ids_T, torch.where(packed.mask_T, times_T, -1), "amax")
    if packed.seq_group is not None:
        dist.all_reduce(last_S, op=dist.ReduceOp.MAX, group=packed.seq_group)
    return torch.where(packed.mask_T & (times_T == last_S[packed.seq_ids_T]), rewards_T, 0)


@torch.no_grad()
def whiten(
    values_T: Tensor,
    mask_T: Tensor,
    *,
    group: ProcessGroup | None = None,
    ddof: int = 1,
    eps: float = 1e-8,
    mean: bool = True,
) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over all trainable tokens of the step. Two-pass.

    Args:
        values_T: float `[T]`, the whole step of this rank.
        mask_T: bool `[T]`; what is False is left out and gets 0. All of it may be False: the rank
            then still takes part in the sums of the others.
        group: every rank that holds tokens of the step, data- and context-parallel.
        ddof: 1 for the unbiased variance, 0 for the population's.
        eps: added to the variance.
        mean: False adds the mean again, so that only the spread changes.

    Returns:
        `[T]`, in the dtype of the values. A single token gives 0.

    Example:
        >>> values, mask = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([True] * 3 + [False])
        >>> whiten(values, mask).tolist()
        [-1.0, 0.0, 1.0, 0.0]
    """
    if values_T.ndim != 1 or values_T.shape != mask_T.shape:
        raise ShapeError(
            f"values_T has shape {tuple(values_T.shape)} and mask_T {tuple(mask_T.shape)}; "
            "expected [T] for both"
        )
    _check_floating(values_T=values_T)
    if mask_T.dtype != torch.bool:
        raise DtypeError(f"mask_T is {mask_T.dtype}; expected torch.bool")
    check_spread(ddof, eps)
    centred_T, average, variance = moments(values_T, mask_T, group=group, ddof=ddof)
    whitened_T = centred_T / (variance + eps).sqrt()
    if not mean:
        whitened_T = torch.where(mask_T, whitened_T + average, 0)
    return whitened_T.to(values_T.dtype)


def check_spread(ddof: int, eps: float) -> None:
    """Refuse settings of a standard deviation that would turn signs or give NaN."""
    if ddof not in (0, 1):
        raise SettingError(f"ddof is {ddof}; expected 0 or 1")
    if not 0 <= eps < float("inf"):
        raise SettingError(f"eps is {eps}; expected 0 or a small positive number, such as 1e-6")


def length_adaptive_lambda(packed_or_lengths: Packed | Tensor, *, alpha: float = 0.05) -> Tensor:
    """`1 - 1 / (alpha l)`, in `[0, 1]`: a lambda for `gae` that grows with the length l.

    Args:
        packed_or_lengths: a `Packed`, whose trainable tokens are counted, or lengths `[S]`.
        alpha: above 0; the larger, the sooner lambda nears 1.

    Returns:
        float64 `[S]`; 0 where `alpha l <= 1`.

    References:
        VAPO: arXiv 2504.05118, section 4.2.

    Example:
        >>> length_adaptive_lambda(torch.tensor([0, 20, 40, 200])).tolist()
        [0.0, 0.0, 0.5, 0.9]
    """
    if not alpha > 0:
        raise SettingError(f"alpha is {alpha}; expected a number above 0")
    if isinstance(packed_or_lengths, Packed):
        lengths_S = tokens_per_sequence(packed_or_lengths)
    else:
        lengths_S = packed_or_lengths
    if lengths_S.ndim != 1:
        raise ShapeError(f"lengths have shape {tuple(lengths_S.shape)}; expected [S]")
    return 1 - 1 / (alpha * lengths_S.to(torch.float64)).clamp(min=1)


def moments(
    values_N: Tensor, mask_N: Tensor, *, group: ProcessGroup | None, ddof: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`x - mean` (0 where masked), mean and variance of what `mask_N` keeps on all ranks, float64.

    Two-pass: the sum of squares less the square of the sum has no digits left where the mean is
    large. Every rank joins both sums, whatever its mask.
    """
    values_N = torch.where(mask_N, values_N, 0).to(torch.float64)
    totals = torch.stack([values_N.sum(), mask_N.sum().to(torch.float64)])
    if group is not None:
        dist.all_reduce(totals, group=group)
    total, number = totals
    average = total / number.clamp(min=1)
    centred_N = torch.where(mask_N, values_N - average, 0)
    squares = centred_N.square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return centred_N, average, squares / (number - ddof).clamp(min=1)


@dataclass(frozen=True)
class _Steps:
    """The time steps of whole sequences, and how to reach them from this rank's tokens."""

    packed: Packed
    index_J: Tensor | None
    """Where this rank's J trainable tokens lie in `[T]`; None for all of `[T]`."""
    order_K: Tensor | None
    """Where the time steps lie among the trainable tokens of all ranks; None for as they are."""
    seq_ids_K: Tensor
    last_K: Tensor
    """bool: the last time step of its sequence."""
    shards: _Shards | None

    def take(self, values_T: Tensor) -> Tensor:
        values = values_T if self.index_J is None else values_T.index_select(0, self.index_J)
        values = values.to(torch.float64)
        if self.shards is not None:
            values = self.shards.gather(values)
        return values if self.order_K is None else values.index_select(0, self.order_K)

    def put(self, values_K: Tensor, dtype: torch.dtype) -> Tensor:
        values = values_K.to(dtype)
        if self.order_K is not None:
            values = torch.empty_like(values).index_copy_(0, self.order_K, values)
        if self.shards is not None:
            values = self.shards.own(values)
        if self.index_J is None:
            return values
        return values.new_zeros(self.packed.num_positions).index_copy_(0, self.index_J, values)

    def decay(self, gamma: float, lam: float | Tensor) -> float | Tensor:
        if not isinstance(lam, Tensor):
            return gamma * lam
        return (gamma * lam.to(torch.float64)).index_select(0, self.seq_ids_K)

    def scan(self, inputs_K: Tensor, decay: float | Tensor) -> Tensor:
        return _scan(inputs_K, decay, self.last_K)


@dataclass(frozen=True)
class _Shards:
    """How many trainable tokens each rank of `seq_group` holds, in the order of ranks."""

    group: ProcessGroup
    counts: list[int]

    def gather(self, values_J: Tensor) -> Tensor:
        """Those of all ranks end to end. Ranks send equal sizes, the largest."""
        padded = values_J.new_zeros(max(self.counts))
        padded[: values_J.shape[0]] = values_J
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])

    def own(self, values: Tensor) -> Tensor:
        return torch.split(values, self.counts)[dist.get_rank(self.group)]


def _time_steps(packed: Packed) -> _Steps:
    _check_positions(packed)
    index_J = None if bool(packed.mask_T.all()) else packed.mask_T.nonzero().squeeze(1)
    seq_ids, positions = packed.seq_ids_T, packed.positions_T
    if index_J is not None:
        seq_ids = seq_ids.index_select(0, index_J)
        positions = None if positions is None else positions.index_select(0, index_J)
    shards = None
    if packed.seq_group is not None and positions is not None:
        shards = _share(seq_ids, packed.seq_group)
        seq_ids, positions = shards.gather(seq_ids), shards.gather(positions)
    order_K = None
    last_K = _run_ends(seq_ids)
    if not _in_order(seq_ids, positions, last_K):
        order_K = _order(seq_ids, positions, packed.num_seqs)
        seq_ids = seq_ids[order_K]
        last_K = _run_ends(seq_ids)
    return _Steps(packed, index_J, order_K, seq_ids, last_K, shards)


def _share(seq_ids_J: Tensor, group: ProcessGroup) -> _Shards:
    own = torch.tensor([seq_ids_J.shape[0]], device=seq_ids_J.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return _Shards(group, torch.cat(counts).tolist())


def _run_ends(seq_ids: Tensor) -> Tensor:
    """bool: the next token is of another sequence, or there is none."""
    ends = torch.ones_like(seq_ids, dtype=torch.bool)
    torch.ne(seq_ids[1:], seq_ids[:-1], out=ends[:-1])
    return ends


def _in_order(seq_ids: Tensor, positions: Tensor | None, ends: Tensor) -> bool:
    """Whether each sequence lies in one piece, in time order, so that nothing need be moved."""
    runs = seq_ids[ends]
    if torch.unique(runs).shape[0] < runs.shape[0]:
        return False
    return positions is None or bool(((positions[:-1] < positions[1:]) | ends[:-1]).all())


def _order(seq_ids: Tensor, positions: Tensor | None, num_seqs: int) -> Tensor:
    """Where tokens lie, sequence by sequence, in time order."""
    if positions is None:
        return seq_ids.argsort(stable=True)
    length, width = seq_ids.shape[0], int(positions.max()) + 1
    if num_seqs * width <= 8 * length:  # a table of all places is linear, a sort is not
        table = torch.full((num_seqs * width,), -1, device=seq_ids.device)
        table[seq_ids * width + positions] = torch.arange(length, device=seq_ids.device)
        order = table[table >= 0]
        repeated = order.shape[0] < length
    else:
        order = positions.argsort(stable=True)
        order = order[seq_ids[order].argsort(stable=True)]
        seqs, times = seq_ids[order], positions[order]
        repeated = bool(((seqs[1:] == seqs[:-1]) & (times[1:] == times[:-1])).any())
    if repeated:
        raise SettingError(
            "two trainable tokens of one sequence have the same position; expected each token "
            "once in positions_T, over all ranks of seq_group"
        )
    return order


def _scan(inputs_K: Tensor, decay: float | Tensor, last_K: Tensor) -> Tensor:
    """`y_t = x_t + decay_t y_{t+1}`, and `y_t = x_t` at the last step of a sequence.

    A step and its successor make one step of a scan half as long, whose decay is the product.
    Nothing is divided by a power of the decay, so that a power may underflow. Sequences are kept
    apart by `where` and not by a decay of 0, since 0 x NaN is NaN.
    """
    length = inputs_K.shape[0]
    if length <= 1:
        return inputs_K.clone()
    if length % 2:
        rest_K = _scan(inputs_K[1:], _at(decay, slice(1, None)), last_K[1:])
        first = _link(inputs_K[:1], _at(decay, slice(1)), rest_K[:1], last_K[:1])
        return torch.cat([first, rest_K])
    even_H, odd_H = inputs_K[0::2], inputs_K[1::2]
    even_decay, odd_decay = _at(decay, slice(0, None, 2)), _at(decay, slice(1, None, 2))
    even_last_H, odd_last_H = last_K[0::2], last_K[1::2]
    pairs_H = _link(even_H, even_decay, odd_H, even_last_H)
    pairs_H = _scan(pairs_H, even_decay * odd_decay, even_last_H | odd_last_H)
    outputs_K = torch.empty_like(inputs_K)
    outputs_K[0::2] = pairs_H
    outputs_K[1:-1:2] = _link(odd_H[:-1], _at(odd_decay, slice(-1)), pairs_H[1:], odd_last_H[:-1])
    outputs_K[-1] = inputs_K[-1]
    return outputs_K


def _link(inputs: Tensor, decay: float | Tensor, following: Tensor, last: Tensor) -> Tensor:
    if isinstance(decay, Tensor):
        linked = torch.addcmul(inputs, decay, following)
    else:
        linked = torch.add(inputs, following, alpha=decay)
    return torch.where(last, inputs, linked)


def _at(decay: float | Tensor, where: slice) -> float | Tensor:
    return decay[where] if isinstance(decay, Tensor) else decay


def _check_positions(packed: Packed) -> None:
    if packed.seq_group is not None and packed.positions_T is None:
        raise SettingError(
            "packed has seq_group and no positions_T; expected positions, since the order of "
            "tokens that are spread over ranks is not known without; build the Packed with them"
        )


def _check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} is {tensor.dtype}; expected floating point; use .float()")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise SettingError(f"{name} is {value}; expected a number in [0, 1]")


def _check_lambda(name: str, lam: float | Tensor, packed: Packed) -> None:
    if not isinstance(lam, Tensor):
        return _check_fraction(name, lam)
    if lam.shape != (packed.num_seqs,):
        raise ShapeError(
            f"{name} has shape {tuple(lam.shape)}; expected a float, or [{packed.num_seqs}], one "
            "for each sequence"
        )
    _check_floating(**{name: lam})
    if lam.device.type == "cpu" and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise SettingError(f"{name} is {lam.tolist()[:8]}; expected numbers in [0, 1]")
