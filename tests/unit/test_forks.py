"""Programs of a study that are forked, and what ends them."""

import json
import os
import subprocess
import sys
import time

import forked
import psutil
import pytest
from conftest import ROOT, environment

from pkd_dist.search import forks

PROGRAM = """
import json, os, pathlib, signal, sys, threading, time
print("begins", flush=True)
said, told = pathlib.Path(sys.argv[1]), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
facts = os.environ["GREETING"], pathlib.Path("/proc/self/comm").read_text().strip(), sorted(os.sched_getaffinity(0))
torch = sys.modules.get("torch")
if "fork" in sys.argv and (child := os.fork()):
    said.with_suffix(".child").write_text(str(child))
elif "fork" in sys.argv:
    time.sleep(60)
said.with_suffix(".new").write_text(json.dumps([sys.argv[1:], *facts, torch and torch.get_num_threads()]))
said.with_suffix(".new").rename(said)
if "stay" in sys.argv:
    told.wait()
    said.with_suffix(".stopped").touch()
    sys.exit(75)
sys.exit(3)
"""
COMMAND = """
import os, pathlib, signal, subprocess, sys, time
from pkd_dist.search import forks
from pkd_dist.search.processes import Processes

forks._GPUS = ()
folder, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "log")
def start(name, *arguments, cores=(), **variables):
    process = processes.start("greet", [str(folder / name), *arguments], log, {"GREETING": name, **variables}, cores)
    while not (folder / name).exists():
        time.sleep(0.01)
    return process
"""
BEGIN = """
with forks.opened() as source:
    assert source
    processes = Processes("test", source)
"""


@pytest.fixture
def command(tmp_path):
    """Run a command that forks programs and check how it ends; return what each program has said, and the command."""
    (tmp_path / "greet.py").write_text(PROGRAM)

    def run(body, before="", after="", status=0):
        program, output = tmp_path / "command.py", tmp_path / "output"
        program.write_text(COMMAND + before + BEGIN + "".join(f"    {line}\n" for line in body.splitlines()) + after)
        process = forked.Process(program, [tmp_path], ROOT, environment(PYTHONPATH=str(tmp_path)), output, output)
        try:
            ended = process.wait(60)
            until_no_program_runs(process.pid)
        finally:
            process.kill()
        assert ended == status, output.read_text()
        said = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("said-*") if not path.suffix}
        return said, output.read_text()

    return run


def until_no_program_runs(session, deadline_seconds=60):
    """Waits until nothing of a session runs any more, but for processes that nobody has waited for."""
    deadline = time.monotonic() + deadline_seconds
    while any(runs_in(session, process) for process in psutil.process_iter()):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # watching, not hoping


def runs_in(session, process):
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def test_a_fork_is_a_program_of_its_own(command, tmp_path):
    core = min(os.sched_getaffinity(0))
    said, _ = command(
        "one, two = start('said-one', 'stay', OMP_NUM_THREADS='3'), start('said-two', OMP_NUM_THREADS='0')\n"
        "assert two.wait() == two.poll() == 3\n"
        "assert one.poll() is None\n"
        "one.terminate()\n"
        "assert one.wait() == 75\n"
        f"three = start('said-three', 'stay', cores=[{core}])\n"
        "os.kill(three.pid, signal.SIGKILL)\n"
        "assert three.wait() == -signal.SIGKILL"
    )
    cores = sorted(os.sched_getaffinity(0))
    assert said == {
        "said-one": [[f"{tmp_path}/said-one", "stay"], "said-one", "pkd greet", cores, 3],
        "said-two": [[f"{tmp_path}/said-two"], "said-two", "pkd greet", cores, 1],
        "said-three": [[f"{tmp_path}/said-three", "stay"], "said-three", "pkd greet", [core], 1],
    }
    assert (tmp_path / "log").read_text() == "begins\n" * 3


def test_signals_to_all_processes_of_a_job_leave_the_source(command):
    """SLURM and terminals send them to every process; the command must learn how its programs have ended."""
    command(
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):\n"
        "    os.kill(source._source, number)\n"
        "one = start('said-one')\n"
        "assert isinstance(one, forks.Fork) and one.wait() == 3"
    )


def test_how_programs_end_is_known_where_a_supervisor_ignores_it(command):
    ignore = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    command("assert start('said-one').wait() == 3", before=ignore)


