"""Ranks of a gloo group that may die: whatever the rest returns is collected."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.gloo import PRELOAD

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


def launch(
    worker: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout: float = 50
) -> list[Any]:
    """`worker(*args)` on every rank; None for ranks that died, an exception's text as a string."""
    folder = Path(folder)
    ranks = [
        CONTEXT.Process(target=_rank, args=(rank, worker, world_size, str(folder), args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            (folder / f"{ranks.index(process)}.hung").touch()
    return [_result(folder, rank) for rank in range(world_size)]


def start(function: Callable[..., Any], *args: Any) -> Any:
    """One more process, without a group."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def die(*_: Any, **__: Any) -> None:
    """End this process at once, as `kill -9` does."""
    os._exit(9)


def _result(folder: Path, rank: int) -> Any:
    if (folder / f"{rank}.hung").exists():
        return "hung"
    path = folder / f"{rank}.pt"
    return torch.load(path, weights_only=False) if path.exists() else None


def _rank(
    rank: int, worker: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    try:
        result = worker(*args)
    except Exception:  # of the worker, whatever it is; the test looks at the text
        result = traceback.format_exc()
    torch.save(result, f"{folder}/{rank}.tmp")
    os.rename(f"{folder}/{rank}.tmp", f"{folder}/{rank}.pt")
    os._exit(0)  # what is left of a broken group is not waited for
