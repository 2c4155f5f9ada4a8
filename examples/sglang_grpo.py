"""The loop of `grpo_loop.py` against a real SGLang server that shares the trainer's GPU.

    python examples/sglang_grpo.py --server-site ~/site    # the server's PYTHONPATH
    python examples/sglang_grpo.py --via disk              # weights through a folder
    python examples/sglang_grpo.py --resume                # after Ctrl-C

The warmed-up mixture of experts is exported and served in bfloat16, with the experts of every token
recorded; the trainer works in float32, replays those experts (R3) and weighs tokens by how far the
two disagree (TIS). After each step `SGLangSyncer` brings the new weights into the server. A server
that dies is started again, gets the weights of the step, and the loop goes on.

Expected: the reward rises from 0.4 to 0.9 in 25 steps, in four and a half minutes on an H200, of
which the server takes one to start (examples/results/sglang). In `--out`, beside what
`grpo_loop.py` leaves: server.log. Each row of metrics.jsonl has the gap to the server as it is with
R3 (`mismatch/abs`) and as it would be without (`natural/mismatch/abs`), the share of (token,
layer) pairs whose experts the trainer would have chosen too (`natural/agreement`), and the seconds
of the push (`time/sync`) and of the pause that it made (`time/sync/pause`).

Samples cannot be repeated: the server draws them without a seed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from arithmetic import ChainSum, build_model, build_tokenizer
from grpo_loop import Config, Run, forward, train
from torch import Tensor

from miles import Packed
from miles.losses import mismatch_metrics, reduce_metrics
from miles.moe import equal_sets
from miles.rollout import (
    RoutingLayout,
    Sample,
    SamplingParams,
    SGLangEngine,
    SGLangServer,
    TrainBatch,
)
from miles.sync import SGLangSyncer, SyncReport, name_map

FLAGS = (
    "--dtype", "bfloat16", "--weight-version", "0", "--skip-tokenizer-init",
    "--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none",
    "--disable-cuda-graph",
)  # fmt: skip
"""What starts fast and needs the fewest of SGLang's kernels."""
BUCKET_BYTES = 32 << 20
"""Two of them hold the whole model."""
GONE_SECONDS = 5.0
"""How long a server that is dying may take until its process is gone."""


@dataclass(frozen=True, kw_only=True)
class SGLangConfig(Config):
    """GRPO with R3 and TIS against an SGLang server."""

    out: Path = Path("runs/sglang")
    """Folder of the run."""
    num_steps: int = 25
    """Rollout-and-train steps."""
    micro_batch_size: int = 1024
    """Samples per forward pass."""
    warmup_steps: int = 400
    """Supervised steps before RL, on a teacher's answers of which two in three are wrong."""
    warmup_learning_rate: float = 1.5e-3
    """AdamW, for the warm-up."""
    learning_rate: float = 3e-4
    """AdamW, for RL; falls linearly to a tenth."""
    max_batch: int = 1024
    """Requests that the server generates at once."""
    engine_process: tyro.conf.Suppress[bool] = True
    """The server is always one."""
    eval_every: int = 10
    """Steps between held-out evaluations."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    device: str = "cuda"
    """Of the trainer."""

    num_layers: int = 4
    """Layers of the model."""
    via: Literal["cuda_ipc", "value", "disk"] = "cuda_ipc"
    """How weights get into the server: by a handle of GPU memory, in the request, or as files."""
    server_site: str = ""
    """The server's PYTHONPATH, if it needs other packages than the trainer."""
    server_python: str = sys.executable
    """The server's interpreter."""
    server_memory: float = 0.3
    """The server's share of the GPU's memory."""
    server_seconds: float = 400
    """How long it may take to start; the first time its kernels are compiled."""


