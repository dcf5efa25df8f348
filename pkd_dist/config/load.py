"""Load a run configuration: YAML file and `section.key=value` overrides -> one frozen `Config`.

The YAML is read as a nested dict together with the line of each key, overrides are applied, and pydantic validates the
result (`schema.py`). All errors are a `UserError` of one line with the file and line (or "command line"), the key, and what
is allowed; for an unknown key, the most similar known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from pkd_dist.config.paths import project_path
from pkd_dist.config.presets import PRESETS
from pkd_dist.config.schema import Config
from pkd_dist.config.section import fields, section_of
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Load and validate a run configuration.

    Args:
        path: YAML file, or None to use only defaults and overrides.
        overrides: `section.key=value` strings; the value is YAML. They take precedence over the file.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of range, or contradiction.
    """
    data, lines = _read_yaml(project_path(path)) if path is not None else ({}, {})
    parsed = [_Override.parse(override) for override in overrides]
    _drop_preset_keys(data, parsed)
    for override in parsed:
        override.apply(data)
    data.pop("resolved", None)  # written to a run folder's config.yaml, which can be loaded again
    data = {section: value for section, value in data.items() if value is not None}  # `train:` alone: its defaults
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        origin = _Origin(path, lines, frozenset(".".join(override.keys) for override in parsed))
        raise UserError(_message(error, origin)) from None


# --------------------------------------------------------------------------------------------------------------- input


def _read_yaml(path: Path) -> tuple[dict[str, object], dict[str, int]]:
    """Return the nested dict of a YAML file and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        lines: dict[str, int] = {}
        for key, line in _key_lines(yaml.compose(text, Loader=yaml.SafeLoader)):
            if key in lines:
                raise UserError(f"{path}:{line}: {key} is duplicated (first on line {lines[key]}); keep one")
            lines[key] = line
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a configuration has at most three levels") from None
    except ValueError as error:  # a date that no calendar has, a number of thousands of digits
        raise UserError(f"{path}: has a value that YAML cannot read: {error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must contain sections such as `run:` and `task:`, not a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}, lines


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _key_lines(value, dotted + ".")


@dataclass(frozen=True)
class _Override:
    """A `section.key=value` argument."""

    text: str
    keys: tuple[str, ...]
    value: object

    @classmethod
    def parse(cls, text: str) -> _Override:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"command line: {text!r} is not of the form section.key=value")
        try:
            return cls(text, tuple(key.strip().split(".")), yaml.safe_load(value))
        except (yaml.YAMLError, RecursionError, ValueError):
            raise UserError(f"command line: {_shortened(text)!r}: the value is not valid YAML") from None

    def apply(self, data: dict[str, object]) -> None:
        """Set the value in a nested dict."""
        for depth, key in enumerate(self.keys[:-1], start=1):
            child = data.get(key)
            if child is None:
                child = data[key] = {}
            if not isinstance(child, dict):
                raise UserError(f"command line: {self.text!r}: {'.'.join(self.keys[:depth])} is a value, not a section")
            data = child
        data[self.keys[-1]] = self.value


def _drop_preset_keys(data: dict[str, object], overrides: Sequence[_Override]) -> None:
    """Remove the file's keys that a preset from the command line sets, since the command line takes precedence."""
    presets = [override.value for override in overrides if override.keys == ("distill", "preset")]
    distill = data.get("distill")
    if presets and isinstance(distill, dict):
        preset = PRESETS.get(str(presets[-1]), {})
        data["distill"] = {key: value for key, value in distill.items() if key not in preset}


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


# -------------------------------------------------------------------------------------------------------------- errors


@dataclass(frozen=True)
class _Origin:
    """Where keys were set.

    Attributes:
        path: the YAML file, if any.
        lines: its lines by dotted key.
        overrides: dotted keys from the command line.
    """

    path: str | Path | None
    lines: dict[str, int]
    overrides: frozenset[str]

    def of(self, key: str) -> str:
        """Return where a dotted key, or the closest section around it, was set."""
        parts = key.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        nearest = next((name for name in prefixes if name in self.lines or name in self.overrides), key)
        if nearest in self.overrides or any(name.startswith(f"{key}.") for name in self.overrides):
            return "command line"
        if self.path is None:
            return "configuration"
        return f"{self.path}:{self.lines[nearest]}" if nearest in self.lines else str(self.path)


def _message(error: ValidationError, origin: _Origin) -> str:
    """Return one line about the first mistake: where it is, which key, what is wrong, and what is allowed."""
    errors = error.errors(include_url=False)
    first = errors[0]
    path = _key_path(first)
    key = ".".join(map(str, path))
    where = origin.of(key)
    if first["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key; {_suggestion(key)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    if first["type"] == "value_error" and key in _sections():
        return f"{where}: {_requirement(first)}"  # the validator of a section names the keys itself
    # A value that matches no type of a union has one error per type.
    of_key = [other for other in errors if other["loc"][: len(path)] == path] or [first]
    allowed = "; or ".join(dict.fromkeys(map(_requirement, of_key)))
    shown = first["type"] != "value_error" and isinstance(first["input"], (str, int, float, list))
    return f"{where}: {key}: {first['input']!r} is invalid: {allowed}" if shown else f"{where}: {key}: {allowed}"


def _key_path(error: ErrorDetails) -> tuple[str | int, ...]:
    """Return the keys and list positions of an error's location, without the names of union types."""
    if error["type"] == "extra_forbidden":
        return error["loc"]
    known = {part for name, _ in fields(Config) for part in name.split(".")}
    return tuple(part for part in error["loc"] if part in known or isinstance(part, int))


def _sections() -> set[str]:
    """Return the dotted names of all sections; "" is the whole configuration."""
    return {"", *(name for name, field in fields(Config) if section_of(field))}


def _requirement(error: ErrorDetails) -> str:
    """Return what is allowed, as pydantic or one of our validators says it."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return error["msg"][:1].lower() + error["msg"][1:]


def _suggestion(key: str) -> str:
    known = [name for name, _ in fields(Config)]
    similar = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        name for name in known if name.split(".")[-1] == key.split(".")[-1]
    ]
    return f"did you mean {similar[0]}?" if similar else "`pkd config reference` lists the known keys"
