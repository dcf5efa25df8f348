"""Whole runs through the real launcher, with a tiny teacher: what they leave behind, and what a second start does."""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import (
    ROOT,
    environment,
    launch,
    losses,
    pkd,
    python,
    results,
    sentences,
    write_config,
    write_tsv,
)

from pkd_dist.stages.base import NAMES as STAGES
from pkd_dist.stages.translation import _PHRASES

PLAIN = """
import json, sys
sys.modules["pkd_dist"] = None  # not there
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, data = sys.argv[1:]
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
rows = [line.rstrip("\\n").split("\\t") for line in open(data)][1:]
right = 0
for text, label in rows:
    right += int(model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).logits.argmax()) == int(label)
print(json.dumps({"accuracy": right / len(rows), "labels": model.config.id2label, "layers": model.config.num_hidden_layers}))
"""


@pytest.fixture(scope="module")
def finished(body, data, tmp_path_factory):
    """One run on two ranks. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished")
    own = folder / "data"
    shutil.copytree(data, own)
    settings = {
        "run": {"dir": str(folder / "run")},
        "task": {"name": "sst2", "data": str(own), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": 3, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3},
        "cache": {"shard_rows": 50},
        "evaluate": {"latency_samples": 10},
        "metrics": {"port": 0},
    }
    done = launch("--config", write_config(settings, folder), bare=2, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, settings, done


def test_what_a_run_leaves_behind(finished):
    folder, _, done = finished
    run = folder / "run"
    found = results(run)
    assert found["n"] == 41 and found["split"] == "dev" and found["task"] == "sst2"
    assert found["teacher"]["accuracy"] > 0.8, "the tiny task can be learned"
    for key in ("accuracy", "MCC", "precision", "recall", "f_1", "main_metric", "modelSize", "reasoningTime"):
        assert isinstance(found[key], float), key
        assert found[key] == found["student"][key]
    for side in ("teacher", "student"):
        assert {"parameters", "latency_ms_p50", "latency_ms_p99"} <= found[side].keys()
        assert found[side]["threads"] == 1, "as OMP_NUM_THREADS says"
        assert found[side]["samples_per_second"] == found[side]["reasoningTime"] > 0
    made = json.loads((run / "export/manifest.json").read_text())
    assert made["measured_on"]["threads"] == made["teacher"]["threads"] == 1
    assert made["text_columns"] == ["sentence"] and made["max_length"] == 32
    ending = done.stdout[done.stdout.index("deploy ") :]
    rows = {row["file"]: row for row in made["deployment"]["rows"]}
    assert list(rows) == ["teacher", "model.safetensors", "onnx/model.onnx", "onnx/model.int8.onnx"]
    assert made["deployment"]["splits"] == ["dev"] and made["deployment"]["deploy"] == "onnx/model.int8.onnx"
    assert rows["teacher"]["score"] == found["teacher"]["accuracy"]
    assert rows["model.safetensors"]["score"] == found["accuracy"]
    assert rows["model.safetensors"]["agreement"] == found["compression"]["agreement"]
    for name, file in made["files_on_dev"].items():
        assert rows[name]["score"] == file["main_metric"] and rows[name]["speed"]["threads"] == 1
        assert rows[name]["speed"]["samples_per_second"] == file["samples_per_second"]
    first = ending.splitlines()[0]
    assert first.startswith(f"deploy {run / 'export/onnx/model.int8.onnx'}: ") and first.endswith("accuracy (dev)")
    assert "on 1 thread of " in ending.replace("\n", " ")
    said = ending[ending.index("worth a look:\n") :].splitlines()[1:]
    assert any("41 dev examples determine the accuracy only to within" in line for line in said)
    page = html.unescape((run / "report.html").read_text())
    assert all(line.startswith("- ") and line[2:] in page for line in said)
    headline = first.partition(": ")[2]
    assert f"{headline}.</p>" in page and f"the file to deploy: {headline}." in (run / "export/README.md").read_text()
    assert found["compression"].keys() == {"parameters", "size", "throughput", "retention", "agreement"}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["resolved"]["world_size"] == 2
    assert resolved["resolved"]["patience_pairs"] == [[1, 2]]
    assert resolved["resolved"]["beta_sum"] == pytest.approx(100 / 32)
    assert len(losses(run)) == 2 * 13
    assert "student" in done.stdout and str(run / "export") in done.stdout and str(run / "report.html") in done.stdout
    assert {p.name for p in (run / "export").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "manifest.json",
    }
    assert {p.name for p in (run / "export/onnx").iterdir()} == {"model.onnx", "model.int8.onnx"}
    card = (run / "export/README.md").read_text()
    assert "| `onnx/model.int8.onnx` |" in card and "| student, ONNX int8 |" in card and "\n\n`manifest.json`" in card
    assert not list(run.glob(".*")) and not list(run.rglob("*.tmp")), "no temporary file stays"
    os.umask(umask := os.umask(0o022))
    modes = {str(path): path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert not {name for name, mode in modes.items() if mode != 0o666 & ~umask}, "another user can serve the export"


def test_the_export_loads_without_us(finished):
    folder, _, _ = finished
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder / "run/export"), str(folder / "data/dev.tsv")],
        capture_output=True, text=True, check=True, cwd=folder, env=environment(PYTHONPATH=""),
    )  # fmt: skip
    found = json.loads(plain.stdout.splitlines()[-1])
    assert found["accuracy"] == pytest.approx(results(folder / "run")["accuracy"])
    assert found["labels"] == {"0": "negative", "1": "positive"}
    assert found["layers"] == 2


def test_half_a_surrogate_pair_in_a_column_that_is_kept(finished, tmp_path):
    folder, _, _ = finished
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"sentence": "a good film", "note": "cut \\ud83d"}\n')
    done = pkd("predict", "--model", folder / "run/export", "--file", rows)
    assert done.returncode == 0 and json.loads(done.stdout)["note"] == "cut \ud83d", done.stderr


def test_a_run_says_how_much_disk_it_needs(finished):
    folder, _, done = finished
    said = re.search(rf"{folder}/run: needs about ([\d.]+) ([kM]B) of disk, [\d.]+ [GMk]B are free", done.stdout)
    needed = float(said[1]) * {"kB": 1e3, "MB": 1e6}[said[2]]
    stay = ("teacher", "cache", "student_init", "checkpoints", "export")
    used = sum(path.stat().st_size for name in stay for path in (folder / "run" / name).rglob("*") if path.is_file())
    assert 0.7 * used < needed < 3 * used, (used, needed)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small disk needs root and mount")
@pytest.mark.parametrize("key", ["run.dir", "cache.dir"])
def test_a_run_that_the_disk_cannot_hold_ends_before_it_trains(settings, tmp_path, key):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k" if key == "run.dir" else "size=16k", "tmpfs", disk], check=True
    )
    try:
        settings["cache"]["dtype"] = "float32"
        config = write_config(settings, tmp_path)
        run = disk / "run" if key == "run.dir" else tmp_path / "run"
        refused = launch("--config", config, f"{key}={disk / 'run'}")
        assert refused.returncode == 2, refused.stdout
        line = (
            rf"pkd: {disk}/run: no space left for the run: it needs about [\d,]{{5,}} bytes, [\d,]+ are free; free some"
        )
        assert re.match(line, refused.stderr) and refused.stderr.count("\n") == 1, refused.stderr
        assert (run / "stages/data.json").exists() and not (run / "stages/teacher.json").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_lost_metrics_are_reported(finished, tmp_path):
    folder, settings, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    config = write_config(json.loads(json.dumps(settings).replace(str(folder), str(tmp_path / "copy"))), tmp_path)
    run = tmp_path / "copy/run"
    (run / "metrics.jsonl").write_bytes(b"")
    (run / "teacher_metrics.jsonl").unlink()
    again = launch("--config", config)
    assert again.returncode == 0 and "distill: done\n" in again.stdout, again.stderr
    aside = f"{run}/metrics.jsonl.altered.1"
    assert f"{run}/metrics.jsonl: was altered or cut after its training: {aside} is what" in again.stdout
    assert f"{run}/teacher_metrics.jsonl: lacks 3 of the 3 evaluations" in again.stdout


def test_again_everything_is_done_and_a_changed_line_says_why(finished, tmp_path):
    folder, settings, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads(json.dumps(settings).replace(str(folder), str(tmp_path / "copy")))
    config = write_config(settings, tmp_path)
    again = launch("--config", config)
    assert again.returncode == 0, again.stderr
    for stage in STAGES:
        assert f"{stage}: done\n" in again.stdout
    write_tsv(tmp_path / "copy/data/train.tsv", [("a very good film", 1), *sentences(203, 1)[1:]])
    plan = launch("--config", config, "--dry-run")
    assert "data: runs, because" in plan.stdout and "train.tsv changed" in plan.stdout
    assert "distill: may run, after data" in plan.stdout
    changed = launch("--config", config, "export.formats=[safetensors]")
    assert changed.returncode == 0, changed.stderr
    assert "train.tsv changed" in changed.stdout
    assert "teacher: runs again, because the train data changed" in changed.stdout
    assert "cache: runs again, because the teacher changed" in changed.stdout
    assert "distill: runs again, because" in changed.stdout
    assert (tmp_path / "copy/run/previous/1").is_dir(), "what was made before is kept"
    assert list((tmp_path / "copy/run/previous").glob("*/checkpoints/step-*"))
    run = tmp_path / "copy/run"
    assert re.search(rf"earlier outputs: {run}/previous, [\d.]+ [kM]B; `pkd runs clean {run}` removes", changed.stdout)
    assert re.search(rf"distill: its earlier outcome is kept in {run}/previous/\d \([\d.]+ [kM]B\)", changed.stdout)
    before = {path for path in run.rglob("*") if "previous" not in path.parts}
    assert "would be removed" in pkd("runs", "clean", run, "--dry-run").stdout and (run / "previous").exists()
    assert re.search(rf"{run}/previous: removed, [\d.]+ [kM]B\n", pkd("runs", "clean", run).stdout)
    assert {path for path in run.rglob("*")} == before
    assert pkd("runs", "clean", run).stdout == f"{run}: nothing to remove\n"
    refused = pkd("runs", "clean", tmp_path)
    assert (
        refused.returncode == 2
        and refused.stderr == f"pkd: {tmp_path}: is not a run folder; give one, such as runs/demo\n"
    )


RAISED = """
import dataclasses, sys
from pkd_dist import pipeline
from pkd_dist.cli.launch import leave, train
pipeline.STAGES = tuple(
    dataclasses.replace(stage, version=stage.version + (stage.name == "evaluate")) for stage in pipeline.STAGES
)
pipeline.VERSIONS = {stage.name: stage.version for stage in pipeline.STAGES}
leave(train(sys.argv[1:]))
"""


def test_a_raised_version_runs_the_stage_and_those_after_it_again(finished, tmp_path):
    folder, settings, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    config = write_config(settings | {"run": {"dir": str(tmp_path / "run")}}, tmp_path)
    program = tmp_path / "raised.py"
    program.write_text(RAISED)
    again = python(program, "--config", config)
    assert again.returncode == 0, again.stdout + again.stderr
    for name in STAGES[:5]:
        assert f"{name}: done\n" in again.stdout
    for name in STAGES[5:]:
        assert f"{name}: runs again, because the code of the stage evaluate changed (1 -> 2)" in again.stdout
    assert (tmp_path / "run/previous/1/results_eval.json").is_file()


def test_other_formats_make_the_report_again(finished, tmp_path):
    folder, settings, _ = finished
    assert "student, ONNX" in (folder / "run/report.html").read_text()
    shutil.copytree(folder / "run", tmp_path / "run")
    run = {"run": {"dir": str(tmp_path / "run")}, "export": {"formats": ["safetensors"]}}
    done = launch("--config", write_config(settings | run, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "report: runs again, because " in done.stdout and "the exported files changed" in done.stdout
    assert "student, ONNX" not in (tmp_path / "run/report.html").read_text()


def as_of_0_1_0(path):
    """Rewrite a marker as version 0.1.0 wrote it: phrases for keys, no versions, no format."""
    marker, phrases = json.loads(path.read_text()), {key: phrase for phrase, key in _PHRASES[path.stem].items()}
    inputs = {}
    for key, value in marker["inputs"].items():
        if path.stem == "data" and key.startswith("student."):
            continue  # settings that it did not have
        if key.startswith("task.data:"):
            key = key.partition(":")[2]
        elif key.startswith("data.") and key not in phrases:
            key = f"the {key.removeprefix('data.')} data"
        inputs[phrases.get(key, key)] = value
    outputs = marker["outputs"]
    if path.stem == "data":
        outputs = {**outputs, **outputs["sets"], "sets": list(outputs["sets"])}
    for added in ("notices", "scale", "vocabulary"):
        outputs.pop(added, None)
    old = {
        "done": True,
        "inputs": {k: v for k, v in inputs.items() if not k.startswith("version.")},
        "outputs": outputs,
    }
    path.write_text(json.dumps(old | {key: marker[key] for key in ("starts", "stopped", "seconds")}))


def test_a_run_of_0_1_0_is_found_done(finished, tmp_path):
    folder, settings, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    for path in (tmp_path / "run/stages").glob("*.json"):
        as_of_0_1_0(path)
    moved = settings | {"run": {"dir": str(tmp_path / "run")}}
    again = launch("--config", write_config(moved, tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line for line in again.stdout.splitlines() if line in [f"{name}: done" for name in STAGES]] == [
        f"{name}: done" for name in STAGES
    ]
    for path in (tmp_path / "run/stages").glob("*.json"):
        marker = json.loads(path.read_text())
        assert marker["format"] == 3 and marker["verified"] is False and marker["checksum"]
        assert marker["files"] is not None, "of what is there now"
    assert again.stdout.count("wrote these markers, without checksums") == 1


def test_what_is_gone_or_chosen_otherwise_is_made_again(finished, tmp_path):
    folder, settings, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads(json.dumps(settings).replace(str(folder), str(tmp_path / "copy")))
    config = write_config(settings, tmp_path)
    (tmp_path / "copy/run/export/tokenizer.json").unlink()
    again = launch("--config", config)
    assert again.returncode == 0 and "distill: done\n" in again.stdout, again.stderr
    assert re.search(r"export: runs again, because .*tokenizer.json is missing", again.stdout)
    assert (tmp_path / "copy/run/export/tokenizer.json").exists()
    plan = launch("--config", config, "--dry-run", "task.metric=mcc")
    assert "teacher: runs, because task.metric changed (accuracy -> mcc)" in plan.stdout


def test_a_folder_that_the_run_did_not_make_is_not_touched(settings, tmp_path):
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/mine.txt").write_text("mine")
    refused = launch("--config", write_config(settings, tmp_path), "--stages", "data")
    assert refused.returncode == 2 and "run/data: exists, but this run did not make it" in refused.stderr
    assert (tmp_path / "run/data/mine.txt").read_text() == "mine"


def test_pkd_evaluates_a_custom_task(finished, tmp_path):
    folder, _, _ = finished
    (tmp_path / "dev.csv").write_text('"the #1 text",y\n' + "a good film,positive\na bad film,negative\n")
    argv = ["evaluate", "--model", folder / "run/export", "--task", "custom", "--data", tmp_path]
    argv += ["--text", "the #1 text", "--label", "y", "--max-length", 32, "--output", tmp_path / "figures.json"]
    fresh = [sys.executable, "-m", "pkd_dist.cli", *map(str, argv)]  # shows what libraries print while they are loaded
    done = subprocess.run(fresh, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    said = done.stderr.replace("pkd: the machine was busy while speed was measured (see spread)\n", "")
    assert done.returncode == 0 and not said and "WARNING" not in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["n"] == 2
    (tmp_path / "figures.json").unlink()
    (tmp_path / "dev.csv").write_text('"the #1 text",y\n' + "a good film,positive\na bad film,mixed\n")
    refused = pkd(*argv)
    assert (
        refused.returncode == 2
        and refused.stderr.count("\n") == 1
        and "'mixed' is not one of the labels" in refused.stderr
    )


def test_stages_fresh_and_a_dry_run_that_writes_nothing(settings, tmp_path):
    config = write_config(settings, tmp_path)
    assert launch("--config", config, "--dry-run").returncode == 0
    run = tmp_path / "run"
    assert not run.exists()
    early = launch("--config", config, "--stages", "distill")
    assert early.returncode == 2
    assert early.stderr == "pkd: the stage data is needed first, but it has not run yet; add it to --stages\n"
    assert launch("--config", config, "--stages", "data").returncode == 0
    assert not (run / "teacher").exists() and (run / "data/train/meta.json").exists()
    fresh = launch("--config", config, "--fresh", "--stages", "data")
    assert fresh.returncode == 0 and (tmp_path / "run.1/data").is_dir(), fresh.stderr
    unknown = launch("--config", config, "--stages", "data,distil")
    assert unknown.returncode == 2 and "'distil' is not a stage; allowed: data, teacher" in unknown.stderr


def test_the_same_optimisation_on_one_and_three_ranks(settings, tmp_path):
    settings["student"]["dropout"] = settings["teacher"]["finetune"]["dropout"] = 0.0
    settings["train"]["deepspeed"] = "ds_configs/zero1_fp32.json"
    settings["cache"]["precision"] = settings["cache"]["dtype"] = "float32"
    config = write_config(settings, tmp_path)
    for name, ranks in (("one", 0), ("three", 3)):
        stages = ("--stages", "data,teacher,cache,init,distill,evaluate")
        done = launch("--config", config, f"run.dir={tmp_path / name}", *stages, bare=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert results(tmp_path / "three")["n"] == 41
    assert abs(results(tmp_path / "three")["accuracy"] - results(tmp_path / "one")["accuracy"]) <= 1 / 41


@pytest.mark.parametrize(
    "distill",
    [{"states": "cls"}, {"states": "tokens"}, {"gram": 1, "relations": 1, "relation_heads": 4, "attention": 0.1}],
)
def test_the_cache_equals_the_live_teacher(settings, tmp_path, distill):
    settings["student"]["dropout"] = 0.0
    settings["distill"] = distill
    settings["train"]["deepspeed"] = "ds_configs/zero0_fp32.json"
    settings["cache"] |= {"precision": "float32", "dtype": "float32"}
    config = write_config(settings, tmp_path)
    assert launch("--config", config, "--stages", "data,teacher,cache,init,distill").returncode == 0
    cached = losses(tmp_path / "run")
    live = launch("--config", config, "--stages", "cache,distill", "cache.enabled=false")
    assert live.returncode == 0, live.stderr
    assert losses(tmp_path / "run") == pytest.approx(cached, abs=1e-6)


def test_gradient_accumulation_changes_nothing(settings, tmp_path):
    settings["student"]["dropout"] = settings["teacher"]["finetune"]["dropout"] = 0.0
    settings["train"]["deepspeed"] = "ds_configs/zero1_fp32.json"
    config = write_config(settings, tmp_path)
    stages = "data,teacher,cache,init,distill"
    assert launch("--config", config, "--stages", stages, f"run.dir={tmp_path / 'whole'}").returncode == 0
    parts = launch("--config", config, "--stages", stages, f"run.dir={tmp_path / 'parts'}", "train.micro_batch_size=3")
    assert parts.returncode == 0, parts.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_prune_keeps_the_export_alone(settings, tmp_path):
    config = write_config(settings, tmp_path)
    done = launch("--config", config, "export.prune=true")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert not (run / "checkpoints").exists() and (run / "export/model.safetensors").exists()
    again = launch("--config", config, "export.prune=true")
    assert again.returncode == 0 and "distill: done\n" in again.stdout and "export: done\n" in again.stdout, (
        again.stdout
    )
    other = launch("--config", config, "export.prune=true", "export.formats=[safetensors,torch-export]")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "export.prune" in other.stderr, other.stderr
    assert (run / "export/model.safetensors").exists() and not (run / "previous").exists()
