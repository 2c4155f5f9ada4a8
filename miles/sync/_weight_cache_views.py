"""The trainer's parameters inside the engine's: rows of `qkv_proj`, of `gate_up_proj`, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from miles.errors import SyncError, UnsupportedModelError
from miles.sync._name_rules import EMBEDDING, HEAD, MegatronNames, Model, SGLangNames, expand

__all__ = ["FAMILIES", "engine_views"]

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Those whose parameters SGLang computes with as they are, and makes nothing else of after loading.
Latent attention is not among them (`w_kc` and `w_vc` are copies of `kv_b_proj`), nor are gpt-oss
(experts are turned) and GLM (the shared expert becomes one of the others)."""


def engine_views(config: Any, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of the engine's parameters under the names of a transformers module.

    Args:
        config: the model's, of transformers.
        held: all of the engine's parameters, by SGLang's names, without tensor parallelism.

    Returns:
        Names of `named_parameters()` to views; of tied embeddings the first name only.

    Raises:
        UnsupportedModelError: a family where views are not enough.
        SyncError: names that the config does not have, or has and the engine doesn't.
        ShapeError: a size that is not the config's.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"got a config of model_type {kind!r}; expected one of {', '.join(FAMILIES)}: others "
            "are not held by SGLang as a trainer holds them; use SGLangSyncer"
        )
    model, left, views = Model(config, None, None), dict(held), dict[str, Tensor]()
    rows = len(held[EMBEDDING]) if EMBEDDING in held else config.vocab_size
    names = SGLangNames(padded_vocab_size=max(rows, config.vocab_size))
    in_engine = expand(model, "sglang", MegatronNames(), names).rules
    in_module = expand(model, "hf_module", MegatronNames(), names).rules
    twins = {rule.source: rule for rule in in_module}
    missing = []
    for rule in in_engine:
        (name,) = rule.target
        if name not in left:
            missing.append(name)
            continue
        whole = left.pop(name)
        twin = twins.get(rule.source)
        if twin is not None and twin.transform == rule.transform:  # experts: one tensor for both
            views[twin.target[0]] = whole
            continue
        for part_name, part in zip(rule.source, rule.transform.backward([whole]), strict=True):
            _check_view(part_name, part, whole)
            views[part_name] = part
    if model.tied and HEAD in left:
        _check_tied(left.pop(HEAD), held[EMBEDDING])
    if missing or left:
        raise SyncError(
            f"the daemon holds no {missing[:8]}, and {sorted(left)[:8]} that the config has no "
            "name for; expected the parameters of one model: compare the config with the "
            "daemon's --model-path"
        )
    return views


def _check_view(name: str, part: Tensor, whole: Tensor) -> None:
    same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if not same or not part.is_contiguous():
        raise UnsupportedModelError(
            f"{name} is not made of whole rows of the engine's tensor; use SGLangSyncer"
        )


def _check_tied(head: Tensor, embedding: Tensor) -> None:
    if head.data_ptr() != embedding.data_ptr() or head.shape != embedding.shape:
        raise UnsupportedModelError(
            f"the config ties {HEAD} to {EMBEDDING}, and the engine holds them apart, so that one "
            "write would not reach both; use SGLangSyncer"
        )
