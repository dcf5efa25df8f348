"""What all points of a study share: the teacher, the data and the cache of the teacher's outputs.

A *base* is a run with the stages data, teacher and cache. Points have the same base unless they differ in settings that these
stages depend on, such as `task.augment.copies` or `student.vocabulary`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, make_folder
from pkd_dist.stages.context import teacher_name

BASE_STAGES = ("data", "teacher", "cache")
_PAIRS = {"states", "patience", "pair_embeddings", "pair_last_layer", "relation_layer"}
"""Of the section `distill`: they decide which states are compared."""
_TERMS = {"preset", "gram", "relations", "attention"}
"""Of the section `distill`: they decide whether states of all tokens are compared."""
_OF_PAIRS = {"student.layers", "student.num_layers", "distill.alpha", "distill.beta"}
"""They decide it, too, where the cache holds the compared states alone, or there may be none."""
_SECTIONS = ("task", "teacher", "cache")
_STUDENT_KEYS = {"init", "vocabulary", "min_count", "max_length"}
"""Of the section `student`: they decide which tokens the student reads."""


@dataclass(frozen=True)
class SweepConfig:
    """The configuration of a study as it was given, and the folder.

    Attributes:
        file: The YAML file.
        given: `section.key=value` overrides of it.
        folder: Of the study.
    """

    file: str
    given: tuple[str, ...]
    folder: Path

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """Return the configuration with more overrides.

        Raises:
            UserError: They contradict each other, or a value is invalid.
        """
        return load(self.file, [*self.given, f"run.dir={json.dumps(str(self.folder))}", *overrides])

    @property
    def teacher_folder(self) -> Path:
        """The run that fine-tunes the teacher."""
        return self.folder / "teacher"

    def of_teacher(self) -> list[str]:
        """Return the overrides of that run."""
        return [_override("run.dir", str(self.teacher_folder)), "cache.dir=null", "metrics.enabled=false"]

    def of_point(self, point: Sequence[str], folder: Path, seed: int) -> list[str]:
        """Return the overrides of a run of the student, on the study's teacher and cache.

        Args:
            point: Overrides of the point.
            folder: Of the run.
        """
        plain = self.load()
        overrides = [*point, _override("run.dir", str(folder)), f"run.seed={seed}", "evaluate.result_dir=null"]
        if plain.teacher.finetune:
            count = max(len(plain.teacher.models), len(plain.teacher.finetune.seeds or ()))
            folders = [str((self.teacher_folder / teacher_name(number)).absolute()) for number in range(1, count + 1)]
            overrides += [_override("teacher.model", folders[0] if count == 1 else folders), "teacher.finetune=null"]
        config = self.load(overrides)
        if not config.cache.enabled:
            return overrides
        by_token = config.distill.all_tokens and config.distill.compares_states
        if not (by_token or config.teacher.answers) and config.cache.layers is None:
            overrides.append("cache.layers=all")  # for points that pair other layers
        return [*overrides, _override("cache.dir", str((self.base_folder(config) / "cache").absolute()))]

    def of_base(self, point: Sequence[str]) -> tuple[Path, list[str]]:
        """Return the folder and the overrides of the base of a point."""
        config = self.load(self.of_point(point, self.folder, self.load().run.seed))
        folder = self.base_folder(config)
        return folder, [*self.of_point(point, folder, self.load().run.seed), "metrics.enabled=false"]

    def base_folder(self, config: Config) -> Path:
        """Return where the base of a point's configuration is: another for each value of what its stages depend on."""
        from pkd_dist.model.student import INIT_METHODS  # brings torch, which a submitting host may lack

        distill, student = config.distill, config.student
        # the training alone reads min_confidence
        exclude: Any = {"cache": {"dir"}, "task": {"augment": {"min_confidence"}}}
        content = config.model_dump(mode="json", include=set(_SECTIONS), exclude=exclude)
        content["cache"]["layers"] = content["cache"]["layers"] if content["cache"]["layers"] != "all" else None
        reads = student.model_dump(mode="json", include=_STUDENT_KEYS)
        if student.init in (*INIT_METHODS, *self.load().teacher.models):
            reads["init"] = None  # it has its teacher's tokenizer
        pairs = None
        # which layers are paired decides what the cache holds, or whether there is one
        if distill.all_tokens or not distill.alpha:
            weights = [name for name, weight in distill.weights.items() if weight]
            pairs = [student.layers, student.num_layers, weights, distill.model_dump(mode="json", include=_PAIRS)]
        return self.folder / "bases" / digest_of([content, reads, pairs])[:8]


def needs_own_base(key: str, config: Config) -> bool:
    """Return whether points of a configuration that differ in this key may have different bases."""
    section, _, name = key.partition(".")
    keys = {"student": _STUDENT_KEYS, "distill": _PAIRS | _TERMS}.get(section, set())
    of_pairs = key in _OF_PAIRS and (config.distill.all_tokens or not config.distill.alpha)
    return section in _SECTIONS or name in keys or of_pairs


def make_own_folder(folder: Path) -> None:
    """Make a folder of a study.

    Raises:
        UserError: It cannot be one.
    """
    try:
        make_folder(folder)
    except OSError as error:
        place = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        named = folder if place.is_dir() else place
        problem = f"{named} cannot be a folder ({error.strerror}); remove what is in its place, or choose another"
        raise UserError(problem, "--output") from None


def _override(key: str, value: object) -> str:
    return f"{key}={json.dumps(value)}"
