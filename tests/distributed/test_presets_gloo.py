"""Every preset on 2 and 4 processes, data- or context-parallel, is what one process gives."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from miles import Packed, count
from miles.losses import Correction, reduce_metrics
from tests.distributed.gloo import run
from tests.equivalence.test_loss_splits import correct, take
from tests.equivalence.test_preset_splits import run as run_one
from tests.equivalence.test_preset_splits import whole_step
from tests.presets import RUNNERS, count_right
from tests.steps import random_step, select

LAYOUTS = [("data", 2), ("data", 4), ("context", 2), ("context", 4)]


def share(packed: Packed, kind: str) -> tuple[Packed, torch.Tensor]:
    """This rank's sequences, or its zig-zag part of every sequence."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "data":
        return select(packed, [7, 0, 5, 2, 4, 1, 3, 6][rank::world])
    pieces = []
    for seq in range(packed.num_seqs):
        chunks = (packed.seq_ids_T == seq).nonzero().flatten().tensor_split(2 * world)
        pieces += [chunks[rank], chunks[2 * world - 1 - rank]]
    index_T = torch.cat(pieces)
    part = replace(
        packed,
        seq_ids_T=packed.seq_ids_T[index_T],
        mask_T=packed.mask_T[index_T],
        positions_T=packed.positions_T[index_T],
        seq_group=dist.group.WORLD,
    )
    return part, index_T


def worker(kind: str) -> dict[str, tuple]:
    step = random_step()
    packed, index_T = share(step.packed, kind)
    group = {"group": dist.group.WORLD} if kind == "data" else {}
    denominators, right = count(packed, **group), count_right([packed], **group)
    whole = correct(step)
    correction = Correction(whole.weights_T[index_T], whole.keep_T[index_T], {})
    part, results = take(step, packed, index_T), {}
    for name, runner in RUNNERS.items():
        leaf_T = step.leaf()
        loss, metrics = runner(leaf_T[index_T], part, denominators, right, correction)
        loss.backward()
        readings = reduce_metrics(metrics, group=dist.group.WORLD)
        results[name] = (loss.detach(), leaf_T.grad, readings)
    return results


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def ranks(request, tmp_path_factory):
    kind, world = request.param
    return run(worker, world, tmp_path_factory.mktemp("ranks"), kind)


@pytest.mark.parametrize("name", RUNNERS)
def test_ranks_together_give_what_one_process_gives(ranks, name):
    step = random_step()
    loss, gradient_T, readings = run_one(name, step, whole_step(step))
    got = [results[name] for results in ranks]
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(sum(g[0] for g in got).item(), loss, **close)
    torch.testing.assert_close(sum(g[1] for g in got), gradient_T, **close)
    for _, _, on_rank in got:
        torch.testing.assert_close(on_rank, readings, **close)
