"""Scoring: logits of exactly n examples whatever the ranks and batches, task metrics, size and speed, and teacher
against student."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch

from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distributed.world import World
from pkd_dist.evaluation.metrics import agreement, scores
from pkd_dist.evaluation.scoring import evaluating, predict
from pkd_dist.evaluation.speed import Timing, speed
from pkd_dist.model.encoder import accepted, parameter_count
from pkd_dist.telemetry.progress import Bar


def figures_of(model: Any) -> dict[str, Any]:
    """What is said of a model beside its metrics and its speed."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return {"parameters": parameter_count(model), "modelSize": size}


def compare(
    models: dict[str, Any],
    splits: dict[str, TokenSet],
    task: Task,
    world: World,
    batch_size: int,
    requests: int,
    examples: int,
    pad_id: int,
) -> tuple[dict[str, Any], dict[str, Timing], dict[str, dict[str, np.ndarray]]]:
    """Scores teacher and student in float32 and times them, interleaved, on rank 0 with all of its node's cores.

    Args:
        models: `teacher` and `student`.
        splits: name -> examples; `dev` gives the main figures and the inputs that are timed. Those without labels are
            answered, not scored.
        requests, examples: see `speed`.

    Returns:
        The content of `results_eval.json`; the timings of both; and of each split the logits of both, (N, C) float32.
    """
    forwards: dict[str, Any] = {}
    logits: dict[str, dict[str, np.ndarray]] = {split: {} for split in splits}
    for name, model in models.items():
        model.to(world.device)
        forwards[name] = lambda inputs, model=model: model(**accepted(model, inputs)).logits
        rows = sum(map(len, splits.values()))
        with (
            evaluating(model),
            Bar(f"evaluate, {name}, rows of this rank", rows // world.size, show=world.main) as bar,
        ):
            for split, tokens in splits.items():
                logits[split][name] = predict(forwards[name], tokens, world, batch_size, pad_id, bar.advance)

    def judge() -> dict[str, dict[str, Any]]:
        """split -> `n`, the scores of both, and how far they agree."""
        return {
            split: {
                "n": len(tokens),
                **{name: scores(logits[split][name], tokens, task) for name in models},
                "agreement": agreement(logits[split]["teacher"], logits[split]["student"]),
            }
            for split, tokens in splits.items()
            if split not in unlabelled
        }

    def measure() -> dict[str, Timing]:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
        try:
            with torch.inference_mode():
                interrupt = partial(world.interrupt, "in an evaluation")
                return speed(
                    forwards, splits["dev"], world.device, batch_size, requests, examples, pad_id, check=interrupt
                )
        finally:
            torch.set_num_threads(threads)

    unlabelled = {split for split, tokens in splits.items() if not is_labelled(tokens.labels_N).all()}
    judged = world.on_main(judge)
    timings = world.on_main(measure)
    dev = judged.pop("dev")
    teacher, pupil = (
        {**dev[name], **figures_of(models[name]), **timings[name].figures} for name in ("teacher", "student")
    )
    results = {
        "task": task.name,
        "split": "dev",
        "n": dev["n"],
        **{
            k: v
            for k, v in pupil.items()
            if k not in ("parameters", "latency_ms_p50", "latency_ms_p99", "accuracy_interval_95")
        },
        "teacher": teacher,
        "student": pupil,
        "compression": {
            "parameters": teacher["parameters"] / pupil["parameters"],
            "size": teacher["modelSize"] / pupil["modelSize"],
            "throughput": pupil["reasoningTime"] / teacher["reasoningTime"],
            "retention": pupil["main_metric"] / teacher["main_metric"] if teacher["main_metric"] else 0.0,
            "agreement": dev["agreement"],
        },
        "splits": judged,
    }
    return results, timings, logits
