"""A gradient that is not finite on one of two ranks, at ZeRO stages: which rank, which step, and no update."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment


@pytest.mark.parametrize(
    ("deepspeed", "micro"),
    [("zero0_fp32", 6), ("zero1_fp32", 3), ("zero1_bf16", 6), ("zero3_fp32", 6)],
)
def test_the_rank_is_named_and_nothing_of_the_step_is_kept(tmp_path, deepspeed, micro):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(Path(__file__).parent / "nonfinite.py"), f"ds_configs/{deepspeed}.json", str(tmp_path), str(micro), "1", "4"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90)
    said = [line for line in done.stderr.splitlines() if line.startswith("pkd: ")]
    assert len(said) == 1, done.stdout + done.stderr
    assert said[0].startswith("pkd: distill: the gradient is not finite at step 4 (rank 1: total 0."), said[0]
    assert "exitcode  : 3" in done.stderr, done.stderr
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
