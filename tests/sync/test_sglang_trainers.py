"""A sharded trainer of several ranks and an SGLang server with as many: gloo and a CPU's memory."""

from contextlib import ExitStack
from multiprocessing.shared_memory import SharedMemory

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import reductions

from miles.errors import SyncError
from miles.sync import SGLangSyncer
from miles.sync._sglang_payload import Block, Shared
from miles.sync._sglang_slabs import Slabs
from tests.models import tiny
from tests.sync.processes import launch
from tests.sync.test_sglang import Server, load, same
from tests.sync.test_sglang_slabs import Memory

BUCKET = 1 << 14


class OfAll(Memory):
    """Slabs that other processes open by name."""

    def __init__(self):
        super().__init__()
        self.made: list[SharedMemory] = []
        self.opened: list[SharedMemory] = []

    def allocate(self, device, nbytes):
        if dist.get_rank() == 0 and self.fails_at == str(len(self.made) + 1):
            raise SyncError("rank 0 has no room")
        made = SharedMemory(create=True, size=nbytes)
        self.made.append(made)
        memory = torch.frombuffer(made.buf, dtype=torch.uint8, count=nbytes)
        return Shared(memory, Block(memory.data_ptr(), nbytes, made.name.encode().ljust(64), "GPU"))

    def rebuild(self, kind, size, stride, offset, storage, dtype, gpu, handle, *rest):
        other = SharedMemory(handle.decode().strip())
        self.opened.append(other)
        return torch.frombuffer(other.buf, dtype=torch.uint8, count=size[0]).view(dtype)


class Ranks(Server):
    """Two ranks, which keep what each is sent, and the processes that it came from."""

    def __init__(self, version):
        super().__init__(version)
        self.info = {"tp_size": 2}
        self.other: dict[str, torch.Tensor] = {}
        self.own_each = True

    def update(self, name, body):
        if name == "update_weights_from_tensor":
            first, second = body["serialized_named_tensors"]
            self.own_each &= first != second
            content = load(second)
            for weight in content["metadata"]:
                part = content["flattened_tensor"][weight.start_idx : weight.end_idx]
                self.other[weight.name] = part.clone().view(weight.dtype).reshape(weight.shape)
        return super().update(name, body)

    def take(self, flat, metadata):
        super().take(flat.clone(), metadata)


