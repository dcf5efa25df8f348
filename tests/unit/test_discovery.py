"""Target files: removed at an orderly end, kept after a crash, and swept once they expire."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment
from prometheus_client import generate_latest
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.config.schema import Metrics
from pkd_dist.errors import DivergedError, Preempted, UserError
from pkd_dist.telemetry import discovery
from pkd_dist.telemetry.discovery import EXPIRY_SECONDS, STALE_SECONDS, Target, reachable_address, target_file, targets
from pkd_dist.telemetry.endpoint import Access
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.publish import publishing

RUN_TARGET = """
import sys, time
from pathlib import Path
from pkd_dist.telemetry.discovery import Target
target = Target(Path(sys.argv[1]), Path(sys.argv[2]), 0, "10.0.0.1", 9400, False)
print(target.file, flush=True)
sys.stdin.read()
"""


def until(happens, what):
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def age(file, seconds):
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_file_exists_until_close(tmp_path):
    folder, run = tmp_path / "new/targets", tmp_path / "run"
    first, second = (Target(folder, run, node, "10.0.0.1", 9400 + node, https=bool(node)) for node in (0, 1))
    [group] = json.loads(first.file.read_text())
    assert group["targets"] == ["10.0.0.1:9400"] and group.keys() == {"targets", "labels"}
    shown = {k: v for k, v in group["labels"].items() if not k.startswith("__")}
    assert shown == {"run": str(run), "node": "0", "instance": f"{run}/0"}
    assert json.loads(second.file.read_text())[0]["labels"]["__scheme__"] == "https"
    assert "__scheme__" not in group["labels"]
    assert sorted(folder.iterdir()) == sorted([first.file, second.file]), "nothing else"
    first.close()
    assert list(folder.iterdir()) == [second.file]
    second.close()
    assert not list(folder.iterdir())


def living(folder, run):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_TARGET, folder, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT
    )  # fmt: skip
    assert process.stdout.readline().strip()
    return process


def test_file_stays_after_a_kill_until_the_run_is_resumed(tmp_path):
    folder, run = tmp_path / "targets", tmp_path / "run"
    process = living(folder, run)
    [file] = folder.iterdir()
    assert not (Path("/proc") / f"{process.pid}/task/{process.pid}/children").read_text(), "no helper waits for its end"
    process.kill()
    process.wait(30)
    assert list(folder.iterdir()) == [file]
    again = Target(folder, run, 0, "10.0.0.2", 9400, False)
    assert json.loads(file.read_text())[0]["targets"] == ["10.0.0.2:9400"]
    again.close()
    assert not list(folder.iterdir())


def test_run_resumed_elsewhere_keeps_its_file(tmp_path):
    first, again = (Target(tmp_path, tmp_path / "run", 0, f"10.0.0.{i}", 9400, False) for i in (1, 2))
    first.close()
    assert json.loads(again.file.read_text())[0]["targets"] == ["10.0.0.2:9400"]
    again.close()
    assert not again.file.exists()


@pytest.mark.parametrize(
    ("end", "status", "stays"),
    [
        (None, 0, False), (Preempted("stopped", 15), 75, False), (KeyboardInterrupt(), 75, False),
        (DivergedError("nan"), 3, True), (UserError("full"), 2, True), (ZeroDivisionError(), 1, True),
        (OSError(errno.ENOSPC, "full"), 2, True),
    ],
)  # fmt: skip
def test_file_of_a_failed_run_stays_unless_a_gateway_has_its_status(tmp_path, end, status, stays):
    metrics, run = RunMetrics(), tmp_path / "run"
    config = Metrics(port=0, discovery_dir=str(tmp_path))
    with contextlib.suppress(BaseException), publishing(metrics, config, Access(), run, 0):
        assert "pkd_run_end_status{" not in generate_latest(metrics.registry).decode()
        metrics.stage_name = "cache"
        if end:
            raise end
    assert target_file(tmp_path, run, 0).exists() == stays
    labels = f'{{host="{socket.gethostname()}",stage="cache"}}'
    assert f"pkd_run_end_status{labels} {status}.0" in generate_latest(metrics.registry).decode()


def left_behind(folder, name, silent_seconds):
    """Write a target file as a failed node leaves it."""
    folder.mkdir(exist_ok=True)
    file = target_file(folder, folder / name, 0)
    file.write_text(json.dumps([{"targets": ["10.0.0.9:9400"], "labels": {"run": name}}]))
    age(file, silent_seconds)
    return file


def test_start_of_any_run_removes_expired_files(tmp_path):
    folder = tmp_path / "targets"
    expired = left_behind(folder, "dead", EXPIRY_SECONDS + 5)
    crashed = left_behind(folder, "crashed", EXPIRY_SECONDS - 60)
    foreign = folder / "others.json"
    foreign.write_text("[]")
    age(foreign, 10 * EXPIRY_SECONDS)
    mine = Target(folder, tmp_path / "run", 0, "10.0.0.1", 9400, False)
    assert not expired.exists()
    assert sorted(folder.iterdir()) == sorted([crashed, foreign, mine.file])
    mine.close()


def test_file_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "_TOUCH_SECONDS", 0.05)
    target = Target(tmp_path, tmp_path / "run", 0, "10.0.0.1", 9400, False)
    age(target.file, 10 * STALE_SECONDS)
    until(lambda: not any(target.stale for target in targets(tmp_path)), "it is no longer stale")
    target.close()


def pkd(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.output


def test_cli_lists_and_sweeps(tmp_path):
    folder = tmp_path / "targets"
    ages = {"alive": 2, "crashed": STALE_SECONDS + 5, "dead": EXPIRY_SECONDS + 5}
    alive, crashed, expired = (left_behind(folder, name, seconds) for name, seconds in ages.items())
    torn = folder / "pkd-0-0.json"
    torn.write_text("[{")
    status, out = pkd("metrics", "targets", folder)
    lines = sorted(line.split("\t") for line in out.splitlines())
    assert status == 0 and [line[:2] + line[3:] for line in lines] == [
        ["10.0.0.9:9400", "alive", "alive"], ["10.0.0.9:9400", "expired", "dead"], ["10.0.0.9:9400", "silent", "crashed"],
        ["pkd-0-0.json", "unreadable", ""],
    ]  # fmt: skip
    assert lines[1][2].startswith("silent for 864") and expired.exists()
    status, out = pkd("metrics", "targets", folder, "--sweep")
    assert status == 0 and "10.0.0.9:9400\tremoved\tsilent for 864" in out
    assert sorted(folder.iterdir()) == sorted([alive, crashed, torn])


def test_cli_withdraws_the_files_of_all_nodes(tmp_path):
    folder, run = tmp_path / "targets", tmp_path / "run"
    other = left_behind(folder, "other", 1)
    mine = [target_file(folder, run, node) for node in (0, 1, 11)]
    for file in mine:
        file.write_text("[]")
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{dir: {run}}}\nmetrics: {{discovery_dir: {folder}}}\n")
    assert pkd("metrics", "withdraw", "--config", config) == (0, "".join(f"{file}: removed\n" for file in mine))
    assert list(folder.iterdir()) == [other]
    assert pkd("metrics", "withdraw", "--config", config) == (0, f"{folder}: has no file of {run}\n")
    config.write_text(f"run: {{dir: {run}}}\n")
    assert pkd("metrics", "withdraw", "--config", config) == (
        0, f"{config}: metrics.discovery_dir is null, so there is nothing to remove\n",
    )  # fmt: skip


def test_a_run_on_fewer_nodes_removes_the_files_of_the_others(tmp_path):
    folder, run = tmp_path / "targets", tmp_path / "run"
    other = left_behind(folder, "other", 1)
    for node in (1, 2, 10):
        target_file(folder, run, node).write_text("[]")
    config = Metrics(port=0, discovery_dir=str(folder))
    with publishing(RunMetrics(), config, Access(), run, 1, 2):
        assert target_file(folder, run, 2).exists(), "the first node does it"
    with publishing(RunMetrics(), config, Access(), run, 0, 2):
        assert {file.name for file in folder.iterdir()} == {other.name, target_file(folder, run, 0).name}


def test_unwritable_folder_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        Target(tmp_path / "file/targets", tmp_path / "run", 0, "10.0.0.1", 9400, False)
    assert str(refused.value) == (
        f"metrics.discovery_dir: {tmp_path / 'file/targets'} is not writable (Not a directory); choose another folder"
    )
    said = f"pkd: DIR: no such folder: {tmp_path / 'gone'}; give metrics.discovery_dir of a run\n"
    assert pkd("metrics", "targets", tmp_path / "gone") == (2, said)


def test_reachable_address(monkeypatch):
    monkeypatch.setattr(discovery, "own_addresses", lambda: ["10.1.2.3", "fd00::1"])
    monkeypatch.setattr(discovery.socket, "gethostname", lambda: "node7")
    assert reachable_address("127.0.0.1", 9400, False) == "127.0.0.1:9400"
    assert reachable_address("::1", 9400, False) == "[::1]:9400"
    assert reachable_address("0.0.0.0", 9400, False) == "10.1.2.3:9400"
    assert reachable_address("::", 9400, False) == "10.1.2.3:9400"
    assert reachable_address("0.0.0.0", 9400, True) == "node7:9400", "a certificate is for a name"
    monkeypatch.setattr(discovery, "own_addresses", lambda: [])
    assert reachable_address("0.0.0.0", 9400, False) == "node7:9400"
