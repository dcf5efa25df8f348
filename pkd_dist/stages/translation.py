"""Reads the stage markers of pkd_dist 0.1.0, format 1, whose inputs were named by phrases for people.

Translated once, when a run folder is opened; from then on they have today's format. A format-1 marker keeps the digest of
its own inputs as fingerprint, so its checkpoints are still those of this run.
"""

from __future__ import annotations

from collections.abc import Mapping

from pkd_dist.files import digest_of
from pkd_dist.stages.base import NAMES

_FORMAT = 2
"""Of what `translate` returns: stable keys, no checksums."""

_PHRASES: dict[str, dict[str, str]] = {
    "data": {"tokenizer": "teacher.tokenizer"},
    "teacher": {
        "teacher.model": "teacher.model.weights",
        "classes": "data.class_names",
    },
    "cache": {
        "cached": "cache.needed",
        "teacher": "teacher.weights",
        "tokenizer": "teacher.tokenizer",
        "tokens": "data.tokens",
        "max_length": "task.max_length",
        "layers": "cache.layers",
        "dtype": "cache.dtype",
        "precision": "cache.precision",
        "states": "distill.states",
    },
    "init": {
        "teacher": "teacher.weights",
        "classes": "data.class_names",
        "teacher.model": "teacher.model.weights",
        "student.init weights": "student.init.weights",
    },
    "distill": {
        "the student's starting weights": "init.weights",
        "the teacher's answers": "cache.fingerprint",
        "the training data": "data.training",
    },
    "evaluate": {"the student": "distill.weights", "the teacher": "teacher.weights"},
    "export": {"the student": "distill.weights", "results": "evaluate.results"},
    "report": {"results": "evaluate.results", "export": "export.weights"},
}
"""Stage -> key in format 1 -> key today; keys that are not here are configuration keys."""


def translate(name: str, marker: Mapping[str, object]) -> dict[str, object]:
    """Return a marker of format 1 as one of format 2.

    Raises:
        LookupError, TypeError, ValueError: it is damaged.
    """
    inputs = marker["inputs"]
    if not isinstance(inputs, dict):
        raise TypeError("inputs")
    reached = NAMES[: NAMES.index(name) + 1]
    translated: dict[str, object] = {f"version.{stage}": 1 for stage in reached}
    translated |= {_key(name, key): value for key, value in inputs.items()}
    fields = {key: value for key, value in marker.items() if key not in ("inputs", "outputs")}
    return {
        **fields,
        "inputs": translated,
        "fingerprint": digest_of(inputs),
        "outputs": _outputs(name, marker.get("outputs")),
        "format": _FORMAT,
    }


def _key(name: str, key: str) -> str:
    if key in _PHRASES[name]:
        return _PHRASES[name][key]
    if key.startswith("the ") and key.endswith(" data"):
        return f"data.{key[4:-5]}"
    if key.startswith("the text of "):
        return f"task.unlabeled:{key.removeprefix('the text of ')}"
    if name == "data" and not key.startswith("task."):
        return f"task.data:{key}"  # a file, by its name
    return key


def _outputs(name: str, outputs: object) -> object:
    """Nest what the stage `data` said of each token set."""
    if name != "data" or not isinstance(outputs, dict):
        return outputs
    return {**outputs, "sets": {split: outputs[split] for split in outputs["sets"]}}
