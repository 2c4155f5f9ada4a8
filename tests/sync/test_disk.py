"""Weights through a folder: whole versions, deltas, and everything that goes wrong with files."""

import json
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from miles.errors import SyncError
from miles.protocols import WeightSyncer
from miles.sync import DiskReceiver, DiskSyncer, _steps
from miles.sync._plan import committing
from tests.models import params, serving, tiny
from tests.sync.processes import launch
from tests.sync.targets import Target, random_tensors, same, tensors
from tests.sync.test_inprocess import BROKEN


def push(syncer, version):
    return syncer.push(random_tensors(version).items(), version=version)


def step(tmp_path, version):
    return tmp_path / f"step_{version}"


def shard(tmp_path, version):
    return step(tmp_path, version) / "model-00001.safetensors"


def test_values_arrive_bit_for_bit(syncer, receiver, target):
    assert isinstance(syncer, WeightSyncer)
    for version in (1, 2, 3):
        report = push(syncer, version)
        assert receiver.receive_once() == version
        assert same(target.live, random_tensors(version)) and target.weight_version == version
        assert (report.version, report.num_tensors, report.num_bytes) == (version, 5, 86)
        assert set(report.phases) == {"gather", "commit"}
    assert receiver.receive_once() == 3 and len(target.seen) == 3


def test_a_receiver_that_comes_late_reads_the_newest_version(syncer, tmp_path):
    for version in range(1, 8):
        push(syncer, version)
    target = Target()
    assert DiskReceiver(target, tmp_path).receive_once() == 7
    assert same(target.live, random_tensors(7))


def test_an_empty_folder_holds_nothing_new(receiver, target, tmp_path):
    assert receiver.receive_once() == 0
    assert DiskReceiver(target, tmp_path / "nowhere").receive_once() == 0


def test_values_are_cast_to_the_targets_dtype(syncer, receiver, target):
    wanted = {name: tensor.double() for name, tensor in random_tensors(1).items()}
    syncer.push(wanted.items(), version=1)
    receiver.receive_once()
    assert all(torch.equal(t, wanted[name].to(t.dtype)) for name, t in target.live.items())


def test_the_version_that_is_there_is_not_written_again_and_versions_only_grow(syncer, tmp_path):
    push(syncer, 5)
    report = syncer.push(random_tensors(6).items(), version=5)
    assert (report.version, report.num_tensors, report.copied_bytes) == (5, 0, 0)
    with pytest.raises(SyncError, match="version 4 is older than 5"):
        push(syncer, 4)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_5"]


def test_an_engine_that_is_ahead_of_the_folder_serves_on(syncer, receiver, target):
    push(syncer, 1)
    target.weight_version = 9
    with pytest.raises(SyncError, match=r"version 1 was not taken, 9 is still served: .*older"):
        receiver.receive_once()


