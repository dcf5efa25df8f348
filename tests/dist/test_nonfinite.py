"""A gradient that is not finite on one of two ranks: the message names rank and step, and nothing is updated."""

from pathlib import Path

import forked
import pytest
from conftest import ROOT, bare_ranks


@pytest.mark.parametrize(
    ("deepspeed", "micro"),
    [("zero0_fp32", 6), ("zero1_fp32", 3), ("zero1_bf16", 6), ("zero3_fp32", 6)],
)
def test_the_message_names_the_rank_and_nothing_of_the_step_is_kept(tmp_path, deepspeed, micro):
    arguments = f"ds_configs/{deepspeed}.json", tmp_path, micro, 1, 4
    done = forked.run(Path(__file__).parent / "nonfinite.py", arguments, ROOT, bare_ranks(2), timeout=90)
    said = [line for line in done.stderr.splitlines() if line.startswith("pkd: ")]
    assert len(said) == 1, done.stdout + done.stderr
    assert said[0].startswith("pkd: distill: the gradient is not finite at step 4 (rank 1: total 0."), said[0]
    assert done.returncode == 3
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
