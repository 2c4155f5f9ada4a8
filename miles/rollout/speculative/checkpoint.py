"""Drafts on disk, in the formats that SGLang loads."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from miles.errors import CheckpointError, UnsupportedModelError
from miles.rollout.speculative._draft_files import (
    INDEX,
    PICKLED,
    SINGLE,
    check_finite,
    fill,
    find_tensors,
    read_config,
)
from miles.rollout.speculative._model_draft import ModelDraft, check_layers, text_config
from miles.rollout.speculative._sglang_names import EAGLE, EAGLE3, NEXTN, check_sglang
from miles.rollout.speculative.eagle import EagleDraft
from miles.rollout.speculative.eagle3 import (
    Eagle3Draft,
    check_target_ids,
    default_feature_layers,
)
from miles.rollout.speculative.mtp import MTPDraft
from miles.rollout.speculative.standalone import StandaloneDraft

__all__ = ["export_draft", "load_draft"]

VARIANTS = ("norm_before_fc", "fc_norm", "use_aux_norm", "norm_output")
BORROWED = ("embed_tokens.", "rotary_emb.")


def export_draft(
    draft: ModelDraft, folder: str | Path, *, dtype: torch.dtype | None = None
) -> Path:
    """Write a checkpoint, `config.json` and `model.safetensors`, that SGLang loads as a draft.

    | draft | `--speculative-algorithm` | architecture |
    |---|---|---|
    | `EagleDraft` | `EAGLE` | `LlamaForCausalLMEagle`, `Qwen2ForCausalLMEagle` |
    | `Eagle3Draft` | `EAGLE3` | `LlamaForCausalLMEagle3` |
    | `MTPDraft` with one module, of DeepSeek-V3 | `EAGLE` | the target's; its layer L |
    | `StandaloneDraft` | `STANDALONE` | the model's |

    Embedding, and head where shared, are the target's and left out. Every name and shape of the
    first three is checked against SGLang's loading rules, since it skips what it does not know. An
    `MTPDraft` of another target or of several modules is written under the same names, for
    `load_draft`; no server was found to load it.

    Args:
        draft: What to write.
        folder: Made where it does not exist; a checkpoint there is replaced.
        dtype: Of floating-point weights in the file; default: as they are.

    Returns:
        The folder.

    Raises:
        NonFiniteError: NaN or infinity in a tensor, as it is or in `dtype`; the text names it.
        UnsupportedModelError: An EAGLE-3 draft of features that SGLang cannot capture.
        CheckpointError: A tensor that SGLang would skip or miss.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16,
        ...     intermediate_size=24, num_hidden_layers=8, num_attention_heads=2,
        ...     num_key_value_heads=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_draft(Eagle3Draft.from_target(target), folder)
        ...     load_draft(path, target).feature_layers
        (1, 3, 4)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(draft, StandaloneDraft):
        model: Any = draft.model if dtype is None else copy.deepcopy(draft.model).to(dtype)
        check_finite(dict(model.named_parameters()))
        model.save_pretrained(folder)
        return folder
    tensors = draft.checkpoint_tensors()
    config = _config(draft)
    if isinstance(draft, EagleDraft) and not draft.bias:
        tensors["fc.bias"] = torch.zeros_like(draft.fc.weight[:, 0])
    if isinstance(draft, Eagle3Draft):
        tensors |= _vocabulary(draft)
    if not isinstance(draft, MTPDraft) or (
        draft.depths == 1 and config["architectures"] == [NEXTN]
    ):
        check_sglang(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    served: Any = draft.shared.embedding.weight.dtype  # "auto" makes float16 of float32
    config["torch_dtype"] = config["dtype"] = str(dtype or served).removeprefix("torch.")

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        # A router's bias decides by small differences, and stays as it is.
        kept = dtype is None or tensor.dtype != draft.dtype or name.endswith("correction_bias")
        return tensor.dtype if kept or dtype is None else dtype

    held = {
        name: tensor.detach()
        .to("cpu", dtype_of(name, tensor))
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    check_finite(held)
    save_file(held, folder / "new.safetensors", metadata={"format": "pt"})
    (folder / "new.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    stale = {INDEX, PICKLED}
    if (folder / INDEX).is_file():
        stale |= set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    os.replace(folder / "new.safetensors", folder / SINGLE)
    for name in stale - {SINGLE}:
        (folder / name).unlink(missing_ok=True)
    os.replace(folder / "new.json", folder / "config.json")
    return folder


def load_draft(folder: str | Path, model: nn.Module) -> ModelDraft:
    """A draft for `model` from a checkpoint: one of `export_draft`'s, or a published one.

    EAGLE and EAGLE-3 checkpoints may hold an embedding, which is left out: the target's is read.
    The draft has the file's dtype (an `MTPDraft` its target's) and the target's device.

    Args:
        folder: Of `config.json` and `model.safetensors` (or several, or `pytorch_model.bin`).
        model: The target, a causal language model of transformers.

    Raises:
        ShapeError: A draft of another vocabulary or hidden size.
        SettingError: A vocabulary map that leaves the target's, or layers that it does not have.
        CheckpointError: Missing, unknown or misshapen tensors, a `t2d` that contradicts `d2t`.
        NonFiniteError: NaN or infinity in a tensor, which the text names.
        UnsupportedModelError: A variant that is not implemented here.
    """
    config = read_config(folder)
    architecture = (config.get("architectures") or [""])[0]
    if architecture in EAGLE:
        return _load_eagle(config, folder, model)
    if architecture == EAGLE3:
        return _load_eagle3(config, folder, model)
    if config.get("num_nextn_predict_layers"):
        return MTPDraft.from_checkpoint(folder, model)
    small = AutoModelForCausalLM.from_pretrained(folder)
    weight: Any = model.get_input_embeddings().weight  # type: ignore[operator]  # of transformers
    return StandaloneDraft.from_target(model, small.to(weight.device).eval())


def _config(draft: ModelDraft) -> dict[str, Any]:
    config: dict[str, Any] = draft.config.to_dict()
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # transformers 4 reads these two
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if isinstance(draft, EagleDraft):
        qwen = draft.config.model_type == "qwen2"
        config["architectures"] = [EAGLE[1] if qwen else EAGLE[0]]
        config["fc_bias"] = draft.bias
    elif isinstance(draft, Eagle3Draft):
        _check_capture(draft)
        config["architectures"] = [EAGLE3]
        config["draft_vocab_size"] = None if draft.lm_head is None else draft.lm_head.out_features
        config["eagle_config"] = {
            "use_aux_hidden_state": True,
            # The server adds 1, since it captures what goes into a layer.
            "eagle_aux_hidden_state_layer_ids": list(draft.feature_layers),
        }
    else:
        config["num_nextn_predict_layers"] = draft.depths
    return config


def _check_capture(draft: Eagle3Draft) -> None:
    layers, num_layers = (
        draft.feature_layers,
        getattr(draft.config, "target_num_hidden_layers", None),
    )
    if len(layers) < 2:
        raise UnsupportedModelError(
            f"this draft reads one layer, {layers}; SGLang takes features of the hidden size for "
            "the draft's own state and skips fc: read two layers or more"
        )
    if num_layers is not None and layers[-1] >= num_layers - 1:
        raise UnsupportedModelError(
            f"this draft reads layers {layers} of {num_layers}; SGLang captures what goes into a "
            f"layer, so the output of the last one is out of its reach: read 0 to {num_layers - 2}"
        )


def _vocabulary(draft: Eagle3Draft) -> dict[str, Tensor]:
    ids = draft.target_ids
    if ids is None or draft.d2t is None:
        return {}
    check_target_ids(ids, draft.vocab_size)
    known = torch.zeros(draft.vocab_size, dtype=torch.bool, device=ids.device)
    known[ids] = True
    return {"d2t": draft.d2t, "t2d": known}


def _load_eagle(config: dict[str, Any], folder: str | Path, model: nn.Module) -> EagleDraft:
    _check_variant(config, folder)
    tensors = find_tensors(folder)
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bias = config.get("fc_bias", "fc.bias" in tensors)
    if not bias:
        tensors.pop("fc.bias", None)
    make = Qwen2Config if config["architectures"][0] == EAGLE[1] else LlamaConfig
    parts: Any = model
    draft = EagleDraft(
        make.from_dict(config),
        parts.get_input_embeddings(),
        parts.get_output_embeddings(),
        bias=bias,
    )
    _fill(draft, tensors, folder, model, ignore=(*BORROWED, "lm_head."))
    return draft


def _load_eagle3(config: dict[str, Any], folder: str | Path, model: nn.Module) -> Eagle3Draft:
    _check_variant(config, folder)
    num_layers = text_config(model).num_hidden_layers
    layers = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    layers = tuple(layers or default_feature_layers(num_layers))
    check_layers(layers, num_layers)
    tensors = {
        name.removeprefix("model.").replace("layers.0.", "midlayer."): tensor
        for name, tensor in find_tensors(folder).items()
    }
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    ids = None if d2t is None else d2t + torch.arange(len(d2t))
    size = config.get("draft_vocab_size")
    expected = config["vocab_size"] if ids is None else len(ids)
    if size is not None and size != expected:
        raise CheckpointError(
            f"{folder}: draft_vocab_size is {size}, but "
            + (
                f"d2t has {expected} entries"
                if ids is not None
                else f"there is no d2t, so it is the target's {expected}"
            )
        )
    parts: Any = model
    draft = Eagle3Draft(
        LlamaConfig.from_dict(config),
        parts.get_input_embeddings(),
        parts.get_output_embeddings(),
        feature_layers=layers,
        own_head=size is not None,
        target_ids=ids,
    )
    if t2d is not None and ids is not None:
        known = _vocabulary(draft)["t2d"]
        if t2d.dtype != torch.bool or not torch.equal(t2d, known):
            raise CheckpointError(
                f"{folder}: t2d ({t2d.dtype}, {int(t2d.sum())} entries set) does not say which of "
                f"the {draft.vocab_size} tokens d2t ({len(ids)} entries) maps to; expected both to "
                "be one draft's: export it again"
            )
    _fill(draft, tensors, folder, model, ignore=BORROWED)
    return draft


def _fill(
    draft: EagleDraft | Eagle3Draft,
    tensors: dict[str, Tensor],
    folder: str | Path,
    model: nn.Module,
    *,
    ignore: tuple[str, ...],
) -> None:
    draft.check_target(model)
    if "fc.weight" in tensors:
        weight: Any = draft.shared.embedding.weight
        draft.to(weight.device, tensors["fc.weight"].dtype)
    fill(draft.checkpoint_tensors(), tensors, folder, ignore=ignore)


def _check_variant(config: dict[str, Any], folder: str | Path) -> None:
    inner = config.get("eagle_config") or {}
    found = [name for name in VARIANTS if config.get(name) or inner.get(name)]
    if found or config.get("num_hidden_layers") != 1:
        raise UnsupportedModelError(
            f"{folder} is a draft with {', '.join(found) or 'no variant'} and "
            f"{config.get('num_hidden_layers')} layers; only one plain layer is implemented here"
        )
    if config.get("target_hidden_size", config["hidden_size"]) != config["hidden_size"]:
        raise UnsupportedModelError(
            f"{folder} is a draft of hidden size {config['hidden_size']} for a target of "
            f"{config['target_hidden_size']}; only drafts of the target's size are implemented here"
        )
