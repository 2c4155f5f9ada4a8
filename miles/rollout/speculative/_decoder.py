"""The decoder layer of EAGLE drafts, with the parameters that SGLang's draft classes have.

Shapes: B rows of a batch, L positions, W the width that attention reads, H hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from miles.errors import SettingError, UnsupportedModelError
from miles.rollout.speculative._keys import SlotKeys, UnrolledKeys, as_computed

__all__ = ["DecoderLayer", "RMSNorm", "Rotary", "layer_config", "normal_"]

ROPE_EXTRAS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


def layer_config(target: Any, *, qkv_bias: bool = False) -> Any:
    """A configuration of one dense layer with the target's sizes and positions.

    Args:
        target: The target's (text) configuration.
        qkv_bias: Whether q, k and v have biases: Qwen2's layout, else Llama's.

    Multi-head latent attention becomes plain attention with as many heads of
    `hidden_size / num_attention_heads`, its positions unscaled: the engines' scalings differ there.
    """
    heads, hidden = target.num_attention_heads, target.hidden_size
    latent = getattr(target, "kv_lora_rank", None) is not None
    head_dim = None if latent else getattr(target, "head_dim", None)
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise UnsupportedModelError(
            f"hidden size {hidden} over {heads} heads gives a head size of {head_dim}, but rotary "
            "positions need an even one"
        )
    rope = copy.deepcopy(getattr(target, "rope_parameters", None)) or {}
    if "rope_theta" not in rope:
        raise UnsupportedModelError(
            f"the positions of {target.model_type!r} are not one set of rotary ones (got "
            f"rope_parameters={rope}), so a draft layer cannot follow them"
        )
    if latent:
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    make = Qwen2Config if qkv_bias else LlamaConfig
    return make(
        vocab_size=target.vocab_size,
        hidden_size=hidden,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads if latent else target.num_key_value_heads,
        head_dim=head_dim,
        hidden_act="silu",
        max_position_embeddings=target.max_position_embeddings,
        initializer_range=getattr(target, "initializer_range", 0.02),
        rms_norm_eps=target.rms_norm_eps,
        tie_word_embeddings=False,
        rope_parameters={key: rope[key] for key in rope if key not in ROPE_EXTRAS},
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
        target_num_hidden_layers=target.num_hidden_layers,
    )


class Rotary:
    """Cosines and sines of positions; outside the module tree, so that it stays in float32."""

    def __init__(self, config: Any, make: Any = LlamaRotaryEmbedding) -> None:
        self._module = make(config)

    def __call__(self, like: Tensor, position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Both `[B, L, head size]`, in `like`'s dtype and on its device."""
        if self._module.inv_freq.device != like.device:
            self._module.to(like.device)
        cos, sin = self._module(like, position_ids_BL)
        return cos, sin


class RMSNorm(nn.RMSNorm):
    """In the weight's dtype: under autocast the hidden state may have another."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H]` to the same."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Any, width: int, *, qkv_bias: bool) -> None:
        super().__init__()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if heads % groups:
            raise SettingError(
                f"got {heads} attention heads over {groups} key/value heads; the first must be a "
                "multiple of the second"
            )
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_BLW: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: UnrolledKeys | SlotKeys,
    ) -> Tensor:
        """`[B, L, W]` to `[B, L, H]`."""
        hidden_BLW = as_computed(hidden_BLW)  # once, not in each of the three
        query, key, value = (
            project(hidden_BLW).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (part[:, None] for part in rotary)
        out = keys.attend(_rotate(query, cos, sin), _rotate(key, cos, sin), value)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to `[..., H]`."""
        hidden = as_computed(hidden)
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    """One layer: without a norm before its attention, as EAGLE's, or reading 2H, as EAGLE-3's.

    Args:
        config: Sizes, as `layer_config` makes them.
        beside: Attention reads the normed embedding and the normed hidden state side by side.
    """

    def __init__(self, config: Any, *, beside: bool) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        qkv_bias = config.model_type == "qwen2"
        self.self_attn = Attention(config, 2 * hidden if beside else hidden, qkv_bias=qkv_bias)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(hidden, eps=eps) if beside else None
        self.hidden_norm = RMSNorm(hidden, eps=eps) if beside else None
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def forward(
        self,
        hidden_BLH: Tensor,
        embeds_BLH: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        keys: UnrolledKeys | SlotKeys,
    ) -> Tensor:
        """The residual stream after the layer, `[B, L, H]`."""
        read = hidden_BLH
        if self.hidden_norm is not None and self.input_layernorm is not None:
            normed = self.input_layernorm(embeds_BLH), self.hidden_norm(hidden_BLH)
            read = torch.cat([as_computed(part) for part in normed], dim=-1)
        hidden_BLH = hidden_BLH + self.self_attn(read, rotary, keys)
        out: Tensor = hidden_BLH + self.mlp(self.post_attention_layernorm(hidden_BLH))
        return out


def normal_(module: nn.Module, std: float) -> None:
    """Linear weights normal with this deviation, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
