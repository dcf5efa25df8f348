"""The parts of a step's time add up."""

import time

import pytest
import torch

from pkd_dist.training.clock import PARTS, StepClock


def test_each_part_has_its_own_time():
    clock = StepClock(torch.device("cpu"))
    for part, seconds in (("data", 0.02), ("forward", 0.03), ("backward", 0.05), ("forward", 0.03), ("backward", 0.05)):
        time.sleep(seconds)
        clock.ended(part)
    took = time.perf_counter() - clock.start
    assert clock.seconds.keys() == set(PARTS) and clock.seconds["ranks"] == clock.seconds["optimizer"] == 0
    assert clock.seconds["data"] >= 0.02 and clock.seconds["forward"] >= 0.06 and clock.seconds["backward"] >= 0.1
    assert sum(clock.seconds.values()) == pytest.approx(took, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_forward_from_backward():
    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    clock = StepClock(torch.device("cuda"))
    clock.ended("data")
    for part, times in (("forward", 20), ("backward", 40)):
        for _ in range(times):
            made = matrix @ matrix
        if part == "backward":
            float(made[0, 0])
        clock.ended(part)
    assert clock.seconds["backward"] == pytest.approx(2 * clock.seconds["forward"], rel=0.3)
