"""The lines that say how far a sweep is, what it found and what it cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from pkd_dist.metric_names import METRICS
from pkd_dist.report.format import duration
from pkd_dist.search.outcome import BEST, PAGE, TABLE, Outcome, Point, ranked, scores_of
from pkd_dist.search.space import as_overrides
from pkd_dist.search.study import STATES, Reading, shown_value


def describe(outcome: Outcome) -> str:
    """Return the text that `pkd sweep` ends with."""
    name, winner = METRICS.get(outcome.objective, outcome.objective), outcome.winner
    lines = [f"\nsweep: {counted(outcome.trials)}, {duration(outcome.seconds)} of the workers' time"]
    lines.append(
        f"winner: point {winner.number}, {name} {outcome.score(winner):.4f} on dev: {' '.join(winner.overrides)}"
    )
    for seed, final in outcome.finals.items():
        scores = ", ".join(f"{split} {value:.4f}" for split, value in scores_of(final.results).items())
        lines.append(
            f"seed {seed}{' (searched)' if seed in outcome.searched else ''}: {scores}: {final.folder / 'export'}"
        )
    if optimism := describe_optimism(outcome):
        lines.append(optimism)
    for what, file in (("configuration", BEST), ("all trials", TABLE), ("page", PAGE)):
        lines.append(f"{what + ':':15}{outcome.folder / file}")
    return "\n".join(lines)


def describe_optimism(outcome: Outcome) -> str:
    """Return how much better the winner was on the searched seeds than it is on others; empty where that is unknown."""
    if not outcome.fresh:
        return ""
    scores = [scores_of(final.results) for final in outcome.fresh.values()]
    means = {split: float(np.mean([found[split] for found in scores])) for split in scores[0]}
    searched = float(np.mean([trial.user_attrs["scores"]["main_metric"] for trial in outcome.winner.trials]))
    shown = ", ".join(f"{split} {value:.4f}" for split, value in means.items())
    seeds = "seed that was" if len(scores) == 1 else "seeds that were"
    return f"on {len(scores)} {seeds} not searched: {shown}; the search was optimistic by {searched - means['dev']:+.4f} on dev"


def progress(found: Reading) -> str:
    """Return how far a study is: its trials, what is being trained, and the time that is left."""
    lines = [f"{found.folder}: {counted(found.trials)}"]
    ended = [trial for trial in found.trials if trial.state.is_finished()]
    running = [trial for trial in found.trials if trial.state is TrialState.RUNNING]
    left = len(found.trials) - len(ended)
    took = [trial.user_attrs["seconds"] for trial in ended if "seconds" in trial.user_attrs]
    if left and took and running:
        lines[0] += f", about {duration(float(np.mean(took)) * left / len(running))} left"
    for trial in running:
        looks = max(trial.intermediate_values, default=0)
        epoch = f"after epoch {looks / found.looks_per_epoch:.4g}" if looks else "in its first epoch"
        lines.append(f"trial {trial.number}: {epoch}: {' '.join(as_overrides(trial.params))}")
    return "\n".join(lines)


def best(found: Reading, rows: int) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a study's best points so far; those that lack seeds are left out."""
    return table(ranked(found.trials, len(found.seeds)), found.objective, rows)


def counted(trials: Sequence[FrozenTrial]) -> str:
    """Return how many trials have which state."""
    names = [STATES[trial.state] for trial in trials]
    return f"{len(names)} trials ({', '.join(f'{names.count(name)} {name}' for name in dict.fromkeys(names))})"


def table(points: Sequence[Point], objective: str, rows: int) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the best points."""
    keys = list(dict.fromkeys(key for point in points for key in point.trials[0].params))
    head = ["point", METRICS.get(objective, objective), "divergence", "MB", "ms", *keys]
    body = [
        [
            str(point.number), f"{shown_value(point.value, objective):.4f}", f"{point.divergence:.4g}", f"{point.footprint.bytes / 1e6:.2f}",
            f"{point.footprint.latency_ms:.3g}", *(_shown(point.trials[0].params.get(key)) for key in keys),
        ]
        for point in points[:rows]
    ]  # fmt: skip
    return head, body


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
