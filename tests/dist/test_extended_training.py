"""Trainings that stop early, and finished ones that continue with more epochs: bit for bit those that nothing disturbed."""

import json
import signal
from pathlib import Path

import forked
import long
import pytest
import torch
from conftest import ROOT, bare_ranks

from pkd_dist.distributed.ranks import Ranks
from pkd_dist.distributed.world import World
from pkd_dist.errors import Preempted
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.training import checkpoint, hooks
from pkd_dist.training.checkpoint import best_name, committed, step_name

EPOCH = long.STEPS_PER_EPOCH
STABLE = {"schedule": "warmup_stable_decay", "decay_ratio": 0.4}
PATIENT = {"schedule": "constant", "patience_epochs": 2, "epochs": 12}


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    """For all trainings of this file: the number of threads decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world():
    one = World(Ranks(0, 0, 1, 1, "python"), 60)
    yield one
    one.close()


def outcome(folder):
    """All that a training leaves and that its end decides, without times."""
    last = committed(folder / "checkpoints")[-1]
    state = checkpoint.read_state(last)
    best = folder / "checkpoints" / state["best_file"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in line.items() if k not in ("time", "seconds", "samples_per_second")} for line in lines]
    return last.name, (last / "rank-0000.safetensors").read_bytes(), best.name, best.read_bytes(), state, told


@pytest.mark.parametrize("settings", [{"schedule": "constant"}, STABLE], ids=["constant", "stable"])
def test_a_finished_training_continues_with_more_epochs(tmp_path, world, settings):
    calm, longer = tmp_path / "calm", tmp_path / "longer"
    long.run(world, calm, epochs=4, **settings)
    short = long.run(world, longer, epochs=2, **settings)
    assert short.step == 2 * EPOCH
    begun = []

    def crash(step):
        begun.append(step)
        if len(begun) == 2:
            raise RuntimeError("a crash before the next checkpoint")

    with pytest.raises(RuntimeError, match="a crash"):
        long.run(world, longer, epochs=4, at_step=crash, **settings)
    branch = 2 * EPOCH if settings["schedule"] == "constant" else 2 * EPOCH - int(2 * EPOCH * 0.4)
    assert (longer / "checkpoints" / step_name(branch)).exists()
    long.run(world, longer, epochs=4, at_step=begun.append, **settings)
    assert len(begun) == 2 + 4 * EPOCH - branch, "from the start of the decay, or from the end without one"
    assert outcome(longer) == outcome(calm)


def expected_end(history, key, sign, patience):
    """The epoch after which a training with this history stops, and its best."""
    best = None
    for entry in history:
        if best is None or sign * entry[key] > sign * best[key]:
            best = entry
        if entry["epoch"] - best["epoch"] >= patience:
            return entry["epoch"], best["epoch"]
    pytest.fail("it improves to the end: the test needs another case")


@pytest.fixture(scope="module")
def endless(tmp_path_factory, world):
    """The history of a training without patience."""
    settings = {name: value for name, value in PATIENT.items() if name != "patience_epochs"}
    return long.run(world, tmp_path_factory.mktemp("endless"), **settings).history


@pytest.fixture(scope="module")
def patient(tmp_path_factory, world):
    """The outcome of a training that stops early, undisturbed."""
    folder = tmp_path_factory.mktemp("patient")
    long.run(world, folder, **PATIENT)
    return outcome(folder)


@pytest.mark.parametrize(("best_by", "key", "sign"), [("metric", "main_metric", 1), ("divergence", "divergence", -1)])
def test_it_stops_when_the_chosen_score_has_not_improved(tmp_path, world, endless, caplog, best_by, key, sign):
    metrics = RunMetrics()
    with caplog.at_level("INFO"):
        progress = long.run(world, tmp_path, metrics, best_by=best_by, **PATIENT)
    end, best = expected_end(endless, key, sign, patience=2)
    assert end < PATIENT["epochs"] and progress.history == endless[:end]
    assert (progress.step, progress.best_epoch, progress.best_file) == (end * EPOCH, best, best_name(best * EPOCH))
    entry = endless[best - 1]
    assert (progress.best_metric, progress.best_divergence) == (entry["main_metric"], entry["divergence"])
    said = f"distill: stopped after epoch {end} of 12: dev has not improved for 2 epoch(s); the best was epoch {best}"
    assert caplog.messages.count(said) == 1
    steps = [metrics.registry.get_sample_value(name, {"stage": "distill"}) for name in ("pkd_step", "pkd_steps_total_expected")]  # fmt: skip
    assert steps == [end * EPOCH] * 2
    assert metrics.registry.get_sample_value("pkd_expected_end_timestamp_seconds", {"stage": "distill"}) is None
    kept = {"stage": "distill", "split": "dev", "metric": "divergence"}
    assert metrics.registry.get_sample_value("pkd_eval_metric", kept) == progress.history[-1]["divergence"]


def once(monkeypatch, owner, name, moment):
    """Have a function fail, once, in the call with this number."""
    calls, real = [], getattr(owner, name)

    def failing(*arguments, **options):
        calls.append(None)
        if len(calls) == moment:
            raise RuntimeError("a crash")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("where", ["last step", "evaluation", "best weights", "checkpoint", "after it", "signal"])
def test_a_crash_around_the_stopping_epoch_changes_nothing(tmp_path, world, patient, monkeypatch, where):
    end = patient[4]["progress"]["evaluated_epochs"]
    settings = dict(PATIENT)

    def at_step(step):
        if step == end * EPOCH and where == "signal":
            world.signals.number = int(signal.SIGTERM)
        elif step == end * EPOCH and where == "last step":
            raise RuntimeError("a crash")

    if where in ("last step", "signal"):
        settings["at_step"] = at_step
    elif where == "evaluation":
        once(monkeypatch, hooks, "_figures", end)
    elif where == "best weights":
        once(monkeypatch, checkpoint, "retain_best", end)
    elif where == "checkpoint":
        saved = [step for step in range(1, end * EPOCH + 1) if step % long.SAVE_EVERY == 0 or step % EPOCH == 0]
        once(monkeypatch, checkpoint, "_move_into_place", len(saved))
    else:
        once(monkeypatch, hooks.MetricsHook, "on_end", 1)
    with pytest.raises(Preempted if where == "signal" else RuntimeError):
        long.run(world, tmp_path, **settings)
    world.signals.number = 0
    again = long.run(world, tmp_path, **PATIENT)
    assert again.step == end * EPOCH
    assert outcome(tmp_path) == patient


def test_two_ranks_stop_together(tmp_path):
    arguments = tmp_path, json.dumps({"best_by": "divergence", **PATIENT})
    done = forked.run(Path(__file__).parent / "long.py", arguments, ROOT, bare_ranks(2), timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    end, best = expected_end(first["history"], "divergence", -1, patience=2)
    assert (first["evaluated_epochs"], first["best_epoch"], first["step"]) == (end, best, end * EPOCH)
    assert end < PATIENT["epochs"]
