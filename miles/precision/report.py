"""Which module breaks: what rounding does to each weight, and to the model when only it is rounded.

Shapes: T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from miles.errors import EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.precision import _blocks, _fp8
from miles.precision.modules import QuantizedParameter, high_precision, quantized_parameters
from miles.precision.quantize import QTensor
from miles.precision.recipes import NVFP4, BlockFP8, Int4, Recipe

__all__ = ["ModuleReading", "QuantizationReport", "quantization_report"]

Run = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModuleReading:
    """Readings of one module's weights, and of the model when only that module is rounded."""

    name: str
    """Of the module; "all modules" for the model as it trains."""
    recipe: str
    """In short."""
    snr_db: float
    """Power of the weights over that of what rounding changed, in dB; infinite if nothing did."""
    saturated: float
    """Share of codes at the largest magnitude. Unless scales are powers of two, the largest weight
    of every block is there: at least 1/32 of the codes for groups of 32."""
    zero_blocks: int
    """Blocks of which every code is zero."""
    num_blocks: int
    """Blocks that share a scale."""
    logit_rms: float
    """Root mean square change of the logits, each position's mean taken off."""
    kl: float
    """Mean over the positions of KL(high precision || rounded) in nats, over the vocabulary;
    infinite if the rounded model's logits aren't finite."""
    k3: float
    """The estimate of `kl` at the targets, as training logs it."""
    logprob_abs: float
    """Mean over the positions of the target's |log-prob, rounded - high precision|, in nats."""


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What `quantization_report` found."""

    all_modules: ModuleReading
    """Everything rounded, as the model trains."""
    modules: tuple[ModuleReading, ...]
    """One a module, the largest `kl` first."""
    num_positions: int
    """Positions that were compared."""

    def table(self) -> str:
        """One line a module, worst first."""
        header = (
            "module", "recipe", "SNR dB", "saturated", "zero blocks", "logit rms", "KL", "k3",
            "|dlogp|",
        )  # fmt: skip
        lines = [header, *(_cells(row) for row in (self.all_modules, *self.modules))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if at > 1 else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def _cells(row: ModuleReading) -> tuple[str, ...]:
    shifts = (row.logit_rms, row.kl, row.k3, row.logprob_abs)
    return (
        row.name, row.recipe, f"{row.snr_db:.1f}", f"{row.saturated:.2%}",
        f"{row.zero_blocks}/{row.num_blocks}", *(f"{shift:.2e}" for shift in shifts),
    )  # fmt: skip


def quantization_report(
    model: nn.Module,
    batch: Mapping[str, Tensor] | Run,
    *,
    targets: Tensor | None = None,
    match: str = "*",
) -> QuantizationReport:
    """Which module's rounding moves the policy most, and what its weights look like.

    Runs the model once in high precision, once as it is, and once for every module with that one
    alone rounded (for block FP8 its activations too), without gradients and in `eval()`.

    Args:
        model: converted by `convert_`, whole on this process. Unchanged afterwards.
        batch: keyword arguments of the model, whose result has `.logits` `[..., T, V]`; or a
            function without arguments that returns logits.
        targets: token ids, in the shape of the logits without V; -100 leaves a position out.
            Default: `labels` or else `input_ids` of the batch, of the next position, where
            `attention_mask` is 1.
        match: a glob; only modules of such names are run alone.

    Raises:
        SettingError: nothing is converted, nothing matches, or no targets can be told.
        ShapeError: logits and targets don't fit.
        EmptyBatchError: no position is left to compare.
        NonFiniteError: weights or the high-precision logits have NaN or infinity.

    Example:
        >>> from miles.precision import Int4
        >>> from miles.precision.modules import convert_
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> _ = convert_(model, [("*", Int4())])
        >>> x = torch.randn(3, 64)
        >>> report = quantization_report(model, lambda: model(x), targets=torch.tensor([1, 0, 5]))
        >>> sorted(row.name for row in report.modules), report.num_positions
        (['0', '1'], 3)
    """
    groups: dict[nn.Module, list[QuantizedParameter]] = {}
    for found in quantized_parameters(model):
        groups.setdefault(found.module, []).append(found)
    names = {module: found[0].name.rpartition(".")[0] for module, found in groups.items()}
    chosen = [module for module, name in names.items() if fnmatchcase(name, match)]
    if not chosen:
        raise SettingError(
            f"match={match!r} fits none of the {len(groups)} converted modules; expected a glob "
            "of their names, and a model that went through convert_"
        )
    run, targets = _run_and_targets(model, batch, targets)
    with _evaluating(model), torch.no_grad():
        with high_precision(model):
            base = _Shift.of(run(), targets)
        # Which run is named in the error: this one must be finite, the rounded ones need not.
        if not bool(torch.isfinite(base.logprobs_TV).all()):
            raise NonFiniteError(
                "the model's logits in high precision hold NaN or infinity; expected finite "
                "numbers; rounding is not what breaks it"
            )
        weights = {module: _weights(found) for module, found in groups.items()}
        every = _reading("all modules", "", _sum(list(weights.values())), base.to(run()))
        rows = []
        for module in chosen:
            with _only(module, groups):
                shift = base.to(run())
            recipe = _label(groups[module][0].recipe)
            rows.append(_reading(names[module], recipe, weights[module], shift))
    rows.sort(key=lambda row: row.kl, reverse=True)
    return QuantizationReport(
        all_modules=every, modules=tuple(rows), num_positions=len(base.targets_T)
    )


def _run_and_targets(
    model: nn.Module, batch: Mapping[str, Tensor] | Run, targets: Tensor | None
) -> tuple[Run, Tensor]:
    if not isinstance(batch, Mapping):
        if targets is None:
            raise SettingError("got a function and no targets; expected targets=, token ids")
        return batch, targets
    if targets is None:
        ids = batch.get("labels", batch.get("input_ids"))
        if ids is None:
            raise SettingError(
                f"got a batch of {sorted(batch)} and no targets; expected input_ids, labels, or "
                "targets="
            )
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, -100)
        targets = torch.cat([ids[..., 1:], torch.full_like(ids[..., :1], -100)], -1)

    def run() -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits

    return run, targets


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, with each module's own flag put back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def _only(module: nn.Module, converted: Mapping[nn.Module, object]) -> Iterator[None]:
    """Round this module alone."""
    with contextlib.ExitStack() as stack:
        for other in converted:
            if other is not module:
                stack.enter_context(high_precision(other))
        yield


@dataclass(frozen=True)
class _Shift:
    """Log-probs in high precision, and where they are compared."""

    logprobs_TV: Tensor
    targets_T: Tensor
    keep: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> _Shift:
        if logits.shape[:-1] != targets.shape:
            raise ShapeError(
                f"the logits have shape {tuple(logits.shape)} and the targets "
                f"{tuple(targets.shape)}; expected the targets to have that of the logits "
                "without its last dimension"
            )
        keep = targets != -100
        if not bool(keep.any()):
            raise EmptyBatchError("every target is -100; expected a position to compare")
        return cls(_logprobs(logits, keep), targets[keep].to(logits.device), keep)

    def to(self, logits: Tensor) -> tuple[float, float, float, float]:
        """Logit rms, KL, k3 and |d log-prob| of other logits; infinite if they aren't finite."""
        rounded_TV = _logprobs(logits, self.keep)
        change_TV = rounded_TV - self.logprobs_TV
        centred_TV = change_TV - change_TV.mean(-1, keepdim=True)
        kl = _kl(self.logprobs_TV, rounded_TV, change_TV)
        change_T = change_TV.gather(-1, self.targets_T[:, None])[:, 0]
        k3 = (change_T.expm1() - change_T).mean()
        values = (centred_TV.square().mean().sqrt(), kl, k3, change_T.abs().mean())
        logit_rms, *others = (
            value if math.isfinite(value) else math.inf for value in map(float, values)
        )
        return logit_rms, others[0], others[1], others[2]


