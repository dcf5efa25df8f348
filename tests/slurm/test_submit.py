"""`pkd-submit` without SLURM: invalid input and `--dry-run`."""

import os
import re
import shlex
import subprocess
import sys

import forked
import pytest
from conftest import ROOT, environment, write_config, write_tsv

COMMAND = ROOT / "slurm/pkd-submit"


@pytest.fixture
def config(tmp_path):
    """The least that is valid."""
    write_tsv(tmp_path / "data/train.tsv", [("a good film", 1)])
    return write_config({"run": {"dir": "run"}, "task": {"data": "data"}}, tmp_path)


def pkd_submit(*arguments, cwd, **extra):
    return forked.run(COMMAND, arguments, cwd, [environment(**extra)], 60)


REFUSED = {
    "no configuration": (["--config", "none.yaml"], r"none\.yaml: no such configuration file"),
    "no option": ([], r"one of the arguments --config --sweep is required"),
    "workers without a sweep": (["--workers=2"], r"--workers is for --sweep"),
    "a sweep of nothing": (["--sweep", "run.yaml"], r"run\.yaml: sweep\.space: is missing; name the keys to search"),
    "a sweep of an unknown key": (
        ["--sweep", "run.yaml", "sweep.space={train.lr: [0.1]}"],
        r"sweep\.space: train\.lr: unknown key; did you mean train\.learning_rate\?",
    ),
    "a sweep on nodes": (
        ["--sweep", "run.yaml", "--nodes=2"],
        r"--sweep: each job of the array has one node and one task",
    ),
    "a sweep and a run": (["--sweep", "run.yaml", "--config", "run.yaml"], r"not allowed with argument"),
    "unknown key": (["distill.alpah=1"], r"distill\.alpah: unknown key; did you mean distill\.alpha\?"),
    "unknown key in the file": (["--config", "bad.yaml"], r"bad\.yaml:2: train\.epoch: unknown key; .*train\.epochs\?"),
    "value": (["train.epochs=many"], r"train\.epochs: 'many' is invalid; allowed: integer >= 1"),
    "no JSON": (["train.deepspeed=no.json"], r"run\.yaml: train\.deepspeed: no such file: no\.json"),
    "no data": (["task.data=nowhere"], r"task\.data: no such folder: nowhere"),
    "no table": (["task.data=run.yaml"], r"task\.data: run\.yaml is a file, but none of \.tsv, \.csv, "),
    "no column to split by": (
        ["task.data=data/movie-reviews/dev.tsv", "task.split.group=film"],
        r"dev\.tsv:1: has no column 'film'; the header names 'sentence', 'label'",
    ),
    "unknown option": (["--node=2"], r"unrecognized arguments: --node=2"),
    "nodes": (["--nodes=two"], r"argument --nodes: 'two' is invalid; allowed: N, or MIN-MAX"),
    "no nodes": (["--nodes=0"], r"argument --nodes: '0' is invalid"),
    "nodes reversed": (["--nodes=4-2"], r"argument --nodes: '4-2' is invalid"),
    "gpus": (["--gpus-per-node=a100"], r"argument --gpus-per-node: 'a100' is invalid; allowed: .* or TYPE:N"),
    "no gpus": (["--gpus-per-node=a100:0"], r"argument --gpus-per-node: 'a100:0' is invalid"),
    "tasks": (["--tasks-per-node=0"], r"argument --tasks-per-node: '0' is invalid; allowed: an integer of at least 1"),
    "both": (["--gpus-per-node=2", "--tasks-per-node=2"], r"--tasks-per-node is for nodes without GPUs"),
    "time": (["--time=soon"], r"argument --time: 'soon' is invalid; allowed: minutes, minutes:seconds"),
    "no time": (["--time=0"], r"argument --time: '0' is invalid"),
    "signal": (
        ["--signal-seconds=70000"],
        r"--signal-seconds: '70000' is invalid; allowed: an integer from 1 to 65535",
    ),
    "signal at once": (["--time=1:30"], r"--signal-seconds 120 is not less than --time 1:30 \(90 s\)"),
    "restarts": (["--max-restarts=-1"], r"argument --max-restarts: '-1' is invalid; .*at least 0"),
    "quotes": (["--sbatch=--comment='a"], r"--sbatch: \"--comment='a\" cannot be parsed: No closing quotation"),
    "per cent": (["run.dir=100%"], r"run\.dir: 100%: SLURM expands % in the path of a log"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_status_2(config, tmp_path, name):
    arguments, line = REFUSED[name]
    (tmp_path / "bad.yaml").write_text("run: {dir: r}\ntrain: {epoch: 1}\n")
    given = [] if {"--config", "--sweep"} & set(arguments) or name == "no option" else ["--config", "run.yaml"]
    check_refused(pkd_submit(*given, *arguments, cwd=tmp_path), line)
    assert not (tmp_path / "run").exists()


def test_no_sbatch(config, tmp_path):
    check_refused(
        pkd_submit("--config", config, cwd=tmp_path, PATH=str(tmp_path)), r"sbatch is not on PATH; submit from"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    done = pkd_submit("--config", config, "run.dir=file/run", cwd=tmp_path, PATH=str(tmp_path))
    check_refused(done, r"run\.dir: .*/file/run/slurm/1 cannot be written \(Not a directory\); choose another run\.dir")


def test_an_environment_without_the_requirements(tmp_path):
    """-S: a Python without its installed packages."""
    argv = [sys.executable, "-S", COMMAND, "--config", "run.yaml"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    check_refused(done, r"cannot import \w+; activate the project's environment first")


def check_refused(done, line):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("pkd-submit: "), done.stderr
    assert re.search(line, done.stderr), done.stderr


def test_dry_run_prints_the_command_and_the_script_and_writes_nothing(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    options = "--nodes 4 --gpus-per-node h100:4 --cpus-per-task 8 --time 1-12 --partition p --account a --qos q"
    more = ["--constraint=x&y", "--signal-seconds=300", "--max-restarts=3", "--sbatch", "--mem=0 --exclusive"]
    arguments = ["--config", "run.yaml", *options.split(), *more, "run.dir=my runs/a"]
    done = pkd_submit(*arguments, "--dry-run", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    command, script = done.stdout.split("\n\n", 1)
    folder = tmp_path / "my runs/a/slurm/1"
    assert shlex.split(command) == [
        "sbatch", "--parsable", "--job-name=pkd-a", f"--chdir={tmp_path}", f"--output={folder}/logs/%j.log",
        "--nodes=4", "--ntasks-per-node=4", "--signal=B:USR1@300", "--gpus-per-node=h100:4", "--cpus-per-task=8",
        "--time=1-12", "--partition=p", "--account=a", "--qos=q", "--constraint=x&y", "--mem=0", "--exclusive",
        f"{folder}/train.sbatch", str(folder), sys.executable, "4", "3",
    ]  # fmt: skip
    assert script == (ROOT / "slurm/train.sbatch").read_text()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_describes_the_job_around_it_is_not_passed_on(config, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\nenv > environment\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    around = {
        "SLURM_ARRAY_JOB_ID": "3",
        "SLURM_RESTART_COUNT": "50",
        "SLURM_NTASKS_PER_NODE": "1",
        "SRUN_CPUS_PER_TASK": "16",
    }
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = pkd_submit("--config", "run.yaml", cwd=tmp_path, PATH=path, SLURM_CONF="here", **around)
    assert done.returncode == 0 and done.stdout.startswith("job 7: "), done.stderr
    passed_on = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines())
    assert passed_on["SLURM_CONF"] == "here" and not around.keys() & passed_on.keys()


def test_a_sweep_is_an_array_and_a_job_after_it(config, tmp_path):
    options = [
        "--workers=16",
        "--gpus-per-node=1",
        "--time=2:00:00",
        "sweep.space={distill.alpha: [0.1, 0.9]}",
        "--dry-run",
    ]
    done = pkd_submit("--sweep", config, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    array, last, _ = done.stdout.split("\n\n", 2)
    assert "--array=0-15" in array and array.endswith(f"--output {tmp_path}/run --trials-only")
    assert "--dependency=afterany:ARRAY" in last and last.endswith(f"--output {tmp_path}/run")
    for command in (array, last):
        assert "--gpus-per-node=1" in command and "--ntasks-per-node=1" in command
        assert " 1 50 pkd_dist/cli/__main__.py sweep --config " in command
    assert not (tmp_path / "run").exists()
