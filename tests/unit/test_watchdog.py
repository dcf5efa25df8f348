"""The watchdog's verdicts: who is to blame, who reports it, and when to keep waiting. (Its threads run in tests/e2e.)"""

import os
import re
import subprocess
import threading
from dataclasses import replace

import pytest

from pkd_dist.distributed.processes import RankProcess
from pkd_dist.distributed.watchdog import Post, Verdict, View, Watchdog, first_remote_rank, verdict

NOW, TIMEOUT = 1000.0, 60.0
WHERE = "loop.py, line 9 (_step)"


def seen(idle, waiting=True, age=1.0):
    """A post that was new `age` seconds ago, of a rank that had been idle for `idle` seconds then."""
    return Post(7, idle, "distill, step 16", WHERE, waiting), NOW - age


def judge(rank, posts, size=None, location="evaluate.py, line 5 (score)", waiting=True, **more):
    size = size or max(rank, *posts) + 1
    return verdict(View(rank, size, location, waiting, posts, more.pop("board", NOW - 1), **more), NOW, TIMEOUT)


WAITS, HANGS, SILENT, MOVES = seen(70), seen(70, waiting=False), seen(9, age=40), seen(3)


@pytest.mark.parametrize(
    ("rank", "others", "reason", "reports"),
    [
        (0, {1: SILENT}, r"^rank 1 does not respond \(last seen at: distill, step 16\)$", True),
        (0, {1: SILENT, 2: WAITS, 3: SILENT}, r"^ranks 1, 3 do not respond", True),
        (2, {0: WAITS, 1: SILENT}, r"^rank 1 does not", False),
        (2, {0: SILENT, 1: SILENT}, r"^ranks 0, 1 do not", True),
        (1, {0: WAITS}, r"^all ranks wait for each other$", False),
        (0, {1: HANGS}, r"^rank 1 hangs in loop.py, line 9 \(_step\)$", True),
        (0, {2: WAITS}, r"^rank 1 does not respond \(last seen at: start\)$", True),
    ],
)
def test_who_is_to_blame_and_who_reports_it(rank, others, reason, reports):
    found = judge(rank, others)
    assert re.search(reason, found.reason) and found.reports == reports


def test_the_rank_itself_may_hang():
    assert judge(0, {1: WAITS}, waiting=False) == Verdict("rank 0 hangs in evaluate.py, line 5 (score)", True)


def test_once_the_ranks_have_met_hosts_are_named():
    assert judge(0, {1: HANGS}, hosts=["a", "b"]).reason == f"rank 1 (b) hangs in {WHERE}"
    assert judge(0, {1: SILENT}, hosts=["a", "b"]).reason.startswith("rank 1 (b) does not respond")


def test_where_waiting_looks_like_hanging_the_odd_one_out_is_to_blame():
    """On a GPU the host blocks where it reads a loss, whichever rank the collective waits for."""
    elsewhere = replace(HANGS[0], location="cache.py, line 5 (rows_of)"), HANGS[1]
    found = judge(0, {1: HANGS, 2: elsewhere, 3: HANGS}, location=WHERE, waiting=False)
    assert found == Verdict("rank 2 hangs in cache.py, line 5 (rows_of)", True)
    assert judge(0, {1: HANGS}, location=WHERE, waiting=False) == Verdict("all ranks wait for each other", True)


@pytest.mark.parametrize("others", [{1: MOVES}, {1: WAITS, 2: MOVES}])
def test_while_another_rank_moves_it_waits(others):
    assert judge(0, others) is None


@pytest.mark.parametrize(
    ("rank", "hosts", "reports"), [(1, (), True), (2, (), False), (1, "aab", False), (2, "aab", True)]
)
def test_if_the_board_is_unreachable_the_first_remote_rank_reports(rank, hosts, reports):
    found = judge(rank, {}, size=3, board=NOW - 40, hosts=hosts)
    name = "rank 0 (a)" if hosts else "rank 0"
    assert found == Verdict(f"{name}, which hosts the rendezvous, does not respond", reports)


def test_the_first_remote_rank():
    assert [first_remote_rank(hosts) for hosts in ("", "aa", "aba", "aab")] == [1, 1, 1, 2]


def test_a_stop_signal_of_another_rank_arrives():
    class Board:
        def post(self, key, value):
            pass

        append = post

        def read(self, keys):
            read.set()
            return {"stop": "15"}

    read = threading.Event()
    watchdog = Watchdog(0, 2, Board(), 5.0, lambda: 0, lambda text: None).start()
    assert read.wait(30)
    while not watchdog.peer_stop_signal:
        pass
    watchdog.stop()
    assert watchdog.peer_stop_signal == 15


def test_a_process_is_dead_once_it_has_ended_even_if_its_id_is_used_again():
    own = RankProcess.of(0, os.getpid())
    assert own.machine and not own.dead and replace(own, started=str(int(own.started) - 1)).dead
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        process = RankProcess.of(1, child.pid)
        assert not process.dead
        child.kill()
        while not process.dead:  # a zombie until `wait`
            pass
    assert process.dead