@pytest.mark.parametrize(("text", "weights"), BROKEN[:1] + BROKEN[2:])
def test_what_does_not_fit_the_last_version_is_named_by_the_trainer(
    syncer, receiver, target, tmp_path, text, weights
):
    push(syncer, 1)
    with pytest.raises(SyncError, match=text):
        syncer.push(weights, version=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_1"]
    receiver.receive_once()
    push(syncer, 3)
    assert receiver.receive_once() == 3 and same(target.live, random_tensors(3))


@pytest.mark.parametrize(("text", "weights"), BROKEN)
def test_what_does_not_fit_the_engine_is_named_and_the_old_version_serves_on(
    syncer, receiver, target, text, weights
):
    syncer.push(weights, version=1)
    with pytest.raises(SyncError, match="version 1 was not taken, 0 is still served: .*" + text):
        receiver.receive_once()
    assert same(target.live, tensors()) and target.weight_version == 0


def test_a_trainer_that_fails_while_it_hands_out_weights_leaves_nothing(syncer, tmp_path):
    def failing():
        yield from list(random_tensors(1).items())[:2]
        raise ZeroDivisionError

    push(syncer, 1)
    with pytest.raises(ZeroDivisionError):
        syncer.push(failing(), version=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_1"]


def test_tied_tensors_are_written_once_and_reused_memory_is_not_taken_for_tied(tmp_path):
    w = torch.randn(4, 4)
    syncer = DiskSyncer(tmp_path)
    report = syncer.push([("head", w), ("embed", w)], version=1)
    assert report.num_tensors == 1
    target = Target({"embed": torch.zeros(4, 4)})
    DiskReceiver(target, tmp_path).receive_once()
    assert torch.equal(target.live["embed"], w)
    syncer.push([("head", w), ("embed", w)], version=2)
    DiskReceiver(target, tmp_path).receive_once()
    syncer.close()

    def one_buffer():
        for name, value in (("a", 1.0), ("b", 2.0)):
            yield name, w.fill_(value)

    syncer = DiskSyncer(tmp_path / "other")
    syncer.push(one_buffer(), version=1)
    target = Target({"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)})
    DiskReceiver(target, tmp_path / "other").receive_once()
    assert (target.live["a"] == 1).all() and (target.live["b"] == 2).all()


def test_full_versions_are_checkpoints_that_others_can_read(tmp_path):
    DiskSyncer(tmp_path, shard_bytes=60).push(random_tensors(1).items(), version=1)
    index = json.loads((step(tmp_path, 1) / "model.safetensors.index.json").read_text())
    read = {}
    for file in set(index["weight_map"].values()):
        read |= load_file(step(tmp_path, 1) / file)
    assert index["metadata"]["total_size"] == 86 and len(set(index["weight_map"].values())) == 2
    assert same({name: read[name] for name in index["weight_map"]}, random_tensors(1))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


# Deltas.


def sparse(version):
    weights = {"w": torch.zeros(4000, dtype=torch.bfloat16), "still": torch.ones(2000)}
    weights["w"][: 3 * version] = float(version)
    return weights


def sparse_target():
    return Target({name: torch.zeros_like(t) for name, t in sparse(0).items()})


def test_a_delta_holds_what_changed_and_chains_are_followed(tmp_path):
    syncer = DiskSyncer(tmp_path, delta=True, full_every=4, keep=1)
    target = sparse_target()
    receiver = DiskReceiver(target, tmp_path)
    sizes = []
    for version in range(1, 7):
        report = syncer.push(sparse(version).items(), version=version)
        sizes.append(report.copied_bytes)
        if version != 3:  # one is missed
            receiver.receive_once()
            assert same(target.live, sparse(version))
        late = sparse_target()
        DiskReceiver(late, tmp_path).receive_once()
        assert same(late.live, sparse(version))
    assert [size > 10000 for size in sizes] == [True, False, False, False, True, False]
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_5", "step_6"]
    report = syncer.delta_report
    assert (report.num_elements, report.num_changed) == (6000, 18)


def test_only_the_last_delta_is_read_by_an_engine_that_follows(tmp_path, monkeypatch):
    syncer, target = DiskSyncer(tmp_path, delta=True), sparse_target()
    receiver = DiskReceiver(target, tmp_path)
    read = []
    real = _steps.Steps.read
    monkeypatch.setattr(
        _steps.Steps, "read", lambda s, m, f: read.append(m.version) or real(s, m, f)
    )
    for version in (1, 2, 3):
        syncer.push(sparse(version).items(), version=version)
        receiver.receive_once()
    assert read == [1, 2, 3]
    # Someone else wrote to the engine: the chain is read from the disk.
    target.live["w"][7] = 99
    syncer.push(sparse(4).items(), version=4)
    receiver.receive_once()
    assert read[3:] == [4, 1, 2, 3, 4] and same(target.live, sparse(4))


def test_the_trainers_memory_is_not_kept(tmp_path):
    syncer, weights, target = DiskSyncer(tmp_path, delta=True), sparse(1), sparse_target()
    syncer.push(weights.items(), version=1)
    weights["w"].fill_(5)  # in place, as an optimizer does
    syncer.push(weights.items(), version=2)
    DiskReceiver(target, tmp_path).receive_once()
    assert (target.live["w"] == 5).all()


def test_a_full_version_follows_a_failed_push_and_a_restart(tmp_path):
    syncer = DiskSyncer(tmp_path, delta=True)
    syncer.push(sparse(1).items(), version=1)
    with pytest.raises(SyncError):
        syncer.push([("w", sparse(2)["w"])], version=2)
    syncer.push(sparse(3).items(), version=3)
    syncer.push(sparse(4).items(), version=4)
    syncer.close()
    syncer = DiskSyncer(tmp_path, delta=True, keep=10)
    with pytest.raises(SyncError, match="version 2 is older than 4"):
        syncer.push(sparse(2).items(), version=2)
    syncer.push(sparse(5).items(), version=5)
    kinds = {v: json.loads((step(tmp_path, v) / "manifest.json").read_text()) for v in (3, 4, 5)}
    assert [kinds[v]["base"] for v in (3, 4, 5)] == [None, 3, None]
    target = sparse_target()
    DiskReceiver(target, tmp_path).receive_once()
    assert same(target.live, sparse(5))


def test_a_missing_base_makes_the_next_version_a_full_one_and_is_an_error_meanwhile(tmp_path):
    syncer = DiskSyncer(tmp_path, delta=True)
    for version in (1, 2):
        syncer.push(sparse(version).items(), version=version)
    shutil.rmtree(step(tmp_path, 1))
    target = sparse_target()
    with pytest.raises(SyncError, match=r"version 2 was not taken.*version 1 is not in"):
        DiskReceiver(target, tmp_path).receive_once()
    shutil.rmtree(step(tmp_path, 2))
    syncer.push(sparse(3).items(), version=3)
    assert DiskReceiver(target, tmp_path).receive_once() == 3


def test_a_delta_of_another_history_is_refused(tmp_path):
    for name, first in (("a", 1), ("b", 7)):
        syncer = DiskSyncer(tmp_path / name, delta=True)
        syncer.push(sparse(first).items(), version=1)
        syncer.push(sparse(2).items(), version=2)
    shutil.rmtree(step(tmp_path / "a", 1))
    shutil.copytree(step(tmp_path / "b", 1), step(tmp_path / "a", 1))
    with pytest.raises(SyncError, match="version 2 is a delta of another version 1"):
        DiskReceiver(sparse_target(), tmp_path / "a").receive_once()


# A thread that looks.


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_thread_follows_and_warns_once_of_what_is_damaged(syncer, target, tmp_path):
    receiver = DiskReceiver(target, tmp_path, poll_seconds=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        receiver.start()
        push(syncer, 1)
        wait_for(lambda: target.weight_version == 1)
        real = step(tmp_path, 3)
        other = DiskSyncer(tmp_path / "other")
        push(other, 3)
        other.close()
        truncate(shard(tmp_path / "other", 3))
        (tmp_path / "other" / "step_3").rename(real)
        wait_for(lambda: [w for w in caught if w.category is UserWarning])
        time.sleep(0.1)
        push(syncer, 4)
        wait_for(lambda: target.weight_version == 4)
        receiver.close()
    (warning,) = [w for w in caught if w.category is UserWarning]
    assert "version 3 was not taken, 1 is still served" in str(warning.message)
    assert not receiver._thread.is_alive()


def test_an_engine_that_got_another_version_meanwhile_keeps_it(syncer, receiver, target):
    push(syncer, 1)
    live = target.weight_tensors

    def while_another_pushes():
        target.weight_version = 5
        return live()

    target.weight_tensors = while_another_pushes
    with pytest.raises(SyncError, match="the engine went to version 5 meanwhile; expected one"):
        receiver.receive_once()
    assert target.weight_version == 5 and not target.seen


def test_a_commit_waits_for_that_of_another_receiver(syncer, receiver, target):
    push(syncer, 1)
    with ThreadPoolExecutor(1) as pool:
        with committing(target):
            received = pool.submit(receiver.receive_once)
            with pytest.raises(TimeoutError):
                received.result(0.3)
            target.weight_version = 5
        with pytest.raises(SyncError, match="5 is still served: the engine went to version 5"):
            received.result(30)
    assert target.weight_version == 5 and not target.seen


# Engines and sharded trainers.


@pytest.mark.parametrize("delta", [False, True])
def test_an_engine_answers_with_the_trainers_weights(tmp_path, delta):
    trainer = tiny("qwen3_moe", seed=1, tie_word_embeddings=True)
    syncer = DiskSyncer(tmp_path, delta=delta)
    model = tiny("qwen3_moe", tie_word_embeddings=True)
    with serving(model) as engine:
        receiver = DiskReceiver(engine, tmp_path)
        for version in (1, 2, 3):
            with torch.no_grad():
                trainer.lm_head.weight[version] += 1
            syncer.push(trainer.state_dict().items(), version=version)
            assert receiver.receive_once() == version
        got = engine.submit([5, 6], params(20)).result(60)
    assert got.weight_versions == [3]
    with serving(trainer) as engine:
        assert engine.submit([5, 6], params(20)).result(60).tokens == got.tokens


def sharded(folder):
    model = tiny("llama", seed=1, tie_word_embeddings=True)
    fully_shard(model, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    syncer = DiskSyncer(folder, delta=True, trainers=dist.group.WORLD)
    reports = []
    for version in (1, 2):
        with torch.no_grad():
            model.lm_head.weight += 1
        reports.append(syncer.push(model.state_dict().items(), version=version))
    try:
        syncer.push(list(model.state_dict().items())[:-2], version=3)
    except SyncError as error:
        return reports, str(error), len(syncer._last)


def test_a_sharded_trainer_writes_whole_tensors_and_fails_together(tmp_path):
    folder = tmp_path / "weights"
    (reports, text, _), (other, other_text, held) = launch(sharded, 2, tmp_path, str(folder))
    assert [r.num_tensors for r in reports] == [r.num_tensors for r in other] != [0, 0]
    assert "missing tensors" in text and "missing tensors" in other_text and held == 0
    wanted = tiny("llama", seed=1, tie_word_embeddings=True)
    with torch.no_grad():
        for _ in range(2):
            wanted.lm_head.weight += 1
    live = {name: torch.zeros_like(t) for name, t in wanted.named_parameters()}
    target = Target(live)
    assert DiskReceiver(target, folder).receive_once() == 2
    assert same(target.live, {n: p.detach() for n, p in wanted.named_parameters()})


def failing_on_rank_1(folder):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    syncer = DiskSyncer(folder, trainers=group)

    def stream():
        if dist.get_rank() == 1:
            raise MemoryError("rank 1 only")
        yield "w", torch.ones(4)
        dist.all_reduce(torch.ones(1), group=group)  # as a gather does
        yield "v", torch.ones(4)

    try:
        syncer.push(stream(), version=1)
    except Exception as error:  # the test says which it has to be
        return type(error).__name__, str(error), type(error.__cause__).__name__


def test_a_fault_of_another_rank_is_said_to_be_one(tmp_path):
    first, second = launch(failing_on_rank_1, 2, tmp_path, str(tmp_path / "weights"))
    assert first[0] == "SyncError" and "another rank of the trainers failed" in first[1]
    assert first[2] != "NoneType" and second[:2] == ("MemoryError", "rank 1 only")
