"""From the rows of a family's table to the rules of one model, or of the part one rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from miles.errors import SettingError, UnsupportedModelError
from miles.sync._name_tables import FAMILIES, Family, Row
from miles.sync._transforms import (
    Concat,
    Copy,
    Grouped,
    Interleaved,
    PadRows,
    QueryGroups,
    Stack,
    Then,
    Transform,
    Transpose,
    Unstack,
)

__all__ = ["MegatronNames", "Model", "NameRule", "Naming", "SGLangNames", "Table", "expand"]

Naming = Literal["hf", "hf_module", "megatron", "sglang"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED_HEADS: dict[Naming, tuple[str, str]] = {
    "hf": (HEAD, EMBEDDING),
    "hf_module": (HEAD, EMBEDDING),
    "sglang": (HEAD, EMBEDDING),
    "megatron": ("output_layer.weight", "embedding.word_embeddings.weight"),
}


@dataclass(frozen=True)
class NameRule:
    """Tensors of one naming that become tensors of the other.

    Example:
        >>> from miles.sync import NameMap, NameRule
        >>> from miles.sync.names import Concat
        >>> fused = NameMap([NameRule(("gate", "up"), ("gate_up",), Concat())])
        >>> {k: t.tolist() for k, t in fused.forward([("up", torch.ones(1)),
        ...                                           ("gate", torch.zeros(1))])}
        {'gate_up': [0.0, 1.0]}
    """

    source: tuple[str, ...]
    """In the order the transform takes them."""
    target: tuple[str, ...]
    """In the order the transform gives them."""
    transform: Transform = field(default_factory=Copy)
    """Anything with `forward` and `backward` from a list of tensors to a list of tensors."""


@dataclass(frozen=True, kw_only=True)
class MegatronNames:
    """How a `GPTModel` of megatron-core was built."""

    fused_layernorm: bool = False
    """Transformer Engine's spec, whose linear layers hold the norm before them."""
    experts: Literal["sequential", "te_grouped", "grouped"] = "sequential"
    """`SequentialMLP`, `TEGroupedMLP` (`linear_fc1.weight0`) or `GroupedMLP` (`weight1`)."""
    padded_vocab_size: int | None = None
    """Rows of its embeddings; None: the config's `vocab_size`."""


@dataclass(frozen=True, kw_only=True)
class SGLangNames:
    """How SGLang holds a model."""

    padded_vocab_size: int | None = None
    """Rows of its embeddings, which it pads to a multiple of 64; None: `vocab_size`."""
    fused_shared_experts: bool = False
    """DeepSeek and GLM: the shared expert is the last of the others, SGLang's default on CUDA."""


@dataclass(frozen=True)
class Table:
    """The rules from a checkpoint's names to one other naming."""

    rules: tuple[NameRule, ...]
    namings: tuple[str, str]
    """What the two sides are called, for messages."""
    elsewhere: frozenset[str] = frozenset()
    """Source names of layers and experts that another rank holds; they pass by."""
    unused_prefixes: tuple[str, ...] = ()
    """Source names that pass by: layers of multi-token prediction."""
    ties: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    """For each side: a name that may come but is only another name for the second."""


class Model:
    """What the rules need to know of a config, and the part of the model that a rank holds.

    Raises:
        UnsupportedModelError: a `model_type` without a table.
        SettingError: layers or experts that the model doesn't have.
    """

    def __init__(self, config: Any, layers: range | None, experts: range | None) -> None:
        kind = getattr(config, "model_type", None)
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"got a config of model_type {kind!r}; expected one of {sorted(FAMILIES)}; write "
                "a NameMap of your own rules"
            )
        self.config = config
        self.family: Family = FAMILIES[kind]
        self.num_layers: int = config.num_hidden_layers
        self.num_experts: int = getattr(config, self.family.num_experts, None) or 0
        self.tied = bool(config.tie_word_embeddings)
        self.layers = _part("layers", layers, self.num_layers)
        self.experts = _part("experts", experts, self.num_experts)
        self.is_first = self.layers.start == 0
        self.is_last = self.layers.stop == self.num_layers

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, and their size."""
        config, num_heads = self.config, self.config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return num_heads, config.num_key_value_heads or num_heads, head_dim

    def layers_of(self, row: Row) -> Iterator[int | None]:
        """The layers that have a row's tensors; None for one that is outside all layers."""
        if row.where in ("first", "last"):
            yield None
            return
        for layer in range(self.num_layers):
            if row.where == "layer" or self.family.is_sparse(self.config, layer) == (
                row.where == "moe"
            ):
                yield layer

    def holds(self, row: Row, layer: int | None) -> bool:
        """Whether this rank has the tensors of a row in a layer."""
        if layer is None:
            return self.is_first if row.where == "first" else self.is_last
        return layer in self.layers

    def hf_names(self, row: Row, layer: int | None, experts: range) -> list[str]:
        """Names on disk, those of expert 0 first."""
        names = row.hf if layer is None else tuple(f"model.layers.{layer}.{n}" for n in row.hf)
        if "{expert}" not in row.hf[0]:
            return list(names)
        return [name.replace("{expert}", str(e)) for e in experts for name in names]


