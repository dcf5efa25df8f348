"""A training whose gradient, but not its loss, is not finite on one rank at one step.

test_nonfinite.py runs it on two ranks, test_graph_step.py on one, with the step that a GPU does in one launch."""

import signal
import sys
from pathlib import Path

import torch
from plain import SETTINGS, make_model, make_tokens, unload_deepspeed

from pkd_dist.cli.launch import guarded, leave
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
from pkd_dist.training import trainer as training
from pkd_dist.training.graph_step import open_graph_step
from pkd_dist.training.job import Job


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def main(deepspeed, output, micro, bad_rank, bad_step, *more):
    world = World(discover(), 60)
    if world.size == 1:
        unload_deepspeed()
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
        pad_id=0, seed=7, settings=Train(**SETTINGS, epochs=2, micro_batch_size=int(micro)), evaluate=Evaluate(),
        checkpoint=Checkpoint(every_steps=3 if more else 1, min_seconds=1000 if "seldom" in more else 0),
        deepspeed=load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed={deepspeed}"])),
        folder=folder / "checkpoints", records=folder / "metrics.jsonl", fingerprint="",
    )  # fmt: skip
    if "graph" in more:  # as on a GPU, but without its graphs
        training.open_step = lambda inputs: open_graph_step(inputs, inputs.engine, capture=False)
        torch.cuda.mem_get_info = lambda device: (1 << 30, 1 << 30)
    trainer = training.open_trainer(job, world, Telemetry(RunMetrics(), False))

    def run():
        trainer.run()
        print("loaded DeepSpeed:", "deepspeed" in sys.modules, flush=True)

    leave(guarded(run, world.agree_on_end))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
