"""The base class of configuration sections, and iteration over their keys."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A frozen group of keys that rejects unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name
        booleans = isinstance(value, bool) or (isinstance(value, list) and any(isinstance(v, bool) for v in value))
        if booleans and bool not in _leaf_types(cls.model_fields[info.field_name].annotation):
            raise ValueError("a true/false value is not allowed here")
        return value


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of every section and key below a model, in the order of declaration."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if section := section_of(field):
            yield from fields(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section, or None for a plain value."""
    leaves = _leaf_types(field.annotation)
    return next((leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)), None)


def _leaf_types(annotation: object) -> set[object]:
    """Return the plain types that an annotation consists of."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, list, dict):
        return {leaf for part in typing.get_args(annotation) for leaf in _leaf_types(part)}
    return {annotation}
