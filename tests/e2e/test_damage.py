"""Damaged files of a run, through the real launcher: what was altered is named, set aside and made again.

A sample of `benchmarks/faults/matrix.py`, which damages every file of a finished and of a half-trained run.
"""

import json
import os
import shutil

import pytest
from conftest import ForkedStart, launch, pkd, python

from benchmarks.faults.matrix import Case, Matrix, damage
from pkd_dist.files import sha256
from pkd_dist.stages.base import NAMES


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.faults.matrix.Start", ForkedStart)
        yield Matrix(tmp_path_factory.mktemp("matrix"), launch)


@pytest.fixture
def copy(matrix, tmp_path):
    """A copy of the finished run, and the arguments that start it again."""
    run = tmp_path / "run"
    shutil.copytree(matrix.run_of("finished"), run)
    return run, ("--config", matrix.config, f"run.dir={run}")


SAMPLE = {
    "results and predictions": [("results_eval.json", "flip"), ("answers.safetensors", "change")],
    "data": [("data/train/meta.json", "change"), ("data/dev/labels.npy", "flip")],
    "a teacher's configuration": [("teacher/config.json", "empty"), ("stages/init.json", "flip")],
    "a tokenizer": [("student_init/tokenizer.json", "change"), ("cache/manifest.json", "change")],
    "a page and a model card": [("report.html", "delete"), ("export/README.md", "change")],
}


@pytest.mark.parametrize("what", SAMPLE)
def test_damaged_files_are_made_again(matrix, what):
    row = matrix.judge(*[Case("finished", file, way) for file, way in SAMPLE[what]])
    assert row.problems == [] and row.statuses == [0], row


def test_a_half_trained_run_is_finished(matrix):
    damaged = [
        ("student_init/tokenizer.json", "change"),
        ("stages/teacher.json", "delete"),
        ("cache/manifest.json", "flip"),
    ]
    row = matrix.judge(*[Case("half-trained", file, way) for file, way in damaged])
    assert row.problems == [] and row.statuses == [0], row


def test_the_matrix_has_every_file_that_is_read(matrix):
    files = {case.file for case in matrix.cases("finished")}
    assert {f"stages/{name}.json" for name in NAMES} | {"teacher/config.json", "cache/manifest.json"} <= files
    assert len(list(matrix.cases("finished"))) == 4 * len(files)


def test_a_changed_digit_in_the_results_of_a_marker_is_not_believed(copy):
    run, arguments = copy
    marker = run / "stages/evaluate.json"
    before = json.loads((run / "results_eval.json").read_text())
    text, accuracy = marker.read_text(), f'"accuracy": {before["teacher"]["accuracy"]}'
    assert accuracy in text
    marker.write_text(text.replace(accuracy, '"accuracy": 0.195', 1))
    plan = launch(*arguments, "--dry-run")
    assert f"evaluate: runs, because {marker} is damaged" in plan.stdout, plan.stderr
    done = launch(*arguments)
    assert done.returncode == 0 and f"evaluate: runs again, because {marker} is damaged" in done.stdout, done.stderr
    assert "19.5%" not in done.stdout + (run / "export/README.md").read_text() + (run / "report.html").read_text()
    assert json.loads((run / "results_eval.json").read_text())["teacher"]["accuracy"] == before["teacher"]["accuracy"]
    for name in NAMES[:5]:
        assert f"{name}: done\n" in done.stdout, name


def test_a_training_whose_marker_is_damaged_is_not_repeated(copy):
    run, arguments = copy
    metrics = (run / "metrics.jsonl").read_bytes()
    damage(run / "stages/distill.json", "flip")
    done = launch(*arguments)
    assert done.returncode == 0 and "distill.json is damaged" in done.stdout, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == metrics and not list(run.glob("previous/*/checkpoints"))
    assert "evaluate: done\n" in done.stdout, "the weights are the same"


@pytest.mark.parametrize("way", ["flip", "delete"])
def test_altered_records_are_named_and_missing_in_the_report(copy, way):
    run, arguments = copy
    damage(run / "metrics.jsonl", way)
    (run / "report.html").unlink()
    done = launch(*arguments)
    assert done.returncode == 0 and not done.stderr.count("Traceback"), done.stderr
    aside = run / "metrics.jsonl.altered.1"
    problem = f"was altered or cut after its training: {aside} is" if way == "flip" else "lacks 3 of the 3 evaluations"
    assert done.stdout.count(f"metrics.jsonl: {problem}") == 1 and "cannot be made again" in done.stdout, done.stdout
    assert pkd("runs", "clean", run).returncode == 0 and aside.exists() == (way == "flip")
    assert "metrics.jsonl has 0 of 39 records of steps" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["logs", "cache", "stages", "config.yaml", "run.lock", "stages/cache.json"])
def test_a_file_for_a_folder_and_a_folder_for_a_file(matrix, copy, name):
    run, arguments = copy
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("not a folder")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    done = launch(*arguments)
    if name == "stages":  # what the run made is in the way, and nothing says that it made it
        assert done.returncode == 2 and "exists, but this run did not make it" in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert sha256(run / "export/model.safetensors") == matrix.weights
    kind = "folder" if name in ("logs", "cache", "stages") else "file"
    assert f"{path}: is not a {kind}; it is kept as {path}.1\n" in done.stdout


UNPRIVILEGED = """
import ctypes, sys
version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(version_3, nothing) == 0  # root may write everywhere otherwise
from pkd_dist.cli.launch import leave, train
leave(train(sys.argv[1:]))
"""


def test_another_users_cache_is_used_or_named(matrix, copy, tmp_path):
    """Without the right to write, a complete cache serves, and an incomplete one is refused in one line."""
    run, arguments = copy
    shared = tmp_path / "shared"
    shutil.move(run / "cache", shared)
    if os.geteuid() == 0:
        os.chown(shared, 65534, 65534)
    shared.chmod(0o555)
    unprivileged = tmp_path / "unprivileged.py"
    unprivileged.write_text(UNPRIVILEGED)

    def start(*more):
        return python(unprivileged, *arguments, f"cache.dir={shared}", "--stages", "data,teacher,cache", *more)

    done = start()
    assert done.returncode == 0 and f"cache: {shared} is not writable" in done.stdout, done.stdout + done.stderr
    shared.chmod(0o755)
    (shared / "manifest.json").unlink()
    shared.chmod(0o555)
    refused = start(f"evaluate.result_dir={shared}")
    assert (
        refused.stderr
        == f"pkd: evaluate.result_dir: {shared} is not writable (Permission denied); choose another evaluate.result_dir\n"
    )
    refused = start()
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith(
        f"pkd: cache.dir: {shared} is not writable (Permission denied), and holds no complete"
    )
    shared.chmod(0o755)
