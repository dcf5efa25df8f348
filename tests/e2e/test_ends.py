"""How a run ends early and goes on: signals in any stage, other numbers of ranks, a second job, values that are not finite."""

import hashlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import launch, losses, pkd, sentences, started, until, write_config, write_tsv
from safetensors.torch import load_file, save_file
from test_kill import kill_at

from pkd_dist.distillation.cache import map_tensors
from pkd_dist.export import hf

TO_DISTILL = ("--stages", "data,teacher,cache,init,distill")


def signalled_at(run, moment, number, *arguments):
    """Sends a signal to rank 1 of two when the moment comes; returns the message of the ended job."""
    with started(*arguments, ranks=2) as job:
        until(moment, run, job)
        job[1].send_signal(number)
        texts = [process.communicate(timeout=120) for process in job]
        assert [process.returncode for process in job] == [75, 75], texts
    said = [line for _, error in texts for line in error.splitlines() if line.startswith("pkd: ")]
    assert len(said) == 1 and "Traceback" not in str(texts), texts
    return said[0]


def test_a_signal_on_one_rank_stops_all_in_an_evaluation_and_in_the_cache(settings, tmp_path):
    write_tsv(tmp_path / "data/train.tsv", sentences(1203, 1))
    write_tsv(tmp_path / "data/dev.tsv", sentences(2041, 2))
    settings["task"]["data"] = str(tmp_path / "data")
    settings["teacher"]["finetune"] |= {"epochs": 1, "batch_size": 64}
    settings["evaluate"]["batch_size"] = settings["cache"]["shard_rows"] = 1
    config, run = write_config(settings, tmp_path), tmp_path / "run"
    stages = ("--stages", "data,teacher,cache")
    said = signalled_at(run, "teacher_metrics.jsonl:19", signal.SIGUSR1, "--config", config, *stages)
    assert "teacher: stopped by SIGUSR1; a checkpoint of step 19 is committed" in said
    assert len((run / "teacher_metrics.jsonl").read_text().splitlines()) == 19, "the evaluation is still to come"
    said = signalled_at(run, "cache/shard-00009.safetensors", signal.SIGTERM, "--config", config, *stages)
    assert said == "pkd: cache: stopped by SIGTERM; rerun the same command to resume"
    assert len((run / "teacher_metrics.jsonl").read_text().splitlines()) == 20
    assert 10 <= len(list((run / "cache").glob("shard-*"))) < 1203 and not (run / "cache/manifest.json").exists()
    end = launch("--config", config, *stages)
    assert end.returncode == 0 and "cache: building shard-" in end.stdout, end.stderr
    counts = {name: json.loads((run / f"stages/{name}.json").read_text()) for name in ("teacher", "cache")}
    assert {name: (made["starts"], made["stopped"]) for name, made in counts.items()} == dict.fromkeys(counts, (2, 1))
    assert (run / "cache/manifest.json").exists()
    assert not list(run.rglob(".*")) and not (run / "run.lock").exists()


def test_a_run_goes_on_with_other_numbers_of_ranks(settings, tmp_path):
    """Two ranks to step 20, killed; one to step 36, killed; four to the end: the losses of an undisturbed run."""
    settings["student"]["dropout"] = settings["teacher"]["finetune"]["dropout"] = 0.0
    settings["train"] |= {"deepspeed": "ds_configs/zero1_fp32.json", "epochs": 4}
    settings["cache"] |= {"precision": "float32", "dtype": "float32"}
    config, run = write_config(settings, tmp_path), tmp_path / "run"
    calm = launch("--config", config, f"run.dir={tmp_path / 'calm'}", *TO_DISTILL)
    assert calm.returncode == 0, calm.stderr
    kill_at(run, "metrics.jsonl:20", "--config", config, *TO_DISTILL, ranks=2)
    kill_at(run, "metrics.jsonl:36", "--config", config, *TO_DISTILL)
    end = launch("--config", config, "train.deepspeed=ds_configs/zero3_fp32.json", *TO_DISTILL, bare=4)
    assert end.returncode == 0 and "distill: resuming from step" in end.stdout, end.stdout + end.stderr
    assert losses(run) == pytest.approx(losses(tmp_path / "calm"), rel=1e-3)


def test_a_second_job_is_refused_and_a_killed_one_leaves_no_lock(settings, tmp_path):
    settings["train"]["epochs"] = 500
    config, run = write_config(settings, tmp_path), tmp_path / "run"
    with started("--config", config) as [job]:
        until("run.lock:1", run, [job])
        second = launch("--config", config)
        assert second.returncode == 2 and f"{run}: in use by process {job.pid} on " in second.stderr
        fresh = launch("--config", config, "--fresh")
        assert fresh.returncode == 2 and "in use by process" in fresh.stderr and not (tmp_path / "run.1").exists()
    assert launch("--config", config, "--stages", "data").returncode == 0
    assert not (run / "run.lock").exists()


