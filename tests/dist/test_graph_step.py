"""A step without waiting for the host: the same optimization as the plain loop's, and on a GPU captured as graphs."""

import json
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, environment
from families import FAMILIES, SIZE, shape_of
from plain import BATCH, SETTINGS, STEPS, make_model, make_tokens, train

from pkd_dist.config.schema import Train
from pkd_dist.data.batches import TrainingBatches
from pkd_dist.data.on_device import DeviceTokens, open_device_tokens
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.model.encoder import Encoder
from pkd_dist.training.checkpoint import Shards
from pkd_dist.training.graph_step import GraphUpdate
from pkd_dist.training.optimization import Schedule, autocast
from pkd_dist.training.plain_engine import PlainEngine

SCHEDULE = Schedule(Train(**SETTINGS), STEPS, BATCH, 1)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_gpu = pytest.param("cuda", marks=GPU)


def loss(model, batch):
    ce_B = hard_loss(model(batch.inputs)[0], batch.labels_B)
    return {"total": ce_B, "ce": ce_B}


def update(model, device, losses=loss, capture=False, max_grad_norm=SETTINGS["max_grad_norm"], dtype=None):
    settings = SCHEDULE.settings.model_copy(update={"max_grad_norm": max_grad_norm})
    engine = PlainEngine(model.train(), replace(SCHEDULE, settings=settings), torch.device(device), dtype)
    engine.state.allocate()
    return GraphUpdate(engine, losses, capture)


def run(step, steps, resident=None):
    """Return the values of `steps` steps, with the batches and learning rates of `plain.train`."""
    batches = TrainingBatches(make_tokens(), BATCH, "auto", 7, 0, 1, 0)
    values = []
    for number in range(steps):
        epoch, within = divmod(number, batches.steps)
        if resident:
            batch = resident.rows(*batches.rows(batches.order(epoch), within)[0])
        else:
            (batch,) = batches.step(batches.order(epoch), within)
        values.append(step(batch, SCHEDULE.learning_rate(number), 100 + number))
    return [value.read()[0] for value in values]


@pytest.mark.parametrize("made_on_device", [False, True])
@pytest.mark.parametrize("device", ["cpu", needs_gpu])
def test_it_is_the_plain_loop(device, made_on_device):
    """Against one example at a time, torch's clipping and its AdamW without fusion, over two epochs."""
    losses, norms, weights = train()
    encoder = Encoder(make_model())
    resident = DeviceTokens(make_tokens(), None, 0, torch.device(device)) if made_on_device else None
    values = run(update(encoder, device, capture=device == "cuda"), STEPS, resident)
    assert [v[0] for v in values] == pytest.approx(losses, abs=2e-5)
    assert [v[1] for v in values] == [v[0] for v in values] and not any(v[2:-1].any() for v in values)
    assert [v[-1] for v in values] == pytest.approx(norms, rel=2e-4)
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms), "some steps are clipped, some not"
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.detach().cpu(), weights[name], rtol=0, atol=3e-5)


