"""Programs of a study that are forked, and what ends them."""

import json
import os

import forked
import psutil
import pytest
from conftest import ROOT, environment

from pkd_dist.search import forks

PROGRAM = """
import json, os, pathlib, signal, sys, threading
print("begins", flush=True)
said, ended = pathlib.Path(sys.argv[1]), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
said.write_text(json.dumps([sys.argv[1:], os.environ["GREETING"], pathlib.Path("/proc/self/comm").read_text().strip(), os.getpid()]))
if "stay" in sys.argv:
    ended.wait()
    sys.exit(75)
sys.exit(3)
"""
COMMAND = """
import os, pathlib, signal, subprocess, sys, time
import psutil
from pkd_dist.search import forks
from pkd_dist.search.processes import Processes

forks._GPUS = ()
folder, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "log")
with forks.opened() as source:
    assert source
    processes = Processes("test", source)

    def start(name, *arguments):
        process = processes.start("greet", [str(folder / name), *arguments], log, {"GREETING": name})
        while not (folder / name).exists() or not (folder / name).read_text():
            time.sleep(0.01)
        return process
"""


@pytest.fixture
def command(tmp_path):
    """Run a command that forks programs, and return what each has said."""
    (tmp_path / "greet.py").write_text(PROGRAM)

    def run(body):
        (tmp_path / "command.py").write_text(COMMAND + "\n".join(f"    {line}" for line in body.splitlines()))
        arguments = [tmp_path / "command.py", [tmp_path], ROOT, [environment(PYTHONPATH=str(tmp_path))], 60]
        ended = forked.run(*arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return {path.name: json.loads(path.read_text()) for path in tmp_path.glob("said-*")}

    return run


def test_a_fork_is_a_program_of_its_own(command, tmp_path):
    said = command(
        "one, two = start('said-one', 'stay'), start('said-two')\n"
        "assert two.wait() == two.poll() == two.returncode == 3\n"
        "assert one.poll() is None\n"
        "one.terminate()\n"
        "assert one.wait() == 75\n"
        "three = start('said-three', 'stay')\n"
        "os.kill(three.pid, signal.SIGKILL)\n"
        "assert three.wait() == -signal.SIGKILL"
    )
    assert {name: each[:3] for name, each in said.items()} == {
        "said-one": [[f"{tmp_path}/said-one", "stay"], "said-one", "pkd greet"],
        "said-two": [[f"{tmp_path}/said-two"], "said-two", "pkd greet"],
        "said-three": [[f"{tmp_path}/said-three", "stay"], "said-three", "pkd greet"],
    }
    assert (tmp_path / "log").read_text() == "begins\n" * 3


def test_signals_to_all_processes_of_a_job_leave_the_source(command):
    """SLURM and terminals send them to every process; the command must learn how its programs have ended."""
    command(
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):\n"
        "    os.kill(source._source, number)\n"
        "assert start('said-one').wait() == 3 and source.start('greet', [str(folder / 'two')], log, {'GREETING': ''}).wait() == 3"
    )


def test_without_its_source_a_command_starts_programs_itself(command):
    said = command(
        "one = start('said-one', 'stay')\n"
        "os.kill(source._source, signal.SIGKILL)\n"
        "assert one.wait() == -signal.SIGKILL, 'how it ended is not known'\n"
        "while psutil.pid_exists(one.pid) and psutil.Process(one.pid).status() != 'zombie':\n"
        "    time.sleep(0.01)  # its connection is closed a moment before it ends\n"
        "two = start('said-two')\n"
        "assert isinstance(two, subprocess.Popen) and two.wait() == 3"
    )
    assert said["said-two"][2] != "pkd greet"


def test_programs_stop_when_the_command_has_ended(command):
    said = command("start('said-one', 'stay')")
    psutil.wait_procs([p for p in psutil.process_iter() if p.pid == said["said-one"][3]], timeout=60)
    assert not psutil.pid_exists(said["said-one"][3])


def test_nothing_is_forked_beside_a_gpu_or_a_thread(monkeypatch, tmp_path):
    for present, threads in ((True, ["1"]), (False, ["1", "2"])):
        monkeypatch.setattr(forks, "_GPUS", (str(tmp_path if present else tmp_path / "absent"),))
        monkeypatch.setattr(os, "listdir", lambda _, threads=threads: threads)
        with forks.opened() as source:
            assert source is None
