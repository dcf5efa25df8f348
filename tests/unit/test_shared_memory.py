"""Shared memory between ranks: without a name, so that nothing is left however they end; tests/dist uses it."""

import dataclasses
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from pkd_dist.distributed import shared_memory as shared


def test_without_space_there_is_none_and_nothing_is_left():
    before = os.listdir("/proc/self/fd")
    assert shared._allocate(1 << 60) is None
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_another_process_maps_the_same_memory_which_has_no_name():
    names = set(os.listdir("/dev/shm"))
    block = shared._allocate(8192)
    assert set(os.listdir("/dev/shm")) <= names
    program = "import sys; from pkd_dist.distributed.shared_memory import _Block, _map\n"
    program += "_map(_Block(*map(int, sys.argv[1:])))[4096] = 7"
    given = [str(number) for number in dataclasses.astuple(block)]
    subprocess.run([sys.executable, "-c", program, *given], cwd=ROOT, env=environment(), check=True)
    assert shared._map(block)[4096] == 7
    with pytest.raises(OSError, match="another file"):
        shared._map(dataclasses.replace(block, inode=block.inode + 1))
    os.close(block.handle)
