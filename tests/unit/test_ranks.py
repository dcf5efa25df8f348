"""Where a process stands, from the environment that each launcher makes."""

import socket

import pytest

from pkd_dist.ranks import Ranks, discover, free_port


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 0, 1, 1, "python")),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (0, 0, 1, 1, "python")),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            (5, 1, 8, 4, "deepspeed or torchrun"),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (1, 1, 2, 2, "deepspeed or torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 1, 2, 2, "deepspeed or torchrun")),
        (
            {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            (6, 2, 8, 4, "srun"),
        ),
        (  # inside a batch script, but not under srun
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
            (0, 0, 1, 1, "python"),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"},
            (0, 0, 1, 1, "python"),
        ),
    ],
)  # fmt: skip
def test_each_launcher(environ, expected):
    assert discover(environ) == Ranks(*expected)
    assert discover(environ).main == (expected[0] == 0)


@pytest.mark.parametrize(
    ("rank", "node", "local"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 2, 0)], ids=lambda v: str(v)
)
def test_srun_on_nodes_that_differ(rank, node, local):
    """Two ranks on each of two nodes, one on the third."""
    environ = {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), "SLURM_NTASKS": "5",
        "SLURM_STEP_ID": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NTASKS_PER_NODE": "2",
    }  # fmt: skip
    assert discover(environ) == Ranks(rank, local, 5, 1 if node == 2 else 2, "srun")


def test_a_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
