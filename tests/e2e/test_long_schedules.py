"""Through the real command line: a finished run continues with more epochs, and one that stops early survives `kill -9`."""

import json
import shutil

import pytest
from conftest import launch, whole_run, write_config
from test_kill import kill_at


@pytest.fixture(scope="module")
def prepared(body, data, tmp_path_factory):
    """A run up to the student's start. Tests copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    settings = whole_run(body, data, folder)
    settings["train"]["schedule"] = "constant"
    done = launch("--config", write_config(settings, folder), "--stages", "data,teacher,cache,init")
    assert done.returncode == 0, done.stderr
    return folder


def copied(prepared, name):
    """The command line of a copy of the run, and its folder."""
    run = prepared / name
    shutil.copytree(prepared / "run", run)
    return ("--config", prepared / "run.yaml", f"run.dir={run}"), run


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds", "samples_per_second")} for line in lines]


def test_a_finished_run_continues_with_more_epochs(prepared):
    command, calm = copied(prepared, "calm")
    done = launch(*command, "train.epochs=3", "--stages", "distill")
    assert done.returncode == 0, done.stderr
    command, run = copied(prepared, "longer")
    done = launch(*command, "--stages", "distill")
    assert done.returncode == 0, done.stderr
    plan = launch(*command, "train.epochs=3", "--dry-run")
    assert (
        "distill: continues, because train.epochs changed (2 -> 3)\n  evaluate: may run, after distill" in plan.stdout
    )
    done = launch(*command, "train.epochs=3", "--stages", "distill")
    assert done.returncode == 0, done.stderr
    assert "distill: continues, because train.epochs changed (2 -> 3)" in done.stdout
    assert "distill: resuming from step 26 of 39 (step-00000026)" in done.stdout
    assert records(run) == records(calm)
    made = [json.loads((folder / "stages/distill.json").read_text())["outputs"] for folder in (run, calm)]
    assert made[0] == made[1] and len(made[0]["history"]) == 3
    assert {"agreement", "divergence"} <= made[0]["history"][0].keys()
    last = "checkpoints/step-00000039/rank-0000.safetensors"
    assert (run / last).read_bytes() == (calm / last).read_bytes()
    marker = json.loads((run / "stages/distill.json").read_text())
    assert (marker["starts"], marker["stopped"]) == (1, 0), "not taken for a run that was killed"
    assert not (run / "previous").exists()
    rates = [line["learning_rate"] for line in records(run) if "split" not in line]
    assert set(rates[1:]) == {3e-3}
    teacher = [json.loads(line) for line in (run / "teacher_metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in teacher if "split" not in line]
    assert rates[-1] < rates[-2] < max(rates) and not any("divergence" in line for line in teacher)
    fewer = launch(*command, "--dry-run").stdout
    assert "distill: runs, because train.epochs changed (3 -> 2)" in fewer, "it would start over"


def test_a_run_that_stops_early_is_killed_and_resumed(prepared):
    settings = ["train.patience_epochs=1", "train.epochs=30", "evaluate.best_by=divergence", "train.learning_rate=0.01"]
    command, calm = copied(prepared, "patient")
    done = launch(*command, *settings, "--stages", "distill")
    assert done.returncode == 0, done.stderr
    made = json.loads((calm / "stages/distill.json").read_text())["outputs"]
    end, distances = len(made["history"]), [entry["divergence"] for entry in made["history"]]
    assert end < 30 and made["best_epoch"] == end - 1 and made["steps"] == 13 * end
    assert distances[-1] >= distances[-2] and distances[:-1] == sorted(distances[:-1], reverse=True)
    assert f"distill: stopped after epoch {end} of 30: dev has not improved for 1 epoch(s)" in done.stdout
    command, run = copied(prepared, "killed")
    lines = len(records(calm))
    for moment in (f"metrics.jsonl:{lines - 1}", f"checkpoints/step-{13 * end:08d}/commit.json"):
        kill_at(run, moment, *command, *settings, "--stages", "distill,evaluate")
    done = launch(*command, *settings, "--stages", "distill,evaluate")
    assert done.returncode == 0, done.stderr
    assert records(run) == records(calm)
    assert json.loads((run / "stages/distill.json").read_text())["outputs"] == made
    assert (run / "results_eval.json").exists(), "the next stage follows"
