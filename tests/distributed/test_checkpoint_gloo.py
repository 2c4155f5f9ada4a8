"""A model that FSDP2 shards is exported, saved and loaded as if it weren't."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from miles.errors import CheckpointError
from miles.precision import Int4
from miles.precision.exporting import export
from miles.precision.loading import load, verify_parity
from miles.precision.modules import convert_
from miles.precision.saving import save
from tests.distributed import gloo
from tests.precision.checkpoints import same_bits, tiny

WORLD = 2


def build(seed=0, sharded=True):
    model = tiny("qwen3_moe", dtype=torch.float32, seed=seed)
    convert_(model, [("*", Int4())])
    if sharded:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def both(folder):
    model, other = build(), build(seed=1)
    exported = dict(export(model))
    save(model, folder / "step", write=dist.get_rank() == 0)
    dist.barrier()
    num_rounded = verify_parity(model, folder / "step").num_rounded
    with pytest.raises(CheckpointError, match="differs"):
        verify_parity(other, folder / "step")
    load(other, folder / "step")
    logits = [m(torch.arange(1, 6)[None]).logits.detach() for m in (model, other)]
    return exported, dict(export(other)), num_rounded, logits


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return gloo.run(both, WORLD, folder, folder)


def test_every_rank_exports_what_one_process_does(ranks):
    # Rounded from the bf16 copy that FSDP2 gathers; the rest as it is kept, in float32.
    copy, kept = build(sharded=False).to(torch.bfloat16), build(sharded=False)
    rounded, plain = dict(export(copy)), dict(export(kept))
    for exported, *_ in ranks:
        assert exported.keys() == rounded.keys()
        for name, tensor in exported.items():
            expected = plain if name.endswith(".weight") else rounded
            assert same_bits(tensor, expected[name]), name


def test_loaded_shards_export_and_compute_the_same(ranks):
    for exported, again, num_rounded, logits in ranks:
        assert num_rounded == 26
        assert exported.keys() == again.keys()
        assert all(same_bits(exported[name], again[name]) for name in exported)
        assert same_bits(*logits)
