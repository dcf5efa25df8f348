"""Draw what happens in a trial, as a pure function of (seed, trial number)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EPOCH_STEPS = 13
EPOCHS = 3
SAVE_STEPS = (5, 10, 13, 15, 20, 25, 26, 30, 35, 39)  # every 5 steps, and at the end of an epoch
SHARDS = 5

WEIGHTS = {
    "kill-rank": 3, "kill-job": 3, "signal-rank": 3, "signal-launcher": 2, "stop-rank": 1, "cut-link": 2, "fill-disk": 3,
    "damage-checkpoint": 3, "damage-best": 2, "damage-cache": 2, "tear-metrics": 1, "tear-marker": 1,
}  # fmt: skip
"""Fault -> how often it is drawn, relative to the others."""


@dataclass(frozen=True)
class Plan:
    """One trial.

    Attributes:
        moment: share of the undisturbed duration, or files that the job makes: `pattern`, or `pattern:n` for n lines.
        target: of a signal to the launcher: the command, its child process, or the whole group.
        running: damage files under the running job, not after killing it.
        kill_after_seconds: from damage under a running job to killing it; None lets it run.
        cut_seconds: how long the link is down; None: until the job has ended.
        which, where: shares that choose the file and the place in it.
    """

    seed: int
    trial: int
    fault: str
    moment: float | str
    delay_seconds: float
    rank: int
    stop_signal: str
    target: str
    damage: str
    running: bool
    kill_after_seconds: float | None
    free_bytes: int
    cut_seconds: float | None
    which: float
    where: float


_Draw = Callable[[random.Random], str]


def _step(records: str, first: int = 1) -> _Draw:
    return lambda rng: f"{records}:{rng.randint(first, EPOCHS * (EPOCH_STEPS + 1))}"


def _saved(pattern: str) -> _Draw:
    return lambda rng: pattern.format(rng.choice(SAVE_STEPS))


def _shard(pattern: str) -> _Draw:
    return lambda rng: pattern.format(rng.randrange(SHARDS))


def _any(*patterns: str) -> _Draw:
    return lambda rng: rng.choice(patterns) if len(patterns) > 1 else patterns[0]


_TEACHER_COMMIT = _saved("teacher_checkpoints/step-{:08d}/commit.json")
_STUDENT_COMMIT = _saved("checkpoints/step-{:08d}/commit.json")
_STUDENT_SAVE = _saved("checkpoints/*step-{:08d}*/*")
_TRAINING = (
    _step("teacher_metrics.jsonl"), _step("metrics.jsonl"), _saved("teacher_checkpoints/*step-{:08d}*/*"), _STUDENT_SAVE,
    _STUDENT_COMMIT,
)  # fmt: skip
_COMMITTED = _TEACHER_COMMIT, _STUDENT_COMMIT, _STUDENT_SAVE
_BEST = (
    _step("metrics.jsonl", EPOCH_STEPS + 1), _step("teacher_metrics.jsonl", EPOCH_STEPS + 1), _STUDENT_COMMIT,
    _any("stages/evaluate.json", "export/*"),
)  # fmt: skip
_CACHE = _shard("cache/shard-{:05d}*"), _any("cache/manifest.json"), _step("metrics.jsonl")
_ELSEWHERE = (
    _any("data/*/*", "stages/data.json"),
    _any("teacher_checkpoints/*best-*", "checkpoints/*best-*"),
    _any(".teacher*", "teacher/*", "stages/cache.json"),
    _shard("cache/*shard-{:05d}*"),
    _any(".student_init*", "student_init/*", "stages/init.json"),
    _any("stages/distill.json", "stages/evaluate.json", "results_eval.json"),
    _any(".export*", "export/*", "stages/report.json", "report.html"),
)
_MOMENTS = {
    "damage-checkpoint": _COMMITTED, "damage-best": _BEST, "damage-cache": _CACHE, "tear-metrics": _TRAINING[:2],
    "tear-marker": _TRAINING + _ELSEWHERE,
}  # fmt: skip
_ANYWHERE = _TRAINING + _TRAINING + _ELSEWHERE
_UNIFORM = 0.3  # of the trials of a fault that can strike anywhere


def plan(seed: int, trial: int, ranks: int, faults: Sequence[str] = tuple(WEIGHTS)) -> Plan:
    """Draw one trial. Every value is drawn for every trial, used or not."""
    rng = random.Random(f"{seed}/{trial}")
    fault = rng.choices(faults, [WEIGHTS[name] for name in faults])[0]
    event = rng.choice(_MOMENTS.get(fault, _ANYWHERE))(rng)
    at_any_time = rng.random() < _UNIFORM and fault not in _MOMENTS
    share = rng.random()
    return Plan(
        seed, trial, fault,
        moment=round(share, 3) if at_any_time else event,
        delay_seconds=round(rng.choice((0.0, 0.0, rng.uniform(0.0, 0.1))), 4),
        rank=rng.randrange(ranks),
        stop_signal=rng.choice(("SIGTERM", "SIGUSR1", "SIGINT")),
        target=rng.choice(("command", "child", "group")),
        damage=rng.choice(("flip", "truncate", "delete")),
        running=rng.random() < 0.3 and fault.startswith("damage"),
        kill_after_seconds=rng.choice((None, round(rng.uniform(0.1, 2.0), 2))),
        free_bytes=rng.choice((0, 4096, 16384, 65536, 262144)),
        cut_seconds=rng.choice((None, None, 2.0)), which=rng.random(), where=rng.random(),
    )  # fmt: skip