def _kl(full_TV: Tensor, rounded_TV: Tensor, change_TV: Tensor) -> Tensor:
    """Mean KL, as a sum of q - p - p log(q / p), of which none is negative.

    The sum of p log(p / q) has the error of the softmax's normaliser in full, about 1e-6, which is
    more than the KL of many a module; here it is squared.
    """
    p_TV = full_TV.exp()
    small_TV = p_TV * (change_TV.expm1() - change_TV)
    large_TV = rounded_TV.exp() - p_TV - p_TV * change_TV  # where exp(change) may overflow
    return torch.where(change_TV < 1, small_TV, large_TV).sum(-1).mean()


def _logprobs(logits: Tensor, keep: Tensor) -> Tensor:
    return logits[keep.to(logits.device)].float().log_softmax(-1)


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Sums over weights, so that several tensors make one reading."""

    signal: float = 0.0
    noise: float = 0.0
    codes: int = 0
    saturated: int = 0
    blocks: int = 0
    zero_blocks: int = 0


def _weights(found: Sequence[QuantizedParameter]) -> _Weights:
    return _sum([_weight(one) for one in found])


def _weight(found: QuantizedParameter) -> _Weights:
    parts = found.parts()
    master = found.parameter.detach()
    rounded = torch.cat([part.dequantize(master.dtype) for part in parts], -2)
    counts = [_counts(part) for part in parts]
    saturated, blocks, zero_blocks = (sum(column) for column in zip(*counts, strict=True))
    return _Weights(
        signal=_power(master),
        noise=_power(rounded.float() - master.float()),
        codes=master.numel(),
        saturated=saturated,
        blocks=blocks,
        zero_blocks=zero_blocks,
    )


def _power(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _counts(part: QTensor) -> tuple[int, int, int]:
    """Codes of the largest magnitude, blocks, and blocks of zeros."""
    recipe = part.recipe
    if isinstance(recipe, NVFP4):
        magnitudes, largest, size = part.codes & 7, 7.0, recipe.block
    elif isinstance(recipe, Int4):
        magnitudes, largest, size = part.codes.abs(), 7.0, recipe.group_size
    else:
        magnitudes, largest, size = part.codes.float().abs(), _fp8.MAX, recipe.block
    square = isinstance(recipe, BlockFP8) and part.role == "weight"
    blocks = (_blocks.tiles if square else _blocks.rows)(magnitudes, size)
    empty = (blocks == 0).all(-1)
    return int((magnitudes >= largest).sum()), empty.numel(), int(empty.sum())


def _sum(parts: Sequence[_Weights]) -> _Weights:
    fields = _Weights.__dataclass_fields__
    return _Weights(**{name: sum(getattr(part, name) for part in parts) for name in fields})


def _reading(
    name: str, recipe: str, weights: _Weights, shift: tuple[float, float, float, float]
) -> ModuleReading:
    noisy = weights.noise > 0
    ratio = weights.signal / weights.noise if noisy else math.inf
    logit_rms, kl, k3, logprob_abs = shift
    return ModuleReading(
        name=name,
        recipe=recipe,
        snr_db=10 * math.log10(ratio) if ratio > 0 else -math.inf,
        saturated=weights.saturated / weights.codes,
        zero_blocks=weights.zero_blocks,
        num_blocks=weights.blocks,
        logit_rms=logit_rms,
        kl=kl,
        k3=k3,
        logprob_abs=logprob_abs,
    )


def _label(recipe: Recipe) -> str:
    if isinstance(recipe, Int4):
        return f"Int4 g{recipe.group_size}"
    if isinstance(recipe, BlockFP8):
        return f"BlockFP8 {recipe.scale}"
    return type(recipe).__name__
