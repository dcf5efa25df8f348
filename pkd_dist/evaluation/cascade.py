"""A cascade: the student answers the requests of which it is sure, the teacher answers the others.

answers of both models on a split -> `Curve` -> `choose` a threshold on dev -> `at` this threshold, on every split

The student's confidence is its largest probability. Needs no PyTorch. Shapes: N examples, K thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pkd_dist.evaluation.intervals import Interval, wilson_interval
from pkd_dist.evaluation.predictions import Predictions

CHOSEN_ON = "dev"
_DECIMALS = 6
"""Of a threshold, so that the one that is printed is the one that was measured."""
_POINTS = 200
"""Points of a curve in a file or plot, at most."""
_COLORS = ("#1f4e8c", "#b5541c", "#3c7d4a", "#6b4c9a")


@dataclass(frozen=True)
class Share:
    """A share of examples and its 95% interval (Wilson)."""

    value: float
    interval_95: Interval

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        return cls(count / total, wilson_interval(count / total, total))

    def __str__(self) -> str:
        low, high = self.interval_95
        return f"{100 * self.value:.1f}% ({100 * max(0.0, low):.1f} to {100 * min(1.0, high):.1f})"


@dataclass(frozen=True)
class Point:
    """A cascade on a split.

    Attributes:
        answered: Of all examples, those that the student answers alone: its confidence is at least `threshold`.
        agreement: Of these, those to which the teacher gives the same class; None if there are none.
        accuracy: Of all answers of the cascade; None where the split has no labels.
    """

    threshold: float
    answered: Share
    agreement: Share | None
    accuracy: Share | None


@dataclass(frozen=True)
class Curve:
    """The cascades of a split at every threshold.

    Attributes:
        examples: Their number.
        thresholds_K: Descending float64; one for each confidence that occurs, rounded down.
        answered_K, agreeing_K: Examples that the student answers alone, and of these those with the teacher's class.
        correct_K: Examples that the cascade answers correctly; None where the split has no labels.
        alone: Side -> its accuracy without the other; empty where the split has no labels.
    """

    examples: int
    thresholds_K: np.ndarray
    answered_K: np.ndarray
    agreeing_K: np.ndarray
    correct_K: np.ndarray | None
    alone: Mapping[str, Share]

    @classmethod
    def of(cls, answers: Predictions) -> Curve:
        """Return the curve of a split of a classification."""
        confidence_N = answers.probabilities["student"].max(axis=1)
        level_N = np.floor(confidence_N * 10**_DECIMALS) / 10**_DECIMALS
        order_N = np.argsort(-level_N, kind="stable")
        thresholds_K, counts_K = np.unique(-level_N, return_counts=True)
        answered_K = np.cumsum(counts_K)
        student_N, teacher_N = (answers.predicted[side][order_N] for side in ("student", "teacher"))
        correct_K, alone = None, {}
        if answers.labelled:
            right = {side: answers.predicted[side][order_N] == answers.labels_N[order_N] for side in answers.logits}
            gained_N = np.cumsum(right["student"].astype(int) - right["teacher"].astype(int))
            correct_K = int(right["teacher"].sum()) + gained_N[answered_K - 1]
            alone = {side: Share.of(int(right_N.sum()), len(order_N)) for side, right_N in right.items()}
        agreeing_K = np.cumsum(student_N == teacher_N)[answered_K - 1]
        return cls(len(order_N), -thresholds_K, answered_K, agreeing_K, correct_K, alone)

    def point(self, i: int) -> Point:
        """Return the cascade at one of the thresholds."""
        answered = int(self.answered_K[i])
        return Point(
            threshold=float(self.thresholds_K[i]),
            answered=Share.of(answered, self.examples),
            agreement=Share.of(int(self.agreeing_K[i]), answered),
            accuracy=None if self.correct_K is None else Share.of(int(self.correct_K[i]), self.examples),
        )

    def at(self, threshold: float) -> Point:
        """Return the cascade at any threshold, such as one that was chosen on another split."""
        reached = int((self.thresholds_K >= threshold).sum())
        if reached == 0:
            return Point(threshold, Share.of(0, self.examples), None, self.alone.get("teacher"))
        found = self.point(reached - 1)
        return Point(threshold, found.answered, found.agreement, found.accuracy)

    def lowest_agreement(self) -> np.ndarray:
        """Return the lower end of the interval of the agreement at each threshold, (K,) float64."""
        pairs = zip(self.agreeing_K.tolist(), self.answered_K.tolist(), strict=True)
        return np.asarray([wilson_interval(agreeing / answered, answered)[0] for agreeing, answered in pairs])

    def points(self) -> list[Point]:
        """Return at most `_POINTS` points of the curve, evenly spaced by the share that the student answers alone."""
        shares = np.linspace(0, self.examples, _POINTS + 1)[1:]
        chosen = np.unique(np.searchsorted(self.answered_K, shares).clip(max=len(self.answered_K) - 1))
        return [self.point(int(i)) for i in chosen]


def choose(curve: Curve, agreement: float) -> Point | None:
    """Return the cascade in which the student answers most alone while its agreement is at least a share.

    The lower end of the agreement's 95% interval counts, not the agreement itself: of all thresholds, the last one that seems
    to reach the share is likely to have done so by luck. None: no threshold reaches it.
    """
    reached = np.flatnonzero(curve.lowest_agreement() >= agreement)
    return curve.point(int(reached[-1])) if len(reached) else None


def most_certain(curve: Curve) -> Point:
    """Return the cascade with the highest lower end of the agreement's interval."""
    return curve.point(int(curve.lowest_agreement().argmax()))


