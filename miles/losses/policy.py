"""The clipped policy loss of PPO, GRPO and DAPO in one call, and in one kernel where that pays.

Ratio, clip, correction, KL, aggregation and readings of every token. The reference composes the
parts of this package. The fast paths know a token's gradient as soon as its loss, so one pass over
the tokens gives both.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from miles.errors import MissingExtraError, SettingError
from miles.losses._dtypes import as_logprobs
from miles.losses.aggregation import Mode, aggregate, factors
from miles.losses.corrections import Correction
from miles.losses.metrics import Max, Mean, Metrics, max_over, mean_over
from miles.losses.ratios import log_ratio
from miles.losses.regularizers import kl_penalty
from miles.losses.surrogates import Surrogate, check_bounds, ppo_clip
from miles.packed import Denominators, Packed

__all__ = ["policy_loss", "policy_loss_backend"]

Backend = Literal["auto", "reference", "compiled", "triton"]


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    packed: Packed,
    denominators: Denominators,
    *,
    mode: Mode = "token_mean",
    constant: float | None = None,
    ratio_min: float = 0.8,
    ratio_max: float = 1.2,
    dual_clip: float | None = None,
    correction: Correction | None = None,
    count_rejected: bool = True,
    ref_logprobs_T: Tensor | None = None,
    kl_coef: float = 0.0,
    averaged_over: int = 1,
    backend: Backend = "auto",
) -> tuple[Tensor, Metrics]:
    """`aggregate(ppo_clip(ratio, A) * weights) + kl_coef * aggregate(k3)`, with its readings.

    Args:
        logprobs_T: float `[T]`, with gradient.
        old_logprobs_T: float `[T]`, the trainer's before this step's first update.
        advantages_T: float `[T]`.
        packed: this micro-batch.
        denominators: of the whole step.
        mode, constant, averaged_over: see `aggregate`.
        ratio_min, ratio_max, dual_clip: see `ppo_clip`; absolute ratios.
        correction: this micro-batch's part of a `Correction`; it weighs the policy term, not KL.
        count_rejected: see `aggregate`; with False, rejected tokens leave the KL term too.
        ref_logprobs_T: float `[T]`, of the reference policy; with `kl_coef`.
        kl_coef: factor of the k3 penalty.
        backend: `reference`; `compiled`, torch.compile of the closed form, whose first call takes
            half a minute; `triton`, one CUDA kernel for float32; or `auto`: triton for float32 on
            CUDA where triton is installed, else reference.

    Returns:
        The loss, and `ratio/mean`, `ratio/max`, `clip/low`, `clip/high` and, with a reference
        policy, `kl/ref`.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> logprobs = torch.full((4,), -1.0, requires_grad=True)
        >>> advantages = packed.per_token(torch.tensor([1.5, -1.5]))
        >>> loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, packed, count(packed))
        >>> loss.backward()
        >>> loss.item(), logprobs.grad.tolist()
        (-0.5, [-0.5, -0.5, 0.5, 0.0])
    """
    if (ref_logprobs_T is None) != (kl_coef == 0.0):
        raise SettingError(
            f"got kl_coef={kl_coef} and {'no' if ref_logprobs_T is None else 'a'} ref_logprobs_T; "
            "expected both or neither"
        )
    packed.check(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    if ref_logprobs_T is not None:
        packed.check(ref_logprobs_T=ref_logprobs_T)
    logprobs_T, old_logprobs_T = as_logprobs(
        logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T.detach()
    )
    weights_T = None if correction is None else correction.weights_T
    keep_T = None if correction is None else correction.keep_T
    if weights_T is not None:
        packed.check(weights_T=weights_T)
    chosen, _ = policy_loss_backend(logprobs_T, backend=backend)
    if chosen == "reference" or not logprobs_T.numel():
        clip = ppo_clip(
            ratio_T := log_ratio(logprobs_T, old_logprobs_T, packed), advantages_T,
            ratio_min=ratio_min, ratio_max=ratio_max, dual_clip=dual_clip,
        )  # fmt: skip
        divide: Any = {"mode": mode, "constant": constant, "averaged_over": averaged_over}
        rejection: Any = {"keep_T": keep_T, "count_rejected": count_rejected}
        loss = aggregate(
            clip.loss_T, packed, denominators, weights_T=weights_T, **rejection, **divide
        )
        metrics = ratio_metrics(ratio_T, clip, packed.mask_T)
        if ref_logprobs_T is not None:
            kl_T = kl_penalty(logprobs_T, ref_logprobs_T, packed)
            kept: Any = {} if count_rejected else rejection
            loss = loss + kl_coef * aggregate(kl_T, packed, denominators, **kept, **divide)
            metrics["kl/ref"] = mean_over(kl_T, packed.mask_T)
        return loss, metrics
    check_bounds(ratio_min, ratio_max, dual_clip)
    factor, divisor, per_sequence_S = factors(
        packed, denominators, mode=mode, keep_T=keep_T, count_rejected=count_rejected,
        constant=constant, averaged_over=averaged_over,
    )  # fmt: skip
    one_pass = functools.partial(
        _compiled() if chosen == "compiled" else _policy_triton().one_pass,
        old_T=old_logprobs_T, advantages_T=advantages_T.detach(),
        mask_T=packed.mask_T, seq_ids_T=packed.seq_ids_T, factor=factor,
        divisor=divisor, per_sequence_S=per_sequence_S, weights_T=weights_T, keep_T=keep_T,
        ref_T=None if ref_logprobs_T is None else ref_logprobs_T.detach(), kl_coef=kl_coef,
        kl_rejected=count_rejected, ratio_min=ratio_min, ratio_max=ratio_max,
        dual_clip=float("inf") if dual_clip is None else dual_clip,
    )  # fmt: skip
    times = _policy_triton().times if chosen == "triton" else torch.mul
    loss, totals, largest = _GradientInForward.apply(logprobs_T, one_pass, times)
    names = ["ratio/mean", "clip/low", "clip/high"] + ["kl/ref"] * (ref_logprobs_T is not None)
    means = {name: Mean(totals[2 + i], totals[1]) for i, name in enumerate(names)}
    return loss, {**means, "ratio/max": Max(largest)}


def policy_loss_backend(logprobs_T: Tensor, *, backend: Backend = "auto") -> tuple[str, str]:
    """Which backend `policy_loss` takes for these log-probs, and why.

    >>> policy_loss_backend(torch.zeros(3))
    ('reference', 'the log-probs are float32 on cpu')
    """
    if backend not in ("auto", "reference", "compiled", "triton"):
        raise SettingError(f"backend is {backend!r}; expected auto, reference, compiled or triton")
    dtype = str(logprobs_T.dtype).removeprefix("torch.")
    why = f"the log-probs are {dtype} on {logprobs_T.device.type}"
    fits = logprobs_T.is_cuda and logprobs_T.dtype == torch.float32
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        if fits and not installed:
            why += ", and triton is not installed"
        return ("triton" if fits and installed else "reference"), why
    if backend == "triton" and not fits:
        raise SettingError(f'{why}; expected float32 on cuda for backend="triton"')
    if backend == "triton" and not installed:
        raise MissingExtraError("triton", "kernels")
    return backend, "asked for by name"


def ratio_metrics(ratio_T: Tensor, surrogate: Surrogate, mask_T: Tensor) -> Metrics:
    """The readings that every ratio-based loss has."""
    return {
        "ratio/mean": mean_over(ratio_T.exp(), mask_T),
        "ratio/max": max_over(ratio_T.exp(), mask_T),
        "clip/low": mean_over(surrogate.clipped_low_T, mask_T),
        "clip/high": mean_over(surrogate.clipped_high_T, mask_T),
    }


class _GradientInForward(torch.autograd.Function):
    """A loss whose gradient came with it."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs_T: Tensor,
        one_pass: Callable[[Tensor], Any],
        times: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, gradient_T, totals, largest = one_pass(logprobs_T.detach())
        ctx.save_for_backward(gradient_T)
        ctx.times = times
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(totals, largest)
        return loss, totals, largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (gradient_T,) = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None
        return ctx.times(gradient_T, grads[0]), None, None


