"""Multi-token prediction: the modules that DeepSeek-V3 and its kin carry in their checkpoints.

Shapes: B rows of a batch, L positions, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from miles.errors import CheckpointError, SettingError, UnsupportedModelError
from miles.rollout.speculative._decoder import RMSNorm, Rotary, normal_
from miles.rollout.speculative._draft_files import fill, find_tensors
from miles.rollout.speculative._keys import SlotKeys, UnrolledKeys
from miles.rollout.speculative._model_draft import ModelDraft, Shared, text_config
from miles.rollout.speculative.draft import FINAL

__all__ = ["MTPDraft"]

EXPERTS = ".experts."
BORROWED = ("embed_tokens.", "shared_head.head.", "rotary_emb.")


class MTPDraft(ModelDraft):
    """`h_k = norm(layer(W [enorm(emb(x_{t+1+k})); hnorm(h_{k-1})]))`, h of depth -1 the target's.

    The decoder layer is of the target's own class and kind (that of its last layer), so latent
    attention and experts come with it; embedding and head are the target's.

    With one module it is repeated for every step, as engines do with the one module that
    checkpoints carry: it attends like EAGLE. With several there is one for each step, and each
    attends to its own keys of every earlier position.

    Args:
        config: The target's (text) configuration.
        embedding: The target's, held but neither registered nor trained.
        head: The target's, likewise.
        layers: One decoder layer for each module.
        rotary: Makes its positions' cosines and sines: a class of transformers.

    References:
        DeepSeek-V3 (arXiv:2412.19437), section 2.2.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
        >>> draft = MTPDraft.from_target(LlamaForCausalLM(config), num_modules=2)
        >>> sorted(draft.checkpoint_tensors())[0], draft.depths
        ('model.layers.2.eh_proj.weight', 2)
    """

    def __init__(
        self,
        config: Any,
        embedding: nn.Module,
        head: nn.Module,
        *,
        layers: list[nn.Module],
        rotary: Any,
    ) -> None:
        super().__init__(config, Shared(embedding, head), (FINAL,))
        self.depths = len(layers)
        self.stages = nn.ModuleList([_Stage(config, layer) for layer in layers])
        self._rotary = Rotary(config, rotary)

    @classmethod
    def from_target(
        cls, model: nn.Module, *, num_modules: int = 1, dtype: torch.dtype | None = None
    ) -> Self:
        """Fresh modules for a causal language model of transformers, on its device.

        Args:
            model: Llama, Qwen2 or Qwen3, dense or mixture of experts, DeepSeek-V3 or the like.
            num_modules: 1, repeated for every step, or one for each step.
            dtype: Of their parameters; default: the target's.

        Raises:
            SettingError: Fewer than one module.
            UnsupportedModelError: A target whose last layer is not full attention.
        """
        if num_modules < 1:
            raise SettingError(f"num_modules is {num_modules}; expected 1 or more")
        shared, config = Shared.of(model), copy.deepcopy(text_config(model))
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        if kinds[-1] != "full_attention":
            raise UnsupportedModelError(
                f"the last layer of {type(model).__name__} is {kinds[-1]!r}; a module needs full "
                "attention"
            )
        config._attn_implementation = "sdpa"
        config.architectures = [type(model).__name__]
        backbone: Any = model.get_decoder()  # type: ignore[operator]  # a method of transformers
        make = type(backbone.layers[-1])
        # The last layer's index, which may decide its kind: experts or dense.
        layers = [make(config, config.num_hidden_layers - 1) for _ in range(num_modules)]
        for layer in layers:
            layer.apply(model._init_weights)
        draft = cls(
            config,
            shared.embedding,
            shared.head,
            layers=layers,
            rotary=type(backbone.rotary_emb),
        )
        weight: Any = shared.embedding.weight
        draft.to(weight.device)
        for parameter in draft.parameters():  # buffers (the router's bias) stay float32
            parameter.data = parameter.data.to(dtype or weight.dtype)
        return draft

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, model: nn.Module, *, dtype: torch.dtype | None = None
    ) -> Self:
        """The modules that the target's checkpoint carries behind its last layer.

        `model.layers.{L}.` (and L + 1, ...) with `enorm`, `hnorm`, `eh_proj`, `shared_head.norm`
        and a decoder layer, which transformers itself leaves out. Their copies of embedding and
        head are left out: those of `model` are read.

        Raises:
            CheckpointError: No module there, one of another shape, or a quantised one.
            NonFiniteError: NaN or infinity in it, by name.
        """
        num_layers = text_config(model).num_hidden_layers
        depth = 0
        found: dict[str, Tensor] = {}
        while layer := find_tensors(folder, f"model.layers.{num_layers + depth}."):
            found |= layer
            depth += 1
        if not depth:
            raise CheckpointError(
                f"{folder} has no tensor model.layers.{num_layers}.*: its checkpoint carries no "
                "module for multi-token prediction; make one with from_target and train it"
            )
        draft = cls.from_target(model, num_modules=depth, dtype=dtype)
        fill(draft.checkpoint_tensors(), found, folder, ignore=BORROWED)
        return draft

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
        """The normed output of this depth's module, `[B, L, H]`."""
        assert state_BLH is not None
        stage: Any = self.stages[depth if self.depths > 1 else 0]
        embeds_BLH = self.shared.embed(tokens_BL).to(self.dtype)
        mixed_BLH = stage.eh_proj(
            torch.cat([stage.enorm(embeds_BLH), stage.hnorm(state_BLH)], dim=-1)
        )
        out = stage.layer(
            mixed_BLH,
            attention_mask=keys.mask(tokens_BL.shape[1], tokens_BL.device),
            position_ids=positions_BL,
            past_key_values=keys,
            use_cache=True,
            position_embeddings=self._rotary(mixed_BLH, positions_BL),
        )
        normed: Tensor = stage.norm(out)
        return normed

    def logits(self, state: Tensor) -> Tensor:
        """`[..., V]`, by the target's head."""
        return self.shared.logits(state)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """`model.layers.{L + k}.*`: one tensor for each expert, buffers that are saved included."""
        tensors: dict[str, Tensor] = {}
        for depth, stage in enumerate(self.stages):
            prefix = f"model.layers.{self.config.num_hidden_layers + depth}."
            for name, tensor in stage.state_dict().items():
                for part, view in _experts(name.removeprefix("layer."), tensor):
                    part = "shared_head.norm.weight" if part == "norm.weight" else part
                    tensors[prefix + part] = view
        return tensors


class _Stage(nn.Module):
    """One depth's parameters."""

    def __init__(self, config: Any, layer: nn.Module) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps=eps)
        self.hnorm = RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        normal_(self, getattr(config, "initializer_range", 0.02))
        self.layer = layer
        self.norm = RMSNorm(hidden, eps=eps)


def _experts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Views of a tensor that transformers fuses over experts, under the checkpoint's names."""
    stem, found, leaf = name.partition(EXPERTS)
    if not found or tensor.dim() != 3:
        return [(name, tensor)]
    parts: list[tuple[str, Tensor]] = []
    for expert, weight in enumerate(tensor):
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for part, rows in zip(names, weight.chunk(len(names)), strict=True):
            parts.append((f"{stem}{EXPERTS}{expert}.{part}.weight", rows))
    return parts
