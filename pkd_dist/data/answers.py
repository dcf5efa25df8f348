"""The teacher's answers from files: read, checked, and matched with the examples of a task.

    teacher.answers: tables of class columns -> checked rows -> logits by example -> RUN/data/answers.safetensors

A row belongs to the example that its column `id` names; without one, to the example with its text; with neither, the rows of
the file SPLIT.* are in the order of that split. Column names and kinds of values: docs/data.md.

Shapes: N examples, C classes (1 for a regression).
"""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pkd_dist.data import multilabel, multiple_choice
from pkd_dist.data.class_values import ClassIndex
from pkd_dist.data.examples import Split, example_ids, text_hashes
from pkd_dist.data.rows import is_table, read_file
from pkd_dist.data.tables import Fields, Table, TableSpec
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError
from pkd_dist.files import write_atomically

FILE = "answers.safetensors"
KEY = "teacher.answers"
ID, PREDICTION = "id", "prediction"
"""The columns of the example id, and of a regression's value."""
LEAST = 1e-6
"""A probability that is smaller counts as this much, so that its logarithm is finite; of multi-label also one that is nearer to 1."""
_CERTAIN = 0.999
"""Probability of a class that is given as a label."""
_SUM_TOLERANCE = 1e-3
_LARGEST = {"logits": 3e4, PREDICTION: 1e30}
"""Absolute values that a cache of half precision, or a float32, can hold."""


def paths_of(files: Sequence[str]) -> list[Path]:
    """Return the paths of the files. Raise UserError if one is missing or no table."""
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"no such file: {name}" if not path.exists() else f"{name} is a folder; name its files", KEY
            )
        if not is_table(path):
            raise UserError(f"{name} is not a table: .csv, .tsv, .jsonl, .json, or .parquet", KEY)
    return [Path(name) for name in files]


