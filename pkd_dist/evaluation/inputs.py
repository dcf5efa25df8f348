"""What `pkd predict` classifies: texts of the command line, lines of a file or of standard input, rows of a table.

texts, lines or rows -> checked examples, each with its place for messages and the other columns of its row
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkd_dist.data import multiple_choice
from pkd_dist.data.rows import FILE_EXTENSIONS, is_table, read_file
from pkd_dist.data.tables import NUL_REMEDY, TableSpec
from pkd_dist.data.tasks import GLUE, NO_LABEL, Task
from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import is_empty


@dataclass(frozen=True)
class Example:
    """The one or two texts of an input, and its options where it has some.

    Attributes:
        place: For messages.
        columns: Of its row, the others.
    """

    place: str
    texts: tuple[str, ...]
    columns: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What a model was trained to read.

    Attributes:
        pair: Whether an input is two texts; None: unknown.
        columns: The text columns of its data; empty: unknown.
        headerless: All columns of a TSV file of its data that has no header line.
        options: The columns of the options that it chooses among; empty: it does not choose.
        option_lists: Whether that is one column of lists.
        gap: Text in a question whose place an option takes.
    """

    pair: bool | None = None
    columns: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    option_lists: bool = False
    gap: str | None = None

    def task(self, columns: tuple[str, ...]) -> Task:
        """Return what reads these text columns, and the options."""
        return Task(
            "custom", columns, NO_LABEL, headerless=self.headerless, options=self.options, has_option_lists=self.option_lists,
            gap=self.gap,
        )  # fmt: skip

    def require(self, pair: bool, where: str) -> None:
        """Raise UserError if the model takes single texts and is given pairs, or the other way round."""
        if self.pair not in (None, pair):
            takes, given = ("pairs of texts", "single texts") if self.pair else ("single texts", "pairs of texts")
            raise UserError(f"{where}: the model takes {takes}, not {given}; give it the form that it was trained on")


def form_of(trained: Mapping[str, Any], options: Sequence[str] | None = None, gap: str | None = None) -> Form:
    """Return what a model was trained to read.

    Args:
        trained: The manifest of its export; empty: unknown.
        options: The columns of the options, one of lists or one for each; None: as trained.
        gap: See `Form`; None: as trained.

    Raises:
        UserError: There is a gap without options.
    """
    if gap and not (options or trained.get("options")):
        raise UserError("is the place of an option, but no options are named; give --options, or remove it", "--gap")
    task = GLUE.get(trained.get("task", ""))
    return Form(
        pair=trained.get("pair"),
        columns=tuple(trained.get("text_columns", ())),
        headerless=task.headerless if task else (),
        options=tuple(options or trained.get("options", ())),
        option_lists=len(options) == 1 if options else trained.get("option_lists", False),
        gap=gap or trained.get("gap"),
    )


def read(
    texts: Sequence[str], file: str, columns: Sequence[str], pair: bool, form: Form, notes: list[str]
) -> Iterator[Example]:
    """Return the examples of a command line, which are read as they are taken.

    Args:
        texts: Those of the command line; empty: read `file`.
        file: A table, known by its extension, or a text a line; `-`: standard input.
        columns: The text columns of the table; empty: those of `form`.
        pair: An input is a pair, whatever `form` knows.
        notes: What a user should know about how the inputs were read is added to it. Complete once all were taken.

    Raises:
        UserError: The file cannot be read, or an input is empty or has not the form that the model takes.
    """
    table = not texts and is_table(Path(file))
    if form.options and not table:
        raise UserError(
            f"the model chooses among options; give a table (.{', .'.join(FILE_EXTENSIONS)}) with their columns, "
            f"{', '.join(form.options)}, and those of the texts", "--file",
        )  # fmt: skip
    if not (texts or table or Path(file).suffix in ("", ".txt")):
        raise UserError(
            f"--file: {file} is neither a table (.{', .'.join(FILE_EXTENSIONS)}) nor .txt, a text a line; rename it"
        )
    if columns and not table:
        raise UserError(f"names a column of a table; give one with --file (.{', .'.join(FILE_EXTENSIONS)})", "--text")
    if len(columns) > 2 or (pair and len(columns) == 1):
        raise UserError(f"{len(columns)} column(s); give one for single texts and two for pairs", "--text")
    if len(set(columns)) < len(columns):
        raise UserError(f"{columns[0]!r} is given twice; a pair needs two columns", "--text")
    if form.options:
        _require_option_columns(tuple(columns) or form.columns, form)
    if pair or columns:
        form.require(pair or len(columns) == 2, "--text" if columns else "--pair")
    if table:
        _require_readable(file)
        return _rows(Path(file), tuple(columns) or form.columns, form, notes)
    given = (
        ((f"text {i}", text) for i, text in enumerate(texts, start=1))
        if texts
        else _no_header(lines(file, notes), form)
    )
    return (_example(place, text, pair or bool(form.pair), form) for place, text in given)


