"""Which engine a training gets, its precision, and the learning rates that both engines follow."""

import json

import pytest
import torch
from conftest import ROOT

from pkd_dist.config.schema import Train
from pkd_dist.training.engine import deepspeed_features, needs_deepspeed, resolve_precision
from pkd_dist.training.optimization import Schedule

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


def test_the_schedule_warms_up_and_decays():
    settings = Train(epochs=2, batch_size=10, learning_rate=1.0, warmup_ratio=0.2, weight_decay=0.01)
    schedule = Schedule.of(settings, examples=95, world_size=3)
    assert (schedule.total_steps, schedule.micro_batch_size, schedule.gradient_accumulation_steps) == (20, 4, 1)
    rates = [schedule.learning_rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[-1] == 1 / 16
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule.decay(0) == 1.0
    assert schedule.decay(2) == pytest.approx((1 - 0.25 * 0.01) * (1 - 0.5 * 0.01))
