"""The buckets that `SGLangSyncer` sends, and their handles on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions

from miles.errors import SyncError
from miles.sync import _sglang_payload
from miles.sync._sglang_payload import flat_buckets
from tests.sync.test_sglang import load, weights


def test_a_weight_larger_than_a_bucket_has_one_of_its_own():
    given = {"a": torch.ones(4), "b": torch.ones(5000), "c": torch.ones(4)}
    buckets = list(flat_buckets(given.items(), bucket_bytes=1024, device="cpu"))
    assert [bucket.names for bucket in buckets] == ["a", "b", "c"]
    assert [bucket.flat.numel() for bucket in buckets] == [16, 20000, 16]


def test_every_weight_is_aligned_with_gaps_and_without():
    for tight in (False, True):
        for bucket in flat_buckets(
            weights(1).items(), bucket_bytes=4096, device="cpu", tight=tight
        ):
            end = 0
            for weight in bucket.metadata:
                assert weight.start_idx % (weight.dtype.itemsize if tight else 256) == 0
                assert not tight or weight.start_idx == end
                end = weight.end_idx


def test_on_a_gpu_the_handle_carries_its_uuid_and_torchs_own_rebuild(monkeypatch):
    handle = (
        "cls",
        (8,),
        (1,),
        0,
        "storage",
        torch.uint8,
        3,
        b"h" * 65,
        8,
        0,
        False,
        b"r",
        0,
        b"e",
        True,
    )
    monkeypatch.setattr(
        reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, handle)
    )
    properties = SimpleNamespace(uuid="GPU-uuid")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    seen = []
    bucket = next(flat_buckets(weights(1).items(), bucket_bytes=4096, device="cpu"))
    payload = _sglang_payload.by_handle(bucket)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *args: seen.append(args))
    assert load(payload)["metadata"][0].name == "embed"
    assert seen == [(*handle[:6], "GPU-uuid", *handle[7:])]


def test_memory_that_cannot_be_shared_is_explained(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("invalid argument")

    monkeypatch.setattr(reductions, "reduce_tensor", refuse)
    bucket = next(flat_buckets(weights(1).items(), bucket_bytes=4096, device="cpu"))
    with pytest.raises(SyncError, match=r"invalid argument.*expandable_segments"):
        _sglang_payload.by_handle(bucket)
    segment = {"address": bucket.flat.data_ptr(), "total_size": 9, "is_expandable": True}
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [segment])
    with pytest.raises(SyncError, match="expandable segment"):
        _sglang_payload.check_exportable(bucket.flat)
