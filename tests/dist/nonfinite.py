"""Training whose gradient, not its loss, is not finite on one rank at one step; run by test_nonfinite.py on two ranks, by
test_whole.py on one, with the step that a GPU does whole."""

import signal
import sys
from pathlib import Path

import torch
from plain import BATCH, PLAN, make_model, make_tokens

from pkd_dist.cli.launch import guarded, leave
from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load
from pkd_dist.config.schema import Checkpoint, Task
from pkd_dist.data import tasks
from pkd_dist.distributed.world import World
from pkd_dist.model.encoder import Encoder
from pkd_dist.distributed.ranks import discover
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.training.engine import Engine
from pkd_dist.training.trainer import Job, Trainer
from pkd_dist.training.graph_step import GraphStep


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def made_whole(engine, losses, terms):
    """As on a GPU, but without its graphs."""
    engine.state.allocate()
    limit = engine._plan.max_grad_norm
    return GraphStep(engine.module, engine._adam, losses, terms, limit, engine._device, engine._low, capture=False)


def main(deepspeed, output, micro, bad_rank, bad_step, *more):
    world = World(discover(), 60)
    folder = Path(output)

    def losses(engine, batch):
        logits = engine(batch.inputs)[0]
        if "stop" in more and trainer.progress.step + 1 == int(bad_step):
            world.signals.number = int(signal.SIGTERM)
            return {"total": hard_loss(logits, batch.labels_B), "ce": hard_loss(logits, batch.labels_B)}
        if world.rank == int(bad_rank) and trainer.progress.step + 1 == int(bad_step):
            logits = NoGradient.apply(logits)
        value = hard_loss(logits, batch.labels_B)
        return {"total": value, "ce": value}

    tokens = make_tokens()
    job = Job(
        name="distill", module=Encoder(make_model()), losses=losses, train=tokens, dev=tokens, task=tasks.resolve(Task()),
        pad_id=0, seed=7, epochs=2, batch_size=BATCH, micro_batch_size=int(micro), eval_batch_size=64, eval_every_epochs=1,
        log_every_steps=1, checkpoint=Checkpoint(every_steps=3 if more else 1, min_seconds=1000 if "seldom" in more else 0), folder=folder / "checkpoints", fingerprint="",
        deepspeed=load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed={deepspeed}"])), records=folder / "metrics.jsonl",
        **{key: value for key, value in PLAN.items() if key != "total_steps"},
    )  # fmt: skip
    if "whole" in more:
        Engine.graph_step = made_whole
        torch.cuda.mem_get_info = lambda device: (1 << 30, 1 << 30)
    trainer = Trainer(job, world, Telemetry(RunMetrics(), False))
    leave(guarded(trainer.run, world.agree_on_end))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
