"""What several files of tests share: both ends of a folder, and `SGLangSyncer`s that are closed."""

import pytest

from miles.sync import DiskReceiver, DiskSyncer, SGLangSyncer
from tests.sync.targets import Target


@pytest.fixture
def target():
    return Target()


@pytest.fixture(params=["full", "delta"])
def syncer(request, tmp_path):
    syncer = DiskSyncer(tmp_path, delta=request.param == "delta", keep=3)
    yield syncer
    syncer.close()


@pytest.fixture
def receiver(target, tmp_path):
    return DiskReceiver(target, tmp_path)


@pytest.fixture
def syncer_for():
    """Makes one for some servers, with small buckets."""
    syncers = []

    def make(*servers, **options):
        options = {"via": "value", "bucket_bytes": 700, "timeout": 30} | options
        syncers.append(SGLangSyncer([server.url for server in servers], **options))
        return syncers[-1]

    yield make
    for syncer in syncers:
        syncer.close()
