"""`pkd sweep` through the command line: each point is trained as a run of its own would be, whatever is killed meanwhile."""

import itertools
import json
import shutil
import signal

import pandas as pd
import pytest
import yaml
from conftest import launch, pkd, results, whole_run, write_config
from studies import in_background, steps, wait_for, workers_of

from pkd_dist.search.study import TOGETHER, read

TIMES = {"seconds", "latency_ms"}


def searched(taught, data, folder, **sweep):
    """A sweep over six points, on a given teacher, without final runs, and without run.dir: it has its own folder."""
    settings = whole_run(taught, data, folder)
    del settings["run"]["dir"]
    settings["teacher"] = {"model": str(taught)}
    settings["sweep"] = {
        "space": {"train.learning_rate": [3e-3, 1e-3], "distill.alpha": [0.3, 0.5, 0.7]},
        "sampler": "grid",
        "pruner": "none",
        "final": {"seeds": []},
        **sweep,
    }
    return write_config(settings, folder)


def sweep(config, folder, *arguments, workers=1):
    return pkd("sweep", "--config", config, "--output", folder, "--workers", workers, *arguments)


def knowing(other, folder):
    """The folder of a new sweep, which has the sizes of another one's students: it need not export and time them."""
    shutil.copytree(other / "shapes", folder / "shapes")
    return folder


def table(folder):
    return pd.read_parquet(folder / "trials.parquet")


def without_times(folder):
    return table(folder).drop(columns=list(TIMES))


