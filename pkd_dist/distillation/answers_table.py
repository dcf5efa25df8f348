"""The answers of a run's teacher as a table: `pkd answers`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pkd_dist.data.answers import ID, PREDICTION
from pkd_dist.data.target_scale import TargetScale
from pkd_dist.distillation import cache
from pkd_dist.errors import UserError
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.probabilities import sigmoid, softmax
from pkd_dist.evaluation.thresholds import cutoffs
from pkd_dist.files import write_atomically

KINDS = (".csv", ".jsonl", ".parquet")


def write_table(
    output: Path,
    cached: Path,
    evaluated: Path,
    names: Sequence[str],
    scale: TargetScale | None,
    probabilities: bool,
    thresholds: Sequence[float] | None = None,
) -> int:
    """Write one row for each example that a teacher answered, and return their number.

    Args:
        output: `.csv`, `.jsonl` or `.parquet`; must not exist.
        cached: folder of the cache.
        evaluated: RUN/answers.safetensors.
        names: class names in the order of the logits; empty for a regression.
        scale: of a regression's targets.
        probabilities: write these instead of logits.
        thresholds: of each class, where a text can have several; `evaluated` has logits that are shifted by them.

    Raises:
        UserError: there are no complete answers, or the table cannot be written.
    """
    if output.suffix not in KINDS:
        raise UserError(f"{output} is not one of {', '.join(KINDS)}", "--output")
    if not output.parent.is_dir():
        raise UserError(f"no such folder: {output.parent}", "--output")
    if output.exists():
        raise UserError(f"{output} exists; remove it, or give another name", "--output")
    if ID in names:
        raise UserError(f"{ID!r} is a class and the name of the column of ids; rename the class with task.class_names")
    if probabilities and not names:
        raise UserError("a regression has values, not probabilities; leave it out", "--probabilities")
    found: dict[int, list[float]] = {}
    for ids_N, values_NC in _answers(cached, evaluated, scale, thresholds):
        if probabilities:
            values_NC = softmax(values_NC) if thresholds is None else sigmoid(values_NC)
        for example, values in zip(ids_N.tolist(), values_NC.tolist(), strict=True):
            found.setdefault(example, values)  # the same text in two splits
    write_atomically(output, lambda tmp: _write(tmp, output.suffix, [ID, *(names or [PREDICTION])], found))
    return len(found)


def _answers(
    cached: Path, evaluated: Path, scale: TargetScale | None, thresholds: Sequence[float] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield example ids (N,) and logits (N, C) float64, of a regression values in its own unit."""
    manifest = cache.read_manifest(cached)
    if manifest is None:
        raise UserError(f"{cached}: has no complete cache of the teacher's answers; rerun the run's command")
    for ids_N, logits in cache.CacheReader(cached, manifest.fingerprint, range(len(manifest.shards))).logits():
        values_NC = logits.double().numpy()
        yield ids_N, values_NC if scale is None else values_NC * scale.std + scale.mean
    shift = 0.0 if thresholds is None else cutoffs(np.array(thresholds))
    for answered in predictions.read(evaluated).values():
        yield answered.ids_N, answered.logits["teacher"].astype(np.float64) + shift


def _write(path: Path, kind: str, columns: Sequence[str], found: dict[int, list[float]]) -> None:
    rows: Iterable[list[int | float]] = ([example, *values] for example, values in sorted(found.items()))
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
        pyarrow.parquet.write_table(table, path)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
