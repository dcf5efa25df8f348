"""The points that a sweep chooses from: `sweep.space` as Optuna's distributions, and a point as overrides of the configuration."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pkd_dist.config.schema import Config
from pkd_dist.config.section import fields, section_of, type_names
from pkd_dist.errors import UserError
from pkd_dist.search.shared import SweepConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from transformers import PretrainedConfig

Point = dict[str, object]
"""Configuration key -> the value that stands for it in the study: a scalar, or JSON of any other value."""

PAPER: dict[str, list[object]] = {
    "train.learning_rate": [5.0e-5, 2.0e-5, 1.0e-5],
    "distill.temperature": [5.0, 10.0, 20.0],
    "distill.alpha": [0.2, 0.5, 0.7],
    "distill.beta": [10.0, 100.0, 500.0, 1000.0],
}
"""The 108 points of arXiv 1908.09355."""
_NOT_SEARCHED = {
    "run.dir": "each point has a folder of its own",
    "run.seed": "use sweep.seeds",
    "run.timeout_seconds": "it does not change the student",
    "teacher.finetune": "the teacher is trained once",
    "cache.dir": "all points share the sweep's cache",
}
_NOT_SEARCHED_SECTIONS = ("sweep", "metrics", "trackers", "export", "checkpoint")
_MOST_POINTS = 100_000


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        distributions: Key -> Optuna's distribution of its values.
    """

    distributions: dict[str, BaseDistribution]

    @classmethod
    def of(cls, sweep: SweepConfig, teacher: PretrainedConfig | None) -> Space:
        """Return the space of a configuration's `sweep.space`.

        Args:
            teacher: Configuration of its model; only the space `shape` depends on it.

        Raises:
            UserError: There is none, a key is unknown or cannot be searched, or a value is invalid.
        """
        config = sweep.load()
        given = config.sweep.space
        if not given:
            raise UserError(
                "is missing; name the keys to search and their values, such as "
                "{train.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}, distill.alpha: [0.2, 0.5, 0.7]}, or use paper or shape",
                "sweep.space",
            )
        named = PAPER if given == "paper" else shapes(teacher) if given == "shape" and teacher else given
        assert isinstance(named, dict)
        for key, values in named.items():
            _require_key(key)
            for value in values if isinstance(values, list) else (values["low"], values["high"]):
                _require_value(sweep, key, value)
        return cls({key: _distribution(config, key, values) for key, values in named.items()})

    def points(self) -> Iterator[Point]:
        """Yield all points of a grid, in the order of the keys. Raise UserError if there are too many."""
        values = [_grid_values(key, each) for key, each in self.distributions.items()]
        if (count := math.prod(map(len, values))) > _MOST_POINTS:
            raise UserError(
                f"is a grid of {count:,} points; at most {_MOST_POINTS:,} are allowed; search fewer values, or use the sampler random or tpe",
                "sweep.space",
            )
        for chosen in itertools.product(*values):
            yield dict(zip(self.distributions, chosen, strict=True))


def shapes(teacher: PretrainedConfig) -> dict[str, list[object]]:
    """Return the space `shape` for a teacher: up to half of its layers, evenly spaced up to the last; its width, two thirds and
    half of it; and its vocabulary, or only the tokens of the training text."""
    from pkd_dist.model.families import num_layers
    from pkd_dist.model.narrowing import can_narrow

    total = num_layers(teacher)
    depths = range(1, max(1, total // 2) + 1)
    found: dict[str, list[object]] = {
        "student.layers": [[(place + 1) * total // depth - 1 for place in range(depth)] for depth in depths]
    }
    if can_narrow(teacher):
        heads, size = teacher.num_attention_heads, teacher.hidden_size // teacher.num_attention_heads
        widths = (size * max(1, round(heads * share)) for share in (2 / 3, 1 / 2))
        found["student.hidden_size"] = [None, *dict.fromkeys(widths)]
    return found | {"student.vocabulary": ["all", "used"]}


def as_overrides(point: Mapping[str, object]) -> list[str]:
    """Return a point as `section.key=value` arguments."""
    return [f"{key}={value if _is_json(value) else json.dumps(value)}" for key, value in point.items()]


def _encoded(value: object) -> object:
    """Return what stands for a value in the study, which holds scalars only."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def _is_json(value: object) -> bool:
    return isinstance(value, str) and value[:1] in ("[", "{")


def _distribution(config: Config, key: str, given: object) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(given, list):
        return CategoricalDistribution([_encoded(value) for value in given])  # type: ignore[misc] # checked by the schema
    assert isinstance(given, dict)
    low, high, log, step = given["low"], given["high"], bool(given.get("log")), given.get("step")
    if _is_whole(key):
        if any(end is not None and end != int(end) for end in (low, high, step)):
            raise UserError(f"{key}: must be whole numbers, not {given}", "sweep.space")
        return IntDistribution(int(low), int(high), log, int(step or 1))
    if config.sweep.sampler == "grid" and step is None:
        raise UserError(f"{key}: a grid needs a list of values, or a range with a step", "sweep.space")
    return FloatDistribution(float(low), float(high), log, step)


def _is_whole(key: str) -> bool:
    field = dict(fields(Config))[key]
    names = type_names(field.annotation, field.metadata)
    return any(name.startswith("integer") for name in names) and not any(name.startswith("number") for name in names)


def _grid_values(key: str, distribution: BaseDistribution) -> Sequence[object]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution) and distribution.step
    count = int((distribution.high - distribution.low) / distribution.step + 1e-9)
    return [
        min(distribution.high, round(distribution.low + number * distribution.step, 12)) for number in range(count + 1)
    ]


def _require_key(key: str) -> None:
    known = dict(fields(Config))
    section = key.partition(".")[0]
    if key in _NOT_SEARCHED or section in _NOT_SEARCHED_SECTIONS:
        reason = _NOT_SEARCHED.get(key, f"{section} does not change the student")
        raise UserError(f"{key}: cannot be searched: {reason}", "sweep.space")
    if key in known and section_of(known[key]):
        raise UserError(f"{key}: is a section; name one of its keys", "sweep.space")


def _require_value(sweep: SweepConfig, key: str, value: object) -> None:
    """Check one value of a key. What contradicts other keys may fit other points, and is reported there."""
    try:
        sweep.load(as_overrides({key: _encoded(value)}))
    except UserError as error:
        if error.setting is not None and (
            error.setting == key or key.startswith(f"{error.setting}.") or "unknown key" in error.message
        ):
            raise UserError(f"{key}: {error.message}", "sweep.space") from None
