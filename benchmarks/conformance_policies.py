"""The cases of `conformance.py` for policy losses."""

from __future__ import annotations

from typing import Any

import torch
from conformance_cases import CORR, EPS, ROWS, SPLITS, TRL, VERL, Batch, Case, text
from torch import Tensor

VERL_NAMES = {"loss": "loss_mode", "mode": "loss_agg_mode", "low": "clip_ratio_low",
              "high": "clip_ratio_high", "dual_clip": "clip_ratio_c",
              "kl_coef": "kl_loss_coef"}  # fmt: skip
TRL_NAMES = {"loss": "loss_type", "level": "importance_sampling_level", "low": "epsilon",
             "high": "epsilon_high", "kl_coef": "beta", "off_policy": "off_policy_mask_threshold",
             "bias_correction": "use_bias_correction_kl"}  # fmt: skip


def verl(name: str, ours: str, *, advantages: str = "A", **more: Any) -> Case:
    """A case of verl's policy losses; what is no field of `Case` is a setting of verl."""
    fields = {k: more.pop(k) for k in list(more) if k in Case.__dataclass_fields__}
    is_names = ("rollout_is", "rollout_is_threshold")
    is_settings = {k: more[k] for k in is_names if k in more}
    reject = {k: v for k, v in more.items() if k.startswith("rollout_rs")}
    loss = {k: v for k, v in more.items() if k not in (is_settings | reject)}

    def run(b: Batch) -> Tensor:
        mask, weights, gap = b.mask.double(), None, b.old - b.rollout
        num_tokens = int(b.n.num_tokens)
        if is_settings:
            weights = CORR.compute_rollout_correction_weights(gap, mask, **is_settings)[0]
        if reject:
            mask = CORR.compute_rollout_rejection_mask(gap, mask, **reject)[0]
            num_tokens = int(mask.sum())
        ref = b.ref if "kl_coef" in loss else None
        whole = {"ref": ref, "num_tokens": num_tokens, "num_seqs": ROWS}
        rest = {"dual_clip": 3.0} | loss | whole
        return VERL.policy_loss(b.new, b.old, getattr(b, advantages), mask, weights=weights, **rest)

    return Case(name=name, ours=ours, theirs=text("verl", VERL_NAMES, more), run=run, **fields)


def trl(name: str, ours: str, *, weights: float | None = None, **more: Any) -> Case:
    """A case of TRL's; `weights` caps the importance ratios that it is given."""
    fields = {k: more.pop(k) for k in list(more) if k in Case.__dataclass_fields__}
    shown = more | (
        {} if weights is None else {"importance_sampling_ratio": f"min(rho, {weights})"}
    )

    def run(b: Batch) -> Tensor:
        # 1 at masked positions, as TRL makes them: VESPO sums their logarithm unmasked.
        ratio = None
        if weights is not None:
            ratio = torch.where(b.mask, (b.old - b.rollout).exp().clamp(max=weights), 1)
        more_inputs: dict[str, Any] = {"ref": b.ref} if "kl_coef" in more else {}
        if "off_policy" in more:
            more_inputs["sampling"] = b.rollout
        return TRL.policy_loss(
            b.new, b.old, b.A, b.mask.double(), weights=ratio, num_tokens=int(b.n.num_tokens),
            splits=SPLITS if len(b.mask) == ROWS // SPLITS else 1, **more_inputs, **more,
        )  # fmt: skip

    return Case(name=name, ours=ours, theirs=text("TRL", TRL_NAMES, shown), run=run, **fields)


def loss(settings: str = "", **replaced: str) -> str:
    """A line of ours: `policy_loss` with these settings."""
    tail = f", {settings}" if settings else ""
    return f"policy_loss(new, old, {replaced.get('A', 'A')}, packed, n{tail})[0]"


def preset(name: str, settings: str = "", advantages: str = "A") -> str:
    tail = f", {settings}" if settings else ""
    return f"presets.{name}(new, old, {advantages}, packed, n{tail})[0]"


def reduced(surrogate: str, settings: str = "") -> str:
    tail = f", {settings}" if settings else ""
    return f"aggregate({surrogate}.loss_T, packed, n{tail})"


