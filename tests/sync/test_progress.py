"""Bars of the carriers that show one, and the phases that the others' reports tell apart."""

import sys
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miles.errors import MissingExtraError, SettingError, SyncError
from miles.sync import (
    CudaIpcSyncer,
    DiskSyncer,
    InProcessSyncer,
    SGLangSyncer,
    SharedMemoryReceiver,
    SharedMemorySyncer,
    cuda_ipc,
)
from miles.sync._bucket_receiver import BucketReceiver
from miles.sync._bucket_sender import BucketSender
from miles.sync._checksum import BLOCK
from miles.sync._memory import FileMemory
from tests.sync.targets import Target
from tests.sync.test_sglang import Server

WEIGHTS = {"big": torch.arange(5000.0), "half": torch.ones(7).bfloat16(), "none": torch.empty(0)}
NBYTES = 20014


@pytest.fixture
def bars(monkeypatch):
    """What tqdm was asked for."""
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.moved = options, []
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.ended = True

        def update(self, moved):
            self.moved.append(moved)

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    return made


@pytest.fixture
def carrier(tmp_path):
    """Makes a syncer, with what is at its other end."""
    with ExitStack() as stack:

        def make(kind, **options):
            address, target = tmp_path / "weights", Target({n: t * 0 for n, t in WEIGHTS.items()})
            if kind == "shm":
                stack.enter_context(closing(SharedMemoryReceiver(target, address)))
                syncer = SharedMemorySyncer(address, **options)
            elif kind in ("direct", "slab"):
                receiver = BucketReceiver(
                    target, address, memory=FileMemory(), direct=kind == "direct"
                )
                stack.enter_context(closing(receiver))
                options |= {"bucket_bytes": 2 * BLOCK}
                syncer = BucketSender(address, memory=FileMemory(), **options)
            elif kind == "in process":
                syncer = InProcessSyncer(target, **options)
            elif kind == "disk":
                syncer = DiskSyncer(address, **options)
            else:
                server = stack.enter_context(Server("0.5.21"))
                options |= {"folder": tmp_path} if kind == "files" else {}
                via = "disk" if kind == "files" else kind
                syncer = SGLangSyncer(server.url, via=via, bucket_bytes=4096, **options)
            return stack.enter_context(closing(syncer))

        yield make


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["shm", "direct", "slab", "disk", "value", "files"])
def test_a_bar_comes_to_its_end_with_the_push(carrier, bars, kind, stream):
    syncer = carrier(kind, progress=True)
    for version in (1, 2):
        given = WEIGHTS.items()
        syncer.push(iter(given) if stream else given, version=version)
    for version, bar in enumerate(bars, 1):
        assert sum(bar.moved) == NBYTES and bar.ended
        assert bar.options["delay"] == 1.0 and bar.options["desc"] == f"weights {version}"
        unknown = version == 1 and (kind == "disk" or (stream and kind in ("value", "files")))
        assert bar.options["total"] == (None if unknown else NBYTES)
    assert len(bars) == 2
    assert syncer.push(WEIGHTS.items(), version=2).num_tensors == 0 and len(bars) == 2


@pytest.mark.parametrize("kind", ["shm", "direct", "value"])
def test_no_bar_is_made_unless_it_is_asked_for(carrier, bars, kind):
    carrier(kind).push(WEIGHTS.items(), version=1)
    assert not bars


@pytest.mark.parametrize("kind", ["shm", "direct", "value"])
def test_a_bar_without_tqdm_says_what_to_install_and_the_next_push_is_whole(
    carrier, monkeypatch, kind
):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    syncer = carrier(kind, progress=True)
    with pytest.raises(MissingExtraError, match="tqdm"):
        syncer.push(WEIGHTS.items(), version=1)
    monkeypatch.undo()
    assert syncer.push(WEIGHTS.items(), version=1).num_tensors == 3


def test_a_push_that_fails_ends_its_bar(carrier, bars):
    def breaking():
        yield "big", WEIGHTS["big"]
        raise ZeroDivisionError

    for kind in ("shm", "direct", "value"):
        with pytest.raises(ZeroDivisionError):
            carrier(kind, progress=True).push(breaking(), version=1)
    assert [(bar.moved, bar.ended) for bar in bars] == [([20000], True)] * 3


def test_the_gpus_carrier_passes_it_on(monkeypatch):
    monkeypatch.setattr(cuda_ipc, "_current_device", lambda: None)
    monkeypatch.setattr(cuda_ipc, "CudaMemory", lambda device, own_stream: FileMemory())
    for progress in (True, False):
        assert CudaIpcSyncer("weights", progress=progress)._progress == progress


@pytest.mark.parametrize(
    ("kind", "phases"),
    [
        ("shm", {"gather", "send", "load", "commit", "pause"}),
        ("in process", {"gather", "commit", "pause"}),
    ],
)
def test_a_report_tells_phases_apart(carrier, kind, phases):
    report = carrier(kind).push(WEIGHTS.items(), version=1)
    assert set(report.phases) == phases and min(report.phases.values()) >= 0
    parts = sum(report.phases.values()) - report.phases["pause"]
    assert 0 < parts <= report.seconds and report.phases["pause"] == report.phases["commit"]
    assert report.summary().splitlines()[1].startswith("  gather 0.")
    assert carrier(kind).push(WEIGHTS.items(), version=0).phases == {}


@pytest.mark.parametrize("kind", ["shm", "direct", "in process", "disk"])
def test_versions_are_integers_of_whatever_kind(carrier, kind):
    syncer = carrier(kind)
    assert type(syncer.push(WEIGHTS.items(), version=np.int64(2)).version) is int
    for version in ("3", 3.5, True, None, np.float32(3)):
        with pytest.raises(SettingError, match="expected an integer"):
            syncer.push(WEIGHTS.items(), version=version)


@pytest.mark.parametrize("stream", [iter, list])
@pytest.mark.parametrize("kind", ["shm", "direct", "slab", "in process", "disk"])
def test_a_tensor_without_values_is_called_so(carrier, kind, stream):
    given = WEIGHTS | {"big": torch.empty(5000, device="meta")}
    with pytest.raises(SyncError, match=r"big is on the meta device, where tensors have no values"):
        carrier(kind).push(stream(given.items()), version=1)
