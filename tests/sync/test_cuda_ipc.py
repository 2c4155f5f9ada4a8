"""What `CudaIpcSyncer` says where it cannot work; that it works is in `tests/gpu`."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from miles.errors import SyncError
from miles.sync import CudaIpcReceiver, CudaIpcSyncer, _cuda_driver, cuda_ipc
from miles.sync.cuda_ipc import CudaMemory
from tests.sync.targets import Target

GPUS = ["GPU-a", "GPU-b"]


@pytest.fixture
def two_gpus(monkeypatch):
    """As torch would tell of them."""
    properties = [SimpleNamespace(uuid=uuid) for uuid in GPUS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)


@pytest.fixture
def memory(two_gpus):
    return CudaMemory(torch.device("cuda:0"), own_stream=False)


def shared(**changes):
    return {"gpu": "GPU-a", "handle": "00" * 64, "nbytes": 8, "process": "another"} | changes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_names_the_carrier_to_use(tmp_path):
    for make in (lambda: CudaIpcSyncer(tmp_path / "w"), lambda: CudaIpcReceiver(Target(), "w")):
        with pytest.raises(SyncError, match=r"no CUDA device.*SharedMemory"):
            make()


def test_an_engine_on_the_cpu_is_refused_by_the_name_of_its_tensor(two_gpus, tmp_path):
    with pytest.raises(SyncError, match=r"weight of the engine is on cpu.*SharedMemoryReceiver"):
        CudaIpcReceiver(Target(), tmp_path / "w")


def test_memory_of_this_very_process_is_not_attached(memory):
    with pytest.raises(SyncError, match=r"one process.*InProcessSyncer"):
        memory.attach(shared(process=cuda_ipc._PROCESS), [])


def test_a_gpu_that_is_not_visible_is_named(memory):
    with pytest.raises(SyncError, match=r"GPU-c, which is not visible here; got \['GPU-a'"):
        memory.attach(shared(gpu="GPU-c"), [])


def test_the_gpu_is_found_by_its_uuid(memory, monkeypatch):
    asked = []

    def attach(index, handle, nbytes):
        asked.append((index, handle, nbytes))
        raise SyncError("cuIpcOpenMemHandle_v2 failed with 1: invalid argument")

    monkeypatch.setattr(_cuda_driver, "attach", attach)
    with pytest.raises(SyncError, match=r"cannot be attached \(cuIpcOpen.*--ipc=host"):
        memory.attach(shared(gpu="GPU-b", handle="07" * 64), [])
    assert asked == [(1, b"\x07" * 64, 8)]


def test_tensors_on_the_cpu_or_out_of_reach_are_named(memory):
    with pytest.raises(SyncError, match=r"w is on cpu; expected a CUDA tensor"):
        memory.check("w", torch.zeros(1))
    memory.check("w", SimpleNamespace(device=torch.device("cuda:0")))
    with pytest.raises(SyncError, match=r"w is on cuda:1, from where cuda:0 cannot be reached"):
        memory.check("w", SimpleNamespace(device=torch.device("cuda:1")))


class Driver:
    """Fails as told, and notes what was called."""

    def __init__(self, codes=()):
        self.codes, self.calls = list(codes), []

    @contextlib.contextmanager
    def device(self, index):
        yield

    def call(self, name, *args):
        self.calls.append(name)
        if self.codes and (code := self.codes.pop(0)):
            raise _cuda_driver._DriverError(name, code, "told to")


def test_when_memory_is_short_torchs_cache_is_given_back_first(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(_cuda_driver._Block, "tensor", lambda self: "memory")
    monkeypatch.setattr(_cuda_driver, "_driver", lambda: Driver())
    driver = Driver([2, 0])
    monkeypatch.setattr(_cuda_driver, "_driver", lambda: driver)
    assert _cuda_driver.allocate(0, 100) == "memory" and emptied == [True]
    driver.codes = [2, 2]
    with pytest.raises(SyncError, match=r"cuda:0 has no 5.00 GB left.*1.07 of 85.90 GB are free"):
        _cuda_driver.allocate(0, 5_000_000_000)


def test_a_block_is_freed_with_its_last_view(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(_cuda_driver, "_driver", lambda: driver)
    block = _cuda_driver._Block(0, 4096, 8, "cuMemFree_v2")
    assert block.__cuda_array_interface__["data"] == (4096, False)
    del block
    assert driver.calls == ["cuMemFree_v2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA driver")
def test_without_a_driver_the_error_says_so():
    with pytest.raises(SyncError, match=r"driver"):
        _cuda_driver._Driver()
