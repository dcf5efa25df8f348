"""Compare teacher and student: logits of every split, metrics, size and speed.

models, token sets -> logits (all ranks) -> metrics and agreement (rank 0) -> speed (rank 0) -> results_eval.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from pkd_dist.config.schema import Evaluate
from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distributed.world import World
from pkd_dist.evaluation.calibration import Calibration, calibrate, divided
from pkd_dist.evaluation.metrics import agreement, labelled_by, score_split
from pkd_dist.evaluation.results import ModelResults, Results, Size, SplitResults, combine
from pkd_dist.evaluation.scoring import evaluating, forward_of, predict_logits
from pkd_dist.evaluation.speed import TimedInputs, Timing, measure_speed, timing_threads
from pkd_dist.evaluation.thresholds import CHOSEN_ON, choose, shifted
from pkd_dist.limits import cores
from pkd_dist.model.encoder import parameter_count
from pkd_dist.model.ensemble import mean_logits
from pkd_dist.telemetry.progress import Bar

Logits = dict[str, dict[str, np.ndarray]]
"""Split -> side -> (N, C) float32."""


@dataclass(frozen=True)
class Side:
    """A model and what it is scored on.

    Attributes:
        splits: Name -> examples in the model's tokens. `dev` gives the main figures and the timed inputs. Splits without
            labels are predicted but not scored.
        pad_id: Of its tokenizer.
    """

    model: PreTrainedModel
    splits: Mapping[str, TokenSet]
    pad_id: int


@dataclass(frozen=True)
class ModelComparison:
    """Teacher against student; alike on every rank.

    Attributes:
        timings: Side -> how fast it was.
        logits: Of every split, labeled or not; the student's are divided by its temperature. Where a text can have several classes,
            those of both are shifted by their thresholds.
        splits: The examples with the labels by which they were scored.
    """

    results: Results
    timings: dict[str, Timing]
    logits: Logits
    splits: Mapping[str, TokenSet]
    thresholds: dict[str, np.ndarray] | None = None
    """Side -> (C,), see `thresholds.choose`; None: a text has one class."""


def size_figures(model: PreTrainedModel) -> Size:
    """Return `parameters` and `modelSize` (MB of the weights, 10^6 bytes) of a model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return {"parameters": parameter_count(model), "modelSize": size}


def compare_models(
    sides: Mapping[str, Side],
    task: Task,
    settings: Evaluate,
    world: World,
    other_teachers: Sequence[Side] = (),
    answers: Mapping[str, np.ndarray] | None = None,
) -> ModelComparison:
    """Score and time teacher and student in float32, and calibrate the student's logits if `settings` says so. Collective.

    Args:
        sides: `teacher` and `student`, with the same examples in the same order; without the first where there are `answers`.
        other_teachers: the teacher's answers are then the mean of its and theirs; size and speed are those of `teacher`.
        answers: split -> the teacher's logits, (N, C) float32, in the order of the examples. It has neither size nor speed.
    """
    others = {f"teacher-{number}": side for number, side in enumerate(other_teachers, start=2)}
    splits = sides["student"].splits
    every = _logits({**sides, **others}, settings.batch_size, world)
    for split, logits_NC in (answers or {}).items():
        every[split]["teacher"] = logits_NC
    logits = {split: _with_mean_teacher(found, list(others), task) for split, found in every.items()}
    if not task.has_labels:
        splits = {name: labelled_by(logits[name]["teacher"], tokens) for name, tokens in splits.items()}
    calibration = world.on_main(lambda: _calibrate(logits, splits)) if settings.calibrate else None
    if calibration is not None:
        logits = {split: _with_temperature(found, calibration["temperature"]) for split, found in logits.items()}
    chosen = world.on_main(lambda: _thresholds(logits, splits)) if task.multilabel else None
    if chosen is not None:
        logits = {
            split: {side: shifted(found[side], chosen[side]) for side in chosen} for split, found in logits.items()
        }
    scores = world.on_main(lambda: _score(logits, splits, task))

    def measure() -> dict[str, Timing]:
        forwards = {name: forward_of(side.model) for name, side in sides.items()}
        first = next(iter(sides.values())).splits["dev"]
        inputs = {
            name: TimedInputs.choose(side.splits["dev"], side.pad_id, world.device, settings, ordered_as=first)
            for name, side in sides.items()
        }
        check = partial(world.interrupt, "in an evaluation")
        with timing_threads(cores()), torch.inference_mode():  # the other ranks are waiting
            return measure_speed(forwards, next(iter(inputs.values())), check=check, own_inputs=inputs)

    timings = world.on_main(measure)
    figures: dict[str, ModelResults] = {
        name: cast(ModelResults, {**size_figures(side.model), **timings[name].figures}) for name, side in sides.items()
    }
    results = combine(
        task.name, scores["dev"], figures, {name: found for name, found in scores.items() if name != "dev"}
    )
    if others:
        alone = {name: every[name]["teacher"] for name in scores}
        if task.multilabel:
            own_C = choose(alone["dev"], np.asarray(splits["dev"].labels_N))
            alone = {name: shifted(logits_NC, own_C) for name, logits_NC in alone.items()}
        first = {name: score_split(alone[name], splits[name], task) for name in scores}
        results["ensemble"] = {"teachers": 1 + len(others), "first": first}
    if calibration is not None:
        results["calibration"] = calibration
    return ModelComparison(results, timings, logits, splits, chosen)


