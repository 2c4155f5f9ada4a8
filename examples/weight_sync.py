"""A trainer and an engine in two processes: new weights, a killed engine, and what is served then.

    python examples/weight_sync.py
    python examples/weight_sync.py --carrier disk
    python examples/weight_sync.py --carrier cuda-ipc     # on a GPU

The trainer pushes one version after another. At one of them the engine is killed with half of the
weights on their way: the push fails and says so, the engine starts again with the weights of its
factory, and the same push is made once more. (A folder does not notice; the new engine reads it.)
After each push the engine samples, and its log-probs are compared with the trainer's. Half a minute
on two CPU cores.

Expected: every probe ends below 1e-4, on a CPU and on a GPU (by cuda-ipc 3e-6 on an H200, torch
2.11.0+cu130).
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from miles.errors import SyncError
from miles.rollout import EngineProcess, HFEngine, SamplingParams
from miles.sync import (
    CudaIpcReceiver,
    CudaIpcSyncer,
    DiskReceiver,
    DiskSyncer,
    SharedMemoryReceiver,
    SharedMemorySyncer,
    WeightSyncer,
    model_logprobs,
    probe,
)

Carrier = Literal["shared-memory", "disk", "cuda-ipc"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Weights from one process to another, through a failure."""

    carrier: Carrier = "shared-memory"
    """How they travel; cuda-ipc puts both processes on the GPU."""
    versions: int = 5
    """How many are pushed."""
    kill_at: int = 3
    """The version at which the engine is killed halfway; 0: none."""
    hidden: int = 256
    """Width of the model."""
    layers: int = 8
    """Its layers."""
    num_prompts: int = 16
    """Prompts of each probe."""


def build_model(config: Config, seed: int) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = LlamaConfig(
        vocab_size=512, hidden_size=config.hidden, intermediate_size=3 * config.hidden,
        num_hidden_layers=config.layers, num_attention_heads=4, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(sizes).to("cuda" if config.carrier == "cuda-ipc" else "cpu")


def build_engine(config: Config, address: str) -> HFEngine:
    """Called in the engine's process; the receiver's thread keeps the receiver."""
    engine = HFEngine(build_model(config, seed=1))
    if config.carrier == "cuda-ipc":
        CudaIpcReceiver(engine, address)
    elif config.carrier == "disk":
        DiskReceiver(engine, address).start()
    else:
        SharedMemoryReceiver(engine, address)
    return engine


def build_syncer(config: Config, address: str) -> WeightSyncer:
    """The trainer's side."""
    if config.carrier == "cuda-ipc":
        return CudaIpcSyncer(address)
    return DiskSyncer(address) if config.carrier == "disk" else SharedMemorySyncer(address)


def train_step(model: nn.Module, version: int) -> None:
    """What an optimizer would do: other weights."""
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.01 * noise.to(parameter.device))


def dying(weights: dict[str, Tensor], engine: EngineProcess) -> Iterator[tuple[str, Tensor]]:
    """The weights; halfway, the engine is killed."""
    for number, item in enumerate(weights.items()):
        if number == len(weights) // 2:
            os.kill(engine.pid, signal.SIGKILL)
        yield item


def wait_for(engine: EngineProcess, version: int, seconds: float = 60.0) -> None:
    """Return when the engine serves the version: one that reads a folder is a little behind."""
    end = time.monotonic() + seconds
    while engine.weight_version != version:
        if time.monotonic() > end:
            raise SystemExit(f"the engine still serves {engine.weight_version}, not {version}")
        time.sleep(0.05)


def main(config: Config) -> None:
    model = build_model(config, seed=0)
    prompts = torch.randint(1, 512, (config.num_prompts, 16)).tolist()
    params = SamplingParams(max_new_tokens=16, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "weights")
        engine, syncer = EngineProcess(build_engine, config, address), build_syncer(config, address)
        try:
            for version in range(1, config.versions + 1):
                train_step(model, version)
                weights = model.state_dict()
                if version == config.kill_at:
                    try:
                        syncer.push(dying(weights, engine), version=version)
                    except SyncError as error:
                        print(f"version {version}: {error}")
                    engine.restart()
                    print(f"the engine is back, with version {engine.weight_version}")
                print(syncer.push(weights.items(), version=version).summary())
                wait_for(engine, version)
                report = probe(
                    engine, model_logprobs(model), prompts, params=params, version=version
                )
                print(f"  engine and trainer: mean |d| {report.mean_abs:.1e} nats over "
                      f"{report.num_tokens} tokens")  # fmt: skip
        finally:
            syncer.close()
            engine.close()


if __name__ == "__main__":
    main(tyro.cli(Config))
