"""Every preset as a function of one micro-batch, for the tests of splits and of ranks.

Denominators that were counted with a `keep_T` mean `count_rejected=False`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from miles import Denominators, Packed, count
from miles.losses import presets
from tests.steps import Step

Runner = Callable[[Tensor, Step, Denominators, Denominators, Any], tuple[Tensor, Any]]


def right_T(packed: Packed) -> Tensor:
    """Answers of every other group are right."""
    return packed.per_token(packed.group_ids_S % 4 == 0) & packed.mask_T


def count_right(parts: list[Packed], **group: Any) -> Denominators:
    return count(parts, keep_T=[right_T(packed) for packed in parts], **group)


def _plain(name: str, **settings: Any) -> Runner:
    def run(new_T, part, denominators, _, correction):
        return getattr(presets, name)(
            new_T, part.old_T, part.advantages_T, part.packed, denominators,
            correction=correction, count_rejected=not denominators.counted_keep, **settings,
        )  # fmt: skip

    return run


def _with_reference(name: str) -> Runner:
    def run(new_T, part, *rest):
        return _plain(name, ref_logprobs_T=part.ref_T, kl_coef=0.1)(new_T, part, *rest)

    return run


def _ppo(new_T, part, denominators, _, correction):
    return presets.ppo(
        new_T, part.old_T, part.advantages_T, part.packed, denominators, correction=correction,
        values_T=new_T, old_values_T=part.old_T, returns_T=part.ref_T, dual_clip=3.0,
        count_rejected=not denominators.counted_keep,
    )  # fmt: skip


def _vapo(new_T, part, denominators, right, correction):
    return presets.vapo(
        new_T, part.old_T, part.advantages_T, part.packed, denominators, correction=correction,
        right_S=part.packed.group_ids_S % 4 == 0, right_denominators=right,
        count_rejected=not denominators.counted_keep,
    )  # fmt: skip


def _rloo(new_T, part, denominators, _, correction):
    return presets.rloo(
        new_T, part.advantages_T, part.packed, denominators, correction=correction,
        count_rejected=not denominators.counted_keep,
    )  # fmt: skip


def _distillation(new_T, part, denominators, _, correction):
    return presets.on_policy_distillation(
        new_T, part.ref_T, part.packed, denominators, correction=correction,
        count_rejected=not denominators.counted_keep,
    )  # fmt: skip


RUNNERS: dict[str, Runner] = {
    "grpo": _with_reference("grpo"),
    "dr_grpo": _plain("dr_grpo", max_tokens=6),
    "dapo": _plain("dapo"),
    "gspo": _plain("gspo"),
    "gspo_token": _plain("gspo_token"),
    "cispo": _plain("cispo"),
    "sapo": _plain("sapo"),
    "gmpo": _plain("gmpo"),
    "rloo": _rloo,
    "reinforce_plus_plus": _plain("reinforce_plus_plus"),
    "reinforce_plus_plus_baseline": _with_reference("reinforce_plus_plus_baseline"),
    "ppo": _ppo,
    "vapo": _vapo,
    "on_policy_distillation": _distillation,
    "decoupled_ppo": _plain("decoupled_ppo"),
}
