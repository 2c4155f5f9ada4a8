"""`SGLangSyncer(via="cuda_ipc")`: servers open slabs by handle; a CPU's memory, here."""

import asyncio
import time

import pytest
import torch
from torch.multiprocessing import reductions

from miles.errors import SyncError
from miles.sync import SGLangSyncer
from miles.sync._checksum import BLOCK
from miles.sync._sglang_payload import Block, Shared, by_handle
from miles.sync._sglang_slabs import DEPTH, Slabs
from tests.sync.test_sglang import Server, load, same, weights


class Memory:
    """A CPU's; what was allocated, by handle."""

    def __init__(self):
        self.held: dict[bytes, torch.Tensor] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def check(self, name, tensor):
        assert tensor.device.type == "cpu", name

    def allocate(self, device, nbytes):
        made = torch.full((nbytes,), 171, dtype=torch.uint8, device=device)
        return Shared(made, self._held(made))

    def allocation(self, tensor):
        """A storage, here."""
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage
        return storage.data_ptr(), storage.nbytes()

    def block(self, device, address, nbytes):
        storage = self.storages[address]
        assert storage.nbytes() == nbytes
        return self._held(torch.empty(0, dtype=torch.uint8).set_(storage))

    def _held(self, memory):
        handle = len(self.held).to_bytes(64, "little")
        self.held[handle] = memory
        return Block(memory.data_ptr(), memory.numel(), handle, "GPU-1")

    def rebuild(
        self, kind, size, stride, offset, storage, dtype, gpu, handle, nbytes, first, grad,
        counter, at, event, wait,
    ):  # fmt: skip
        """As torch's, with the types that it wants."""
        assert (kind, storage) == (torch.Tensor, torch.storage.TypedStorage)
        assert (stride, offset, gpu, first, grad, at, wait) == (
            (1,),
            0,
            "GPU-1",
            0,
            False,
            0,
            False,
        )
        assert type(counter) is bytes and type(event) is bytes and len(handle) == len(event) == 64
        assert nbytes == self.held[handle].numel()
        return self.held[handle][: size[0] * dtype.itemsize].view(dtype)


@pytest.fixture
def memory(monkeypatch):
    made = Memory()

    def rebuild(*arguments):
        return made.rebuild(*arguments)

    rebuild.__module__, rebuild.__qualname__ = reductions.__name__, "rebuild_cuda_tensor"
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    return made


def syncer_for(memory, *servers, bucket_bytes=BLOCK, **options):
    syncer = SGLangSyncer([s.url for s in servers], bucket_bytes=bucket_bytes, **options)
    syncer._memory, syncer._slabs = memory, Slabs(bucket_bytes, memory)
    return syncer


class Slow(Server):
    """Reads a bucket some time after it was called."""

    seconds = 0.05

    def update(self, name, body):
        if name == "update_weights_from_tensor":
            time.sleep(self.seconds)
        return super().update(name, body)

    def take(self, flat, metadata):
        super().take(flat.clone(), metadata)


def many(seed):
    return {f"{i}.{n}": t for i in range(4) for n, t in weights(seed + i).items()}


@pytest.mark.parametrize("stream", [False, True])
def test_slabs_are_used_again_once_the_server_has_read_them(memory, stream):
    with Slow("0.5.17") as server:
        syncer = syncer_for(memory, server)
        for version in range(1, 4):
            given = many(10 * version)
            report = syncer.push(iter(given.items()) if stream else given.items(), version=version)
            assert same(server.loaded, given) and report.num_buckets == 20
        assert len(memory.held) == DEPTH + 1
        syncer.close()


def test_a_stream_may_write_to_the_same_memory_again(memory):
    shared = torch.empty(3000)

    def stream():
        for value in range(6):
            yield str(value), shared.fill_(value)

    with Slow("0.5.21") as server:
        syncer = syncer_for(memory, server, bucket_bytes=6 * BLOCK)
        syncer.push(stream(), version=1)
        found = {name: tensor.unique().tolist() for name, tensor in server.loaded.items()}
        assert found == {str(value): [value] for value in range(6)}  # in whatever order
        syncer.close()


