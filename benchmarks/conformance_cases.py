"""The cases of `conformance.py`: one function a stage, without the policy losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rivals import Trl, Verl
from torch import Tensor

Batch = SimpleNamespace
ROWS = 12
SPLITS = 3
VERL, TRL = Verl(), Trl()
VERSIONS = f"{VERL.name}'s and {TRL.name}'s"
ALGOS, CORR = VERL.algos, VERL.corrections
EPS = "Theirs adds 1e-8 to counts."


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of ours beside one call of theirs."""

    name: str
    ours: str
    """Evaluated with `names`; a loss, or one number a token or sequence."""
    theirs: str
    """The setting, as text."""
    run: Callable[[Batch], Tensor]
    """Theirs; `[B, L]`, `[B]` or a loss."""
    batch: str = "usual"
    """A key of `batches`."""
    differs: str = ""
    """value, gradient or both; what is not named is equal."""
    tolerance: float = 1e-12
    """Relative, of what is equal."""
    remark: str = ""
    leaf: str = "new"
    """Differentiated by this tensor of the batch."""
    split: str = ""
    """For a loss: "same" or "differs" says what theirs does when the step is split up."""


def text(library: str, names: dict[str, str], settings: dict[str, Any]) -> str:
    return f"{library} `" + ", ".join(f"{names.get(k, k)}={v}" for k, v in settings.items()) + "`"


def final_rewards(b: Batch) -> Tensor:
    """`[B, L]`: each reward at the last trainable token."""
    last = (torch.arange(b.mask.shape[1]) * b.mask).argmax(1)
    return torch.zeros(b.mask.shape, dtype=b.r.dtype).scatter(1, last[:, None], b.r[:, None])


def estimator(name: str, **settings: Any) -> Callable[[Batch], Tensor]:
    """An outcome advantage estimator of verl's."""
    function = getattr(ALGOS, f"compute_{name}_outcome_advantage")
    return lambda b: function(
        final_rewards(b), b.mask.to(b.r.dtype), index=b.g.numpy(), **settings
    )[0]


