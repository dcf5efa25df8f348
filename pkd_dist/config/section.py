"""The base class of configuration sections, and iteration over their keys."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_TYPE_NAMES: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "true/false", object: "value"}

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of keys that rejects unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: object) -> object:
        if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, list) else [value])):
            raise ValueError("a NUL character is not allowed in a path or a name")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name
        booleans = isinstance(value, bool) or (isinstance(value, list) and any(isinstance(v, bool) for v in value))
        if booleans and bool not in _leaf_types(cls.model_fields[info.field_name].annotation):
            field = cls.model_fields[info.field_name]
            allowed = ", ".join(type_names(field.annotation, field.metadata)).replace("`", "")
            quotes = "; YAML reads yes, no, on and off as true/false, put text in quotes"
            raise ValueError(f"a true/false value is not allowed here; allowed: {allowed}{quotes}")
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


def type_names(annotation: object, constraints: Sequence[object] = ()) -> list[str]:
    """Return the names of the types and values that an annotation allows, with the ranges of numbers."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner, *extra = arguments
        return type_names(inner, [m for e in extra for m in getattr(e, "metadata", [e])])
    if origin in (typing.Union, types.UnionType):
        return [name for part in arguments for name in type_names(part)]
    if origin is Literal:
        return [f"`{value}`" for value in arguments]
    if origin is dict:
        return ["mapping of " + " to ".join("/".join(type_names(part)) for part in arguments)]
    if origin is list:
        return ["list of " + "/".join(type_names(arguments[0]))]
    if annotation is type(None):
        return ["null"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    bounds = [f"{_SIGNS[k]} {getattr(c, k)}" for c in constraints for k in _SIGNS if getattr(c, k, None) is not None]
    return [_TYPE_NAMES[annotation] + (f" {', '.join(bounds)}" if bounds else "")]
