"""Whether a stage is done: an input that changes, comes or goes is a change."""

import json

import pytest

from pkd_dist.stages.base import Markers, Stage


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
    stage = Stage("data", lambda: before, dict, (), lambda out: None)
    markers.begin(stage, "new", before)
    markers.end(stage, before, {}, 1.0)
    state = markers.state(Stage("data", lambda: now, dict, (), lambda out: None))
    assert state == (("stale", why) if why else ("done", ""))


def test_starts_and_stops_are_counted_until_the_inputs_change(tmp_path):
    (tmp_path / "stages").mkdir()
    markers, stage = Markers(tmp_path), Stage("data", lambda: {"a": 1}, dict, (), lambda out: None)

    def start() -> str:
        state, _ = markers.state(stage)
        markers.begin(stage, state, stage.inputs())
        return state

    assert start() == "new"
    markers.stop(stage, 2.0)
    assert start() == "started", "stopped by a signal"
    assert start() == "started", "killed"
    markers.end(stage, stage.inputs(), {}, 3.0)
    made = json.loads((tmp_path / "stages/data.json").read_text())
    assert (made["starts"], made["stopped"], made["seconds"]) == (3, 1, 5.0) and made["done"]
    stage = Stage("data", lambda: {"a": 2}, dict, (), lambda out: None)
    assert start() == "stale"
    markers.end(stage, stage.inputs(), {}, 4.0)
    made = json.loads((tmp_path / "stages/data.json").read_text())
    assert (made["starts"], made["stopped"], made["seconds"]) == (1, 0, 4.0)