@pytest.fixture(scope="module")
def done(taught, data, tmp_path_factory):
    """A finished sweep with one final run: its configuration, folder, and output."""
    folder = tmp_path_factory.mktemp("sweep")
    config = searched(taught, data, folder, final={"seeds": [2]})
    ended = sweep(config, folder / "out", workers=2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return config, folder / "out", ended.stdout


def test_a_point_is_trained_as_a_run_of_its_own(done):
    _, folder, out = done
    made = table(folder)
    assert list(made["number"]) == [0, 1, 2, 3, 4, 5] and set(made["state"]) == {"complete"}
    points = list(zip(made["train.learning_rate"], made["distill.alpha"], strict=True))
    assert sorted(points) == list(itertools.product([1e-3, 3e-3], [0.3, 0.5, 0.7]))
    assert points != [(rate, alpha) for alpha in (0.3, 0.5, 0.7) for rate in (3e-3, 1e-3)], (
        "not in the order of keys and lists"
    )
    best = made.sort_values(["value", "dev_divergence"], ascending=[False, True]).iloc[0]
    assert f"winner: point {best['number']}, accuracy {best['value']:.4f} on dev" in out
    run = launch("--config", folder / "best.yaml", "--stages", "data,teacher,cache,init,distill")
    assert run.returncode == 0, run.stderr
    assert steps(folder / "best/metrics.jsonl") == steps(folder / f"trials/{best['number']}/metrics.jsonl")


def test_only_the_metrics_of_a_point_are_kept(done):
    assert {path.name for path in (done[1] / "trials/0").iterdir()} == {"metrics.jsonl"}


def test_the_winner_is_trained_again_and_exported(done):
    _, folder, out = done
    found = results(folder / "final/seed-2")
    assert f"seed 2: dev {found['main_metric']:.4f}: {folder / 'final/seed-2/export'}" in out
    assert (folder / "final/seed-2/export/model.safetensors").exists()


def test_the_same_command_finds_everything_done(done):
    config, folder, _ = done
    before, logs = table(folder), {path: path.read_bytes() for path in folder.glob("bases/*/log.txt")}
    again = sweep(config, folder)
    assert again.returncode == 0, again.stderr
    pd.testing.assert_frame_equal(table(folder), before)
    assert logs == {path: path.read_bytes() for path in logs} != {}, "no process was started for the base"


def sweeping(config, folder, log):
    return in_background(log, "sweep", "--config", config, "--output", folder, "--workers", "2")


def test_killed_workers_and_sweeps_change_nothing(done, taught, data, tmp_path):
    config, folder, log = searched(taught, data, tmp_path), knowing(done[1], tmp_path / "out"), tmp_path / "log"
    with sweeping(config, folder, log) as process:
        for number in (0, 2):
            wait_for((folder / f"trials/{number}/metrics.jsonl").exists, process)
            workers_of(process)[0].kill()
        wait_for((folder / "trials/3/metrics.jsonl").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert "another one continues its trial" in log.read_text() and "rerun the same command" in log.read_text()
    ended = sweep(config, folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    pd.testing.assert_frame_equal(without_times(folder), without_times(done[1]))


def test_a_point_that_fails_is_kept_with_its_reason(done, taught, data, tmp_path):
    space = {"train.learning_rate": [3e-3, 1e30], "student.layers": [[1, 3], [1, 9]]}
    config = searched(taught, data, tmp_path, space=space)
    ended = sweep(config, knowing(done[1], tmp_path / "out"), "train.epochs=1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not [*tmp_path.glob("out/bases/*/log.txt")], "a single worker makes the cache itself"
    made = table(tmp_path / "out").set_index(["train.learning_rate", "student.layers"])
    assert made.loc[(3e-3, "[1, 3]"), "state"] == "complete" and (made["state"] == "failed").sum() == 3
    assert "not finite" in made.loc[(1e30, "[1, 3]"), "reason"]
    assert "student.layers" in made.loc[(3e-3, "[1, 9]"), "reason"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_all_points_share_cannot_be_made(taught, data, tmp_path, workers):
    """No point fails of it."""
    config, folder = searched(taught, data, tmp_path), tmp_path / "out"
    folder.mkdir()
    (folder / "bases").touch()  # where a folder should be
    ended = sweep(config, folder, workers=workers)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert f"{folder / 'bases'} cannot be a folder (File exists); remove what is in its place" in ended.stderr
    assert {trial.state.name for trial in read(folder).trials} == {"WAITING"}


def test_halving_prunes_by_the_divergence_and_seeds_follow_a_completed_point(done, taught, data, tmp_path):
    config = searched(
        taught, data, tmp_path, sampler="tpe", pruner="asha", trials=7, seeds=[1, 2],
        space={"train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "distill.temperature": [1.0, 5.0]},
    )  # fmt: skip
    ended = sweep(config, knowing(done[1], tmp_path / "out"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made = table(tmp_path / "out")
    first, further = made[made["seed"] == 1], made[made["seed"] == 2]
    assert len(first) == 7 and set(first["state"]) == {"complete", "pruned"}
    assert (first[first["state"] == "pruned"]["epoch"] == 0.25).any()  # the pruner's first decision
    assert len(further) == (first["state"] == "complete").sum()
    for params in ("train.learning_rate", "distill.temperature"):
        assert sorted(further[params]) == sorted(first[first["state"] == "complete"][params])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.space={}"], "sweep.space: is missing; name the keys to search"),
        (["sweep.space={train.lr: [1.0]}"], "sweep.space: train.lr: unknown key; did you mean train.learning_rate?"),
        (["sweep.space={run.seed: [1, 2]}"], "sweep.space: run.seed: cannot be searched: use sweep.seeds"),
        (["sweep.space={train.epochs: [0, 1]}"], "sweep.space: train.epochs: 0 is invalid"),
        (["sweep.space={train.epochs: []}"], "train.epochs: must list at least one value"),
        (["sweep.space={distill.alpha: {low: 0.1, high: 0.9}}"], "a grid needs a list of values"),
        (["sweep.space={train.epochs: {low: 1, high: 3, step: 0.5}}"], "train.epochs: must be whole numbers"),
        (["sweep.space={train: [1]}"], "sweep.space: train: is a section"),
        (
            ["sweep.space={task.max_length: {low: 4, high: 128}, train.batch_size: {low: 1, high: 9000}}"],
            "is a grid of 1,125,000 points",
        ),
        (["sweep.objective=f1"], "sweep.objective: 'f1' is not scored on dev; allowed: accuracy"),
        (["sweep.budget=2 weeks"], "sweep.budget: '2 weeks' is no time; allowed"),
        (["sweep.seeds=[1, 1]"], "must name each seed once"),
    ],
)
def test_what_cannot_be_searched_is_rejected_before_anything_is_written(taught, data, tmp_path, overrides, message):
    config = searched(taught, data, tmp_path)
    ended = sweep(config, tmp_path / "out", *overrides)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert message in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("distill.temperature=3", "distill.temperature"),
        ("sweep.pruner=asha", "sweep.pruner"),
        ("task.data={copy}", "data"),
    ],
)
def test_a_study_of_something_else_is_rejected(done, data, tmp_path, changed, message):
    config, folder, _ = done
    (tmp_path / "copy").mkdir()
    for path in data.iterdir():
        (tmp_path / "copy" / path.name).write_text(path.read_text() + "one more film\t1\n")
    before = (folder / "study.journal").read_bytes()
    ended = sweep(config, folder, changed.format(copy=tmp_path / "copy"))
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert f"has a sweep with another {message}" in ended.stderr
    assert (folder / "study.journal").read_bytes() == before


def test_a_torn_journal_is_repaired(done):
    config, folder, _ = done
    journal = folder / "study.journal"
    content = journal.read_bytes()
    journal.write_bytes(content + b'{"op_code":4,"worker_id":"x","trial')
    try:
        ended = sweep(config, folder)
        assert ended.returncode == 0, ended.stderr
    finally:
        journal.write_bytes(content)


def test_show_reads_the_study(done):
    shown = pkd("sweep", "show", done[1])
    assert shown.returncode == 0, shown.stderr
    assert f"{done[1]}: 6 trials (6 complete)" in shown.stdout and "divergence" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "no such folder: nowhere; give a folder that `pkd sweep` wrote"),
        (["show", "."], ".: no study.journal; give a folder that `pkd sweep` wrote"),
        (["show"], "give one folder"),
        (["show", "x", "--workers", 2], "--workers: is not allowed with show DIR"),
        (["--output", "x"], "--config: is missing"),
        (["--config", "x"], "--output: is missing"),
    ],
)
def test_usage(arguments, message):
    ended = pkd("sweep", *arguments)
    assert ended.returncode == 2 and message in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_constraints_leave_points_out(done, taught, data, tmp_path):
    """The limit is between the sizes of the two shapes, so it is known after a first sweep; a second one has only it."""
    space = {"student.layers": [[1, 3], [3]]}
    first = sweep(searched(taught, data, tmp_path, space=space), knowing(done[1], tmp_path / "out"), "train.epochs=1")
    assert first.returncode == 0, first.stderr
    small, large = sorted(table(tmp_path / "out")["bytes"])
    limit = (large + small) / 2e6
    config = searched(taught, data, tmp_path, space=space, constraints={"size_mb": limit}, final={"seeds": [4]})
    ended = sweep(config, knowing(tmp_path / "out", tmp_path / "small"), "train.epochs=1")
    assert ended.returncode == 0, ended.stderr
    made = table(tmp_path / "small")
    made = made.set_index("student.layers")
    assert made.loc["[3]", "state"] == "complete" and made.loc["[1, 3]", "state"] == "pruned"
    assert "sweep.constraints.size_mb" in made.loc["[1, 3]", "reason"]
    exported = tmp_path / "small/final/seed-4/export/onnx/model.int8.onnx"
    assert exported.stat().st_size == small <= 1e6 * limit
    none = sweep(
        config, knowing(tmp_path / "out", tmp_path / "none"), "train.epochs=1", "sweep.constraints.size_mb=0.001"
    )
    assert not [*tmp_path.glob("none/trials/*/metrics.jsonl")]
    assert none.returncode == 2 and len(none.stderr.splitlines()) == 1
    assert (
        f"no point meets sweep.constraints; point {made.loc['[3]', 'number']} came closest" in none.stderr
        and "student.layers=[3]" in none.stderr
    )


def test_best_yaml_is_a_complete_configuration(done):
    content = yaml.safe_load((done[1] / "best.yaml").read_text())
    assert "sweep" not in content and content["run"]["seed"] == 1
    assert json.dumps(content["teacher"]["model"])


def test_students_that_are_trained_together_learn_as_alone(done, taught, data, tmp_path):
    """With dropout, in float32: what remains is the order of sums. One of them diverges and leaves the others alone; a kill
    separates them from what they had computed."""
    space = {
        "train.learning_rate": [3e-3, 1e-3, 1e30], "distill.beta": [0.0, 100.0], "distill.temperature": [5.0], "train.weight_decay": [0.1],
    }  # fmt: skip
    exact = [
        "train.epochs=2", "student.dropout=0.1", "train.deepspeed=ds_configs/zero1_fp32.json", "distill.alpha=0.5",
    ]  # fmt: skip
    folders = {}
    for students in (1, 4):
        folders[students] = knowing(done[1], tmp_path / str(students))
        config = searched(taught, data, tmp_path, space=space, students_per_step=students, seeds=[1, 2])
        command = ("sweep", "--config", config, "--output", folders[students], "--workers", 1, *exact)
        if students == 1:
            ended = pkd(*command)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            continue
        log = tmp_path / "log"
        with in_background(log, *command) as process:
            wait_for(lambda: [*folders[4].glob("trials/1/checkpoints/step-0000001?")], process)
            workers_of(process)[0].kill()
            assert process.wait(120) == 0, log.read_text()
        assert "another one continues its trial" in log.read_text()
    columns = ["train.learning_rate", "distill.beta", "seed"]  # further seeds are numbered as their points end
    alone, together = (table(folders[students]).set_index(columns).sort_index() for students in (1, 4))
    assert list(alone.index) == list(together.index) and list(alone["state"]) == list(together["state"])
    assert (alone["state"] == "complete").sum() == 8 and (alone["state"] == "failed").sum() == 2
    shared = [trial.user_attrs.get(TOGETHER, 1) for trial in read(folders[4]).trials]
    assert max(shared) == 4
    for trained in alone.index[alone["state"] == "complete"]:
        one, other = (
            steps(folders[students] / f"trials/{made.loc[trained, 'number']}/metrics.jsonl")
            for students, made in ((1, alone), (4, together))
        )
        assert len(one) == len(other) == 2 * 13 + 2
        for mine, its in zip(one, other, strict=True):
            assert mine.pop("split", None) == its.pop("split", None)
            assert mine == pytest.approx(its, rel=1e-3, abs=1e-5)