def _part(what: str, part: range | None, size: int) -> range:
    whole = range(size)
    if part is None:
        return whole
    if part.step != 1 or not 0 <= part.start <= part.stop <= size:
        raise SettingError(f"got {what}={part}; expected a part of {whole}, without gaps")
    return part


def expand(model: Model, naming: Naming, megatron: MegatronNames, sglang: SGLangNames) -> Table:
    """The rules from a checkpoint's names to `naming`.

    Raises:
        UnsupportedModelError: a naming under which the same numbers would mean something else.
    """
    if naming == "megatron" and getattr(model.config, "rope_interleave", True) is False:
        raise UnsupportedModelError(
            "got rope_interleave=False; expected True, the only order of rotary dimensions that "
            "latent attention of megatron-core has; permute those of q_b and kv_a first"
        )
    builder = _Builder(model, naming, megatron, sglang)
    rules, elsewhere = [], set[str]()
    for row in model.family.rows(model.config):
        if model.tied and row.hf == (HEAD,):
            continue
        for layer in model.layers_of(row):
            elsewhere.update(model.hf_names(row, layer, range(model.num_experts)))
            if model.holds(row, layer):
                rules += builder.rules(row, layer)
    if model.tied and model.is_last and not model.is_first and naming in ("megatron", "sglang"):
        # The last stage of a pipeline has a copy of the embeddings of its own.
        rules.append(NameRule((EMBEDDING,), (TIED_HEADS[naming][0],), builder.vocab()))
    mtp = getattr(model.config, "num_nextn_predict_layers", None) or 0
    used = {name for rule in rules for name in rule.source}
    alias, owner = TIED_HEADS[naming]
    return Table(
        tuple(rules),
        ("hf", naming),
        frozenset(elsewhere - used),
        tuple(f"model.layers.{model.num_layers + i}." for i in range(mtp)),
        ({HEAD: EMBEDDING}, {alias: owner}) if model.tied else ({}, {}),
    )