def verl_policy_cases() -> list[Case]:
    modes = {
        "token-mean": ('mode="token_mean"', {}),
        "token-sum": ('mode="sum"', {}),
        "seq-mean-token-mean": ('mode="seq_mean_token_mean"', {"tolerance": 1e-8, "remark": EPS}),
        "seq-mean-token-sum": ('mode="seq_mean_token_sum"', {}),
        "seq-mean-token-sum-norm": ('mode="constant", constant=L', {}),
    }
    seq = {"mode": "seq-mean-token-mean"}
    eps = {"tolerance": 1e-8, "remark": EPS}
    narrow, narrow_ours = {"low": 3e-4, "high": 4e-4}, "ratio_min=1 - 3e-4, ratio_max=1 + 4e-4"
    tis = "correction=truncated_is(old, rollout, packed)"
    token_is = {"rollout_is": "token", "rollout_is_threshold": 2.0}
    dppo = "dppo(new, lr, A, packed, rollout_logprobs_T=old, "
    cov = "statistics=cov, token_ids_T=ids"
    step, kl = "packed, count(packed, keep_T=c.keep_T)", "ref_logprobs_T=ref, kl_coef=0.04"
    left_out = f"policy_loss(new, old, A, {step}, correction=c, count_rejected=False)[0]"
    rejected = {"rollout_rs": "token_k3", "rollout_rs_threshold": 0.1}
    cases = [
        verl("PPO clip", loss(f"{ours}, dual_clip=3.0"), loss="vanilla", mode=mode, split="same",
             **more)
        for mode, (ours, more) in modes.items()
    ]  # fmt: skip
    return [
        *cases,
        verl("PPO clip", loss(), loss="vanilla", mode="token-mean", differs="both",
             remark="Their dual clip, c = 3, is on by default."),
        verl("PPO clip", loss(), loss="vanilla", mode="token-mean", dual_clip=1e9),
        verl("clip-higher", loss("ratio_max=1.28, dual_clip=3.0"), loss="vanilla", high=0.28),
        verl("TIS", loss(f"dual_clip=3.0, {tis}"), loss="vanilla", split="same", **token_is),
        verl("rejection", left_out, loss="vanilla", dual_clip=1e9, **rejected,
             remark="Rejected tokens leave the denominator in both."),
        verl("rejection", loss("correction=c"), loss="vanilla", dual_clip=1e9, **rejected,
             differs="both",
             remark="Ours keeps rejected tokens in the denominator by default."),
        verl("KL", loss(f"dual_clip=3.0, {kl}"), loss="vanilla", kl_coef=0.04, split="same"),
        verl("PPO clip", loss('mode="constant", constant=32'), loss="vanilla", dual_clip=1e9,
             mode="seq-mean-token-sum-norm", batch="twice the padding", differs="both",
             remark="Theirs divides by the padded width unless loss_scale_factor is set."),
        verl("PPO clip", loss('mode="seq_mean_token_mean", dual_clip=3.0'), loss="vanilla", **seq,
             batch="an empty sequence", differs="both",
             remark="Theirs counts the samples of the step, also those without a token."),
        verl("PPO clip", loss('mode="seq_mean_token_mean", dual_clip=3.0'), loss="vanilla", **seq,
             batch="-inf in the padding", differs="value", tolerance=1e-8,
             remark="Theirs is NaN: it multiplies by the mask."),
        verl("PPO clip", loss(), loss="vanilla", dual_clip=1e12, batch="a log-ratio of 25",
             differs="both", remark="Theirs clamps log-ratios to +-20, where the gradient ends."),
        verl("GSPO", preset("gspo"), loss="gspo", **seq, **narrow, **eps, split="same"),
        verl("GSPO", preset("gspo_token"), loss="gspo", **seq, **narrow, **eps),
        verl("GSPO", preset("gspo_token", advantages="A_tokens"), loss="gspo", **seq, **narrow,
             advantages="A_tokens", **eps),
        verl("GSPO", preset("gspo", advantages="A_tokens"), loss="gspo", **seq, **narrow,
             advantages="A_tokens", differs="gradient", tolerance=1e-8,
             remark="Theirs is GSPO-token, which is another gradient when advantages differ "
             "within a sequence."),
        verl("GSPO", preset("gspo_token", f"{narrow_ours}, {tis}"), loss="gspo", **seq, **narrow,
             **token_is, **eps),
        verl("GSPO", preset("gspo"), loss="gspo", **seq, differs="both",
             remark="Their clip stays 0.2 unless told; the paper's, and ours, is 3e-4 and 4e-4."),
        verl("CISPO", preset("cispo", "ratio_min=0.8, ratio_max=1.2"), loss="cispo", split="same"),
        verl("CISPO", preset("cispo"), loss="cispo", differs="both",
             remark="Bounds: theirs 0.8 to 1.2, ours 0 to 5."),
        verl("CISPO", preset("cispo"), loss="cispo", low=1.0, high=4.0),
        verl("SAPO", preset("sapo"), loss="sapo", **seq, **eps, split="same"),
        verl("SAPO", reduced("sapo(lr, A)"), loss="sapo", mode="token-mean", differs="both",
             remark="Theirs ignores loss_agg_mode."),
        verl("GMPO", preset("gmpo"), loss="geo_mean", low=0.4, high=0.4, tolerance=1e-7,
             remark=f"{EPS} It averages over the micro-batch, whatever the step.",
             split="differs"),
        verl("GMPO", preset("gmpo"), loss="geo_mean", differs="both",
             remark="Their clip of the log-ratio stays 0.2; the paper's, and ours, is 0.4."),
        verl("GMPO", preset("gmpo", tis), loss="geo_mean", low=0.4, high=0.4, **token_is,
             differs="both", remark="Theirs weights a sequence by the geometric mean of its "
             "tokens' weights, ours each token by its own."),
        verl("DPPO-TV", reduced(dppo + "ratio_cap=20.0)"), loss="dppo_tv", dual_clip=20.0,
             split="same"),
        verl("DPPO-TV", reduced(dppo + "ratio_cap=3.0)"), loss="dppo_tv",
             remark="Their config's cap of 3 overrides the 20 of their code."),
        verl("DPPO-TV", reduced(dppo + "delta=0.2)"), loss="dppo_tv", dual_clip=1e9,
             differs="value", remark="Ours without a cap is -r A, theirs -sg(r) A logp: one "
             "gradient, two values."),
        verl("DPPO-KL", reduced(dppo + 'kind="kl", delta=0.05, ratio_cap=20.0)'), loss="dppo_kl",
             low=0.05, high=0.05, dual_clip=20.0, split="same"),
        verl("GPG, REINFORCE", reduced("reinforce(new, A, packed)"), loss="gpg", split="same"),
        verl("RLOO", "presets.rloo(new, A, packed, n)[0]", loss="gpg", mode="seq-mean-token-sum"),
        verl("DRO", reduced("dro(new, lr, A, packed, beta=0.1)"), loss="dro", dro_beta=0.1,
             split="same"),
        verl("KL-Cov", reduced(f"kl_cov(new, lr, A_tokens, packed, {cov}, kl_coef=0.1)"),
             loss="kl_cov", kl_cov_ratio=0.05, advantages="A_tokens", split="differs",
             remark="Theirs chooses within the micro-batch, ours within the step."),
        verl("Clip-Cov, all drawn", reduced(
                "clip_cov(new, lr, A_tokens, packed, statistics=cov_all, token_ids_T=ids)"),
             loss="clip_cov", clip_cov_ratio=1.0, clip_cov_lb=0.5, advantages="A_tokens",
             differs="value", split="differs", remark="Theirs does not draw tokens that PPO's clip "
             "has stopped already; these have no gradient either way."),
        verl("Clip-Cov", reduced("clip_cov(new, lr, A_tokens, packed, statistics=cov, "
                                 "token_ids_T=ids)"),
             loss="clip_cov", clip_cov_ratio=0.05, advantages="A_tokens", differs="both",
             split="differs", remark="Not comparable: theirs draws with torch's global generator, "
             "within the micro-batch; ours by a hash of the token, within the step."),
    ]  # fmt: skip


