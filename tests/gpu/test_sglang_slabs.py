"""Slabs as servers take them: opened, read and closed by another process, which `-s` times."""

import base64
import multiprocessing
import pickle
import statistics
import time
from unittest import mock

import pytest
import torch
from torch.multiprocessing import reductions

from miles.sync import _cuda_driver
from miles.sync._sglang_payload import FlatBucket, Shared, by_handle, described
from miles.sync._sglang_slabs import PAGE, CudaMemory

REBUILD = reductions.rebuild_cuda_tensor
DEVICE = torch.device("cuda", 0)


def rebuild(*arguments):
    """As SGLang's, which has the GPU's UUID where torch has its index."""
    return REBUILD(*arguments[:6], DEVICE.index, *arguments[7:])


def serve(pipe):
    """Answers a payload with its weights, and with seconds that it took to open and to close."""
    torch.zeros(1, device=DEVICE)
    while payload := pipe.recv():
        opening, closing = [], []
        for _ in range(11):
            start = time.perf_counter()
            with mock.patch.object(reductions, "rebuild_cuda_tensor", rebuild):
                content = pickle.loads(base64.b64decode(payload))
            opening.append(time.perf_counter() - start)
            flat = content["flattened_tensor"]
            parts = [flat[w.start_idx : w.end_idx].cpu() for w in content["metadata"]]
            start = time.perf_counter()
            del content, flat
            closing.append(time.perf_counter() - start)
        pipe.send((parts, statistics.median(opening), statistics.median(closing)))


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield pipe
    pipe.send(None)
    process.join(20)


@pytest.mark.parametrize("whole_pages", [True, False])
@pytest.mark.parametrize("nbytes", [4096, 1 << 29, (1 << 29) + 4096, 151936 * 4096 * 2])
def test_another_process_opens_a_slab(server, nbytes, whole_pages):
    memory = CudaMemory()
    if whole_pages:
        shared = memory.allocate(DEVICE, nbytes)
        assert shared.memory.numel() % PAGE == 0
    else:  # for comparison
        block = _cuda_driver.allocate(DEVICE.index, nbytes)
        made = memory.block(DEVICE, block.data_ptr(), nbytes)
        shared = Shared(block, made)
    first, last = torch.arange(16.0), torch.arange(9, dtype=torch.int64)
    bucket = FlatBucket(shared.memory[:nbytes], shared=shared)
    for name, tensor, start in (("first", first, 0), ("last", last, nbytes - 256)):
        shared.memory[start : start + tensor.nbytes] = tensor.view(torch.uint8).cuda()
        bucket.metadata.append(described(name, tensor, start))
    torch.cuda.synchronize()
    server.send(by_handle(bucket))
    assert server.poll(100)
    parts, opening, closing = server.recv()
    assert torch.equal(parts[0], first.view(torch.uint8))
    assert torch.equal(parts[1], last.view(torch.uint8))
    pages = "whole pages" if whole_pages else "as asked"
    print(f"{nbytes >> 20} MiB, {pages}: open {1e3 * opening:.2f} ms, close {1e3 * closing:.2f} ms")
