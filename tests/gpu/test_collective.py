"""Weights between GPUs over NCCL; bandwidth against a plain broadcast is printed (`-s`)."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles.errors import SettingError, SyncError
from miles.sync import CollectiveReceiver, CollectiveSyncer
from miles.sync._bucket_plan import Layout
from miles.sync._checksum import checksum
from miles.sync._inbox import Inbox
from miles.sync._outbox import Outbox
from tests.sync.targets import Target

BUCKET = 256 << 20
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def layers(num_bytes, device, seed=0):
    """bf16 tensors in the sizes of an 8B model's layers, and odd ones of other dtypes."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [(14336, 4096), (4096, 14336), (14336, 4096), (4096, 4096), (1024, 4096), (4096,)]
    found, held = {}, 0
    while held < num_bytes:
        for index, size in enumerate(sizes):
            name = f"layers.{len(found)}.{index}"
            found[name] = torch.empty(size, dtype=torch.bfloat16, device=device)
            found[name].normal_(generator=generator)
            held += found[name].nbytes
    found["odd"] = torch.arange(13, device=device, dtype=torch.float32) + seed
    found["byte"] = torch.arange(7, device=device, dtype=torch.uint8) + seed
    return found


def target_like(tensors):
    return Target({name: torch.zeros_like(t) for name, t in tensors.items()}, notes=False)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_checksums_are_the_same_number_on_both_devices():
    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn):
        for size in (0, 1, 255, 4096, 1_000_003, 40_000_000):
            data = torch.randint(0, 255, (size * dtype.itemsize,), dtype=torch.uint8)
            tensor = data.view(dtype)
            assert checksum(tensor) == checksum(tensor.cuda())


@pytest.mark.parametrize("stream", [False, True])
def test_buckets_on_a_gpu_have_the_sums_of_their_blocks(stream):
    tensors = layers(1 << 28, "cuda")
    tensors["rounded"] = torch.randn(5000, 64, device="cuda")
    specs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    specs["rounded"] = ((5000, 64), torch.bfloat16)
    where, size = Layout(specs), 1 << 26
    outbox = Outbox(specs, size, torch.device("cuda"))
    inbox = Inbox(where, torch.empty(where.nbytes, dtype=torch.uint8, device="cuda"), size, 1)
    given = iter(tensors.items()) if stream else list(tensors.items())
    for bucket in outbox.fill(given, 1, lambda: None):
        data = inbox.place(bucket.index, bucket.data.numel(), bucket.packed).copy_(bucket.data)
        inbox.arrived(bucket.index, data)
    tensors["rounded"] = tensors["rounded"].bfloat16()
    assert equal(inbox.check(outbox.sums), tensors)
    on_cpu = Outbox(specs, size, torch.device("cpu"))
    for _ in on_cpu.fill([(n, t.cpu()) for n, t in tensors.items()], 1, lambda: None):
        pass
    assert torch.equal(on_cpu.sums, outbox.sums.cpu())


def launch(worker, folder, *args, backend="cpu:gloo,cuda:nccl"):
    mp.spawn(_rank, (worker, str(folder), backend, args), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(rank, worker, folder, backend, args):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(f"{folder}/store", 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    result = worker(rank, *args)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.cuda.synchronize()
    os._exit(0)  # a group that was aborted is not destroyed twice


def attempt(function):
    try:
        return function()
    except SyncError as error:
        return str(error)


def session(rank):
    tensors = layers(1 << 30, f"cuda:{rank}", seed=1)
    if rank == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=1 << 26, timeout=60)
        reports = [syncer.push(tensors.items(), version=1)]
        reports.append(attempt(lambda: syncer.push(list(tensors.items())[:-1], version=2)))
        reports.append(attempt(lambda: syncer.push(tensors.items(), version=3)))
        reports.append(syncer.push(tensors.items(), version=4))
        syncer.close()
        return reports
    target = target_like(tensors)
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=60)
    seen = [receiver.receive_once(), equal(target.live, tensors)]
    seen.append(attempt(receiver.receive_once))
    arrived = Inbox.arrived

    def flip(inbox, index, data):
        data[12345] ^= 4
        arrived(inbox, index, data)

    Inbox.arrived = flip
    seen.append(attempt(receiver.receive_once))
    Inbox.arrived = arrived
    seen.append(target.weight_version)
    receiver.start()  # a thread, whose current device is another one
    receiver.join(60)
    return [*seen, target.weight_version, equal(target.live, tensors), str(receiver.error)]