def relative_cost(answered: float, student: float, teacher: float) -> float:
    """Return the mean cost of a request, as a share of the teacher's: the student reads every request, the teacher the rest.

    Args:
        answered: Share that the student answers alone.
        student, teacher: Cost of an answer of each.
    """
    return student / teacher + 1 - answered


def plot(curves: Mapping[str, Curve], chosen: Point, agreement: float) -> Figure:
    """Plot agreement and, where there are labels, accuracy against the share that the student answers alone."""
    scored = {split: curve for split, curve in curves.items() if curve.correct_K is not None}
    figure = Figure(figsize=(10 if scored else 5.5, 4), layout="constrained")
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    colors = dict(zip(curves, _COLORS * len(curves), strict=False))
    for split, curve in curves.items():
        name = f"{split}, {curve.examples:,} examples" + (" (threshold chosen)" if split == CHOSEN_ON else "")
        shown = [point for point in curve.points() if point.agreement is not None]
        _line(panels[0], {p.answered.value: p.agreement for p in shown}, colors[split], name)
        _mark(panels[0], curve.at(chosen.threshold), "agreement", colors[split])
    panels[0].axhline(agreement, color="#555555", linewidth=1, linestyle=(0, (4, 3)), label=f"goal, {agreement:.4g}")
    panels[0].set_ylabel("agreement with the teacher")
    lowest = min(float((curve.agreeing_K / curve.answered_K).min()) for curve in curves.values())
    panels[0].set_ylim(max(0.0, min(lowest, agreement) - 0.05), 1.005)
    for split, curve in scored.items():
        _line(panels[1], {p.answered.value: p.accuracy for p in curve.points()}, colors[split], split)
        _mark(panels[1], curve.at(chosen.threshold), "accuracy", colors[split])
        teacher = curve.alone["teacher"].value
        panels[1].axhline(teacher, color=colors[split], linewidth=1, linestyle=(0, (1, 1.5)), label=f"teacher, {split}")
    if scored:
        panels[1].set_ylabel("accuracy of student and teacher together")
    for axes in panels:
        axes.set_xlabel("requests that the student answers alone")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _line(axes: Axes, shares: Mapping[float, Share | None], color: str, name: str) -> None:
    known = {x: share for x, share in shares.items() if share is not None}
    low_high = np.asarray([share.interval_95 for share in known.values()])
    axes.fill_between(list(known), low_high[:, 0], low_high[:, 1], color=color, alpha=0.15, linewidth=0)
    axes.plot(list(known), [share.value for share in known.values()], color=color, linewidth=1.6, label=name)


def _mark(axes: Axes, point: Point, key: str, color: str) -> None:
    share: Share | None = getattr(point, key)
    if share is not None:
        axes.plot(point.answered.value, share.value, "o", color=color, markersize=7, clip_on=False, zorder=4)