class ServedEngine:
    """A server and the engine that speaks to it, which live and die together."""

    def __init__(self, config: SGLangConfig, model_dir: Path, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        # What the server reads: the checkpoint in the dtype that it is served in.
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        self._eos = model.config.eos_token_id
        self._routing = RoutingLayout.from_config(model.config) if config.r3 else None
        flags = [
            *FLAGS, "--mem-fraction-static", str(config.server_memory),
            "--max-running-requests", str(config.max_batch),
            *(["--enable-return-routed-experts"] if config.r3 else []),
        ]  # fmt: skip
        site = str(Path(config.server_site).expanduser().resolve()) if config.server_site else ""
        self._server = SGLangServer(
            folder, args=flags, env={"PYTHONPATH": site} if site else None, cwd=folder,
            python=config.server_python, log=config.out.resolve() / "server.log",
            start_timeout=config.server_seconds,
        )  # fmt: skip
        self._engine: SGLangEngine
        self._start()

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int | None:
        return self._server.pid

    @property
    def weight_version(self) -> int:
        """Raises EngineDiedError if the server is gone, which may take it a moment."""
        end = time.monotonic() + GONE_SECONDS
        while time.monotonic() < end:
            self._server.check()
            time.sleep(0.1)
        return self._engine.weight_version

    async def generate(self, prompt: list[int], params: SamplingParams) -> Sample:
        """Without a seed, which a server heeds only with --enable-deterministic-inference."""
        return await self._engine.generate(
            prompt, replace(params, seed=None, stop_token_ids=(self._eos,))
        )

    def refresh(self) -> None:
        """Hear which weights the server has now."""
        asyncio.run(self._engine.refresh())

    def restart(self) -> None:
        """The server as it was at first, with the weights of its checkpoint."""
        self.close()
        self._start()

    def close(self) -> None:
        self._engine.close()
        self._server.stop()

    def _start(self) -> None:
        self._server.start()
        try:
            self._engine = SGLangEngine(self.url, routing=self._routing)
        except BaseException:
            self._server.stop()
            raise


class Pusher:
    """The trainer's weights in the server's dtype, under a checkpoint's names."""

    def __init__(
        self, engine: ServedEngine, config: SGLangConfig, model: Any, folder: Path
    ) -> None:
        self._engine = engine
        self._names = name_map(model.config, source="hf_module", target="hf")
        place = {"folder": folder} if config.via == "disk" else {}
        self._new = partial(
            SGLangSyncer, engine.url, via=config.via, bucket_bytes=BUCKET_BYTES, **place
        )
        self._syncer: SGLangSyncer | None = None

    def push(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        if self._syncer is None:
            self._syncer = self._new()
        served = ((name, w.to(torch.bfloat16)) for name, w in self._names.forward(weights))
        report = self._syncer.push(served, version=version)
        self._engine.refresh()
        return report

    def close(self) -> None:
        if self._syncer is not None:
            self._syncer.close()
            self._syncer = None


def served_engine(
    config: SGLangConfig, model_dir: Path, folder: str, *, model: Any
) -> tuple[ServedEngine, Pusher]:
    """What `local_engine` is to `grpo_loop.py`."""
    began = time.perf_counter()
    engine = ServedEngine(config, model_dir, Path(folder, "model"))
    print(f"the server has answered after {time.perf_counter() - began:.0f} s", flush=True)
    return engine, Pusher(engine, config, model, Path(folder, "weights"))


@torch.no_grad()
def without_replay(run: Run, micros: list[TrainBatch]) -> dict[str, Tensor]:
    """The same readings of a trainer whose routers choose, and how often they choose the same."""
    if run.replay is None:
        return {}
    logprobs, equal = [], []
    for micro in micros:
        with run.replay.record() as own:
            logprobs.append(forward(replace(run, replay=None), micro))
        assert micro.routing is not None
        equal.append(equal_sets(own, micro.routing)[micro.routing_required_T.cpu()])
    rollout_T = torch.cat([micro.rollout_logprobs_T for micro in micros])
    whole = Packed.cat([micro.packed for micro in micros])
    readings = reduce_metrics(mismatch_metrics(torch.cat(logprobs), rollout_T, whole))
    readings["agreement"] = torch.cat(equal).nanmean()
    return {f"natural/{name}": value for name, value in readings.items()}


def summary(out: Path) -> str:
    """A few means over the run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shown = {
        "mismatch/abs": "gap to the server, nats",
        "natural/mismatch/abs": "without R3",
        "natural/agreement": "experts that agree without R3",
        "time/sample": "seconds of sampling",
        "time/train": "of training",
        "time/sync": "of a push",
        "time/sync/pause": "in which the server stood still",
    }
    means = {
        text: sum(row[key] for row in rows) / len(rows)
        for key, text in shown.items()
        if rows and key in rows[0]
    }
    return "mean of all steps: " + ", ".join(f"{text} {x:.3g}" for text, x in means.items())


def main(config: SGLangConfig) -> None:
    # Sizes that SGLang's Triton kernels take; its Qwen3-MoE does not tie the head.
    model = build_model(
        config.seed, width=256, vocab_size=64, num_hidden_layers=config.num_layers,
        num_key_value_heads=2, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4,
        initializer_range=0.05, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    model.config._experts_implementation = "eager"  # grouped_mm is for bfloat16
    train(
        config, ChainSum(config.seed), model, build_tokenizer(),
        engine=partial(served_engine, model=model), observe=without_replay,
    )  # fmt: skip
    print(summary(config.out))


if __name__ == "__main__":
    main(tyro.cli(SGLangConfig))
