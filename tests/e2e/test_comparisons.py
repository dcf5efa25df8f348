"""`pkd compare` through the command line: each run is that of the launcher, whatever is killed meanwhile."""

import json
import shutil
import signal

import psutil
import pytest
from conftest import ROOT, launch, pkd, python, results, sentences, whole_run, write_config, write_tsv
from studies import in_background, steps, wait_for, workers_of

TO_EVALUATE = "data,teacher,cache,init,distill,evaluate"
SHALLOW = ("--method", "shallow: distill.beta=0 student.layers=[3]")


TIMES = ("latency_ms_p50", "latency_ms_p99", "samples_per_second", "reasoningTime", "spread")


def scores(folder):
    """What a run was scored, but for times."""
    found = results(folder)
    return {key: value for key, value in found["student"].items() if key not in TIMES}, found["splits"]


def table(folder):
    return json.loads((folder / "compare.json").read_text())


def configured(body, folder):
    """A configuration with three labeled splits, without run.dir: a comparison has its own folder."""
    (folder / "data").mkdir()
    for split, count, seed in (("train", 203, 1), ("dev", 41, 2), ("test", 37, 5)):
        write_tsv(folder / f"data/{split}.tsv", sentences(count, seed))
    settings = whole_run(body, folder / "data", folder)
    del settings["run"]["dir"]
    return write_config(settings, folder)


def taught_by(folder):
    """Settings with the teacher of another comparison, which need not be trained again."""
    return f"teacher.model={folder / 'teacher/teacher'}", "teacher.finetune=null"


def compare(config, folder, *arguments, methods="finetune,kd,first-k", seeds="1"):
    return pkd("compare", "--config", config, "--output", folder, "--methods", methods, "--seeds", seeds, *arguments)


@pytest.fixture(scope="module")
def done(body, tmp_path_factory):
    """A finished comparison: its configuration, folder, and output."""
    folder = tmp_path_factory.mktemp("compare")
    config = configured(body, folder)
    ended = compare(config, folder / "out", *SHALLOW, "--jobs", 2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return config, folder / "out", ended.stdout


def test_the_table_has_the_scores_of_the_runs(done):
    _, folder, out = done
    made = table(folder)
    assert list(made["methods"]) == ["finetune", "kd", "first-k", "shallow"] and made["splits"] == ["dev", "test"]
    for name, method in made["methods"].items():
        assert method["layers"] == (1 if name == "shallow" else 2)
        found = results(folder / name / "seed-1")
        test = found["splits"]["test"]["student"]["accuracy"]
        figures = method["seeds"]["1"]
        assert (figures["dev"], figures["test"]) == (found["accuracy"], test)
        assert figures["score"] == pytest.approx((41 * found["accuracy"] + 37 * test) / 78) == method["mean"]["score"]
        assert method["half_interval_95"]["score"] is None, "of one seed"
        assert f"compare: {name}, seed 1: dev {found['accuracy']:.4f}, test {test:.4f}, agreement" in out
    assert out.count(": data, teacher, cache") == 1, "one cache, made before there are workers"
    assert "minus finetune" in made["methods"]["kd"] and "minus finetune" not in made["methods"]["shallow"]
    assert (folder / "compare.png").stat().st_size > 10_000
    assert "| kd | 2 | 1 |" in (folder / "compare.md").read_text()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("kd", ["distill.beta=0"]), ("first-k", ["student.layers=null", "student.num_layers=2", "student.init={body}"])],
)
def test_a_run_is_that_of_the_launcher(done, body, tmp_path, method, settings):
    config, folder, _ = done
    own = [setting.format(body=body) for setting in settings]
    settings = [f"run.dir={tmp_path}", "run.seed=1", *own, *taught_by(folder)]
    run = launch("--config", config, *settings, "--stages", TO_EVALUATE)
    assert run.returncode == 0, run.stderr
    assert steps(tmp_path / "metrics.jsonl") == steps(folder / method / "seed-1/metrics.jsonl")
    assert scores(tmp_path) == scores(folder / method / "seed-1")


def test_the_launcher_continues_a_run(done):
    """It exports the student that the comparison trained."""
    run = done[1] / "kd/seed-1"
    ended = launch("--config", run / "config.yaml", "--stages", f"{TO_EVALUATE},export")
    assert ended.returncode == 0, ended.stderr
    assert {"distill: done", "evaluate: done"} <= set(ended.stdout.splitlines())
    assert (run / "export/model.safetensors").exists()