def sharded(via, folder, fault):
    memory = OfAll()
    memory.fails_at = fault.removeprefix("slab ") if fault and fault.startswith("slab") else ""

    def rebuild(*arguments):
        return memory.rebuild(*arguments)

    rebuild.__module__, rebuild.__qualname__ = reductions.__name__, "rebuild_cuda_tensor"
    reductions.rebuild_cuda_tensor = rebuild
    model = tiny("llama", seed=1, tie_word_embeddings=False)
    fully_shard(model, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    lead = dist.get_rank() == 0
    with ExitStack() as stack:
        server = stack.enter_context(Ranks("0.5.21")) if lead else None
        url = [server.url if lead else None]
        dist.broadcast_object_list(url)
        options = {"folder": folder} if via == "disk" else {}
        syncer = SGLangSyncer(
            url[0], via=via, bucket_bytes=BUCKET, trainers=dist.group.WORLD,
            verify=[] if via == "disk" else ["model.norm.weight"], **options,
        )  # fmt: skip
        syncer._memory, syncer._slabs = memory, Slabs(BUCKET, memory, syncer._trainers)
        texts = []
        for version in (1, 2):
            with torch.no_grad():
                model.lm_head.weight += 1
            if lead and version == 2:
                server.fail_at = fault
                server.updates.clear()
            try:
                report = syncer.push(model.state_dict().items(), version=version)
                texts.append((report.num_tensors, report.num_buckets, report.num_bytes))
            except SyncError as error:
                texts.append(str(error))
        held = None
        if lead:
            held = server.loaded, server.other, server.weight_version, server.own_each
        syncer.close()
    for shared in memory.made:
        shared.unlink()
    return texts, held


@pytest.mark.parametrize("via", ["cuda_ipc", "value", "disk"])
def test_a_sharded_trainer_pushes_and_each_rank_of_the_server_reads_a_rank_of_it(tmp_path, via):
    (texts, held), (others, _) = launch(sharded, 2, tmp_path, via, str(tmp_path / "w"), None)
    loaded, other, version, own_each = held
    assert texts == others and texts[0] == texts[1] and version == "2"
    wanted = tiny("llama", seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        wanted.lm_head.weight.add_(1).add_(1)
    assert same(loaded, wanted.state_dict())
    if via != "disk":
        assert same(other, wanted.state_dict())
        assert own_each == (via == "cuda_ipc")


@pytest.mark.parametrize(
    ("via", "fault"),
    [
        ("cuda_ipc", "update_weights_from_tensor 1"),
        ("cuda_ipc", "update_weight_version 2"),
        ("disk", "update_weights_from_disk 1"),
        ("value", "update_weights_from_tensor 2"),
    ],
)
def test_all_ranks_hear_of_a_failure_and_none_waits(tmp_path, via, fault):
    (texts, held), (others, _) = launch(sharded, 2, tmp_path, via, str(tmp_path / "w"), fault)
    assert int(held[2]) < 0
    assert texts[0] == others[0] and "no memory is left" in texts[1]
    assert "rank 0 of the trainers failed: SyncError" in others[1]


def one_server_each(folder, change):
    """Two servers of one rank; what each was sent, and what a push of another model says."""
    memory = OfAll()

    def rebuild(*arguments):
        return memory.rebuild(*arguments)

    rebuild.__module__, rebuild.__qualname__ = reductions.__name__, "rebuild_cuda_tensor"
    reductions.rebuild_cuda_tensor = rebuild
    memory.fails_at = ""
    model = tiny("llama", seed=1, tie_word_embeddings=False)
    fully_shard(model, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    lead, held, text = dist.get_rank() == 0, [], ""
    with ExitStack() as stack:
        servers = [stack.enter_context(OneRank("0.5.21")) for _ in range(2)] if lead else []
        urls = [[server.url for server in servers]]
        dist.broadcast_object_list(urls)
        syncer = SGLangSyncer(
            urls[0], via="cuda_ipc", bucket_bytes=BUCKET, trainers=dist.group.WORLD, progress=True
        )
        assert syncer._progress == lead  # one bar is enough
        syncer._memory, syncer._slabs = memory, Slabs(BUCKET, memory, syncer._trainers)
        syncer.push(model.state_dict().items(), version=1)
        held = [(server.loaded, server.payloads) for server in servers]
        other = dict(model.state_dict())
        del other["model.norm.weight"]
        try:
            syncer.push(other.items() if change == "collection" else iter(other.items()), version=2)
        except SyncError as error:
            text = str(error)
        versions = [server.weight_version for server in servers]
        dist.barrier()
        syncer.close()
    for shared in memory.made:
        shared.unlink()
    return held, text, versions


class OneRank(Server):
    """Notes what it was sent."""

    def __init__(self, version):
        super().__init__(version)
        self.payloads: list[str] = []

    def update(self, name, body):
        if name == "update_weights_from_tensor":
            self.payloads += body["serialized_named_tensors"]
        return super().update(name, body)

    def take(self, flat, metadata):
        super().take(flat.clone(), metadata)


@pytest.mark.parametrize("change", ["collection", "stream"])
def test_each_of_several_servers_reads_a_rank_of_the_trainer_which_is_of_one_model(
    tmp_path, change
):
    (held, text, versions), (_, other, _) = launch(one_server_each, 2, tmp_path, "", change)
    (first, of_first), (second, of_second) = held
    wanted = tiny("llama", seed=1, tie_word_embeddings=False).state_dict()
    assert same(first, wanted) and same(second, wanted)
    assert len(of_first) == len(of_second) > 1 and not set(of_first) & set(of_second)
    assert "missing weights ['model.norm.weight']" in text
    assert "missing weights ['model.norm.weight']" in other
    assert all((int(version) == 1) == (change == "collection") for version in versions)
    assert all((int(version) < 0) != (change == "collection") for version in versions)


@pytest.mark.parametrize("number", [1, 2])
def test_all_ranks_hear_of_a_slab_that_rank_0_cannot_make(tmp_path, number):
    (texts, _), (others, _) = launch(sharded, 2, tmp_path, "cuda_ipc", "", f"slab {number}")
    assert "rank 0 has no room" in texts[0] and "rank 0 has no room" in others[0]
    assert "rank 0 of the trainers failed" in others[0]