def gdpo(b: Batch) -> Tensor:
    prompts = torch.ones(len(b.r), 2)
    return ALGOS.compute_gdpo_outcome_advantage(
        final_rewards(b), b.mask.double(), b.g.numpy(),
        config={"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 1.0]},
        non_tensor_batch={"a": b.R[:, 0].numpy(), "b": b.R[:, 1].numpy()},
        batch={"prompts": prompts, "attention_mask": torch.cat([prompts, b.attention], 1).long()},
    )[0]  # fmt: skip


def group_cases() -> list[Case]:
    none, dr = 'group_advantages(r, g, scale="none")', {"norm_adv_by_std_in_grpo": False}
    grpo, single = "group_advantages(r, g)", 'group_advantages(r, g, singleton="raw")'
    loo = 'group_advantages(r, g, baseline="leave_one_out", scale="none")'
    two = 'group_advantages(r, g, baseline="max_two")'
    opo = 'group_advantages(r, g, baseline="length_weighted", scale="none", lengths_S=lengths)'
    multi = 'multi_reward_advantages(R, g, final="none")'
    narrow = "Theirs is float32 inside."
    adv = "verl `adv_estimator="

    def case(name: str, ours: str, theirs: str, run: Any, **more: Any) -> Case:
        return Case(name=name, ours=ours, theirs=f"{adv}{theirs}`", run=run, **more)

    fast = estimator("grpo_vectorized")

    def rpp(b: Batch) -> Any:
        return ALGOS.compute_reinforce_plus_plus_outcome_advantage(
            final_rewards(b), b.mask.double(), config=Batch(gamma=0.9)
        )

    return [
        case("GRPO", grpo, "grpo", estimator("grpo")),
        case("GRPO", grpo, "grpo_vectorized", fast, tolerance=1e-5, remark=narrow),
        case("Dr. GRPO", none, "grpo, norm_adv_by_std_in_grpo=False", estimator("grpo", **dr)),
        case("RLOO", loo, "rloo", estimator("rloo")),
        case("RLOO", loo, "rloo_vectorized", estimator("rloo_vectorized")),
        case("OPO", opo, "opo", estimator("opo")),
        case("pass@k, best two", two, "grpo_passk", estimator("grpo_passk", config={})),
        case("pass@k, best two", two.replace(")", ', scale="none")'),
             "grpo_passk, norm_adv_by_std_in_grpo=False", estimator("grpo_passk", config=dr)),
        case("GPG", none, "gpg", estimator("gpg")),
        case("GPG", none, "gpg", estimator("gpg"), batch="binary rewards", differs="value",
             remark="Theirs multiplies by samples over samples of non-zero reward."),
        case("GPG", none + " * len(r) / r.count_nonzero()", "gpg", estimator("gpg"),
             batch="binary rewards", tolerance=1e-6, remark="Their factor is float32."),
        case("REINFORCE++, returns", "discounted_returns(final, packed, gamma=0.9)",
             "reinforce_plus_plus, gamma=0.9", lambda b: rpp(b)[1]),
        case("REINFORCE++", "whiten(discounted_returns(final, packed, gamma=0.9), packed.mask_T)",
             "reinforce_plus_plus, gamma=0.9", lambda b: rpp(b)[0], tolerance=1e-8, remark=EPS),
        case("REINFORCE++-baseline", f"whiten(packed.per_token({none}), packed.mask_T)",
             "reinforce_plus_plus_baseline", estimator("reinforce_plus_plus_baseline"),
             tolerance=1e-8, remark=EPS),
        case("GDPO", "multi_reward_advantages(R, g)", "gdpo", gdpo, differs="value",
             remark="Theirs whitens over tokens, so long answers count more; the paper, and ours, "
             "over responses."),
        case("GDPO", f"whiten(packed.per_token({multi}), packed.mask_T)", "gdpo", gdpo,
             tolerance=1e-5, remark=narrow),
        case("GRPO", grpo, "grpo", estimator("grpo"), batch="one sample", differs="value",
             remark="Ours is 0, theirs the raw reward."),
        case("GRPO", single, "grpo", estimator("grpo"), batch="one sample", tolerance=1e-5,
             remark="Theirs divides by 1 + 1e-6."),
        case("RLOO", loo, "rloo", estimator("rloo"), batch="one sample", differs="value",
             remark="Ours is 0, theirs the raw reward; `singleton=\"raw\"` gives theirs."),
        case("RLOO", loo, "rloo_vectorized", estimator("rloo_vectorized"), batch="one sample",
             remark="0 in both: verl's two functions disagree."),
        case("GRPO", grpo, "grpo", estimator("grpo"), batch="eight of 0.3", differs="value",
             remark="float32. Ours is 0, theirs 0.0289: rounding of the mean, divided by 1e-6."),
    ]  # fmt: skip


def gae_cases() -> list[Case]:
    def theirs(b: Batch) -> tuple[Tensor, Tensor]:
        return ALGOS.compute_gae_advantage_return(b.rewards, b.v, b.mask.double(), 0.99, 0.95)

    ours, name = "gae(rewards, v, packed, gamma=0.99, lam=0.95)", "verl `adv_estimator=gae`"
    alone = "Theirs always whitens."
    return [
        Case(name="GAE, returns", ours=f"{ours}[1]", theirs=name, run=lambda b: theirs(b)[1]),
        Case(name="GAE, advantages", ours=f"whiten({ours}[0], packed.mask_T)", theirs=name,
             run=lambda b: theirs(b)[0], tolerance=1e-8, remark=EPS),
        Case(name="GAE, advantages", ours=f"{ours}[0]", theirs=name, differs="value",
             run=lambda b: theirs(b)[0], remark=alone),
    ]  # fmt: skip


def kl_cases() -> list[Case]:
    def case(ours: str, theirs: str, **more: Any) -> Case:
        return Case(
            name="KL", ours=f"kl_penalty(new, ref, packed, {ours})", theirs=f"verl `{theirs}`",
            run=lambda b: ALGOS.kl_penalty(b.new, b.ref, theirs), **more,
        )  # fmt: skip

    k3 = 'value="k3"'
    return [
        case('value="k1"', "k1"),
        case('value="k2"', "k2"),
        case(k3, "k3"),
        case('value="abs"', "abs"),
        case('value="k1", grad="reverse_kl"', "k1+"),
        case(f'{k3}, grad="reverse_kl"', "k3+"),
        case('value="abs", grad="reverse_kl"', "abs+"),
        case(k3, "k3+", differs="gradient", remark="`k3+` has the gradient of k2."),
        case(k3, "k3", batch="a token with d = -3", differs="both",
             remark="Theirs caps k3 at 10, where its gradient ends."),
    ]  # fmt: skip


def correction_cases() -> list[Case]:
    def weights(name: str, ours: str, **settings: Any) -> Case:
        fields = {k: settings.pop(k) for k in list(settings) if k in Case.__dataclass_fields__}
        settings = {"rollout_is": "token"} | settings
        return Case(
            name=name, ours=f"{ours}.weights_T", theirs=text("verl", {}, settings), **fields,
            run=lambda b: CORR.compute_rollout_correction_weights(
                b.old - b.rollout, b.mask.double(), **settings
            )[0],
        )  # fmt: skip

    def rejection(option: str, threshold: str, rule: str, **more: Any) -> Case:
        settings = {"rollout_rs": option, "rollout_rs_threshold": threshold}
        ours = f"importance_weights(old, rollout, packed, weight=None, reject=[Reject({rule})])"
        return Case(
            name="rejection", ours=f"{ours}.keep_T.double()", theirs=text("verl", {}, settings),
            run=lambda b: CORR.compute_rollout_rejection_mask(
                b.old - b.rollout, b.mask.double(), **settings
            )[0], **more,
        )  # fmt: skip

    def general(level: str, high: float, more: str = "") -> str:
        weight = f'Weight(level="{level}", mode="truncate", high={high})'
        return f"importance_weights(old, rollout, packed, weight={weight}{more})"

    bounds, norm = "low=log(0.5), high=log(3.0)", ', normalize="mean"'
    batch_norm = {"rollout_is_batch_normalize": True}
    pop = (
        'importance_weights(old, rollout, packed, weight=Weight(level="token", mode="mask", '
        f"low=0.5, high=2.0){norm})"
    )
    return [
        weights("TIS", "truncated_is(old, rollout, packed)", rollout_is_threshold=2.0),
        weights("TIS, sequence", general("sequence_sum", 2.0), rollout_is="sequence",
                rollout_is_threshold=2.0),
        weights("TIS, sequence", general("sequence_mean", 2.0), rollout_is="sequence",
                rollout_is_threshold=2.0, differs="value",
                remark="Theirs is the product of the ratios; it has no geometric mean."),
        weights("IcePop", "icepop(old, rollout, packed)", rollout_is_threshold="0.5_5.0"),
        weights("MIS, sequence", 'masked_is(old, rollout, packed, level="sequence_sum")',
                rollout_is="sequence", rollout_is_threshold="0.5_2.0"),
        weights("batch-normalised", general("token", 1e3, norm), rollout_is_threshold=1e3,
                **batch_norm, tolerance=1e-8, remark=EPS),
        weights("batch-normalised, sequence", general("sequence_sum", 1e6, norm),
                rollout_is="sequence", rollout_is_threshold=1e6, **batch_norm, tolerance=1e-8,
                remark=EPS),
        weights("batch-normalised", general("token", 1.0, norm), rollout_is_threshold=1.0,
                **batch_norm, differs="value",
                remark="Ours caps again after the division, so no weight is above the bound."),
        weights("batch-normalised IcePop", pop, rollout_is_threshold="0.5_2.0", **batch_norm,
                differs="value", remark="Theirs counts rejected tokens, as zeros, in the mean; "
                "ours does not."),
        rejection("token_k1", "0.5_3.0", f'level="token", statistic="k1", {bounds}'),
        rejection("token_k1", "0.5_3.0", 'level="token", statistic="ratio", low=0.5, high=3.0',
                  differs="value", remark="Their bounds of k1 are those of rollout / trainer, the "
                  "inverse of our ratio."),
        rejection("token_k1", "0.5_3.0",
                  'level="token", statistic="ratio", low=1 / 3.0, high=1 / 0.5'),
        rejection("token_k2", "0.1", 'level="token", statistic="k2", high=0.1'),
        rejection("token_k3", "0.1", 'level="token", statistic="k3", high=0.1'),
        rejection("seq_sum_k1", "0.5_3.0", f'level="sequence_sum", statistic="k1", {bounds}'),
        rejection("seq_mean_k1", "0.9_1.1", 'level="sequence_mean", statistic="k1", low=log(0.9), '
                  "high=log(1.1)"),
        rejection("seq_mean_k3", "0.06", 'level="sequence_mean", statistic="k3", high=0.06'),
        rejection("seq_max_k2", "0.3", 'level="sequence_max", statistic="k2", high=0.3'),
        rejection("seq_max_k3", "0.3", 'level="sequence_max", statistic="k3", high=0.3'),
    ]  # fmt: skip


def value_cases() -> list[Case]:
    def theirs(clip: float, mode: str) -> Callable[[Batch], Tensor]:
        return lambda b: ALGOS.compute_value_loss(
            b.v, b.returns, b.v_old, b.mask.double(), clip, mode,
            batch_num_tokens=int(b.n.num_tokens), global_batch_size=ROWS,
        )[0]  # fmt: skip

    ours = "aggregate(value_loss(v, v_old, returns, packed), packed, n"
    return [
        Case(name="value loss", ours=f"{ours})", run=theirs(0.2, "token-mean"), leaf="v",
             theirs="verl `cliprange_value=0.2`", split="same"),
        Case(name="value loss", ours=f"{ours})", run=theirs(0.5, "token-mean"), leaf="v",
             theirs="verl `cliprange_value=0.5`", differs="both",
             remark="The clip is 0.2 by our default, 0.5 by their critic's config."),
        Case(name="value loss", ours=f'{ours}, mode="seq_mean_token_mean")', leaf="v",
             run=theirs(0.2, "seq-mean-token-mean"), tolerance=1e-8, remark=EPS,
             theirs="verl `cliprange_value=0.2, loss_agg_mode=seq-mean-token-mean`", split="same"),
    ]  # fmt: skip


STAGES = {
    "Advantages of groups": group_cases(),
    "GAE": gae_cases(),
    "KL penalties": kl_cases(),
    "Corrections": correction_cases(),
    "Value loss": value_cases(),
}
