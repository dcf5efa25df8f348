"""One rank of test_zero.py: trains a tiny encoder through an engine and writes the outcome.

It saves a checkpoint at step HALF. After the last step it resumes from there with a new engine: both ends must be equal bit
for bit. Or it resumes from a given checkpoint, possibly of another number of ranks and another ZeRO stage. The loss is that
of the labels, or has every term of a distillation.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from plain import SETTINGS, STEPS, make_model, make_tokens, unload_deepspeed
from safetensors.torch import save_file

from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load
from pkd_dist.config.distill import Distill
from pkd_dist.config.schema import Train
from pkd_dist.data.batches import TrainingBatches, micro_batches
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.distillation.objective import DistillationLoss, live_outputs
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.distributed import shared_memory as shared
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.model.attention import teacher_attention
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.layers import layer_map
from pkd_dist.training import checkpoint
from pkd_dist.training.engine import open_engine
from pkd_dist.training.optimization import Schedule

HALF = 10
shared.MIN_NUMEL, shared.CHUNK_NUMEL = 1, 777  # as if the tensors were large
exchanges = Counter()


class Counted(shared.SharedMemory):
    def sum(self, tensor):
        exchanges["sums"] += 1
        super().sum(tensor)

    def gather(self, output, own):
        exchanges["gathers"] += 1
        super().gather(output, own)


def labels_alone(model, batch):
    return {"total": hard_loss(model(batch.inputs).logits_BC, batch.labels_B)}


def every_term(device):
    """A loss on all that can be compared with a teacher of 3 layers, which runs in every step."""
    distill = Distill(beta=10, states="tokens", gram=1, relations=1, relation_heads=2, attention=0.1)
    layers, teacher = layer_map(distill, 3, 2), make_model(layers=3, seed=1)
    attention = teacher_attention(teacher, [layer for _, layer in layers.attention], torch.float32, device)
    add_outputs = live_outputs(LiveTeacher(teacher, layers.teacher_states, "float32", "float32", True, device))
    loss = DistillationLoss(distill, layers, None, attention)
    return lambda model, batch: loss(model, add_outputs(batch))


class Run:
    """One engine with the plain loop's model and data."""

    def __init__(self, world, deepspeed, micro, terms):
        self.world, self.losses, self.norms = world, [], []
        self.terms = every_term(world.device) if terms else labels_alone
        tokens = make_tokens()
        config = load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed={deepspeed}"]))
        settings = Train(**SETTINGS, micro_batch_size=micro)
        schedule = Schedule(settings, STEPS, *micro_batches(settings.batch_size, world.size, micro))
        self.engine = open_engine(Encoder(make_model(), all_tokens=bool(terms)), config, schedule, world)
        self.batches = TrainingBatches(tokens, settings.batch_size, micro, 7, world.rank, world.size, 0)
        self.engine.train()

    def train(self, start, stop):
        for step in range(start, stop):
            epoch, within = divmod(step, self.batches.steps)
            total = 0.0
            parts = self.batches.step(self.batches.order(epoch), within)
            for i, batch in enumerate(parts):
                loss = (self.terms(self.engine, batch)["total"] * batch.weight_B).sum()
                self.engine.backward(loss)
                total += float(loss)
                if i + 1 < len(parts):
                    self.engine.end_micro_batch()
            self.losses.append(float(self.world.sum(np.array([total]))[0]))
            self.norms.append(self.engine.step(step))

    def save(self, folder, step):
        state = {"fingerprint": "", "best_file": None, "best_sha256": None, "counters": self.engine.state.counters()}
        checkpoint.save(self.world, folder, step, self.engine.state.slices(), state, 9)

    def restore(self, path):
        self.engine.state.restore(checkpoint.Shards(path), checkpoint.read_state(path)["counters"])

    def live(self):
        """The unsharded weights that the forward pass reads, in its own precision."""
        named = dict(self.engine.module.named_parameters())
        if getattr(self.engine, "stage", 0) < 3:
            return {name: p.detach().clone() for name, p in named.items()}
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: p.detach().clone() for name, p in named.items()}


def main(engine, deepspeed, micro, output, start, stop, terms=""):
    world = World(discover(), 60)
    if engine == "plain":
        unload_deepspeed()
    shared.SharedMemory = Counted
    micro, output, start, stop = int(micro) if micro.isdigit() else micro, Path(output), Path(start), int(stop)
    run = Run(world, deepspeed, micro, terms)
    same = None
    if start.name:
        run.restore(start)
        run.train(checkpoint.read_state(start)["counters"]["updates"], stop)
        run.save(output, stop)
    else:
        run.train(0, min(HALF, stop))
        run.save(output, min(HALF, stop))
        live = run.live()
        if world.main:
            save_file(live, output / "live.safetensors")
        run.train(HALF, stop)
        if stop > HALF:
            again = Run(world, deepspeed, micro, terms)
            again.restore(output / checkpoint.step_name(HALF))
            again.train(HALF, stop)
            first, second = run.engine.full_weights(), again.engine.full_weights()
            same = again.losses == run.losses[HALF:] and all(torch.equal(first[n], second[n]) for n in first)
    weights = run.engine.full_weights()
    loaded = "deepspeed" in sys.modules
    used = loaded and type(run.engine) is sys.modules["pkd_dist.training.deepspeed_engine"].DeepSpeedEngine
    probed = loaded and "__compatible_ops__" in vars(sys.modules["deepspeed.ops"])
    if world.main:
        found = {"losses": run.losses, "norms": run.norms, "same": same, "loaded": loaded, "used": used}
        found["compilers probed"] = probed
        (output / "out.json").write_text(json.dumps({**found, **exchanges}))
        save_file(weights, output / "weights.safetensors")
    world.barrier()
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