def read(
    files: Sequence[str], kind: str, task: Task, splits: Mapping[str, Split], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the answers to all examples of some splits.

    Args:
        files: `teacher.answers`.
        kind: `teacher.answers_are`.
        splits: split -> its examples; all must be answered.
        names: class names in the order of the logits; empty for a regression.

    Returns:
        Split -> logits (N, C) float32, and notes for people.

    Raises:
        UserError: a row is invalid, or not every example has one answer.
    """
    classes = next(iter(splits.values())).classes
    columns = _Columns(kind, task, dict(zip(names, classes, strict=True)) if names else {})
    known = set[int]().union(*(split.ids_N.tolist() for split in splits.values()))
    found: dict[str, dict[int, tuple[np.ndarray, str]]] = {}
    for path in paths_of(files):
        own = found.setdefault(_split_of(path, splits), {})
        for example, logits_C, place in _rows(path, columns, splits, known):
            if example in own:
                raise UserError(f"{place}: answers the same example as {own[example][1]}; keep one")
            own[example] = logits_C, place
    matched = {name: _matched(name, split, found, files) for name, split in splits.items()}
    used = {place for answers in matched.values() for _, place in answers}
    extra = sum(example not in known for own in found.values() for example in own)
    overridden = sum(map(len, found.values())) - extra - len(used)
    logits = {name: np.stack([logits_C for logits_C, _ in answers]) for name, answers in matched.items()}
    return {name: logits_NC.astype(np.float32) for name, logits_NC in logits.items()}, [
        *columns.notes(),
        *([f"{extra:,} answers belong to no example; they are ignored"] if extra else []),
        *(
            [f"{overridden:,} answers are ignored: the file named after the split answers the same examples"]
            if overridden
            else []
        ),
    ]


def _split_of(path: Path, splits: Collection[str]) -> str:
    """Return the split that a file is named after; empty: none."""
    stem = path.name.partition(".")[0]
    return stem if stem in splits else ""


def _matched(
    name: str, split: Split, found: Mapping[str, Mapping[int, tuple[np.ndarray, str]]], files: Sequence[str]
) -> list[tuple[np.ndarray, str]]:
    """Return the answer to each example of a split, and its place: that of a file of its name before any other, as two may differ."""
    by_preference = {example: answer for own in found.values() for example, answer in own.items()} | dict(
        found.get(name, {})
    )
    missing = [row for row, example in enumerate(split.ids_N.tolist()) if example not in by_preference]
    if missing:
        text = reprlib.repr(" + ".join(column[missing[0]] for column in split.texts))
        raise UserError(
            f"{', '.join(files)}: no answer to {len(missing):,} of {len(split):,} examples of {name}; the first is {text} "
            f"({split.source}, example {missing[0] + 1}); every example needs one", KEY,
        )  # fmt: skip
    return [by_preference[example] for example in split.ids_N.tolist()]


def _rows(
    path: Path, columns: _Columns, splits: Mapping[str, Split], known: set[int]
) -> list[tuple[int, np.ndarray, str]]:
    """Return (example id, logits (C,), place) of each row of a file; `known`: the ids of all examples."""
    task, labels = columns.task, columns.label_columns
    table = read_file(path, TableSpec(labels, keep_others=True, lists=task.list_columns))
    ids, logits, places = array("q"), list[np.ndarray](), list[str]()
    texts: list[list[str]] = [[] for _ in next(iter(splits.values())).texts]
    by_id = by_text = False
    for number, cells in table.rows:
        record, place = table.others, table.at(number)
        if not logits:
            by_id, by_text = (
                ID in record and ID not in columns.reserved,
                all(name in record and name not in columns.reserved for name in task.inputs),
            )
            columns.require(record, f"{path}:1" if table.unit == "line" else str(path))
        logits.append(columns.logits_of(record, cells, place))
        places.append(place)
        if by_id:
            ids.append(_id_of(record, place))
        elif by_text:
            for column, value in zip(texts, _texts_of(record, task, len(texts), place), strict=True):
                table.require_unicode(number, "the text", value)
                column.append(value)
    if not logits:
        raise UserError(f"{path}: has no answers")
    if by_text and not by_id:
        ids = array("q", example_ids(texts).tolist())
        _require_consistent(ids, text_hashes(texts).tolist(), logits, places, known)
    if not (by_id or by_text):
        ids = _in_order(path, table, len(logits), splits)
    return list(zip(ids, logits, places, strict=True))


def _texts_of(record: Mapping[str, object], task: Task, count: int, place: str) -> list[str]:
    """Return the texts of a row, `count` of them with its options."""
    texts = TableSpec(task.inputs, lists=task.list_columns).fields(record, lambda: place)
    if task.has_option_lists:
        texts[-1:] = multiple_choice.options_of(texts[-1], place, task)
    if len(texts) != count:
        given, own = (each - len(task.text) for each in (len(texts), count))
        raise UserError(f"{place}: {task.options[0]} has {given} options, the data has {own}")
    return [text or "" for text in texts]


def _require_consistent(
    ids: Sequence[int],
    hashes: Sequence[int],
    logits: Sequence[np.ndarray],
    places: Sequence[str],
    known: set[int],
) -> None:
    """Raise UserError if a text has more answers than the data has examples of it, and they differ."""
    first: dict[int, int] = {}
    for row, (example, text) in enumerate(zip(ids, hashes, strict=True)):
        earlier = first.setdefault(text, row)
        if example not in known and text in known and not np.array_equal(logits[row], logits[earlier]):
            raise UserError(f"{places[row]}: contradicts {places[earlier]}, the answer to the same text; keep one")


def _in_order(path: Path, table: Table, rows: int, splits: Mapping[str, Split]) -> array[int]:
    """Return the ids of the split that a file is named after."""
    split = _split_of(path, splits)
    if not split:
        raise UserError(
            f"{path}: has neither a column {ID!r} nor the text, so its name must be that of the split whose order it has: "
            f"{', '.join(f'{name}.csv' for name in splits)}"
        )
    if rows != len(splits[split]):
        raise UserError(f"{path}: has {rows:,} answers, {splits[split].source} has {len(splits[split]):,} examples")
    return array("q", splits[split].ids_N.tolist())


def _id_of(record: Mapping[str, object], place: str) -> int:
    try:
        found = int(str(record[ID]))
    except (ValueError, KeyError):
        raise UserError(f"{place}: {ID} {reprlib.repr(record.get(ID))} is not an example id, a whole number") from None
    if not -(2**63) <= found < 2**63:
        raise UserError(f"{place}: {ID} {found} has more than 64 bits")
    return found


@dataclass
class _Columns:
    """The columns of answers, and how their values become logits.

    Attributes:
        values: class name -> label value, in the order of the logits; empty for a regression.
    """

    kind: str
    task: Task
    values: Mapping[str, str]
    spread: int = 0
    rescaled: int = 0

    def __post_init__(self) -> None:
        self._index = ClassIndex(tuple(self.values.values()), self.task, KEY)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels, which are read as those of the data."""
        return self.task.label_columns if self.values and self.kind == "labels" else ()

    @property
    def reserved(self) -> set[str]:
        """Names and values of classes."""
        return {*self.values, *self.values.values()}

    def require(self, record: Mapping[str, object], where: str) -> None:
        """Find the columns in the first row of a file."""
        if not self.values and PREDICTION not in record:
            raise UserError(f"{where}: has no column {PREDICTION!r}; it has {_listed(record)}")
        if not self.values or self.kind == "labels":
            return
        for name, value in self.values.items():
            if name != value and name in self.values.values():
                raise UserError(
                    f"{where}: the class name {name!r} is the label value of another class, so the column {name!r} could be either; "
                    "choose other names", "task.class_names",
                )  # fmt: skip
        missing = [name for name, column in zip(self.values, self._of(record), strict=True) if column is None]
        if missing and (self.kind != "log_probabilities" or len(missing) == len(self.values)):
            raise UserError(
                f"{where}: has no column {missing[0]!r}, a class of {self.task.name}; it has {_listed(record)}; name the columns "
                f"as the classes: {', '.join(self.values)}"
            )

    def logits_of(self, record: Mapping[str, object], labels: Fields, place: str) -> np.ndarray:
        """Return a row's logits, (C,) float64.

        Args:
            record: column -> value, without `label_columns`.
            labels: the values of these.
        """
        if not self.values:
            return _small(np.array([_number(record.get(PREDICTION), PREDICTION, place)]), PREDICTION, place)
        if self.kind == "labels":
            return self._of_labels([cell or "" for cell in labels], place)
        given = [
            None if column is None or record[column] in (None, "") else _number(record[column], column, place)
            for column in self._of(record)
        ]
        if self.kind == "log_probabilities":
            return self._from_log(given, place)
        if None in given:
            raise UserError(f"{place}: {list(self.values)[given.index(None)]} is empty; every class needs a number")
        values_C = np.array(given, np.float64)
        if self.kind == "logits":
            return _small(values_C, self.kind, place)
        if (values_C < 0).any() or (values_C > 1).any():
            other = "logits" if self.task.multilabel else "logits or log_probabilities"
            raise UserError(
                f"{place}: {_shown(values_C)} are not probabilities, which are from 0 to 1; for other numbers set {KEY}_are "
                f"to {other}"
            )
        if self.task.multilabel:
            return _log_odds(np.clip(values_C, LEAST, 1 - LEAST))
        if abs(values_C.sum() - 1) > _SUM_TOLERANCE:
            raise UserError(f"{place}: the probabilities {_shown(values_C)} sum to {values_C.sum():.4g}, not to 1")
        return np.log(np.maximum(values_C, LEAST))

    def _of(self, record: Mapping[str, object]) -> list[str | None]:
        """Return the column of each class in a row; None where a JSON object lacks it."""
        return [next((key for key in pair if key in record), None) for pair in self.values.items()]

    def _from_log(self, given: Sequence[float | None], place: str) -> np.ndarray:
        if all(value is None for value in given):
            raise UserError(f"{place}: has no log-probability of any class: {', '.join(self.values)}")
        if any(value is not None and value > 1e-9 for value in given):
            raise UserError(
                f"{place}: {max(v for v in given if v is not None):g} is not a log-probability, which is at most 0"
            )
        known_C = np.array([0.0 if value is None else math.exp(value) for value in given])
        unknown_C = np.array([value is None for value in given])
        if known_C.sum() > 1 + _SUM_TOLERANCE:
            raise UserError(
                f"{place}: the probabilities of these log-probabilities sum to {known_C.sum():.4g}, more than 1"
            )
        rest = max(0.0, 1 - known_C.sum())
        if unknown_C.any():
            self.spread += 1
            known_C[unknown_C] = rest / unknown_C.sum()
        elif rest > _SUM_TOLERANCE:
            self.rescaled += 1
        known_C = np.maximum(known_C, LEAST)
        return np.log(known_C / known_C.sum())

    def _of_labels(self, cells: Sequence[str], place: str) -> np.ndarray:
        """Return the logits of a class, or of any number of classes, that are given as in the data."""
        several, count = self.task.multilabel, len(self.values)
        given = multilabel.given(cells, lambda: place, self.task) if several else [cells[0].strip()]
        share_C = np.full(count, (1 - _CERTAIN) / (1 if several else max(1, count - 1)))
        for label in given:
            share_C[self._index.of(label, lambda: place)] = _CERTAIN
        return _log_odds(share_C) if several else np.log(share_C)

    def notes(self) -> list[str]:
        """Return what people should know of the answers that were read."""
        found = []
        if self.spread:
            found.append(
                f"{self.spread:,} answers lack classes; what their log-probabilities leave of 1 is spread evenly over those"
            )
        if self.rescaled:
            found.append(f"the probabilities of {self.rescaled:,} answers sum to less than 1; they were scaled to 1")
        if self.kind == "labels":
            other = f", any other as {1 - _CERTAIN:.3f}" if self.task.multilabel else ""
            found.append(f"the class of an answer counts as a probability of {_CERTAIN}{other}")
        return found


def _log_odds(share_C: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(share_C) - np.log1p(-share_C))


def _small(values_C: np.ndarray, kind: str, place: str) -> np.ndarray:
    if (np.abs(values_C) > _LARGEST[kind]).any():
        raise UserError(
            f"{place}: {_shown(values_C)} are no {kind}: the largest that is accepted is {_LARGEST[kind]:g}"
        )
    return values_C


def _number(value: object, column: str, place: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{place}: {column} {reprlib.repr(value)} is not a number") from None
    if not math.isfinite(found):
        raise UserError(f"{place}: {column} is {found}, not a finite number")
    return found


def _listed(record: Mapping[str, object]) -> str:
    return ", ".join(map(repr, [*record][:10])) + (", ..." if len(record) > 10 else "")


def _shown(values_C: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values_C[:6]) + (", ..." if len(values_C) > 6 else "")


def write(path: Path, answers: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file  # not on a machine that only submits jobs

    write_atomically(path, partial(save_file, dict(answers)), sum(each.nbytes for each in answers.values()))


def load(path: Path) -> dict[str, np.ndarray]:
    """Return what `write` wrote."""
    from safetensors.numpy import load_file

    return load_file(path)
