"""What steps cost, as a function of the batch, from a few measured ones.

Shapes: M measured steps, C terms of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from miles.errors import EmptyBatchError, SettingError

__all__ = ["CostModel", "CostSample"]

Kind = Literal["decode", "verify", "draft"]
KINDS = ("decode", "verify", "draft")
ROUNDS = 8
KNEES = 8
"""As many as explain the times best go on to the next round."""
MAD = 1.4826  # of a normal distribution, its deviation over the median of absolute errors
NO_OUTLIER = 5e-3
"""Relative error up to which no sample is far off, however well others are explained."""
ROW_SPREAD = 0.06
"""Standard deviation, from row to row, of the share that is kept at a position: some texts are
easier to guess."""
LAST = 7 / 8
"""Rows that still get so much of what the longest does may be last."""


@dataclass(frozen=True, kw_only=True)
class CostSample:
    """One measured step."""

    kind: Kind
    """`decode`: a plain step of the target. `verify`: its pass over a draft. `draft`: the draft's
    part of a step, as long as all its `tokens` steps took."""
    batch: int
    """Rows (requests)."""
    tokens: int = 1
    """Tokens a row: 1 for `decode`; K + 1 for `verify`; the K steps of `draft`."""
    seconds: float
    """How long it took; on a GPU until its results were there."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.batch < 1 or self.tokens < 1 or not 0 < self.seconds < math.inf:
            raise SettingError(
                f"a {self.kind} step of {self.batch} rows and {self.tokens} tokens a row that took "
                f"{self.seconds} s; expected 1 or more of each, and a positive time"
            )