@two_gpus
def test_weights_arrive_over_nccl_and_faults_leave_the_old_ones(tmp_path):
    sent, seen = launch(session, tmp_path)
    assert seen[:2] == [1, True]
    assert "missing tensors ['byte']" in sent[1] and "1 is still served" in seen[2]
    assert "arrived with another checksum" in sent[2] and "rank 1" in sent[2]
    assert seen[4:] == [1, 4, True, "None"]
    assert sent[3].num_buckets >= 16


def lost(rank):
    tensors = layers(1 << 28, f"cuda:{rank}")
    if rank == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=1 << 26, timeout=15)
        syncer.push(tensors.items(), version=1)
        begun = time.monotonic()
        text = attempt(lambda: syncer.push(tensors.items(), version=2))
        return text, time.monotonic() - begun
    target = target_like(tensors)
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=15)
    receiver.receive_once()
    count, finish = [], receiver._link.finish

    def dying(work):
        count.append(work)
        if len(count) == 2:
            torch.save(None, os.environ["LOST"])
            os._exit(0)
        finish(work)

    receiver._link.finish = dying
    receiver.receive_once()


@two_gpus
def test_a_receiver_that_dies_ends_the_push_within_its_time_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("LOST", str(tmp_path / "1.pt"))
    (text, seconds), _ = launch(lost, tmp_path)
    assert "rank 1" in text and "make a new process group" in text
    assert seconds < 60


def no_cpu_backend(rank):
    try:
        CollectiveSyncer(dist.group.WORLD)
    except SettingError as error:
        return str(error)


@two_gpus
def test_a_group_of_nccl_alone_is_refused_with_what_to_do(tmp_path):
    for text in launch(no_cpu_backend, tmp_path, backend="nccl"):
        assert "cpu:gloo,cuda:nccl" in text


def bandwidth(rank, num_bytes, alias):
    device = f"cuda:{rank}"
    tensors = layers(num_bytes, device, seed=2)
    size = sum(tensor.nbytes for tensor in tensors.values())
    plain = torch.empty(BUCKET, dtype=torch.uint8, device=device)
    rows = []
    for _ in range(4):
        torch.cuda.synchronize()
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(size // BUCKET):
            dist.broadcast(plain, 0)
        torch.cuda.synchronize()
        rows.append(size // BUCKET * BUCKET / (time.perf_counter() - begun) / 1e9)
    if rank == 0:
        syncer = CollectiveSyncer(dist.group.WORLD, bucket_bytes=BUCKET, timeout=60)
        reports = [syncer.push(tensors.items(), version=v) for v in range(1, 5)]
        syncer.close()
        return max(rows[1:]), reports
    target = target_like(tensors)
    receiver = CollectiveReceiver(target, dist.group.WORLD, timeout=60, alias=alias)
    receiver.serve()
    return equal(target.live, tensors)


@two_gpus
@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize("gigabytes", [4, 16])
def test_bandwidth_against_a_plain_broadcast(tmp_path, gigabytes, alias):
    (plain, reports), right = launch(bandwidth, tmp_path, gigabytes * 10**9, alias)
    assert right
    best = min(reports[1:], key=lambda report: report.seconds)
    rate = best.num_bytes / best.seconds / 1e9
    print(f"\nalias={alias}: {best.summary()}")
    print(f"dist.broadcast {plain:.1f} GB/s, push {rate:.1f} GB/s: {rate / plain:.0%}")
    sent = best.num_bytes / (best.phases["gather"] + best.phases["send"]) / 1e9
    print(f"without load and commit: {sent:.1f} GB/s, {sent / plain:.0%}")
