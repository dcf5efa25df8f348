"""What changed in the inputs of a stage since its marker was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import cast

from pkd_dist.config.schema import Config
from pkd_dist.config.section import fields, section_of
from pkd_dist.stages.labels import label

Inputs = dict[str, object]
"""What decides a stage's outcome: dotted key -> a value that JSON can hold."""

_LOOKED_AT_LATER = ("data.class_names", "export.reads")


def changed_inputs(before: Inputs, now: Inputs) -> tuple[Inputs, list[str]]:
    """Return `before` completed, and the keys whose values differ.

    A setting that the marker's version did not have is unchanged at its default, which keeps the earlier behavior; of what a
    stage did not look at then, nobody knows.
    """
    unknown = {key: now[key] for key in _LOOKED_AT_LATER if key in now}
    before = {**unknown, **{key: default for key, default in _defaults().items() if key in now}, **before}
    return before, [key for key in {**now, **before} if now.get(key) != before.get(key)]


def all_raised(before: Inputs, now: Inputs, changed: Sequence[str], extendable: frozenset[str]) -> bool:
    """Tell whether nothing changed but numbers among `extendable`, which grew."""
    return all(key in extendable and cast(float, now[key]) > cast(float, before[key]) for key in changed)


def describe_changes(before: Inputs, now: Inputs, changed: Sequence[str]) -> str:
    """Say which inputs changed, at most three of them."""
    shown = [f"{label(key)} changed ({_short(before.get(key))} -> {_short(now.get(key))})" for key in changed[:3]]
    return "; ".join(shown) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


@cache
def _defaults() -> Inputs:
    plain = {name: field for name, field in fields(Config) if not section_of(field) and not field.is_required()}
    return {name: json.loads(json.dumps(field.default)) for name, field in plain.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:40] + "..."
