"""States of all tokens that the teacher computes again in every step, through the command line."""

import pytest
from conftest import launch, losses, write_config
from test_kill import kill_at

from pkd_dist.distillation.cache import map_tensors
from pkd_dist.files import sha256

TO_DISTILL = ("--stages", "data,teacher,cache,init,distill")
ALL_TOKENS = [
    {"states": "tokens", "normalize": False},
    {"gram": 1, "relations": 1, "relation_heads": 4, "attention": 0.1},
]


@pytest.mark.parametrize("distill", ALL_TOKENS, ids=["patience", "three terms"])
def test_the_same_training_with_the_logits_alone_on_disk(settings, tmp_path, distill):
    settings["student"]["dropout"] = 0.0
    settings["distill"] = distill
    settings["train"]["deepspeed"] = "ds_configs/zero0_fp32.json"
    settings["cache"] |= {"precision": "float32", "dtype": "float32"}
    config, run = write_config(settings, tmp_path), tmp_path / "run"
    disk = launch("--config", config, *TO_DISTILL)
    assert disk.returncode == 0 and "they are not cached" not in disk.stdout, disk.stderr
    cached = losses(run)
    again = launch("--config", config, *TO_DISTILL, "cache.mode=recompute")
    assert again.returncode == 0, again.stderr
    assert (
        "cache: the states of all tokens would take " in again.stdout and "in every step (cache.mode)" in again.stdout
    )
    assert losses(run) == pytest.approx(cached, abs=1e-6)
    for shard in (run / "cache").glob("*.safetensors"):
        assert map_tensors(shard)[0]["states"].size == 0


def test_auto_follows_the_share_of_the_disk_and_a_killed_run_ends_in_the_same_bytes(settings, tmp_path):
    settings["distill"] = ALL_TOKENS[0]
    settings["cache"] |= {"max_disk_share": 1e-9}
    config, whole, killed = write_config(settings, tmp_path), tmp_path / "whole", tmp_path / "killed"
    done = launch("--config", config, *TO_DISTILL, f"run.dir={whole}")
    assert done.returncode == 0 and "they are not cached" in done.stdout, done.stderr
    kill_at(killed, "metrics.jsonl:8", "--config", config, *TO_DISTILL, f"run.dir={killed}")
    rest = launch("--config", config, *TO_DISTILL, f"run.dir={killed}")
    assert rest.returncode == 0 and "distill: resum" in rest.stdout, rest.stdout + rest.stderr
    assert losses(killed) == losses(whole)
    best = [sorted(run.glob("checkpoints/best-*")) for run in (whole, killed)]
    assert best[0] and [sha256(path) for path in best[0]] == [sha256(path) for path in best[1]]
