"""The section `sweep`: what `pkd sweep` searches, and how."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pkd_dist.config.section import Count, Positive, Section

Seed = Annotated[int, Field(ge=0, lt=2**31)]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RANGE_KEYS = {"low", "high", "log", "step"}


class Constraints(Section):
    size_mb: Positive | None = Field(None, description="Largest size of the exported int8 file, in MB (10^6 bytes).")
    latency_ms: Positive | None = Field(
        None,
        description="Longest median time of the int8 file for one text of dev, in ms, on the machine of the sweep.",
    )


class Final(Section):
    seeds: list[Seed] = Field(
        [1, 2, 3],
        description="Seeds with which the winner is trained again, exported and scored. The report's estimate leaves out those "
        "of sweep.seeds, on which the winner was chosen. []: the sweep ends with best.yaml.",
    )


class Sweep(Section):
    space: Literal["paper", "shape"] | dict[str, list[object] | dict[str, float | bool]] = Field(
        {},
        description="What is searched: key -> list of values, or a range `{low: 1.0e-5, high: 1.0e-3, log: true}`, with `step` on a "
        "grid. `paper`: the 108 points of the PKD paper (learning rate, temperature, alpha, beta). `shape`: layers, "
        "width and vocabulary of the student.",
    )
    sampler: Literal["grid", "random", "tpe"] = Field(
        "tpe",
        description="How points are chosen: all of them in random order, at random, or by the results so far (a tree-structured Parzen "
        "estimator).",
    )
    trials: Count | None = Field(
        None, description="Number of points. null: all of a grid; else 100, or as many as sweep.budget allows."
    )
    budget: str | None = Field(
        None,
        description="No point is started after this time, such as 90m or 2h, counted from the first call. null: no limit.",
    )
    seeds: list[Seed] = Field(
        [1], min_length=1, description="Seeds (run.seed) of each point; a point that is pruned has no further ones."
    )
    seed: Seed = Field(1, description="Seed of the sampler.")
    objective: str | None = Field(
        None,
        description="Score on dev that is maximized, such as f_1; `divergence` from the teacher is minimized. null: task.metric. Equal "
        "scores are ordered by the divergence.",
    )
    pruner: Literal["asha", "none"] = Field(
        "asha",
        description="`asha`: after 1/4, 3/4, 9/4, ... epochs (asynchronous successive halving), a point continues only if its "
        "divergence from the teacher is among the best third of those that came so far. `none`: each point is trained to its end.",
    )
    reduction: Annotated[int, Field(ge=2)] = Field(3, description="`asha` only: one of this many points continues.")
    looks_per_epoch: Count = Field(
        4, description="`asha` only: the first decision is after this part of an epoch; 4 is a quarter."
    )
    students_per_step: Literal["auto"] | Count = Field(
        "auto",
        description="Trials that a worker trains together, where their students have the same shape and the loss looks at [CLS] alone: "
        "one batched step for all. `auto`: 1 on a CPU, where it does not pay, and 8 on a GPU.",
    )
    constraints: Constraints = Field(
        Constraints(),
        description="Limits of the winner's int8 file. Larger or slower points are left out before they are trained.",
    )
    final: Final = Field(Final(), description="What is done with the winner.")

    @field_validator("space")
    @classmethod
    def _values(cls, value: object) -> object:
        for key, given in value.items() if isinstance(value, dict) else ():
            if isinstance(given, list):
                if not given or any(given.index(each) < place for place, each in enumerate(given)):
                    raise ValueError(f"{key}: must list at least one value, each once, not {given}")
                continue
            unknown, low, high, step = (
                given.keys() - _RANGE_KEYS,
                given.get("low"),
                given.get("high"),
                given.get("step"),
            )
            if unknown or low is None or high is None or any(isinstance(end, bool) for end in (low, high, step)):
                raise ValueError(f"{key}: a range is {{low: ..., high: ...}}, with log: true or step: ..., not {given}")
            log = given.get("log", False)
            if (
                not isinstance(log, bool)
                or not low < high
                or (log and low <= 0)
                or (step is not None and (log or step <= 0))
            ):
                raise ValueError(
                    f"{key}: low must be less than high, positive with log: true, and step positive and without "
                    f"log, not {given}"
                )
        return value

    @field_validator("budget")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(\.\d+)?[smhd]", value):
            raise ValueError(f"{value!r} is no time; allowed: a number with s, m, h or d, such as 90m")
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"must name each seed once, not {value}")
        return value

    @property
    def budget_seconds(self) -> float | None:
        return None if self.budget is None else float(self.budget[:-1]) * _UNITS[self.budget[-1]]
