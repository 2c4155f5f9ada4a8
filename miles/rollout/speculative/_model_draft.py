"""What drafts that are models share: what they borrow from the target, and their training pass.

Shapes: B rows of a batch, L positions, F features of a position, H hidden size, K steps, V
vocabulary entries (of the draft, where its vocabulary is smaller).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.errors import DtypeError, SettingError, ShapeError, UnsupportedModelError
from miles.rollout.speculative._draft_memory import ModelMemory
from miles.rollout.speculative._host import upload
from miles.rollout.speculative._keys import SlotKeys, UnrolledKeys

__all__ = ["ModelDraft", "Shared", "check_head", "text_config"]

SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Shared:
    """The target's modules that a draft reads: neither registered, nor copied with it, nor trained.

    They are called without their hooks, so what watches the target does not see the draft.
    """

    embedding: nn.Module
    """Token ids to `[..., H]`."""
    head: nn.Module
    """Its `weight`, `[V, H]`, gives logits."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @classmethod
    def of(cls, model: nn.Module) -> Shared:
        """Those of a causal language model of transformers."""
        get: Any = model
        check_head(model)
        return cls(get.get_input_embeddings(), get.get_output_embeddings())

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """`[..., H]`, in the embedding's dtype."""
        module: Any = self.embedding
        embeds: Tensor = module.forward(token_ids)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]`, in the head's dtype; the gradient goes to `hidden` alone."""
        head: Any = self.head
        weight, bias = head.weight.detach(), getattr(head, "bias", None)
        bias = None if bias is None else bias.detach()
        return F.linear(hidden.to(weight.dtype), weight, bias)


class ModelDraft(nn.Module, ABC):
    """A draft that computes its distributions: from the target's features, or from tokens only.

    Row t of step 0 reads the feature of position t and the token after it, and predicts the token
    two places on; step i reads, at the same row, its own state of step i - 1 and the token i places
    further on.
    """

    depths = 1
    """Modules that take turns, one for each step; 1: the same for every step."""
    reads_first_token = False
    """Whether the first token of a sequence has a row of its own (drafts without features)."""

    def __init__(self, config: Any, shared: Shared | None, feature_layers: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.feature_layers = feature_layers
        if shared is not None:
            _check_shared(shared, config)
            self._shared = shared

    @property
    def shared(self) -> Shared:
        """What it borrows from the target."""
        return self._shared

    @property
    def hidden_size(self) -> int:
        """H, the target's and the draft's."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """The target's V."""
        return int(self.config.vocab_size)

    @property
    def num_features(self) -> int:
        """F, what the target gives of each position."""
        return len(self.feature_layers) * self.hidden_size

    @property
    def target_ids(self) -> Tensor | None:
        """int64: which of the target's tokens each of the draft's logits is; None: the same."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """That of its parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The target's features, `[..., F]`, as a state that step 0 reads, `[..., H]`."""

    @abstractmethod
    def step(
        self,
        tokens_BL: Tensor,
        state_BLH: Tensor | None,
        positions_BL: Tensor,
        keys: UnrolledKeys | SlotKeys,
        depth: int,
    ) -> Tensor:
        """The next state, `[B, L, H]`, from this one (None without features) and the tokens."""

    @abstractmethod
    def logits(self, state: Tensor) -> Tensor:
        """`[..., V]` of the draft's vocabulary, from what `step` returned."""

    @abstractmethod
    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The live tensors under the names of its checkpoint, vocabulary maps excepted."""

    def slot_keys(self, num_slots: int, max_context: int) -> SlotKeys:
        """Room for the keys and values of one module."""
        return SlotKeys(num_slots, max_context)

    def borrowed(self) -> list[nn.Module]:
        """The target's modules that it computes with."""
        return [self.shared.embedding, self.shared.head]

    def memory(self, *, num_slots: int, max_context: int, cuda_graphs: bool = True) -> ModelMemory:
        """Room for so many requests of so many tokens.

        On a GPU, steps of up to 16 tokens a request run as CUDA graphs unless told otherwise.
        Keys and values take as much as one layer of the target for each module, allocated as the
        longest request needs it. The draft is put in eval mode.
        """
        self.eval()
        return ModelMemory(
            self, num_slots=num_slots, max_context=max_context, cuda_graphs=cuda_graphs
        )

    def unroll(
        self,
        input_ids_BL: Tensor,
        features_BLF: Tensor | None,
        *,
        num_steps: int,
        position_ids_BL: Tensor | None = None,
        seq_ids_BL: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits of every step at every position, with gradients for the draft alone.

        The training-time test of EAGLE-3 (arXiv:2503.01840, section 3.2): from step 1 on the draft
        reads its own states, and keys that it made from them.

        Args:
            input_ids_BL: int64 token ids.
            features_BLF: The target's features of the same positions; None if it reads none.
            num_steps: K, at least 1.
            position_ids_BL: int64; default: counted from 0 in each sequence.
            seq_ids_BL: int64, which sequence a token belongs to, each in one piece and in order; -1
                is padding, whose ids and features are not looked at. Default: each row is one
                sequence (padding at its end does no harm). On the CPU nothing waits for the GPU.

        Returns:
            K tensors `[B, L, V]`, in the head's dtype. `[t]` of the i-th predicts token t + 2 + i;
            where token t + 1 + i lies beyond the sequence it holds no meaning.

        Raises:
            ShapeError, DtypeError: Tensors that do not fit together, or another target's features.
            SettingError: Too few steps, or more than there are modules.
        """
        states = self.unroll_states(
            input_ids_BL,
            features_BLF,
            num_steps=num_steps,
            position_ids_BL=position_ids_BL,
            seq_ids_BL=seq_ids_BL,
        )
        return [self.logits(state_BLH) for state_BLH in states]

    def unroll_states(
        self,
        input_ids_BL: Tensor,
        features_BLF: Tensor | None,
        *,
        num_steps: int,
        position_ids_BL: Tensor | None = None,
        seq_ids_BL: Tensor | None = None,
    ) -> list[Tensor]:
        """`unroll` before the head: K tensors `[B, L, H]` for `logits`, a piece at a time."""
        self._check(input_ids_BL, features_BLF, num_steps, position_ids_BL, seq_ids_BL)
        if seq_ids_BL is not None:
            real_BL = upload(seq_ids_BL >= 0, input_ids_BL.device)
            input_ids_BL = input_ids_BL.where(real_BL, 0)
            if features_BLF is not None:
                features_BLF = features_BLF.where(real_BL[..., None], 0)
        if position_ids_BL is None:
            position_ids_BL = _positions(input_ids_BL, seq_ids_BL)
        return self._unroll(input_ids_BL, features_BLF, num_steps, position_ids_BL, seq_ids_BL)

    def _unroll(
        self,
        input_ids_BL: Tensor,
        features_BLF: Tensor | None,
        num_steps: int,
        position_ids_BL: Tensor,
        seq_ids_BL: Tensor | None,
    ) -> list[Tensor]:
        assert features_BLF is not None
        state_BLH = self.fuse(features_BLF.detach().to(self.dtype))
        keys = UnrolledKeys(seq_ids_BL)
        states: list[Tensor] = []
        for i in range(num_steps):
            tokens_BL = F.pad(input_ids_BL[:, i + 1 :], (0, min(i + 1, input_ids_BL.shape[1])))
            if self.depths > 1:
                keys = UnrolledKeys(seq_ids_BL)
            chained = i if self.depths == 1 else 0
            state_BLH = self.step(tokens_BL, state_BLH, position_ids_BL + chained, keys, depth=i)
            states.append(state_BLH)
        return states

    def _check(
        self,
        input_ids_BL: Tensor,
        features_BLF: Tensor | None,
        num_steps: int,
        position_ids_BL: Tensor | None,
        seq_ids_BL: Tensor | None,
    ) -> None:
        self.check_steps(num_steps)
        if input_ids_BL.dim() != 2 or input_ids_BL.dtype != torch.int64:
            raise ShapeError(
                f"input_ids_BL has shape {tuple(input_ids_BL.shape)} and dtype "
                f"{input_ids_BL.dtype}; expected int64 [batch, length]"
            )
        for name, tensor in (("position_ids_BL", position_ids_BL), ("seq_ids_BL", seq_ids_BL)):
            if tensor is not None and tensor.shape != input_ids_BL.shape:
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}; expected that of input_ids_BL, "
                    f"{tuple(input_ids_BL.shape)}"
                )
        if not self.feature_layers:
            return
        if features_BLF is None:
            raise ShapeError(
                f"this draft reads the target's layers {self.feature_layers}; give features_BLF "
                f"[batch, length, {self.num_features}]"
            )
        self.check_features(features_BLF)
        if features_BLF.shape[:-1] != input_ids_BL.shape:
            raise ShapeError(
                f"features_BLF has shape {tuple(features_BLF.shape)}; expected one row for each of "
                f"the {tuple(input_ids_BL.shape)} tokens"
            )

    def check_steps(self, num_steps: int) -> None:
        """Raise SettingError if it cannot take so many steps."""
        most = self.depths if self.depths > 1 else num_steps
        if not 1 <= num_steps <= most:
            allowed = f"1 to {self.depths}, one for each module" if self.depths > 1 else "1 or more"
            raise SettingError(
                f"num_steps is {num_steps}; expected {allowed}: an engine's draft_steps, or steps= "
                "of a DraftTrainer"
            )

    def check_features(self, features: Tensor) -> None:
        """Raise ShapeError or DtypeError if these cannot be features of its target."""
        if features.shape[-1] != self.num_features:
            raise ShapeError(
                f"features have {features.shape[-1]} numbers a position; this draft reads "
                f"{self.num_features}: the hidden states (size {self.hidden_size}) of layers "
                f"{self.feature_layers}, concatenated"
            )
        if not features.is_floating_point():
            raise DtypeError(f"features are {features.dtype}; expected floating point")

    def check_target(self, model: nn.Module) -> None:
        """Raise if the model is of another vocabulary than its target, or, where the draft reads
        hidden states, of another hidden size or depth."""
        config = text_config(model)
        for name in ("vocab_size", "hidden_size") if self.feature_layers else ("vocab_size",):
            got, expected = getattr(config, name), getattr(self.config, name)
            if got != expected:
                raise ShapeError(
                    f"the draft was made for a target with {name} {expected}, but this model's is "
                    f"{got}; make a draft of its own with from_target(model)"
                )
        check_layers(self.feature_layers, config.num_hidden_layers)


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raise SettingError unless the layers exist, each once and in order (-1: the final norm)."""
    outside = [layer for layer in layers if not -1 <= layer < num_layers]
    if outside:
        raise SettingError(
            f"feature layers {layers}: {outside} are not among the target's {num_layers} layers; "
            f"expected 0 to {num_layers - 1}, or -1 for the output of the final norm"
        )
    in_order = [num_layers if layer == -1 else layer for layer in layers]
    if sorted(set(in_order)) != in_order:
        raise SettingError(
            f"feature layers {layers} repeat or go back; engines hand them over in the order of "
            "the layers, each once"
        )


def check_head(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless logits are the head's weight times the final norm."""
    config = text_config(model)
    get: Any = model
    for name in ("get_input_embeddings", "get_output_embeddings"):
        if not isinstance(getattr(model, name, lambda: None)(), nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no {name}(); a draft needs a causal language model of "
                "transformers"
            )
    for name in SCALED_LOGITS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"{type(model).__name__} sets {name}={getattr(config, name)}: its logits are not "
                "its head's output, which drafts and engines take them for"
            )
    if getattr(get.get_output_embeddings(), "weight", None) is None:
        raise UnsupportedModelError(f"the head of {type(model).__name__} has no weight")


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no configuration of transformers; a draft is made from it"
        )
    return config.get_text_config(decoder=True)


def _check_shared(shared: Shared, config: Any) -> None:
    expected = (config.vocab_size, config.hidden_size)
    for name, part in (("embedding", shared.embedding), ("head", shared.head)):
        got = tuple(getattr(part, "weight", torch.empty(0)).shape)
        if got != expected:
            raise ShapeError(
                f"the target's {name} has a weight of shape {got}, but the draft's configuration "
                f"says {expected} (vocabulary, hidden size); a draft serves the target that it was "
                "made for"
            )


def _positions(input_ids_BL: Tensor, seq_ids_BL: Tensor | None) -> Tensor:
    places_L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
    if seq_ids_BL is None:
        return places_L.expand(input_ids_BL.shape)
    new_BL = F.pad(seq_ids_BL[:, 1:] != seq_ids_BL[:, :-1], (1, 0), value=True)
    new_BL = upload(new_BL, places_L.device)
    return places_L - (places_L * new_BL).cummax(dim=1).values
