"""The answers of a run's teacher as a table: `pkd answers`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pkd_dist.config.load import load
from pkd_dist.data.answers import ID, PREDICTION
from pkd_dist.data.target_scale import TargetScale
from pkd_dist.distillation import cache
from pkd_dist.errors import UserError
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.metrics import log_softmax
from pkd_dist.files import write_atomically
from pkd_dist.stages.base import Markers
from pkd_dist.stages.translation import translate

_KINDS = (".csv", ".jsonl", ".parquet")


def write_table(run: Path, output: Path, probabilities: bool) -> tuple[int, Sequence[str]]:
    """Write one row for each example that the teacher of a run answered, and return their number and the columns.

    Raises:
        UserError: the run has no cache or was not evaluated, or the file exists or is of another kind.
    """
    if output.suffix not in _KINDS:
        raise UserError(f"{output} is not one of {', '.join(_KINDS)}", "--output")
    if output.exists():
        raise UserError(f"{output} exists; remove it, or give another name", "--output")
    marker = Markers(run, translate).read("data") if (run / "config.yaml").is_file() else None
    if marker is None or not marker.outputs:
        raise UserError(f"{run}: is not the folder of a run; give one, such as runs/demo")
    names, scale = list(map(str, marker.outputs["class_names"])), marker.outputs.get("scale")  # type: ignore[call-overload]
    if ID in names:
        raise UserError(f"{run}: has a class {ID!r}, the name of the column of ids; rename it with task.class_names")
    if probabilities and not names:
        raise UserError("a regression has values, not probabilities; leave it out", "--probabilities")
    found: dict[int, list[float]] = {}
    for ids_N, values_NC in _answers(run, TargetScale(**scale) if scale else None):  # type: ignore[arg-type]
        values_NC = np.exp(log_softmax(values_NC)) if probabilities else values_NC
        for example, values in zip(ids_N.tolist(), values_NC.tolist(), strict=True):
            found.setdefault(example, values)  # the same text in two splits
    columns = names or [PREDICTION]
    write_atomically(output, lambda tmp: _write(tmp, output.suffix, [ID, *columns], found))
    return len(found), columns


def _answers(run: Path, scale: TargetScale | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield example ids (N,) and logits (N, C) float64, of a regression values in its own unit."""
    config = load(str(run / "config.yaml"))
    folder = Path(config.cache.dir) if config.cache.dir else run / "cache"
    manifest = cache.read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: has no complete cache of the teacher's answers; rerun the run's command")
    reader = cache.CacheReader(folder, manifest.fingerprint, range(len(manifest.shards)))
    for ids_N, logits in reader.logits():
        values_NC = logits.double().numpy()
        yield ids_N, values_NC if scale is None else values_NC * scale.std + scale.mean
    for answered in predictions.read(run / predictions.FILE).values():
        yield answered.ids_N, answered.logits["teacher"].astype(np.float64)


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
