"""Usage errors of `pkd` as one line: what is wrong with the command line, and where its help is."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

import typer
from pydantic import ValidationError
from typer.core import TyperGroup
from typer.exceptions import TyperException

from pkd_dist.errors import UserError

_REQUIREMENTS = {
    "int_parsing": "integer", "int_from_float": "integer", "int_type": "integer", "float_parsing": "number",
    "float_type": "number", "bool_parsing": "true/false", "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}", "greater_than": "more than {gt}", "less_than": "less than {lt}",
}  # fmt: skip
"""Type of a pydantic error -> what an option allows."""


class Group(TyperGroup):
    """The commands of `pkd`; a usage error of any of them is one line on stderr and exit status 2."""

    def make_context(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):  # type: ignore[no-untyped-def]
        with _one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # prints the help
            raise
        context, explained = getattr(error, "ctx", None), _explain(error)
        root = context.find_root().info_name if context else ""
        path = context.command_path.replace(root, "pkd", 1) if context else "pkd"
        see = " See" if explained.endswith("?") else "; see"
        print(f"pkd: {explained}{see} {path} --help", file=sys.stderr, flush=True)
        raise typer.Exit(UserError.exit_status) from None


def _explain(error: TyperException) -> str:
    """Return what is wrong, beginning with the option or argument."""
    cause, parameter = error.__cause__, getattr(error, "param", None)
    hint = max(parameter.opts, key=len) if parameter and parameter.param_type_name == "option" else ""
    hint = hint or (parameter.metavar or parameter.name.upper() if parameter else "")
    if type(error).__name__ == "MissingParameter" and hint:
        return f"{hint}: is missing"
    if isinstance(cause, ValidationError):
        first = cause.errors(include_url=False)[0]
        allowed = _REQUIREMENTS.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
        return f"{hint}: {first['input']!r} is invalid; allowed: {allowed}"
    if similar := getattr(error, "possibilities", None):
        return f"{error.message.split('. ')[0].rstrip('.').replace('No', 'no', 1)}; did you mean {similar[0]}?"
    message = re.sub(r"\s+", " ", error.format_message()).rstrip(".")
    return message[:1].lower() + message[1:]
