"""A training at a usual learning rate on one rank, against a plain loop: one example at a time, torch's clipping and AdamW."""

from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, bare_ranks
from plain import BATCH, SETTINGS, make_model, make_tokens, train

from pkd_dist.config.schema import Train
from pkd_dist.data.batches import TrainingBatches
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.model.encoder import Encoder
from pkd_dist.training.optimization import Schedule
from pkd_dist.training.plain_engine import PlainEngine

STEPS, RATE = 200, 1e-4


@pytest.fixture(scope="module")
def plain():
    return train(STEPS, RATE)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 4e-3)], ids=["float32", "bfloat16"])
def test_losses_over_200_steps_are_those_of_a_plain_loop(plain, dtype, tolerance):
    schedule = Schedule(Train(**SETTINGS | {"learning_rate": RATE}), STEPS, BATCH, 1)
    engine = PlainEngine(Encoder(make_model()), schedule, torch.device("cpu"), dtype)
    engine.train()
    batches, losses = TrainingBatches(make_tokens(), BATCH, "auto", 7, 0, 1, 0), []
    for step in range(STEPS):
        epoch, within = divmod(step, batches.steps)
        (batch,) = batches.step(batches.order(epoch), within)
        loss = (hard_loss(engine(batch.inputs).logits_BC, batch.labels_B) * batch.weight_B).sum()
        engine.backward(loss)
        engine.step(step)
        losses.append(loss.item())
    assert losses == pytest.approx(plain, rel=0, abs=tolerance)
    assert max(plain) - min(plain) > 0.05


def test_subnormal_numbers_are_zero_on_every_thread():
    environments = [ranks | {"OMP_NUM_THREADS": "2"} for ranks in bare_ranks(1)]
    done = forked.run(Path(__file__).parent / "subnormal.py", (), ROOT, environments, timeout=90)
    assert (done.returncode, done.stdout.split()) == (0, ["2", "0", "1000"]), done.stdout + done.stderr


def test_a_step_leaves_no_subnormal_moments():
    schedule = Schedule(Train(**SETTINGS), 2, BATCH, 1)
    engine = PlainEngine(Encoder(make_model()), schedule, torch.device("cpu"), None)
    engine.train()
    batches = TrainingBatches(make_tokens(), BATCH, "auto", 7, 0, 1, 0)
    (batch,) = batches.step(batches.order(0), 0)
    words = engine.module.model.get_input_embeddings().weight
    for step in range(2):
        engine.backward(engine(batch.inputs).logits_BC.sum())
        unseen = (words.grad == 0).all(dim=1)
        engine.step(step)
        momentum = engine.optimizer.state[words]["exp_avg"][unseen]
        assert unseen.any() and not momentum.any()
        engine.optimizer.state[words]["exp_avg"][unseen] = 1e-40
    assert (torch.full((10,), 1e-40) * 0.5).all(), "outside of the step they are numbers as before"
