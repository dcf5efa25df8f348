"""One rank of a training through the project's engine, under torchrun; rank 0 prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time

from pkd_dist.kernels.allocator import keep_freed_blocks

keep_freed_blocks()

import torch  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification  # noqa: E402

from benchmarks.scaling.counting import StepCounter, live_bytes  # noqa: E402
from benchmarks.scaling.model import Shape  # noqa: E402
from pkd_dist.config.deepspeed import load_deepspeed  # noqa: E402
from pkd_dist.config.load import load  # noqa: E402
from pkd_dist.config.schema import Train  # noqa: E402
from pkd_dist.distillation.losses import hard_loss  # noqa: E402
from pkd_dist.distributed.ranks import discover  # noqa: E402
from pkd_dist.distributed.world import World  # noqa: E402
from pkd_dist.model.encoder import Encoder  # noqa: E402
from pkd_dist.training.engine import open_engine  # noqa: E402
from pkd_dist.training.optimization import Schedule  # noqa: E402

WARMUP, BUCKET = 3, 500_000_000


def make_model(shape: Shape) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
        )
    )  # fmt: skip


def make_inputs(rows: int, length: int, vocabulary: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids_BL = torch.randint(1, vocabulary, (rows, length))
    return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}, torch.randint(2, (rows,))


def main(deepspeed: str, shape: Shape, rows: int, length: int, steps: int, accumulation: int) -> None:
    world = World(discover(), 120)
    config = load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed={deepspeed}"]))
    settings = Train(batch_size=rows * world.size * accumulation, micro_batch_size=rows)
    engine = open_engine(Encoder(make_model(shape)), config, Schedule(settings, 1000, rows, accumulation), world)
    engine.train()

    def step() -> tuple[float, float]:
        """Wall and processor seconds."""
        start = time.perf_counter(), time.process_time()
        for i in range(accumulation):
            inputs, labels_B = make_inputs(rows, length, shape.vocabulary)
            engine.backward(hard_loss(engine(inputs)[0], labels_B).mean() / (world.size * accumulation))
            if i + 1 < accumulation:
                engine.end_micro_batch()
        engine.step()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    for _ in range(WARMUP):
        step()
    seconds = []
    for _ in range(steps):
        world.barrier()
        seconds.append(step())
    kept, _ = live_bytes(BUCKET)
    seen: list[tuple[int, int]] = []
    first = next(p for p in engine.module.parameters())  # the embedding: the last to get its gradient
    hook = first.register_hook(lambda grad: seen.append(live_bytes(BUCKET)))
    step()
    hook.remove()
    with StepCounter() as counter:
        step()
    if world.main:
        print(
            json.dumps(
                {
                    "wall_seconds": min(wall for wall, _ in seconds),
                    "processor_seconds": min(processor for _, processor in seconds),
                    "kept_bytes": kept,
                    "backward_bytes": seen[-1][0],
                    "bucket_bytes": seen[-1][1],
                    "operations": counter.operations,
                    "traffic_bytes": counter.traffic_bytes,
                    "collectives": dict(counter.collectives),
                    "payload_bytes": dict(counter.payload_bytes),
                }
            ),
            flush=True,
        )
    world.barrier()
    world.close()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    main(**{**arguments, "shape": Shape(**arguments["shape"])})