def _require_option_columns(columns: Sequence[str], form: Form) -> None:
    """Raise UserError if a column has two uses, or options have a gap to fill and there is no question."""
    found = [*columns, *form.options]
    if both := next((name for name in form.options if found.count(name) > 1), None):
        raise UserError(f"{both!r} is given twice; options need columns of their own", "--options")
    if form.gap and len(columns) == 1:
        raise UserError(
            "is a place in the question, but --text names a context alone; remove it, or name both", "--gap"
        )


def _require_readable(file: str) -> None:
    try:
        open(file, "rb").close()
    except OSError as error:
        raise UserError(f"--file: {file} cannot be read ({error.strerror})") from None


def lines(file: str, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each non-blank line of a file, or of standard input (`-`). A note tells how many are blank.

    Raises:
        UserError: The file cannot be read, or a line is not UTF-8 or contains a NUL.
    """
    name = "standard input" if file == "-" else file
    if file != "-":
        _require_readable(file)
    blank = 0
    with sys.stdin.buffer if file == "-" else open(file, "rb") as source:
        for number, line in enumerate(source, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name}:{number}: byte 0x{line[error.start]:02x} is not valid UTF-8; save the text as UTF-8"
                ) from None
            if "\0" in text:
                raise UserError(f"{name}:{number}: contains a NUL character; {NUL_REMEDY}")
            if text.strip():
                yield f"{name}:{number}", text
            else:
                blank += 1
    if blank:
        notes.append(f"{name}: {blank:,} blank line(s) skipped")


def _no_header(given: Iterator[tuple[str, str]], form: Form) -> Iterator[tuple[str, str]]:
    """Yield lines.

    Raises:
        UserError: The first one names the text columns, as the header of a table does.
    """
    for number, (place, text) in enumerate(given):
        names = {name.strip(' "') for name in re.split("[\t,;]", text)}
        if not number and form.columns and names.issuperset(form.columns):
            raise UserError(
                f"{place}: {text!r} is the header of a table; give the table with --file, or its text without the header"
            )
        yield place, text


def _example(place: str, text: str, pair: bool, form: Form) -> Example:
    halves = tuple(text.split("\t")) if pair else (text,)
    if pair and len(halves) != 2:
        raise UserError(
            f"{place}: a pair needs two texts separated by one tab (in a shell, $'one\\ttwo'), but this has {len(halves)}; or give a "
            "table of pairs, --file PAIRS.csv"
        )
    if form.pair is False and "\t" in text:
        raise UserError(
            f"{place}: has a tab, as a pair or a row of a table, but the model takes single texts; give a table with --file and "
            "--text, or write a space for the tab"
        )
    return checked(Example(place, halves))


def checked(example: Example, width: int | None = None) -> Example:
    """Return an example whose text can be read; one half of a pair may be empty.

    Args:
        width: The number of its texts without its options; None: it has none.

    Raises:
        UserError: All its text is empty, or it is not UTF-8.
    """
    if all(map(is_empty, example.texts[:width])):
        raise UserError(f"{example.place}: the text is empty; every input needs one")
    if any("\ud800" <= character <= "\udfff" for text in example.texts for character in text):
        raise UserError(f"{example.place}: the text is not UTF-8, or has half of a surrogate pair")
    return example


# -------------------------------------------------------------------------------------------------------------- tables


def _rows(path: Path, columns: tuple[str, ...], form: Form, notes: list[str]) -> Iterator[Example]:
    """Yield the rows of a table: the columns that the model reads as training reads them, the others as they are."""
    if not columns:
        raise UserError(f"name the text column of {path}, or give it twice for the two of a pair", "--text")
    task = form.task(columns)
    spec = TableSpec(task.inputs, headerless=task.headerless, keep_others=True, lists=task.list_columns)
    table = read_file(path, spec)
    rows = table.rows
    if task.multiple_choice:
        rows, _ = multiple_choice.with_option_columns(rows, table, task, 0)
    for number, values in rows:
        example = Example(table.at(number), tuple(value or "" for value in values), dict(table.others))
        yield checked(example, len(task.text))
    notes.extend(f"{path}: {note}" for note in table.notes)
