"""What the stages of a run share: the frozen `Resolved` run, its paths, and the `Context` that each stage is given.

    Config + DeepSpeed JSON + the teacher's configuration -> resolve() -> Resolved -> Context -> stage.run(context)

`resolve` rejects everything that can be found wrong before anything is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pkd_dist.config.deepspeed import PRECISIONS, DeepSpeedConfig, load_deepspeed
from pkd_dist.config.schema import Config
from pkd_dist.data import answers, class_mapping, sources, tasks, trimming
from pkd_dist.data.tasks import Task
from pkd_dist.distillation import cache
from pkd_dist.distillation.teacher import resolve_teacher_precision
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.evaluation import predictions
from pkd_dist.model import encoder, layers, student
from pkd_dist.model.attention import require_comparable
from pkd_dist.model.compatibility import require_compatible, token_difference
from pkd_dist.model.ensemble import require_same_tokenizer
from pkd_dist.model.families import num_layers
from pkd_dist.model.layers import LayerMap
from pkd_dist.stages.base import Inputs
from pkd_dist.telemetry import Telemetry, trackers
from pkd_dist.training.engine import leaves_precision_open, require_precision, resolve_precision

T = TypeVar("T")


@dataclass(frozen=True)
class RunPaths:
    """Where a run keeps what; the folders that can be elsewhere are given."""

    run: Path
    data: Path
    cache: Path
    results: Path

    @property
    def other_teachers(self) -> list[Path]:
        """What an ensemble left: `teacher-2`, `teacher-2_metrics.jsonl`, ..."""
        return sorted(self.run.glob("teacher-[0-9]*"))

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


def paths_of(config: Config, data: Path | None = None) -> RunPaths:
    run = Path(config.run.dir)
    cache = Path(config.cache.dir) if config.cache.dir else run / "cache"
    return RunPaths(run, data or run / "data", cache, Path(config.evaluate.result_dir or run) / "results_eval.json")


def teacher_name(number: int) -> str:
    """Return the name of a teacher, counted from 1, in its run folder."""
    return "teacher" if number == 1 else f"teacher-{number}"


@dataclass(frozen=True)
class Teacher:
    """One of the teachers of a run.

    Attributes:
        name: `teacher`, or `teacher-2`, ... for those beside the first: names its folder in the run, and its fine-tuning.
        model: as the user named it.
        source: folder or hub name of that model.
        source_config: its configuration.
        seed: of its fine-tuning.
        run: the run folder.
    """

    name: str
    model: str
    source: str
    source_config: PretrainedConfig
    seed: int
    run: Path

    @property
    def folder(self) -> Path:
        """Where it is once it is fine-tuned."""
        return self.run / self.name

    @property
    def checkpoints(self) -> Path:
        return self.run / f"{self.name}_checkpoints"

    @property
    def records(self) -> Path:
        return self.run / f"{self.name}_metrics.jsonl"


class Precisions(NamedTuple):
    """Of a training, such as `autocast bfloat16`, and of the teacher's pass."""

    training: str
    teacher: str


@dataclass(frozen=True)
class Resolved:
    """A run as its configuration, the DeepSpeed JSON, the teacher and the device decide it.

    Attributes:
        deepspeed: the DeepSpeed JSON's content.
        teachers: the first one is that whose hidden states and layers the student gets. With `teacher.answers` it stands for the
            student's own model, whose tokenizer and shape the run has.
        tokenizer: the teachers'.
        student_tokenizer: the student's; the same object, unless it reads other tokens.
        class_order: label values in the order of a given teacher's outputs; None: the data decides.
        layer_map: the layers of student and teacher that the loss compares.
        copied_layers: teacher layers, from 0, that the student starts from; None where it starts otherwise.
        kept_layers: teacher layers, from 1, whose states a cache that is built now holds.
        precision, teacher_precision: of the training and of the teacher's pass. Where the settings leave them to the host: those of
            the host on which the run began, and of the cache that it finds.
        here: the same two, of this host.
    """

    config: Config
    paths: RunPaths
    deepspeed: dict[str, object]
    task: Task
    teachers: tuple[Teacher, ...]
    tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase
    class_order: tuple[str, ...] | None
    teacher_layers: int
    student_layers: int
    layer_map: LayerMap
    copied_layers: tuple[int, ...] | None
    kept_layers: tuple[int, ...]
    precision: str
    teacher_precision: str
    here: Precisions

    @property
    def source(self) -> str:
        """Folder or hub name of the first teacher's model, before fine-tuning."""
        return self.teachers[0].source

    @property
    def source_config(self) -> PretrainedConfig:
        """Configuration of that model."""
        return self.teachers[0].source_config

    @property
    def has_answers(self) -> bool:
        """Whether the teacher is a file of answers, not a model; `source` is then that of the student."""
        return self.config.teacher.answers is not None

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a term that the teacher decides."""
        return self.config.distill.alpha > 0 or bool(self.layer_map.teacher_states)

    @property
    def cached(self) -> bool:
        """Whether the teacher's outputs come from a cache, not from a forward pass in each step."""
        return self.config.cache.enabled and self.needs_teacher

    @property
    def finetunes(self) -> bool:
        """Whether the teacher is fine-tuned in this run, not given."""
        return self.config.teacher.finetune is not None

    @property
    def student_length(self) -> int:
        """Maximum input length of the student, in its tokens."""
        return self.config.student_length

    @property
    def reads_alike(self) -> bool:
        """Whether the student reads the same tokens of a text as its teacher."""
        return self.student_tokenizer is self.tokenizer and self.student_length == self.config.task.max_length

    @property
    def pairs_are_rounded(self) -> bool:
        """Whether `distill.patience: skip` had to round its pairs."""
        return (
            self.config.distill.patience == "skip"
            and bool(self.layer_map.pairs)
            and layers.skip_is_rounded(self.teacher_layers, self.student_layers)
        )

    @property
    def teacher_width(self) -> int:
        return int(self.source_config.hidden_size)

    def require_trainable(self, stage: str, device: torch.device) -> None:
        """Check that the device has the precision of a stage that is about to train; other stages need none.

        Raises:
            UserError: it lacks it.
        """
        if stage == "distill" or (stage == "teacher" and self.finetunes):
            require_precision(self.deepspeed, device)

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

    def known(self, kind: type[T]) -> T | None:
        """Return what was handed on, by its type; None where nothing was."""
        found = self._outputs.get(kind)
        return found if isinstance(found, kind) else None

    def hand_on(self, output: object) -> None:
        """Keep a stage's output for the stages after it."""
        self._outputs[type(output)] = output

    def adopt(self, other: Context) -> None:
        """Take over what the stages of another run handed on."""
        self._outputs.update(other._outputs)


