"""Every launcher finds its ranks and gives the losses of one rank; also on two hosts, and with the cable cut."""

import json
import subprocess
import sys

import forked
import psutil
import pytest
from conftest import (
    ROOT,
    TORCHRUN,
    TRAIN,
    bare_ranks,
    environment,
    launch,
    losses,
    results,
    until,
    whole_run,
    write_config,
)
from netns import ADDRESSES, cable

from pkd_dist.distributed.ranks import Ranks
from pkd_dist.network import free_port

DEEPSPEED = ["deepspeed", "--log_level", "warning"]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
UP_TO_EVALUATE = ["--stages", "data,teacher,cache,init,distill,evaluate"]


def exact(settings):
    """Short, without dropout and half precision, so that runs can be compared."""
    settings["teacher"]["finetune"]["epochs"] = 1
    settings["student"]["dropout"] = settings["teacher"]["finetune"]["dropout"] = 0.0
    settings["train"]["deepspeed"] = "ds_configs/zero1_fp32.json"
    settings["cache"] |= {"precision": "float32", "dtype": "float32"}
    return settings


@pytest.fixture
def config(settings, tmp_path):
    return write_config(exact(settings), tmp_path)


@pytest.fixture(scope="module")
def alone(body, data, tmp_path_factory):
    """The run folder of one rank under plain python."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch("--config", write_config(exact(whole_run(body, data, folder)), folder), *UP_TO_EVALUATE)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def start(commands):
    """Start a job: one command for each node. The nodes share this machine's cores, so threads must not spin."""
    how = {"cwd": ROOT, "env": environment(OMP_WAIT_POLICY="PASSIVE"), "text": True}
    return [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) for command in commands]


def finish(job, timeout=150):
    """Wait for all nodes of a job, and leave no process behind."""
    try:
        ends = [(*node.communicate(timeout=timeout), node.returncode) for node in job]
    finally:
        for node in job:
            if node.poll() is None:
                for process in [*psutil.Process(node.pid).children(recursive=True), node]:
                    process.kill()
    return [
        subprocess.CompletedProcess(node.args, status, out, err)
        for node, (out, err, status) in zip(job, ends, strict=True)
    ]


def assert_like_one_rank(ends, run, alone):
    said = "".join(end.stdout for end in ends)
    assert [end.returncode for end in ends] == [0] * len(ends), said + "".join(end.stderr for end in ends)
    assert said.count("2 rank(s) started by") == said.count("distill: done in") == 1, "one rank reports"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert results(run)["n"] == results(alone)["n"] == 41


