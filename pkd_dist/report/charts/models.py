"""Teacher and student as stacks of layers, with the copied layers and the compared ones between them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from pkd_dist.model.layers import attention_pairs
from pkd_dist.report.charts.drawing import COLORS, Plot, plot
from pkd_dist.report.run import Run

_BOX_WIDTH = 1.3
_LEFT = {"teacher": 0.0, "student": 2.1}


def layers(run: Run) -> Plot | None:
    """Draw both models; None where the teacher is none. Layer 0 is the embeddings, the layer after the last the classifier."""
    if run.environment.teacher_layers is None:
        return None
    depth = {"teacher": run.environment.teacher_layers, "student": run.environment.student_layers}
    copied = [layer + 1 for layer in run.environment.copied_layers or ()]
    pairs = _compared(run, run.environment.teacher_layers)
    used = {teacher for _, teacher in pairs} | set(copied)
    top = max(depth.values()) + 1.0
    spacing = {"teacher": 1.0, "student": max(1.0, depth["teacher"] / depth["student"])}

    def height(side: str, layer: int) -> float:
        return top if layer > depth[side] else layer * spacing[side]

    def draw(axes: Axes) -> None:
        for side, count in depth.items():
            _box(axes, side, 0.0, "embeddings", faint=True)
            for layer in range(1, count + 1):
                _box(axes, side, height(side, layer), f"layer {layer}", faint=side == "teacher" and layer not in used)
            _box(axes, side, top, "classifier", faint=False)
            axes.text(_LEFT[side] + _BOX_WIDTH / 2, top + 0.75, side.capitalize(), ha="center", weight="bold")
        for student, teacher in enumerate(copied, start=1):
            if (student, teacher) not in pairs:
                _dotted_link(axes, height("teacher", teacher), height("student", student))
        for (student, teacher), terms in pairs.items():
            _link(axes, height("teacher", teacher), height("student", student), ", ".join(terms).upper())
        if run.config.distill.alpha:
            _link(axes, top, top, "DS")
        axes.set(xlim=(-0.1, 3.5), ylim=(-0.5, top + 1.1))
        axes.axis("off")

    links = [f"student {student} learns from teacher {teacher}" for student, teacher in pairs]
    links += [f"student {student} starts from teacher {teacher}" for student, teacher in enumerate(copied, start=1)]
    note = "solid: what the student learns from" + ("; dotted: copied layers" if copied else "")
    return plot("Layers", note, "Layers: " + ", ".join(links), draw, 1.2 + 0.24 * max(depth.values()))


def _compared(run: Run, depth: int) -> dict[tuple[int, int], list[str]]:
    """Return the loss terms that compare each pair of (student layer, teacher layer)."""
    distill, environment = run.config.distill, run.environment
    attention = attention_pairs(distill, depth, environment.student_layers)
    by_term = {
        "pt": environment.patience_pairs, "gram": environment.patience_pairs, "rel": attention[-1:], "att": attention,
    }  # fmt: skip
    found: dict[tuple[int, int], list[str]] = {}
    for term, pairs in by_term.items():
        for student, teacher in pairs if distill.weights[term] else ():
            found.setdefault((student, teacher), []).append(term)
    return found


def _box(axes: Axes, side: str, y: float, text: str, faint: bool) -> None:
    x = _LEFT[side]
    box = FancyBboxPatch((x, y - 0.33), _BOX_WIDTH, 0.66, boxstyle="round,pad=0,rounding_size=0.12")
    box.set(facecolor=COLORS[side], alpha=0.1 if faint else 0.3, edgecolor="none")
    axes.add_patch(box)
    axes.text(x + _BOX_WIDTH / 2, y, text, ha="center", va="center", fontsize=8)


def _link(axes: Axes, teacher_y: float, student_y: float, text: str) -> None:
    axes.plot([_BOX_WIDTH, _LEFT["student"]], [teacher_y, student_y], color=COLORS["ink"], linewidth=1.3)
    axes.text(1.7, (teacher_y + student_y) / 2 + 0.12, text, ha="center", va="bottom", fontsize=7)


def _dotted_link(axes: Axes, teacher_y: float, student_y: float) -> None:
    ends = [_BOX_WIDTH, _LEFT["student"]], [teacher_y, student_y]
    axes.plot(*ends, color=COLORS["muted"], linewidth=1, linestyle=(0, (2, 2)))
