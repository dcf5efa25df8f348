"""TensorBoard and Weights & Biases hold the records of metrics.jsonl, also after a kill and a resume."""

import json
import struct

import pytest
from conftest import TRAIN, launch, python, write_config
from test_kill import kill_at

from pkd_dist.telemetry import records
from pkd_dist.telemetry.trackers import Tracking, scalars

_BLOCK = 32768


def expected(path):
    """Map (name, step) to the value, for all lines of a metrics file."""
    return {(name, line["step"]): value for line in records.read(path) for name, value in scalars(line)}


def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = [(name, e.step, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    found = {(name, step): value for name, step, value in points}
    assert len(points) == len(found), "no duplicate points"
    return found


def logged(path):
    """Yield the records of a .wandb file.

    It has blocks of chunks, each with a checksum, a length and its kind (1: a complete record, 2: the first chunk of a record,
    4: the last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, []
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts = [] if kind in (1, 2) else parts
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(b"".join(parts))


def of_wandb(folder):
    """Return the points, and the (id, project) pairs in the files."""
    found, runs = {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in logged(path):
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.project))
            items = {"/".join([item.key, *item.nested_key]) or item.key: item for item in record.history.item}
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items.values()}
            for name in items:
                if not name.startswith("_"):
                    key = name, items["_step"]
                    assert key not in found, "no duplicate points"
                    found[key] = items[name]
    return found, runs


def test_killed_and_resumed_run(settings, tmp_path):
    settings["trackers"] = {"tensorboard": True, "wandb": "offline", "wandb_project": "reviews"}
    config, stages = write_config(settings, tmp_path), ("--stages", "data,teacher,cache,init,distill")
    run = tmp_path / "run"
    kill_at(run, "metrics.jsonl:8", "--config", config, *stages)
    kill_at(run, "metrics.jsonl:18", "--config", config, *stages)
    done = launch("--config", config, *stages)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"tensorboard --logdir {run}" in done.stdout and "is disabled for the rest of the run" not in done.stdout
    for prefix, steps in (("", 26), ("teacher_", 26)):
        wanted = expected(run / f"{prefix}metrics.jsonl")
        assert ("train/loss", steps) in wanted and ("dev/accuracy", steps) in wanted
        found = of_tensorboard(run / f"{prefix}tensorboard")
        assert found.keys() == wanted.keys()
        steady = {key: value for key, value in wanted.items() if "second" not in key[0]}
        assert {key: found[key] for key in steady} == pytest.approx(steady, rel=1e-6)
        found, runs = of_wandb(run / f"{prefix}wandb")
        assert found == wanted
        assert len(list((run / f"{prefix}wandb").glob("wandb/offline-run-*"))) == 1
        assert runs == {((run / f"{prefix}wandb/id").read_text(), "reviews")}
    assert launch("--config", config).returncode == 0
    report = (run / "report.html").read_text()
    assert "The distill stage was killed or failed twice and resumed" in report
    assert "Training step</strong>" in report and "Distill stage</strong>" not in report


WITHOUT = """
import sys
sys.modules[{!r}] = None
from pkd_dist.cli.launch import leave, train
leave(train(sys.argv[1:]))
"""


@pytest.mark.parametrize(("key", "value"), [("tensorboard", "true"), ("wandb", "offline")])
def test_missing_library_is_named_before_anything_is_written(settings, tmp_path, key, value):
    without = tmp_path / "without.py"
    without.write_text(WITHOUT.format(key))
    config = write_config(settings, tmp_path)
    refused = python(without, "--config", config, f"trackers.{key}={value}")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"pkd: trackers.{key}: the package {key} is not installed; install the extra: pip install 'pkd_dist[{key}]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_a_key_fails_before_the_first_step(settings, tmp_path):
    nowhere = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": ""}
    refused = python(TRAIN, "--config", write_config(settings, tmp_path), "trackers.wandb=online", **nowhere)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("pkd: trackers.wandb: online: ") and "`offline` needs neither key nor network" in last
    assert (
        not (tmp_path / "run/teacher_metrics.jsonl").exists()
        or not (tmp_path / "run/teacher_metrics.jsonl").read_text()
    )


def test_failing_tracker_is_dropped_and_the_others_continue(caplog):
    class Broken:
        name = "Broken"

        def write(self, record, new):
            raise OSError("the disk is gone")

    class Kept:
        name = "Kept"
        seen = []

        def write(self, record, new):
            self.seen.append((record, new))

    tracking = Tracking([Broken(), Kept()])
    tracking.write({"step": 1}, True)
    tracking.write({"step": 2}, False)
    assert Kept.seen == [({"step": 1}, True), ({"step": 2}, False)]
