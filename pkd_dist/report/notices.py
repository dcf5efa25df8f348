"""What a careful reader would ask about a run, in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pkd_dist.report.runs import Run, duration, percent


def notices(run: Run) -> Iterator[str]:
    yield from _of_the_result(run)
    yield from _of_the_data(run)
    yield from _of_the_training(run)


def _of_the_result(run: Run) -> Iterator[str]:
    results, names = run.results, run.class_names
    lost = 100 * (results["teacher"]["main_metric"] - results["student"]["main_metric"])
    if lost > 3:
        yield f"The student is {lost:.1f} points of {run.metric} below its teacher."
    if lost < -3:
        yield f"The student is {-lost:.1f} points of {run.metric} above its teacher, which has not learned all it could."
    if "accuracy_interval_95" in results["student"]:
        low, high = results["student"]["accuracy_interval_95"]
        if high - low > 0.08:
            yield (
                f"{results['n']:,} {results['split']} examples tell an accuracy only to within "
                f"{50 * (high - low):.1f} points; smaller differences mean nothing."
            )
    if run.confusion:
        support = run.confusion["teacher"].sum(axis=1)
        usual = support.max() / max(1, support.sum())
        for side in ("teacher", "student"):
            if results[side]["accuracy"] <= usual:
                yield (
                    f"The {side}'s accuracy ({percent(results[side]['accuracy'])}) is not above that of always answering "
                    f"{names[int(support.argmax())]} ({percent(usual)})."
                )
        matrix = run.confusion["student"]
        never = [names[i] for i in range(len(names)) if matrix[i].any() and not matrix[:, i].any()]
        if never:
            shown = ", ".join(never[:5]) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
            yield f"The student never predicts {shown}, though {results['split']} has examples of it."


def _of_the_data(run: Run) -> Iterator[str]:
    data = run.outputs["data"]
    for split in data["sets"]:
        if cut := data[split]["truncated"]:
            share = cut / data[split]["examples"]
            yield (
                f"{cut:,} of {data[split]['examples']:,} {split} examples ({share:.1%}) were cut to "
                f"{run.config.task.max_length} tokens; a larger task.max_length would keep their ends."
            )
    for split in data["sets"]:
        for note in data[split]["notes"]:
            yield f"{split.capitalize().replace('_', ' ')} data: {note}."
    names, counts = run.class_names, data["train"].get("per_class") or [1]
    if max(counts) > 10 * min(counts):
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        yield (
            f"The classes are unbalanced: {counts[most]:,} training examples of {names[most]}, {counts[least]:,} of "
            f"{names[least]}. Accuracy says little of rare classes; see the F1 of each."
        )


def _of_the_training(run: Run) -> Iterator[str]:
    made, epochs = run.outputs["distill"], run.config.train.epochs
    best, last = made["best_epoch"], made["history"][-1]
    if best == epochs:
        yield f"The best epoch is the last one ({best}); longer training may help."
    elif last["main_metric"] < made["best_metric"]:
        yield (
            f"It overfitted: epoch {best} of {epochs} was the best ({run.shown(made['best_metric'])} on dev, kept) and the last "
            f"one has {run.shown(last['main_metric'])}; fewer epochs or a lower learning rate would do."
        )
    depth, layers = run.resolved["teacher_layers"], run.resolved["student_layers"]
    if run.config.distill.patience == "skip" and run.resolved["patience_pairs"] and depth % layers:
        pairs = ", ".join(str(teacher) for _, teacher in run.resolved["patience_pairs"])
        yield (
            f"The teacher's {depth} layers do not divide by the student's {layers}, so the patience map was rounded "
            f"(teacher layers {pairs})."
        )
    skipped = [line["step"] for line in run.steps if not np.isfinite(line.get("grad_norm", 0.0))]
    if skipped:
        yield (
            f"{len(skipped):,} of {len(run.steps):,} logged steps were skipped while the loss scale fell, the last one "
            f"step {skipped[-1]:,}."
        )
    waits = [line["seconds"]["data"] / line["seconds"]["step"] for line in run.steps if "seconds" in line]
    if waits and np.mean(waits) > 0.2:
        yield f"{percent(float(np.mean(waits)))} of a step went into waiting for data."
    for name, marker in run.markers.items():
        stopped, starts = marker.get("stopped", 0), marker.get("starts", 1)
        if stopped:
            yield f"The stage {name} was stopped by a signal {_times(stopped)} and went on."
        if ended := starts - 1 - stopped:
            yield (
                f"The stage {name} ended early {_times(ended)}, killed or by an error, and went on; its time "
                f"({duration(marker['seconds'])}) leaves those out."
            )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
