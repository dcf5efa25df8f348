"""Which engine a training gets, its precision, and the learning rates that both engines follow."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from pkd_dist.config.schema import Train
from pkd_dist.distillation.teacher import resolve_teacher_precision
from pkd_dist.training.engine import deepspeed_features, needs_deepspeed, resolve_precision
from pkd_dist.training.optimization import Schedule, global_norm

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_one_rank_needs_deepspeed_only_for_half_precision_and_offload(path):
    config = json.loads(path.read_text())
    assert needs_deepspeed(config, 1) == path.stem.endswith(("_bf16", "_fp16", "_offload"))
    assert needs_deepspeed(config, 2), "several ranks always do"


@pytest.mark.parametrize(
    ("config", "features"),
    [
        ({}, []),
        ({"zero_optimization": {"stage": 3}, "torch_autocast": {"enabled": "auto"}, "bf16": {"enabled": False}}, []),
        ({"communication_data_type": "fp16", "train_batch_size": "auto"}, []),
        ({"flops_profiler": {"enabled": False}, "wall_clock_breakdown": False}, []),
        ({"flops_profiler": {"enabled": True}, "dump_state": True}, ["dump_state", "flops_profiler"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["zero_optimization.offload_param"]),
        (
            {"fp16": {"enabled": True}, "activation_checkpointing": {"profile": True}},
            ["activation_checkpointing", "fp16"],
        ),
    ],
)
def test_what_only_deepspeed_has(config, features):
    assert deepspeed_features(config) == features
    assert needs_deepspeed(config, 1) == bool(features)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "autocast bfloat16"),
        ({"torch_autocast": {"enabled": True}}, "autocast bfloat16"),
        ({"torch_autocast": {"enabled": False}}, "float32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": True}}, "float16"),
        ({}, "float32"),
    ],
)
def test_precision_on_a_cpu(config, name):
    assert resolve_precision(config, torch.device("cpu"))[1] == name


@pytest.mark.parametrize(
    ("features", "student", "teacher"),
    [
        ({"avx2": True}, "float32", "float32"),
        ({"avx512_bf16": True}, "autocast bfloat16", "bfloat16"),
        ({"amx_bf16": True}, "autocast bfloat16", "bfloat16"),
    ],
)
def test_half_precision_only_where_the_cpu_multiplies_in_it(monkeypatch, features, student, teacher):
    """Others emulate it: a teacher's pass in bfloat16 took ten times as long as in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_precision({"torch_autocast": {"enabled": "auto"}}, torch.device("cpu"))[1] == student
    assert resolve_teacher_precision("auto", torch.device("cpu")) == teacher
    assert resolve_teacher_precision("bfloat16", torch.device("cpu")) == "bfloat16"


def test_the_schedule_warms_up_and_decays():
    settings = Train(epochs=2, batch_size=10, learning_rate=1.0, warmup_ratio=0.2, weight_decay=0.01)
    schedule = Schedule.of(settings, examples=95, world_size=3)
    assert (schedule.total_steps, schedule.micro_batch_size, schedule.gradient_accumulation_steps) == (20, 4, 1)
    rates = [schedule.learning_rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[-1] == 1 / 16
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule.decay(0) == 1.0
    assert schedule.decay(2) == pytest.approx((1 - 0.25 * 0.01) * (1 - 0.5 * 0.01))


@pytest.mark.parametrize(
    ("settings", "corners"),
    [  # (step, share of the peak rate): the line between them is the schedule; the first epoch has 10 steps, all 40
        ({}, [(3, 1), (4, 1), (40, 0)]),
        ({"schedule": "constant"}, [(0, 1), (40, 1)]),
        ({"schedule": "constant", "warmup_ratio": 0.8}, [(7, 1), (40, 1)]),
        ({"schedule": "warmup_stable_decay", "warmup_ratio": 0.5}, [(4, 1), (32, 1), (40, 0)]),
        ({"schedule": "warmup_stable_decay", "decay_ratio": 0.5}, [(0, 1), (20, 1), (40, 0)]),
        ({"schedule": "warmup_stable_decay", "decay_ratio": 0.0}, [(0, 1), (40, 1)]),
        ({"schedule": "warmup_stable_decay", "decay_ratio": 1.0, "warmup_ratio": 0.4}, [(3, 1), (4, 1), (40, 0)]),
    ],
)
def test_each_schedule_follows_its_corners(settings, corners):
    train = Train(epochs=4, batch_size=10, learning_rate=0.3, weight_decay=0.1, **settings)
    schedule = Schedule.of(train, examples=95, world_size=1)
    steps, shares = zip((-1, 0), *corners, strict=True)
    rates = 0.3 * np.interp(np.arange(40), steps, shares)
    assert [schedule.learning_rate(step) for step in range(40)] == pytest.approx(rates, rel=1e-12)
    assert schedule.decay(40) == pytest.approx(np.exp(np.log1p(-0.1 * rates).sum()), rel=1e-12)


def test_which_steps_a_longer_training_shares():
    def schedule(epochs, **settings):
        return Schedule.of(Train(epochs=epochs, batch_size=10, **settings), examples=95, world_size=1)

    stable = {"schedule": "warmup_stable_decay", "decay_ratio": 0.3}
    short, long = schedule(4, **stable), schedule(6, **stable)
    assert (short.branch_step, long.branch_step) == (28, 42)
    assert [long.continues(step, 40) for step in (0, 28, 29, 40)] == [True, True, False, False]
    assert all(short.learning_rate(step) == long.learning_rate(step) for step in range(29))
    assert short.learning_rate(29) < long.learning_rate(29)
    assert short.continues(40, 40) and not short.continues(29, 60), "its own steps; not those of the longer one"
    constant = schedule(6, schedule="constant")
    assert constant.branch_step == 60 and constant.continues(40, 40)
    linear = schedule(6)
    assert linear.branch_step is None and not linear.continues(0, 40) and linear.continues(60, 60)


def test_the_norm_of_gradients_is_exact_to_float32():
    """Also of a transposed gradient, and of one of so many numbers that a single sum in float32 is off by 1e-4."""
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=random) * 1e-3 for shape in ((4000, 384), (384, 7), (5,))]
    gradients[1] = gradients[1].t()
    wanted = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    assert float(global_norm(gradients)) == pytest.approx(wanted, rel=1e-6)
    assert not torch.isfinite(global_norm([*gradients, torch.tensor([float("nan")])]))
