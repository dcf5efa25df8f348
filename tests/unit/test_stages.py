"""Whether a stage is done: an input that changes, comes or goes is a change."""

import pytest

from pkd_dist.stages import Markers, Stage


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({"a": 1, "b": 2}, None),
        ({"a": 1, "b": 3}, "b changed (2 -> 3)"),
        ({"a": 1, "b": 2, "c": 4}, "c changed (None -> 4)"),
        ({"a": 1}, "b changed (2 -> None)"),
    ],
)
def test_a_changed_input_is_found(tmp_path, now, why):
    (tmp_path / "stages").mkdir()
    markers = Markers(tmp_path)
    before = {"a": 1, "b": 2}
    markers.end(Stage("data", lambda: before, dict, (), lambda out: None), before, {}, 1.0)
    state = markers.state(Stage("data", lambda: now, dict, (), lambda out: None))
    assert state == (("stale", why) if why else ("done", ""))
