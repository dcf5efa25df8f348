"""Whether a stage is done: an input that changes, comes or goes is a change; markers of 0.1.0 count."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of
from pkd_dist.stages.base import NAMES, Artifacts, Markers, Stage, State
from pkd_dist.stages.labels import label
from pkd_dist.stages.translation import translate


@dataclass(frozen=True)
class Made:
    number: int = 0
    names: tuple[str, ...] = ()


NOTHING = Artifacts()


def stage(inputs, name="data", missing=lambda context, output: None, artifacts=NOTHING, version=1):
    return Stage(
        name, version, Made, lambda context: inputs, lambda context: Made(), missing, lambda context: artifacts
    )


def context(**versions):
    return SimpleNamespace(versions={name: 1 for name in NAMES} | versions)


@pytest.fixture
def markers(tmp_path):
    (tmp_path / "stages").mkdir()
    return Markers(tmp_path, translate)


def done(markers, of, output=Made(), seconds=1.0, here=None):
    here = here or context()
    state, _ = markers.state(of, here)
    inputs = {f"version.{name}": here.versions[name] for name in NAMES[: NAMES.index(of.name) + 1]} | of.inputs(here)
    markers.begin(of, here, state, inputs)
    markers.end(of, here, output, seconds)


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({"train.epochs": 1, "init.weights": 2}, None),
        ({"train.epochs": 1, "init.weights": 3}, "the student's initial weights changed (2 -> 3)"),
        ({"train.epochs": 1, "init.weights": 2, "run.seed": 4}, "run.seed changed (42 -> 4)"),
        ({"train.epochs": 1}, "the student's initial weights changed (2 -> None)"),
    ],
)
def test_a_changed_input_is_found(markers, now, why):
    done(markers, stage({"train.epochs": 1, "init.weights": 2}))
    state = markers.state(stage(now), context())
    assert state == ((State.STALE, why) if why else (State.DONE, ""))


def test_a_raised_version_reruns_the_stage_and_those_after_it(markers):
    for name in ("data", "teacher", "cache"):
        done(markers, stage({}, name))
    raised = context(teacher=2)
    assert markers.state(stage({}), raised)[0] is State.DONE
    for name in ("teacher", "cache"):
        state, why = markers.state(stage({}, name), raised)
        assert (state, why) == (State.STALE, "the code of the stage teacher changed (1 -> 2)")


def test_a_setting_added_later_is_unchanged_at_its_default(markers):
    done(markers, stage({"distill.alpha": 0.5}))
    assert markers.state(stage({"distill.alpha": 0.5, "distill.pair_last_layer": False}), context())[0] is State.DONE
    state, why = markers.state(stage({"distill.alpha": 0.5, "distill.pair_last_layer": True}), context())
    assert (state, why) == (State.STALE, "distill.pair_last_layer changed (False -> True)")


def extendable(inputs):
    return replace(stage(inputs), extendable=lambda inputs: frozenset({"train.epochs"} if inputs["long"] else ()))


@pytest.mark.parametrize(
    ("now", "state"),
    [
        ({"long": 1, "train.epochs": 6, "other": 1}, State.EXTENDED),
        ({"long": 1, "train.epochs": 5, "other": 1}, State.DONE),
        ({"long": 1, "train.epochs": 4, "other": 1}, State.STALE),
        ({"long": 1, "train.epochs": 6, "other": 2}, State.STALE),
        ({"long": 0, "train.epochs": 6, "other": 1}, State.STALE),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_raised_number_extends_a_stage(markers, now, state, ended):
    before = {"long": 1, "train.epochs": 5, "other": 1}
    done(markers, extendable(before))
    if not ended:
        markers.begin(extendable(before), context(), State.LOST, {"version.data": 1} | before)
    found, why = markers.state(extendable(now), context())
    assert found is (State.STARTED if state is State.DONE and not ended else state)
    if state is State.EXTENDED:
        assert why == "train.epochs changed (5 -> 6)"
        first = markers.read("data")
        marker = markers.begin(extendable(now), context(), found, {"version.data": 1} | now)
        assert (marker.fingerprint, marker.done, marker.outputs) == (first.fingerprint, False, None)
        again = markers.begin(extendable(now), context(), State.LOST, {"version.data": 1} | now)
        assert again.fingerprint == first.fingerprint, "a marker that was lost changes nothing"
        assert markers.state(extendable(now), context())[0] is State.STARTED


def test_outputs_come_back_typed(markers):
    made = Made(7, ("a", "b"))
    done(markers, stage({}), made)
    assert markers.output(stage({})) == made


def test_starts_and_stops_are_counted_until_the_inputs_change(markers):
    def start(of) -> State:
        state, _ = markers.state(of, context())
        inputs = {"version.data": 1} | of.inputs(context())
        markers.begin(of, context(), state, inputs)
        return state

    first = stage({"a": 1})
    assert start(first) is State.NEW
    markers.stop("data", 2.0)
    assert start(first) is State.STARTED, "stopped by a signal"
    assert start(first) is State.STARTED, "killed"
    markers.end(first, context(), Made(), 3.0)
    marker = markers.read("data")
    assert (marker.starts, marker.stopped, marker.seconds, marker.done) == (3, 1, 5.0, True)
    second = stage({"a": 2})
    assert start(second) is State.STALE
    markers.end(second, context(), Made(), 4.0)
    marker = markers.read("data")
    assert (marker.starts, marker.stopped, marker.seconds) == (1, 0, 4.0)


def test_a_changed_stage_moves_its_outcome_aside(markers, tmp_path):
    outcome = tmp_path / "outcome"
    artifacts = Artifacts((outcome,))
    of = stage({"a": 1}, artifacts=artifacts)
    done(markers, of)
    outcome.write_text("first")
    done(markers, stage({"a": 2}, artifacts=artifacts))
    assert (tmp_path / "previous/1/outcome").read_text() == "first" and not outcome.exists()


def test_temporary_files_stay_until_the_outcome_was_read_back_from_the_disk(markers, tmp_path):
    outcome, checkpoints = tmp_path / "outcome", tmp_path / "checkpoints"
    outcome.write_text("other bytes")
    checkpoints.mkdir()
    found = []

    def missing(context, output):
        found.append(outcome.read_text())
        return None if found[-1] == "written" else f"{outcome} was altered"

    of = stage({}, missing=missing, artifacts=Artifacts((outcome,), temporary=(checkpoints,), resumable=True))
    with pytest.raises(UserError, match="outcome was altered on the disk; nothing is removed; check the disk"):
        done(markers, of)
    assert checkpoints.exists() and markers.state(of, context())[0] is State.STARTED
    outcome.write_text("written")
    done(markers, of)
    assert not checkpoints.exists() and markers.state(of, context())[0] is State.DONE


def test_what_the_run_did_not_make_is_not_overwritten(markers, tmp_path):
    (tmp_path / "outcome").write_text("a user's file")
    of = stage({}, artifacts=Artifacts((tmp_path / "outcome",)))
    with pytest.raises(UserError, match="outcome: exists, but this run did not make it"):
        markers.begin(of, context(), State.NEW, {})


def test_spoiled_work_starts_over(markers):
    done(markers, stage({}))
    markers.spoil("data", "the cache was altered")
    assert markers.state(stage({}), context()) == (State.STALE, "the cache was altered")


def rewrite(path, **fields):
    """Change a marker as a program does that knows its checksum."""
    raw = json.loads(path.read_text())
    raw.pop("checksum")
    path.write_text(json.dumps(raw | fields | {"checksum": digest_of(raw | fields)}))


@pytest.fixture
def made(tmp_path):
    """A stage that makes a folder and records, done; returns it with its folder."""

    def make(markers, name="data", **about):
        outcome, lines = tmp_path / "outcome", tmp_path / "lines"
        outcome.mkdir()
        (outcome / "values.json").write_text("[12]")
        (outcome / ".hidden").write_text("")
        lines.write_text("1\n2\n")
        of = stage({}, name, artifacts=Artifacts((outcome, lines), records=(lines,), **about))
        state, _ = markers.state(of, context())
        markers.begin(of, context(), State.STARTED if state is State.NEW else state, {f"version.{name}": 1})
        markers.end(of, context(), Made(7), 1.0)
        return of

    return make


@pytest.mark.parametrize("field", ["outputs", "inputs", "format", "files", "checksum", "seconds", "done"])
def test_one_changed_character_of_a_marker_is_found(markers, made, field):
    of = made(markers)
    text = markers.path("data").read_text()
    start = text.index(f'"{field}"')
    for place in (start + 1, start + len(field) + 4):  # the key, and the value
        other = chr(ord(text[place]) ^ 1)
        markers.path("data").write_text(text[:place] + other + text[place + 1 :])
        assert markers.state(of, context())[0] is State.LOST, (text[place], other)
    markers.path("data").write_text(text)
    assert markers.state(of, context()) == (State.DONE, "")


@pytest.mark.parametrize("content", ["[13]", "", None])
def test_an_altered_outcome_makes_the_stage_run_again(markers, made, tmp_path, content):
    of = made(markers)
    values = tmp_path / "outcome/values.json"
    values.unlink() if content is None else values.write_text(content)
    why = f"{values} {'is missing' if content is None else 'was altered'}"
    assert markers.state(of, context()) == (State.BROKEN, why)

    def keep(context, path):
        raise UserError(f"{path} must be kept")

    with pytest.raises(UserError, match=r"values\.json must be kept"):
        markers.state(replace(of, require_replaceable=keep), context())


@pytest.mark.parametrize("content", ["1\n3\n", "", None])
def test_altered_records_are_set_aside_and_do_not_rerun_the_stage(markers, made, tmp_path, content):
    of = made(markers)
    lines = tmp_path / "lines"
    lines.unlink() if content is None else lines.write_text(content)
    assert markers.state(of, context()) == (State.DONE, "")
    markers.settle(of, context())
    markers.settle(of, context())
    assert not lines.exists() and "lines" not in markers.read("data").files
    assert content is None or (tmp_path / "lines.altered.1").read_text() == content
    assert markers.state(of, context()) == (State.DONE, "")


def test_a_marker_without_checksums_is_found_done_and_gets_them(markers, made, tmp_path):
    of = made(markers)
    raw = json.loads(markers.path("data").read_text())
    old = {key: value for key, value in raw.items() if key not in ("checksum", "files", "verified")} | {"format": 2}
    markers.path("data").write_text(json.dumps(old))
    assert markers.state(replace(of, missing=lambda context, output: "it asks"), context()) == (State.BROKEN, "it asks")
    assert markers.state(of, context()) == (State.DONE, "")
    markers.upgrade()
    markers.settle(of, context())
    marker = markers.read("data")
    assert marker.verified is False and marker.files.keys() == {"outcome/values.json", "lines"}
    (tmp_path / "outcome/values.json").write_text("[13]")
    assert markers.state(of, context())[0] is State.BROKEN


@pytest.mark.parametrize("keeps", [True, False])
def test_a_marker_that_is_gone_is_told_from_a_stage_that_never_ran(markers, made, tmp_path, keeps):
    of = made(markers, fingerprinted=keeps)
    markers.path("data").unlink()
    assert markers.state(of, context()) == (State.NEW, "it has not run yet"), "a user's own folder, perhaps"
    done(markers, stage({}, "teacher"))
    state, why = markers.state(of, context())
    assert state is State.LOST and why == f"{markers.path('data')} is missing"
    markers.begin(of, context(), state, {})
    assert (tmp_path / "outcome").exists() == keeps and (tmp_path / "previous").exists() != keeps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 2, "done": "x", "inputs": 3}',
        '{"done": true}',
        "\xff",
        "[" * 100_000,
    ],
)
def test_a_damaged_marker_makes_the_stage_run_again(markers, text):
    markers.path("data").write_text(text, encoding="latin-1")
    state, why = markers.state(stage({}), context())
    assert state is State.LOST and why.endswith("data.json is damaged")


def test_a_damaged_output_makes_the_stage_run_again(markers):
    done(markers, stage({}), Made(3))
    rewrite(markers.path("data"), outputs={"number": "many"})
    assert markers.state(stage({}), context())[0] is State.LOST


def test_a_marker_of_a_later_version_is_rejected(markers):
    done(markers, stage({}))
    rewrite(markers.path("data"), format=99)
    with pytest.raises(UserError, match="written by a later version of pkd_dist"):
        markers.state(stage({}), context())


OLD = {
    "data": {"train.tsv": "1", "task.name": "sst2", "the text of my/more.txt": "2", "tokenizer": "3"},
    "distill": {"distill.alpha": 0.5, "the student's starting weights": "4", "the teacher's answers": "5",
                "the training data": "6", "the dev data": "7"},
    "evaluate": {"the student": "8", "the teacher": "9", "the dev data": "7", "the dev_mismatched data": "0"},
    "report": {"results": "a", "export": "b"},
}  # fmt: skip
TODAY = {
    "data": {"task.data:train.tsv": "1", "task.name": "sst2", "task.unlabeled:my/more.txt": "2", "teacher.tokenizer": "3"},
    "distill": {"distill.alpha": 0.5, "init.weights": "4", "cache.fingerprint": "5", "data.training": "6", "data.dev": "7"},
    "evaluate": {"distill.weights": "8", "teacher.weights": "9", "data.dev": "7", "data.dev_mismatched": "0"},
    "report": {"evaluate.results": "a", "export.weights": "b"},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_a_marker_of_0_1_0_is_found_done(markers, name):
    old = {"done": True, "inputs": OLD[name], "outputs": {"number": 5, "names": [], "sets": []}}
    old |= {"starts": 2, "stopped": 1, "seconds": 3.5}
    markers.path(name).write_text(json.dumps(old))
    of = stage(TODAY[name], name)
    assert markers.state(of, context()) == (State.DONE, "")
    assert markers.output(of) == Made(5)
    markers.upgrade()
    marker = markers.read(name)
    assert '"format": 3' in markers.path(name).read_text() and marker.verified is False
    assert (marker.starts, marker.stopped, marker.seconds) == (2, 1, 3.5)
    assert marker.fingerprint == digest_of(OLD[name]), "the checkpoints of 0.1.0 carry this digest"


def test_labels_name_what_is_no_configuration_key():
    assert label("task.data:train.tsv") == "task.data train.tsv"
    assert label("data.dev") == "the dev data"
    assert label("distill.alpha") == "distill.alpha"
    assert label("version.cache") == "the code of the stage cache"
