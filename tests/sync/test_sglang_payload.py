"""The buckets that `SGLangSyncer` sends by value, by NCCL and through a folder."""

import torch

from miles.sync._sglang_payload import flat_buckets, groups
from tests.sync.test_sglang import weights


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


def test_weights_that_sglang_fuses_in_one_call_are_in_one_bucket():
    def stream():
        memory = torch.empty(300)
        for name in ("a.q_a_proj.weight", "a.q_b_proj.weight", "a.kv_a_proj_with_mqa.weight",
                     "a.o_proj.weight", "b.kv_a_proj_with_mqa.weight"):  # fmt: skip
            yield name, memory.fill_(len(name))  # over again

    for tight in (False, True):
        buckets = list(flat_buckets(stream(), bucket_bytes=2048, device="cpu", tight=tight))
        names = [[weight.name for weight in bucket.metadata] for bucket in buckets]
        assert names == [
            ["a.q_b_proj.weight"],
            ["a.q_a_proj.weight", "a.kv_a_proj_with_mqa.weight"],
            ["a.o_proj.weight"],
            ["b.kv_a_proj_with_mqa.weight"],
        ]
        for bucket in buckets:
            for weight in bucket.metadata:
                data = bucket.flat[weight.start_idx : weight.end_idx].view(weight.dtype)
                assert data.tolist() == [len(weight.name)] * 300
    assert [len(group) for group in groups(weights(1).items())] == [1] * 5


def test_a_copy_from_the_hosts_memory_is_over_when_a_generator_fills_that_again(monkeypatch):
    copy, going_on, empty = torch.Tensor.copy_, [], torch.empty

    def noted(self, source, non_blocking=False):
        going_on.append(non_blocking)
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    list(flat_buckets(weights(1).items(), bucket_bytes=4096, device="cuda"))
    assert going_on == [False] * 5
