"""`policy_loss` as one Triton kernel: every input read once, loss, gradient and readings at once.

Each program goes over its blocks of tokens and leaves its sums in a row of `partials`. The one that
is done last, by a count in global memory, adds the rows, in float64 and in their order, so that the
result is the same every time, and no second kernel has to start.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["one_pass", "scaled_"]

BLOCK = 512
WARPS = 8
PROGRAMS = 512
NUM_SUMS = 8  # loss, tokens, ratio, low, high, KL, largest ratio, whether a ratio is NaN


COUNT = tl.constexpr(NUM_SUMS)  # behind the totals: programs that are done


@triton.jit
def _kernel(
    logprobs, old, advantages, mask, seq_ids, divisor, per_sequence, weights, keep, ref,
    gradient, partials, totals, loss_out,
    num_tokens, factor, kl_coef, ratio_min, ratio_max, dual_clip,
    PER_SEQUENCE: tl.constexpr, WEIGHTS: tl.constexpr, KEEP: tl.constexpr, REF: tl.constexpr,
    KL_REJECTED: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scale = (factor / tl.load(divisor).to(tl.float64)).to(tl.float32)
    loss_sum = tl.zeros([BLOCK], tl.float32)
    ratio_sum = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    counters = tl.zeros([BLOCK], tl.int64)  # trained, clipped low, clipped high: 21 bits each
    any_broken = tl.zeros([BLOCK], tl.int32)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(program * BLOCK, num_tokens, PROGRAMS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_tokens
        trained = tl.load(mask + at, mask=inside, other=0) != 0
        new = tl.load(logprobs + at, mask=trained, other=0.0)
        ratio = tl.exp(new - tl.load(old + at, mask=trained, other=0.0))
        A = tl.load(advantages + at, mask=trained, other=0.0)
        low = (A < 0) & (ratio < ratio_min)
        high = (A > 0) & (ratio > ratio_max)
        dual = (A < 0) & (ratio > dual_clip)
        clipped = low | high | dual
        effective = tl.where(
            low, ratio_min, tl.where(high, ratio_max, tl.where(dual, dual_clip, ratio))
        )
        loss = tl.where(A == 0, 0.0, -effective * A)
        loss = tl.where(ratio != ratio, ratio, loss)
        slope = tl.where(clipped, 0.0, loss)

        base = tl.where(trained, scale, 0.0)
        if PER_SEQUENCE:
            seq = tl.load(seq_ids + at, mask=trained, other=0)
            base = base * tl.load(per_sequence + seq, mask=trained, other=0.0).to(tl.float32)
        kept = base
        if KEEP:
            kept_flag = tl.load(keep + at, mask=trained, other=0)
            kept = tl.where(kept_flag != 0, base, 0.0)
        coefficient = kept
        if WEIGHTS:
            coefficient = kept * tl.load(weights + at, mask=kept != 0, other=0.0)
        active = trained
        if KEEP:
            active = trained & (kept_flag != 0)
        loss_sum += tl.where(active, loss * coefficient, 0.0)
        grad = tl.where(coefficient != 0, slope * coefficient, 0.0)
        if REF:
            d = new - tl.load(ref + at, mask=trained, other=0.0)
            kl_weight = kl_coef * kept
            if KL_REJECTED:
                kl_weight = kl_coef * base
            shrink = tl.exp(-d) - 1
            # exp(-d) - 1 cancels near 0, where its series is exact to float32.
            series = -d * (1 - d * (0.5 - d * (0.16666667 - d * 0.041666668)))
            shrink = tl.where(tl.abs(d) < 0.05, series, shrink)
            kl = tl.where(
                tl.abs(d) < 0.05,
                d * d * (0.5 - d * (0.16666667 - d * (0.041666668 - d * 0.008333333))),
                shrink + d,
            )
            kl_sum += kl
            loss_sum += kl * kl_weight
            grad -= shrink * kl_weight
        tl.store(gradient + at, grad, mask=inside)
        broken = trained & (ratio != ratio)
        ratio_sum += tl.where(trained, ratio, 0.0)
        counters += trained.to(tl.int64) + (low.to(tl.int64) << 21) + (high.to(tl.int64) << 42)
        any_broken |= broken.to(tl.int32)
        largest = tl.maximum(largest, tl.where(trained & (ratio == ratio), ratio, -float("inf")))
    counts = tl.sum(counters)
    row = partials + program * NUM_SUMS
    tl.store(row, tl.sum(loss_sum))
    tl.store(row + 1, (counts & 0x1FFFFF).to(tl.float32))
    tl.store(row + 2, tl.sum(ratio_sum))
    tl.store(row + 3, ((counts >> 21) & 0x1FFFFF).to(tl.float32))
    tl.store(row + 4, (counts >> 42).to(tl.float32))
    tl.store(row + 5, tl.sum(kl_sum))
    tl.store(row + 6, tl.max(largest))
    tl.store(row + 7, tl.max(any_broken).to(tl.float32))
    # The row has to be there before it is counted; whole numbers are exact in a float64.
    tl.debug_barrier()
    done_before = tl.atomic_add(totals + COUNT, 1.0, sem="acq_rel", scope="gpu")
    if done_before == tl.num_programs(0) - 1:
        _finish(partials, totals, loss_out, tl.num_programs(0), PROGRAMS, NUM_SUMS)


@triton.jit
def _finish(
    partials, totals, loss_out, num_rows, ROWS: tl.constexpr, NUM_SUMS: tl.constexpr
):  # fmt: skip
    """Put the rows of `partials` together, always in the same order."""
    tl.debug_barrier()
    at = tl.arange(0, ROWS)[:, None] * NUM_SUMS + tl.arange(0, NUM_SUMS)[None, :]
    there = tl.arange(0, ROWS)[:, None] < num_rows
    columns = tl.arange(0, NUM_SUMS)
    # Past the first-level cache, which does not see what other programs wrote.
    values = tl.load(partials + at, mask=there, other=0.0, cache_modifier=".cg")
    sums = tl.sum(values.to(tl.float64), 0)
    tops = tl.max(tl.where(there, values, -float("inf")), 0).to(tl.float64)
    broken = tl.sum(tl.where(columns == 7, sums, 0.0)) > 0
    sums = tl.where(columns == 6, tl.where(broken, float("nan"), tops), sums)
    tl.store(totals + columns, sums)
    loss = tl.sum(tl.where(columns == 0, sums, 0.0))
    tl.store(loss_out, loss.to(tl.float32))


def one_pass(
    logprobs_T: Tensor,
    *,
    old_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    seq_ids_T: Tensor,
    factor: float,
    divisor: Tensor,
    per_sequence_S: Tensor | None,
    weights_T: Tensor | None,
    keep_T: Tensor | None,
    ref_T: Tensor | None,
    kl_coef: float,
    kl_rejected: bool,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `miles.losses._policy_closed.closed_form`."""
    num_tokens, device = logprobs_T.shape[0], logprobs_T.device
    programs = min(PROGRAMS, max(1, triton.cdiv(num_tokens, BLOCK)))
    gradient_T = torch.empty_like(logprobs_T)
    partials = torch.empty((programs, NUM_SUMS), dtype=torch.float32, device=device)
    totals = torch.zeros(NUM_SUMS + 1, dtype=torch.float64, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)

    def floats(tensor: Tensor | None) -> Any:
        return logprobs_T if tensor is None else tensor.to(torch.float32).contiguous()

    mask_bytes = mask_T.contiguous().view(torch.uint8)
    keep_bytes = mask_bytes if keep_T is None else keep_T.contiguous().view(torch.uint8)
    with on_device(logprobs_T):
        _kernel[(programs,)](
            logprobs_T.contiguous(), floats(old_T), floats(advantages_T), mask_bytes,
            seq_ids_T.contiguous(), divisor, divisor if per_sequence_S is None else per_sequence_S,
            floats(weights_T), keep_bytes, floats(ref_T), gradient_T, partials, totals, loss,
            num_tokens, factor, kl_coef, ratio_min, ratio_max,
            float("inf") if dual_clip is None else dual_clip,
            PER_SEQUENCE=per_sequence_S is not None, WEIGHTS=weights_T is not None,
            KEEP=keep_T is not None, REF=ref_T is not None, KL_REJECTED=kl_rejected,
            BLOCK=BLOCK, PROGRAMS=PROGRAMS, NUM_SUMS=NUM_SUMS, num_warps=WARPS,
        )  # fmt: skip
    return loss, gradient_T, totals


@triton.jit
def _scale(values, factor, num_tokens, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    by = tl.load(factor)
    if by != 1.0:
        for start in range(tl.program_id(0) * BLOCK, num_tokens, PROGRAMS * BLOCK):
            at = start + tl.arange(0, BLOCK)
            loaded = tl.load(values + at, mask=at < num_tokens)
            tl.store(values + at, loaded * by, mask=at < num_tokens)


def scaled_(gradient_T: Tensor, factor: Tensor) -> Tensor:
    """`gradient_T *= factor`, which is 1 nearly always, and then the tokens are not touched."""
    num_tokens = gradient_T.shape[0]
    with on_device(gradient_T):
        # Few programs, since they nearly always end at once.
        _scale[(min(128, max(1, triton.cdiv(num_tokens, 2048))),)](
            gradient_T, factor, num_tokens, BLOCK=2048, PROGRAMS=128, num_warps=8
        )
    return gradient_T


def on_device(tensor: Tensor) -> Any:
    """Launch where the tensor is, not on the current device (the interpreter has none)."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
