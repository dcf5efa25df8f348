"""A training of a tiny encoder with dropout, for test_extended_training.py: in its process, or as a rank of two."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from plain import BATCH, EXAMPLES, SETTINGS, make_model, make_tokens

from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load
from pkd_dist.config.schema import Checkpoint, Evaluate, Train
from pkd_dist.config.task import Task
from pkd_dist.data import tasks
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.model.encoder import Encoder
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.training.job import Job
from pkd_dist.training.trainer import train

STEPS_PER_EPOCH = -(-EXAMPLES // BATCH)
SAVE_EVERY = 5


def make_job(folder, at_step=lambda step: None, best_by="metric", **settings):
    """A job; `at_step` is called in each step with the number of steps that this process has begun."""
    tokens, model, began = make_tokens(), make_model(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1

    def losses(forward, batch):
        began.append(None)
        at_step(len(began))
        value = hard_loss(forward(batch.inputs)[0], batch.labels_B)
        return {"total": value, "ce": value}

    return Job(
        name="distill", module=Encoder(model), losses=losses, train=tokens, dev=tokens, task=tasks.resolve(Task()),
        pad_id=0, seed=7, settings=Train(**SETTINGS | settings), evaluate=Evaluate(best_by=best_by),
        checkpoint=Checkpoint(every_steps=SAVE_EVERY, min_seconds=0),
        deepspeed=load_deepspeed(load(None, ["run.dir=x", "train.deepspeed=ds_configs/zero1_fp32.json"])),
        folder=folder / "checkpoints", records=folder / "metrics.jsonl", fingerprint="",
        teacher_dev_NC=np.random.default_rng(5).normal(size=(EXAMPLES, 2)).astype(np.float32),
    )  # fmt: skip


def run(world, folder, metrics=None, **settings):
    """Train to the end; return the progress."""
    return train(lambda: make_job(folder, **settings), world, Telemetry(metrics or RunMetrics(), False))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    everyone = World(discover(), 60)
    seen = run(everyone, place, **given)
    (place / f"rank-{everyone.rank}.json").write_text(json.dumps(vars(seen)))
    everyone.barrier()
    everyone.close()
