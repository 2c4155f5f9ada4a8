"""`SGLangSyncer` and servers that have a draft model beside the policy."""

import pytest

from miles.errors import SettingError, SyncError
from tests.sync.test_sglang import Server, same, weights


@pytest.fixture
def server():
    with Server("0.5.21", speculative="new") as server:
        yield server


def test_a_draft_has_versions_of_its_own_and_the_servers_stays_the_policys(server, syncer_for):
    policy, draft = syncer_for(server, selector="target"), syncer_for(server, selector="draft")
    policy.push(weights(1).items(), version=7)
    assert draft.push(weights(2).items(), version=7).num_tensors == 5  # no skip
    assert same(server.loaded, weights(2)) and server.weight_version == "7"
    assert draft.push(weights(2).items(), version=7).num_tensors == 0
    draft.push(weights(3).items(), version=8)
    assert policy.push(weights(4).items(), version=8).num_tensors == 5
    assert server.weight_version == "8" and not server.paused
    with pytest.raises(SyncError, match="version 7 is older than 8"):
        draft.push(weights(3).items(), version=7)
    said = [body["new_version"] for name, body in server.updates if name.endswith("weight_version")]
    assert [max(int(version), -1) for version in said] == [-1, 7, -1, 8]


def test_a_draft_that_breaks_off_leaves_the_policy_in_service(server, syncer_for):
    policy, draft = syncer_for(server, selector="target"), syncer_for(server, selector="draft")
    policy.push(weights(1).items(), version=1)
    server.fail_at = "update_weights_from_tensor 5"
    with pytest.raises(SyncError, match=r"draft models hold a part .* served as before; push"):
        draft.push(weights(2).items(), version=1)
    assert server.weight_version == "1" and not server.paused and not server.in_session
    assert draft.push(weights(2).items(), version=1).num_tensors == 5
    assert same(server.loaded, weights(2))


def test_after_a_draft_that_broke_off_its_last_version_is_sent_anew(server, syncer_for):
    draft = syncer_for(server, selector="draft")
    draft.push(weights(1).items(), version=1)
    sent = server.names().count("update_weights_from_tensor")
    server.fail_at = f"update_weights_from_tensor {sent + 2}"
    with pytest.raises(SyncError, match="hold a part"):
        draft.push(weights(2).items(), version=2)
    assert draft.push(weights(1).items(), version=1).num_tensors == 5
    assert same(server.loaded, weights(1))


def test_a_draft_does_not_put_half_a_policy_into_service(server, syncer_for):
    policy, draft = syncer_for(server, selector="target"), syncer_for(server, selector="draft")
    server.fail_at = "update_weights_from_tensor 2"
    with pytest.raises(SyncError, match="still paused"):
        policy.push(weights(1).items(), version=1)
    calls = len(server.calls)
    with pytest.raises(SyncError, match=r"hold a part of a version of the policy .* policy first"):
        draft.push(weights(2).items(), version=1)
    assert server.paused and set(server.calls[calls:]) == {"/server_info", "/model_info"}
    policy.push(weights(1).items(), version=1)
    draft.push(weights(2).items(), version=1)
    assert server.weight_version == "1" and not server.paused


@pytest.mark.parametrize(
    ("version", "algorithm", "refused"),
    [
        ("0.5.17", "EAGLE", True),
        ("0.5.17", "STANDALONE", True),
        ("0.5.17", "NGRAM", False),
        ("0.5.17", None, False),
        ("0.5.21", "EAGLE", False),
    ],
)
def test_files_are_not_loaded_where_the_draft_would_take_them_too(
    version, algorithm, refused, syncer_for, tmp_path
):
    with Server(version) as server:
        server.info = {"speculative_algorithm": algorithm}
        syncer = syncer_for(server, via="disk", folder=tmp_path)
        if refused:
            with pytest.raises(SyncError, match=r"draft model.*selector='target'"):
                syncer.push(weights(1).items(), version=1)
            assert server.weight_version == "0" and not list(tmp_path.iterdir())
        else:
            syncer.push(weights(1).items(), version=1)
            assert same(server.loaded, weights(1))


def test_a_folder_and_a_selector_do_not_go_together(syncer_for, tmp_path):
    with Server("0.5.21") as server, pytest.raises(SettingError, match="via='disk'"):
        syncer_for(server, via="disk", folder=tmp_path, selector="draft")


def test_what_servers_read_back_is_the_policys(server, syncer_for):
    with pytest.raises(SettingError, match=r"verify is \['embed'\].*reads the policy's"):
        syncer_for(server, selector="draft", verify=["embed"])


@pytest.mark.parametrize("algorithm", [None, "NGRAM"])
def test_a_server_without_a_draft_takes_none(server, syncer_for, algorithm):
    server.info = {"speculative_algorithm": algorithm}
    with pytest.raises(SyncError, match=r"no draft model; expected .*draft-model-path"):
        syncer_for(server, selector="draft").push(weights(1).items(), version=1)
    assert server.updates == [] and "/pause_generation" not in server.calls
