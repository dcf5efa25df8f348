"""Power cuts of a recorded run (`benchmarks/faults/power.py`): a few of its moments; the program replays more."""

import pytest
from conftest import python

from benchmarks.faults.power import Recording
from benchmarks.faults.recorder import VARIANTS


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return Recording(tmp_path_factory.mktemp("power") / "work", python)


@pytest.fixture(scope="module")
def pruning(recording):
    """The moments at which the checkpoints are being removed."""
    found = [number for number, cut in enumerate(recording.cuts) if "run/.checkpoints.tmp" in cut.seen]
    assert len(found) > 5
    return found


def test_no_marker_outlives_what_it_vouches_for(recording, pruning):
    assert len(recording.cuts) > 300
    for number in sorted({*range(0, len(recording.cuts), 29), *pruning}):
        for variant in VARIANTS:
            assert not recording.outlived(number, variant), (recording.cuts[number].event, variant)


@pytest.mark.parametrize("variant", ["forgotten", "empty"])
def test_a_run_cut_off_while_it_prunes_its_checkpoints_ends_with_the_same_bytes(recording, pruning, variant):
    row = recording.replay(pruning[len(pruning) // 2], variant)
    assert row.good, row
