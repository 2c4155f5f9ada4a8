"""Names of weights: Hugging Face's, megatron-core's and SGLang's, each from each, bit for bit.

A model is one set of numbers under several namings. `name_map` takes the table of the config's
family and gives a `NameMap`, through which tensors stream in either direction. The namings:

- `hf`: a checkpoint, as `save_pretrained` writes it (experts one by one);
- `hf_module`: the `state_dict` of the transformers 5 module (experts stacked);
- `megatron`: a `GPTModel` of megatron-core 0.16.1 without tensor parallelism;
- `sglang`: the parameters inside SGLang 0.5.17 without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from miles.errors import DtypeError, SettingError, ShapeError, SyncError
from miles.sync._checksum import checksum
from miles.sync._name_rules import (
    MegatronNames,
    Model,
    NameRule,
    Naming,
    SGLangNames,
    Table,
    expand,
)
from miles.sync._name_tables import FAMILIES
from miles.sync._plan import at_once
from miles.sync._transforms import Concat, Copy, QueryGroups, Stack, Transform

__all__ = [
    "Concat",
    "Copy",
    "MegatronNames",
    "NameMap",
    "NameRule",
    "Naming",
    "QueryGroups",
    "SGLangNames",
    "Stack",
    "Transform",
    "families",
    "name_map",
]

_PASS_BY = ("_extra_state", "rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
_SHOWN = 8


class NameMap:
    """Rules between two namings; tensors stream through it either way.

    Nothing is held but the tensors of a rule that is not complete yet: as copies, where they come
    from a generator, which may fill their memory again. Tensors that need no rearranging come out
    as they went in, the same memory.

    Args:
        rules: each name of either side belongs to one of them.
        namings: what the two sides are called in messages.

    Raises:
        SettingError: a name in two rules.

    Example:
        >>> from miles.sync import NameMap, NameRule
        >>> names = NameMap([NameRule(("w",), ("weight",))])
        >>> [name for name, _ in names.forward([("w", torch.ones(2))])]
        ['weight']
        >>> [name for name, _ in names.backward([("weight", torch.ones(2))])]
        ['w']
    """

    def __init__(
        self, rules: Iterable[NameRule], *, namings: tuple[str, str] = ("source", "target")
    ) -> None:
        self._set([_Step(Table(tuple(rules), namings), flipped=False)])

    def _set(self, steps: Sequence[_Step]) -> None:
        self._steps = tuple(steps)

    @classmethod
    def _of(cls, steps: Sequence[_Step]) -> NameMap:
        made = cls.__new__(cls)
        made._set(steps)
        return made

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names that `forward` needs, in the order of the table."""
        return tuple(name for names in self._steps[0].inputs for name in names)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names that `backward` needs, in the order of the table."""
        return self.inverse().source_names

    def forward(
        self, tensors: Iterable[tuple[str, Tensor]], *, strict: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The source's tensors under the target's names, as soon as each is complete.

        Args:
            tensors: names and tensors of the source, each once, in any order. Layers and experts
                of other ranks, layers of multi-token prediction and `_extra_state` pass by.
            strict: False lets whole rules be absent. A rule that has some of its tensors and lacks
                others is an error all the same.

        Raises:
            SyncError: a tensor that is missing, unknown, there twice, or tied and not equal.
            ShapeError: a tensor whose shape is not the config's.
            DtypeError: tensors of several dtypes that are to be one.
        """
        together = at_once(tensors)
        for step in self._steps:
            tensors = step.run(tensors, strict, together)
        return iter(tensors)

    def backward(
        self, tensors: Iterable[tuple[str, Tensor]], *, strict: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The target's tensors under the source's names; see `forward`."""
        return self.inverse().forward(tensors, strict=strict)

    def inverse(self) -> NameMap:
        """The map the other way round."""
        return self._of([step.inverse() for step in reversed(self._steps)])

    def then(self, other: NameMap) -> NameMap:
        """This map and after it another, whose source is this one's target."""
        return self._of([*self._steps, *other._steps])

    def __repr__(self) -> str:
        namings = [self._steps[0].namings[0], *(step.namings[1] for step in self._steps)]
        return f"NameMap({' -> '.join(namings)}, {len(self.source_names)} source tensors)"


class _Step:
    """One table in one direction."""

    def __init__(self, table: Table, *, flipped: bool) -> None:
        self.table, self.flipped = table, flipped
        self.inputs = [rule.target if flipped else rule.source for rule in table.rules]
        self.namings = table.namings[::-1] if flipped else table.namings
        self.by_name: dict[str, int] = {}
        for side in ([rule.source for rule in table.rules], [rule.target for rule in table.rules]):
            seen: dict[str, int] = {}
            for i, names in enumerate(side):
                for name in names:
                    if seen.setdefault(name, i) != i or names.count(name) > 1:
                        raise SettingError(f"got {name} in two rules; expected it in one")
            if side == self.inputs:
                self.by_name = seen
        self.ties = table.ties[1 if flipped else 0]

    def inverse(self) -> _Step:
        return _Step(self.table, flipped=not self.flipped)

    def run(
        self, tensors: Iterable[tuple[str, Tensor]], strict: bool, together: bool
    ) -> Iterator[tuple[str, Tensor]]:
        waiting: dict[int, dict[str, Tensor]] = {}
        seen: set[str] = set()
        tied: dict[str, Any] = {}
        for name, tensor in tensors:
            if name in seen:
                raise SyncError(f"got {name} twice; expected each tensor once")
            seen.add(name)
            if self.ties:
                self._check_ties(name, tensor, tied, together)
            number = self.by_name.get(name)
            if number is None:
                self._check_known(name)
                continue
            parts = waiting.setdefault(number, {})
            parts[name] = tensor.detach()
            if len(parts) == len(self.inputs[number]):
                del waiting[number], tensor
                yield from self._apply(number, parts)
                del parts
            elif not together:
                parts[name] = parts[name].clone()
        self._check_complete(waiting, seen, strict)

    def _apply(self, number: int, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        rule, names = self.table.rules[number], self.inputs[number]
        convert: Callable[[Sequence[Tensor]], list[Tensor]] = (
            rule.transform.backward if self.flipped else rule.transform.forward
        )
        try:
            made = convert([parts[name] for name in names])
        except (ShapeError, DtypeError) as error:
            shown = ", ".join(f"{name} {tuple(parts[name].shape)}" for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise type(error)(f"{shown}{more}: {error}") from error
        targets = rule.source if self.flipped else rule.target
        for target, tensor in zip(targets, made, strict=True):
            yield target, tensor.contiguous()

    def _check_known(self, name: str) -> None:
        passes = name in self.ties or name.endswith(_PASS_BY)
        if not self.flipped:
            passes |= name in self.table.elsewhere
            passes |= bool(self.table.unused_prefixes) and name.startswith(
                self.table.unused_prefixes
            )
        if not passes:
            raise SyncError(
                f"got the unknown tensor {name}; expected the {len(self.by_name)} names of "
                f"{self.namings[0]!r}, such as {next(iter(self.by_name), None)!r}; compare the "
                "config and the options of `name_map` with the model"
            )

    def _check_ties(self, name: str, tensor: Tensor, tied: dict[str, Any], together: bool) -> None:
        """A tied weight that is not one would be lost without a word."""
        for alias, owner in self.ties.items():
            if name not in (alias, owner):
                continue
            other = tied.pop(owner, None)
            mine = tensor.detach() if together else _as_seen(tensor)
            if other is None:
                tied[owner] = mine
            elif not _equal(mine, other):
                raise SyncError(
                    f"{alias} differs from {owner}; expected equal values, since the config ties "
                    "them; set tie_word_embeddings=False if they are two weights"
                )

    def _check_complete(
        self, waiting: dict[int, dict[str, Tensor]], seen: set[str], strict: bool
    ) -> None:
        rules = range(len(self.inputs)) if strict else sorted(waiting)
        missing = [name for i in rules for name in self.inputs[i] if name not in seen]
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise SyncError(
                f"missing tensors {missing[:_SHOWN]}{more}; expected the {len(self.by_name)} names "
                f"of {self.namings[0]!r}; "
                + ("pass strict=False for a part" if strict else "pass whole rules")
            )


def _as_seen(tensor: Tensor) -> Any:
    """What tells a tensor's values when its memory holds others; an embedding is large to copy."""
    if type(tensor) in (Tensor, Parameter) and not tensor.is_meta:
        return tensor.dtype, tensor.shape, checksum(tensor)
    return tensor.detach().clone()


def _equal(mine: Any, other: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        return mine.dtype == other.dtype and torch.equal(mine, other)
    return bool(mine == other)


def families() -> tuple[str, ...]:
    """Every `model_type` that has a table.

    Example:
        >>> from miles.sync import families
        >>> "qwen3_moe" in families()
        True
    """
    return tuple(sorted(FAMILIES))


def name_map(
    config: Any,
    *,
    source: Naming = "hf",
    target: Naming = "megatron",
    layers: range | None = None,
    experts: range | None = None,
    megatron: MegatronNames | None = None,
    sglang: SGLangNames | None = None,
) -> NameMap:
    """The map between two namings of the model that a config describes.

    Args:
        config: of transformers; `model_type` chooses the table.
        source: the naming that `forward` takes: "hf", "hf_module", "megatron" or "sglang".
        target: the naming that it gives.
        layers: those of this rank's pipeline stage, which megatron-core counts from 0. The first
            stage has the embeddings, the last one the final norm and the head. It, and `experts`,
            speak of the target, and of a source that is "megatron"; any other source is whole.
        experts: those of this rank under expert parallelism, which engines count from 0.
        megatron: how the `GPTModel` was built.
        sglang: how SGLang holds it.

    Returns:
        A map of unsharded tensors: gather, or shard, those of tensor parallelism yourself.

    Raises:
        UnsupportedModelError: a family without a table; see `families`.
        SettingError: an option outside its range.

    Example:
        >>> from types import SimpleNamespace
        >>> from miles.sync import name_map
        >>> config = SimpleNamespace(
        ...     model_type="qwen2", num_hidden_layers=1, hidden_size=8, num_attention_heads=4,
        ...     num_key_value_heads=2, vocab_size=16, tie_word_embeddings=True)
        >>> names = name_map(config, target="megatron")
        >>> names
        NameMap(hf -> megatron, 14 source tensors)
        >>> qkv = [(f"model.layers.0.self_attn.{x}_proj.bias", torch.zeros(rows))
        ...        for x, rows in (("q", 8), ("k", 4), ("v", 4))]
        >>> [(name, len(bias)) for name, bias in names.forward(qkv, strict=False)]
        [('decoder.layers.0.self_attention.linear_qkv.bias', 16)]
    """
    for naming in (source, target):
        if naming not in get_args(Naming):
            raise SettingError(f"got naming {naming!r}; expected one of {get_args(Naming)}")
    if source == target:
        raise SettingError(f"got {source!r} as source and target; expected two namings")
    of_megatron, of_sglang = megatron or MegatronNames(), sglang or SGLangNames()
    _check_experts(of_megatron)
    part = Model(config, layers, experts)
    whole = part if source == "megatron" else Model(config, None, None)
    steps = []
    if source != "hf":
        steps.append(_Step(expand(whole, source, of_megatron, of_sglang), flipped=True))
    if target != "hf":
        steps.append(_Step(expand(part, target, of_megatron, of_sglang), flipped=False))
    return NameMap._of(steps)


def _check_experts(names: MegatronNames) -> None:
    expected = ("sequential", "te_grouped", "grouped")
    if names.experts not in expected:
        raise SettingError(f"got experts={names.experts!r}; expected one of {expected}")
