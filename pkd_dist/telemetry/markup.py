"""Show text that comes from users - class names, column names, paths - as it is, on a terminal and in Markdown.

HTML is escaped by Jinja's autoescape (`report/pages.py`).
"""

from __future__ import annotations

import re
from typing import IO

from rich.console import Console

_MARKDOWN = re.compile(r"[\\`*_<>|~$&]|\](?=[\[(:])")


def console(file: IO[str] | None = None) -> Console:
    """Return a console that prints brackets and colons in text as they are, not as rich's markup and emoji codes."""
    return Console(file=file, markup=False, emoji=False, highlight=False)


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
