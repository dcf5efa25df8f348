"""Stop signals in a process of their own: noted while the main thread is in C code; a second one ends at once."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, environment

PROGRAM = """
import os, sys, threading, time
from pkd_dist.distributed import signals as stop_signals
stop_signals._SAME_SECONDS = float(sys.argv[1])
signals = stop_signals.StopSignals().install()
if len(sys.argv) == 2:
    signals.met()
read, write = os.pipe()
print("ready", flush=True)
def tell():
    while not signals.number:
        time.sleep(0.01)
    print("noted", signals.number, flush=True)
threading.Thread(target=tell).start()
os.read(read, 1)  # like a collective: C code in which Python runs no handlers
"""


@pytest.fixture
def start():
    started = []

    def run(same_seconds, *before_they_met):
        job = subprocess.Popen([sys.executable, "-c", PROGRAM, str(same_seconds), *before_they_met], cwd=ROOT, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        started.append(job)
        assert job.stdout.readline() == "ready\n"
        return job

    yield run
    for job in started:
        job.kill()
        job.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_the_first_is_noted_and_the_second_ends(start, number):
    job = start(0)
    job.send_signal(number)
    assert job.stdout.readline() == f"noted {int(number)}\n"
    assert job.poll() is None
    job.send_signal(number)
    assert job.wait(timeout=20) == 128 + number


def test_signals_forwarded_at_the_same_moment_count_once(start):
    job = start(3600)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        job.send_signal(number)
    assert job.stdout.readline() in (f"noted {int(signal.SIGINT)}\n", f"noted {int(signal.SIGTERM)}\n")
    os.kill(job.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(timeout=0.5)


def test_nohup_keeps_a_run_alive(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = start(0)
    finally:
        signal.signal(signal.SIGHUP, before)
    job.send_signal(signal.SIGHUP)
    job.send_signal(signal.SIGTERM)
    assert job.stdout.readline() == f"noted {int(signal.SIGTERM)}\n"


def test_before_the_ranks_have_met_the_first_ends(start):
    job = start(3600, "before they met")
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 75
    assert job.stderr.read() == "pkd: stopped by SIGTERM before the ranks had met; rerun the same command to resume\n"


def test_a_run_in_another_thread_is_rejected_in_one_line():
    program = "import threading\nfrom pkd_dist.cli.launch import train\n"
    program += "run = threading.Thread(target=lambda: print(train(['--config', 'configs/demo.yaml', '--dry-run'])))\n"
    program += "run.start()\nrun.join()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    said = "pkd: a run needs the main thread, for its signals; start it there or in a process of its own\n"
    assert (done.stdout, done.stderr) == ("2\n", said)
