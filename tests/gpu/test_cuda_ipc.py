"""CUDA IPC between two processes: what `tests/sync/test_ipc_protocol.py` says, on a GPU.

pytest tests/gpu/test_cuda_ipc.py
"""

import contextlib
import multiprocessing
import os
import time

import pytest
import torch

from miles.errors import SyncError
from miles.rollout import EngineProcess, HFEngine
from miles.sync import CudaIpcReceiver, CudaIpcSyncer, _bucket_sender, _copies, _kernels
from miles.sync._bucket_plan import unpack
from miles.sync._checksum import block_sums, checksum
from tests.models import generate_all, params, serving, tiny
from tests.sync.copying import both
from tests.sync.targets import Target, same

BUCKET = 1 << 20
DTYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.uint8]
SHAPES = [(257, 1031), (3,), (), (0, 4), (64, 64), (1000, 1000), (5, 7, 11)]


def model(seed: int, device: str = "cuda") -> dict[str, torch.Tensor]:
    """About 20 MB of every dtype, in odd shapes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{i}.{str(dtype).removeprefix('torch.')}": (
            torch.randn(shape, generator=generator).mul(50).clamp(-400, 400).to(dtype).to(device)
        )
        for dtype in DTYPES
        for i, shape in enumerate(SHAPES)
    }


class Served(Target):
    """Keeps nothing of old versions."""

    def commit_weights(self, tensors, *, version, alias=False):
        super().commit_weights(tensors, version=version, alias=alias)
        self.seen.clear()


def bits(tensors):
    return {name: tensor.cpu().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}


def serve(address: str, pipe, options: dict, visible: str | None) -> None:
    """The engine: answers (version, whether it serves `model(seed)`, bytes of the GPU in use)."""
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    target = Served(model(0))
    receiver = CudaIpcReceiver(target, address, **options)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            expected = bits(model(pipe.recv(), "cpu"))
            equal = same(bits(target.live), expected)
            free, total = torch.cuda.mem_get_info()
            pipe.send((target.weight_version, equal, total - free))
    receiver.close()


class Engine:
    def __init__(self, address, *, visible: str | None = None, **options) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (str(address), theirs, options, visible)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        assert self._pipe.poll(120) and self._pipe.recv() == "ready"

    def state(self, seed: int) -> tuple[int, bool, int]:
        self._pipe.send(seed)
        assert self._pipe.poll(120)
        return self._pipe.recv()

    def serves(self, version: int, seed: int) -> bool:
        return self.state(seed)[:2] == (version, True)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def address(tmp_path):
    return tmp_path / "weights"


@pytest.fixture(params=["direct", "slab"])
def direct(request):
    return request.param == "direct"


@pytest.fixture
def start(address, direct):
    engines = []

    def start(**options):
        engines.append(Engine(address, **{"direct": direct} | options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.kill()


@pytest.fixture
def syncer(address):
    syncer = CudaIpcSyncer(address, bucket_bytes=BUCKET, timeout=60)
    yield syncer
    syncer.close()


@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize("as_pairs", [dict.items, lambda d: iter(d.items())])
def test_three_versions_arrive_bit_for_bit(start, syncer, alias, as_pairs, direct):
    engine = start(alias=alias)
    for version in (1, 2, 3):
        report = syncer.push(as_pairs(model(version)), version=version)
        assert engine.serves(version, version)
    assert report.num_buckets > 5 and report.copied_bytes == report.num_bytes * (2 - direct)


def test_values_are_cast_on_the_way(start, syncer):
    engine = start()
    wide = {n: t.double() if t.dtype == torch.bfloat16 else t for n, t in model(1).items()}
    syncer.push(wide.items(), version=1)
    assert engine.serves(1, 1)


def test_one_launch_copies_and_sums_as_the_reference_does():
    assert _kernels.of(torch.device("cuda")) is not None
    both(torch.device("cuda", 0), _copies.copy, exact=False)


@pytest.mark.parametrize("megabytes", [1, 700, 3000])
def test_sums_of_much_memory_are_those_of_the_cpu(megabytes):
    data = torch.randint(-(2**62), 2**62, (megabytes << 17,), device="cuda").view(torch.uint8)
    sums = block_sums(data, version=3)
    step = 64 << 20
    for start in range(0, len(data), step):
        part = block_sums(data[start : start + step].cpu(), version=3)
        assert torch.equal(part, sums[start // 4096 :][: len(part)].cpu())
    assert checksum(data[: 64 << 20]) == checksum(data[: 64 << 20].cpu())


def awkward(weights):
    """The same values in ways that take a copy more: strided, cast, at odd addresses."""
    found = {}
    for i, (name, tensor) in enumerate(weights.items()):
        if tensor.dim() == 2 and i % 2:
            found[name] = tensor.T.contiguous().T
        elif tensor.dtype == torch.bfloat16:
            found[name] = tensor.double() if i % 4 else tensor.float()
        else:
            found[name] = torch.cat([tensor.view(-1)[:0], tensor.new_zeros(1), tensor.view(-1)])[1:]
            found[name] = found[name].view(tensor.shape)
    return found


def test_strided_cast_and_misaligned_tensors_arrive(start, syncer):
    engine = start()
    for version in (1, 2):
        syncer.push(awkward(model(version)).items(), version=version)
        assert engine.serves(version, version)


def test_tensors_that_move_between_pushes_and_come_in_another_order_arrive(start, syncer):
    engine = start()
    syncer.push(model(1).items(), version=1)
    weights = model(2)  # elsewhere in memory
    syncer.push(dict(reversed(weights.items())).items(), version=2)
    assert engine.serves(2, 2)
    for tensor in weights.values():  # in place, as an optimizer does
        tensor.copy_(tensor.clone())
    syncer.push(weights.items(), version=3)
    assert engine.serves(3, 2)


def test_a_trainer_without_triton_pushes_the_same(start, syncer, monkeypatch):
    monkeypatch.setattr(_kernels, "of", lambda device: None)
    engine = start()
    syncer.push(model(1).items(), version=1)
    assert engine.serves(1, 1)


def test_two_hundred_syncs_leak_nothing(start, syncer):
    engine, weights = start(), model(1)
    used = {}
    for version in range(1, 201):
        if version % 50 == 0:  # a new connection, a new slab
            syncer.close()
        syncer.push(weights.items(), version=version)
        if version in (60, 200):
            used[version] = engine.state(1)
    assert [state[:2] for state in used.values()] == [(60, True), (200, True)]
    assert used[200][2] - used[60][2] < 8 << 20


def test_a_receiver_killed_during_a_push_is_an_error_and_its_successor_is_served(start, syncer):
    engine = start()
    syncer.push(model(1).items(), version=1)

    def deadly():
        for i, pair in enumerate(model(2).items()):
            yield pair
            if i == 10:
                engine.kill()

    with pytest.raises(SyncError, match=r"receiver went away .*version 2 was not pushed"):
        syncer.push(deadly(), version=2)
    assert torch.ones(1000, device="cuda").sum().item() == 1000  # this context lives
    successor = start()
    syncer.push(model(3).items(), version=3)
    assert successor.serves(3, 3)


def push_slowly(address: str, begun) -> None:
    def slowly():
        for i, pair in enumerate(model(2).items()):
            yield pair
            if i == 10:
                begun.set()
                time.sleep(60)

    CudaIpcSyncer(address, bucket_bytes=BUCKET).push(slowly(), version=2)


def test_a_sender_killed_during_a_push_leaves_the_old_version_and_makes_room(
    start, syncer, address
):
    engine = start()
    syncer.push(model(1).items(), version=1)
    syncer.close()
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    other = context.Process(target=push_slowly, args=(str(address), begun), daemon=True)
    other.start()
    assert begun.wait(120)
    with pytest.raises(SyncError, match=rf"another sender \(process {other.pid}\) is connected"):
        syncer.push(model(3).items(), version=3)
    other.kill()
    other.join()
    assert engine.serves(1, 1)
    syncer.push(model(3).items(), version=3)
    assert engine.serves(3, 3)


def test_a_flipped_byte_is_found_on_the_device(start, syncer, monkeypatch, direct):
    engine = start()
    syncer.push(model(1).items(), version=1)
    send = _bucket_sender.send

    def flipping(connection, message, fds=()):
        if message.get("bucket") == 3:
            session = syncer._session
            number, begin, _ = next(unpack(message["pieces"], session._layout))
            if direct:
                session._staging[session._buffer][session._layout.offsets[number] + begin] ^= 1
            else:
                session._slab[3 % 2 * _bucket_sender.slot_bytes(BUCKET)] ^= 1
            torch.cuda.synchronize()
        send(connection, message, fds)

    monkeypatch.setattr(_bucket_sender, "send", flipping)
    with pytest.raises(SyncError, match="arrived with another checksum, in bucket 3"):
        syncer.push(model(2).items(), version=2)
    monkeypatch.undo()
    assert engine.serves(1, 1)
    syncer.push(model(2).items(), version=2)
    assert engine.serves(2, 2)


def test_tensors_on_the_cpu_and_versions_that_go_back_are_refused(start, syncer):
    engine = start()
    with pytest.raises(SyncError, match="is on cpu; expected a CUDA tensor"):
        syncer.push(model(2, "cpu").items(), version=2)
    syncer.push(model(2).items(), version=2)
    with pytest.raises(SyncError, match="version 1 is older than 2"):
        syncer.push(model(1).items(), version=1)
    assert engine.serves(2, 2)


def test_one_process_is_told_to_do_without(address, direct):
    receiver = CudaIpcReceiver(Served(model(0)), address, direct=direct)
    with pytest.raises(SyncError, match="one process"):
        CudaIpcSyncer(address).push(model(1).items(), version=1)
    receiver.close()


def test_an_engine_with_tensors_on_the_cpu_is_refused(address):
    with pytest.raises(SyncError, match="is on cpu; expected all tensors on one GPU"):
        CudaIpcReceiver(Served(model(0) | {"odd": torch.zeros(2)}), address)


def test_expandable_segments_do_no_harm(start, syncer):
    engine = start()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        weights = {n: torch.empty_like(t).copy_(t) for n, t in model(1).items()}
        weights["5.float32"] = torch.empty(64 << 20, device="cuda")[:1000000].view(1000, 1000)
        weights["5.float32"].copy_(model(1)["5.float32"])
        syncer.push(weights.items(), version=1)
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    assert engine.serves(1, 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_of_one_host_under_different_names(start, syncer, direct):
    ours = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    engine = start(visible=ours[1])  # our cuda:1 is its cuda:0
    if not direct:
        with pytest.raises(SyncError, match="not visible here"):  # the slab's GPU
            syncer.push(model(1).items(), version=1)
        return
    syncer.push(model(1).items(), version=1)
    assert engine.serves(1, 1)


def engine_of(address: str, alias: bool) -> HFEngine:
    engine = HFEngine(tiny("llama", seed=0).bfloat16().cuda())
    engine.receiver = CudaIpcReceiver(engine, address, alias=alias)
    return engine


@pytest.mark.parametrize("alias", [True, False])
def test_an_engine_process_answers_with_the_trainers_weights(address, alias):
    prompts = [[1, 2, 3], [4, 5], [6]]
    engine = EngineProcess(engine_of, str(address), alias)
    syncer = CudaIpcSyncer(address, bucket_bytes=BUCKET)
    for version in (1, 2, 3):
        trainer = tiny("llama", seed=version).cuda()
        syncer.push(trainer.state_dict().items(), version=version)
        got = generate_all(engine, prompts, params(16))
        assert all(sample.weight_versions == [version] for sample in got)
        with serving(trainer.bfloat16()) as local:
            expected = generate_all(local, prompts, params(16))
        assert [sample.tokens for sample in got] == [sample.tokens for sample in expected]
    syncer.close()
    engine.close()
