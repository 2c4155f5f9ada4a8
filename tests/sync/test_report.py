"""What a push says of itself."""

import pytest

from miles.sync import SyncReport


def report(num_bytes, **fields):
    return SyncReport(
        version=3, num_tensors=2, num_bytes=num_bytes, copied_bytes=0, seconds=2.0, **fields
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "version 3: 2 tensors, 0 B in 2.00 s (0 B/s)"),
        (3000, "version 3: 2 tensors, 3.00 kB in 2.00 s (1.50 kB/s)"),
        (4_000_000, "version 3: 2 tensors, 4.00 MB in 2.00 s (2.00 MB/s)"),
        (16 * 10**9, "version 3: 2 tensors, 16.00 GB in 2.00 s (8.00 GB/s)"),
    ],
)
def test_a_summary_has_the_totals(num_bytes, text):
    assert report(num_bytes).summary() == text


def test_a_summary_has_the_phases_if_there_are_any():
    assert report(0).phases == {} and report(0).num_buckets == 0
    text = report(0, phases={"send": 1.25, "commit": 0.5}).summary()
    assert text.splitlines()[1] == "  send 1.25 s, commit 0.50 s"
