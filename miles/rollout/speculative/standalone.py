"""Any small causal language model as a draft.

Shapes: B rows of a batch, L positions, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from miles.errors import SettingError, ShapeError, UnsupportedModelError
from miles.rollout._kv import supports_slots
from miles.rollout.speculative._draft_memory import ModelMemory
from miles.rollout.speculative._keys import SlotKeys, UnrolledKeys
from miles.rollout.speculative._model_draft import ModelDraft, check_head, text_config

__all__ = ["StandaloneDraft"]


class StandaloneDraft(ModelDraft):
    """A language model that reads what the target reads, and shares nothing but its vocabulary.

    Args:
        model: A causal language model of transformers with full attention. It is registered, and so
            trained where the draft is.
        vocab_size: The target's; checked.

    Raises:
        ShapeError: Another vocabulary than the target's.
        UnsupportedModelError: Sliding windows or other state, logits that are not its head's.

    References:
        Leviathan et al., Fast Inference from Transformers via Speculative Decoding
        (arXiv:2211.17192).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        >>> draft = StandaloneDraft(LlamaForCausalLM(config), vocab_size=32)
        >>> draft.feature_layers
        ()
    """

    reads_first_token = True

    def __init__(self, model: nn.Module, *, vocab_size: int) -> None:
        check_head(model)
        reason = supports_slots(model)
        if reason is not None:
            raise UnsupportedModelError(f"{type(model).__name__} cannot be a draft: {reason}")
        config = text_config(model)
        if config.vocab_size != vocab_size:
            raise ShapeError(
                f"the draft has a vocabulary of {config.vocab_size}, the target one of "
                f"{vocab_size}; a draft needs the target's tokenizer"
            )
        super().__init__(config, None, ())
        self.model = model
        self._eager = config._attn_implementation == "eager"

    @classmethod
    def from_target(cls, model: nn.Module, draft_model: nn.Module) -> StandaloneDraft:
        """The small model, checked against the target."""
        return cls(draft_model, vocab_size=text_config(model).vocab_size)

    def borrowed(self) -> list[nn.Module]:
        """Nothing of the target."""
        return []

    def memory(self, *, num_slots: int, max_context: int, cuda_graphs: bool = True) -> ModelMemory:
        """As `ModelDraft.memory`.

        Raises:
            SettingError: more tokens than the small model has positions for.
        """
        limit = getattr(self.config, "max_position_embeddings", None) or max_context
        if max_context > limit:
            raise SettingError(
                f"max_context is {max_context} and the draft ({type(self.model).__name__}) reaches "
                f"{limit}; give the engine max_context={limit}, or take a draft that reaches as far"
            )
        return super().memory(num_slots=num_slots, max_context=max_context, cuda_graphs=cuda_graphs)

    def fuse(self, features: Tensor) -> Tensor:
        """It reads none."""
        raise ShapeError("a standalone draft reads no features")

    def step(
        self,
        tokens_BL: Tensor,
        state_BLH: Tensor | None,
        positions_BL: Tensor,
        keys: UnrolledKeys | SlotKeys,
        depth: int,
    ) -> Tensor:
        """The output of its final norm, `[B, L, H]`."""
        mask = keys.mask(tokens_BL.shape[1], tokens_BL.device)
        return self._read(tokens_BL, positions_BL, mask, keys)

    def logits(self, state: Tensor) -> Tensor:
        """`[..., V]`."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]  # of transformers
        logits: Tensor = head(state)
        return logits

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The model's own parameters and names."""
        return dict(self.model.named_parameters())

    def _unroll(
        self,
        input_ids_BL: Tensor,
        features_BLF: Tensor | None,
        num_steps: int,
        position_ids_BL: Tensor,
        seq_ids_BL: Tensor | None,
    ) -> list[Tensor]:
        """One pass: a language model's later steps are what it says at later positions."""
        length = input_ids_BL.shape[1]
        mask = UnrolledKeys(seq_ids_BL).mask(length, input_ids_BL.device)
        state_BLH = self._read(input_ids_BL, position_ids_BL, mask, None)
        return [
            F.pad(state_BLH[:, i + 1 :], (0, 0, 0, min(i + 1, length))) for i in range(num_steps)
        ]

    def _read(
        self, tokens_BL: Tensor, positions_BL: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        if mask is not None and self._eager:
            mask = mask.to(self.dtype).log()
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]  # of transformers
        state_BLH: Tensor = decoder(
            input_ids=tokens_BL,
            position_ids=positions_BL,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return state_BLH
