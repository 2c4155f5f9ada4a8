"""Sharded trainers, each rank of which pushes to an engine of its own: gloo and a CPU's memory."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from miles.errors import SyncError
from miles.sync import SharedMemoryReceiver, SharedMemorySyncer
from miles.sync._bucket_receiver import BucketReceiver
from miles.sync._bucket_sender import BucketSender
from miles.sync._checksum import BLOCK
from miles.sync._memory import FileMemory
from tests.sync.processes import launch
from tests.sync.targets import Target, same

PLACES = {"rows": Shard(0), "columns": Shard(1), "odd": Shard(0), "same": Replicate()}


def whole_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rows": (2000, 3), "columns": (7, 9), "odd": (3, 2), "same": (5,), "plain": (4,)}
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def sharded(seed, mesh):
    return {
        name: distribute_tensor(tensor, mesh, [PLACES[name]]) if name in PLACES else tensor
        for name, tensor in whole_weights(seed).items()
    }


def of_engine(seed):
    return {n: t.bfloat16() if n == "rows" else t for n, t in whole_weights(seed).items()}


def both(kind, address):
    """What makes a receiver, and a syncer."""
    if kind == "shm":
        return lambda t: SharedMemoryReceiver(t, address), SharedMemorySyncer(address, timeout=20)
    return (
        lambda t: BucketReceiver(t, address, memory=FileMemory(), direct=kind == "direct"),
        BucketSender(address, memory=FileMemory(), bucket_bytes=BLOCK, timeout=20),
    )


def own_engines(folder, kind):
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    receive, syncer = both(kind, f"{folder}/weights-{dist.get_rank()}")
    target = Target({n: torch.zeros_like(t) for n, t in of_engine(0).items()})
    receiver = receive(target)
    found = []
    for version, stream in ((1, False), (2, True), (3, False)):
        given = sharded(version, mesh).items()
        report = syncer.push(iter(list(given)) if stream else given, version=version)
        found.append((report.num_tensors, same(target.live, of_engine(version))))
    syncer.close()
    receiver.close()
    return found


@pytest.mark.parametrize("kind", ["shm", "direct", "slab"])
def test_every_rank_brings_all_of_the_weights_to_its_own_engine(tmp_path, kind):
    found = launch(own_engines, 2, tmp_path, str(tmp_path), kind)
    assert found == [[(5, True)] * 3] * 2


def one_engine(folder, kind):
    world = dist.group.WORLD
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    receive, syncer = both(kind, f"{folder}/weights")
    rank = dist.get_rank()
    target = Target({n: torch.zeros_like(t) for n, t in of_engine(0).items()})
    receiver = receive(target) if rank == 0 else None
    given = sharded(1, mesh)

    def first():
        yield "plain", given.pop("plain")
        dist.barrier(world)  # it is connected
        yield from given.items()

    if rank:
        dist.barrier(world)
    text = ""
    try:
        syncer.push(given.items() if rank else first(), version=1)
    except SyncError as error:
        text = str(error)
    dist.barrier(world)  # the second stays alive until the first has given up
    version = target.weight_version
    if receiver is not None:
        syncer.push(whole_weights(2).items(), version=2)
        assert same(target.live, of_engine(2))
        receiver.close()
    return text, version


@pytest.mark.parametrize("kind", ["shm", "direct"])
def test_of_two_ranks_that_push_to_one_engine_the_second_is_refused(tmp_path, kind):
    (first, version), (second, _) = launch(one_engine, 2, tmp_path, str(tmp_path), kind)
    assert "another sender" in second and "expected one trainer for an engine" in second
    assert "another rank of the trainers failed, or the group timed out" in first
    assert version == 0
