"""Ctrl-C on one of a trainer's ranks, for each carrier that several of them push through."""

from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch.distributed as dist

from miles.sync import CollectiveReceiver, CollectiveSyncer, DiskSyncer, SGLangSyncer
from miles.sync._trainers import Trainers
from tests.sync.processes import launch
from tests.sync.targets import Target
from tests.sync.test_collective import TIMEOUT, matches, weights
from tests.sync.test_collective_faults import ended
from tests.sync.test_sglang import Server


def interrupted(carrier, who, folder):
    """Ranks 0 and 1 push, rank 2 receives if it is the carrier's way; then new groups."""
    rank = dist.get_rank()
    groups = [
        (dist.new_group([0, 1], timeout=timedelta(seconds=s)), dist.new_group([0, 2]))
        for s in (2, 30)
    ]
    with ExitStack() as stack:
        url = [None]
        if carrier == "sglang" and rank == 0:
            url = [stack.enter_context(Server("0.5.21")).url]
        dist.broadcast_object_list(url)
        if rank == 2:
            target = Target()
            if carrier == "collective":
                CollectiveReceiver(target, groups[0][1], timeout=TIMEOUT).start()
                CollectiveReceiver(target, groups[1][1], timeout=TIMEOUT).receive_once()
            return target.weight_version

        def made(trainers, pair):
            if carrier == "disk":
                return DiskSyncer(folder, trainers=trainers)
            if carrier == "sglang":
                return SGLangSyncer(url[0], via="value", trainers=trainers)
            return CollectiveSyncer(pair, trainers=trainers, timeout=TIMEOUT)

        syncer = made(*groups[0])
        syncer.push(weights(1), version=1)
        agree, calls = Trainers.agree, []

        def interrupting(trainers, act):
            calls.append(act)
            if len(calls) != 2 or rank != who:
                return agree(trainers, act)
            if rank == 1:  # leaves one out, so that the others of this rank are those before
                raise KeyboardInterrupt
            return agree(trainers, interrupt)

        def interrupt():
            raise KeyboardInterrupt

        Trainers.agree = interrupting
        said = [ended(lambda v=v: syncer.push(weights(v), version=v)) for v in (2, 3, 4)]
        syncer.close()
        syncer = made(*groups[1])
        syncer.push(weights(5), version=5)
        syncer.close()
    return said


@pytest.mark.parametrize("carrier", ["collective", "disk", "sglang"])
@pytest.mark.parametrize("who", [0, 1])
def test_after_ctrl_c_on_a_rank_of_the_trainer_new_groups_are_asked_for(tmp_path, carrier, who):
    said = launch(interrupted, 3, tmp_path, carrier, who, str(tmp_path / "weights"))
    first, *later = said[who]
    assert first == "KeyboardInterrupt"
    if who == 0:  # which told the other
        matches(said[1][0], "rank 0 of the trainers failed: KeyboardInterrupt")
        later += said[1][1:]
    for text in later:
        matches(text, "^SyncError: a push was interrupted, .* make new process groups")
    assert said[2] == (5 if carrier == "collective" else 0)
