"""The rank of a process, from the environment of each launcher and the interfaces of this host."""

import socket

import psutil
import pytest

from pkd_dist import network
from pkd_dist.distributed.ranks import Ranks, discover, first_host, first_of_node
from pkd_dist.errors import UserError
from pkd_dist.network import free_port, interface_towards

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


def slurm(rank, local_rank, world, **more):
    return {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NTASKS": str(world), "SLURM_STEP_ID": "0",
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 0, 1, 1, "python")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1, 1, "python")),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 0, 1, 1, "deepspeed or torchrun")),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            (5, 1, 8, 4, "deepspeed or torchrun"),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (1, 1, 2, 2, "deepspeed or torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 1, 2, 2, "deepspeed or torchrun")),
        (  # mapped by hand under srun
            {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
            (2, 0, 3, 1, "deepspeed or torchrun"),
        ),
        (slurm(6, 2, 8, SLURM_STEP_TASKS_PER_NODE="4(x2)"), (6, 2, 8, 4, "srun")),
        (  # inside a batch script, but not under srun
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
            (0, 0, 1, 1, "python"),
        ),
        (slurm(0, 0, 1), (0, 0, 1, 1, "python")),
        (slurm(0, 0, 8, SLURM_STEP_NUM_TASKS="1"), (0, 0, 1, 1, "python")),
    ],
)  # fmt: skip
def test_each_launcher(environ, expected):
    found = discover(environ | MASTER)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size, found.launcher) == expected
    assert found.main == (expected[0] == 0)
    if expected[2] > 1:
        assert (found.master_addr, found.master_port) == ("127.0.0.1", 29501)