def trl_policy_cases() -> list[Case]:
    kl = "ref_logprobs_T=ref, kl_coef=0.04"
    opsm = (
        "importance_weights(new.detach(), rollout, packed, weight=None, "
        "reject=[OffPolicyNegative(delta=0.01)], advantages_T=A)"
    )
    unbiased = "aggregate(kl_penalty(new, ref, packed) * lr.exp(), packed, n)"
    tis = "correction=truncated_is(old, rollout, packed, high=3.0)"
    sequence = 'ppo_clip(log_ratio(new, old, packed, level="sequence_mean"), A)'
    return [
        trl("GRPO", preset("grpo"), loss="grpo", split="same"),
        trl("GRPO", preset("grpo"), loss="grpo", batch="an empty sequence", differs="both",
            remark="Theirs averages over all rows, also those without a token."),
        trl("DAPO", preset("dapo"), loss="dapo", high=0.28, split="same"),
        trl("DAPO", preset("dapo"), loss="dapo", differs="both",
            remark="Their upper clip stays 0.2 unless epsilon_high is set."),
        trl("Dr. GRPO", preset("dr_grpo", "max_tokens=L"), loss="dr_grpo", split="same"),
        trl("BNPO", loss(), loss="bnpo", split="differs",
            remark="Ours divides by the tokens of the step, theirs by those of the micro-batch."),
        trl("CISPO", preset("cispo"), loss="cispo", high=5.0, split="same"),
        trl("CISPO", preset("cispo"), loss="cispo", differs="both",
            remark="Their absolute bound is epsilon_high itself, 0.2 unless set."),
        trl("SAPO", preset("sapo"), loss="sapo", split="same", tolerance=1e-6,
            remark="Their temperatures are float32."),
        trl("VESPO", reduced("vespo(new, lr, A, packed)"), loss="vespo", split="same"),
        trl("VESPO, importance ratios", reduced(
                "vespo(new, lr, A, packed, log_weights_T=old - rollout)"),
            loss="vespo", weights=1e6),
        trl("LUSPO", reduced(sequence, 'mode="seq_mean_token_sum"'), loss="luspo",
            level="sequence", split="same"),
        trl("LUSPO", loss('mode="seq_mean_token_sum"'), loss="luspo", level="token"),
        trl("GSPO", preset("gspo"), loss="grpo", level="sequence", low=3e-4, high=4e-4,
            split="same"),
        trl("GSPO, importance ratios", preset("gspo", tis), loss="grpo", level="sequence", low=3e-4,
            high=4e-4, weights=3.0),
        trl("GSPO, importance ratios", preset("gspo_token", tis), loss="grpo", level="sequence",
            low=3e-4, high=4e-4, weights=3.0, differs="gradient",
            remark="Theirs is GSPO proper, not GSPO-token."),
        trl("dual clip", loss("dual_clip=3.0"), loss="dapo", delta=3.0,
            remark="Their two-sided clip, with delta above 1 + epsilon_high."),
        trl("TIS", loss(tis), loss="dapo", weights=3.0, split="same"),
        trl("TIS", loss("correction=truncated_is(old, rollout, packed)"), loss="dapo", weights=3.0,
            differs="both", remark="The cap is 2 by our default, 3 by theirs."),
        trl("KL", loss(kl), loss="dapo", kl_coef=0.04),
        trl("KL", loss(kl), loss="dapo", kl_coef=0.04, bias_correction=True, differs="both",
            remark="Theirs multiplies k3 by the ratio, by default."),
        trl("KL", f"{loss()} + 0.04 * {unbiased}", loss="dapo", kl_coef=0.04, bias_correction=True),
        trl("TIS and KL", loss(f"{tis}, {kl}"), loss="dapo", weights=3.0, kl_coef=0.04,
            remark="KL is not weighted, in both."),
        trl("OPSM", loss(f"correction={opsm}"), loss="dapo", off_policy=0.01),
    ]  # fmt: skip


STAGES = {
    "Policy losses, verl": verl_policy_cases(),
    "Policy losses, TRL": trl_policy_cases(),
}
