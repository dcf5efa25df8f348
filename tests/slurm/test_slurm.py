"""Runs under a real SLURM of two nodes: the ranks of `srun`, and a job that is preempted, requeued and finishes."""

import json
import os
import re
import shutil
import sys

import pandas as pd
import pytest
from cluster import Cluster, until
from conftest import ROOT, launch, losses, whole_run, write_config

from pkd_dist.files import sha256
from pkd_dist.telemetry.records import read

PROJECT = ("launcher", "pkd_dist", "ds_configs", "slurm")


@pytest.fixture(scope="session")
def cluster():
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def config(settings, tmp_path):
    """Float32 without dropout: what remains between 1 and 2 ranks is the order of sums."""
    settings["train"] |= {"epochs": 2, "deepspeed": "ds_configs/zero1_fp32.json"}
    settings["teacher"]["finetune"] |= {"epochs": 1, "dropout": 0.0}
    settings["student"]["dropout"] = 0.0
    settings["cache"] |= {"precision": "float32", "dtype": "float32"}
    settings["checkpoint"]["every_steps"] = 20
    return write_config(settings, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed") / "run"


def on_two_nodes(cluster, config, run):
    """The run as two ranks of srun, unless an earlier test made it."""
    if not (run / "report.html").exists():
        srun = ["srun", "--nodes=2", "--ntasks=2", "--mpi=none", "--kill-on-bad-exit=1", sys.executable]
        out = cluster(*srun, ROOT / "launcher/train.py", "--config", config, f"run.dir={run}", cwd=ROOT)
        assert "2 rank(s) started by srun" in out
    return run


def submit(cluster, project, *arguments, cwd):
    """Submits with the real command; returns the job's number and the snapshot's folder."""
    out = cluster(project / "slurm/pkd-submit", *arguments, cwd=cwd)
    job, folder = re.search(r"^job (\d+): ", out)[1], re.search(r"^snapshot: (.+)$", out, re.M)[1]
    return job, cwd / folder


def ended(cluster, job):
    return cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def test_two_ranks_of_srun_train_as_one_rank_does(cluster, config, tmp_path, undisturbed):
    two = losses(on_two_nodes(cluster, config, undisturbed))
    alone = launch("--config", config, f"run.dir={tmp_path / 'one'}", "--stages", "data,teacher,cache,init,distill")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert len(two) == 26
    assert two == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_preempted_job_ends_with_the_undisturbed_bytes(cluster, config, body, data, tmp_path, undisturbed):
    """Preempted twice, each time by a different signal."""
    checkout = tmp_path / "checkout"
    for name in PROJECT:
        shutil.copytree(ROOT / name, checkout / name)
    paths = [f"teacher.model={os.path.relpath(body, tmp_path)}", f"task.data={os.path.relpath(data, tmp_path)}"]
    options = ["--nodes=2", "--tasks-per-node=1", "run.dir=here/run", *paths]
    job, folder = submit(cluster, checkout, "--config", config, *options, cwd=tmp_path)
    shutil.rmtree(checkout)  # the job has its own copy
    run = tmp_path / "here/run"
    log = folder / f"logs/{job}.log"
    until((run / "metrics.jsonl").exists, "the first step")
    until(lambda: len(losses(run)) >= 3, "the third step")

    def said(rank):
        return (folder / f"logs/{job}-rank{rank}.log").read_text()

    for restart, signal in enumerate(["USR1", "HUP"], 1):
        until(lambda starts=restart: said(0).count("2 rank(s) started by srun") == starts, "the start of the ranks")
        cluster("scancel", f"--signal={signal}", "--batch", job)
        until(lambda restart=restart: cluster.job(job)["Restarts"] == str(restart), "the requeue")
        stopped = log.read_text()
        assert f"SIG{signal}: the ranks commit a checkpoint and stop" in stopped
        assert f"stopped with status 75: requeued, restart {restart} of 50" in stopped
        assert (folder / f"logs/{job}-{restart - 1}.status").read_text() == "75\n"
    until(lambda: ended(cluster, job), "the end of the requeued job")
    assert cluster.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert log.read_text().endswith("pkd: done\n")
    assert said(0).count("2 rank(s) started by srun") == 3 and "resuming from step" in said(0)
    assert "Traceback" not in said(0) + said(1)
    calm = on_two_nodes(cluster, config, undisturbed)
    assert losses(run) == losses(calm), "without gaps or doubles"
    assert sha256(run / "export/model.safetensors") == sha256(calm / "export/model.safetensors")


def test_a_job_ends_with_the_status_of_the_run(cluster, config, tmp_path):
    """Not with that of a rank which srun killed because another had failed."""
    job, folder = submit(cluster, ROOT, "--config", config, "--nodes=2", "--sbatch=--hold", cwd=tmp_path)
    (folder / "run.yaml").unlink()
    cluster("scontrol", "release", job)
    until(lambda: ended(cluster, job), "the end of the job")
    assert [cluster.job(job)[key] for key in ("JobState", "ExitCode", "Restarts")] == ["FAILED", "2:0", "0"]
    assert "pkd: ended with status 2; see " in (folder / f"logs/{job}.log").read_text()
    said = [(folder / f"logs/{job}-rank{rank}.log").read_text() for rank in range(2)]  # srun may have killed one before
    assert any("run.yaml: no such configuration file" in text for text in said), said


def test_prometheus_finds_each_node_and_still_looks_for_it_after_a_kill(cluster, config, tmp_path):
    targets, more = tmp_path / "targets", ["metrics.enabled=true", "metrics.port=0", "train.epochs=1000"]
    options = ["--nodes=2", "--tasks-per-node=1", f"metrics.discovery_dir={targets}", *more]
    job, folder = submit(cluster, ROOT, "--config", config, *options, cwd=tmp_path)
    run = folder.parents[1]
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 3, "the third step")
    labels = [json.loads(file.read_text())[0]["labels"] for file in sorted(targets.iterdir())]
    assert [label["node"] for label in labels] == ["0", "1"]
    assert {label["run"] for label in labels} == {str(run)}
    cluster("scancel", "--signal=KILL", f"{job}.0")  # the ranks, not the batch script
    until(lambda: ended(cluster, job), "the end of the job")
    assert cluster.job(job)["JobState"] == "FAILED"
    assert len(list(targets.iterdir())) == 2, "the alert on the crash needs them"
    cluster(sys.executable, "-m", "pkd_dist.cli", "metrics", "withdraw", "--config", folder / "run.yaml", cwd=ROOT)
    assert not list(targets.iterdir())


