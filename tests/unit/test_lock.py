"""The lock of a folder: one job at a time, and a crash leaves nothing locked. Holders are real processes."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import ROOT, environment

from pkd_dist.errors import UserError
from pkd_dist.lock import NAME, Lock

HOLDER = """
import sys, time
from pathlib import Path
from pkd_dist.lock import Lock
lock = Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock until it reads a line."""
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, env=environment(), text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout.readline() == "held\n"
    yield other
    other.kill()
    other.communicate()


def test_a_second_job_is_rejected_with_host_pid_and_age(tmp_path, holder):
    with pytest.raises(UserError) as refused:
        Lock(tmp_path).acquire()
    wanted = rf"{tmp_path}: in use by process {holder.pid} on {socket.gethostname()}, which started \d+ s ago; wait for"
    assert re.match(wanted, str(refused.value))
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "released\n"
    assert not (tmp_path / NAME).exists()
    lock = Lock(tmp_path).acquire()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_leaves_nothing_locked(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / NAME).exists(), "the file stays, but the kernel released the lock"
    Lock(tmp_path).acquire().release()
    assert not (tmp_path / NAME).exists()


def test_waiting_ends_when_the_lock_is_released(tmp_path, holder):
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 1:
            holder.stdin.write("\n")
            holder.stdin.flush()

    lock = Lock(tmp_path).acquire(wait=True, tick=tick)
    assert ticks
    lock.release()


@pytest.fixture
def no_kernel_locks(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("pkd_dist.lock.fcntl.flock", flock)


def test_without_kernel_locks_a_holder_on_this_host_is_alive_while_its_process_is(tmp_path, holder, no_kernel_locks):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {socket.gethostname()}"):
        Lock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    lock = Lock(tmp_path).acquire()
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()}"):
        Lock(tmp_path).acquire()
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_without_kernel_locks_a_later_process_of_the_same_number_holds_nothing(tmp_path, no_kernel_locks):
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": psutil.Process().create_time() - 60}
    (tmp_path / NAME).write_text(json.dumps(own))
    Lock(tmp_path).acquire().release()


def test_without_kernel_locks_the_last_of_two_that_find_it_free_has_it(tmp_path, no_kernel_locks):
    def another_writes():
        (tmp_path / NAME).write_text(
            json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "since": time.time()})
        )

    with pytest.raises(UserError, match=rf"in use by process {os.getppid()}"):
        Lock(tmp_path).acquire(tick=another_writes)


def elsewhere(folder):
    """Write the lock file of a job on another host, whose kernel lock is not visible here."""
    (folder / NAME).write_text(json.dumps({"host": "another", "pid": 7, "since": time.time() - 7200}))


def test_a_silent_holder_on_another_host_is_dead_after_the_lease(tmp_path):
    elsewhere(tmp_path)
    Lock(tmp_path, lease_seconds=0.3).acquire().release()


def test_a_holder_on_another_host_that_renews_its_lock_is_alive(tmp_path):
    elsewhere(tmp_path)
    over = threading.Event()

    def renew():
        while not over.wait(0.05):
            os.utime(tmp_path / NAME)

    threading.Thread(target=renew).start()
    try:
        with pytest.raises(UserError, match=r"in use by process 7 on another, which started 2\.0 h ago"):
            Lock(tmp_path, lease_seconds=20).acquire()
    finally:
        over.set()
