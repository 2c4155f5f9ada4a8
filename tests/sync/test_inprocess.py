from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from miles.errors import SyncError
from miles.protocols import WeightSyncer, WeightTarget
from miles.rollout import HFEngine
from miles.sync import InProcessSyncer
from miles.sync._plan import committing
from tests.models import params, serving, tiny
from tests.sync.processes import launch
from tests.sync.targets import Target, random_tensors, same, tensors


@pytest.fixture
def target():
    return Target()


@pytest.fixture
def syncer(target):
    return InProcessSyncer(target)


def test_it_fits_the_protocols(target, syncer):
    assert isinstance(syncer, WeightSyncer) and isinstance(target, WeightTarget)


def test_values_arrive_bit_for_bit(target, syncer):
    wanted = random_tensors(1)
    report = syncer.push(wanted.items(), version=1)
    assert same(target.live, wanted) and target.weight_version == 1
    num_bytes = 60 + 14 + 4 + 0 + 8
    assert (report.version, report.num_tensors) == (1, 5)
    assert report.num_bytes == report.copied_bytes == num_bytes
    syncer.close()


def test_values_are_cast_to_the_targets_dtype(target, syncer):
    wanted = {name: tensor.double() for name, tensor in random_tensors(1).items()}
    report = syncer.push(wanted.items(), version=1)
    assert {name: t.dtype for name, t in target.live.items()} == {
        name: t.dtype for name, t in tensors().items()
    }
    assert all(torch.equal(t, wanted[name].to(t.dtype)) for name, t in target.live.items())
    assert report.num_bytes == 86


def test_later_training_does_not_reach_into_what_is_served(target, syncer):
    wanted = random_tensors(1)
    syncer.push(wanted.items(), version=1)
    wanted["weight"].fill_(7)
    assert same(target.live, random_tensors(1))


def test_the_version_that_is_served_is_not_pushed_again(target, syncer):
    syncer.push(random_tensors(1).items(), version=3)
    report = syncer.push(random_tensors(2).items(), version=3)
    assert (report.version, report.num_tensors, report.copied_bytes) == (3, 0, 0)
    assert same(target.live, random_tensors(1)) and len(target.seen) == 1


def broken(change) -> list:
    weights = random_tensors(2)
    change(weights)
    return list(weights.items())


BROKEN = [
    (r"missing tensors \['scalar'\]", broken(lambda w: w.pop("scalar"))),
    (r"unknown tensors \['bias'\]", broken(lambda w: w.update(bias=torch.zeros(2)))),
    (r"weight has shape \(5, 3\).*\(3, 5\)", broken(lambda w: w.update(weight=w["weight"].T))),
    (r"scalar has shape \(1,\)", broken(lambda w: w.update(scalar=torch.zeros(1)))),
    (r"missing tensors", []),
]


@pytest.mark.parametrize(("text", "weights"), BROKEN)
def test_what_does_not_fit_is_named_and_the_old_version_serves_on(target, syncer, text, weights):
    syncer.push(random_tensors(1).items(), version=1)
    with pytest.raises(SyncError, match=text):
        syncer.push(weights, version=2)
    assert same(target.live, random_tensors(1)) and target.weight_version == 1
    syncer.push(random_tensors(2).items(), version=2)
    assert same(target.live, random_tensors(2))


def test_versions_only_grow(target, syncer):
    syncer.push(random_tensors(1).items(), version=5)
    with pytest.raises(SyncError, match="version 4 is older than 5"):
        syncer.push(random_tensors(2).items(), version=4)
    assert same(target.live, random_tensors(1)) and target.weight_version == 5


def test_a_version_that_another_trainer_brought_meanwhile_stays(target, syncer):
    def while_another_pushes():
        yield from random_tensors(7).items()
        InProcessSyncer(target).push(random_tensors(8).items(), version=8)

    with pytest.raises(SyncError, match="version 7 is older than 8"):
        syncer.push(while_another_pushes(), version=7)
    assert same(target.live, random_tensors(8)) and target.weight_version == 8


def test_a_commit_waits_for_that_of_a_receiver(target, syncer):
    with ThreadPoolExecutor(1) as pool:
        with committing(target):
            pushed = pool.submit(syncer.push, random_tensors(1).items(), version=1)
            with pytest.raises(TimeoutError):
                pushed.result(0.3)
            target.weight_version = 5
        with pytest.raises(SyncError, match="version 1 is older than 5"):
            pushed.result(30)
    assert not target.seen


def test_a_trainer_that_fails_while_it_hands_out_weights_changes_nothing(target, syncer):
    def failing():
        yield from list(random_tensors(1).items())[:2]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        syncer.push(failing(), version=1)
    assert same(target.live, tensors()) and target.weight_version == 0


def test_one_model_for_both_moves_nothing():
    model = tiny("llama")
    with serving(model) as engine:
        report = InProcessSyncer(engine).push(model.named_parameters(), version=4)
        assert engine.weight_version == 4
    assert report.copied_bytes == 0 < report.num_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_answers_with_the_trainers_weights(tied):
    # state_dict names tied tensors twice, named_parameters once: both are taken.
    trainer = tiny("qwen3_moe", seed=1, tie_word_embeddings=tied)
    model = tiny("qwen3_moe", dtype=torch.bfloat16, tie_word_embeddings=tied)

    def answered(engine: HFEngine) -> list[int]:
        return engine.submit([5, 6], params(20)).result(60).tokens

    with serving(model) as engine:
        before = answered(engine)
        InProcessSyncer(engine).push(trainer.state_dict().items(), version=1)
        after = answered(engine)
        InProcessSyncer(engine).push(trainer.named_parameters(), version=2)
        assert answered(engine) == after != before
    with serving(trainer.to(torch.bfloat16)) as engine:
        assert answered(engine) == after


def test_a_stream_that_fills_one_buffer_again_is_refused():
    target = Target({"a": torch.zeros(4), "b": torch.zeros(4)})
    buffer = torch.zeros(4)

    def stream():
        for number, name in enumerate(target.live, 1):
            yield name, buffer.fill_(number)

    with pytest.raises(SyncError, match="b came in the memory of a"):
        InProcessSyncer(target).push(stream(), version=1)
    assert target.weight_version == 0
    assert not any(tensor.any() for tensor in target.live.values())
    InProcessSyncer(target).push([("a", buffer), ("b", buffer)], version=1)  # tied
    assert target.weight_version == 1


def sharded_trainer():
    """Two ranks with an engine each, of another dtype; and one that shares the trainer's shards."""
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    wanted = {"rows": torch.arange(10.0).view(5, 2), "plain": torch.ones(3)}
    given = {"rows": distribute_tensor(wanted["rows"], mesh, [Shard(0)]), "plain": wanted["plain"]}
    engine = Target({name: torch.zeros_like(t, dtype=torch.bfloat16) for name, t in wanted.items()})
    report = InProcessSyncer(engine).push(given.items(), version=1)
    shared = Target(given)
    InProcessSyncer(shared).push(iter(given.items()), version=1)
    return engine.live, report.copied_bytes, engine.weight_version, shared.weight_version


def test_sharded_tensors_are_gathered_before_anything_is_written(tmp_path):
    for live, copied, *versions in launch(sharded_trainer, 2, tmp_path):
        assert live["rows"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert live["plain"].tolist() == [1, 1, 1]
        assert (copied, versions) == (26, [1, 1])
