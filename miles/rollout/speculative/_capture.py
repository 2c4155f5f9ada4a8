"""Features and logits of a policy's forward pass, read by hooks on the way.

Shapes: B x L tokens, F features of a token (those of all layers that a draft reads), D hidden size,
V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miles.errors import SettingError, ShapeError, UnsupportedModelError
from miles.moe._checkpoint import in_backward
from miles.rollout.speculative._divergence import TargetLogits
from miles.rollout.speculative._host import HostCopies
from miles.rollout.speculative.draft import FINAL

__all__ = ["Captured", "Recorder", "capturing", "unwrapped"]

SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Fields of a config under which logits are more than the head's output."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One forward pass of the policy, detached. Build one by hand where hooks cannot go."""

    input_ids_BL: Tensor
    """int64 `[B, L]`."""
    features_BLF: Tensor
    """`[B, L, F]`: outputs of the layers that the draft reads, in its order; F may be 0."""
    target: TargetLogits
    """The policy's distributions."""
    position_ids_BL: Tensor | None = None
    """int64 `[B, L]`, or `[1, L]` for all rows; None: 0, 1, ... in each row."""
    attention_mask_BL: Tensor | None = None
    """`[B, L]`: 0 at padding; None: there is none."""
    values_version: int | None = None
    """`target.values_BKX._version` when it was read, so that a change in place is noticed."""
    head_version: int | None = None
    """Likewise of `target.head_VD`, which the policy's optimizer writes to."""

    def check_unchanged(self) -> None:
        """Raise `SettingError` if the logits were written to since."""
        known = self.values_version
        if known is not None and known != self.target.values_BKX._version:
            raise SettingError(
                "the policy's logits were changed in place since capture() read them (divided by a "
                "temperature?); change a copy, or call observe() before"
            )
        head_VD = self.target.head_VD
        if head_VD is not None and self.head_version not in (None, head_VD._version):
            raise SettingError(
                "the policy's head has changed since capture() read its hidden states, so together "
                "they are of no policy; call observe() before the policy's optimizer step"
            )

    def seq_ids(self, copies: HostCopies | None = None) -> Tensor:
        """int64 `[B, L]` on the CPU: which sequence of its row a token is of, by positions that
        start over at 0; -1 at padding. What `copies` has begun is not waited for.

        Example:
            >>> from miles.rollout.speculative._capture import Captured, TargetLogits
            >>> Captured(
            ...     input_ids_BL=torch.zeros(1, 4, dtype=torch.int64),
            ...     features_BLF=torch.zeros(1, 4, 0),
            ...     target=TargetLogits(values_BKX=torch.zeros(1, 4, 3)),
            ...     position_ids_BL=torch.tensor([[0, 1, 0, 0]]),
            ...     attention_mask_BL=torch.tensor([[1, 1, 1, 0]]),
            ... ).seq_ids().tolist()
            [[0, 0, 1, -1]]
        """
        copies = copies or HostCopies()
        ids_BL = torch.zeros(self.input_ids_BL.shape, dtype=torch.int64)
        if self.position_ids_BL is not None:
            starts_BL = copies.of(self.position_ids_BL).expand_as(ids_BL) == 0
            ids_BL = (starts_BL.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        if self.attention_mask_BL is not None:
            ids_BL = ids_BL.masked_fill(copies.of(self.attention_mask_BL) == 0, -1)
        return ids_BL


@contextmanager
def capturing(
    policy: nn.Module, feature_layers: Sequence[int], copies: HostCopies
) -> Iterator[Recorder]:
    """Note the forward passes of `policy` inside the block; `copies` begins those of its inputs.

    What gradient checkpointing runs again is not a pass of its own, neither inside nor after. The
    hooks are there inside the block only.

    Raises:
        UnsupportedModelError: no decoder with layers.
        SettingError: layers that the model does not have, or a pass without token ids.
    """
    decoder = _decoder_of(policy)
    num_layers = len(decoder.layers)
    outside = [i for i in feature_layers if not (i == FINAL or 0 <= i < num_layers)]
    if outside:
        raise SettingError(
            f"the draft reads layers {outside} and the policy has {num_layers}; expected ids from "
            f"0 to {num_layers - 1}, or {FINAL} for the final norm; was it made for another model?"
        )
    recorder = Recorder(policy, feature_layers, copies)
    handles = [
        decoder.register_forward_pre_hook(recorder.begin, with_kwargs=True),
        decoder.register_forward_hook(recorder.end),
    ]
    for i in set(feature_layers) - {FINAL}:
        handles.append(decoder.layers[i].register_forward_hook(recorder.layer(i)))
    if decoder is not policy:
        handles.append(policy.register_forward_pre_hook(recorder.asked, with_kwargs=True))
        handles.append(policy.register_forward_hook(recorder.logits, with_kwargs=True))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """The hooks. A pass is open from the decoder's first line to its last."""

    def __init__(
        self, policy: nn.Module, feature_layers: Sequence[int], copies: HostCopies
    ) -> None:
        self._policy, self._wanted, self._copies = policy, feature_layers, copies
        self._thread = threading.get_ident()  # an engine may run the same model in another
        self._called: dict[str, Any] | None = None
        self._outputs: dict[int, Tensor] = {}
        self._passes: list[tuple[dict[str, Any], dict[int, Tensor]]] = []
        self._targets: dict[int, TargetLogits] = {}
        self._versions: dict[int, int] = {}

    def asked(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The whole model is called."""
        if not in_backward() and threading.get_ident() == self._thread:
            self._copies.begin(kwargs.get("logits_to_keep"))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder is called."""
        if in_backward() or threading.get_ident() != self._thread:
            return
        ids_BL = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids_BL, Tensor) or ids_BL.ndim != 2:
            raise SettingError(
                "the policy was called without input_ids of shape [B, L] inside capture(); a draft "
                "learns from tokens; call it with them, or build Captured by hand"
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise SettingError(
                "the policy was called with a cache that holds tokens inside capture(); expected "
                "whole sequences; call it without past_key_values"
            )
        control = (kwargs.get(name) for name in ("position_ids", "attention_mask"))
        self._copies.begin(*filter(_is_2d, control))
        self._called, self._outputs = {**kwargs, "input_ids": ids_BL}, {}

    def layer(self, index: int) -> Any:
        """The hook of a layer."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._called is not None and threading.get_ident() == self._thread:
                self._outputs[index] = _first(output).detach()

        return hook

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The decoder returns."""
        if self._called is None or threading.get_ident() != self._thread:
            return
        self._outputs[FINAL] = _first(output).detach()
        self._passes.append((self._called, self._outputs))
        self._called = None

    def logits(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The whole model returns."""
        logits_BKV = _logits_of(output)
        if in_backward() or not self._passes or logits_BKV is None:
            return
        if threading.get_ident() != self._thread:
            return
        L = self._passes[-1][0]["input_ids"].shape[1]
        keep = kwargs.get("logits_to_keep", 0)
        positions_K = keep if isinstance(keep, Tensor) else None
        if positions_K is None and keep:
            positions_K = torch.arange(max(L - keep, 0), L)
        if logits_BKV.shape[1] != (L if positions_K is None else positions_K.shape[0]):
            raise ShapeError(
                f"the policy returned logits of shape {tuple(logits_BKV.shape)} for {L} tokens, "
                "and no logits_to_keep says which; build Captured by hand, with "
                "TargetLogits(positions_K=...)"
            )
        number = len(self._passes) - 1
        self._targets[number] = TargetLogits(
            values_BKX=logits_BKV.detach(), positions_K=positions_K
        )
        if not logits_BKV.is_inference():
            self._versions[number] = logits_BKV._version

    def captured(self) -> list[Captured]:
        """The passes, each with the logits that the model returned, or else those of its head.

        Raises:
            UnsupportedModelError: no logits, and no head or one that is not all; or layers whose
                hooks did not run.
        """
        found = []
        for number, (called, outputs) in enumerate(self._passes):
            silent = [i for i in self._wanted if i not in outputs]
            if silent:
                raise UnsupportedModelError(
                    f"the hooks of layers {silent} did not run (compiled layers skip hooks that "
                    "came later); call the uncompiled model, or build Captured by hand"
                )
            parts = [outputs[i] for i in self._wanted]
            target = self._targets.get(number) or _by_head(outputs[FINAL], self._policy)
            head_VD = target.head_VD
            positions, mask = called.get("position_ids"), called.get("attention_mask")
            found.append(
                Captured(
                    input_ids_BL=called["input_ids"],
                    features_BLF=torch.cat(parts, -1) if parts else outputs[FINAL][..., :0],
                    target=target,
                    position_ids_BL=positions if _is_2d(positions) else None,
                    attention_mask_BL=mask if _is_2d(mask) else None,
                    values_version=self._versions.get(number),
                    head_version=None if head_VD is None else head_VD._version,
                )
            )
        return found


def _by_head(final_BLD: Tensor, policy: nn.Module) -> TargetLogits:
    inner = unwrapped(policy, "get_output_embeddings")
    head = inner.get_output_embeddings() if inner is not None else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedModelError(
            f"{type(policy).__name__} returned no logits and has no get_output_embeddings() with a "
            "weight; give the trainer the model whose head it is, or build Captured by hand"
        )
    config = getattr(inner, "config", None)
    scaled = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
    if scaled:
        raise UnsupportedModelError(
            f"{type(policy).__name__} returned no logits, and its config's {scaled} make them more "
            "than the head's output; call the model so that it returns them"
        )
    return TargetLogits(
        values_BKX=final_BLD, head_VD=head.weight, head_bias_V=getattr(head, "bias", None)
    )


def _decoder_of(policy: nn.Module) -> Any:
    """The stack of layers."""
    inner = unwrapped(policy, "get_decoder")
    decoder = policy if inner is None else inner.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(policy).__name__} has no decoder with layers; expected a causal LM of "
            "transformers; for another model build Captured by hand"
        )
    return decoder


def unwrapped(model: Any, method: str) -> Any:
    """What has the method: the model, or what it wraps (DDP's `module`); None if neither does."""
    while model is not None and not hasattr(model, method):
        model = getattr(model, "module", None)
    return model


def _first(output: Any) -> Tensor:
    """Hidden states, which a layer or a decoder returns alone or first."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[0]
    return found


def _logits_of(output: Any) -> Tensor | None:
    if isinstance(output, tuple):  # a model asked for no dict; a loss would come first
        output = next((x for x in output if isinstance(x, Tensor) and x.ndim == 3), None)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def _is_2d(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == 2