def _thresholds(logits: Logits, splits: Mapping[str, TokenSet]) -> dict[str, np.ndarray]:
    labels_NC = np.asarray(splits[CHOSEN_ON].labels_N)
    return {side: choose(logits_NC, labels_NC) for side, logits_NC in logits[CHOSEN_ON].items()}


def _calibrate(logits: Logits, splits: Mapping[str, TokenSet]) -> Calibration:
    labels = {split: np.asarray(tokens.labels_N) for split, tokens in splits.items()}
    labelled = {split: labels_N for split, labels_N in labels.items() if is_labelled(labels_N).all()}
    return calibrate({split: logits[split]["student"] for split in labelled}, labelled)


def _with_mean_teacher(logits: dict[str, np.ndarray], others: Sequence[str], task: Task) -> dict[str, np.ndarray]:
    """Return the logits of both sides on a split, with those of several teachers averaged."""
    if not others:
        return logits
    teachers = [torch.from_numpy(logits[name]) for name in ("teacher", *others)]
    mean_NC = mean_logits(teachers, task.multilabel).float().numpy()
    return {"teacher": mean_NC, "student": logits["student"]}


def _with_temperature(logits: dict[str, np.ndarray], temperature: float) -> dict[str, np.ndarray]:
    return {**logits, "student": divided(logits["student"], temperature)}


def _logits(sides: Mapping[str, Side], batch_size: int, world: World) -> Logits:
    logits: Logits = {split: {} for split in sides["student"].splits}
    for name, side in sides.items():
        torch.nn.Module.to(side.model, world.device)
        title, rows = f"evaluate, {name}, examples of this rank", sum(map(len, side.splits.values()))
        with evaluating(side.model), Bar(title, rows // world.size, show=world.main) as bar:
            forward = forward_of(side.model)
            for split, tokens in side.splits.items():
                logits[split][name] = predict_logits(forward, tokens, world, batch_size, side.pad_id, bar.advance)
    return logits


def _score(logits: Logits, splits: Mapping[str, TokenSet], task: Task) -> dict[str, SplitResults]:
    return {
        split: {
            "n": len(tokens),
            "teacher": score_split(logits[split]["teacher"], tokens, task),
            "student": score_split(logits[split]["student"], tokens, task),
            "agreement": agreement(logits[split]["teacher"], logits[split]["student"], task.multilabel),
        }
        for split, tokens in splits.items()
        if is_labelled(tokens.labels_N).all()
    }
