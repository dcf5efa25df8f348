"""A real SLURM of two nodes on this host: munged, slurmctld and two slurmd in a folder of their own, on free ports."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from conftest import environment

from pkd_dist.network import free_port

PROGRAMS = {
    "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "srun": "slurm-client",
}  # fmt: skip
"""What is needed: the Debian package that brings it."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for cred_expire, s; 5 is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=2 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def until(happens: Callable[[], object], what: str, timeout_seconds: float = 180) -> None:
    """Looks until it happens, a tenth of the time and at least each second; what it waits for is a file or a state."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        began = time.monotonic()
        if happens():
            return
        ended = time.monotonic()
        assert ended < deadline, f"{what}: not within {timeout_seconds} s"
        time.sleep(min(1.0, max(0.02, 10 * (ended - began))))


class Cluster:
    """Starts in `__enter__`; `__exit__` ends every process and removes the folder.

    Attributes:
        environment: for a child that talks to this SLURM, and for its jobs.
    """

    def __enter__(self) -> Cluster:
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        assert not missing, f"not on PATH: {', '.join(missing)}; install: apt-get install " + " ".join(
            dict.fromkeys(PROGRAMS[program] for program in missing)
        )
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = environment(SLURM_CONF=str(self._folder / "slurm.conf"))
        try:
            self._start()
        except BaseException:
            for log in sorted(self._folder.glob("*.log")):  # pytest shows them
                print(f"{log}:\n{log.read_text()[-3000:]}")
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder, host = self._folder, socket.gethostname().split(".")[0]
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        ports, user = [free_port() for _ in range(3)], pwd.getpwuid(os.getuid()).pw_name
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports, user=user))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in ("/dev/null", "/dev/zero")))
        paths = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{name}={folder / file}" for name, file in paths.items()]
        self._daemon("munged", "--force", "--foreground", f"--key-file={key}", *options)
        until((folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        until(lambda: "idle 2" in self("sinfo", "--noheader", "--format=%t %D", check=False), f"SLURM in {folder}")

    def _daemon(self, *argv: str) -> None:
        with open(self._folder / f"{len(self._daemons)}-{argv[0]}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen(argv, env=self.environment, stdout=out, stderr=out, start_new_session=True)
            )

    def __exit__(self, *_: object) -> None:
        for process in self._processes():  # the daemons, and steps that would outlive them
            process.kill()
        for daemon in self._daemons:
            daemon.wait(20)
        until(lambda: not self._processes(), "the end of every process of SLURM")
        shutil.rmtree(self._folder)

    def _processes(self) -> list[psutil.Process]:
        """Every process that was started with this SLURM's configuration."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    mine.append(process)
            except psutil.Error:
                continue
        return mine

    def __call__(self, *argv: str | Path, check: bool = True, timeout: float = 300, **options: object) -> str:
        """Runs a command against this SLURM and returns what it printed."""
        done = subprocess.run(
            list(map(str, argv)), env=self.environment, timeout=timeout, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)
