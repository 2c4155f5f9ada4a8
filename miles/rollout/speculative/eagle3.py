"""EAGLE-3: one decoder layer on hidden states of several of the target's layers.

Shapes: B rows of a batch, L positions, F features of a position, H hidden size, V entries of the
target's vocabulary, U of the draft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from miles.errors import DtypeError, SettingError, ShapeError
from miles.rollout.speculative._decoder import DecoderLayer, RMSNorm, Rotary, layer_config, normal_
from miles.rollout.speculative._keys import SlotKeys, UnrolledKeys
from miles.rollout.speculative._model_draft import ModelDraft, Shared, check_layers, text_config
from miles.rollout.speculative.draft import FINAL

__all__ = ["Eagle3Draft", "check_target_ids", "default_feature_layers", "frequent_tokens"]


class Eagle3Draft(ModelDraft):
    """EAGLE-3: `fc` fuses the features; attention reads the normed embedding and state, 2H.

    The state that the next step reads is the residual stream; its norm goes to the draft's head.
    Trained parameters: `fc` (F to H), `midlayer`, `norm` and, unless shared, `lm_head`, as SGLang's
    `LlamaForCausalLMEagle3` loads them for any target.

    Args:
        config: Sizes, a `LlamaConfig` of transformers with one layer.
        embedding: The target's, held but neither registered nor trained.
        head: The target's, likewise; used only without an own head.
        feature_layers: The target's layers, from 0, whose outputs it reads, in ascending order.
        own_head: Whether it has a head of its own.
        target_ids: int64 `[U]`: a smaller vocabulary, by the target's ids; needs an own head.
            Default: the target's.

    Raises:
        ShapeError, DtypeError: An embedding or head of another target; ids that are no int64 list.
        SettingError: Ids outside the vocabulary or repeated, layers out of order or none.

    References:
        EAGLE-3 (arXiv:2503.01840), section 3.1; reduced vocabulary: FR-Spec (arXiv:2502.14856).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1)
        >>> counts = torch.arange(32)
        >>> draft = Eagle3Draft.from_target(
        ...     LlamaForCausalLM(config), target_ids=frequent_tokens(counts, 8))
        >>> draft.feature_layers, draft.num_features, draft.target_ids.tolist()
        ((1, 3, 4), 48, [24, 25, 26, 27, 28, 29, 30, 31])
    """

    d2t: Tensor | None
    """int64 `[U]`: what to add to a draft token to get the target's; None: nothing."""

    def __init__(
        self,
        config: Any,
        embedding: nn.Module,
        head: nn.Module,
        *,
        feature_layers: Sequence[int],
        own_head: bool = True,
        target_ids: Tensor | None = None,
    ) -> None:
        layers = tuple(feature_layers)
        if not layers or FINAL in layers:
            raise SettingError(
                f"feature_layers is {layers}; EAGLE-3 reads outputs of decoder layers, one or more"
            )
        super().__init__(config, Shared(embedding, head), layers)
        hidden = config.hidden_size
        self.fc = nn.Linear(len(layers) * hidden, hidden, bias=False)
        self.midlayer = DecoderLayer(config, beside=True)
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        d2t = None
        if target_ids is not None:
            if not own_head:
                raise SettingError("a draft with a smaller vocabulary needs a head of its own")
            check_target_ids(target_ids, config.vocab_size)
            d2t = target_ids - torch.arange(len(target_ids), device=target_ids.device)
        self.register_buffer("d2t", d2t)
        size = config.vocab_size if target_ids is None else len(target_ids)
        self.lm_head = nn.Linear(hidden, size, bias=False) if own_head else None
        self._rotary = Rotary(config)
        normal_(self, config.initializer_range)

    @classmethod
    def from_target(
        cls,
        model: nn.Module,
        *,
        feature_layers: Sequence[int] | None = None,
        own_head: bool = True,
        target_ids: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A fresh draft for a causal language model of transformers, on its device.

        Its norm and its own head begin as copies of the target's.

        Args:
            model: Llama, Qwen2 or Qwen3, dense or mixture of experts, DeepSeek-V3 or the like.
            feature_layers: Default: SGLang's choice, `default_feature_layers`.
            own_head: Whether it has a head of its own.
            target_ids: int64 `[U]`, a smaller vocabulary: see `frequent_tokens`.
            dtype: Of its parameters; default: the target's.

        Raises:
            UnsupportedModelError: A target whose positions or logits a draft cannot follow.
            SettingError: Layers that the target does not have.
        """
        target, shared = text_config(model), Shared.of(model)
        if feature_layers is None:
            feature_layers = default_feature_layers(target.num_hidden_layers)
        check_layers(tuple(feature_layers), target.num_hidden_layers)
        draft = cls(
            layer_config(target),
            shared.embedding,
            shared.head,
            feature_layers=feature_layers,
            own_head=own_head,
            target_ids=target_ids,
        )
        weight: Any = shared.embedding.weight
        draft.to(weight.device, dtype or weight.dtype)
        backbone: Any = model.get_decoder()  # type: ignore[operator]  # a method of transformers
        with torch.no_grad():
            draft.norm.weight.copy_(backbone.norm.weight)
            if draft.lm_head is not None:
                rows: Any = shared.head.weight
                ids = draft.target_ids
                draft.lm_head.weight.copy_(rows if ids is None else rows[ids])
        return draft

    @property
    def target_ids(self) -> Tensor | None:
        """int64 `[U]`, or None for the target's own vocabulary."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, features: Tensor) -> Tensor:
        """`[..., F]` to `[..., H]`."""
        fused: Tensor = self.fc(features)
        return fused

    def step(
        self,
        tokens_BL: Tensor,
        state_BLH: Tensor | None,
        positions_BL: Tensor,
        keys: UnrolledKeys | SlotKeys,
        depth: int,
    ) -> Tensor:
        """The residual stream after the layer, `[B, L, H]`."""
        assert state_BLH is not None
        embeds_BLH = self.shared.embed(tokens_BL).to(self.dtype)
        rotary = self._rotary(embeds_BLH, positions_BL)
        out: Tensor = self.midlayer(state_BLH, embeds_BLH, rotary, keys)
        return out

    def logits(self, state: Tensor) -> Tensor:
        """`[..., U]`, by its own head, or `[..., V]` by the target's."""
        normed = self.norm(state)
        if self.lm_head is None:
            return self.shared.logits(normed)
        logits: Tensor = self.lm_head(normed)
        return logits

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """`fc.weight`, `midlayer.*`, `norm.weight` and its own `lm_head.weight`.

        Never `d2t` and `t2d`: servers bake the vocabulary into their graphs when they start.
        """
        return dict(self.named_parameters())


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """The layers that SGLang captures unless told otherwise: near the start, the middle, the end.

    It names the layers that follow, 2, L // 2 and L - 3. Below 7 layers, where these run together,
    up to three before the last one, whose output SGLang cannot capture (of 2 layers, both).

    >>> default_feature_layers(32), default_feature_layers(5), default_feature_layers(2)
    ((1, 15, 28), (1, 2, 3), (0, 1))
    """
    if num_layers >= 7:
        return (1, num_layers // 2 - 1, num_layers - 4)
    if num_layers <= 2:
        return tuple(range(num_layers))
    return tuple(range(max(0, num_layers - 4), num_layers - 1))


def frequent_tokens(counts_V: Tensor, size: int) -> Tensor:
    """Ids of the most frequent tokens, ascending: int64 `[size]`, a draft's smaller vocabulary.

    Args:
        counts_V: How often each token occurs in what the policy writes; of equals, the lower id.
        size: How many to keep, 1 to V.

    Raises:
        ShapeError, SettingError: Counts that are no list, or a size out of range.

    Example:
        >>> frequent_tokens(torch.tensor([0, 5, 1, 5, 2]), 3).tolist()
        [1, 3, 4]
    """
    if counts_V.dim() != 1:
        raise ShapeError(f"counts_V has shape {tuple(counts_V.shape)}; expected [vocabulary]")
    if not 1 <= size <= len(counts_V):
        raise SettingError(f"size is {size}; expected 1 to {len(counts_V)}, the vocabulary")
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


def check_target_ids(target_ids: Tensor, vocab_size: int) -> None:
    """Raise unless these are different ids of a vocabulary of that size."""
    if target_ids.dtype != torch.int64 or target_ids.dim() != 1 or not len(target_ids):
        raise DtypeError(
            f"target_ids has dtype {target_ids.dtype} and shape {tuple(target_ids.shape)}; "
            "expected an int64 list of token ids"
        )
    lowest, highest = int(target_ids.min()), int(target_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise SettingError(
            f"the draft's vocabulary maps to ids {lowest} to {highest}; expected those of the "
            f"target, 0 to {vocab_size - 1}: the draft, or its d2t, is another target's"
        )
    if len(target_ids.unique()) != len(target_ids):
        ids, counts = target_ids.unique(return_counts=True)
        raise SettingError(
            f"the draft's vocabulary maps more than one of its tokens to {ids[counts > 1][0]}; "
            "expected each of the target's ids at most once (d2t is damaged, or target_ids repeats)"
        )
