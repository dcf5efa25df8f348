"""What the stages of a run share: the frozen `Resolved` run, its paths, and the `Context` that each stage is given.

    Config + DeepSpeed JSON + the teacher's configuration -> resolve() -> Resolved -> Context -> stage.run(context)

`resolve` rejects everything that can be found wrong before anything is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.schema import Config
from pkd_dist.data import class_mapping, sources, tasks, trimming
from pkd_dist.data.tasks import Task
from pkd_dist.distillation.teacher import resolve_teacher_precision
from pkd_dist.distributed.world import World
from pkd_dist.evaluation import predictions
from pkd_dist.model import encoder, layers, student
from pkd_dist.model.compatibility import require_compatible
from pkd_dist.stages.base import Inputs
from pkd_dist.telemetry import Telemetry, trackers
from pkd_dist.training.engine import resolve_precision

T = TypeVar("T")


@dataclass(frozen=True)
class RunPaths:
    """Where a run keeps what; the folders that settings can move elsewhere are given."""

    run: Path
    cache: Path
    results: Path

    @property
    def data(self) -> Path:
        return self.run / "data"

    @property
    def teacher(self) -> Path:
        return self.run / "teacher"

    @property
    def teacher_checkpoints(self) -> Path:
        return self.run / "teacher_checkpoints"

    @property
    def teacher_records(self) -> Path:
        return self.run / "teacher_metrics.jsonl"

    @property
    def student_init(self) -> Path:
        return self.run / "student_init"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def records(self) -> Path:
        return self.run / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        return self.run / predictions.FILE

    @property
    def submissions(self) -> Path:
        return self.run / "predictions"

    @property
    def export(self) -> Path:
        return self.run / "export"

    @property
    def report(self) -> Path:
        return self.run / "report.html"


def paths_of(config: Config) -> RunPaths:
    run = Path(config.run.dir)
    cache = Path(config.cache.dir) if config.cache.dir else run / "cache"
    return RunPaths(run, cache, Path(config.evaluate.result_dir or run) / "results_eval.json")


@dataclass(frozen=True)
class Resolved:
    """A run as its configuration, the DeepSpeed JSON, the teacher and the device decide it.

    Attributes:
        deepspeed: the DeepSpeed JSON's content.
        source: folder or hub name of `teacher.model`.
        source_config: its configuration.
        tokenizer: the teacher's, which the student shares.
        class_order: label values in the order of a given teacher's outputs; None: the data decides.
        pairs: (student layer, teacher layer) of the patience term, from 1 (0: the embeddings); empty where it is off.
        copied_layers: teacher layers, from 0, that the student starts from; None where it starts otherwise.
        kept_layers: teacher layers, from 1, whose states a cache that is built now holds.
        precision, teacher_precision: of the training, such as `autocast bfloat16`, and of the teacher's pass.
    """

    config: Config
    paths: RunPaths
    deepspeed: dict[str, object]
    task: Task
    source: str
    source_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    class_order: tuple[str, ...] | None
    teacher_layers: int
    student_layers: int
    pairs: tuple[tuple[int, int], ...]
    copied_layers: tuple[int, ...] | None
    kept_layers: tuple[int, ...]
    precision: str
    teacher_precision: str

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a term that the teacher decides."""
        return self.config.distill.alpha > 0 or bool(self.pairs)

    @property
    def cached(self) -> bool:
        """Whether the teacher's outputs come from a cache, not from a forward pass in each step."""
        return self.config.cache.enabled and self.needs_teacher

    @property
    def finetunes(self) -> bool:
        """Whether the teacher is fine-tuned in this run, not given."""
        return self.config.teacher.finetune is not None

    @property
    def pairs_are_rounded(self) -> bool:
        """Whether `distill.patience: skip` had to round its pairs."""
        return (
            self.config.distill.patience == "skip"
            and bool(self.pairs)
            and layers.skip_is_rounded(self.teacher_layers, self.student_layers)
        )

    @property
    def teacher_width(self) -> int:
        return int(self.source_config.hidden_size)

    def training_inputs(self) -> Inputs:
        """Return what decides the outcome of a training, beside its own section."""
        train, weights = self.config.train, self.config.task.class_weights
        inputs: Inputs = {
            "run.seed": self.config.run.seed,
            "train.max_grad_norm": train.max_grad_norm,
            "train.adam_epsilon": train.adam_epsilon,
            "precision": self.precision,
            "task.metric": self.task.metric,
        }
        return inputs | ({"task.class_weights": weights} if weights else {})


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        versions: stage name -> its `VERSION`.
        fingerprint: of the stage's inputs; checkpoints with another one are rejected. Empty while stages are planned.
    """

    resolved: Resolved
    world: World
    telemetry: Telemetry
    versions: Mapping[str, int]
    fingerprint: str = ""
    _outputs: dict[type, object] = field(default_factory=dict)

    def output(self, kind: type[T]) -> T:
        """Return what an earlier stage handed on, by its type."""
        found = self._outputs[kind]
        assert isinstance(found, kind)
        return found

    def hand_on(self, output: object) -> None:
        """Keep a stage's output for the stages after it."""
        self._outputs[type(output)] = output


def resolve(config: Config, config_file: str | Path | None, device: torch.device) -> Resolved:
    """Work out what a configuration means for this teacher, data and device. Reads; writes nothing.

    Args:
        config_file: for messages.

    Raises:
        UserError: the teacher, the data, the student or a setting cannot be used, or they do not fit each other.
    """
    trackers.require(config.trackers)
    deepspeed = load_deepspeed(config, config_file)
    task = tasks.resolve(config.task)
    source = encoder.locate(config.teacher.model)
    source_config = encoder.load_config(source)
    tokenizer = encoder.load_tokenizer(source)
    for split in ("train", "dev"):
        sources.require(config.task.data, split, task)
    sources.unlabeled_paths(config.task.unlabeled, task)
    require_compatible(source_config, tokenizer, config.task.max_length, config.teacher.model, "teacher.model")
    order = task.classes
    if config.teacher.finetune is None:
        encoder.require_classifier(source, config.teacher.model, "teacher.model")
        class_mapping.require_outputs(task, source_config, config.teacher.model, "teacher.model")
        order = class_mapping.class_order(task, source_config, "teacher.model")
    depth = encoder.num_layers(source_config)
    student_depth = student.planned_depth(config.student, source_config, tokenizer, config.task.max_length)
    if config.student.vocabulary == "used":
        trimming.require_trimmable(tokenizer)
        student.require_plain_vocabulary(config.student, source_config)
    pairs = layers.patience_pairs(config.distill, depth, student_depth)
    return Resolved(
        config=config,
        paths=paths_of(config),
        deepspeed=deepspeed,
        task=task,
        source=source,
        source_config=source_config,
        tokenizer=tokenizer,
        class_order=order,
        teacher_layers=depth,
        student_layers=student_depth,
        pairs=pairs,
        copied_layers=student.copied_teacher_layers(config.student, source_config),
        kept_layers=layers.kept_layers(config.cache, pairs, depth),
        precision=resolve_precision(deepspeed, device)[1],
        teacher_precision=resolve_teacher_precision(config.cache.precision, device),
    )


def with_fingerprint(context: Context, fingerprint: str) -> Context:
    """Return the same context for a stage of this fingerprint; outputs are shared."""
    return dataclasses.replace(context, fingerprint=fingerprint)
