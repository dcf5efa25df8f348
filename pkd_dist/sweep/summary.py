"""The lines that say what a sweep found and what it cost."""

from __future__ import annotations

import numpy as np

from pkd_dist.evaluation.results import Results
from pkd_dist.metric_names import METRICS
from pkd_dist.sweep.outcome import BEST, FINAL, TABLE, Outcome
from pkd_dist.sweep.space import as_overrides


def describe(outcome: Outcome) -> str:
    """Return the text that `pkd sweep` ends with."""
    winner, states = outcome.winner, ", ".join(f"{count} {state}" for state, count in outcome.states.items())
    name = METRICS.get(outcome.objective, outcome.objective)
    lines = [
        f"\nsweep: {sum(outcome.states.values())} trials ({states}) in {outcome.seconds / 60:.1f} min of the workers' time",
        f"winner: point {winner.number}, {name} {abs(winner.value):.4f} on dev: {' '.join(as_overrides(winner.trials[0].params))}",
    ]
    fresh = {seed: found for seed, found in outcome.finals.items() if seed not in outcome.searched}
    for seed, found in outcome.finals.items():
        splits = ", ".join(f"{split} {value:.4f}" for split, value in scores_of(found).items())
        note = "" if seed in fresh else " (searched)"
        lines.append(f"seed {seed}{note}: {splits}: {outcome.folder / FINAL / f'seed-{seed}' / 'export'}")
    if fresh:
        dev = np.mean([scores_of(found)["dev"] for found in fresh.values()])
        lines.append(f"on seeds that were not searched: dev {dev:.4f}")
    lines += [f"configuration: {outcome.folder / BEST}", f"all trials:    {outcome.folder / TABLE}"]
    return "\n".join(lines)


def scores_of(results: Results) -> dict[str, float]:
    """Return the student's main metric on each labeled split."""
    found = {results["split"]: results["student"]["main_metric"]}
    return found | {split: scores["student"]["main_metric"] for split, scores in results["splits"].items()}
