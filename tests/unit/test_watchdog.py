"""The watchdog's verdicts: who is to blame, who says it, and when to go on waiting. (Its threads run in tests/e2e.)"""

import re
import threading

import pytest

from pkd_dist.distributed.watchdog import Watchdog, verdict

NOW, TIMEOUT = 1000.0, 60.0


def seen(idle, waiting=True, age=1.0):
    """A post that was new `age` seconds ago, of a rank that had not moved for `idle` seconds then."""
    return {"idle": idle, "waiting": waiting, "at": "distill, step 16", "where": "loop.py, line 9 (_step)"}, NOW - age


WAITS, HANGS, SILENT, MOVES = seen(70), seen(70, waiting=False), seen(9, age=40), seen(3)


@pytest.mark.parametrize(
    ("rank", "others", "words", "speaks"),
    [
        (0, {1: SILENT}, r"^rank 1 does not answer \(last seen at: distill, step 16\)$", True),
        (0, {1: SILENT, 2: WAITS, 3: SILENT}, r"^ranks 1, 3 do not answer", True),
        (2, {0: WAITS, 1: SILENT}, r"^rank 1 does not", False),
        (2, {0: SILENT, 1: SILENT}, r"^ranks 0, 1 do not", True),
        (1, {0: WAITS}, r"^all ranks wait for each other$", False),
        (0, {1: HANGS}, r"^rank 1 hangs in loop.py, line 9 \(_step\)$", True),
        (0, {2: WAITS}, r"^rank 1 does not answer \(last seen at: start\)$", True),
    ],
)
def test_who_is_to_blame_and_who_says_it(rank, others, words, speaks):
    size = max(rank, *others) + 1
    found = verdict(rank, size, others, NOW - 1, NOW, TIMEOUT, "evaluate.py, line 5", True)
    assert re.search(words, found[0]) and found[1] == speaks


def test_it_may_hang_itself():
    found = verdict(0, 2, {1: WAITS}, NOW - 1, NOW, TIMEOUT, "evaluate.py, line 5 (score)", False)
    assert found == ("rank 0 hangs in evaluate.py, line 5 (score)", True)


def test_where_waiting_looks_like_hanging_the_odd_one_out_is_to_blame():
    """On a GPU: the host blocks where it reads a loss, whichever rank the collective waits for."""
    elsewhere = {**HANGS[0], "where": "cache.py, line 5 (rows_of)"}, HANGS[1]
    others = {1: HANGS, 2: elsewhere, 3: HANGS}
    assert verdict(0, 4, others, NOW - 1, NOW, TIMEOUT, "loop.py, line 9 (_step)", False) == (
        "rank 2 hangs in cache.py, line 5 (rows_of)", True,
    )  # fmt: skip
    same = verdict(0, 2, {1: HANGS}, NOW - 1, NOW, TIMEOUT, "loop.py, line 9 (_step)", False)
    assert same == ("all ranks wait for each other", True)


@pytest.mark.parametrize("others", [{1: MOVES}, {1: WAITS, 2: MOVES}])
def test_while_another_rank_moves_it_waits(others):
    assert verdict(0, len(others) + 1, others, NOW - 1, NOW, TIMEOUT, "", True) is None


@pytest.mark.parametrize(("rank", "speaks"), [(1, True), (2, False)])
def test_out_of_reach_of_the_board_rank_1_speaks_for_its_side(rank, speaks):
    found = verdict(rank, 3, {}, NOW - 40, NOW, TIMEOUT, "", True)
    assert found == ("rank 0, where the ranks meet, does not answer", speaks)


def test_a_peers_stop_signal_arrives():
    class Board:
        def post(self, key, value):
            pass

        def read(self, keys):
            read.set()
            return {"stop": "15"}

    read = threading.Event()
    dog = Watchdog(0, 2, Board(), 5.0, lambda: 0, lambda text: None).start()
    assert read.wait(30)
    while not dog.peer_stop_signal:
        pass
    dog.stop()
    assert dog.peer_stop_signal == 15