@pytest.fixture(scope="module")
def prepared(body, data, tmp_path_factory):
    """A run up to the student's start, in float32. Tests copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    settings = {
        "run": {"dir": str(folder / "run")},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 1, "batch_size": 16, "deepspeed": "ds_configs/zero1_fp32.json"},
        "cache": {"dtype": "float32", "shard_rows": 50},
        "export": {"formats": ["safetensors"]},
        "metrics": {"enabled": False},
    }
    done = launch("--config", write_config(settings, folder), "--stages", "data,teacher,cache,init")
    assert done.returncode == 0, done.stderr
    return folder


def distilled(prepared, folder, *arguments, bare=2):
    shutil.copytree(prepared, folder)
    config = folder / "run.yaml"
    config.write_text(config.read_text().replace(str(prepared), str(folder)))
    return launch("--config", config, *TO_DISTILL, *arguments, bare=bare)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_any_stage_is_exported_bit_for_bit(prepared, tmp_path, stage):
    done = distilled(prepared, tmp_path / "copy", f"train.deepspeed=ds_configs/zero{stage}_fp32.json")
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoints = tmp_path / "copy/run/checkpoints"
    live = load_file(checkpoints / "best-00000013.safetensors")  # gathered from the module by the run itself
    path, output = checkpoints / "step-00000013", tmp_path / "student"
    if stage == 1:
        cli = pkd("export", "--from-checkpoint", path, "--output", output)
        assert cli.returncode == 0 and "the student at step 13 (dev 0." in cli.stdout, cli.stdout + cli.stderr
        again = pkd("export", "--from-checkpoint", path, "--output", output)
        assert again.returncode == 2 and again.stderr == f"pkd: --output: {output} exists; choose a new folder\n"
        read = json.loads((output / "manifest.json").read_text())
        assert (read["max_length"], read["pair"], read["text_columns"], read["step"]) == (32, False, ["sentence"], 13)
        assert json.loads((output / "tokenizer_config.json").read_text())["model_max_length"] == 32
    else:
        hf.from_checkpoint(path, output, "float32", None)
    exported = load_file(output / "model.safetensors")
    assert {f"model.{name}" for name in exported} == {name for name in live if not name.startswith("projection.")}
    for name, value in exported.items():
        assert torch.equal(value, live[f"model.{name}"]), name
    hf.from_checkpoint(path, tmp_path / "half", "bfloat16", None)
    for name, value in load_file(tmp_path / "half/model.safetensors").items():
        assert torch.equal(value, live[f"model.{name}"].bfloat16()), name


def test_what_cannot_be_exported_is_refused(prepared, tmp_path):
    done = distilled(prepared, tmp_path / "copy", bare=0)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "copy/run/checkpoints/step-00000013"
    for wrong, words in (
        ((path.parent, tmp_path / "out", "float32"), "is not a committed checkpoint; expected RUN/checkpoints/step-N"),
        ((path, tmp_path / "none/out", "float32"), "--output: no such folder: "),
    ):
        with pytest.raises(hf.UserError, match=words):
            hf.from_checkpoint(*wrong, None)
    shard = path / "rank-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(hf.UserError, match=r"rank-0000.safetensors has \d+ bytes, not \d+; choose another checkpoint"):
        hf.from_checkpoint(path, tmp_path / "out", "float32", None)
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_on_one_rank_stops_all_before_the_update(prepared, tmp_path):
    """A cache whose checksums are right and one of whose rows is not a number: which rank reads it, and at which step."""
    shutil.copytree(prepared, tmp_path / "broken")
    cache = tmp_path / "broken/run/cache"
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest.pop("digest")  # as versions before it wrote it
    entry = manifest["shards"][2]
    tensors = load_file(cache / entry["file"])
    tensors["states"][7] = float("nan")
    save_file(tensors, cache / entry["file"], metadata=map_tensors(cache / entry["file"])[2])
    entry["sha256"] = hashlib.sha256((cache / entry["file"]).read_bytes()).hexdigest()
    (cache / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(prepared / "run.yaml", tmp_path / "broken/run.yaml")
    settings = (tmp_path / "broken/run.yaml").read_text().replace(str(prepared), str(tmp_path / "broken"))
    (tmp_path / "broken/run.yaml").write_text(settings)
    often = "checkpoint.every_steps=1", "checkpoint.min_seconds=0"
    job = launch("--config", tmp_path / "broken/run.yaml", *often, *TO_DISTILL, bare=2)
    assert job.returncode == 3, job.stdout + job.stderr
    [said] = [line for line in job.stderr.splitlines() if line.startswith("pkd: ")]
    done = len(losses(tmp_path / "broken/run"))
    assert f"distill: the loss is not finite at step {done + 1} (rank " in said and "pt nan" in said
    newest = max((tmp_path / "broken/run/checkpoints").glob("step-*"), default=None)
    assert (newest is None and done == 0) or newest.name == f"step-{done:08d}"
    for values in load_file(newest / "rank-0000.safetensors").values() if newest else ():
        assert np.isfinite(values.numpy()).all()
