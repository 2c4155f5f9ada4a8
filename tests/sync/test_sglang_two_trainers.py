"""Two trainers and one SGLang server: no mixture of theirs is reported as a success."""

import threading

import pytest

from miles.errors import SyncError
from tests.rollout.sglang_fake import Refusal
from tests.sync.test_sglang import VERSIONS, Server, same, weights


@pytest.fixture(params=VERSIONS)
def server(request):
    with Server(request.param) as server:
        yield server


def meanwhile(seed, act):
    """Weights, with something in the middle of them."""
    for number, pair in enumerate(weights(seed).items()):
        if number == 3:
            act()
        yield pair


def test_trainers_that_take_turns_are_told(server, syncer_for):
    a, b = syncer_for(server), syncer_for(server)
    a.push(weights(1).items(), version=1)
    b.push(weights(2).items(), version=2)
    for version in (2, 3):  # even the version that is served: it is not this trainer's
        calls = len(server.calls)
        with pytest.raises(SyncError, match=r"has weights of version 2; expected 1, .* another"):
            a.push(weights(3).items(), version=version)
        assert {path for path in server.calls[calls:]} == {"/model_info", "/server_info"}
    assert same(server.loaded, weights(2)) and server.weight_version == "2" and not server.paused
    b.push(weights(4).items(), version=3)
    assert same(server.loaded, weights(4))
    syncer_for(server).push(weights(5).items(), version=4)  # a new one takes over
    assert same(server.loaded, weights(5))


class Forgetful(Server):
    """Takes version 2, says that it failed, and hears nothing more for a while."""

    deaf = False

    async def update_weight_version(self, body):
        if not self.deaf:
            answer = await super().update_weight_version(body)
        self.deaf |= body["new_version"] == "2"
        if self.deaf:
            raise Refusal(500, {"message": "it broke"})
        return answer


def test_a_version_whose_answer_was_lost_is_this_trainers_own(syncer_for):
    with Forgetful("0.5.17") as server:
        syncer = syncer_for(server)
        syncer.push(weights(1).items(), version=1)
        with pytest.raises(SyncError, match=r"version 2 was not pushed.*it broke"):
            syncer.push(weights(2).items(), version=2)
        assert server.weight_version == "2"
        server.deaf = False
        syncer.push(weights(3).items(), version=3)
        assert same(server.loaded, weights(3)) and not server.paused


def test_a_server_that_was_started_again_goes_on(server, syncer_for):
    syncer = syncer_for(server)
    syncer.push(weights(5).items(), version=5)
    for again, version in (("default", 6), ("0", 7), ("3", 8)):
        server.weight_version = again
        syncer.push(weights(version).items(), version=version)
        assert same(server.loaded, weights(version)) and server.weight_version == str(version)


def test_trainers_in_step_are_told(server, syncer_for):
    """One configuration started twice: each push of the second finds its version there."""
    a, b = syncer_for(server), syncer_for(server)
    for trainer, seed in ((a, 1), (b, 2)):
        trainer.push(weights(seed).items(), version=1)
    a.push(weights(3).items(), version=2)
    with pytest.raises(SyncError, match=r"has weights of version 2; expected 1, .* another"):
        b.push(weights(4).items(), version=2)
    assert same(server.loaded, weights(3))


class Failing(Server):
    """Takes version 2, and fails then for a while, once."""

    failing, failed = False, False

    async def update_weight_version(self, body):
        if self.failing:
            raise Refusal(500, {"message": "it broke"})
        self.failing = body["new_version"] == "2" and not self.failed
        self.failed |= self.failing
        return await super().update_weight_version(body)

    async def continue_generation(self, body):
        if self.failing:
            self.calls.pop()  # it is still paused
            raise Refusal(500, {"message": "it broke"})
        return await super().continue_generation(body)


def test_a_server_that_was_not_let_go_on_is_pushed_to_again(syncer_for):
    with Failing("0.5.17") as server:
        syncer = syncer_for(server)
        with pytest.raises(SyncError, match="push again, which is a whole push"):
            syncer.push(weights(1).items(), version=2)
        assert server.weight_version == "2" and server.paused
        server.failing = False
        assert syncer.push(weights(2).items(), version=2).num_tensors == 5
        assert same(server.loaded, weights(2)) and not server.paused


def test_a_push_into_the_middle_of_another_is_no_success_of_both(server, syncer_for):
    a, b, told = syncer_for(server, bucket_bytes=1), syncer_for(server), []

    def of_b():
        try:
            b.push(weights(2).items(), version=2)
        except SyncError as error:
            told.append(str(error))

    with pytest.raises(SyncError, match="version 1 was not pushed") as caught:
        a.push(meanwhile(1, of_b), version=1)
    assert int(server.weight_version) < 0  # nobody takes it for a version
    if server.strict:  # the second session was refused, and ended the first one
        assert "a weight update is under way" in told[0]
    else:
        assert not told
        assert "went to version '2' in the middle of this push; expected" in str(caught.value)
        assert "may hold and serve a mixture of two versions; end the other" in str(caught.value)
        assert "still paused" not in str(caught.value) and not server.paused
    b.push(weights(3).items(), version=3)
    assert same(server.loaded, weights(3)) and server.weight_version == "3" and not server.paused


def test_whoever_ends_first_hears_of_the_other_too(syncer_for):
    with Server("0.5.17") as server:  # sessions of 0.5.21 would not get that far
        a, b = syncer_for(server, bucket_bytes=1), syncer_for(server, bucket_bytes=1)
        begun, done, errors = threading.Event(), threading.Event(), []

        def of_b():
            try:
                b.push(meanwhile(2, lambda: (begun.set(), done.wait(30))), version=2)
            except SyncError as error:
                errors.append(str(error))

        thread = threading.Thread(target=of_b)

        def start_b():
            thread.start()
            assert begun.wait(30)

        with pytest.raises(SyncError, match=r"went to version '-\d+' in the middle"):
            a.push(meanwhile(1, start_b), version=1)
        done.set()
        thread.join(30)
        (error,) = errors
        assert "in the middle of this push" in error and int(server.weight_version) < 0
        a.push(weights(3).items(), version=3)
        assert same(server.loaded, weights(3)) and not server.paused
