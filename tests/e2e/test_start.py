"""A rank is lost while the ranks meet or DeepSpeed starts: the others end within seconds, and say which."""

import signal
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT, bare_ranks, write_config
from forked import Process

DYING = """
import os, pathlib, signal, sys, time
import deepspeed, torch.distributed
from pkd_dist.cli.launch import leave, train
from pkd_dist.distributed.processes import Roll
rank, module, function = sys.argv[1:4]
seen = pathlib.Path(__file__).with_name("seen")
if os.environ["RANK"] == rank:
    def die(*_, **__):
        while not seen.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(sys.modules[module], function, die)
else:
    call = Roll.call
    def call_and_tell(roll):
        call(roll)
        if not roll.missing():
            seen.touch()
    Roll.call = call_and_tell
leave(train(sys.argv[4:]))
"""
TRAIN = ROOT / "launcher/train.py"


@contextmanager
def job(folder, program, *arguments, ranks=(0, 1)):
    processes = []
    try:
        for rank, variables in enumerate(bare_ranks(2)):
            if rank in ranks:
                files = folder / f"{rank}.out", folder / f"{rank}.err"
                processes.append(Process(program, arguments, ROOT, variables, *files))
        yield processes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("killed", "at", "where"),
    [
        (1, "torch.distributed.init_process_group", r"meeting the other ranks at 127.0.0.1:"),
        (0, "torch.distributed.new_group", r"meeting the other ranks at 127.0.0.1:"),
        (1, "deepspeed.initialize", "teacher: "),
    ],
)
def test_a_killed_rank_is_named_within_seconds(settings, tmp_path, killed, at, where):
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    with job(tmp_path, program, killed, *at.rsplit(".", 1), "--config", write_config(settings, tmp_path)) as ranks:
        assert ranks[killed].wait(60) == -signal.SIGKILL
        since = time.monotonic()
        _, said = ranks[1 - killed].communicate(30)
        assert time.monotonic() - since < 15, "3 s, on an idle machine"
    assert ranks[1 - killed].returncode == 1
    [line] = [line for line in said.splitlines() if line.startswith("pkd: ")]
    assert line.startswith(f"pkd: {where}")
    assert f": rank {killed}" in line and line.endswith(" was lost; rerun the same command to resume")


def test_a_rank_that_never_starts_is_named_while_the_others_wait(settings, tmp_path):
    settings["run"]["timeout_seconds"] = 8
    config = write_config(settings, tmp_path)
    alone = [tmp_path / "first", tmp_path / "second"]
    for folder in alone:
        folder.mkdir()
    with (
        job(alone[0], TRAIN, "--config", config, ranks=[0]) as [first],
        job(alone[1], TRAIN, "--config", config, ranks=[1]) as [second],
    ):
        (waits, ends), (_, said) = first.communicate(60), second.communicate(60)
    assert (first.returncode, second.returncode) == (1, 1)
    assert waits.startswith("meeting the other ranks at 127.0.0.1:") and waits.endswith(
        ": waiting for rank 1 to start\n"
    )
    assert "no progress for 8 s (run.timeout_seconds): rank 1 does not respond (last seen at: start); rerun" in ends
    waits, ends = (line for line in said.splitlines() if line.startswith("pkd: "))
    assert waits.startswith("pkd: waiting for rank 0 at 127.0.0.1:")
    assert (
        ends.startswith("pkd: the 2 ranks did not meet at 127.0.0.1:") and " within 8 s (run.timeout_seconds)" in ends
    )
