"""Losses in stages, each usable alone.

advantages -> log-probs -> ratios -> corrections -> surrogates -> aggregation, with regularisers
and readings beside them; `presets` are published algorithms in a few lines of these.
"""

from miles.losses import presets
from miles.losses.advantages import (
    distill_advantages,
    group_advantages,
    multi_reward_advantages,
    passk_advantages,
    soft_overlong_penalty,
)
from miles.losses.aggregation import (
    aggregate,
    keep_untruncated,
    token_weights,
)
from miles.losses.corrections import (
    Correction,
    MaxStaleness,
    OffPolicyNegative,
    Reject,
    Weight,
    icepop,
    importance_weights,
    interpolate_proximal,
    masked_is,
    truncated_is,
    veto,
)
from miles.losses.covariance import (
    CovarianceStatistics,
    clip_cov,
    covariance_statistics,
    kl_cov,
    token_ids,
)
from miles.losses.linear import (
    LogprobOutput,
    Nucleus,
    linear_logprobs,
)
from miles.losses.logprobs import (
    token_logprobs,
)
from miles.losses.metrics import (
    ArgMax,
    Ess,
    ExpMean,
    LogMeanExp,
    Max,
    Mean,
    Metric,
    Metrics,
    mean_over,
    mismatch_metrics,
    reduce_metrics,
)
from miles.losses.policy import (
    policy_loss,
    policy_loss_backend,
)
from miles.losses.preferences import (
    Preference,
    dpo,
    ipo,
    orpo,
    sequence_logprobs,
    simpo,
)
from miles.losses.ratios import (
    log_ratio,
)
from miles.losses.regularizers import (
    entropy_quantile_mask,
    generalized_jsd,
    kl_penalty,
    nll,
    topk_distillation,
    value_loss,
)
from miles.losses.returns import (
    discounted_returns,
    gae,
    length_adaptive_lambda,
    terminal_rewards,
    whiten,
)
from miles.losses.sequence_surrogates import (
    gmpo,
    vespo,
)
from miles.losses.surrogates import (
    Surrogate,
    cispo,
    dppo,
    dro,
    ppo_clip,
    reinforce,
    sapo,
)

__all__ = [
    "ArgMax",
    "Correction",
    "CovarianceStatistics",
    "Ess",
    "ExpMean",
    "LogMeanExp",
    "LogprobOutput",
    "Max",
    "MaxStaleness",
    "Mean",
    "Metric",
    "Metrics",
    "Nucleus",
    "OffPolicyNegative",
    "Preference",
    "Reject",
    "Surrogate",
    "Weight",
    "aggregate",
    "cispo",
    "clip_cov",
    "covariance_statistics",
    "discounted_returns",
    "distill_advantages",
    "dpo",
    "dppo",
    "dro",
    "entropy_quantile_mask",
    "gae",
    "generalized_jsd",
    "gmpo",
    "group_advantages",
    "icepop",
    "importance_weights",
    "interpolate_proximal",
    "ipo",
    "keep_untruncated",
    "kl_cov",
    "kl_penalty",
    "length_adaptive_lambda",
    "linear_logprobs",
    "log_ratio",
    "masked_is",
    "mean_over",
    "mismatch_metrics",
    "multi_reward_advantages",
    "nll",
    "orpo",
    "passk_advantages",
    "policy_loss",
    "policy_loss_backend",
    "ppo_clip",
    "presets",
    "reduce_metrics",
    "reinforce",
    "sapo",
    "sequence_logprobs",
    "simpo",
    "soft_overlong_penalty",
    "terminal_rewards",
    "token_ids",
    "token_logprobs",
    "token_weights",
    "topk_distillation",
    "truncated_is",
    "value_loss",
    "vespo",
    "veto",
    "whiten",
]
