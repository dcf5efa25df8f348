"""Real ranks: both engines at every ZeRO stage, world size and accumulation against one plain AdamW loop."""

import json
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, bare_ranks
from plain import STEPS, train
from safetensors.torch import load_file
from worker import HALF

from pkd_dist.training.checkpoint import WEIGHT, Shards, damage, step_name

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def plain():
    return train()


def run(output, deepspeed, ranks, micro="auto", start="", stop=STEPS, terms=""):
    """Train in worker.py; return what it wrote, the weights, and the newest checkpoint."""
    output.mkdir(exist_ok=True)
    engine = "plain" if ranks == 1 and deepspeed.endswith("_fp32") else "deepspeed"
    arguments = engine, f"ds_configs/{deepspeed}.json", micro, output, start, stop, terms
    done = forked.run(HERE / "worker.py", arguments, ROOT, bare_ranks(ranks), timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    written = output / "weights.safetensors"
    return json.loads((output / "out.json").read_text()), load_file(written), max(output.glob("step-*"))


def assert_checkpoint_is_live(output, path):
    """Assembled from its slices, a checkpoint equals the module bit for bit, in the module's own precision."""
    assert damage(path)[0] is None
    live, shards = load_file(output / "live.safetensors"), Shards(path)
    assert sorted(shards.names()) == sorted(live)
    for name, value in live.items():
        whole = shards.tensor(WEIGHT, name)
        assert whole.dtype == torch.float32 and torch.equal(whole.to(value.dtype), value), name


@pytest.mark.parametrize(
    ("deepspeed", "ranks", "micro"),
    [
        ("zero0_fp32", 2, "auto"),
        ("zero1_fp32", 2, "auto"),
        ("zero2_fp32", 2, "auto"),
        ("zero3_fp32", 2, "auto"),
        ("zero1_fp32", 1, "auto"),
        ("zero3_fp32", 1, 5),
        ("zero1_fp32", 4, "auto"),
        ("zero1_fp32", 2, 4),
        ("zero1_fp32", 3, 1),
    ],
)
def test_float32_equals_plain_adamw(plain, tmp_path, deepspeed, ranks, micro):
    losses, norms, weights = plain
    got, mine, path = run(tmp_path, deepspeed, ranks, micro)
    assert got["losses"] == pytest.approx(losses, rel=2e-4)
    assert got["norms"] == pytest.approx(norms, rel=2e-3)
    assert mine.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-4, msg=name)
    assert got["same"], f"resumed from step {HALF} with a new engine, the end is the same bit for bit"
    assert_checkpoint_is_live(tmp_path, path)
    assert got["loaded"] == got["used"] == (ranks > 1), "one rank does without DeepSpeed"
    assert not got["compilers probed"], "nothing is compiled on a CPU"
    if deepspeed == "zero1_fp32" and ranks > 1:
        assert got["sums"] and got["gathers"], "through shared memory"


def test_every_loss_term_on_two_ranks_equals_one(tmp_path):
    """Hidden states, Gram matrices, relations and attention scores, with sharded optimizers and sharded weights."""
    one, wanted, _ = run(tmp_path / "one", "zero1_fp32", 1, stop=6, terms="all")
    for deepspeed in ("zero1_fp32", "zero3_fp32"):
        two, mine, _ = run(tmp_path / deepspeed, deepspeed, 2, stop=6, terms="all")
        assert two["losses"] == pytest.approx(one["losses"], rel=2e-4)
        for name, value in wanted.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("deepspeed", "ranks"),
    [("zero1", 2), ("zero0_bf16", 2), ("zero1_bf16", 2), ("zero1_bf16", 1), ("zero2_offload", 2), ("zero3_bf16", 2)],
)
def test_half_precision_and_offload_follow_it(plain, tmp_path, deepspeed, ranks):
    """bfloat16 rounds to 3 digits: the losses follow the same course with other digits."""
    losses, _, _ = plain
    got, mine, path = run(tmp_path, deepspeed, ranks)
    assert got["used"]
    assert got["losses"] == pytest.approx(losses, rel=0.1, abs=0.03)
    assert all(value.dtype == torch.float32 for value in mine.values()), "weights come from the float32 masters"
    assert got["same"]
    assert_checkpoint_is_live(tmp_path, path)


def test_any_stage_and_world_size_resumes_from_any_other(plain, tmp_path):
    """Trained in turns by other numbers of ranks, at other stages and on either engine, it is still one optimization."""
    losses, _, weights = plain
    got, start = [], ""
    for deepspeed, ranks, stop in [
        ("zero1_fp32", 2, 5), ("zero1_fp32", 1, 8), ("zero3_fp32", 4, 11), ("zero2_fp32", 3, 14), ("zero0_fp32", 2, 17),
        ("zero3_fp32", 1, STEPS),
    ]:  # fmt: skip
        part, mine, start = run(tmp_path / f"{deepspeed}-{ranks}", deepspeed, ranks, start=start, stop=stop)
        got += part["losses"]
    assert got == pytest.approx(losses, rel=2e-4)
    for name, value in weights.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-4, msg=name)
    assert start.name == step_name(STEPS)
