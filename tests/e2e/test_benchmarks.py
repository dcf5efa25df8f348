"""The benchmark programs from end to end on a tiny model: what they write, and how they resume. Nothing is timed."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from benchmarks import common, performance

NOTHING: dict[str, dict] = dict.fromkeys(performance.COMMANDS, {})
SETTINGS = ("task.max_length=32", "student.layers=[1,3]", "metrics.enabled=false")


def program(name, *arguments, timeout=400):
    argv = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    core = {min(os.sched_getaffinity(0))}  # one core, so one thread: more only wait for each other
    return subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )  # fmt: skip


@pytest.mark.slow
def test_peers(teacher, data, tmp_path):
    only = "authors,hf-bfloat16,ours-python,peaks,engine"
    arguments = ("--quick", "--teacher", teacher, "--data", data, "--output", tmp_path, "--seeds", 1, *SETTINGS)
    done = program("peers", *arguments, "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "peers.json").read_text())
    assert all(found[key] > 0 for key in ("ratio_best_peer", "ratio_authors", "gemm_share", "engine_overhead"))
    assert (found["best_ours"], found["best_peer"]) == ("ours-python", "hf-bfloat16")
    ours, authors = found["contestants"]["ours-python"], found["contestants"]["authors"]
    assert found["settings"]["examples"] == 96 and ours["measured"] == "whole" and authors["measured"] == "2 steps"
    assert len(ours["accuracies"]) == len(authors["accuracies"]) == 1, "of whole runs"
    assert 0 < found["useful_flops"] <= ours["executed_flops"] < authors["executed_flops"]
    assert ours["seconds"] < ours["command_seconds"] and ours["peak_bytes"] > 100e6
    assert found["engine"]["overhead"].keys() == {"plain", "engine", "loop"} and found["engine"]["zero_stage"] == 1
    text = common.filled(performance.PAGE, performance.figures(NOTHING | {"peers": found}))
    assert "times** as fast as the fastest peer" in text and text.count("| ours, python") == 2, (
        "speed, and time to quality"
    )

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/*.json")}
    assert len(kept) == 6, "five, and the authors' whole run"
    (tmp_path / "seed-1" / "peaks.json").unlink()
    again = program("peers", *arguments, "--only", only)
    assert again.returncode == 0 and again.stdout.count("seed 1:") == 1, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept if path.stem != "peaks"}.items() <= kept.items()
    other = program("peers", *arguments, "--only", only, "train.learning_rate=1")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "measurements of other settings" in other.stderr


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a program in this process, and returns the one line that it ends with."""

    def run(name, *arguments):
        module = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(common, "leave", sys.exit)
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def test_bad_input_is_refused_and_a_failure_names_its_log(refused, tmp_path, data):
    assert "--only: unknown name 'mine'; allowed: authors, textbrewer-padded" in refused(
        "peers.__main__", "--only", "authors,mine"
    )
    teacher, output = tmp_path / "teacher", tmp_path / "out"
    teacher.mkdir()
    for name in ("peers.__main__", "profile.__main__", "scaling.memory", "scaling.startup"):
        said = refused(name, "--teacher", teacher, "--output", output)
        assert said.startswith(f"pkd: --teacher: {teacher} has no config.json") and said.count("\n") == 1
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (teacher / name).write_text("{}")
    said = refused("peers.__main__", "--quick", "--teacher", teacher, "--data", tmp_path, "--output", output)
    assert said == f"pkd: --data: {tmp_path} has no train.tsv, which --quick shortens\n"
    said = refused("scaling.memory", "--teacher", teacher, "--data", tmp_path, "--output", output)
    assert said == f"pkd: --data: {tmp_path} has no train.tsv\n"
    failed = program(
        "peers", "--quick", "--teacher", teacher, "--data", data, "--output", output, "--only", "authors"
    )  # fmt: skip
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert "peers: authors-1 ended with status 1; see" in failed.stderr
    log = next((output / "logs").iterdir())
    assert str(log) in failed.stderr and "cannot be loaded" in log.read_text()


def test_profile(teacher, data, tmp_path):
    results = tmp_path / "profile.json"
    done = program(
        "profile", "--teacher", teacher, "--output", tmp_path, "--results", results, "--device", "cpu", "--ranks", 1,
        "--steps", 3, f"task.data={data}", *SETTINGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())["cpu-1"]
    assert {"data", "forward", "loss", "backward", "engine step", "rest"} == found["phase_seconds"].keys()
    assert sum(found["phase_seconds"].values()) == pytest.approx(found["step_seconds"], rel=0.2)
    assert all(found["group_seconds"][name] > 0 for name in ("GEMM", "dropout", "optimizer", "layer norm"))
    assert sum(found["group_seconds"].values()) == pytest.approx(found["profiled_step_seconds"], rel=0.05)
    trace = tmp_path / "trace-cpu-1-rank0.json.gz"
    assert trace.read_bytes()[:2] == b"\x1f\x8b", "a Chrome trace, compressed"
    text = common.filled(performance.PAGE, performance.figures(NOTHING | {"profile": {"cpu-1": found}}))
    assert "| GEMM |" in text and "| forward |" in text


@pytest.mark.slow
def test_memory_and_start_up(teacher, data, tmp_path):
    results = tmp_path / "scaling.json"
    common = ("--teacher", teacher, "--output", tmp_path / "out", "--results", results, *SETTINGS)
    done = program("scaling.memory", "--factors", "1,3", "--ranks", 0, "--steps", 4, "--data", data, *common)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = json.loads(results.read_text())["memory"]["sizes"]
    assert [size["examples"] for size in sizes] == [203, 609] and sizes[1]["cache_bytes"] > 2 * sizes[0]["cache_bytes"]
    for size in sizes:
        for stage in ("data", "cache", "distill"):
            assert size[stage]["peak_bytes"] >= size[stage]["anonymous_bytes"] > 50e6
            assert size[stage]["seconds_per_example"] >= 0
        assert size["distill"]["steps"] >= 4
    again = program("scaling.memory", "--factors", "1,3", "--ranks", 0, "--steps", 4, "--data", data, *common)
    assert again.returncode == 0 and "times the data" not in again.stdout, "every size is a file"

    done = program("scaling.startup", "--tries", 1, *common, f"task.data={data}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    startup = found["startup"]
    assert found["memory"]["sizes"] == sizes, "the other part stays"
    assert startup["to_first_step_seconds"].keys() == {"python", "deepspeed, 2 ranks"}
    parts = startup["followed"]["parts"]
    assert sum(parts.values()) == pytest.approx(startup["followed"]["seconds"], rel=0.01)
    assert all(parts[name] > 0 for name in ("imports", "engine", "checkpoint", "cache: opened", "first step"))
    assert startup["imports"]["torch"] > 0
    text = common.filled(performance.PAGE, performance.figures(NOTHING | {"scaling": found}))
    assert "| 609 |" in text and "| imports |" in text
