"""Tasks: columns, classes, the metric that selects the best epoch, and the file layouts of GLUE, RACE and the hub.

Each task that is known by name is one entry of `GLUE` or `OTHERS`, which holds everything that is special about its files;
`sources.py` and `text.py` read all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pkd_dist.config.task import METRICS_OF, FileSplit
from pkd_dist.config.task import Task as TaskConfig
from pkd_dist.data.choices import Choices
from pkd_dist.errors import UserError
from pkd_dist.metric_names import AGREEMENT

NO_LABEL = "\0"
"""`Task.label` where the data has none: the name of no column."""

MAIN_METRICS = {
    "accuracy": "accuracy",
    "mcc": "MCC",
    "f1": "f_1",
    "pearson_spearman": "pearson_spearman",
    **{name: name for name in ("f1_micro", "f1_macro", "f1_samples", "subset_accuracy")},
    "map": "mAP",
    AGREEMENT: AGREEMENT,
}
"""`task.metric` -> key of `results_eval.json` (`pearson_spearman` is the mean of both)."""


@dataclass(frozen=True)
class Release:
    """A data set as its authors released it: two labeled files, and the list of training pairs that are GLUE's dev split.

    Attributes:
        train, test: names of the labeled files.
        dev_ids: name of the list; without that file, the test file is used as dev and there is no test split.
        id_columns: the columns of `train` that the two columns of `dev_ids` refer to.
    """

    train: str
    test: str
    dev_ids: str
    id_columns: tuple[str, str]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        text: the one or two text columns.
        label: the label column; the first, where each class has one.
        classes: values of the label column in class order; None: taken from the training split, sorted.
        class_names: names of the classes in the exported model, also accepted as labels; None: the values themselves.
        metric: a key of `MAIN_METRICS`.
        positive: index of the positive class for precision, recall and F1 of two classes, as `class_mapping` finds it.
        positive_class: its label value or name; None: the data decides.
        positive_is_set: whether the user named it.
        regression: whether the label is a number.
        multilabel: whether a text can have several classes, or none.
        class_columns: the label columns of a multi-label task with one for each class; empty: there is a single one.
        label_separator: what separates the classes in the text of a single one.
        options: the columns of the options of a multiple-choice task, or the one that has lists; empty: it is none. Such a task's
            `text` is the context and, where it has one, the question.
        has_option_lists: whether it is one column of lists.
        label_is: how the label names the right option: `index`, `letter` or `text`.
        gap: text in the question whose place an option takes.
        splits: names of its splits, train first. Labels are optional in those that start with `test`.
        value_range: least and greatest regression target; None: any.
        files: split -> GLUE's file names without extension, where they differ from the split's name.
        folders: subfolders of a split's folder that have its texts, a file each, in RACE's layout; empty: a split is a table.
        headerless: all columns of a file that has no header line.
        release: the original release, used if a folder has no file of any split.
        skip_broken: whether lines with too few fields or an empty text are skipped and counted instead of being an error.
        no_label: label value of examples without a gold label, which are skipped and counted.
        hub_columns: column -> its name on the hub, where they differ.
        hub_splits: split -> its name on the hub, where they differ.
        submissions: split -> file name that GLUE's server expects.
        file_split: how one file is split; None: as `FileSplit` does by default.
        duplicates: what to do with texts that are in several splits.
        unlabelled_train: what to do with a train split without any label, from which a student can learn with its teacher alone:
            `refuse` it, `explain` what would accept it, or `accept` it.
    """

    name: str
    text: tuple[str, ...]
    label: str
    classes: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    metric: str = "accuracy"
    positive: int = 1
    positive_class: str | None = None
    positive_is_set: bool = False
    regression: bool = False
    multilabel: bool = False
    class_columns: tuple[str, ...] = ()
    label_separator: str = "|"
    options: tuple[str, ...] = ()
    has_option_lists: bool = False
    label_is: str = "index"
    gap: str | None = None
    splits: tuple[str, ...] = ("train", "dev", "test")
    value_range: tuple[float, float] | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    release: Release | None = None
    skip_broken: bool = False
    no_label: str | None = None
    hub_columns: Mapping[str, str] = field(default_factory=dict)
    hub_splits: Mapping[str, str] = field(default_factory=lambda: {"dev": "validation"})
    submissions: Mapping[str, str] = field(default_factory=dict)
    file_split: FileSplit | None = None
    duplicates: str = "keep"
    unlabelled_train: Literal["refuse", "explain", "accept"] = "refuse"

    @property
    def has_labels(self) -> bool:
        """Whether the data has labels. Without, everything is scored by the teacher's predictions."""
        return self.label != NO_LABEL

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that labels are read from."""
        return self.class_columns or (self.label,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that a model reads: text and options."""
        return (*self.text, *self.options)

    @property
    def list_columns(self) -> tuple[str, ...]:
        """The columns whose value may be a list."""
        lists = self.options if self.has_option_lists else ()
        return (*lists, *((self.label,) if self.multilabel and not self.class_columns else ()))

    @property
    def multiple_choice(self) -> bool:
        """Whether each example has options of its own, one of which is right."""
        return bool(self.options)

    @property
    def choices(self) -> Choices | None:
        """How options become pairs of texts; None: it is no multiple-choice task."""
        return Choices(len(self.text) > 1, self.gap) if self.multiple_choice else None

    @property
    def has_single_classes(self) -> bool:
        """Whether one of several outputs is right: the label is neither a number nor a set of classes."""
        return not (self.regression or self.multilabel)

    @property
    def has_named_classes(self) -> bool:
        """Whether the outputs are classes with names of their own, the same for all examples: neither a number nor options."""
        return not (self.regression or self.multiple_choice)

    @property
    def main_metric(self) -> str:
        return MAIN_METRICS[self.metric]

    def names_of(self, classes: Sequence[str]) -> list[str]:
        """Return the names of these label values in the exported model."""
        own = dict(zip(self.classes or (), self.class_names or (), strict=False))
        return [own.get(value, value) for value in classes]


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
GLUE = {
    task.name: task
    for task in (
        Task(
            "cola", ("sentence",), "label", _BINARY, ("unacceptable", "acceptable"), metric="mcc",
            headerless=("source", "label", "mark", "sentence"), submissions={"test": "CoLA.tsv"},
        ),
        Task("sst2", ("sentence",), "label", _BINARY, ("negative", "positive"), submissions={"test": "SST-2.tsv"}),
        Task(
            "mrpc", ("#1 String", "#2 String"), "Quality", _BINARY, ("not_equivalent", "equivalent"),
            release=Release("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv", ("#1 ID", "#2 ID")),
            hub_columns={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
            submissions={"test": "MRPC.tsv"},
        ),
        Task(
            "qqp", ("question1", "question2"), "is_duplicate", _BINARY, ("not_duplicate", "duplicate"),
            skip_broken=True, hub_columns={"is_duplicate": "label"}, submissions={"test": "QQP.tsv"},
        ),
        Task(
            "stsb", _PAIR, "score", metric="pearson_spearman", regression=True, value_range=(0.0, 5.0),
            hub_columns={"score": "label"}, submissions={"test": "STS-B.tsv"},
        ),
        Task(
            "mnli", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), no_label="-",
            splits=("train", "dev", "dev_mismatched", "test", "test_mismatched", "test_diagnostic"),
            files={
                "dev": ("dev_matched",), "test": ("test_matched",),
                "test_diagnostic": ("diagnostic", "../diagnostic/diagnostic"),  # a folder of its own beside MNLI's
            },
            hub_columns={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
            hub_splits={"dev": "validation_matched", "dev_mismatched": "validation_mismatched", "test": "test_matched"},
            submissions={"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "test_diagnostic": "AX.tsv"},
        ),
        Task("qnli", ("question", "sentence"), "label", _ENTAILMENT, submissions={"test": "QNLI.tsv"}),
        Task("rte", _PAIR, "label", _ENTAILMENT, submissions={"test": "RTE.tsv"}),
        Task("wnli", _PAIR, "label", _BINARY, ("not_entailment", "entailment"), submissions={"test": "WNLI.tsv"}),
    )
}  # fmt: skip

OTHERS = {
    task.name: task
    for task in (
        Task(
            "race", ("article", "question"), "answer", options=("options",), has_option_lists=True, label_is="letter", gap="_",
            folders=("middle", "high"),
        ),
    )
}  # fmt: skip
"""Tasks that are known by name and not of GLUE. RACE: Lai et al. 2017, arXiv:1704.04683."""
BY_NAME = GLUE | OTHERS

GLUE_COLUMNS = frozenset(
    [
        *("index", "id", "idx", "qid1", "qid2", "#1 ID", "#2 ID", "genre", "filename", "year", "old_index", "source1", "source2"),
        *("source", "mark", "promptID", "pairID", "label1", "label2", "label3", "label4", "label5"),
        *(f"{side}{kind}_parse" for side in _PAIR for kind in ("", "_binary")),
    ]
)  # fmt: skip
"""Columns of GLUE's files that no task uses."""


_COLUMN_KEYS = ("text", "label", "kind", "label_separator", "options", "label_is", "gap")
"""Settings of `custom` alone."""


def resolve(config: TaskConfig) -> Task:
    """Return the task that a configuration names.

    Raises:
        UserError: unknown name, or a setting that does not suit the task.
    """
    task = replace(_named(config), file_split=config.split, duplicates=config.duplicates)
    if config.split and config.split.group in (*task.label_columns, *task.options):
        what = "the label column" if config.split.group in task.label_columns else "a column of options"
        raise UserError(f"{config.split.group} is {what}; name another column", "task.split.group")
    if config.split and config.split.stratify and (task.regression or not task.has_labels):
        what = "a regression has no classes" if task.regression else "needs labels, but task.label is null"
        raise UserError(f"{what}; remove it", "task.split.stratify")
    return task


def _named(config: TaskConfig) -> Task:
    if config.name == "custom":
        assert config.text, "checked by the schema"
        columns = config.label_columns
        default = METRICS_OF[config.kind or "classification"][0] if columns else AGREEMENT
        task = Task(
            "custom",
            tuple(config.text),
            columns[0] if columns else NO_LABEL,
            metric=config.metric or default,
            regression=config.kind == "regression",
            multilabel=config.is_multilabel,
            label_separator=config.label_separator or Task.label_separator,
            options=(config.options,) if isinstance(config.options, str) else tuple(config.options or ()),
            has_option_lists=isinstance(config.options, str),
            label_is=config.label_is or Task.label_is,
            gap=config.gap,
        )
        if isinstance(config.label, list):
            task = replace(task, class_columns=tuple(columns), classes=tuple(columns), class_names=tuple(columns))
        return _with_classes(task, config)
    try:
        task = BY_NAME[config.canonical_name]
    except KeyError:
        similar = difflib.get_close_matches(config.name.lower(), [*BY_NAME, "custom"], n=1)
        nearest = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(
            f"unknown task {config.name!r}; {nearest}allowed: {', '.join(sorted(BY_NAME))}, custom", "task.name"
        ) from None
    if own := [key for key in _COLUMN_KEYS if getattr(config, key) is not None]:
        raise UserError(f"is allowed only with task.name custom; {task.name} defines its own", f"task.{own[0]}")
    kind = "regression" if task.regression else "multiple_choice" if task.multiple_choice else "classification"
    if config.metric and config.metric not in METRICS_OF[kind]:
        raise UserError(f"{config.metric} cannot be used with {task.name}; use {task.metric}", "task.metric")
    if task.classes and len(task.classes) == 2:
        task = replace(task, positive_class=task.classes[1])
    return _with_classes(replace(task, metric=config.metric or task.metric), config)


def _with_classes(task: Task, config: TaskConfig) -> Task:
    """Return the task with the classes, names and positive class that the user gave.

    Raises:
        UserError: a regression has no classes, or they are not the task's.
    """
    for key, given in (("class_names", config.class_names), ("positive", config.positive)):
        if task.regression and given is not None:
            raise UserError("a regression has no classes; remove it", f"task.{key}")
    if config.class_names is not None:
        classes, names = tuple(config.class_names), tuple(config.class_names.values())
        if task.classes and sorted(classes) != sorted(task.classes):
            raise UserError(
                f"names {', '.join(classes)}; the labels of {task.name} are {', '.join(task.classes)}; give each a name",
                "task.class_names",
            )
        task = replace(task, classes=classes, class_names=names)
    if config.positive is not None:
        if task.classes and config.positive not in (*task.classes, *(task.class_names or ())):
            raise UserError(
                f"{config.positive!r} is not a class; allowed: {', '.join(task.class_names or task.classes)}",
                "task.positive",
            )
        if task.classes and len(task.classes) != 2:
            raise UserError(
                f"only two classes have a positive one; {task.name} has {len(task.classes)}", "task.positive"
            )
        task = replace(task, positive_class=config.positive, positive_is_set=True)
    return task
