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
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from miles.errors import MissingExtraError, SettingError
from miles.losses._dtypes import as_logprobs
from miles.losses._policy_closed import compiled, in_blocks, scaled_
from miles.losses.aggregation import Mode, aggregate, factors
from miles.losses.corrections import Correction, for_other_terms, for_policy_term
from miles.losses.metrics import Max, Mean, Metrics, max_over, mean_over
from miles.losses.ratios import log_ratio
from miles.losses.regularizers import kl_penalty
from miles.losses.surrogates import Surrogate, check_bounds, ppo_clip
from miles.packed import Denominators, Packed

__all__ = ["policy_loss", "policy_loss_backend"]

Backend = Literal["auto", "reference", "chunked", "compiled", "triton"]


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
        ref_logprobs_T: float `[T]`, of the reference policy; for `kl_coef`, or for its reading.
        kl_coef: factor of the k3 penalty, 0 or more; at 0, `kl/ref` is read and not trained on.
        backend: `reference`, the composition; `chunked`, the closed form by blocks that fit a
            CPU's cache; `compiled`, torch.compile of it, faster yet, but it needs a C++ compiler
            and its first call takes half a minute, so it has to be asked for; `triton`, one CUDA
            kernel for float32; or `auto`: triton on CUDA where triton is installed, the log-probs
            are float32 and nothing else is float64, chunked on a CPU, else reference. All but the
            reference can be differentiated once.

    Returns:
        The loss, and `ratio/mean`, `ratio/max`, `clip/low`, `clip/high` and, with a reference
        policy, `kl/ref`. The loss is float64 if any of the log-probs or advantages are, else
        float32.

    Raises:
        SettingError: inputs on several devices, bounds that look relative, a `kl_coef` below 0 or
            without a reference.
        ShapeError, DtypeError, DenominatorError: as `aggregate`.

    Example:
        >>> packed = Packed.from_padded(torch.tensor([[True, True], [True, False]]))
        >>> logprobs = torch.full((4,), -1.0, requires_grad=True)
        >>> advantages = packed.per_token(torch.tensor([1.5, -1.5]))
        >>> loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, packed, count(packed))
        >>> loss.backward()
        >>> loss.item(), logprobs.grad.tolist()
        (-0.5, [-0.5, -0.5, 0.5, 0.0])
    """
    check_kl(ref_logprobs_T, kl_coef)
    packed.check(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    if ref_logprobs_T is not None:
        packed.check(ref_logprobs_T=ref_logprobs_T)
        (ref_logprobs_T,) = as_logprobs(ref_logprobs_T=ref_logprobs_T)
    logprobs_T, old_logprobs_T = as_logprobs(
        logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T.detach()
    )
    weights_T = None if correction is None else correction.weights_T
    keep_T = None if correction is None else correction.keep_T
    if weights_T is not None:
        packed.check(weights_T=weights_T)
    others = [old_logprobs_T, advantages_T, weights_T, ref_logprobs_T]
    wide = any(x is not None and x.dtype == torch.float64 for x in others)
    chosen, _ = _choose(logprobs_T, backend, wide)
    trained_ref_T = ref_logprobs_T if kl_coef else None
    if chosen == "reference" or not logprobs_T.numel():
        clip = ppo_clip(
            ratio_T := log_ratio(logprobs_T, old_logprobs_T, packed), advantages_T,
            ratio_min=ratio_min, ratio_max=ratio_max, dual_clip=dual_clip,
        )  # fmt: skip
        divide: Any = {"mode": mode, "constant": constant, "averaged_over": averaged_over}
        policy_term = for_policy_term(correction, count_rejected)
        loss = aggregate(clip.loss_T, packed, denominators, **policy_term, **divide)
        metrics = ratio_metrics(ratio_T, clip, packed.mask_T)
        if trained_ref_T is not None:
            kl_T = kl_penalty(logprobs_T, trained_ref_T, packed)
            kl_term = for_other_terms(correction, count_rejected)
            loss = loss + kl_coef * aggregate(kl_T, packed, denominators, **kl_term, **divide)
            metrics["kl/ref"] = mean_over(kl_T, packed.mask_T)
        return loss, metrics | _kl_reading(logprobs_T, ref_logprobs_T, packed, kl_coef)
    check_bounds(ratio_min, ratio_max, dual_clip)
    factor, divisor, per_sequence_S = factors(
        packed, denominators, mode=mode, keep_T=keep_T, count_rejected=count_rejected,
        constant=constant, averaged_over=averaged_over,
    )  # fmt: skip
    run, scale_ = _pass_of(chosen)
    one_pass = functools.partial(
        run, old_T=old_logprobs_T, advantages_T=advantages_T.detach(),
        mask_T=packed.mask_T, seq_ids_T=packed.seq_ids_T, factor=factor,
        divisor=divisor, per_sequence_S=per_sequence_S, weights_T=weights_T, keep_T=keep_T,
        ref_T=None if trained_ref_T is None else trained_ref_T.detach(), kl_coef=kl_coef,
        kl_rejected=count_rejected, ratio_min=ratio_min, ratio_max=ratio_max, dual_clip=dual_clip,
    )  # fmt: skip
    loss, totals = _GradientInForward.apply(logprobs_T, one_pass, scale_)
    _, tokens, ratio, low, high, kl, largest, *_ = totals.unbind()
    sums = {"ratio/mean": ratio, "clip/low": low, "clip/high": high}
    if trained_ref_T is not None:
        sums["kl/ref"] = kl
    means = {name: Mean(total, tokens) for name, total in sums.items()}
    metrics = {**means, "ratio/max": Max(largest)}
    return loss, metrics | _kl_reading(logprobs_T, ref_logprobs_T, packed, kl_coef)


def policy_loss_backend(logprobs_T: Tensor, *, backend: Backend = "auto") -> tuple[str, str]:
    """Which backend `policy_loss` takes for these log-probs, and why.

    That is with the rest of its input at the same precision; float64 anywhere rules triton out.

    >>> policy_loss_backend(torch.zeros(3))
    ('chunked', 'the log-probs are float32 on cpu')
    """
    return _choose(logprobs_T, backend, wide=False)


def _choose(logprobs_T: Tensor, backend: Backend, wide: bool) -> tuple[str, str]:
    """`policy_loss_backend`, where `wide` says that another input is float64."""
    backends = get_args(Backend)
    if backend not in backends:
        raise SettingError(f"backend is {backend!r}; expected one of {', '.join(backends)}")
    if backend not in ("auto", "triton"):
        return backend, "asked for by name"
    device = logprobs_T.device.type
    why = f"the log-probs are {str(logprobs_T.dtype).removeprefix('torch.')} on {device}"
    if wide:
        why += " and another input is float64"
    fits = device == "cuda" and logprobs_T.dtype == torch.float32 and not wide
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton":
        if not fits:
            raise SettingError(f'{why}; expected float32 on cuda for backend="triton"')
        if not installed:
            raise MissingExtraError("triton", "kernels")
        return backend, "asked for by name"
    if fits and installed:
        return "triton", why
    if fits:
        why += ", and triton is not installed"
    return ("chunked" if device == "cpu" else "reference"), why


def check_kl(ref_logprobs_T: Tensor | None, kl_coef: float) -> None:
    """Refuse a KL coefficient that makes no penalty of a reference policy."""
    if not 0 <= kl_coef < float("inf"):
        raise SettingError(f"kl_coef is {kl_coef}; expected a finite number, 0 or more")
    if kl_coef and ref_logprobs_T is None:
        raise SettingError(
            f"got kl_coef={kl_coef} and no ref_logprobs_T; expected both, or kl_coef=0.0"
        )


def _kl_reading(
    logprobs_T: Tensor, ref_logprobs_T: Tensor | None, packed: Packed, kl_coef: float
) -> Metrics:
    """`kl/ref` where it is not trained on."""
    if ref_logprobs_T is None or kl_coef:
        return {}
    kl_T = kl_penalty(logprobs_T.detach(), ref_logprobs_T, packed)
    return {"kl/ref": mean_over(kl_T, packed.mask_T)}


def ratio_metrics(log_ratio_T: Tensor, surrogate: Surrogate, mask_T: Tensor) -> Metrics:
    """The readings that every ratio-based loss has."""
    ratio_T = log_ratio_T.detach().exp()
    return {
        "ratio/mean": mean_over(ratio_T, mask_T),
        "ratio/max": max_over(ratio_T, mask_T),
        "clip/low": mean_over(surrogate.clipped_low_T, mask_T),
        "clip/high": mean_over(surrogate.clipped_high_T, mask_T),
    }


class _GradientInForward(torch.autograd.Function):
    """A loss whose gradient came with it."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs_T: Tensor,
        one_pass: functools.partial[tuple[Tensor, Tensor, Tensor]],
        scaled_: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        loss, ctx.gradient_T, totals = one_pass(logprobs_T.detach())
        inputs = [x for x in one_pass.keywords.values() if isinstance(x, Tensor)]
        ctx.save_for_backward(logprobs_T, *inputs)
        ctx.one_pass, ctx.scaled_ = one_pass, scaled_
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grads[0] is None:
            return None, None, None
        if torch.is_grad_enabled():  # create_graph=True, which would find nothing to go on with
            raise SettingError(
                "this policy_loss has no second derivative; expected create_graph=False, or "
                'policy_loss(..., backend="reference")'
            )
        gradient_T, ctx.gradient_T = ctx.gradient_T, None
        if gradient_T is None:  # an earlier backward pass gave it away
            gradient_T = ctx.one_pass(ctx.saved_tensors[0].detach())[1]
        return ctx.scaled_(gradient_T, grads[0]), None, None


def _pass_of(backend: str) -> tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]:
    """Loss, gradient and readings at once, and how to scale that gradient in place."""
    if backend == "triton":
        from miles.losses import _policy_triton

        return _policy_triton.one_pass, _policy_triton.scaled_
    return compiled() if backend == "compiled" else in_blocks, scaled_