def by_hand(folder, slots, address="127.0.0.1"):
    """The deepspeed command of each node, for a user without ssh who starts them one by one."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"node{k} slots={n}\n" for k, n in enumerate(slots)))
    flags = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", address, "--master_port", str(free_port())]
    return [[*DEEPSPEED, *flags, "--node_rank", str(node)] for node in range(len(slots))]


WAYS = {
    "deepspeed": lambda: [[*DEEPSPEED, "--num_accelerators", "2", "--master_port", str(free_port())]],
    "mpirun": lambda: [[*MPIRUN, "-np", "2", sys.executable]],
    "torchrun": lambda: [[*TORCHRUN, "--standalone", "--nproc_per_node", "2"]],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_do_the_optimisation_of_one(alone, config, tmp_path, way):
    """Whole runs under deepspeed, the launcher of most users."""
    stages = [] if way == "deepspeed" else UP_TO_EVALUATE
    job = [[*command, TRAIN, "--config", str(config), *stages] for command in WAYS[way]()]
    assert_like_one_rank(finish(start(job)), tmp_path / "run", alone)


def test_nodes_of_uneven_size(tmp_path):
    """One slot and two: each rank knows how many ranks share its node."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import dataclasses, json, pathlib\nfrom pkd_dist.distributed.ranks import discover\nranks = discover()\n"
        "pathlib.Path(__file__).with_name(f'{ranks.rank}.json').write_text(json.dumps(dataclasses.asdict(ranks)))\n"
    )
    commands = [[*command, "--no_local_rank", str(probe)] for command in by_hand(tmp_path, [1, 2])]
    ends = finish(start(commands))
    assert [end.returncode for end in ends] == [0, 0], ends
    found = [Ranks(**json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(3)]
    assert [ranks.local_world_size for ranks in found] == [1, 2, 2]
    assert {ranks.local_rank for ranks in found[1:]} == {0, 1}
    assert {(ranks.world_size, ranks.master_addr, ranks.interface) for ranks in found} == {(3, "127.0.0.1", "lo")}


def test_one_host_listens_on_loopback_only(tmp_path):
    """The store of rank 0 and gloo of both ranks; nobody else may reach them."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import psutil\nfrom pkd_dist.distributed.ranks import discover\nfrom pkd_dist.distributed.world import World\n"
        "world = World(discover())\n"
        "print({c.laddr.ip for c in psutil.Process().net_connections() if c.status == 'LISTEN'})\n"
        "world.barrier()\nworld.close()\n"
    )
    done = forked.run(probe, [], ROOT, bare_ranks(2), 150)
    assert (done.returncode, done.stdout) == (0, "{'127.0.0.1'}\n" * 2), done.stderr


def test_a_master_that_does_not_resolve(config, tmp_path):
    """On the second of two nodes, its first rank reports the error: it is not rank 0, and here it comes last."""
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, time\ntime.sleep(3 * (os.environ['LOCAL_RANK'] == '0'))\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    node = by_hand(tmp_path, [1, 2], "nowhere.invalid")[1]
    [end] = finish(start([[*node, str(late), "--config", str(config)]]))
    assert end.returncode == 2, end.stdout + end.stderr
    [line] = end.stderr.splitlines()
    assert line.startswith("pkd: MASTER_ADDR=nowhere.invalid cannot be reached from ") and "--master_addr" in line


# ------------------------------------------------------------------------------------------------------- two hosts


@pytest.fixture(scope="module")
def root():
    """Whether hosts can be made of namespaces."""
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return tried.returncode == 0


@pytest.fixture
def hosts(root, tmp_path):
    if not root:
        pytest.skip("making hosts of namespaces needs root")
    with cable(tmp_path) as both:
        yield both


@pytest.fixture(scope="module")
def apart(root, body, data, tmp_path_factory):
    """An undisturbed run under deepspeed with one rank on each of two nodes: its output and its folder."""
    folder = tmp_path_factory.mktemp("apart")
    config = write_config(exact(whole_run(body, data, folder)), folder)
    nodes = by_hand(folder, [1, 1], ADDRESSES["node0"] if root else "127.0.0.1")
    commands = [[*node, TRAIN, "--config", str(config)] for node in nodes]
    if not root:
        return finish(start(commands)), folder / "run"
    with cable(folder) as hosts:
        job = [host.on(*command) for host, command in zip(hosts, commands, strict=True)]
        return finish(start(job)), folder / "run"


def test_deepspeed_on_two_nodes(alone, apart):
    """On two hosts; without root, on this one."""
    assert_like_one_rank(*apart, alone)


def test_torchrun_on_two_hosts(alone, config, hosts, tmp_path):
    """With the name of the first host, which on that host itself resolves to 127.0.1.1."""
    flags = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        hosts[0].name,
        "--master_port",
        str(free_port()),
    ]
    job = [
        host.on(*TORCHRUN, *flags, "--node_rank", str(k), TRAIN, "--config", str(config), *UP_TO_EVALUATE)
        for k, host in enumerate(hosts)
    ]
    assert_like_one_rank(finish(start(job)), tmp_path / "run", alone)


def test_mpirun_on_two_hosts(alone, config, hosts, tmp_path):
    """Started on the first host, which reaches the second through this machine instead of ssh."""
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\nshift\nexec " + " ".join(hosts[1].on("sh", "-c", '"$*"')) + "\n")
    agent.chmod(0o755)
    flags = ["--host", ",".join(f"{host.name}:1" for host in hosts), "--mca", "plm_rsh_agent", str(agent)]
    command = [*MPIRUN, *flags, sys.executable, TRAIN, "--config", str(config), *UP_TO_EVALUATE]
    assert_like_one_rank(finish(start([hosts[0].on_its_network(*command)])), tmp_path / "run", alone)


def test_a_cut_cable_ends_both_sides_and_the_same_command_resumes(hosts, apart, config, tmp_path):
    """One rank on each host, without a launcher: a launcher loads all libraries twice."""
    run = tmp_path / "run"
    ranks = ["env", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=1", "LOCAL_RANK=0", f"MASTER_ADDR={ADDRESSES['node0']}"]
    ranks.append(f"MASTER_PORT={free_port()}")
    arguments = [sys.executable, TRAIN, "--config", str(config), "run.timeout_seconds=10"]
    commands = [host.on(*ranks, f"RANK={k}", *arguments) for k, host in enumerate(hosts)]
    job = start(commands)
    until("metrics.jsonl:7", run, job)
    hosts[1].link("down")
    ends = finish(job, timeout=60)
    assert all(end.returncode for end in ends), ends
    said = "".join(end.stdout + end.stderr for end in ends)
    assert "Traceback" not in said
    [line] = [line for line in ends[0].stderr.splitlines() if line.startswith("pkd: ")]
    assert "rank 1" in line and "distill" in line, line
    assert len(losses(run)) < len(losses(apart[1])), "it was cut in mid-training"
    hosts[1].link("up")
    again = finish(start(commands))
    assert [end.returncode for end in again] == [0, 0], again
    assert losses(run) == losses(apart[1])
    for name in ("teacher/model.safetensors", "export/model.safetensors"):
        assert (run / name).read_bytes() == (apart[1] / name).read_bytes(), name