def resolve(
    config: Config,
    config_file: str | Path | None,
    device: torch.device,
    data: Path | None = None,
    fresh: bool = False,
) -> Resolved:
    """Work out what a configuration means for this teacher, data and device. Reads; writes nothing.

    Args:
        config_file: for messages.
        data: where the data of another run is, which this one uses.
        fresh: the run starts over; what it has made so far does not count.

    Raises:
        UserError: the teacher, the data, the student or a setting cannot be used, or they do not fit each other.
    """
    trackers.require(config.trackers)
    deepspeed = load_deepspeed(config, config_file)
    task = _task(config)
    teachers = _teachers(config)
    source_config, tokenizer = teachers[0].source_config, encoder.load_tokenizer(teachers[0].source)
    _require_data(config, task)
    sources.unlabeled_paths(config.task.unlabeled, task)
    answers.paths_of(config.teacher.answers or ())
    for teacher in teachers[1:]:
        if teacher.source != teachers[0].source:
            own = encoder.load_tokenizer(teacher.source)
            require_same_tokenizer((teachers[0].model, tokenizer), (teacher.model, own), "teacher.model")
    order = _class_order(config, task, teachers, tokenizer)
    depth = num_layers(source_config)
    student_tokenizer = student.tokenizer_of(config.student, tokenizer)
    student_depth = student.planned_depth(
        config.student, source_config, student_tokenizer, config.student_length, multiple_choice=task.multiple_choice
    )
    if config.student.vocabulary == "used":
        trimming.require_trimmable(student_tokenizer)
        student.require_plain_vocabulary(config.student, source_config)
    _require_equal_tokens(config, tokenizer, student_tokenizer)
    layer_map = layers.layer_map(config.distill, depth, student_depth)
    if layer_map.attention:
        shape = student.planned_config(config.student, source_config)
        require_comparable(config.distill, source_config, shape)
    paths = paths_of(config, data)
    here = Precisions(
        resolve_precision(deepspeed, device)[1], resolve_teacher_precision(config.cache.precision, device)
    )
    precision, teacher_precision = here if fresh else _precisions_at_start(config, deepspeed, paths, here)
    resolved = Resolved(
        config=config,
        paths=paths,
        deepspeed=deepspeed,
        task=task,
        teachers=teachers,
        tokenizer=tokenizer,
        student_tokenizer=student_tokenizer,
        class_order=order,
        teacher_layers=depth,
        student_layers=student_depth,
        layer_map=layer_map,
        copied_layers=student.copied_teacher_layers(config.student, source_config),
        kept_layers=() if config.teacher.answers else layers.kept_layers(config.cache, layer_map.teacher_states, depth),
        precision=precision,
        teacher_precision=teacher_precision,
        here=here,
    )
    if config.evaluate.best_by == "divergence" and not resolved.needs_teacher:
        raise UserError(
            "divergence compares with the teacher, which this loss does not use (distill.alpha is 0, and nothing is paired); "
            "use metric", "evaluate.best_by",
        )  # fmt: skip
    return resolved


