"""Remarks on a run that a careful reader would make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pkd_dist.data.examples import present
from pkd_dist.evaluation.calibration import FITTED_ON
from pkd_dist.evaluation.intervals import wilson_interval
from pkd_dist.evaluation.results import BUSY_SPREAD, SIDES
from pkd_dist.evaluation.thresholds import CHOSEN_ON, MultiLabel
from pkd_dist.metric_names import METRICS, MULTILABEL_METRICS, SHARES
from pkd_dist.report.format import duration, percent
from pkd_dist.report.run import Run

_MEANS_OVER_CLASSES = ("f1_macro", "map")
"""The values of `task.metric` in which a rare class counts as much as any other."""


def notices(run: Run) -> Iterator[str]:
    """Yield the remarks, one or two sentences each."""
    yield from _on_results(run)
    yield from _on_classes(run)
    yield from _on_calibration(run)
    yield from _on_data(run)
    yield from _on_training(run)
    yield from _on_speed(run)
    yield from _on_stages(run)


def _on_results(run: Run) -> Iterator[str]:
    results = run.results
    for side in SIDES:
        names = [METRICS[key] for key in results.models[side].scores.undefined if key in METRICS]
        if names:
            yield (
                f"{', '.join(names)} of the {side} cannot be told: the labels of {results.split} or its predictions are all "
                "alike. They are counted as 0."
            )
    if results.compression.retention is None and not results.student.scores.undefined:
        yield "The teacher has no score above 0, so there is none for the student to retain."
    lost = 100 * (results.teacher.scores.main_metric - results.student.scores.main_metric)
    if lost > 3:
        yield f"The student is {lost:.1f} points of {run.metric} below its teacher."
    if lost < -3:
        yield f"The student is {-lost:.1f} points of {run.metric} above its teacher; the teacher may be undertrained."
    if results.student.scores.share_interval:
        low, high = results.student.scores.share_interval
        if high - low > 0.08:
            yield (
                f"{results.examples:,} {results.split} examples determine the {_share_name(run)} only to within "
                f"{50 * (high - low):.1f} points; smaller differences are not significant."
            )


def _share_name(run: Run) -> str:
    if run.task.multilabel:
        return METRICS["subset_accuracy"]
    return "accuracy" if run.task.has_labels else run.metric


def _on_classes(run: Run) -> Iterator[str]:
    if run.multilabel is not None:
        yield from _on_sets(run, run.multilabel)
    if not run.confusion:
        return
    results, names = run.results, run.class_names
    support_C = run.confusion["student"].sum(axis=1)
    most_frequent = int(support_C.argmax())
    baseline = support_C.max() / max(1, support_C.sum())
    for side in SIDES:
        accuracy = results.models[side].scores.accuracy
        if accuracy is not None and accuracy <= baseline:
            yield (
                f"The {side}'s accuracy ({percent(accuracy)}) does not exceed that of always predicting "
                f"{names[most_frequent]} ({percent(baseline)})."
            )
    matrix_CC = run.confusion["student"]
    never = [name for i, name in enumerate(names) if matrix_CC[i].any() and not matrix_CC[:, i].any()]
    if never:
        yield f"The student never predicts {_shown(never)}, although {results.split if run.task.has_labels else 'the teacher'} has examples of it."


def _on_sets(run: Run, found: MultiLabel) -> Iterator[str]:
    """Remark on classes that a text can have beside others."""
    if found["unfitted"]:
        yield (
            f"{CHOSEN_ON.capitalize()} has no example of {_shown(found['unfitted'])}; the threshold of a class without one is 0.5, and "
            "nothing tells how well it is found."
        )
    never = [
        name
        for name, given in zip(run.class_names, present(run.predicted("student")), strict=True)
        if not given and name not in found["unfitted"]
    ]
    if never:
        yield f"The student never gives {_shown(never)}, although {run.results.split} has examples."


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _on_calibration(run: Run) -> Iterator[str]:
    if run.calibration is None:
        return
    if "unfitted" in run.calibration:
        yield f"The student is not calibrated: {run.calibration['unfitted']}."
    for split, found in run.calibration["splits"].items():
        before, after = found["before"]["nll"], found["after"]["nll"]
        if after > before + 0.001:
            yield (
                f"The temperature makes the labels of {split} less likely (negative log-likelihood {before:.3f} before, "
                f"{after:.3f} after): {FITTED_ON} is too small to fit it, or is not like {split}; without it: evaluate.calibrate: false."
            )


def _on_data(run: Run) -> Iterator[str]:
    length = run.config.task.max_length
    for sets, key, limit, whose in (
        (
            {} if run.student_data and not run.environment.teacher_layers else run.data,
            "task.max_length",
            length,
            "tokens",
        ),
        (
            run.student_data or {},
            "student.max_length",
            run.config.student_length,
            "of the student's tokens",
        ),
    ):
        for name, data in sets.items():
            if data.truncated:
                yield (
                    f"{data.truncated:,} of {data.examples:,} {name} examples ({data.truncated / data.examples:.1%}) were "
                    f"truncated to {limit} {whose}; increase {key} to keep their full text."
                )
    for name, data in run.data.items():
        for note in data.notes:
            yield f"{name.capitalize().replace('_', ' ')} data: {note}."
    counts = run.data["train"].per_class
    if counts and run.task.has_named_classes and max(counts) > 10 * min(counts):
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        metric = run.metric[:1].upper() + run.metric[1:] if run.task.multilabel else "Accuracy"
        see = "See" if run.task.metric in _MEANS_OVER_CLASSES else f"{metric} says little about rare classes; see"
        yield (
            f"The classes are imbalanced: {counts[most]:,} training examples of {run.class_names[most]}, {counts[least]:,} "
            f"of {run.class_names[least]}. {see} the F1 of each class."
        )


def _on_training(run: Run) -> Iterator[str]:
    distillation, epochs = run.distillation, run.config.train.epochs
    best, last = distillation.best_epoch, distillation.history[-1]
    if last.epoch < epochs:
        yield (
            f"Training stopped after epoch {last.epoch} of {epochs}: dev had not improved since epoch {best} "
            "(train.patience_epochs)."
        )
    elif best == epochs > 1:
        yield f"The best epoch is the last one ({best}); longer training may help."
    elif distillation.best_metric - last.main_metric > _noise(run):
        yield (
            f"The student overfitted: epoch {best} of {epochs} was the best ({run.metric_value(distillation.best_metric)} on "
            f"dev, kept), and the last one reached {run.metric_value(last.main_metric)}. Train for fewer epochs or at a lower "
            "learning rate."
        )
    expected = distillation.steps // run.config.train.log_every_steps
    if len(run.steps.step_S) < expected:
        yield (
            f"metrics.jsonl has {len(run.steps.step_S):,} of {expected:,} records of steps; the others were lost or altered "
            "after they were written, and the curves and times of steps lack them."
        )
    pairs = run.environment.patience_pairs
    depth, student_depth = run.environment.teacher_layers, run.environment.student_layers
    if run.config.distill.patience == "skip" and pairs and depth and depth % student_depth:
        yield (
            f"The teacher's {depth} layers are not divisible by the student's {student_depth}, so the patience map was "
            f"rounded (teacher layers {', '.join(str(teacher) for _, teacher in pairs)})."
        )
    skipped = run.steps.step_S[~np.isfinite(run.steps.grad_norm_S)]
    if len(skipped):
        yield (
            f"{len(skipped):,} of {len(run.steps.step_S):,} logged steps were skipped because of float16 overflow, most "
            f"recently step {skipped[-1]:,}."
        )
    waits = [seconds["data"] / seconds["step"] for seconds in run.steps.seconds]
    if waits and np.mean(waits) > 0.2:
        yield f"{percent(float(np.mean(waits)))} of the step time was spent waiting for data."


def _noise(run: Run) -> float:
    """Return half of the 95% interval of the main metric on dev: Wilson's of a share, Fisher's of a correlation."""
    scores, best, n = run.results.student.scores, run.distillation.best_metric, run.results.examples
    if run.task.main_metric in SHARES and scores.share_interval:
        low, high = scores.share_interval
    elif run.task.main_metric in ("f_1", *MULTILABEL_METRICS):
        low, high = wilson_interval(best, n)
    else:
        z, half = np.arctanh(np.clip(best, -0.999999, 0.999999)), 1.96 / np.sqrt(max(1, n - 3))
        low, high = np.tanh(z - half), np.tanh(z + half)
    return float(high - low) / 2


def _on_speed(run: Run) -> Iterator[str]:
    spreads = [
        (max(model.rates) - min(model.rates)) / model.sentences_per_second
        for model in run.results.models.values()
        if model.sentences_per_second
    ]
    spread = max(*spreads, run.deployment.spread)
    if spread > BUSY_SPREAD:
        yield (
            f"Passes over the same batches differed by up to {spread:.0%}: the machine was busy while speed was measured. Measure "
            "again with `pkd evaluate` on an idle one before you quote a figure."
        )


def _on_stages(run: Run) -> Iterator[str]:
    for stage in run.stages:
        if stage.stopped:
            yield f"The {stage.name} stage was stopped by a signal {_times(stage.stopped)} and resumed."
        if failed := stage.starts - 1 - stage.stopped:
            yield (
                f"The {stage.name} stage was killed or failed {_times(failed)} and resumed; its time "
                f"({duration(stage.seconds)}) excludes those attempts."
            )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