@pytest.mark.parametrize(("held", "port"), [({}, 0), ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, 29501)])
def test_one_rank_uses_any_free_port_unless_its_launcher_hosts_the_store(held, port):
    assert discover({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | held | MASTER).master_port == port


@pytest.mark.parametrize(
    ("rank", "node", "local"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 2, 0)], ids=lambda v: str(v)
)
def test_srun_on_nodes_of_different_size(rank, node, local):
    """Two ranks on each of two nodes, one on the third."""
    nodes = {"SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NTASKS_PER_NODE": "2"}
    expected = Ranks(rank, local, 5, 1 if node == 2 else 2, "srun", "127.0.0.1", 29501, interface_towards("127.0.0.1"))
    assert discover(slurm(rank, local, 5, **nodes) | MASTER) == expected


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("a1,b2", "a1"),
        ("node[01-02,05]", "node01"),
        ("node[07,09-12],login", "node07"),
        ("gpu[1-3]-ib", "gpu1-ib"),
        ("rack[2-3]n[010-019]", "rack2n010"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def on_two_nodes(node, **more):
    return slurm(node, 0, 2, SLURM_NODEID=str(node), SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_JOB_ID="7") | more


def test_srun_finds_rank_0():
    alone = discover(slurm(1, 1, 2, SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="nowhere.invalid"))
    assert (alone.master_addr, alone.interface) == ("127.0.0.1", "lo"), "one node"
    launched = {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    for node in (0, 1):
        found = discover(on_two_nodes(node, SLURM_STEP_NODELIST="nowhere[1-2].invalid", **launched))
        assert found.master_addr == "127.0.0.1", "a name that does not resolve"
    assert discover(on_two_nodes(0, SLURM_STEP_NODELIST="localhost,b", **launched)).master_addr == "localhost"
    assert discover(on_two_nodes(1, SLURM_STEP_NODELIST="localhost,b", **launched)).master_addr == "127.0.0.1", (
        "on another node a loopback address is not the first host"
    )
    with pytest.raises(UserError, match=r"'nowhere1\.invalid' does not resolve on .*; export MASTER_ADDR"):
        discover(on_two_nodes(0, SLURM_STEP_NODELIST="nowhere[1-2].invalid"))
    for address in network.own_addresses()[:1]:
        found = discover(on_two_nodes(1, SLURM_STEP_NODELIST=f"{address},b", **launched))
        assert found.master_addr == address and address in [a.address for a in psutil.net_if_addrs()[found.interface]]


def test_neither_two_jobs_nor_two_steps_share_a_port():
    ports = {
        discover(on_two_nodes(0, MASTER_ADDR="127.0.0.1", SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))).master_port
        for job in range(41, 61)
        for step in range(20)
    }
    assert len(ports) == 400 and min(ports) > 1024 and max(ports) < 29500


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MASTER_PORT": "1"}, "RANK and WORLD_SIZE are set, but MASTER_ADDR is not"),
        ({"MASTER_ADDR": "a"}, "MASTER_PORT is not set, expected an integer"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x', expected an integer"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected an integer"),
        (MASTER | {"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, expected 1 or more"),
        (MASTER | {"RANK": "2"}, "RANK is 2, expected 0 to 1$"),
        (MASTER | {"RANK": "-1"}, "RANK is -1, expected 0 to 1$"),
        (MASTER | {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, expected 1 to 65535"),
        (
            MASTER | {"GLOO_SOCKET_IFNAME": "lo,ib9"},
            "GLOO_SOCKET_IFNAME is 'ib9', which .* does not have; allowed: .*lo",
        ),
        (
            MASTER | {"LOCAL_SIZE": "1", "MASTER_ADDR": "nowhere.invalid"},
            r"MASTER_ADDR=nowhere\.invalid cannot be reached from .*--master_addr",
        ),
        (MASTER | {"LOCAL_SIZE": "1", "MASTER_ADDR": "a..b"}, r"MASTER_ADDR=a\.\.b cannot be reached from "),
    ],
)
def test_a_missing_variable_is_named(environ, message):
    with pytest.raises(UserError, match=message):
        discover({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | environ)


def test_a_list_of_tasks_that_is_none_is_named():
    with pytest.raises(UserError, match="tasks per node are 'junk', expected a list such as '2\\(x2\\),1'"):
        discover(slurm(0, 0, 2, SLURM_STEP_TASKS_PER_NODE="junk") | MASTER)


def test_ranks_without_their_place_on_the_node_are_rejected():
    """As some schedulers start them: rank 1 of 2 must not train alone."""
    with pytest.raises(UserError, match="LOCAL_RANK is not; set LOCAL_RANK and LOCAL_WORLD_SIZE too"):
        discover({"RANK": "1", "WORLD_SIZE": "2"} | MASTER)


def test_the_first_rank_of_a_node_reports():
    assert first_of_node({}) and first_of_node({"LOCAL_RANK": "0"})
    assert not first_of_node({"LOCAL_RANK": "1"})
    assert not first_of_node({"SLURM_LOCALID": "1"})
    assert not first_of_node({"OMPI_COMM_WORLD_LOCAL_RANK": "3"})


def test_the_interface_is_the_one_that_leads_to_rank_0():
    loopback = next(
        name for name, all_of in psutil.net_if_addrs().items() if "127.0.0.1" in [a.address for a in all_of]
    )
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == loopback
    for address in network.own_addresses():
        assert address in [found.address for found in psutil.net_if_addrs()[interface_towards(address)]]


def test_the_exported_variables():
    environ = {"NCCL_SOCKET_IFNAME": "ib0"}
    Ranks(1, 0, 2, 1, "srun", "10.0.0.1", 12000, "eth0").export(environ)
    assert environ == {
        "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12000",
        "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0",
    }, "the user's choice is kept"  # fmt: skip
    interface = interface_towards("127.0.0.1")
    left = {"GLOO_SOCKET_IFNAME": "ib0"}
    Ranks(0, 0, 1, 1, "python", interface=interface).export(left)
    assert left["GLOO_SOCKET_IFNAME"] == interface, "left by another job"
    alone = {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    Ranks(0, 0, 1, 1, "python").export(alone)
    assert alone["MASTER_ADDR"] == "127.0.0.1" and int(alone["MASTER_PORT"]) > 1024
    assert "GLOO_SOCKET_IFNAME" not in alone


def test_a_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
