"""Show text that comes from users - class names, column names, paths - as it is, on a terminal and in Markdown.

HTML is escaped by Jinja's autoescape (`report/pages.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 240
_MARKDOWN = re.compile(r"[\\`*_<>|~$&]|\](?=[\[(:])")


def console(file: IO[str] | None = None) -> Console:
    """Return a console that prints brackets and colons in text as they are, not as rich's markup and emoji codes."""
    made = Console(file=file, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _FILE_WIDTH  # rich takes files and pipes for 80 columns, and shortens what does not fit
    return made


def table(*columns: str, rows: Iterable[Sequence[str]] = ()) -> Table:
    """Return a table: names in the first column, which are wrapped last, and figures in the others."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        made.add_row(*row)
    return made


def printable(text: str) -> str:
    """Return text in one line without control characters, which are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """Return Markdown that shows text as it is."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", printable(text))


def markdown_code(text: str) -> str:
    """Return a Markdown code span that shows text as it is."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}"
