"""EAGLE: one decoder layer on the target's last hidden state and the next token.

Shapes: B rows of a batch, L positions, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from miles.rollout.speculative._decoder import DecoderLayer, Rotary, layer_config, normal_
from miles.rollout.speculative._keys import SlotKeys, UnrolledKeys
from miles.rollout.speculative._model_draft import ModelDraft, Shared, text_config
from miles.rollout.speculative.draft import FINAL

__all__ = ["EagleDraft"]


class EagleDraft(ModelDraft):
    """EAGLE-1 and EAGLE-2, which differ in how an engine searches, not in the draft.

    `g_t = layer(W [emb(x_{t+1}); f_t] + b)` stands for the target's next normed hidden state; the
    target's own head reads it. The layer has no norm before its attention. Trained parameters: `fc`
    (2H to H) and `layers.0`, as SGLang's `LlamaForCausalLMEagle` (of Qwen2 targets
    `Qwen2ForCausalLMEagle`, whose q, k and v have biases) loads them.

    Args:
        config: Sizes, a `LlamaConfig` or `Qwen2Config` of transformers with one layer.
        embedding: The target's, held but neither registered nor trained.
        head: The target's, likewise.
        bias: Whether `fc` has one.

    Raises:
        ShapeError: An embedding or head of another vocabulary or hidden size.

    References:
        EAGLE (arXiv:2401.15077), section 4.1; EAGLE-2 (arXiv:2406.16858).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
        >>> draft = EagleDraft.from_target(LlamaForCausalLM(config))
        >>> ids, features = torch.zeros((1, 5), dtype=torch.int64), torch.zeros((1, 5, 16))
        >>> [tuple(logits.shape) for logits in draft.unroll(ids, features, num_steps=2)]
        [(1, 5, 32), (1, 5, 32)]
    """

    def __init__(
        self, config: Any, embedding: nn.Module, head: nn.Module, *, bias: bool = True
    ) -> None:
        super().__init__(config, Shared(embedding, head), (FINAL,))
        self.bias = bias
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=bias)
        self.layers = nn.ModuleList([DecoderLayer(config, beside=False)])
        self._rotary = Rotary(config)
        normal_(self, config.initializer_range)

    @classmethod
    def from_target(
        cls, model: nn.Module, *, bias: bool = True, dtype: torch.dtype | None = None
    ) -> Self:
        """A fresh draft for a causal language model of transformers, on its device.

        Args:
            model: Llama, Qwen2 or Qwen3, dense or mixture of experts, DeepSeek-V3 or the like.
            bias: Whether `fc` has one.
            dtype: Of its parameters; default: the target's.

        Raises:
            UnsupportedModelError: A target whose positions or logits a draft cannot follow.
        """
        target, shared = text_config(model), Shared.of(model)
        config = layer_config(target, qkv_bias=target.model_type.startswith("qwen2"))
        draft = cls(config, shared.embedding, shared.head, bias=bias)
        weight: Any = shared.embedding.weight
        return draft.to(weight.device, dtype or weight.dtype)

    def fuse(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def step(
        self,
        tokens_BL: Tensor,
        state_BLH: Tensor | None,
        positions_BL: Tensor,
        keys: UnrolledKeys | SlotKeys,
        depth: int,
    ) -> Tensor:
        """The predicted hidden state of the next position, `[B, L, H]`."""
        assert state_BLH is not None
        embeds_BLH = self.shared.embed(tokens_BL).to(self.dtype)
        mixed_BLH = self.fc(torch.cat([embeds_BLH, state_BLH], dim=-1))
        out: Tensor = self.layers[0](mixed_BLH, None, self._rotary(mixed_BLH, positions_BL), keys)
        return out

    def logits(self, state: Tensor) -> Tensor:
        """`[..., V]`, by the target's head."""
        return self.shared.logits(state)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """`fc.weight`, `fc.bias` and `layers.0.*`."""
        return dict(self.named_parameters())