@dataclass(frozen=True)
class _Builder:
    """Rules of a row under one naming."""

    model: Model
    naming: Naming
    megatron: MegatronNames
    sglang: SGLangNames

    def rules(self, row: Row, layer: int | None) -> list[NameRule]:
        """Those of one layer, for the experts of this rank."""
        sources = self.model.hf_names(row, layer, self.model.experts)
        targets = self._targets(row, layer)
        if row.kind in ("turns", "turned", "stacked") and self.naming != "hf_module":
            return self._fused_experts(row, sources, targets[0])
        if "{expert}" in row.hf[0]:
            return self._experts(row, sources + self._fused_shared(row, layer), targets[0])
        if self.fuses_shared and row.hf[0].startswith("mlp.shared_experts."):
            return []
        if len(sources) == len(targets) and row.kind != "vocab":
            return [NameRule((a,), (b,)) for a, b in zip(sources, targets, strict=True)]
        return [NameRule(tuple(sources), tuple(targets), self._transform(row))]

    @property
    def fuses_shared(self) -> bool:
        """Whether the shared expert is one of the experts."""
        return self.naming == "sglang" and self.sglang.fused_shared_experts

    def _fused_shared(self, row: Row, layer: int | None) -> list[str]:
        """The shared expert's names on disk, if it comes after the others."""
        if not self.fuses_shared:
            return []
        num = getattr(self.model.config, "n_shared_experts", None)
        if num != 1 or len(self.model.experts) != self.model.num_experts:
            raise SettingError(
                f"got fused_shared_experts=True for {num} shared experts and "
                f"experts={self.model.experts}; expected one shared expert and all others, as in "
                "DeepSeek-V3 and GLM-4.5 without expert parallelism"
            )
        names = (name.replace("experts.{expert}", "shared_experts") for name in row.hf)
        return [f"model.layers.{layer}.{name}" for name in names]

    def vocab(self) -> Transform:
        """Of embeddings."""
        rows = self.model.config.vocab_size
        if self.naming == "hf_module":
            return Copy()
        names = self.megatron if self.naming == "megatron" else self.sglang
        padded = names.padded_vocab_size or rows
        if padded < rows:
            raise SettingError(
                f"got padded_vocab_size={padded}; expected vocab_size={rows} at the least"
            )
        return PadRows(rows, padded)

    def _targets(self, row: Row, layer: int | None) -> list[str]:
        names = row.hf
        if self.naming == "sglang":
            names = row.sglang or row.hf
        elif self.naming == "hf_module":
            names = (row.module,) if row.module else row.hf
        else:
            names = row.te if row.te and self.megatron.fused_layernorm else row.megatron
            if layer is not None:
                local = layer - self.model.layers.start
                return [f"decoder.layers.{local}.{name}" for name in names]
        return list(names) if layer is None else [f"model.layers.{layer}.{n}" for n in names]

    def _transform(self, row: Row) -> Transform:
        if row.kind == "vocab":
            return self.vocab()
        if row.kind == "gate_up":
            return Concat()
        if row.kind == "qkv_a":
            config = self.model.config
            return Concat((config.q_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim))
        assert row.kind == "qkv"
        num_heads, num_groups, head_dim = self.model.heads
        if self.naming == "megatron":
            return QueryGroups(num_heads, num_groups, head_dim)
        rows = num_groups * head_dim
        return Concat((num_heads * head_dim, rows, rows))

    def _experts(self, row: Row, sources: list[str], target: str) -> list[NameRule]:
        """Of experts that are saved one by one."""
        each: Transform = Concat() if row.kind == "gate_up" else Copy()
        width = len(row.hf)
        num = len(sources) // width
        if not num:
            return []
        whole = Stack(each, num)
        if self.naming != "megatron":
            return [NameRule(tuple(sources), (target,), whole)]
        if self.megatron.experts == "grouped":
            flat = Grouped(num, row.kind == "gate_up")
            name = target.replace("linear_fc1.weight", "weight1")
            name = name.replace("linear_fc2.weight", "weight2")
            return [NameRule(tuple(sources), (name,), Then(whole, flat))]
        return [
            NameRule(tuple(sources[i * width : (i + 1) * width]), (self._local(target, i),), each)
            for i in range(num)
        ]

    def _fused_experts(self, row: Row, sources: list[str], target: str) -> list[NameRule]:
        """Of experts that are saved in one tensor."""
        num = len(self.model.experts)
        each: Transform = Copy()
        if not num:
            return []
        if row.kind == "turned" or (row.kind == "turns" and not row.hf[0].endswith("_bias")):
            each = Transpose()
        if self.naming == "megatron" and row.kind == "turns":
            each = Interleaved()
        alone = Unstack(each, self.model.num_experts, self.model.experts)
        if self.naming == "sglang":
            return [NameRule(tuple(sources), (target,), Then(alone, Stack(Copy(), num)))]
        if self.megatron.experts == "grouped":
            raise SettingError(
                "got experts='grouped' for gpt_oss; expected 'sequential' or 'te_grouped': "
                "GroupedMLP of megatron-core has no biases"
            )
        return [NameRule(tuple(sources), tuple(self._local(target, i) for i in range(num)), alone)]

    def _local(self, target: str, expert: int) -> str:
        """The parameter of an expert, by its number on this rank."""
        if self.megatron.experts == "te_grouped":
            return f"{target}{expert}"
        return target.replace("mlp.experts.", f"mlp.experts.local_experts.{expert}.")