def test_what_is_asked_for_reaches_slurm(cluster, config, tmp_path):
    options = ["--nodes=1-2", "--gpus-per-node=2", "--time=2:00:00", "--sbatch=--hold", "--sbatch", "--comment='a b'"]
    job, folder = submit(cluster, ROOT, "--config", config, *options, "train.epochs=7", cwd=tmp_path)
    known = cluster.job(job)
    cluster("scancel", job)
    wanted = {
        "NumNodes": "1-2", "MinCPUsNode": "2", "TresPerNode": "gres:gpu:2", "TimeLimit": "02:00:00",
        "Requeue": "1", "WorkDir": str(tmp_path), "StdOut": f"{folder}/logs/{job}.log",
        "JobName": "pkd-run", "Comment": "a",
    }  # fmt: skip
    assert {key: known.get(key) for key in wanted} == wanted
    assert "epochs: 7" in (folder / "run.yaml").read_text()
    assert json.loads((folder / "job.json").read_text())["job"] == job


def test_a_refusal_of_sbatch_is_one_line_and_leaves_nothing(cluster, config, tmp_path):
    argv = [ROOT / "slurm/pkd-submit", "--config", config, "--partition=nowhere"]
    line = cluster(*argv, cwd=tmp_path, check=False)
    assert re.fullmatch(r"pkd-submit: sbatch rejected the job: .*invalid partition.*\n", line)
    assert not list((tmp_path / "run/slurm").iterdir())


def test_an_array_of_workers_ends_with_a_winner_whatever_is_killed(cluster, data, taught, tmp_path):
    """Three workers on two nodes; one of them is killed, another is preempted and requeued."""
    settings = whole_run(taught, data, tmp_path)
    settings["teacher"] = {"model": str(taught)}
    settings["run"]["dir"] = "sweep"
    space = {"train.learning_rate": [3e-3, 1e-3], "distill.alpha": [0.3, 0.7]}
    settings["sweep"] = {"space": space, "sampler": "grid", "pruner": "none", "final": {"seeds": [2]}}
    config = write_config(settings, tmp_path)
    out = cluster(ROOT / "slurm/pkd-submit", "--sweep", config, "--workers", "3", cwd=tmp_path)
    array, last = re.search(r"^job (\d+): an array of 3 workers; then job (\d+): the winner$", out, re.M).groups()
    folder, trials = tmp_path / "sweep", tmp_path / "sweep/trials"
    until((trials / "0/metrics.jsonl").exists, "the first trial")
    cluster("scancel", "--signal=KILL", f"{array}_1", check=False)
    cluster("scancel", "--signal=USR1", "--batch", f"{array}_2", check=False)
    until(lambda: ended(cluster, last), "the end of the last job", 600)
    assert cluster.job(last)["JobState"] == "COMPLETED", (folder / f"slurm/1/logs/{last}.log").read_text()
    made = pd.read_parquet(folder / "trials.parquet")
    assert list(made["state"]) == ["complete"] * 4
    best = made.sort_values(["value", "dev_divergence"], ascending=[False, True]).iloc[0]
    again = launch("--config", folder / "best.yaml", "--stages", "data,teacher,cache,init,distill", bare=0)
    assert again.returncode == 0, again.stderr
    history = [row["main_metric"] for row in read(folder / "best/metrics.jsonl") if row.get("split") == "dev"]
    assert max(history) == best["value"]
    assert (folder / "final/seed-2/export/model.safetensors").exists()
