"""Tiny random transformers models whose next-token distributions are far from flat."""

import asyncio
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from miles.moe import RoutingReplay
from miles.rollout import HFEngine, Sample, SamplingParams

VOCAB = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN_MOE = {"moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": False}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"head_dim": 8, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
}
MOE_FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"]


def tiny(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    experts: str = "eager",
    **changes: Any,
) -> Any:
    """A model of the family, the same for the same seed, in eval mode."""
    prefix, extra = MODELS[name]
    suffix = "TextConfig" if name == "gemma3" else "Config"
    config = getattr(transformers, prefix + suffix)(**SIZES | extra | changes)
    if name in MOE_FAMILIES:
        config._experts_implementation = experts
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    return model.to(dtype).eval()


def token_batch(batch: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def routers(model: nn.Module) -> list[nn.Module]:
    modules = dict(model.named_modules())
    return [modules[name] for name in RoutingReplay(model).layers]


def params(max_new_tokens: int = 8, seed: int | None = 0, **changes: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, seed=seed, **changes)


@contextmanager
def serving(model: nn.Module | str, **settings: Any) -> Iterator[HFEngine]:
    """An engine over the model, or over a fresh float32 one of that name; closed at the end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gemma3")
        engine = HFEngine(tiny(model) if isinstance(model, str) else model, **settings)
    with closing(engine):
        yield engine


def generate_all(
    engine: Any, prompts: Sequence[Any], wanted: SamplingParams | Sequence[SamplingParams]
) -> list[Sample]:
    """All prompts at once, in one event loop."""
    each = [wanted] * len(prompts) if isinstance(wanted, SamplingParams) else wanted

    async def main() -> list[Sample]:
        calls = [engine.generate(p, w) for p, w in zip(prompts, each, strict=True)]
        return await asyncio.gather(*calls)

    return asyncio.run(main())


class Passes:
    """Counts a model's forward passes; `reached` is set at pass `at`, the later ones are slow
    until `go_on`."""

    def __init__(self, model: nn.Module, at: int = 5) -> None:
        self.at, self.count, self.reached, self.slow = at, 0, threading.Event(), True
        model.register_forward_pre_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.count += 1
        if self.count >= self.at:
            self.reached.set()
            if self.slow:
                time.sleep(0.01)

    def wait(self) -> None:
        assert self.reached.wait(60)

    def go_on(self) -> None:
        self.slow = False


def make_engine(name: str = "qwen3_moe", slow: float = 0.0) -> HFEngine:
    """For a child process: bfloat16, 4 slots, `slow` seconds a forward pass, version 3."""
    torch.set_num_threads(1)
    model = tiny(name, dtype=torch.bfloat16)
    if slow:
        model.register_forward_pre_hook(lambda *_: time.sleep(slow))
    return HFEngine(model, max_batch=4, weight_version=3)


def broken_engine() -> HFEngine:
    raise FileNotFoundError("no such checkpoint")