def test_another_call_adds_to_the_table_and_repeats_nothing(done):
    config, folder, _ = done
    before, written = table(folder), (folder / "kd/seed-1/results_eval.json").stat().st_mtime_ns
    more = compare(config, folder, methods="kd", seeds="1,3")
    assert more.returncode == 0, more.stdout + more.stderr
    made = table(folder)["methods"]
    assert {name: list(method["seeds"]) for name, method in made.items()} == {
        "finetune": ["1"], "kd": ["1", "3"], "first-k": ["1"], "shallow": ["1"],
    }  # fmt: skip
    assert all(made[name]["seeds"]["1"] == before["methods"][name]["seeds"]["1"] for name in made)
    assert (folder / "kd/seed-1/results_eval.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epochs=9"], "has a comparison with another train.epochs"),
        (["--method", "shallow: distill.beta=1 student.layers=[3]"], "--method: shallow has other settings in"),
        (["--method", "broken: distill.alpha=7"], "method broken: "),
    ],
)
def test_something_else_is_rejected_and_nothing_changes(done, arguments, message):
    config, folder, _ = done
    before = {path: path.read_bytes() for path in folder.glob("compare.*")}
    ended = compare(config, folder, *arguments)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and message in ended.stderr, ended.stderr
    assert {path: path.read_bytes() for path in folder.glob("compare.*")} == before


def test_a_sweep_does_not_use_the_folder_of_a_comparison(done):
    config, folder, _ = done
    ended = pkd("sweep", "--config", config, "--output", folder, "sweep.space={distill.alpha: [0.5, 0.7]}")
    assert ended.returncode == 2 and "has a comparison; choose another folder" in ended.stderr


def test_a_folder_of_an_earlier_version_keeps_its_table_and_its_runs(done, tmp_path):
    config, folder, _ = done
    shutil.copytree(folder / "teacher", tmp_path / "out/teacher")
    (tmp_path / "out/compare.json").write_text("{}")
    ended = compare(config, tmp_path / "out", "--launcher", "no-such-program")
    assert ended.returncode == 2 and (tmp_path / "out/compare.json").exists(), (
        "nothing is written before all is checked"
    )
    ended = compare(config, tmp_path / "out", methods="finetune")
    assert ended.returncode == 0, ended.stderr
    assert "the table of an earlier version is kept as" in ended.stdout
    assert (tmp_path / "out/compare.json.1").read_text() == "{}" and list(table(tmp_path / "out")["methods"]) == [
        "finetune"
    ]


def test_a_run_that_diverges_leaves_the_others_alone(done, tmp_path):
    config, folder, _ = done
    cache = tmp_path / "cache"
    hot = ("--method", "hot: train.learning_rate=1e30")
    arguments = (*hot, "train.epochs=1", f"cache.dir={cache}", *taught_by(folder))
    for _ in range(2):
        ended = compare(config, tmp_path / "out", *arguments, methods="finetune")
        assert ended.returncode == 3 and len(ended.stderr.splitlines()) == 1, ended.stderr
        assert "compare: hot, seed 1 diverged; the table in" in ended.stderr
        assert f"cache.dir ({cache}) is ignored; caches are in {tmp_path / 'out/bases'}" in ended.stdout
        assert not cache.exists()
        assert list(table(tmp_path / "out")["methods"]) == ["finetune"]


def test_killed_workers_and_comparisons_change_nothing(done, tmp_path):
    config, folder, _ = done
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = (*SHALLOW, "--jobs", 2, *taught_by(folder))
    command = ["compare", "--config", config, "--output", out, "--methods", "finetune,kd", "--seeds", "1", *arguments]
    with in_background(log, *command) as process:
        wait_for((out / "kd/seed-1/metrics.jsonl").exists, process)
        workers_of(process)[0].kill()
        wait_for(lambda: "a worker was killed" in log.read_text(), process)
        orphans = workers_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = compare(config, out, *arguments, methods="finetune,kd")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for method in ("finetune", "kd", "shallow"):
        assert scores(out / method / "seed-1") == scores(folder / method / "seed-1")
        assert steps(out / method / "seed-1/metrics.jsonl") == steps(folder / method / "seed-1/metrics.jsonl")
    assert orphans and not psutil.wait_procs(orphans, timeout=60)[1], "they end when their parent is killed"
    assert log.read_text().count(": data, teacher, cache") == 1 and ": data, teacher, cache" not in ended.stdout


def test_each_run_of_a_launcher_has_its_own_gpus_and_port(done, tmp_path):
    config, folder, _ = done
    starts = tmp_path / "start"  # a launcher that says what each run was given
    starts.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $MASTER_PORT $OMP_NUM_THREADS" >> {tmp_path}/given\nexec "$@"\n'
    )
    starts.chmod(0o755)
    command = ["compare", "--config", config, "--output", tmp_path / "out"]
    command += ["--methods", "finetune,kd", "--seeds", "1", "--jobs", "2", "--launcher", starts]
    ended = python(ROOT / "pkd_dist/cli/__main__.py", *command, CUDA_VISIBLE_DEVICES="5,6")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    _teacher, *given = [line.split(" ") for line in (tmp_path / "given").read_text().splitlines()]
    assert {devices for devices, _, _ in given} == {"5", "6"} and len({port for _, port, _ in given}) == len(given) == 2
    said = [(tmp_path / "out" / name / "seed-1/log.txt").read_text() for name in ("finetune", "kd")]
    assert "no loss term needs the teacher" in said[0] and "cache: runs" in said[1]
    for method in ("finetune", "kd"):
        assert scores(tmp_path / "out" / method / "seed-1") == scores(folder / method / "seed-1")
