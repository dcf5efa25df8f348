"""The section `task` of a run configuration: what is learned, from which data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pkd_dist.config.section import Count, Fraction, Positive, Section

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
    name: str = Field("sst2", description="A GLUE task (`pkd prepare --help` lists them) or `custom`.")
    data: str = Field(
        "data/movie-reviews",
        description="Folder with train, dev (or validation) and optionally test as .tsv, .csv, .jsonl, .json or .parquet, all "
        "but the last also as .gz, or in GLUE's layout; or one such file, see task.split; or a Hugging Face data set, "
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
    text: list[str] | None = Field(None, description="`custom` only: one or two text columns.")
    label: str | None = Field(
        None,
        description="`custom` only: the label column. An explicit null: there are no labels. The student then learns from a given "
        "teacher alone (distill.alpha is 1), and every score is its agreement with the teacher. A training file without the label "
        "column has no labels either; dev then needs it.",
    )
    kind: Literal["classification", "regression"] | None = Field(None, description="`custom` only: kind of the label.")
    metric: Literal["accuracy", "mcc", "f1", "pearson_spearman"] | None = Field(
        None,
        description="Metric that selects the best epoch. null: the task's own; for `custom`, accuracy or pearson_spearman.",
    )
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
        if self.kind == "regression":
            raise ValueError("task.kind regression needs labels, but task.label is null; give the label column")
        return self

    @model_validator(mode="after")
    def _custom_keys(self) -> Task:
        if self.name == "custom":
            if not self.text or not (self.label or self.is_label_free):
                raise ValueError(
                    "task.name custom needs task.text: [column] or [column_a, column_b], and task.label: column, or null where "
                    "there are no labels"
                )
            if self.is_label_free:
                return self._label_free()
            if len(self.text) > 2 or len(set(self.text)) < len(self.text):
                raise ValueError(f"task.text must name one or two different columns, not {self.text}")
            if self.label in self.text:
                raise ValueError(f"task.label: {self.label} is also a text column; name the label column")
            regression = self.kind == "regression"
            if self.metric and regression != (self.metric == "pearson_spearman"):
                raise ValueError(
                    f"task.metric {self.metric} cannot be used with task.kind {self.kind or 'classification'}; allowed: "
                    + ("pearson_spearman" if regression else "accuracy, mcc, f1")
                )
        return self
