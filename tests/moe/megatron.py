"""A tiny GPT of megatron-core 0.16.1, and what it takes to run it where there is no GPU."""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from miles.moe import RoutingTape

VOCAB, BATCH, LENGTH = 40, 2, 6
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
RECOMPUTE = {
    "none": {},
    "full": FULL,
    "full-2": FULL | {"recompute_num_layers": 2},
    "block": FULL | {"recompute_method": "block"},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@contextlib.contextmanager
def processes(*, on_gpu: bool = False, **sizes: Any) -> Iterator[None]:
    """Process groups of megatron-core, by default of one process: gloo on a CPU, NCCL on a GPU."""
    from megatron.core import parallel_state

    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = dist.FileStore(f"{folder}/store", 1)
            if on_gpu:
                torch.cuda.set_device(0)
            backend, limit = "nccl" if on_gpu else "gloo", timedelta(seconds=60)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
            stack.callback(dist.destroy_process_group)
        if not on_gpu:
            stack.enter_context(_without_cuda())
        stack.enter_context(_without_transformer_engine())
        parallel_state.initialize_model_parallel(**sizes)
        stack.callback(parallel_state.destroy_model_parallel)
        if on_gpu:
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(0)
        yield


def device() -> str:
    """Where the processes that were set up compute."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


@contextlib.contextmanager
def pretended_rank(rank: int, world_size: int, **sizes: Any) -> Iterator[None]:
    """One process that takes itself for a rank of several and cannot reach the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with processes(create_gloo_process_groups=False, **sizes):
            yield
    finally:
        dist.destroy_process_group()


class CudaMeansCpu(TorchFunctionMode):
    """For schedules of 0.16.1, which allocate on "cuda" by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    """0.16.1 allocates on "the current CUDA device" and forks CUDA's random state everywhere."""
    from megatron.core.tensor_parallel import random

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
        patch.setattr(random, "_set_cuda_rng_state", lambda new, *_, **__: torch.set_rng_state(new))
        random.initialize_rng_tracker()
        tracker = random._CUDA_RNG_STATE_TRACKER
        patch.setattr(tracker, "fork", lambda *_: contextlib.nullcontext(), raising=False)
        yield


@contextlib.contextmanager
def _without_transformer_engine() -> Iterator[None]:
    """Without TransformerEngine moe_utils of 0.16.1 reads a name that it does not define."""
    from megatron.core.transformer.moe import moe_utils

    with pytest.MonkeyPatch.context() as patch:
        if not moe_utils.HAVE_TE:
            patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        yield


def config(kind: Any = None, **changes: Any) -> Any:
    """Settings of a tiny model, in a class other than `TransformerConfig` if one is given."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 12,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall" if device() == "cuda" else "allgather",
        "moe_enable_routing_replay": True,
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "params_dtype": torch.float32,
        "init_method": lambda weight: torch.nn.init.normal_(weight, std=0.4),
    }
    settings |= changes
    settings.setdefault("pipeline_dtype", settings["params_dtype"])
    return (kind or TransformerConfig)(**settings)


def gpt(settings: Any, *, seed: int = 0, mtp: bool = False, **changes: Any) -> Any:
    """A model, or the chunk that `pre_process`, `post_process` and `vp_stage` say.

    Each parameter is drawn by its name in a model of one process, so that all parts agree with it.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = get_gpt_decoder_block_spec(
        settings,
        use_transformer_engine=False,
        normalization=settings.normalization,
        vp_stage=changes.get("vp_stage"),
    )
    if mtp:
        changes["mtp_block_spec"] = get_gpt_mtp_block_spec(
            settings, spec, use_transformer_engine=False
        )
    model = GPTModel(
        settings,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **changes,
    )
    for name, parameter in model.named_parameters():
        fill(parameter, whole_name(model, name), seed)
    return model.to(device=device(), dtype=settings.params_dtype).train()


def whole_name(model: Any, name: str) -> str:
    """The parameter's name in a model of one process."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = model.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
        if "local_experts" in parts:
            place = parts.index("local_experts") + 1
            parts[place] = str(layer.mlp.local_expert_indices[int(parts[place])])
    return ".".join(parts)


@torch.no_grad()
def fill(parameter: Tensor, name: str, seed: int) -> None:
    if parameter.ndim < 2:
        return
    generator = torch.Generator().manual_seed(sum(name.encode()) * 97 + seed)
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    parameter.copy_(drawn / math.sqrt(parameter.shape[-1]) * 1.5)


def tokens(seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (batch, length), generator=generator)
    return ids.to(device())


def run(model: Any, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits `[B, S, V]`, or hidden states `[S, B, H]` of a stage that is not the last.

    With labels, their losses `[B, S]`, which layers of multi-token prediction need.
    """
    batch, length = ids.shape
    positions = torch.arange(length, device=ids.device).expand(batch, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)
    return model(ids, positions, mask, labels=labels)


def loss(out: Tensor) -> Tensor:
    """A number in which every element has its own weight."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float32)
    return (out.float() * weights.view_as(out)).sum()


def forward_and_gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = run(model, ids)
    loss(out).backward()
    return out.detach(), gradients(model)


def gradients(*models: Any) -> dict[str, Tensor]:
    """By the name in a model of one process; cleared after."""
    found = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[whole_name(model, name)] = parameter.grad.cpu().clone()
        model.zero_grad()
    return found


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def plan_for(replay: Any, seed: int = 1, rows: int = BATCH * LENGTH) -> RoutingTape:
    """A random tape of the layers that `replay` has."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, len(replay.layers), replay.num_experts, generator=generator)
    return RoutingTape(scores.argsort(-1)[..., : replay.topk], num_experts=replay.num_experts)


def with_holes(tape: RoutingTape, *rows: int) -> RoutingTape:
    ids = tape.expert_ids
    ids[list(rows)] = -1
    return RoutingTape(ids, num_experts=tape.num_experts)
