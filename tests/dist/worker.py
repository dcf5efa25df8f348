"""Run under torchrun by test_zero.py: trains a tiny encoder through the engine and writes what came of it."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from plain import BATCH, PLAN, STEPS, make_model, make_tokens
from safetensors.torch import save_file

from pkd_dist.config import load, load_deepspeed
from pkd_dist.data.batches import TrainingBatches, micro_batches
from pkd_dist.dist import World
from pkd_dist.model.encoder import Encoder
from pkd_dist.ranks import discover
from pkd_dist.student.losses import hard_loss
from pkd_dist.training.engine import Engine, Optimization, resolve_precision


def main(deepspeed: str, micro: str, output: str) -> None:
    world = World(discover(), 60)
    tokens = make_tokens()
    micro_batch_size = "auto" if micro == "auto" else int(micro)
    config, _ = resolve_precision(load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed={deepspeed}"])), world.device)
    size, count = micro_batches(BATCH, world.size, micro_batch_size)
    plan = Optimization(**PLAN, batch_size=BATCH, micro_batch_size=size, accumulation=count)
    engine = Engine(Encoder(make_model()), config, plan, world)
    batches = TrainingBatches(tokens, BATCH, micro_batch_size, 7, world.rank, world.size, 0)
    losses, norms = [], []
    engine.train()
    for step in range(STEPS):
        epoch, within = divmod(step, batches.steps)
        total = 0.0
        parts = batches.step(batches.order(epoch), within)
        for i, batch in enumerate(parts):
            loss = (hard_loss(engine(batch.inputs)[0], batch.labels_B) * batch.weight_B).sum()
            engine.backward(loss)
            total += float(loss)
            if i + 1 < len(parts):
                engine.micro_step()
        losses.append(float(world.sum(np.array([total]))[0]))
        norms.append(engine.step())
    weights = engine.full_weights()
    if world.main:
        Path(output).with_suffix(".json").write_text(json.dumps({"losses": losses, "norms": norms}))
        save_file(weights, Path(output).with_suffix(".safetensors"))
    world.barrier()
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
