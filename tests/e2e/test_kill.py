"""`kill -9` of the whole job at chosen moments: the same command again ends with the same bytes.

A moment is a file that the run makes: the test watches for it and kills. Dropout is on.
"""

import json
import signal

from conftest import TO_EXPORT, launch, losses, started, until, write_config

MOMENTS = {
    "teacher, mid-epoch": "teacher_metrics.jsonl:3",
    "teacher, mid-save": "teacher_checkpoints/.step-*.tmp/rank-*",
    "cache, one shard written": "cache/shard-00001.safetensors",
    "distill, first epoch": "metrics.jsonl:4",
    "distill, mid-save": "checkpoints/.step-*.tmp/rank-*",
    "distill, just committed": "checkpoints/step-*/commit.json",
    "distill, later": "metrics.jsonl:19",
    "distill, best weights written": "checkpoints/best-*.safetensors",
    "evaluate": "stages/evaluate.json",
    "export": ".export.tmp",
}


def kill_at(run, moment, *arguments, ranks=1):
    """Starts the job, and kills all of it when the moment comes."""
    with started(*arguments, ranks=ranks) as job:
        until(moment, run, job)


def test_killed_again_and_again_the_export_is_the_undisturbed_one(settings, tmp_path):
    """On one rank; two are struck in test_faults.py."""
    settings["metrics"] = {"port": 0}
    config = write_config(settings, tmp_path)
    calm = launch("--config", config, f"run.dir={tmp_path / 'calm'}", *TO_EXPORT)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    run = tmp_path / "hunted"
    for moment in MOMENTS.values():
        kill_at(run, moment, "--config", config, f"run.dir={run}")
    end = launch("--config", config, f"run.dir={run}", *TO_EXPORT)
    assert end.returncode == 0, end.stdout + end.stderr
    for name in ("teacher/model.safetensors", "export/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name
    for name in ("metrics.jsonl", "teacher_metrics.jsonl"):
        hunted, undisturbed = (
            [
                {k: v for k, v in json.loads(line).items() if k not in ("time", "seconds", "samples_per_second")}
                for line in (folder / name).read_text().splitlines()
            ]
            for folder in (run, tmp_path / "calm")
        )
        assert hunted == undisturbed, f"{name}: without gaps or doubles"
    counted, once = (
        json.loads((folder / "counters/node-0.json").read_text())["pkd_samples_total"]
        for folder in (run, tmp_path / "calm")
    )
    assert counted >= once, "what a checkpoint holds is counted, though nobody scraped it"
    assert not list(run.glob(".*")) and not list(run.rglob("*.tmp")), "no temporary file stays"


def test_a_stop_signal_commits_a_checkpoint(settings, tmp_path):
    settings["train"]["epochs"] = 50
    config = write_config(settings, tmp_path)
    run = tmp_path / "run"
    with started("--config", config) as [job]:
        until("metrics.jsonl:7", run, [job])
        job.send_signal(signal.SIGUSR1)
        _, error = job.communicate(timeout=120)
    assert job.returncode == 75, error
    assert "stopped by SIGUSR1; a checkpoint of step" in error and "rerun the same command to resume" in error
    step = len(losses(run))
    assert (run / f"checkpoints/step-{step:08d}/commit.json").exists()
    again = launch("--config", config, "train.epochs=50", "--stages", "distill")
    assert f"resuming from step {step} of 650" in again.stdout, again.stdout + again.stderr
