"""Losses in stages, each usable alone.

advantages -> log-probs -> ratios -> corrections -> surrogates -> aggregation, with regularisers
and readings beside them; `presets` are published algorithms in a few lines of these.
"""

from miles.losses import presets
from miles.losses.advantages import group_advantages
from miles.losses.aggregation import aggregate, token_weights
from miles.losses.corrections import (
    Correction,
    Reject,
    Weight,
    importance_weights,
    truncated_is,
)
from miles.losses.logprobs import token_logprobs
from miles.losses.metrics import (
    Max,
    Mean,
    Metrics,
    mean_over,
    mismatch_metrics,
    reduce_metrics,
)
from miles.losses.ratios import log_ratio
from miles.losses.regularizers import kl_penalty
from miles.losses.surrogates import Surrogate, ppo_clip

__all__ = [
    "Correction",
    "Max",
    "Mean",
    "Metrics",
    "Reject",
    "Surrogate",
    "Weight",
    "aggregate",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
    "log_ratio",
    "mean_over",
    "mismatch_metrics",
    "ppo_clip",
    "presets",
    "reduce_metrics",
    "token_logprobs",
    "token_weights",
    "truncated_is",
]