@pytest.mark.parametrize("device", ["cpu", needs_gpu])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_cast_at_once_equal_those_that_autocast_casts_one_by_one(family, device):
    """Bit for bit if every layer is computed for all tokens."""
    found = {}

    def under_autocast(model, batch):
        with autocast(torch.device(device), torch.bfloat16):
            logits_BC = model(batch.inputs).logits_BC
        ce_B = hard_loss(logits_BC, batch.labels_B)
        return {"total": ce_B, "ce": ce_B}

    for dtype, losses in ((None, under_autocast), (torch.bfloat16, loss)):
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_config(
            shape_of(family, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
        encoder = Encoder(model, all_tokens=True)
        values = run(update(encoder, device, losses, dtype=dtype), 4)
        found[dtype] = values, [p.detach().cpu() for p in encoder.parameters()]
    for one, other in zip(*(values for values, _ in found.values()), strict=True):
        assert one.tolist() == other.tolist()
    for one, other in zip(*(weights for _, weights in found.values()), strict=True):
        assert torch.equal(one, other)


class TeacherIds:
    """The outputs of a teacher: for each example its id."""

    def nbytes(self, examples):
        return examples * 2 * (2 + 3 * 4)

    def of(self, ids_N):
        ids = torch.from_numpy(np.asarray(ids_N)).half()
        return ids[:, None].expand(-1, 2).contiguous(), ids[:, None, None].expand(-1, 3, 4).contiguous()


@pytest.mark.parametrize(("typed", "part"), [(False, False), (True, False), (True, True)])
def test_a_batch_made_on_the_device_is_the_one_that_the_host_makes(typed, part):
    """The last, short batch with its rows of weight 0 among them."""
    tokens = make_tokens()
    types = np.arange(len(tokens.input_ids_T), dtype=np.uint8) % 2
    tokens = replace(tokens, type_ids_T=types if typed else None, ids_N=1000 + tokens.ids_N[::-1])
    tokens = tokens.subset(np.arange(1, len(tokens), 2)) if part else tokens
    resident = DeviceTokens(tokens, TeacherIds(), 7, torch.device("cpu"))
    batches = TrainingBatches(tokens, BATCH, "auto", 7, 0, 1, 7)
    order = batches.order(0)
    for step in range(batches.steps):
        ((rows, weight),) = batches.rows(order, step)
        (expected,) = batches.step(order, step)
        made = resident.rows(rows, weight).batch()
        logits, states = TeacherIds().of(expected.ids_B)
        expected = replace(expected, teacher_logits_BC=logits, teacher_states=states)
        assert made.tensors.keys() == expected.tensors.keys() and made.tokens == expected.tokens
        for name, tensor in expected.tensors.items():
            assert made.tensors[name].dtype == tensor.dtype and torch.equal(made.tensors[name], tensor), name


@pytest.mark.parametrize(("free", "there"), [(10**9, True), (10**4, False)])
def test_a_data_set_that_is_too_large_stays_on_the_host(monkeypatch, free, there):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    for outputs in (None, TeacherIds()):
        assert bool(open_device_tokens(make_tokens(), outputs, 0, torch.device("cpu"))) == there
    assert not open_device_tokens(make_tokens(), lambda batch: batch, 0, torch.device("cpu")), "a live teacher"


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    encoder, broken = Encoder(make_model()), []

    def losses(model, batch):
        out = loss(model, batch)
        if broken:
            out["total"] = (
                out["total"] * float("inf") if bad == "loss" else (out["total"] - out["total"].detach()).sqrt()
            )
        return out

    step = update(encoder, "cpu", losses)
    run(step, 2)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    broken.append(True)
    (values,) = run(step, 1)
    assert bool(torch.isfinite(torch.tensor(values[0]))) == (bad == "gradient")
    assert not torch.isfinite(torch.tensor(values[-1]))
    for name, p in encoder.named_parameters():
        assert torch.equal(p, before[name]), name
    assert {float(state["step"]) for state in step._adam.state.values()} == {2.0}
    broken.clear()
    run(step, 1)
    assert any(not torch.equal(p, before[name]) for name, p in encoder.named_parameters())


def test_no_clipping():
    free, bound = (run(update(Encoder(make_model()), "cpu", max_grad_norm=limit), 3) for limit in (0.0, 1e9))
    assert [v.tolist() for v in free] == [v.tolist() for v in bound]


def trained(folder, bad_step, *more):
    """A training of 18 steps on one rank, whose gradient is not finite at one of them."""
    arguments = "ds_configs/zero0_fp32.json", folder, 12, 0, bad_step, *more
    return forked.run(Path(__file__).parent / "nonfinite.py", arguments, ROOT, [environment()], timeout=90)


@pytest.mark.parametrize("ways", [("graph",), ("graph", "seldom"), ("eager", "seldom")])
def test_a_complete_training(tmp_path, ways):
    """The records lack no step at an evaluation or the end; checkpoints are `min_seconds` apart."""
    done = trained(tmp_path, 99, *ways)
    assert done.returncode == 0, done.stderr
    assert "loaded DeepSpeed: False" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("split")) for line in lines] == [
        *((step, None) for step in range(1, 10)), (9, "dev"), *((step, None) for step in range(10, 19)), (18, "dev")
    ]  # fmt: skip
    kept = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
    assert sorted(kept) == ["step-00000015", "step-00000018"][1 if "seldom" in ways else 0 :]
    assert len(list((tmp_path / "checkpoints").glob("best-*"))) == 1, "no checkpoint refers to another"
    losses, norms, _ = train(18)
    steps = [line for line in lines if "split" not in line]
    assert [line["loss"] for line in steps] == pytest.approx(losses, abs=2e-5)
    assert [line["grad_norm"] for line in steps] == pytest.approx(norms, rel=2e-4)


