"""The section `task` of a run configuration: what is learned, from which data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pkd_dist.config import multiple_choice
from pkd_dist.config.section import Count, Fraction, Positive, Section

METRICS_OF = {
    "classification": ("accuracy", "mcc", "f1"),
    "regression": ("pearson_spearman",),
    "multilabel": ("f1_micro", "f1_macro", "f1_samples", "map", "subset_accuracy"),
    "multiple_choice": ("accuracy",),
}
"""`task.kind` -> the values of `task.metric` that it has, the default first."""

_TEXTS = 200_000
"""With `task.augment.copies: auto`, about the number of texts that the student learns from."""


class Augment(Section):
    copies: Literal["auto"] | Count = Field(
        10,
        description="Copies of each training example. Copies whose text already exists are removed. `auto`: as many as make "
        "about 200,000 texts with the training text, at least 1 and at most 20.",
    )
    mask: Fraction = Field(0.1, description="Probability that a word is replaced by the mask token.")
    replace: Fraction = Field(
        0.1,
        description="Probability that a word is replaced by a random word, drawn by its frequency in the training text.",
    )
    neighbours: Fraction = Field(
        0.0,
        description="Probability that a word is replaced by one of the 15 words nearest to it in the word embeddings of "
        "teacher.model, before fine-tuning. Words that are not a single token stay.",
    )
    ngram: Fraction = Field(0.25, description="Probability that only a random run of 1 to 5 words is kept.")
    min_confidence: Fraction = Field(
        0.0,
        description="Leave out augmented and unlabeled texts to which the teacher gives no class at least this probability. "
        "Needs the teacher cache. The cache holds all texts, so runs with different values share it.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        1,
        description="Seed for the changes. Separate from run.seed, so that runs with different seeds share the teacher cache.",
    )

    def copies_of(self, examples: int) -> int:
        """Return the number of copies of each of this many training examples."""
        if self.copies != "auto":
            return self.copies
        return min(20, max(1, round(_TEXTS / max(1, examples)) - 1))

    @model_validator(mode="after")
    def _probabilities(self) -> Augment:
        if self.mask + self.replace + self.neighbours > 1:
            raise ValueError(
                f"task.augment.mask {self.mask}, task.augment.replace {self.replace} and task.augment.neighbours "
                f"{self.neighbours} must add up to at most 1"
            )
        return self


class FileSplit(Section):
    dev: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of the examples that select the best epoch."
    )
    test: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of the examples that are only scored. 0: no test part."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        1, description="Seed of the hash that orders the examples. Separate from run.seed."
    )
    stratify: bool | None = Field(
        None, description="Give each class its share in each part. null: true, or false for a regression."
    )
    group: str | None = Field(
        None,
        description="Column whose rows with the same value stay in one part, such as `customer_id`. null: the text, so that "
        "equal texts stay in one part.",
    )

    @model_validator(mode="after")
    def _shares(self) -> FileSplit:
        if self.dev + self.test >= 1:
            raise ValueError(
                f"task.split.dev {self.dev:g} and task.split.test {self.test:g} leave nothing to train on; they must add up "
                "to less than 1"
            )
        return self


class Task(Section):
    name: str = Field("sst2", description="A GLUE task (`pkd prepare --help` lists them), `race`, or `custom`.")
    data: str = Field(
        "data/movie-reviews",
        description="Folder with train, dev (or validation) and optionally test as .tsv, .csv, .jsonl, .json or .parquet, all "
        "but the last also as .gz, or in the layout of GLUE or RACE; or one such file, see task.split; or a Hugging Face data set, "
        "`hub:NAME` or `hub:NAME:CONFIGURATION`, such as `hub:nyu-mll/glue:cola`.",
    )
    split: FileSplit | None = Field(
        None,
        description="How to split one file into train, dev and test. Only if task.data is a file. null: the defaults below.",
    )
    duplicates: Literal["keep", "drop", "refuse"] = Field(
        "keep",
        description="What to do with texts that are in several splits. `keep`: report them. `drop`: remove them from train, and "
        "from dev those that are in test; also repeats in train with the same label. `refuse`: stop.",
    )
    max_length: Annotated[int, Field(ge=4, le=8192)] = Field(
        128, description="Maximum input length in tokens. Longer inputs are truncated."
    )
    text: list[str] | None = Field(
        None,
        description="`custom` only: one or two text columns. `multiple_choice`: the context and, optionally, the question.",
    )
    options: str | list[str] | None = Field(
        None,
        description="`multiple_choice` only: the column that has a list of options, or a list of columns, one for each option. "
        "All examples have the same number of options.",
    )
    label_is: Literal["index", "letter", "text"] | None = Field(
        None,
        description="`multiple_choice` only: how a label names the right option. `index`: its number, from 0. `letter`: A, B, ... "
        "`text`: the option itself. null: index.",
    )
    gap: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="`multiple_choice` only: text that stands for a gap in the question, such as `_`: each option is read in its "
        "place. null, and in questions without it: the option is read after the question.",
    )
    label: str | list[str] | None = Field(
        None,
        description="`custom` only: the label column. An explicit null: there are no labels. The student then learns from a given "
        "teacher alone (distill.alpha is 1), and every score is its agreement with the teacher. A training file without the label "
        "column has no labels either; dev then needs it. `multilabel` only: also a list of columns of 0 and 1, one for each class.",
    )
    label_separator: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="`multilabel` only: what separates the classes in the text of a label column. null: a vertical bar. Lists need none.",
    )
    kind: Literal["classification", "regression", "multilabel", "multiple_choice"] | None = Field(
        None,
        description="`custom` only: kind of the label. `multilabel`: a text can have several classes, or none. `multiple_choice`: "
        "each example has options of its own, one of which is right (docs/data.md).",
    )
    metric: (
        Literal[
            "accuracy", "mcc", "f1", "pearson_spearman",
            "f1_micro", "f1_macro", "f1_samples", "map", "subset_accuracy",
        ]
        | None
    ) = Field(
        None,
        description="Metric that selects the best epoch. null: the task's own; for `custom`, accuracy, pearson_spearman or, of a "
        "`multilabel` task, f1_micro. The last five are for `multilabel`.",
    )  # fmt: skip
    class_names: dict[str, str] | None = Field(
        None,
        description="Name of each class by label value, such as `{0: negative, 1: positive}`: the names in the exported "
        "model, and those by which a given teacher's outputs are matched. Their order is the order of the classes, and of "
        "a given teacher's outputs if it does not name them. null: the task's own names; for `custom`, the label values.",
    )
    positive: str | None = Field(
        None,
        description="The positive class of two, by name or label value: precision, recall and F1, also as `task.metric`, are "
        "those of this class. null: the task's own; for `custom`, the one with fewer training examples.",
    )
    unlabeled: list[str] = Field(
        [],
        description="Files with more text for the teacher to label: `.txt` with one text per line, or tables with the task's "
        "text columns. Labels in them are ignored: the loss on labels (CE, see distill.alpha) is 0 for this text. Every loss "
        "term is a mean over all text.",
    )
    augment: Augment | None = Field(
        None, description="Make more text from the training text for the teacher to label. null: off."
    )
    class_weights: Literal["balanced"] | dict[str, Positive] | None = Field(
        None,
        description="Class weights in the loss of labeled examples: `balanced` (n / (classes * count)), or a mapping from "
        "class name or value to weight (default 1). null: unweighted.",
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _class_names_are_text(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for name, weight in value.items():
            if isinstance(name, bool) or isinstance(weight, bool):
                raise ValueError("a true/false value is not allowed here; put a class name such as 'no' in quotes")
        return {str(name): weight for name, weight in value.items()}

    @field_validator("class_names", mode="before")
    @classmethod
    def _class_names_map(cls, value: object) -> object:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError("must be a mapping from label value to class name, such as {0: negative, 1: positive}")
        if any(isinstance(part, bool) for pair in value.items() for part in pair):
            raise ValueError("a true/false value is not allowed here; put a label such as 'no' in quotes")
        names = {str(label).strip(): str(name).strip() for label, name in value.items()}
        if len(names) < 2 or not all(names) or not all(names.values()):
            raise ValueError("needs at least two classes, each with a label value and a name")
        if len(names) < len(value) or len(set(names.values())) < len(names):
            raise ValueError("labels and names must be different from each other; give each class its own")
        return names

    @field_validator("positive", mode="before")
    @classmethod
    def _positive_is_text(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a true/false value is not allowed here; put a class such as 'no' in quotes")
        return str(value) if isinstance(value, (int, float)) else value

    @property
    def is_label_free(self) -> bool:
        """Whether the label is explicitly null, of a task that defines none itself."""
        return self.name == "custom" and self.label is None and "label" in self.model_fields_set

    def _label_free(self) -> Task:
        for key in ("metric", "positive", "class_weights"):
            if getattr(self, key) is not None:
                raise ValueError(f"task.{key} needs labels, but task.label is null; remove it")
        if self.kind in ("regression", "multilabel"):
            raise ValueError(f"task.kind {self.kind} needs labels, but task.label is null; give the label column")
        if self.label_separator is not None:
            raise ValueError("task.label_separator needs labels, but task.label is null; remove it")
        return self

    @property
    def is_multilabel(self) -> bool:
        """Whether a text can have several classes."""
        return self.kind == "multilabel"

    @property
    def is_multiple_choice(self) -> bool:
        """Whether each example has options of its own, one of which is right."""
        return self.kind == multiple_choice.KIND or self.canonical_name in multiple_choice.TASKS

    @property
    def canonical_name(self) -> str:
        """The task's name as it is looked up: `SST-2` is `sst2`."""
        return self.name.lower().replace("-", "").replace("_", "")

    @property
    def label_columns(self) -> list[str]:
        """The label columns: one, or one for each class; empty without labels."""
        if self.label is None:
            return []
        return [self.label] if isinstance(self.label, str) else self.label

    def _require_labels(self) -> None:
        """Check what a label column, or several, can be."""
        texts = self.text or []
        if both := next((name for name in self.label_columns if name in texts), None):
            raise ValueError(f"task.label: {both} is also a text column; name the label column")
        if not self.is_multilabel:
            if isinstance(self.label, list):
                raise ValueError("task.label can be a list only with task.kind multilabel; name one column")
            if self.label_separator is not None:
                raise ValueError("task.label_separator is allowed only with task.kind multilabel; remove it")
            return
        if isinstance(self.label, list):
            if len(self.label) < 2 or len(set(self.label)) < len(self.label):
                raise ValueError(
                    f"task.label must name two or more different columns, one for each class, not {self.label}"
                )
            if self.label_separator is not None:
                raise ValueError("task.label_separator cannot be used with one label column for each class; remove it")
            if self.class_names is not None and set(self.class_names) != set(self.label):
                raise ValueError(
                    f"task.class_names must name the columns of task.label, {', '.join(self.label)}, not "
                    f"{', '.join(self.class_names)}"
                )
        for key, why in (
            ("positive", "every class is positive or not in each text"),
            ("class_weights", "the loss weights all classes alike"),
        ):
            if getattr(self, key) is not None:
                raise ValueError(f"task.{key} cannot be used with task.kind multilabel: {why}; remove it")
        if self.split and self.split.stratify:
            raise ValueError(
                "task.split.stratify cannot be used with task.kind multilabel: a text can have several classes; remove it"
            )
        if self.augment and self.augment.min_confidence:
            raise ValueError(
                "task.augment.min_confidence cannot be used with task.kind multilabel: a text may have no class at all; set it to 0"
            )

    @model_validator(mode="after")
    def _custom_keys(self) -> Task:
        if self.is_multiple_choice:
            multiple_choice.refuse_in_task(self)
        if self.name == "custom":
            if not self.text or not (self.label or self.is_label_free):
                raise ValueError(
                    "task.name custom needs task.text: [column] or [column_a, column_b], and task.label: column, or null where "
                    "there are no labels"
                )
            if len(self.text) > 2 or len(set(self.text)) < len(self.text):
                raise ValueError(f"task.text must name one or two different columns, not {self.text}")
            multiple_choice.require_columns(self)
            if self.is_label_free:
                return self._label_free()
            self._require_labels()
            kind = self.kind or "classification"
            if self.metric and self.metric not in METRICS_OF[kind]:
                raise ValueError(
                    f"task.metric {self.metric} cannot be used with task.kind {kind}; allowed: {', '.join(METRICS_OF[kind])}"
                )
        return self