def test_as_many_calls_as_there_are_slabs_but_one_are_under_way(memory):
    under_way = []

    class Noting(Slow):
        now = 0

        async def update_weights_from_tensor(self, body):
            self.now += 1
            under_way.append(self.now)
            await asyncio.sleep(0.05)
            self.now -= 1
            return await super().update_weights_from_tensor(body)

    with Noting("0.5.17") as server:
        syncer = syncer_for(memory, server)
        syncer.push(many(1).items(), version=1)
        assert same(server.loaded, many(1)) and max(under_way) == DEPTH
        syncer.close()


def test_a_failure_is_told_when_all_calls_are_over_and_the_memory_is_given_up(memory):
    with Slow("0.5.17") as server:
        syncer = syncer_for(memory, server)
        server.fail_at = "update_weights_from_tensor 4"
        with pytest.raises(
            SyncError, match=r"the bucket of .* was not loaded: .*no memory is left"
        ):
            syncer.push(many(1).items(), version=1)
        calls = server.names().count("update_weights_from_tensor")
        time.sleep(3 * server.seconds)
        assert server.names().count("update_weights_from_tensor") == calls <= 4 + DEPTH
        syncer.push(many(5).items(), version=2)
        assert same(server.loaded, many(5)) and len(memory.held) == 2 * (DEPTH + 1)
        syncer.close()


def test_every_server_and_every_rank_of_one_opens_the_same_memory(memory):
    with Slow("0.5.17") as one, Slow("0.5.21") as other:
        other.info = {"tp_size": 2}
        syncer = syncer_for(memory, one, other)
        syncer.push(many(1).items(), version=1)
        assert same(one.loaded, many(1)) and same(other.loaded, many(1))
        payloads = [b["serialized_named_tensors"] for name, b in other.updates if "tensor" in name]
        assert all(len(both) == 2 and both[0] == both[1] for both in payloads)
        syncer.close()


def test_a_bucket_lies_in_blocks_and_a_large_weight_has_a_slab_of_its_size(memory):
    slabs = Slabs(2 * BLOCK, memory)
    given = {
        "a": torch.arange(5.0),
        "b": torch.ones(3, 4).T.bfloat16(),
        "empty": torch.empty(0, 2),
        "large": torch.randn(5000),
        "c": torch.tensor(7),
    }
    found = []
    for bucket in slabs.buckets(given.items(), together=True):
        content = load(by_handle(bucket))
        found.append([(w.name, w.start_idx, w.end_idx, w.numel) for w in content["metadata"]])
        for weight in content["metadata"]:
            data = content["flattened_tensor"][weight.start_idx : weight.end_idx]
            wanted = given[weight.name]
            assert torch.equal(data.clone().view(weight.dtype).reshape(weight.shape), wanted)
            end = -(-weight.end_idx // BLOCK) * BLOCK
            assert not content["flattened_tensor"][weight.end_idx : end].any()
    assert found == [
        [("a", 0, 20, 20), ("b", 4096, 4120, 24), ("empty", 8192, 8192, 0)],
        [("large", 0, 20000, 20000)],
        [("c", 0, 8, 8)],
    ]
    assert sorted(m.numel() for m in memory.held.values()) == [8192, 8192, 20480]


def test_names_that_come_twice_are_refused(memory):
    twice = [("a", torch.ones(1)), ("a", torch.ones(1))]
    with pytest.raises(SyncError, match="a came twice"):
        list(Slabs(BLOCK, memory).buckets(twice, together=True))


def test_the_driver_is_asked_for_memory_on_the_gpu_of_the_weights(monkeypatch):
    from miles.sync import _cuda_driver
    from miles.sync._sglang_slabs import CudaMemory

    block = torch.empty(1 << 23, dtype=torch.uint8)
    monkeypatch.setattr(_cuda_driver, "allocate", lambda index, nbytes: block[: nbytes + index])
    monkeypatch.setattr(_cuda_driver, "export", lambda index, address: bytes([index]) * 64)
    properties = type("Properties", (), {"uuid": "GPU-uuid"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for asked, nbytes in ((4096, 1 << 21), (1 << 21, 1 << 21), ((1 << 21) + 1, 1 << 22)):
        shared = CudaMemory().allocate(torch.device("cuda", 3), asked)
        assert shared.memory.numel() == nbytes + 3  # whole large pages, on device 3
        assert shared.block == Block(block.data_ptr(), nbytes + 3, bytes([3]) * 64, "GPU-uuid")
