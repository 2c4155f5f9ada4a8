"""`SGLangSyncer(via="cuda_ipc")`: weights read where they are, which is a CPU's memory here."""

import pytest
import torch

from miles.errors import SyncError
from miles.sync._checksum import BLOCK
from miles.sync._sglang_in_place import split
from tests.sync.test_sglang import load, same, weights
from tests.sync.test_sglang_slabs import Memory, Slow, memory, syncer_for

__all__ = ["memory"]  # a fixture


def pooled(given):
    """The same values in one allocation, as a Megatron trainer holds them."""
    pool, at, found = (
        torch.empty(sum(16 + t.nbytes for t in given.values()), dtype=torch.uint8),
        8,
        {},
    )
    for name, tensor in given.items():
        at += -at % 8
        view = pool[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        found[name] = view.copy_(tensor)
        at += tensor.nbytes
    return found


def test_one_call_reads_all_that_lies_in_large_allocations(memory):
    with Slow("0.5.17") as server:
        server.architectures = ["Qwen3ForCausalLM"]
        syncer = syncer_for(memory, server)
        for version in (1, 2):
            given = pooled(weights(version))
            report = syncer.push(given.items(), version=version)
            assert same(server.loaded, given)
            assert report.num_buckets == 1 and report.copied_bytes == report.num_bytes
        assert len(memory.held) == 2  # no slab was made
        syncer.close()


@pytest.mark.parametrize(
    "how",
    [
        "generator",
        "in_place=False",
        "small",
        "no handle",
        "another model",
        "two ranks",
        "two trainers",
    ],
)
def test_buckets_are_made_of_what_cannot_be_read_in_place(memory, monkeypatch, how):
    if how == "no handle":
        monkeypatch.setattr(Memory, "block", lambda *arguments: None)
    with Slow("0.5.17") as server:
        server.architectures = [
            "GemmaForCausalLM" if how == "another model" else "LlamaForCausalLM"
        ]
        server.info = {"tp_size": 2 if how == "two ranks" else 1}
        syncer = syncer_for(
            memory, server, bucket_bytes=1 << 20 if how == "small" else BLOCK,
            in_place=False if how == "in_place=False" else None,
        )  # fmt: skip
        syncer._trainers.alone = how != "two trainers"  # as far as it asks
        given = pooled(weights(1))
        report = syncer.push(
            iter(given.items()) if how == "generator" else given.items(), version=1
        )
        assert same(server.loaded, given)
        assert report.num_buckets == (1 if how == "small" else 5)
        assert report.copied_bytes == 2 * report.num_bytes
        syncer.close()


@pytest.mark.parametrize(("count", "here"), [(BLOCK // 4, True), (BLOCK // 4 - 1, False)])
def test_an_allocation_of_a_sixteenth_of_a_bucket_is_worth_a_servers_opening_it(
    memory, count, here
):
    with Slow("0.5.17") as server:
        server.architectures = ["LlamaForCausalLM"]
        syncer = syncer_for(memory, server, bucket_bytes=16 * BLOCK)
        report = syncer.push({"w": torch.arange(float(count))}.items(), version=1)
        assert (report.copied_bytes == report.num_bytes) == here
        assert server.loaded["w"].numel() == count
        syncer.close()


def test_each_weight_goes_one_way(memory):
    pool = torch.arange(4000.0)
    given = {
        "in the pool": pool[:3000].view(30, 100),
        "transposed": pool[3000:3600].view(20, 30).T,
        "every other": pool[3600::2],
        "a column": pool[3000:3300, None],
        "negated": torch._neg_view(pool[:5]),
        "alone": torch.arange(7.0),
        "empty": pool[:0],
        "a parameter": torch.nn.Parameter(pool[3500:3502]),
    }
    here, others = split(given.items(), memory, 12000)
    left = ["transposed", "every other", "negated", "empty", "alone"]
    assert [name for name, _ in others] == left  # loaders may view what they get
    assert here.names == "in the pool to a parameter"
    assert here.nbytes == 4 * (3000 + 300 + 2)
    found = dict(load(here.payload))
    assert set(found) == set(given) - set(left) and len(memory.held) == 1
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name].detach()) and not tensor.requires_grad
    pool += 1
    assert torch.equal(found["a column"], given["a column"])  # a view, not a copy


def test_one_allocation_may_hold_several_dtypes(memory):
    given = pooled(weights(3))
    here, others = split(given.items(), memory, 1)
    assert not others and same(dict(load(here.payload)), given)


def test_names_that_come_twice_are_refused(memory):
    twice = [("a", torch.ones(1)), ("a", torch.ones(1))]
    with pytest.raises(SyncError, match="a came twice"):
        split(twice, memory, 1)


def test_a_refusal_names_the_weights(memory):
    with Slow("0.5.17") as server:
        syncer = syncer_for(memory, server, bucket_bytes=BLOCK, in_place=True)
        server.fail_at = "update_weights_from_tensor 1"
        with pytest.raises(
            SyncError, match=r"bucket of embed to scalar was not loaded: .*no memory"
        ):
            syncer.push(pooled(weights(1)).items(), version=1)
        syncer.push(pooled(weights(2)).items(), version=2)
        assert same(server.loaded, weights(2))
        syncer.close()


def test_a_bucket_that_cannot_be_filled_leaves_servers_as_they_were(memory, monkeypatch):
    def none_left(self, device, nbytes):
        raise SyncError("no memory is left here")

    with Slow("0.5.17") as server:
        syncer = syncer_for(memory, server, in_place=True)
        monkeypatch.setattr(Memory, "allocate", none_left)
        given = pooled(weights(1)) | {"alone": torch.ones(3)}
        with pytest.raises(SyncError, match=r"servers serve what they did.*no memory is left here"):
            syncer.push(given.items(), version=1)
        assert server.weight_version == "0" and not server.paused
        syncer.close()
