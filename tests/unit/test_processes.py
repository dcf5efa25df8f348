"""What starts the processes of a study."""

import os
import subprocess

import pytest

from pkd_dist.errors import Preempted
from pkd_dist.search import processes


@pytest.mark.parametrize("command", [lambda: processes.python("this"), lambda: processes.program(["echo", "runs"])])
def test_a_process_whose_parent_has_ended_before_it_began_does_nothing(command, monkeypatch):
    """It would never get the signal: a worker would train on, beside those of the command that resumes the study."""
    alive = subprocess.run(command(), capture_output=True, check=False)
    assert alive.returncode == 0 and alive.stdout
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    orphan = subprocess.run(command(), capture_output=True, check=False)
    assert orphan.returncode == Preempted.exit_status and not orphan.stdout + orphan.stderr
