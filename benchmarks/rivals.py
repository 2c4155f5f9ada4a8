"""The loss code of TRL, verl and Liger, out of their installed packages, as functions of tensors.

    pip install --no-deps trl==1.16.0 verl==0.9.1 liger-kernel==0.8.5

TRL and verl import much that their loss functions never use (ray, datasets, ...). What of that is
not installed is replaced by empty stand-ins, for the time of the import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections import defaultdict
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

UNUSED = (
    "ray", "pandas", "datasets", "tensordict", "accelerate", "omegaconf", "hydra", "codetiming",
    "orjson", "pyarrow",
)  # fmt: skip


class _StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
        return MagicMock(name=name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> _StandIn:
        return _StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        """Nothing is in it."""


def _load(module: str) -> Any:
    finder = _Finder({name for name in UNUSED if importlib.util.find_spec(name) is None})
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)


def version(package: str) -> str:
    return importlib.metadata.version(package)


class Verl:
    """verl's `core_algos`, and `rollout_corr_helper` as `corrections`."""

    def __init__(self) -> None:
        self.algos = _load("verl.trainer.ppo.core_algos")
        self.corrections = _load("verl.trainer.ppo.rollout_corr_helper")
        self.config = _load("verl.workers.config")
        self.name = f"verl {version('verl')}"

    def policy_loss(
        self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, weights: Tensor | None,
        ref: Tensor | None = None, kl_coef: float = 0.0, loss: str = "vanilla",
        mode: str = "token-mean", low: float = 0.2, high: float = 0.2, num_tokens: int,
        dual_clip: float = 1e9, num_seqs: int | None = None, **policy: Any,
    ) -> Tensor:  # fmt: skip
        """Everything is `[B, L]`; its dual clip, on by default, is out of the way here.

        `num_tokens` and `num_seqs` (B without it) are those of the whole step; `policy` goes into
        its `PolicyLossConfig`.
        """
        info = {
            "dp_size": 1,
            "batch_num_tokens": num_tokens,
            "global_batch_size": num_seqs or new.shape[0],
            "loss_scale_factor": None,
        }
        config = self.config.ActorConfig(
            strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio=low, clip_ratio_low=low,
            clip_ratio_high=high, clip_ratio_c=dual_clip, global_batch_info=info,
            policy_loss=self.config.PolicyLossConfig(**policy),
        )  # fmt: skip
        value, _ = self.algos.POLICY_LOSS_REGISTRY[loss](
            old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask,
            loss_agg_mode=mode, config=config, rollout_is_weights=weights,
        )  # fmt: skip
        if ref is not None:
            kl = self.algos.kl_penalty(new, ref, "low_var_kl")
            value = value + kl_coef * self.algos.agg_loss(
                loss_mat=kl, loss_mask=mask, loss_agg_mode=mode, **info
            )
        return value


class Trl:
    """`GRPOTrainer._compute_loss`, with log-probs in place of a model."""

    def __init__(self) -> None:
        self.trainer = _load("trl.trainer.grpo_trainer").GRPOTrainer
        self.name = f"TRL {version('trl')}"

    def policy_loss(
        self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, weights: Tensor | None,
        ref: Tensor | None = None, kl_coef: float = 0.0, loss: str = "dapo", low: float = 0.2,
        high: float = 0.2, num_tokens: int, level: str = "token", delta: float | None = None,
        bias_correction: bool = False, off_policy: float | None = None,
        sampling: Tensor | None = None, splits: int = 1,
    ) -> Tensor:  # fmt: skip
        """`splits` micro-batches make a step; `num_tokens` is that of the whole step."""

        def same(tensor: Tensor, **_: Any) -> Tensor:
            return tensor

        args = types.SimpleNamespace(
            delta=delta, use_bias_correction_kl=bias_correction, steps_per_generation=splits,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
            vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        )  # fmt: skip
        this = types.SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(old), None),
            top_entropy_quantile=1.0, aux_loss_enabled=False, off_policy_mask_threshold=off_policy,
            importance_sampling_level=level, beta=kl_coef, loss_type=loss, epsilon_low=low,
            epsilon_high=high, use_vllm=weights is not None,
            vllm_importance_sampling_correction=weights is not None, args=args,
            model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=splits,
            max_completion_length=new.shape[1], _entropy_bonus_enabled=False,
            get_gamma_weights=self.trainer.get_gamma_weights,
            get_off_policy_mask=self.trainer.get_off_policy_mask,
            _metrics={"train": defaultdict(list)},
            accelerator=types.SimpleNamespace(gather=same, reduce=same, num_processes=1),
        )  # fmt: skip
        ids = torch.zeros_like(mask, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids[:, :0], "prompt_mask": ids[:, :0], "completion_ids": ids,
            "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
            "num_items_in_batch": torch.tensor(float(num_tokens), device=new.device),
        }  # fmt: skip
        if weights is not None:
            inputs["importance_sampling_ratio"] = weights
        if sampling is not None:
            inputs["sampling_per_token_logps"] = sampling
        if ref is not None:
            inputs["ref_per_token_logps"] = ref
        value: Tensor = self.trainer._compute_loss(this, None, inputs)
        return value


class Liger:
    """Liger's GRPO losses, which begin at hidden states or at logits, averaged over tokens."""

    def __init__(self) -> None:
        self.linear = _load("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
        self.name = f"liger-kernel {version('liger-kernel')}"

    def loss_of_hidden(
        self, hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor, advantages: Tensor, *,
        old: Tensor, ref: Tensor, kl_coef: float, num_tokens: int,
    ) -> Tensor:  # fmt: skip
        """`hidden` is `[B, L, D]`, advantages `[B]`; one sequence a chunk, as it is by default."""
        loss = self.linear(beta=kl_coef, loss_type="dapo", compiled=True, temperature=1.0)
        value: Tensor = loss(
            hidden, weight, ids, mask, advantages, ref_per_token_logps=ref,
            old_per_token_logps=old, num_items_in_batch=num_tokens,
        )[0]  # fmt: skip
        return value

    def loss_of_logits(
        self, logits: Tensor, ids: Tensor, mask: Tensor, advantages: Tensor, *, old: Tensor,
        ref: Tensor, kl_coef: float, num_tokens: int,
    ) -> Tensor:  # fmt: skip
        """`logits` is `[B, L + 1, V]`, kept as they are; CUDA only (Triton)."""
        value: Tensor = _load("liger_kernel.transformers.grpo_loss").triton_grpo_loss(
            logits, old, ref, ids, advantages, mask, temperature=1.0, beta=kl_coef, eps_low=0.2,
            eps_high=0.2, inplace=False, loss_type="dapo", reduce=True,
            num_items_in_batch=num_tokens,
        )[0]  # fmt: skip
        return value
