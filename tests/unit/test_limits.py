"""The limits of a container or job, in both versions of the kernel's interface."""

import os

import psutil
import pytest

from pkd_dist import limits

GIB = 1 << 30


@pytest.fixture
def group(monkeypatch, tmp_path):
    """Write what the kernel would show: the group of this process, and files of groups."""

    def write(own, **files):
        monkeypatch.setattr(limits, "GROUPS", tmp_path)
        monkeypatch.setattr(limits, "GROUP_FILE", tmp_path / "own")
        monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 100 * GIB}))
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace("_", ".", 1)).write_text(text)

    return write


def test_without_limits_the_host_counts(group):
    group("0::/job\n", job__cpu_max="max 100000\n", job__memory_max="max\n", job__memory_current="5\n")
    assert (limits.cores(), limits.free_memory()) == (64, 100 * GIB)
    group("")
    assert (limits.cores(), limits.free_memory()) == (64, 100 * GIB)


@pytest.mark.parametrize(("given", "cores"), [("3", 3), ("128", 64), ("", 64), ("many", 64), ("0", 1)])
def test_a_job_of_slurm_that_shares_its_node_counts_its_own_cores(group, monkeypatch, given, cores):
    group("")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", given)
    assert limits.cores() == cores


def test_the_lowest_limit_of_the_group_and_those_around_it_counts(group):
    group(
        "0::/job/step\n",
        job__step__cpu_max="400000 100000\n", job__cpu_max="250000 100000\n",
        job__memory_max=f"{8 * GIB}\n", job__memory_current=f"{7 * GIB}\n",
        job__memory_stat=f"anon 5\ninactive_file {2 * GIB}\n",
    )  # fmt: skip
    assert (limits.cores(), limits.free_memory()) == (2, 3 * GIB)


def test_the_first_version_of_the_interface(group):
    group(
        "4:cpu,cpuacct:/job\n3:memory:/job\n1:name=systemd:/x\n",
        cpu__job__cpu_cfs_quota_us="50000\n", cpu__job__cpu_cfs_period_us="100000\n",
        memory__job__memory_limit_in_bytes=f"{4 * GIB}\n", memory__job__memory_usage_in_bytes=f"{3 * GIB}\n",
        memory__job__memory_stat="total_inactive_file 0\n",
    )  # fmt: skip
    assert (limits.cores(), limits.free_memory()) == (1, GIB)