def test_how_a_program_ends_is_known_before_what_it_has_forked_ends(command):
    command(
        "one = start('said-one', 'stay', 'fork')\n"
        "one.terminate()\n"
        "assert one.wait() == 75\n"
        "os.kill(int((folder / 'said-one.child').read_text()), signal.SIGKILL)  # fails if it has ended"
    )


@pytest.mark.parametrize("which", ["the source", "a program"])
def test_where_there_is_no_room_for_another_process(command, which):
    """A start that fails is an error of the command, and leaves the others alone; without a source nothing is forked."""
    full = "def full(*_): raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
    if which == "the source":
        body, before = (
            "",
            full + "os.fork = full\n" + BEGIN.replace("assert source", "assert source is None; sys.exit(4)"),
        )
    else:
        before = full + "begin = forks.ForkProcess.start\n"
        before += "forks.ForkProcess.start = lambda self: full() if (folder / 'said-one').exists() else begin(self)\n"
        body = (
            "one = start('said-one', 'stay')\n"
            "try: start('said-two')\n"
            "except BlockingIOError: one.terminate()\n"
            "assert one.wait() == 75\n"
            "sys.exit(4)"
        )
    command(body, before=before, status=4)


def test_without_its_source_a_command_starts_programs_itself(command):
    said, _ = command(
        "one = start('said-one', 'stay')\n"
        "os.kill(source._source, signal.SIGKILL)\n"
        "assert one.wait() == 75 and (folder / 'said-one.stopped').exists()\n"
        "two = start('said-two')\n"
        "assert isinstance(two, subprocess.Popen) and two.wait() == 3"
    )
    assert said["said-two"][2] != "pkd greet"


def test_without_libraries_a_program_says_itself_what_is_missing(command):
    body = "two = start('said-two')\nassert isinstance(two, subprocess.Popen) and two.wait() == 3"
    command(body, before="forks._WITH_THREADS = ('there_is_no_such_library',)\n")


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_programs_stop_when_the_command_has_ended(command, tmp_path, end):
    stopped = "assert (folder / 'said-one.stopped').exists(), 'the command waits for it'\n"
    said, _ = command(f"start('said-one', 'stay')\n{end}", after=stopped, status=-9 if end else 0)
    assert said
    assert (tmp_path / "said-one.stopped").exists()


def test_a_signal_while_a_program_begins_leaves_none_behind(command, tmp_path):
    """The handler's exception comes while the command waits for the program to begin: all programs end."""
    said, _ = command(
        "def stop(*_): raise KeyError('stopped')\n"
        "one = start('said-one', 'stay')\n"
        "signal.signal(signal.SIGALRM, stop)\n"
        "os.kill(source._source, signal.SIGSTOP)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.5)\n"
        "try: processes.start('greet', [str(folder / 'said-two'), 'stay'], log, {'GREETING': ''})\n"
        "except KeyError:\n"
        "    assert one.wait() == 75\n"
        "    sys.exit(7)",
        status=7,
    )
    assert list(said) == ["said-one"] and (tmp_path / "said-one.stopped").exists()


def test_a_log_that_cannot_be_written_is_an_error_of_the_command(command, tmp_path):
    (tmp_path / "log").mkdir()
    _, output = command("start('said-one')", status=1)
    assert "IsADirectoryError" in output and f"{tmp_path}/log" in output


def test_a_fresh_command_has_no_thread_when_it_forks():
    """Unlike the commands above, which are forked themselves: what it loads must start none, or nothing is forked."""
    code = (
        "from pkd_dist.cli.main import app\n"
        "from pkd_dist.search import forks\n"
        "forks._GPUS = ()\n"
        "forks.load_libraries('pkd_dist.comparison.runs')\n"
        "with forks.opened() as source: print('forks' if source else 'does not')"
    )
    variables = {name: value for name, value in environment().items() if not name.endswith("_NUM_THREADS")}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == "forks\n", done.stderr


def test_nothing_is_forked_beside_a_gpu_or_a_thread(monkeypatch, tmp_path):
    for present, threads in ((True, ["1"]), (False, ["1", "2"])):
        monkeypatch.setattr(forks, "_GPUS", (str(tmp_path if present else tmp_path / "absent"),))
        monkeypatch.setattr(os, "listdir", lambda _, threads=threads: threads)
        with forks.opened() as source:
            assert source is None
