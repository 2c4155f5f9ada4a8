"""Run one function in several gloo processes and collect what each returns."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = [
    "pytest",
    "hypothesis",
    "torch",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.fsdp",
    "miles.losses",
    "miles.sync",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "tests.models",
    "tests.presets",
]
"""Imported once by the server that ranks are forked from, also those of `tests.sync`."""


def run(worker: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """`worker(*args)` on every rank of the default group; results in the order of ranks."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    ranks = (worker, world_size, folder, args)
    mp.start_processes(_rank, ranks, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _rank(rank: int, worker: Callable[..., Any], world_size: int, folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(worker(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
