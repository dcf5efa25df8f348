"""Power cuts of a recorded run (`benchmarks/faults/power.py`): a few of its moments; the program replays more."""

import pytest
from conftest import python

from benchmarks.faults.power import Recording
from benchmarks.faults.recorder import VARIANTS


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return Recording(tmp_path_factory.mktemp("power") / "work", python)


def test_no_marker_outlives_what_it_vouches_for(recording):
    assert len(recording.cuts) > 300
    for number in range(0, len(recording.cuts), 29):
        for variant in VARIANTS:
            assert not recording.outlived(number, variant), (recording.cuts[number].event, variant)


def test_a_run_cut_off_while_it_prunes_its_checkpoints_ends_with_the_same_bytes(recording):
    [first, *_] = [
        number
        for number, cut in enumerate(recording.cuts)
        if "run/stages/export.json" in cut.seen and "run/checkpoints" not in cut.seen
    ]
    row = recording.replay(first - 5, "forgotten")
    assert row.good, row
