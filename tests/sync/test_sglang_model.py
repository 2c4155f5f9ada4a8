"""`SGLangSyncer` and weights that are not those of its first push, which servers would not tell."""

import pytest
import torch

from miles.errors import SyncError
from tests.sync.test_sglang import VERSIONS, Server, same, weights


@pytest.fixture(params=VERSIONS)
def server(request):
    with Server(request.param, speculative="new") as server:
        yield server


def changed(seed, **changes):
    """Those of a push, without the names that are None."""
    return {n: t for n, t in (weights(seed) | changes).items() if t is not None}


CHANGES = {
    "missing": ({"norm": None}, r"missing weights \['norm'\]; expected the 5 names and shapes"),
    "unknown": ({"extra": torch.zeros(1)}, "extra is unknown; expected the 5 names"),
    "misshapen": ({"embed": torch.zeros(8, 100)}, r"embed has shape \(8, 100\), and had \(100, 8"),
    "renamed": ({"norm": None, "Norm": torch.zeros(8)}, "Norm is unknown"),
}


@pytest.mark.parametrize("via", ["value", "disk"])
@pytest.mark.parametrize("change", CHANGES)
def test_of_a_collection_nothing_is_touched(server, syncer_for, tmp_path, change, via):
    if via == "disk" and not server.strict:
        server.info = {"speculative_algorithm": None}
    syncer = syncer_for(server, via=via, **({"folder": tmp_path} if via == "disk" else {}))
    syncer.push(weights(1).items(), version=1)
    changes, text = CHANGES[change]
    calls = len(server.calls)
    with pytest.raises(SyncError, match=rf"servers serve what they did.*{text}"):
        syncer.push(changed(2, **changes).items(), version=2)
    assert set(server.calls[calls:]) == {"/model_info"}
    assert same(server.loaded, weights(1)) and server.weight_version == "1" and not server.paused
    syncer.push(list(reversed(weights(2).items())), version=2)  # in any order
    assert same(server.loaded, weights(2))
    other = syncer_for(server)  # a new one has no model yet
    other.push(changed(3, **changes).items(), version=3)


@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_ends_where_it_is_seen(server, syncer_for, change):
    syncer = syncer_for(server, bucket_bytes=1)
    syncer.push(iter(weights(1).items()), version=1)
    changes, text = CHANGES[change]
    at_first = change == "misshapen"
    where = (
        "servers serve what they did" if at_first else "hold a part of it: a weight version below 0"
    )
    with pytest.raises(SyncError, match=rf"{where}.*{text}"):
        syncer.push(iter(changed(2, **changes).items()), version=2)
    assert (server.weight_version == "1") == at_first
    assert (int(server.weight_version) < 0) != at_first
    syncer.push(iter(weights(2).items()), version=2)
    assert same(server.loaded, weights(2)) and server.weight_version == "2"


def test_a_first_push_that_broke_off_says_nothing_of_the_model(server, syncer_for):
    syncer = syncer_for(server)
    server.fail_at = "update_weights_from_tensor 2"
    with pytest.raises(SyncError, match="no memory is left"):
        syncer.push(changed(1, extra=torch.ones(2)).items(), version=1)
    syncer.push(weights(1).items(), version=1)
    with pytest.raises(SyncError, match="extra is unknown"):
        syncer.push(changed(2, extra=torch.ones(2)).items(), version=2)


def test_dtypes_may_change_and_verify_reads_what_it_did(server, syncer_for):
    syncer = syncer_for(server, verify=["norm"])
    syncer.push(weights(1).items(), version=1)
    wider = weights(2) | {"embed": weights(2)["embed"].float()}
    syncer.push(wider.items(), version=2)
    assert same(server.loaded, wider)


def test_verify_keeps_what_was_sent_of_a_stream_that_fills_one_buffer_again(server, syncer_for):
    def stream():
        buffer = torch.empty(8, 8)
        for number, name in enumerate(["first", "second"]):
            yield name, buffer.fill_(number)

    syncer_for(server, verify=["first"]).push(stream(), version=1)
    assert server.weight_version == "1" and not server.paused


class Half(Server):
    """Holds float16, whatever it is sent."""

    async def get_weights_by_name(self, body):
        return self.loaded[body["name"]].half().float().tolist()[: body["truncate_size"]]


def test_verify_takes_float16s_rounding_of_small_numbers(syncer_for):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    held = numbers[numbers.abs() < 2**16]  # no infinities, no NaN
    with Half("0.5.17") as server:
        syncer = syncer_for(server, verify=["w"])
        syncer.push([("w", held.expand(4, -1))], version=1)
        server.take = lambda flat, metadata: None
        other = held.clone()
        other[held == 2**-20] *= 2
        with pytest.raises(SyncError, match="holds other values of w"):
            syncer.push([("w", other.expand(4, -1))], version=2)


def test_a_draft_has_names_of_its_own(syncer_for):
    with Server("0.5.21", speculative="new") as server:
        policy, draft = syncer_for(server, selector="target"), syncer_for(server, selector="draft")
        policy.push(weights(1).items(), version=1)
        for version in (1, 2):
            draft.push([("head", torch.full((2,), version))], version=version)
        with pytest.raises(SyncError, match=r"policy is served|servers serve what they did"):
            draft.push([("head", torch.zeros(3))], version=3)
        policy.push(weights(2).items(), version=2)
        assert server.weight_version == "2" and not server.paused


@pytest.mark.parametrize("stream", [iter, list])
def test_a_tensor_without_values_is_refused(server, syncer_for, stream):
    given = weights(1) | {"embed": torch.empty(100, 8, device="meta")}
    with pytest.raises(SyncError, match=r"serve what they did.*embed is on the meta device"):
        syncer_for(server).push(stream(given.items()), version=1)
    assert server.weight_version == "0" and not server.paused