def test_a_stopped_training_resumes_as_if_it_had_not_been_stopped(tmp_path):
    """The checkpoint and the records include the step that was running when the signal arrived."""
    assert trained(tmp_path / "undisturbed", 99, "graph").returncode == 0
    stopped = trained(tmp_path / "stopped", 7, "graph", "stop")
    assert stopped.returncode == 75 and "a checkpoint of step 7 is committed" in stopped.stderr, stopped.stderr
    assert (tmp_path / "stopped/metrics.jsonl").read_text().count("\n") == 7
    assert trained(tmp_path / "stopped", 99, "graph").returncode == 0
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        one, other = (Shards(tmp_path / run / "checkpoints/step-00000018") for run in ("undisturbed", "stopped"))
        assert list(one.names(kind)) == list(other.names(kind)) != []
        assert all(torch.equal(one.tensor(kind, name), other.tensor(kind, name)) for name in one.names(kind))
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("undisturbed", "stopped")]
    assert [json.loads(line).get("loss") for line in lines[0]] == [json.loads(line).get("loss") for line in lines[1]]


def test_a_run_ends_at_the_step_that_is_not_finite_though_it_is_known_one_step_later(tmp_path):
    """The message names the step, the records end before it, and the newest checkpoint is older."""
    done = trained(tmp_path, 5, "graph")
    said = [line for line in done.stderr.splitlines() if line.startswith("pkd: ")]
    assert len(said) == 1 and done.returncode == 3, done.stdout + done.stderr
    assert said[0].startswith("pkd: distill: the gradient is not finite at step 5 (rank 0: total 0."), said[0]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003"]


@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_each_family_equal_its_steps_one_by_one(family, caplog):
    """With dropout, under autocast; graphs draw the same random numbers."""
    caplog.set_level("INFO", "pkd")
    found = {}
    for capture in (False, True):
        torch.manual_seed(3)
        config = shape_of(family, num_labels=2)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        encoder = Encoder(model)
        assert make_tokens().input_ids_T.max() < SIZE
        step = update(encoder, "cuda", capture=capture, dtype=torch.bfloat16)
        found[capture] = run(step, 12), [p.detach().cpu() for p in encoder.parameters()], step
    assert (found[True][2]._graphs is not None) != ("cannot be captured" in caplog.text)
    for one, other in zip(found[False][0], found[True][0], strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3)
    for one, other in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)
    if family == "bert":
        assert found[True][2]._graphs


@GPU
@pytest.mark.parametrize("how", ["waits for the device", "leaves a stream behind"])
def test_a_model_that_cannot_be_captured_is_trained_nevertheless(how, caplog):
    caplog.set_level("INFO", "pkd")
    found = {}
    for capture in (False, True):
        encoder = Encoder(make_model())
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1

        def losses(model, batch):
            out = loss(model, batch)
            if how == "waits for the device":
                out["total"] = out["total"] * float(out["ce"].detach().isfinite().all())
            else:
                aside = torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    out["ce"].detach().clone()
            return out

        values = run(update(encoder, "cuda", losses, capture), 8)
        torch.cuda.synchronize()
        found[capture] = values, [p.detach().cpu() for p in encoder.parameters()]
    assert "cannot be captured" in caplog.text
    for one, other in zip(found[False][0], found[True][0], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    for one, other in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
