"""The typed schema of a run: strict YAML in, one frozen `Config` out.

Data flow: YAML file + command-line overrides -> nested dict -> pydantic models (types, ranges, cross-checks) -> the
DeepSpeed JSON it names (`load_deepspeed`), checked against the YAML. Every setting has one owner: batch, accumulation,
learning rate and clipping belong to the YAML; ZeRO, precision and offload to the DeepSpeed JSON.

Every mistake is a `UserError` of one line that names the file (and line), the key, what is allowed and, for an unknown
key, the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pkd_dist.config.deepspeed import project_path
from pkd_dist.config.schema import PRESETS, Config, _all_keys, _fields
from pkd_dist.errors import UserError


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a run configuration.

    Args:
        path: YAML file, or None for defaults alone.
        overrides: `section.key=value` strings; the value is YAML.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of range, contradiction.
    """
    data, lines = _read_yaml(project_path(path)) if path is not None else ({}, {})
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
