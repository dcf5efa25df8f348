"""The methods of a comparison: each is a set of overrides of the run's configuration."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from pkd_dist.config.presets import PRESETS
from pkd_dist.errors import UserError

Overrides = dict[str, object]
"""Dotted key -> value."""

METHODS: dict[str, Overrides] = {
    "finetune": {"distill.alpha": 0.0, "distill.beta": 0.0},
    "kd": {"distill.beta": 0.0},
    "pkd-skip": {"distill.patience": "skip"},
    "pkd-last": {"distill.patience": "last"},
    "random": {"student.init": "random"},
    "first-k": {"student.init": "first_k"},
    "tokens": {"distill.states": "tokens"},
    "seed": {"distill.preset": "seed", **{f"distill.{key}": value for key, value in PRESETS["seed"].items()}},
    "strong": {"distill.preset": "strong"},
}
"""Methods by name; other settings are the configuration's. `finetune` learns from labels alone, `kd` also from the teacher's
predictions, `pkd-skip` and `pkd-last` also from its layers. `random` and `first-k` start from other weights, `tokens` compares
the hidden states of all tokens, `seed` uses the loss of the OneFlow implementation, `strong` the recipe of that preset."""


class Raw(str):
    """A value as it was typed, in YAML."""


def parse_methods(names: str, custom: Sequence[str]) -> dict[str, Overrides]:
    """Return the methods of `--methods a,b` and of each `--method "NAME: section.key=value ..."`.

    Raises:
        UserError: A name is unknown or duplicated, or a custom method has another form.
    """
    chosen: dict[str, Overrides] = {}
    for name in (part.strip() for part in names.split(",") if part.strip()):
        if name not in METHODS:
            raise UserError(f"{name!r} is unknown; allowed: {', '.join(METHODS)}; --method defines others", "--methods")
        if name in chosen:
            raise UserError(f"{name} is duplicated; name each method once", "--methods")
        chosen[name] = METHODS[name]
    for given in custom:
        name, overrides = _parse_custom(given)
        if not re.fullmatch(r"[\w+-]+", name):
            raise UserError(f"the name {name!r} is invalid; allowed: letters, digits and - + _", "--method")
        if name in chosen:
            raise UserError(
                f"the name {name!r} is taken by another method of this comparison; choose another", "--method"
            )
        if name in ("teacher", "bases", "workers"):
            raise UserError(f"the name {name!r} is reserved for a folder of the comparison; choose another", "--method")
        chosen[name] = overrides
    if not chosen:
        raise UserError(f"name at least one of {', '.join(METHODS)}", "--methods")
    return chosen


def _parse_custom(given: str) -> tuple[str, Overrides]:
    name, colon, rest = given.partition(":")
    try:
        pairs = [part.partition("=") for part in shlex.split(rest)]
    except ValueError:
        raise UserError(f"{given!r} has an unclosed quotation mark", "--method") from None
    if not colon or not pairs or not all(key and equals for key, equals, _ in pairs):
        raise UserError(f'{given!r} is not of the form "NAME: section.key=value section.key=value"', "--method")
    return name.strip(), {key: Raw(value) for key, _, value in pairs}


def as_arguments(overrides: Mapping[str, object]) -> list[str]:
    """Return overrides as `section.key=value` arguments of the launcher."""
    return [f"{key}={value if isinstance(value, Raw) else json.dumps(value)}" for key, value in overrides.items()]