@dataclass(frozen=True, kw_only=True)
class RowsLeft:
    """What counts of the tokens that rows are still to get, `[B]`."""

    longest: int
    """Those of the row with most."""
    total: int
    """Those of all rows."""
    last: int
    """Rows that may be the last one."""

    @classmethod
    def of(cls, remaining: Sequence[int]) -> RowsLeft:
        """Raises `EmptyBatchError` where there is no row, `SettingError` where one gets nothing."""
        if not remaining:
            raise EmptyBatchError("no row is left; expected the tokens that each is still to get")
        if min(remaining) < 1:
            raise SettingError(
                f"a row is to get {min(remaining)} tokens; expected 1 or more: leave out rows that "
                "have ended"
            )
        longest = max(remaining)
        last = sum(tokens >= LAST * longest for tokens in remaining)
        return cls(longest=longest, total=sum(remaining), last=last)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a step: flat while reading the weights takes longest, then linear in tokens.

    A pass of the target over `batch` rows of `tokens` each takes

        floor + per_row * batch + per_token * max(0, batch * tokens - knee)
            [+ per_verify + per_verify_row * batch]

    `floor` is the weights read once and the launches; `per_row` a row's keys and values, read once
    however many tokens it has; beyond `knee` tokens the arithmetic takes longest. What stands in
    brackets is what a pass over several tokens costs more than a plain step, judging them for one.
    A step of the draft takes `draft_floor + draft_per_row * batch`, and before the first of them
    the draft is told what the target has settled, `per_draft + per_draft_row * batch`. Contexts
    longer than those that were measured make rows dearer: measure at the lengths you run.

    Example:
        >>> from miles.rollout.speculative import CostModel
        >>> cost = CostModel(floor=10e-3, per_token=0.1e-3, knee=64, draft_floor=1e-3)
        >>> cost.t_decode(8), cost.t_verify(8, 4), cost.t_verify(32, 4), cost.t_draft(8)
        (0.01, 0.01, 0.0164, 0.001)
        >>> round(cost.speedup(8, [0.8, 0.7, 0.6]), 2)
        2.07
    """

    floor: float
    """Seconds of a pass over next to nothing."""
    per_row: float = 0.0
    """Seconds a row."""
    per_token: float = 0.0
    """Seconds a token beyond `knee`."""
    knee: float = 0.0
    """Tokens of a pass, over all rows, from which on more of them take longer."""
    per_verify: float = 0.0
    """Seconds more where rows have several tokens."""
    draft_floor: float = 0.0
    """Seconds of a step of the draft over next to nothing."""
    draft_per_row: float = 0.0
    """Seconds a row of a step of the draft."""
    per_verify_row: float = 0.0
    """Seconds more a row where rows have several tokens."""
    per_draft: float = 0.0
    """Seconds before the draft's steps, however many."""
    per_draft_row: float = 0.0
    """Seconds a row before the draft's steps."""

    def __post_init__(self) -> None:
        values = asdict(self)
        bad = {k: v for k, v in values.items() if not 0 <= v < math.inf}
        if bad or not self.floor + self.per_row + self.per_token * (self.knee < 1):
            raise SettingError(
                f"a cost model with {bad or values}; expected finite numbers of 0 or more, and a "
                "pass that takes time"
            )

    def t_decode(self, batch: float) -> float:
        """Seconds of a plain step; of several, with their mean number of rows."""
        return self._pass(batch, 1)

    def t_verify(self, batch: float, tokens: int) -> float:
        """Seconds of a pass over `tokens` = K + 1 tokens a row."""
        extra = self.per_verify + self.per_verify_row * batch if tokens > 1 else 0.0
        return self._pass(batch, tokens) + extra

    def t_draft(self, batch: float) -> float:
        """Seconds of one step of the draft."""
        return self.draft_floor + self.draft_per_row * batch

    def t_step(self, batch: float, num_steps: int) -> float:
        """Seconds of a step with `num_steps` draft tokens, the draft's part too."""
        drafting = num_steps * self.t_draft(batch)
        if num_steps:
            drafting += self.per_draft + self.per_draft_row * batch
        return self.t_verify(batch, num_steps + 1) + drafting

    def speedup(self, batch: int, acceptance: Sequence[float]) -> float:
        """Tokens a second with as many draft tokens as rates, against plain decoding.

        Args:
            batch: rows.
            acceptance: `[K]`, the share kept at each position among those whose earlier tokens
                were kept.
        """
        time = self.t_step(batch, len(acceptance))
        return expected_tokens(acceptance) * self.t_decode(batch) / time

    def speedup_until_done(self, remaining: Sequence[int], acceptance: Sequence[float]) -> float:
        """The time until the last row has its tokens, without a draft over that with one.

        Where no other row takes the place of one that ends, early ends save little, and the last
        row decides. Without a draft rows get on at the same pace; with one some are ahead: by luck,
        which evens out over many steps, and because some texts are easier to guess than others,
        which does not. So for rows with as much to get each, this is below `speedup`, the more the
        less they are to get. Where a few have more than the others, it counts what the draft gains
        once only they are left.

        Args:
            remaining: `[B]`, the tokens that each row is still to get, 1 or more.
            acceptance: as for `speedup`.

        Raises:
            EmptyBatchError: no row.
            SettingError: a row that is to get nothing.

        Example:
            >>> from miles.rollout.speculative import CostModel
            >>> cost = CostModel(floor=10e-3, draft_floor=1e-3)
            >>> round(cost.speedup(32, [0.6, 0.6]), 2)
            1.63
            >>> [round(cost.speedup_until_done([n] * 32, [0.6, 0.6]), 2) for n in (32, 128, 1024)]
            [1.24, 1.36, 1.41]
        """
        return speedup_of_rows(self, RowsLeft.of(remaining), acceptance)

    @classmethod
    def fit(cls, samples: Sequence[CostSample]) -> CostModel:
        """Least squares of the relative error, no term below 0; samples far off count little.

        For every knee among the measured numbers of tokens the other terms follow from a linear
        problem; the best knee wins. Batches on both sides of the knee are needed to see it: with
        small ones alone large ones look free.

        Args:
            samples: measured steps; several of each kind, over the batches and lengths that you
                run. Repeat each and pass medians where times jitter. A sample whose error is more
                than twice the usual weighs as much less (Huber's estimator).

        Raises:
            EmptyBatchError: no sample of one of the three kinds.

        Example:
            >>> from miles.rollout.speculative import CostModel, CostSample
            >>> true = CostModel(floor=8e-3, per_token=1e-4, knee=64, draft_floor=1e-3)
            >>> samples = [CostSample(kind="decode", batch=b, seconds=true.t_decode(b))
            ...            for b in (1, 8, 64, 256)]
            >>> samples += [CostSample(kind="verify", batch=b, tokens=4,
            ...                        seconds=true.t_verify(b, 4)) for b in (1, 8, 64)]
            >>> samples += [CostSample(kind="draft", batch=b, tokens=3, seconds=3e-3)
            ...             for b in (1, 8)]
            >>> fitted = CostModel.fit(samples)
            >>> round(fitted.floor, 6), round(fitted.per_token, 6), round(fitted.knee)
            (0.008, 0.0001, 64)
        """
        missing = [kind for kind in KINDS if all(s.kind != kind for s in samples)]
        if missing:
            raise EmptyBatchError(
                f"no measured step of kind {', '.join(missing)} among {len(samples)}; expected "
                "some of each kind, over the batches that you run"
            )
        passes = [s for s in samples if s.kind != "draft"]
        drafts = [s for s in samples if s.kind == "draft"]
        knees = sorted({0, *(s.batch * s.tokens for s in passes)})
        terms = {
            float(knee): [
                [
                    1,
                    s.batch,
                    max(0, s.batch * s.tokens - knee),
                    more := s.tokens > 1,
                    more * s.batch,
                ]
                for s in passes
            ]
            for knee in knees
        }
        knee, (floor, per_row, per_token, per_verify, per_verify_row) = _robust(terms, passes)
        # Where lengths do not differ, all is the steps': fewer terms, and earlier ones, win.
        terms = {0.0: [[s.tokens, s.tokens * s.batch, 1, s.batch] for s in drafts]}
        _, (draft_floor, draft_per_row, per_draft, per_draft_row) = _robust(terms, drafts)
        return cls(
            floor=floor, per_row=per_row, per_token=per_token, knee=knee, per_verify=per_verify,
            draft_floor=draft_floor, draft_per_row=draft_per_row, per_verify_row=per_verify_row,
            per_draft=per_draft, per_draft_row=per_draft_row,
        )  # fmt: skip

    def _pass(self, batch: float, tokens: int) -> float:
        if batch < 1 or tokens < 1:
            raise SettingError(
                f"a pass over {batch} rows of {tokens} tokens; expected 1 or more of each"
            )
        beyond = max(0.0, batch * tokens - self.knee)
        return self.floor + self.per_row * batch + self.per_token * beyond


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens of a step: 1 + a_1 + a_1 a_2 + ...; with equal rates (1 - a^(K+1)) / (1 - a).

    Raises:
        SettingError: a rate outside [0, 1].

    Example:
        >>> from miles.rollout.speculative.cost import expected_tokens
        >>> expected_tokens([0.5, 0.5]), expected_tokens([])
        (1.75, 1.0)
    """
    total, kept = 1.0, 1.0
    for position, rate in enumerate(acceptance):
        if not 0 <= rate <= 1:
            raise SettingError(f"acceptance at position {position} is {rate}; expected 0 to 1")
        kept *= rate
        total += kept
    return total


def speedup_of_rows(cost: CostModel, left: RowsLeft, acceptance: Sequence[float]) -> float:
    """`CostModel.speedup_until_done`, for who asks several times about the same rows."""
    mean = expected_tokens(acceptance)
    steps = _steps_of_last(left, acceptance)
    plain = left.longest * cost.t_decode(left.total / left.longest)
    batch = max(1.0, left.total / mean / steps)  # rounding may leave less
    return plain / (steps * cost.t_step(batch, len(acceptance)))


def _steps_of_last(left: RowsLeft, acceptance: Sequence[float]) -> float:
    """How many steps pass until the last row has its tokens.

    After n steps the tokens of a row are taken for normal, with mean `m n` and variance
    `v n + (s n)^2`: `v` of a step by chance, `s` from row to row. Of the rows that may be last, the
    one behind all others is `z` deviations off, the least of so many normal numbers on average
    (Blom). `z s` is what a row gets less whose proposals are `z` deviations less likely.
    """
    mean, kept, squares = expected_tokens(acceptance), 1.0, 0.0
    for k, rate in enumerate(acceptance):
        kept *= rate
        squares += (2 * k + 1) * kept
    variance = squares - (mean - 1) ** 2
    z = NormalDist().inv_cdf((left.last - 0.375) / (left.last + 0.25))
    apart = mean - expected_tokens([max(0.0, rate - z * ROW_SPREAD) for rate in acceptance])
    # (m n - r)^2 = z^2 v n + (apart n)^2, the larger n.
    a = mean**2 - apart**2
    b = mean * left.longest + z * z * variance / 2
    steps = (b + math.sqrt(max(0.0, b * b - a * left.longest**2))) / a
    return max(1.0, min(steps, left.longest))  # each step gives a token


def _robust(
    terms: Mapping[float, Sequence[Sequence[float]]], samples: Sequence[CostSample]
) -> tuple[float, list[float]]:
    """Which of the terms `[M, C]` explain the times best, with the coefficients."""
    times_M1 = torch.tensor([[s.seconds] for s in samples], dtype=torch.float64)
    relative = {
        key: torch.tensor(rows, dtype=torch.float64) / times_M1 for key, rows in terms.items()
    }
    weights_M = torch.ones(len(samples), dtype=torch.float64)
    best: tuple[float, float, list[float]] = (math.inf, 0.0, [])
    for _ in range(ROUNDS):
        best = (math.inf, 0.0, [])
        errors: dict[float, float] = {}
        for key, terms_MC in relative.items():
            error, found = _least_squares(terms_MC, weights_M)
            errors[key] = error
            # Rounding must not prefer one of two knees that explain the same.
            if error < best[0] * (1 - 1e-9) - 1e-18:
                best = (error, key, found)
        _, key, found = best
        errors_M = (relative[key] @ torch.tensor(found, dtype=torch.float64) - 1).abs()
        usual = max(MAD * float(errors_M.median()), NO_OUTLIER)
        weights_M = (2 * usual / errors_M.clamp(min=usual)).clamp(max=1)
        kept = sorted(errors, key=errors.__getitem__)[:KNEES]
        relative = {key: terms_MC for key, terms_MC in relative.items() if key in kept}
    return best[1], best[2]


def _least_squares(relative_MC: Tensor, weights_M: Tensor) -> tuple[float, list[float]]:
    """Weighted squared error against 1, and coefficients, none negative: the best set of terms, by
    trying."""
    num_terms = relative_MC.shape[1]
    ones_M = weights_M.sqrt()
    weighted_MC = relative_MC * ones_M[:, None]
    scale_C = weighted_MC.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    best: tuple[float, list[float]] = (math.inf, [])
    for size in range(1, num_terms + 1):
        for chosen in combinations(range(num_terms), size):
            columns = list(chosen)
            part_MC = weighted_MC[:, columns] / scale_C[columns]
            part_C = torch.linalg.lstsq(part_MC, ones_M[:, None], driver="gelsd").solution[:, 0]
            error = float((part_MC @ part_C - ones_M).square().sum())
            if (part_C >= 0).all() and error < best[0] * (1 - 1e-9) - 1e-18:
                found = dict(zip(columns, (part_C / scale_C[columns]).tolist(), strict=True))
                best = (error, [found.get(c, 0.0) for c in range(num_terms)])
    return best