def _precisions_at_start(config: Config, deepspeed: DeepSpeedConfig, paths: RunPaths, here: Precisions) -> Precisions:
    """Return `Resolved.precision` and `teacher_precision`: a job that is requeued on another kind of host keeps what it has made."""
    training, teacher = here
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        before = yaml.safe_load((paths.run / "config.yaml").read_text(encoding="utf-8"))
        then = before["resolved"]
        same = all(then["deepspeed"].get(key) == deepspeed.get(key) for key in PRECISIONS)
        if same and leaves_precision_open(deepspeed):
            training = str(then["precision"])
        if config.cache.precision == before["cache"]["precision"] == "auto":
            teacher = str(then["teacher_precision"])
    if config.cache.precision == "auto":
        with contextlib.suppress(UserError, OSError):  # the stage `cache` will say so
            if manifest := cache.read_manifest(paths.cache):
                teacher = manifest.fingerprint.precision
    return Precisions(training, teacher)


def _task(config: Config) -> tasks.Task:
    """Return the task; raise UserError where it excludes a setting."""
    task = tasks.resolve(config.task)
    if not (config.teacher.finetune or config.task.class_weights or task.multilabel):
        accepted = config.distill.alpha == 1
        task = dataclasses.replace(task, unlabelled_train="accept" if accepted else "explain")
    if task.regression and config.task.augment and config.task.augment.min_confidence:
        raise UserError(
            "compares class probabilities, which a regression does not have; set it to 0", "task.augment.min_confidence"
        )
    if task.regression and config.evaluate.calibrate:
        raise UserError(
            "calibrates class probabilities, which a regression does not have; set it to false", "evaluate.calibrate"
        )
    return task


def _require_equal_tokens(config: Config, teacher: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> None:
    """Refuse what compares the models token by token where the student reads other tokens than its teacher."""
    distill, lengths = config.distill, (config.task.max_length, config.student_length)
    if own is not teacher:
        how = str(token_difference(teacher, own))
    elif lengths[0] != lengths[1]:
        how = f"at most {lengths[1]} in a text instead of {lengths[0]}"
    else:
        return
    live = not config.cache.enabled and (distill.alpha > 0 or distill.compares_states)
    for key, needs, remedy in (
        ("distill.states", distill.beta > 0 and distill.states == "tokens", "use cls"),
        ("distill.gram", distill.gram > 0, "set it to 0"),
        ("distill.relations", distill.relations > 0, "set it to 0"),
        ("distill.attention", distill.attention > 0, "set it to 0"),
        ("cache.enabled", live, "set it to true"),
    ):
        if needs:
            raise UserError(
                f"needs the same tokens in both models, but the student reads its own ({how}); {remedy}", key
            )


def _require_data(config: Config, task: Task) -> None:
    for split in ("train", "dev"):
        place = sources.require(config.task.data, split, task).place
        if isinstance(place, Path) and paths_of(config).data.resolve() in place.resolve().parents:
            raise UserError(f"{config.task.data} is in run.dir; choose another run.dir for this run", "task.data")


def _teachers(config: Config) -> tuple[Teacher, ...]:
    models, settings = config.teacher.models or (config.student.init,), config.teacher.finetune
    key = "student.init" if config.teacher.answers else "teacher.model"
    seeds = (settings and settings.seeds) or [config.run.seed]
    pairs = [(model, seed) for model in models for seed in seeds]
    found = []
    for number, (model, seed) in enumerate(pairs, start=1):
        source = encoder.locate(model, key)
        found.append(
            Teacher(teacher_name(number), model, source, encoder.load_config(source, key), seed, Path(config.run.dir))
        )
    return tuple(found)


def _class_order(
    config: Config, task: Task, teachers: Sequence[Teacher], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...] | None:
    """Check that the teachers can be used, and return the label values in the order of their outputs; None: the data decides."""
    key, orders = "student.init" if config.teacher.answers else "teacher.model", []
    for teacher in teachers:
        require_compatible(
            teacher.source_config,
            tokenizer,
            config.task.max_length,
            teacher.model,
            key,
            multiple_choice=task.multiple_choice,
        )
        if config.teacher.finetune is not None or config.teacher.answers:
            orders.append(task.classes)
            continue
        encoder.require_classifier(teacher.source, teacher.model, key, multiple_choice=task.multiple_choice)
        class_mapping.require_outputs(task, teacher.source_config, teacher.model, key)
        try:
            orders.append(class_mapping.class_order(task, teacher.source_config, key))
            if orders[-1] is None and not task.has_labels and task.has_named_classes:
                orders[-1] = tuple(class_mapping.output_names(teacher.source_config))
        except UserError as error:
            raise UserError(f"{teacher.model}: {error.message}", error.setting) from None
    for teacher, order in zip(teachers, orders, strict=True):
        if order != orders[0]:
            own, first = (", ".join(class_mapping.output_names(each.source_config)) for each in (teacher, teachers[0]))
            raise UserError(
                f"the outputs of {teacher.model} ({own}) are not those of {teachers[0].model} ({first}), in this order; "
                f"several teachers must have the same classes; leave {teacher.model} out",
                key,
            )
    return orders[0]


def with_fingerprint(context: Context, fingerprint: str) -> Context:
    """Return the same context for a stage of this fingerprint; outputs are shared."""
    return dataclasses.replace(context, fingerprint=fingerprint)