def _policy_triton() -> Any:
    from miles.losses import _policy_triton

    return _policy_triton


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_closed_form, dynamic=True)


def _closed_form(
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
    dual_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient `[T]`, totals (loss, tokens, ratio, clipped low, high, KL), largest ratio."""
    logprobs_T, old_T, A_T = (torch.where(mask_T, x, 0) for x in (logprobs_T, old_T, advantages_T))
    ratio_T = (logprobs_T - old_T).exp()
    low_T, high_T = (A_T < 0) & (ratio_T < ratio_min), (A_T > 0) & (ratio_T > ratio_max)
    dual_T = (A_T < 0) & (ratio_T > dual_clip)
    clipped_T = low_T | high_T | dual_T
    effective_T = torch.where(low_T, ratio_T.clamp(min=ratio_min), ratio_T)
    effective_T = torch.where(high_T, ratio_T.clamp(max=ratio_max), effective_T)
    effective_T = torch.where(dual_T, ratio_T.clamp(max=dual_clip), effective_T)
    loss_T = torch.where(A_T == 0, 0, -effective_T * A_T)
    loss_T = torch.where(ratio_T.isnan(), ratio_T, loss_T)
    gradient_T = torch.where(clipped_T, 0, loss_T)

    wide = torch.float64
    scale = factor / divisor.to(wide)
    base_T = torch.where(mask_T, scale, 0)
    if per_sequence_S is not None:
        base_T = base_T * per_sequence_S[seq_ids_T]
    kept_T = base_T if keep_T is None else torch.where(keep_T, base_T, 0)
    coefficient_T = kept_T
    if weights_T is not None:
        coefficient_T = torch.where(kept_T == 0, 0, kept_T * weights_T)
    active_T = mask_T if keep_T is None else mask_T & keep_T
    loss = torch.where(active_T, loss_T.to(wide) * coefficient_T, 0).sum()
    gradient_T = torch.where(coefficient_T != 0, gradient_T * coefficient_T.to(gradient_T.dtype), 0)
    kl = torch.zeros_like(scale)
    if ref_T is not None:
        d_T = logprobs_T - torch.where(mask_T, ref_T, 0)
        kl_weight_T = kl_coef * (base_T if kl_rejected else kept_T)
        kl_T = torch.expm1(-d_T) + d_T
        loss = loss + (kl_T.to(wide) * kl_weight_T).sum()
        gradient_T = gradient_T - torch.expm1(-d_T) * kl_weight_T.to(gradient_T.dtype)
        kl = kl_T.to(wide).sum()
    counts = [mask_T.to(wide), torch.where(mask_T, ratio_T, 0).to(wide), low_T, high_T]
    totals = torch.stack([loss, *(x.to(wide).sum() for x in counts), kl])
    largest = torch.where(mask_T, ratio_T, -torch.inf).max().to(wide)
    out = torch.float64 if loss_T.dtype == torch.float64 else torch.float32
    return loss.to(out), gradient_T.to(logprobs_T.dtype), totals, largest
