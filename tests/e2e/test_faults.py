"""A few fixed trials of the fault campaign (`benchmarks/faults`): struck, started again, it ends with the same bytes."""

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
from conftest import ForkedStart

from benchmarks.faults.campaign import Campaign
from benchmarks.faults.job import Watch
from benchmarks.faults.plan import EPOCHS, WEIGHTS, plan
from benchmarks.faults.trial import follow
from pkd_dist.errors import UserError

BASE = replace(plan(0, 0, 2), delay_seconds=0.0, running=False, rank=1, which=0.9, where=0.5)
TRIALS = {
    "a rank is killed while it saves": {"fault": "kill-rank", "moment": "checkpoints/*step-00000020*/*"},
    "a rank is told to stop while the cache is built": {
        "fault": "signal-rank", "moment": "cache/shard-00001.safetensors", "stop_signal": "SIGUSR1",
    },
    "the disk is full when the teacher saves": {
        "fault": "fill-disk", "moment": "teacher_checkpoints/step-00000013/commit.json", "free_bytes": 65536,
    },
    "the newest checkpoint is altered after kill -9": {
        "fault": "damage-checkpoint", "moment": "checkpoints/step-00000030/commit.json", "damage": "flip",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.faults.trial.Start", ForkedStart)
        yield Campaign(tmp_path_factory.mktemp("faults"), 0, 2, tuple(WEIGHTS), Watch(), references=1)


@pytest.mark.parametrize("what", TRIALS)
def test_struck_it_ends_with_the_undisturbed_result(campaign, what):
    if TRIALS[what]["fault"] == "fill-disk" and (os.geteuid() or not shutil.which("mount")):
        pytest.skip("a small disk needs root and mount")
    row, folder = campaign.run_plan(replace(BASE, trial=list(TRIALS).index(what), **TRIALS[what]))
    assert row.struck, "the moment came"
    assert row.good, f"{json.dumps(asdict(row), indent=2)}\nkept in {folder}"


def test_the_export_that_is_compared_depends_on_every_step(campaign):
    assert campaign.reference.best_epoch == EPOCHS


def test_a_campaign_of_another_seed_is_not_mixed_in(campaign):
    with pytest.raises(UserError, match="holds a campaign with seed 0, not 1"):
        Campaign(campaign.work, 1, 2, tuple(WEIGHTS), Watch())


def test_a_trial_follows_from_seed_and_number():
    drawn = [plan(7, number, 2) for number in range(200)]
    assert drawn == [plan(7, number, 2) for number in range(200)]
    assert {one.fault for one in drawn} == set(WEIGHTS), "each fault has its turn"
    assert {one.rank for one in drawn} == {0, 1}
    assert drawn != [plan(8, number, 2) for number in range(200)]


def test_the_operator_does_what_the_message_says(tmp_path):
    shard = tmp_path / "cache/shard-00001.safetensors"
    shard.parent.mkdir()
    shard.write_text("damaged")
    aside = tmp_path / "aside"
    assert follow(f"pkd: {shard}: the shard is damaged; remove the file to have it built again", aside).startswith(
        "removed"
    )
    assert not shard.exists()
    assert (
        follow(f"pkd: {tmp_path}/step-1: no intact checkpoint is left; restore one, or use --fresh", aside) == "--fresh"
    )
    assert (
        follow(
            f"pkd: {shard.parent}: exists, but this run did not make it; choose another run.dir, or move it away", aside
        )
        == "moved cache away"
    )
    assert (aside / "0-cache").is_dir()
    assert follow("pkd: task.name: 'sst3' is not a task", aside) is None
