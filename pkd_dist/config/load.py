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
from pkd_dist.config.presets import PRESETS, RECIPES
from pkd_dist.config.schema import Config
from pkd_dist.config.section import fields, section_of, type_names
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
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
    _add_recipe(data)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        origin = _Origin(path, lines, frozenset(".".join(override.keys) for override in parsed))
        raise _user_error(error, origin) from None


def replaced_by_preset(path: str | Path, overrides: Sequence[str], config: Config) -> list[str]:
    """Return the settings of the file that a preset from the command line replaces, such as `train.epochs 4 by 2`.

    Args:
        config: what `load` made of the same.
    """
    dropped = _drop_preset_keys(
        _read_yaml(project_path(path))[0], [_Override.parse(override) for override in overrides]
    )
    given = {override.partition("=")[0].strip() for override in overrides}
    found = []
    for key, before in dropped.items():
        now: object = config
        for name in key.split("."):
            now = getattr(now, name, None)
        if now != before and not any(key == name or key.startswith(f"{name}.") for name in given):
            found.append(f"{key} {before} by {now}")
    return found


# --------------------------------------------------------------------------------------------------------------- input


def _read_yaml(path: Path) -> tuple[dict[str, object], dict[str, int]]:
    """Return the nested dict of a YAML file and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        inside = path / "config.yaml"  # of a run folder
        raise UserError(f"{path}: is a folder; give a YAML file{f', {inside}' if inside.is_file() else ''}") from None
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


def _drop_preset_keys(data: dict[str, object], overrides: Sequence[_Override]) -> dict[str, object]:
    """Remove the file's keys that a preset from the command line sets, since the command line takes precedence.

    Returns:
        The removed values by dotted key.
    """
    presets = [override.value for override in overrides if override.keys == ("distill", "preset")]
    preset, dropped = str(presets[-1]) if presets else "", {}
    for section, values in {("distill",): PRESETS.get(preset, {}), **RECIPES.get(preset, {})}.items():
        found = _section(data, section)
        for key in [key for key in values if key in found]:
            dropped[".".join((*section, key))] = found.pop(key)
    return dropped


def _add_recipe(data: dict[str, object]) -> None:
    """Add what the preset sets outside of `distill`, where it is not given; a section that is given as null stays so."""
    preset = str(_section(data, ("distill",)).get("preset"))
    for section, values in RECIPES.get(preset, {}).items():
        place: dict[str, object] | None = data
        for key in section:
            place = None if place is None else _child(place, key)
        if place is not None:
            place.update({key: value for key, value in values.items() if key not in place})


def _section(data: dict[str, object], keys: Sequence[str]) -> dict[str, object]:
    """Return a section as it is given; empty where it is not."""
    for key in keys:
        child = data.get(key)
        if not isinstance(child, dict):
            return {}
        data = child
    return data


def _child(data: dict[str, object], key: str) -> dict[str, object] | None:
    """Return a section, made where it is missing; None where it is given as something else."""
    child = data.setdefault(key, {})
    return child if isinstance(child, dict) else None


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


def _user_error(error: ValidationError, origin: _Origin) -> UserError:
    """Return one line about the first mistake: where it is, which key, what is wrong, and what is allowed."""
    errors = error.errors(include_url=False)
    first = next((other for other in errors if other["type"] == "extra_forbidden"), errors[0])
    key = ".".join(_keys(first))
    where = origin.of(key)
    if first["type"] == "extra_forbidden":
        return UserError(f"unknown key; {_suggestion(key)}", key, where)
    known = dict(fields(Config))
    if first["type"] == "missing":
        key = next(name for name, field in known.items() if f"{name}.".startswith(f"{key}.") and not section_of(field))
        return UserError(f"is missing; it needs a value ({_meaning(known[key])})", key, where)
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])  # the validator of a section names the keys itself
        return UserError(message, None if key in ("", *filter(None, map(_section_name, known.items()))) else key, where)
    given, names = first["input"], type_names(known[key].annotation, known[key].metadata)
    if given in (None, "") and names == ["text"]:
        return UserError(f"is empty; it needs a value ({_meaning(known[key])})", key, where)
    return UserError(f"{_shown(given)} is invalid; allowed: {_allowed(first, key, known[key], names)}", key, where)


def _keys(error: ErrorDetails) -> tuple[str, ...]:
    """Return the keys of an error's location, without list positions and the names of union types."""
    if error["type"] == "extra_forbidden":
        return tuple(map(str, error["loc"]))
    known = {part for name, _ in fields(Config) for part in name.split(".")}
    return tuple(str(part) for part in error["loc"] if part in known)


def _section_name(named: tuple[str, FieldInfo]) -> str | None:
    return named[0] if section_of(named[1]) else None


def _meaning(field: FieldInfo) -> str:
    """Return the first sentence of a key's description."""
    first = (field.description or "").split(". ")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def _shown(value: object) -> str:
    """Return a value of the YAML for a message."""
    if isinstance(value, dict):
        return "a section"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _allowed(error: ErrorDetails, key: str, field: FieldInfo, names: list[str]) -> str:
    if error["type"] == "finite_number":
        return "a finite number"
    if error["type"] == "too_short":
        return f"at least {error['ctx']['min_length']} entry"
    if section := section_of(field):
        example = f"a section of keys such as {key}.{next(iter(section.model_fields))}"
        names = [example if name == "section" else name for name in names]
    return " or ".join(names).replace("`", "")


_SYNONYMS = {
    "lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "n_epochs": "epochs", "num_epochs": "epochs",
    "num_train_epochs": "epochs", "wd": "weight_decay", "warmup": "warmup_ratio", "clip": "max_grad_norm",
    "grad_clip": "max_grad_norm", "gradient_clipping": "max_grad_norm", "eps": "adam_epsilon", "t": "temperature",
    "temp": "temperature", "max_len": "max_length", "max_seq_length": "max_length", "seq_len": "max_length",
    "path": "dir", "folder": "dir", "output_dir": "dir", "out": "dir", "n_layers": "num_layers",
    "depth": "num_layers", "width": "hidden_size", "labels": "label", "type": "kind", "precision": "dtype",
    "save_steps": "every_steps", "interval": "every_steps", "format": "formats", "project": "wandb_project",
    "zero": "deepspeed", "timeout": "timeout_seconds",
}  # fmt: skip
"""What other tools call a key -> its last part here."""


def _suggestion(key: str) -> str:
    """Return the key of the same section that is most similar, or the keys of the section."""
    known = [name for name, _ in fields(Config)]
    section, _, last = key.rpartition(".")
    while section and section not in known:
        section, _, last = section.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    wanted = _SYNONYMS.get(last.lower(), last)
    if similar := difflib.get_close_matches(wanted, siblings, n=1):
        return f"did you mean {siblings[similar[0]]}?"
    if section:
        return f"the keys of {section} are {', '.join(siblings)}"
    elsewhere = sorted((name for name in known if name.split(".")[-1] == wanted), key=lambda name: name.count("."))
    return f"did you mean {elsewhere[0]}?" if elsewhere else "`pkd config reference` lists the known keys"
